"""What the pipelines share of Ray: Ray Data's settings, an actor's resources and place, deaths."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import ray
import ray.data
from ray._private import state
from ray._private.worker import global_worker
from ray.data._internal import stats
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator
from ray.data._internal.execution import metadata_fetcher, node_trackers
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators import actor_pool_map_operator
from ray.data._internal.utils.cached_ray_internals import get_actor_locations
from ray.data.exceptions import ExecutionTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from denoise_core.config import DenoiseConfig, EvaluateConfig, parse_actors
from denoise_core.errors import RunFailed, StorageError, UsageError
from denoise_core.pipelines.job import Job
from denoise_core.storage import StorageOptions, join, storage_for

# Up to so many images one actor on each host is enough, with a thread for each core.
FEW_IMAGES = 16
# Ray Data's scheduler waits for tasks, but with all of them held back by full queues it turns
# without a pause: in a training worker it took 0.6 of a core and, by Python's lock, half the speed.
# From turn to turn without an event the pause doubles, up to the second.
PAUSES_S = 0.001, 0.05
# Kept of a stage's blocks, for `Dataset.stats`; of a million images they would take gigabytes.
MOST_STATISTICS = 1_000
# With so many tasks waiting to read, no further work list is opened.
MOST_ITEMS = 1_000


# What Ray Data executes in this process.
_executors: WeakSet[Any] = WeakSet()


class _Turn(ExecutionCallback):
    """Ends each turn of Ray Data's scheduler: forgets old statistics, rests if nothing happened."""

    def __init__(self) -> None:
        self.seen, self.pause_s = 0, PAUSES_S[0]

    def before_execution_starts(self, executor: Any) -> None:
        _executors.add(executor)

    def on_execution_step(self, executor: Any) -> None:
        seen = 0
        for op in executor._topology:
            each = op.metrics
            seen += each.num_tasks_submitted + each.num_tasks_finished
            seen += each.num_task_outputs_generated
            for blocks in op.get_stats().values():
                if len(blocks) > MOST_STATISTICS:
                    blocks.clear()
        shortest, longest = PAUSES_S
        self.pause_s = min(2 * self.pause_s, longest) if seen == self.seen else shortest
        self.seen = seen
        time.sleep(self.pause_s)


class _ReadAhead(BackpressurePolicy):
    """Bounds what waits before the actors and, as work items, before the stage that reads.

    Ray Data alone reads ahead what its object store holds, most of all while the actors start, and
    whatever process reads such pages keeps them in its resident memory. Work items are too small
    for it to see at all, but the driver pays kilobytes for each.
    """

    KEY = "denoise.read_ahead"

    def can_add_input(self, op: Any) -> bool:
        """Whether a stage may begin another task."""
        following = _following(op)
        if following is None:
            return True
        waiting, begun = self._topology[following], op.num_active_tasks()
        count = waiting.total_enqueued_input_blocks() + begun
        pools = following.get_autoscaling_actor_pools()
        if not pools:
            return begun == 0 and bool(count < MOST_ITEMS)
        blocks, size = self._data_context.get_config(self.KEY)
        actors = max(1, pools[0].current_size())
        coming = begun * (op.metrics.average_bytes_per_output or 0)
        size_ahead = waiting.total_enqueued_input_blocks_bytes() + coming
        return bool(count < blocks * actors or size_ahead < size * actors)


def _following(op: Any) -> Any:
    """Return the stage after one that comes before the actors; None of others."""
    if len(op.output_dependencies) != 1 or op.get_autoscaling_actor_pools():
        return None
    return op.output_dependencies[0]


