"""Evaluation on Ray Data: images -> classical filters (tasks) -> models (actors) -> rows.

The driver lists, checks every name before Ray starts, gathers figures and publishes. It imports
Ray only when there is work.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from denoise_core.checkpoints import absolute_name
from denoise_core.config import EvaluateConfig, as_dict
from denoise_core.devices import NO_GPU
from denoise_core.errors import RunFailed
from denoise_core.evaluation.methods import (
    choose_filters,
    find_model,
    label_models,
)
from denoise_core.evaluation.protocol import (
    PAIRS,
)
from denoise_core.evaluation.publish import Collected, publish
from denoise_core.evaluation.sources import Shot, find_shots
from denoise_core.lock import Lock, new_run_id, output_lock
from denoise_core.noise import parse_noise
from denoise_core.pipelines.measuring import Facts, Plan, RunFilters, RunModels
from denoise_core.storage import StorageOptions, absolute, join, storage_for

DEFAULT_NOISE = ("gaussian:25",)
# Images of one task: digits travel together, photographs in small groups.
TASK_DIGITS, TASK_PHOTOS = 64, 8
# An actor that dies more often ends the run; Ray Data would start it for ever. Its tasks are
# retried while it lives: until a lost machine is known to be lost, each try counts.
RESTARTS = 2
NO_PROGRESS_S = 1800
# Actors that nobody wants any more have so long to end. What a slower one writes, or one whose
# driver is interrupted once more meanwhile, is deleted when the next evaluation begins.
END_S = 2.0


class Watcher:
    """What a run tells while it goes on; a display overrides what it wants to show."""

    def note(self, text: str) -> None:
        """Tell something worth a line."""

    def update(self, done: int, total: int) -> None:
        """Tell how many images are measured."""


@dataclass(slots=True)
class Outcome:
    """How an evaluation ended: the summary as written, and the first failures."""

    summary: dict[str, Any]
    failures: list[Facts] = field(default_factory=list)

    @property
    def error_rate(self) -> float:
        """Share of images that could not be used."""
        images = self.summary["images"]
        return float(images["failed"] / max(1, images["total"]))


def run_evaluation(
    config: EvaluateConfig, *, watcher: Watcher, start_ray: Callable[[], None] | None = None
) -> Outcome:
    """Evaluate `config.model` on `config.data`; write rows, summary, pictures and page to OUT.

    `start_ray` is called once all names are checked; without it Ray must be initialised. Raises
    UsageError for settings that cannot work, OutputLocked where another run holds the output,
    RunFailed where this one cannot go on.
    """
    config = resolve(config)
    plan = make_plan(config, watcher)
    storage = storage_for(config.output, plan.options)
    shots = find_shots(config, plan.options)
    with output_lock(storage, config.output, run_id=plan.run_id) as lock:
        if storage.stat(join(config.output, "summary.json")) is not None:
            watcher.note(f"The earlier evaluation in {config.output} will be replaced.")
        _sweep(plan)
        if start_ray is not None:
            start_ray()
        started = time.monotonic()
        try:
            try:
                collected = collect(plan, shots, watcher, lock)
            except BaseException as error:
                _end_work(error)
                raise
            collected.seconds = time.monotonic() - started
            lock.check()
            return _publish(plan, shots, collected, watcher)
        finally:
            # Another run that took over has its own examples there.
            if lock.lost_to is None:
                _sweep(plan)


def resolve(config: EvaluateConfig) -> EvaluateConfig:
    """Return settings with absolute paths. Raises UsageError, CheckpointError for a model."""
    options = StorageOptions(s3_endpoint=config.s3_endpoint)
    for name in config.model:
        # First, so that the sentence about an unknown one has the words that were typed.
        find_model(name, model_range=config.model_range, options=options)
    return replace(
        config,
        data=tuple(map(absolute, config.data)),
        output=absolute(config.output),
        reference=absolute(config.reference) if config.reference else None,
        model=tuple(map(absolute_name, config.model)),
    )


def make_plan(config: EvaluateConfig, watcher: Watcher) -> Plan:
    """Check every name before anything starts. Raises UsageError, CheckpointError."""
    noises = (PAIRS,) if config.paired else tuple(dict.fromkeys(config.noise or DEFAULT_NOISE))
    if not config.paired:
        for spec in noises:
            parse_noise(spec)
    filters, absent = choose_filters(config.baselines)
    if absent:
        watcher.note(
            f"Left out {', '.join(absent)}: not installed (uv pip install '.[benchmark]')."
        )
    options = StorageOptions(s3_endpoint=config.s3_endpoint)
    models = label_models(config.model, model_range=config.model_range, options=options)
    return Plan(
        config=config,
        run_id=new_run_id(),
        options=options,
        models=tuple(models),
        filters=tuple(filters),
        noises=noises,
    )


def _end_work(error: BaseException) -> None:
    """Let go of the pipeline, which the error's frames hold: its actors would go on to write."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    time.sleep(END_S)


