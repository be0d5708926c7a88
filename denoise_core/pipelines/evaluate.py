"""Evaluation on Ray Data: images -> classical filters (tasks) -> models (actors) -> rows.

A row of the pipeline is one image's name; pixels are read where they are needed and never leave a
worker, but for the crops of the few images that pictures show. Both stages make the same noise, so
nothing but names and figures travels between them.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from denoise_core.checkpoints import load_checkpoint, shipped_names
from denoise_core.config import DenoiseConfig, EvaluateConfig, as_dict
from denoise_core.errors import ImageError, ObjectNotFound, RunFailed, StorageError, UsageError
from denoise_core.evaluation.examples import Ends, cut_example, example_uri
from denoise_core.evaluation.methods import (
    IDENTITY,
    SLOW,
    Model,
    ModelSource,
    choose_filters,
    label_models,
    run_filter,
)
from denoise_core.evaluation.protocol import (
    BINS,
    PAIRS,
    Array,
    Measured,
    add_noise,
    measure,
    sigma_for,
)
from denoise_core.evaluation.publish import Collected, publish
from denoise_core.evaluation.sources import Picture, Shot, find_shots, read_shot
from denoise_core.lock import output_lock
from denoise_core.noise import parse_noise
from denoise_core.storage import LocalStorage, StorageOptions, join, storage_for
from denoise_core.storage.local import to_path

DEFAULT_NOISE = ("gaussian:25",)
# Images of one task: digits travel together, photographs in small groups.
TASK_DIGITS, TASK_PHOTOS = 64, 8
# Pixels that an actor denoises together.
GROUP_PIXELS = 4_000_000
# An actor that dies this often ends the run; Ray Data would start it for ever.
RESTARTS = 2
NO_PROGRESS_S = 1800

Facts = dict[str, Any]


class Watcher:
    """What a run tells while it goes on; a display overrides what it wants to show."""

    def note(self, text: str) -> None:
        """Tell something worth a line."""

    def update(self, done: int, total: int) -> None:
        """Tell how many images are measured."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every stage of a run needs to know. Picklable; holds no credential."""

    config: EvaluateConfig
    run_id: str
    options: StorageOptions
    models: tuple[ModelSource, ...]
    filters: tuple[str, ...]
    noises: tuple[str, ...]

    @property
    def quantised(self) -> bool:
        """Whether noisy values are clipped and rounded to 8 bits."""
        return self.config.protocol == "quantised"

    def example(self, kind: str, shot: Shot, *, method: str, noise: str) -> str:
        """URI of an example's file."""
        return example_uri(
            self.config.output, self.run_id, kind=kind, method=method, noise=noise, image=shot.name
        )


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
    config = absolute(config)
    plan = make_plan(config, watcher)
    storage = storage_for(config.output, plan.options)
    shots = find_shots(config, plan.options)
    with output_lock(storage, config.output, run_id=plan.run_id):
        _sweep(plan)
        if start_ray is not None:
            start_ray()
        started = time.monotonic()
        try:
            collected = collect(plan, shots, watcher)
            collected.seconds = time.monotonic() - started
            return _publish(plan, shots, collected, watcher)
        finally:
            _sweep(plan)


def absolute(config: EvaluateConfig) -> EvaluateConfig:
    """Make local paths absolute: workers have other working directories than the driver."""

    def whole(uri: str) -> str:
        local = isinstance(storage_for(uri), LocalStorage)
        return os.path.abspath(to_path(uri)) if local else uri

    def model(name: str) -> str:
        # First, so that the sentence about an unknown one has the words that were typed.
        load_checkpoint(name)
        return name if name in shipped_names() or "://" in name else os.path.abspath(name)

    return replace(
        config,
        data=tuple(whole(uri) for uri in config.data),
        output=whole(config.output),
        reference=whole(config.reference) if config.reference else None,
        model=tuple(model(name) for name in config.model),
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
            f"Left out {', '.join(absent)}: not installed; pip install 'denoise-jobs[benchmark]'."
        )
    return Plan(
        config=config,
        run_id=f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}",
        options=StorageOptions(s3_endpoint=config.s3_endpoint),
        models=tuple(label_models(config.model)),
        filters=tuple(filters),
        noises=noises,
    )