def set_data_context(
    *,
    ordered: bool = False,
    patience_s: float | None = None,
    read_ahead: tuple[int, int] | None = None,
) -> None:
    """Make Ray Data print nothing, rest between turns and keep the order if `ordered`.

    Without a finished task for `patience_s` seconds it gives up. `read_ahead` are the blocks and
    the bytes for each actor, whichever is more, up to which the stage before them goes ahead.
    """
    context = ray.data.DataContext.get_current()
    policies = [*ENABLED_BACKPRESSURE_POLICIES, *([_ReadAhead] if read_ahead else [])]
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)
    context.set_config(_ReadAhead.KEY, read_ahead)
    context.enable_progress_bars = False
    context.execution_options.preserve_order = ordered
    context.execution_options.verbose_progress = False
    context.custom_execution_callback_classes = [_Turn]
    # What Ray Data would wrap it in travels without it, and `stopped` wants a RunFailed.
    context.raise_original_map_exception = True
    if patience_s is not None:
        context.execution_no_progress_timeout_s = int(patience_s)
    # Ray Data 2.60 fetches the metadata of blocks in a thread. Small blocks, which the driver holds
    # itself, then stay in its memory, and fewer of any size pass in a second: README, "Scale".
    # RAY_DATA_METADATA_PREFETCH_ON_THREAD=0 says the same where it is set before Ray Data's import.
    metadata_fetcher._PREFETCH_ON_THREAD = False
    actor_pool_map_operator.get_actor_locations = _known_locations
    # The pipelines make one sentence of what ends a run; Ray Data would print all of its trace.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL + 1)


def end_execution(thread: threading.Thread, *, patience_s: float) -> None:
    """End what Ray Data executes in this process, and with it the `thread` that iterates it.

    Ray's core ends a process with code 1 where a thread asks it for something, or lets go of a
    reference, while it shuts down at the exit.
    """
    until = time.monotonic() + patience_s
    while thread.is_alive() and time.monotonic() < until:
        # Again: the thread may have been on its way to start it. Not by force: Ray prints a line of
        # each actor that is killed at its work. What ends the work says more than an error here.
        with suppress(Exception):
            for executor in list(_executors):
                executor.shutdown(force=False)
        thread.join(0.1)


def end_training(thread: threading.Thread, *, patience_s: float) -> None:
    """End this job's Ray Train controller, and with it its workers and the `thread` that waits.

    Else they would train on while nobody holds the output; and see `end_execution`.
    """
    until = time.monotonic() + patience_s
    with suppress(Exception):
        job = ray.get_runtime_context().get_job_id()
        while thread.is_alive() and time.monotonic() < until:
            for name, facts in state.actors().items():
                mine = facts["JobID"] == job and facts["State"] != "DEAD"
                if mine and facts["ActorClassName"] == "TrainController":
                    ray.kill(global_worker.core_worker.get_actor_handle(ray.ActorID.from_hex(name)))
            thread.join(0.2)


def beside_driver() -> dict[str, Any]:
    """Options of an actor that lives as long as the driver's machine, whatever else is lost."""
    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def keep_actors_here() -> None:
    """Have the actors that Ray Data's pipelines share live beside this driver.

    They are for the whole cluster, outlive jobs, and stay on the machine that needed them first:
    in a training a worker's.
    """
    default_autoscaling_coordinator.get_or_create_autoscaling_coordinator()
    node_trackers.get_or_create_actor_location_tracker()
    stats.get_or_create_stats_actor()


def _known_locations(actors: tuple[str, ...]) -> dict[str, str]:
    """Return on which node each actor is; nothing if what knows it is lost: Ray makes another.

    Ray Data 2.60 asks for it at every turn, falls back on what it knew, and lets an error end the
    run: an earlier job's machine would take this one with it.
    """
    try:
        return get_actor_locations(actors)
    except ray.exceptions.RayError:
        return {}


@dataclass(frozen=True, slots=True)
class Resources:
    """What one actor asks of Ray, and the threads that TensorFlow may use in it."""

    actors: tuple[int, int]
    cpus: float
    gpus: float
    threads: int | None


GPU_TO_COME = (
    "The cluster has no GPU for an actor yet: waiting until its autoscaler starts a machine with "
    "one, or one joins."
)