def _sweep(plan: Plan) -> None:
    """Delete the examples, also those that killed runs left: the lock says that none is at work."""
    storage = storage_for(plan.config.output, plan.options)
    storage.clear(plan.config.output, ".evaluate")


# --- The driver -------------------------------------------------------------------------------


def collect(plan: Plan, shots: list[Shot], watcher: Watcher, lock: Lock) -> Collected:
    """Run the pipeline; return its rows, histograms and codes. Raises RunFailed."""
    collected = Collected()
    done, told = 0, False
    try:
        for table in _results(plan, shots, watcher):
            lock.check()
            for text in table["result"].to_pylist():
                done += collected.add(json.loads(text))
            collected.close()
            if collected.misses_gpu and not told:
                watcher.note(NO_GPU)
                told = True
            watcher.update(done, len(shots))
    except Exception as error:
        import ray

        if not isinstance(error, ray.exceptions.RayError):
            raise
        from denoise_core.pipelines.cluster import stopped

        raise stopped(
            error,
            what="the evaluation",
            output=plan.config.output,
            run_id=plan.run_id,
            options=plan.options,
            patience_s=NO_PROGRESS_S,
        ) from error
    return collected


def _results(plan: Plan, shots: list[Shot], watcher: Watcher) -> Iterator[pa.Table]:
    dataset = build_dataset(plan, shots, watcher)
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def build_dataset(plan: Plan, shots: list[Shot], watcher: Watcher) -> Any:
    """Return the lazy pipeline from shots to results."""
    import ray.data

    from denoise_core.pipelines.cluster import fit_actors, set_data_context

    set_data_context(patience_s=NO_PROGRESS_S)
    resources = fit_actors(plan.config, images=len(shots), tell=watcher.note)
    most = TASK_PHOTOS if shots[0].index is None else TASK_DIGITS
    together = max(1, min(most, len(shots) // (4 * resources.actors[1])))
    dataset = ray.data.from_items(
        [{"shot": json.dumps(shot.to_json()), "result": ""} for shot in shots],
        override_num_blocks=-(-len(shots) // together),
    )
    # Ray 2.60 has no other way to bound restarts than the one that it warns of.
    warnings.filterwarnings("ignore", message=".*ray_remote_args", category=DeprecationWarning)
    dataset = dataset.map_batches(
        RunFilters(plan),
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=0.5,
        max_retries=RESTARTS,
    )
    return dataset.map_batches(
        RunModels,
        fn_constructor_args=(plan,),
        fn_constructor_kwargs={"threads": resources.threads, "use_gpu": resources.gpus > 0},
        batch_format="pyarrow",
        batch_size=together,
        num_cpus=resources.cpus,
        num_gpus=resources.gpus or None,
        max_restarts=RESTARTS,
        max_task_retries=-1,
        compute=ray.data.ActorPoolStrategy(
            min_size=resources.actors[0], max_size=resources.actors[1]
        ),
    )


def _publish(plan: Plan, shots: list[Shot], collected: Collected, watcher: Watcher) -> Outcome:
    if not collected.histograms:  # one for each noise and method that has a result
        first = collected.failures[0]
        raise RunFailed(
            f"none of the {len(shots)} image(s) could be used; the first: {first['error_message']}"
        )
    watcher.note("Measured. Drawing pictures and the page.")
    summary = publish(
        collected,
        out=plan.config.output,
        options=plan.options,
        run_id=plan.run_id,
        settings=as_dict(plan.config),
        models=list(plan.models),
        filters=list(plan.filters),
        noises=list(plan.noises),
        shots=shots,
    )
    return Outcome(summary, collected.failures)
