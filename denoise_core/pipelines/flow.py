"""The work of a run on Ray: the Ray Data pipeline, the assembly of large images, their results."""

from __future__ import annotations

import gc
import json
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data

from denoise_core import worklist
from denoise_core.errors import ImageError, RunFailed, StorageError, UsageError, WorkerDied
from denoise_core.pipelines.cluster import (
    beside_driver,
    check_memory,
    end_execution,
    fit_actors,
    set_data_context,
    stopped,
)
from denoise_core.pipelines.job import SAFE, Facts, Job, now
from denoise_core.pipelines.ledger import Ledger
from denoise_core.pipelines.stages import (
    Denoise,
    Expand,
    Read,
    Write,
    drop_regions,
    publish_image,
)
from denoise_core.storage import storage_for

# Source bytes of the images that share one read task: small ones travel together.
TASK_BYTES = 4_000_000
TASK_IMAGES = 32
# Bytes of decoded pixels that may wait for each actor; those for GPUs were never tried on one.
CPU_READ_AHEAD = 64_000_000
GPU_READ_AHEAD = 512_000_000
# An image file of more bytes is large.
LARGE_BYTES = 8_000_000
# A run without any finished row for this long, beyond one image's own limit, is stuck.
NO_PROGRESS_S = 600
# Somebody who waits for results hears of it this often, results or not.
TICK_S = 0.5
# Work that nobody waits for any more has so long to end before the process goes on to exit.
END_S = 10.0


@dataclass(frozen=True, slots=True)
class Stages:
    """What is called to make the bodies of the stages that touch pixels; `standins` has others."""

    read: Callable[[Job, Any], Any] = Read
    denoise: type = Denoise
    write: Callable[[Job, Any], Any] = Write


STAGES = Stages()


class Flow:
    """The results of a work list as they come: iterate once. `tell` is called with what to know.

    Ray Data is read in a thread, so that the driver keeps showing progress and saving rows while
    nothing arrives, and reacts to a signal at once. A context manager: what still runs at the end
    of the block is ended.
    """

    def __init__(
        self,
        job: Job,
        shards: list[str],
        *,
        mean_bytes: float,
        images: int,
        stages: Stages = STAGES,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.job = job
        # The error of a run that failed in this process holds its actors, and they its CPUs.
        gc.collect()
        actor: Any = Ledger
        # Counts of deaths must outlast the machines that are lost.
        ledger = actor.options(**beside_driver()).remote()
        self.dataset = build_dataset(
            job, shards, ledger, mean_bytes=mean_bytes, images=images, stages=stages, tell=tell
        )
        self.inbox: queue.SimpleQueue[list[str] | BaseException | None] = queue.SimpleQueue()
        self.assembling: dict[Any, Facts] = {}
        self.thread = threading.Thread(target=self._feed, daemon=True)

    def __enter__(self) -> Flow:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ray.exceptions.RayError):
            for reference in self.assembling:
                ray.cancel(reference, force=True)
        end_execution(self.thread, patience_s=END_S)

    def __iter__(self) -> Iterator[Facts | None]:
        """Yield facts, and None about every TICK_S. Raises RunFailed."""
        self.thread.start()
        fed = False
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

    def assemble(self, facts: Facts) -> None:
        """Have an image assembled from its regions; its final facts come out of the iteration."""
        self.assembling[assemble_image.remote(self.job, facts)] = facts

    def drop(self, images: list[Facts]) -> None:
        """Have the regions of assembled images deleted, now that their rows are safe."""
        drop_staged.remote(self.job, images)

    def _feed(self) -> None:
        try:
            for batch in self.dataset.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                self.inbox.put(batch["facts"].to_pylist())
            self.inbox.put(None)
        except BaseException as error:
            self.inbox.put(error)

    def _assembled(self) -> Iterator[Facts]:
        waiting = list(self.assembling)
        ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0) if waiting else ([], [])
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
        """Return one sentence for the user; what is finished is safe."""
        error = stopped(
            error,
            what="the work",
            output=self.job.config.output,
            run_id=self.job.run_id,
            options=self.job.options,
            patience_s=NO_PROGRESS_S + self.job.config.timeout_per_image,
        )
        return RunFailed(f"{error} {SAFE}")