def fit_actors(
    config: DenoiseConfig | EvaluateConfig, *, images: int, tell: Callable[[str], None]
) -> Resources:
    """Return what the actors of a run on this cluster ask for. Ray must be initialised.

    `tell` is called where they have to wait for a machine. To a Ray that this process has started
    itself, without RAY_ADDRESS, none can come.
    """
    hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cluster = ray.cluster_resources()
    resources = choose_resources(
        config,
        cluster,
        images=images,
        hosts=tuple(int(host["CPU"]) for host in hosts if host.get("CPU")),
        cpus_per_gpu=min(
            (host["CPU"] / host["GPU"] for host in hosts if host.get("CPU") and host.get("GPU")),
            default=1.0,
        ),
        grows=bool(os.environ.get("RAY_ADDRESS")),
    )
    if resources.gpus > cluster.get("GPU", 0.0):
        tell(GPU_TO_COME)
    return resources


def choose_resources(
    config: DenoiseConfig | EvaluateConfig,
    cluster: dict[str, float],
    *,
    images: int,
    hosts: Sequence[int] = (),
    cpus_per_gpu: float = 1.0,
    grows: bool = False,
) -> Resources:
    """Share the cluster's GPUs, or where there are none its CPUs, among the actors.

    `hosts` are the CPUs of each, by default one of all; `cpus_per_gpu` is the least of a host with
    GPUs. A cluster that `grows` may get GPUs yet, if they are asked for. A few images get one actor
    a host: a second would be ready when they are done. More than there are images come only if
    there is work for them, as one large image may have many regions.

    On CPUs the actors ask for half of the cores in total, so that reading and writing never
    starve (ray#44687), while their threads cover all of them. On several `hosts` they ask for less:
    actors of lost hosts begin again on the others, and must leave room for two tasks there, even if
    half of the hosts are gone.
    """
    cpus, gpus = int(cluster.get("CPU", 1)), cluster.get("GPU", 0.0)
    wanted = parse_actors(config.actors)
    share = None if config.gpus_per_actor == "auto" else float(config.gpus_per_actor)
    if "CPU" not in cluster and not gpus:
        return _resources_to_come(wanted, share)
    if share is not None and share > gpus:
        if grows and wanted is not None:
            return _resources_to_come(wanted, share)
        more = ", or state --actors MIN:MAX where an autoscaler brings GPUs" if grows else ""
        raise UsageError(
            f"--gpus-per-actor {share:g}: the cluster has {gpus:g} GPU(s). "
            f"Use 'auto' for CPUs{more}."
        )
    if gpus > 0 and share != 0.0:
        share = share or 1.0
        count = wanted or (1, max(1, int(gpus / share)))
        return Resources(count, _cpus_beside_gpu(share, cpus_per_gpu), share, None)
    many, largest = len(hosts), max(hosts, default=cpus)
    most = max(1, many)
    least = max(1, min(most, images))
    if images > FEW_IMAGES:
        least = most = max(most, min(cpus, max(2, cpus // 4)))
    count = wanted or (least, most)
    total = 0.5 * cpus
    if many > 1:
        total = min(total, cpus * (many // 2) / many - 1.0)
    # What is more than one host has finds no place; a task beside it needs half a CPU.
    each = min(total / count[1], max(0.5 * largest, largest - 1.0))
    threads = max(1, min(cpus // count[1], largest))
    return Resources(count, _unlike_a_task(each), 0.0, threads)


def _cpus_beside_gpu(share: float, cpus_per_gpu: float) -> float:
    """Return the CPUs of an actor with that share of a GPU: one, or what leaves half to tasks.

    A host's actors together have its GPUs once; a whole CPU each would be all that some hosts have.
    """
    each = 0.5 * share * cpus_per_gpu
    return 1.0 if each >= 1.0 else _unlike_a_task(each)


def _unlike_a_task(cpus: float) -> float:
    """Return a hundredth less, and never the half CPU of a task.

    Ray Data fuses neighbours that ask for the same, and decoding would wait for the model.
    """
    asked = max(0.01, round(round(cpus, 2) - 0.01, 2))
    return 0.49 if asked == 0.5 else asked


def _resources_to_come(wanted: tuple[int, int] | None, share: float | None) -> Resources:
    """Actors for machines that an autoscaler has yet to start, of a CPU for each GPU at least.

    Nothing in Ray tells a job what could be started (2.60 keeps it from its own libraries too).
    """
    if wanted is None or not share:
        raise UsageError(
            "the cluster has no workers yet, so the actors cannot be fitted to them: state "
            "--gpus-per-actor and --actors MIN:MAX, or keep one worker running (minReplicas: 1)."
        )
    return Resources(wanted, _cpus_beside_gpu(share, 1.0), share, None)


def check_memory(job: Job, resources: Resources, hosts: Sequence[dict[str, float]]) -> None:
    """Refuse settings whose batches and regions no host can hold, with the numbers.

    `hosts` are Ray's resources of each. What TensorFlow takes is left out, and what a GPU holds.
    """
    most = max((host.get("memory", 0.0) for host in hosts), default=0.0)
    network = 0 if resources.gpus else max(model.working_bytes[0] for model in job.models)
    region = max(model.working_bytes[1] for model in job.models)
    if most and network + region > most:
        config, gb = job.config, 1e-9
        raise UsageError(
            f"--patch {config.patch}, --halo {config.halo}, --region {config.region}, "
            f"--batch-size {config.batch_size}: an actor needs {network * gb:,.1f} GB for the "
            f"network and {region * gb:,.1f} GB for a region, and Ray may use {most * gb:,.1f} GB "
            "on the largest host. Lower them."
        )


def stopped(
    error: BaseException,
    *,
    what: str,
    output: str,
    run_id: str,
    options: StorageOptions,
    patience_s: float,
) -> RunFailed:
    """Return one sentence for the user; the trace goes to a file for whoever mends it.

    What a worker raised as RunFailed, or an actor on purpose as it began, says enough. `what` is
    what stopped, such as 'the work'; `patience_s` that of `set_data_context`.
    """
    told = _run_failed(error) or _refused_to_begin(error)
    if told is not None:
        # Ray Data puts its advice on retries behind it.
        reason = str(told).partition("\nFailed to ")[0]
        return RunFailed(f"{what} stopped: {reason.removesuffix('.')}.")
    uri = join(output, ".denoise", f"trace-{run_id}.txt")
    reason = _last_error(str(error)) or type(error).__name__
    if isinstance(error, ExecutionTimeoutError):
        reason = (
            f"nothing moved for {int(patience_s)} s; the cluster has no room for the actors "
            "(look at `ray status`), or a machine hangs"
        )
    try:
        text = f"{type(error).__name__}: {error}"
        storage_for(uri, options).write(uri, text.encode("utf-8", "backslashreplace"))
    except StorageError:
        uri = "lost, because the output cannot be written"
    return RunFailed(
        f"{what} stopped on an error that this program does not expect: {reason}. Trace: {uri}."
    )


def _last_error(text: str) -> str:
    """Return the line of a trace that names the error, not Ray's advice after it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Killed): ", line)]
    return (named or lines or [""])[-1]


def _refused_to_begin(error: BaseException) -> str | None:
    """Return the sentence of an actor that could not load its model; Ray keeps only its trace."""
    said = re.findall(r"^denoise_core\.errors\.\w+: (.+)$", str(error), re.MULTILINE)
    return said[-1] if said and "raised in its creation task" in str(error) else None


def _run_failed(error: BaseException | None) -> RunFailed | None:
    """Return the RunFailed that a worker raised, out of what Ray made of it."""
    while error is not None:
        # Ray's own copy of the error is of its class too, but says the whole trace.
        if isinstance(error, RunFailed) and not isinstance(error, ray.exceptions.RayError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
