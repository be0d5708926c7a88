"""The work of a run on Ray: the Ray Data pipeline, the assembly of large images, their results."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError

from denoise_core import worklist
from denoise_core.config import DenoiseConfig, parse_actors
from denoise_core.errors import ImageError, RunFailed, StorageError, UsageError, WorkerDied
from denoise_core.pipelines.job import Facts, Job, now
from denoise_core.pipelines.stages import Denoise, Expand, Ledger, Read, Write, publish_image
from denoise_core.storage import join, storage_for

# Source bytes of the images that share one read task: small ones travel together.
TASK_BYTES = 4_000_000
TASK_IMAGES = 32
# Up to so many images one actor is enough, with a thread for each core.
FEW_IMAGES = 16
# A run without any finished row for this long, beyond one image's own limit, is stuck.
NO_PROGRESS_S = 600
# Somebody who waits for results hears of it this often, results or not.
TICK_S = 0.5


class Flow:
    """The results of a work list as they come: iterate once.

    Ray Data is read in a thread, so that the driver keeps showing progress and saving rows while
    nothing arrives, and reacts to a signal at once.
    """

    def __init__(
        self, job: Job, shards: list[str], *, model: str, mean_bytes: float, images: int
    ) -> None:
        self.job = job
        actor: Any = Ledger
        self.dataset = build_dataset(
            job, shards, actor.remote(), model=model, mean_bytes=mean_bytes, images=images
        )
        self.inbox: queue.SimpleQueue[list[str] | BaseException | None] = queue.SimpleQueue()
        self.assembling: dict[Any, Facts] = {}
        self.stopped = False

    def __iter__(self) -> Iterator[Facts | None]:
        """Yield facts, and None about every TICK_S. Raises RunFailed."""
        threading.Thread(target=self._feed, daemon=True).start()
        fed = False
        try:
            while not fed or self.assembling:
                try:
                    arrived = self.inbox.get(timeout=TICK_S)
                except queue.Empty:
                    arrived = []
                if isinstance(arrived, BaseException):
                    raise self._failure(arrived)
                fed = fed or arrived is None
                yield from map(json.loads, arrived or ())
                yield from self._assembled()
                yield None
        finally:
            self.stopped = True

    def assemble(self, facts: Facts) -> None:
        """Have an image assembled from its regions; its final facts come out of the iteration."""
        self.assembling[assemble_image.remote(self.job, facts)] = facts

    def _feed(self) -> None:
        try:
            for batch in self.dataset.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                self.inbox.put(batch["facts"].to_pylist())
                if self.stopped:
                    return
            self.inbox.put(None)
        except BaseException as error:
            self.inbox.put(error)

    def _assembled(self) -> Iterator[Facts]:
        ready, _ = ray.wait(list(self.assembling), timeout=0) if self.assembling else ([], [])
        for reference in ready:
            facts = self.assembling.pop(reference)
            try:
                yield ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise self._failure(error) from error
            except ray.exceptions.RayError as error:
                text = (
                    f"the worker died at assembling this image ({type(error).__name__}); look at "
                    "its memory and at the space for temporary files."
                )
                yield {**_whole(facts), **_error(WorkerDied(text)), "finished_at": now()}

    def _failure(self, error: BaseException) -> RunFailed:
        """One sentence for the user; the trace goes to a file for whoever mends it."""
        uri = join(self.job.config.output, ".denoise", f"trace-{self.job.run_id}.txt")
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else type(error).__name__
        if isinstance(error, ExecutionTimeoutError):
            limit = int(NO_PROGRESS_S + self.job.config.timeout_per_image)
            reason = (
                f"nothing moved for {limit} s; the cluster has no room for the actors (look at "
                "`ray status`), or a machine hangs"
            )
        try:
            text = f"{type(error).__name__}: {error}"
            storage_for(uri, self.job.options).write(uri, text.encode("utf-8", "backslashreplace"))
        except StorageError:
            uri = "lost, because the output cannot be written"
        return RunFailed(
            f"the work stopped on an error that no image is to blame for: {reason}. Finished "
            f"images are safe, the same command goes on with the rest. Trace: {uri}"
        )


@dataclass(frozen=True, slots=True)
class Resources:
    """What one actor asks of Ray, and the threads that TensorFlow may use in it."""

    actors: tuple[int, int]
    cpus: float
    gpus: float
    threads: int | None


def choose_resources(
    config: DenoiseConfig, cluster: dict[str, float], *, images: int, hosts: int = 1
) -> Resources:
    """Share the cluster's GPUs, or where there are none its CPUs, among the actors.

    A few images get one actor: a second would be ready when they are done.

    On CPUs the actors ask for half of the cores in total, so that reading and writing never
    starve (ray#44687), while their threads cover all of them. A hundredth less keeps an actor's
    request unequal to a task's: Ray Data fuses equal neighbours, and decoding would wait for the
    model. On several `hosts` they ask for less: actors of lost hosts begin again on the others, and
    must leave room for two tasks there, even if half of the hosts are gone.
    """
    cpus, gpus = int(cluster.get("CPU", 1)), cluster.get("GPU", 0.0)
    wanted = parse_actors(config.actors)
    share = None if config.gpus_per_actor == "auto" else float(config.gpus_per_actor)
    if "CPU" not in cluster and not gpus:
        return _resources_to_come(wanted, share)
    if share is not None and share > gpus:
        raise UsageError(
            f"--gpus-per-actor {share:g}: the cluster has {gpus:g} GPU(s). Use 'auto' for CPUs."
        )
    if gpus > 0 and share != 0.0:
        share = share or 1.0
        return Resources(wanted or (1, max(1, int(gpus / share))), 1.0, share, None)
    most = 1 if images <= FEW_IMAGES else min(cpus, max(2, cpus // 4))
    count = wanted or (most, most)
    threads = max(1, cpus // count[1])
    total = 0.5 * cpus
    if hosts > 1:
        total = min(total, cpus * (hosts // 2) / hosts - 1.0)
    return Resources(count, max(0.01, round(total / count[1], 2) - 0.01), 0.0, threads)


def _resources_to_come(wanted: tuple[int, int] | None, share: float | None) -> Resources:
    """Actors for a cluster whose workers an autoscaler has yet to start, a head with no CPUs.

    Nothing in Ray tells a job what could be started (2.60 keeps it from its own libraries too).
    """
    if wanted is None or not share:
        raise UsageError(
            "the cluster has no workers yet, so the actors cannot be fitted to them: state "
            "--gpus-per-actor and --actors MIN:MAX, or keep one worker running (minReplicas: 1)."
        )
    return Resources(wanted, 1.0, share, None)


def build_dataset(
    job: Job, shards: list[str], ledger: Any, *, model: str, mean_bytes: float, images: int
) -> ray.data.Dataset:
    """Return the lazy pipeline from work-list shards to rows of facts."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.execution_options.verbose_progress = False
    # Flow makes one sentence of what ends a run; Ray Data would print all of its trace.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL + 1)
    # Ray retries what died without end; the ledger ends it for a poisoned image, this for the rest.
    context.execution_no_progress_timeout_s = int(NO_PROGRESS_S + job.config.timeout_per_image)
    config = job.config
    hosts = sum(bool(node["Alive"] and node["Resources"].get("CPU")) for node in ray.nodes())
    resources = choose_resources(config, ray.cluster_resources(), images=images, hosts=hosts)
    together = int(max(1, min(TASK_IMAGES, TASK_BYTES // max(1, mean_bytes))))
    # With few images, smaller tasks keep every actor busy.
    together = max(1, min(together, images // (4 * resources.actors[1])))
    task = {"num_cpus": 0.5}
    dataset = ray.data.from_items(
        [{"shard": uri} for uri in shards], override_num_blocks=len(shards)
    )
    dataset = dataset.flat_map(_ReadShard(job), **task)
    dataset = dataset.repartition(target_num_rows_per_block=together)
    dataset = dataset.map_batches(
        Expand(job, ledger), batch_format="pyarrow", batch_size=None, **task
    )
    dataset = dataset.map_batches(
        Read(job, ledger), batch_format="pyarrow", batch_size=None, **task
    )
    dataset = dataset.map_batches(
        Denoise,
        fn_constructor_args=(job, ledger),
        fn_constructor_kwargs={
            "model": model,
            "threads": resources.threads,
            "use_gpu": resources.gpus > 0,
        },
        batch_format="pyarrow",
        batch_size=max(together, 1),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus or None,
        compute=ray.data.ActorPoolStrategy(
            min_size=resources.actors[0], max_size=resources.actors[1]
        ),
    )
    return dataset.map_batches(Write(job, ledger), batch_format="pyarrow", batch_size=None, **task)


@dataclass(frozen=True, slots=True)
class _ReadShard:
    job: Job

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        storage = storage_for(row["shard"], self.job.options)
        rows: list[dict[str, Any]] = worklist.read_shard(storage, row["shard"]).to_pylist()
        return rows


@ray.remote(num_cpus=0.5, max_retries=3)
def assemble_image(job: Job, facts: Facts) -> Facts:
    """Stream the staged regions of one image to a tiled TIFF and publish it in one atomic step."""
    facts = _whole(facts)
    try:
        facts["metadata_lost"] = list(publish_image(job, facts))
    except (ImageError, StorageError, UsageError) as error:
        facts |= _error(error)
    return {**facts, "finished_at": now()}


def _whole(facts: Facts) -> Facts:
    return {**facts, "regions": 1, "region_count": facts["regions"]}


def _error(error: Exception) -> Facts:
    return {
        "error_stage": "write",
        "error_type": type(error).__name__,
        "error_message": str(error),
    }