def build_dataset(
    job: Job,
    shards: list[str],
    ledger: Any,
    *,
    mean_bytes: float,
    images: int,
    stages: Stages,
    tell: Callable[[str], None],
) -> ray.data.Dataset:
    """Return the lazy pipeline from work-list shards to rows of facts."""
    resources = fit_actors(job.config, images=images, tell=tell)
    check_memory(job, resources, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    together = int(max(1, min(TASK_IMAGES, TASK_BYTES // max(1, mean_bytes))))
    # With few images, smaller tasks keep every actor busy.
    together = max(1, min(together, images // (4 * resources.actors[1])))
    # Ray retries what died without end; the ledger ends it for a poisoned image, this for the rest.
    set_data_context(
        patience_s=NO_PROGRESS_S + job.config.timeout_per_image,
        read_ahead=(together, GPU_READ_AHEAD if resources.gpus else CPU_READ_AHEAD),
    )
    # The next image waits in the actor's hands, so that a CPU goes on at once; a large one, which
    # takes seconds, need not. A pool that may grow does so by what is in its actors' hands.
    grows = resources.actors[0] < resources.actors[1]
    bound = 1 if mean_bytes > LARGE_BYTES else 2
    in_flight = None if grows or together > 1 or resources.gpus else bound
    task = {"num_cpus": 0.5}
    dataset = ray.data.from_items(
        [{"shard": uri} for uri in shards], override_num_blocks=len(shards)
    )
    dataset = dataset.map_batches(_ReadShards(job), batch_format="pyarrow", batch_size=None)
    _make_cheap(dataset)
    dataset = dataset.repartition(target_num_rows_per_block=together)
    _make_cheap(dataset)
    dataset = dataset.map_batches(
        Expand(job, ledger), batch_format="pyarrow", batch_size=None, **task
    )
    dataset = dataset.map_batches(
        stages.read(job, ledger), batch_format="pyarrow", batch_size=None, **task
    )
    dataset = dataset.map_batches(
        stages.denoise,
        fn_constructor_args=(job, ledger),
        fn_constructor_kwargs={
            "threads": resources.threads,
            "use_gpu": resources.gpus > 0,
        },
        batch_format="pyarrow",
        batch_size=max(together, 1),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus or None,
        compute=ray.data.ActorPoolStrategy(
            min_size=resources.actors[0],
            max_size=resources.actors[1],
            max_tasks_in_flight_per_actor=in_flight,
        ),
    )
    return dataset.map_batches(
        stages.write(job, ledger), batch_format="pyarrow", batch_size=None, **task
    )


def _make_cheap(dataset: ray.data.Dataset) -> None:
    """Give the last stage next to no CPU, and let it end however few of its blocks are taken.

    Cutting a work list is little work. A stage waiting for its blocks to be taken, which happens
    turn by turn, keeps its CPU; Ray Data would give it a whole one, all that some hosts have, and
    `repartition` has no argument for it.
    """
    arguments = {"num_cpus": 0.01, "_generator_backpressure_num_objects": 2 * worklist.SHARD_ROWS}
    dataset._logical_plan.dag.ray_remote_args.update(arguments)


@dataclass(frozen=True, slots=True)
class _ReadShards:
    job: Job

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for uri in table["shard"].to_pylist():
            yield worklist.read_shard(storage_for(uri, self.job.options), uri)


@ray.remote(num_cpus=0.5, max_retries=3)
def assemble_image(job: Job, facts: Facts) -> Facts:
    """Stream the staged regions of one image to a TIFF or a Zarr and publish it in one step."""
    facts = _whole(facts)
    try:
        facts["metadata_lost"] = list(publish_image(job, facts))
    except (ImageError, StorageError, UsageError) as error:
        facts |= _error(error)
    return {**facts, "finished_at": now()}


@ray.remote(num_cpus=0.5, max_retries=0)
def drop_staged(job: Job, images: list[Facts]) -> None:
    """Delete staged regions; those that cannot be are the end of the run's to delete."""
    with suppress(StorageError):
        for facts in images:
            drop_regions(job, facts)


def _whole(facts: Facts) -> Facts:
    return {**facts, "regions": 1, "in_regions": False, "region_count": facts["regions"]}


def _error(error: Exception) -> Facts:
    return {
        "error_stage": "write",
        "error_type": type(error).__name__,
        "error_message": str(error),
    }