def _sweep(plan: Plan) -> None:
    """Delete the examples, also those that killed runs left: the lock says that none is at work."""
    storage = storage_for(plan.config.output, plan.options)
    try:
        for entry in list(storage.list(join(plan.config.output, ".evaluate"))):
            storage.delete(entry.uri)
    except ObjectNotFound:
        return


# --- The driver -------------------------------------------------------------------------------


def collect(plan: Plan, shots: list[Shot], watcher: Watcher) -> Collected:
    """Run the pipeline; return its rows, histograms and codes. Raises RunFailed."""
    collected = Collected()
    done = 0
    try:
        for table in _results(plan, shots):
            for text in table["result"].to_pylist():
                done += collected.add(json.loads(text))
            collected.close()
            watcher.update(done, len(shots))
    except UsageError:
        raise
    except Exception as error:
        import ray

        if not isinstance(error, ray.exceptions.RayError):
            raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise RunFailed(
            "the evaluation stopped on an error that no image is to blame for: "
            f"{lines[-1].strip() if lines else type(error).__name__}"
        ) from error
    return collected


def _results(plan: Plan, shots: list[Shot]) -> Iterator[pa.Table]:
    dataset = build_dataset(plan, shots)
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def build_dataset(plan: Plan, shots: list[Shot]) -> Any:
    """Return the lazy pipeline from shots to results."""
    import ray.data

    from denoise_core.pipelines.flow import choose_resources

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_S
    logging.getLogger("ray.data").setLevel(logging.CRITICAL + 1)
    cluster = ray.cluster_resources()
    config = plan.config
    resources = choose_resources(
        DenoiseConfig(
            inputs=config.data,
            output=config.output,
            actors=config.actors,
            gpus_per_actor=config.gpus_per_actor,
        ),
        cluster,
        images=len(shots),
    )
    most = TASK_PHOTOS if shots[0].index is None else TASK_DIGITS
    together = max(1, min(most, len(shots) // (4 * int(cluster.get("CPU", 1)))))
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
        max_task_retries=RESTARTS,
        compute=ray.data.ActorPoolStrategy(
            min_size=resources.actors[0], max_size=resources.actors[1]
        ),
    )


def _publish(plan: Plan, shots: list[Shot], collected: Collected, watcher: Watcher) -> Outcome:
    failures = [row for row in collected.failures if row.get("method") is None]
    if len(failures) == len(shots):
        first = failures[0]
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


# --- The stages -------------------------------------------------------------------------------


@dataclass(slots=True)
class Bench:
    """What both stages do with one image: read, make noise, measure, note."""

    plan: Plan

    def read(self, shot: Shot) -> Picture:
        """Read the pixels. Raises ImageError, StorageError."""
        return read_shot(shot, self.plan.options, max_pixels=self.plan.config.max_pixels)

    def noisy(self, shot: Shot, picture: Picture, noise: str) -> Array:
        """Return the noisy image, float32 (H, W, C) in [0, 1]: the same in every stage."""
        if picture.noisy is not None:
            return picture.noisy
        return add_noise(picture.unit, noise, name=shot.name, quantised=self.plan.quantised)

    def base(self, shot: Shot) -> Facts:
        """Return the columns that tell the image."""
        return {
            "run_id": self.plan.run_id,
            "image": shot.name,
            "source_uri": shot.uri,
            "noisy_uri": shot.noisy_uri,
            "index": shot.index,
        }

    def row(
        self,
        shot: Shot,
        picture: Picture,
        result: Measured,
        *,
        method: str,
        noise: str,
        **more: Any,
    ) -> Facts:
        """Return a row of rows.SCHEMA."""
        height, width, channels = picture.clean.shape
        return {
            **self.base(shot),
            "label": picture.label,
            "status": "ok",
            "method": method,
            "noise": noise,
            "protocol": "pairs" if noise == PAIRS else self.plan.config.protocol,
            "height": height,
            "width": width,
            "channels": channels,
            "dtype": picture.scale.dtype,
            "mse": result.mse,
            "psnr": result.psnr,
            "ssim": result.ssim,
            **more,
        }

    def failed(self, shot: Shot, error: Exception, **more: Any) -> Facts:
        """Return the row of what went wrong."""
        return {
            **self.base(shot),
            "status": "failed",
            "error_type": type(error).__name__,
            "error_message": str(error),
            **more,
        }

    def keep(self, uri: str, noisy: Array, picture: Picture, result: Measured, **more: Any) -> None:
        """Write an example."""
        example = cut_example(
            noisy,
            result.output,
            picture.clean,
            picture.scale,
            psnr=result.psnr,
            ssim=result.ssim,
            **more,
        )
        storage_for(uri, self.plan.options).write(uri, example.to_bytes())


@dataclass(slots=True)
class Notes:
    """What a batch has to tell: rows of each image, sums of histograms over all of it."""

    rows: dict[str, list[Facts]] = field(default_factory=dict)
    codes: list[Facts] = field(default_factory=list)
    histograms: dict[tuple[str, str], Array] = field(default_factory=dict)

    def add(self, row: Facts, histogram: Array) -> None:
        """Take one result."""
        self.rows.setdefault(row["image"], []).append(row)
        key = (row["method"], row["noise"])
        self.histograms[key] = self.histograms.get(key, np.zeros(BINS, np.int64)) + histogram

    def to_table(self, shots: list[Shot], earlier: list[str]) -> pa.Table:
        """Return a row for each shot; the first one carries what belongs to the batch."""
        results = []
        for place, (shot, text) in enumerate(zip(shots, earlier, strict=True)):
            parts = json.loads(text) if text else []
            own: Facts = {"rows": self.rows.get(shot.name, []), "image": shot.name}
            if place == 0:
                own["codes"] = self.codes
                own["histograms"] = [
                    {"method": m, "noise": n, "counts": c.tolist()}
                    for (m, n), c in self.histograms.items()
                ]
            results.append(json.dumps([*parts, own]))
        texts = [json.dumps(shot.to_json()) for shot in shots]
        return pa.table({"shot": texts, "result": results})


def _shots(table: pa.Table) -> list[Shot]:
    return [Shot(**json.loads(text)) for text in table["shot"].to_pylist()]


@dataclass(frozen=True, slots=True)
class RunFilters:
    """Task: every classical filter, the noisy input itself among them, on each image and noise."""

    plan: Plan

    def __call__(self, table: pa.Table) -> pa.Table:
        """Map names to names with results."""
        bench, notes = Bench(self.plan), Notes()
        shots = _shots(table)
        for shot in shots:
            try:
                picture = bench.read(shot)
                for noise in self.plan.noises:
                    self._measure(bench, notes, shot, picture, noise)
            except (ImageError, StorageError) as error:
                notes.rows[shot.name] = [bench.failed(shot, error)]
        return notes.to_table(shots, table["result"].to_pylist())

    def _measure(
        self, bench: Bench, notes: Notes, shot: Shot, picture: Picture, noise: str
    ) -> None:
        noisy = bench.noisy(shot, picture, noise)
        sigma, source = sigma_for(noisy, noise)
        identity = np.nan
        for name in self.plan.filters:
            if name in SLOW and not shot.slow:
                continue
            started = time.perf_counter()
            values = run_filter(name, noisy, sigma)
            spent = (time.perf_counter() - started) * 1e3
            result = measure(values, picture.clean, picture.scale)
            identity = result.psnr if name == IDENTITY else identity
            told = {"kind": "filter", "sigma": sigma, "sigma_source": source}
            row = bench.row(
                shot, picture, result, method=name, noise=noise, milliseconds=spent, **told
            )
            notes.add(row, result.histogram)
            if shot.shown:
                uri = self.plan.example("shown", shot, method=name, noise=noise)
                bench.keep(uri, noisy, picture, result, at_worst=False, psnr_noisy=identity)


class RunModels:
    """Actor: holds all models; denoises the images of a batch together, for each noise."""

    def __init__(self, plan: Plan, *, threads: int | None, use_gpu: bool) -> None:
        from denoise_core.devices import configure_tensorflow

        configure_tensorflow(threads=threads, use_gpu=use_gpu)
        self.plan, self.bench, self.ends = plan, Bench(plan), Ends()
        self.models = [Model(source, precision=plan.config.precision) for source in plan.models]

    def __call__(self, table: pa.Table) -> pa.Table:
        """Map names to names with results, those of the stage before included."""
        notes, shots = Notes(), _shots(table)
        earlier = table["result"].to_pylist()
        readable = [
            shot
            for shot, text in zip(shots, earlier, strict=True)
            if all(row["status"] == "ok" for part in json.loads(text) for row in part["rows"])
        ]
        for group in self._groups(readable):
            for noise in self.plan.noises:
                noisy = [self.bench.noisy(shot, picture, noise) for shot, picture in group]
                for model in self.models:
                    self._measure(notes, model, group, noisy, noise)
        return notes.to_table(shots, earlier)

    def _groups(self, shots: list[Shot]) -> Iterator[list[tuple[Shot, Picture]]]:
        group: list[tuple[Shot, Picture]] = []
        pixels = 0
        for shot in shots:
            picture = self.bench.read(shot)
            pixels += picture.clean.size // 3
            group.append((shot, picture))
            if pixels >= GROUP_PIXELS:
                yield group
                group, pixels = [], 0
        if group:
            yield group

    def _measure(
        self,
        notes: Notes,
        model: Model,
        group: list[tuple[Shot, Picture]],
        noisy: list[Array],
        noise: str,
    ) -> None:
        started = time.perf_counter()
        outputs = model.denoise(noisy)
        spent = (time.perf_counter() - started) * 1e3 / len(group)
        for (shot, picture), values, start in zip(group, outputs, noisy, strict=True):
            told = {
                "kind": "model",
                "model_hash": model.source.hash,
                "method": model.source.label,
                "noise": noise,
            }
            try:
                result = measure(values, picture.clean, picture.scale)
            except ImageError as error:
                failed = self.bench.failed(shot, error, **told)
                notes.rows.setdefault(shot.name, []).append(failed)
                continue
            row = self.bench.row(shot, picture, result, milliseconds=spent, **told)
            notes.add(row, result.histogram)
            self._keep(shot, picture, start, result, model.source.label, noise)
            if shot.coded and model.coder is not None:
                code = [round(float(value), 6) for value in model.coder.code(start)]
                notes.codes.append(
                    {
                        "method": model.source.label,
                        "noise": noise,
                        "image": shot.name,
                        "label": picture.label,
                        "code": code,
                    }
                )

    def _keep(
        self,
        shot: Shot,
        picture: Picture,
        noisy: Array,
        result: Measured,
        method: str,
        noise: str,
    ) -> None:
        wanted, dropped = self.ends.offer((method, noise), result.psnr, shot.name)
        if dropped is not None:
            uri = self.plan.example("ends", Shot(dropped, ""), method=method, noise=noise)
            storage_for(uri, self.plan.options).delete(uri)
        kinds = ["ends"] * wanted + ["shown"] * shot.shown
        if not kinds:
            return
        before = measure(noisy, picture.clean, picture.scale).psnr
        for kind in kinds:
            uri = self.plan.example(kind, shot, method=method, noise=noise)
            self.bench.keep(uri, noisy, picture, result, at_worst=kind == "ends", psnr_noisy=before)
