"""The stages of evaluation: classical filters (tasks), models (actors). Each maps tables to tables.

A row is one image's name and what the stages so far have to tell of it, both as JSON. Both stages
read the image and make the same noise, so that nothing but names and figures travels between them;
pixels never leave a worker, but for the crops of the few images that pictures show.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from denoise_core.config import EvaluateConfig
from denoise_core.devices import configure_tensorflow
from denoise_core.errors import ImageError, RunFailed, StorageError
from denoise_core.evaluation.examples import Ends, cut_example, example_uri
from denoise_core.evaluation.methods import IDENTITY, SLOW, Model, ModelSource, run_filter
from denoise_core.evaluation.protocol import (
    BINS,
    PAIRS,
    Array,
    Measured,
    add_noise,
    measure,
    sigma_for,
)
from denoise_core.evaluation.sources import Picture, Shot, read_shot
from denoise_core.storage import StorageOptions, storage_for

# Pixels that an actor denoises together.
GROUP_PIXELS = 4_000_000

Facts = dict[str, Any]


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
        """Write an example. Raises RunFailed where the output does not take it."""
        example = cut_example(
            noisy,
            result.output,
            picture.clean,
            picture.scale,
            psnr=result.psnr,
            ssim=result.ssim,
            **more,
        )
        with _no_fault_of_an_image():
            storage_for(uri, self.plan.options).write(uri, example.to_bytes())

    def drop(self, uri: str) -> None:
        """Delete an example. Raises RunFailed where it cannot be."""
        with _no_fault_of_an_image():
            storage_for(uri, self.plan.options).delete(uri)


@contextmanager
def _no_fault_of_an_image() -> Iterator[None]:
    """Raise RunFailed in place of what befalls the output, and so every other image too."""
    try:
        yield
    except StorageError as error:
        raise RunFailed(str(error)) from None


@dataclass(slots=True)
class Notes:
    """What a batch has to tell: rows of each image, sums of histograms over all of it."""

    misses_gpu: bool = False
    rows: dict[str, list[Facts]] = field(default_factory=dict)
    codes: list[Facts] = field(default_factory=list)
    histograms: dict[tuple[str, str], Array] = field(default_factory=dict)

    def add(self, row: Facts, histogram: Array) -> None:
        """Take one result."""
        self.add_row(row)
        key = (row["method"], row["noise"])
        self.histograms[key] = self.histograms.get(key, np.zeros(BINS, np.int64)) + histogram

    def add_row(self, row: Facts) -> None:
        """Take a row that has no result, or whose result is taken."""
        self.rows.setdefault(row["image"], []).append(row)

    def to_table(self, shots: list[Shot], earlier: list[str]) -> pa.Table:
        """Return a row for each shot; the first one carries what belongs to the batch."""
        results = []
        for place, (shot, text) in enumerate(zip(shots, earlier, strict=True)):
            parts = json.loads(text) if text else []
            own: Facts = {"rows": self.rows.get(shot.name, []), "image": shot.name}
            if place == 0:
                own["misses_gpu"] = self.misses_gpu
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


def _is_whole_failure(row: Facts) -> bool:
    """Whether a row says that an image cannot be used, not that one noise or method failed."""
    return row["status"] == "failed" and row.get("method") is None and row.get("noise") is None


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
            except (ImageError, StorageError) as error:
                notes.add_row(bench.failed(shot, error))
                continue
            for noise in self.plan.noises:
                self._measure(bench, notes, shot, picture, noise)
        return notes.to_table(shots, table["result"].to_pylist())

    def _measure(
        self, bench: Bench, notes: Notes, shot: Shot, picture: Picture, noise: str
    ) -> None:
        try:
            noisy = bench.noisy(shot, picture, noise)
            sigma, source = sigma_for(noisy, noise)
        except ImageError as error:
            notes.add_row(bench.failed(shot, error, noise=noise))
            return
        identity = np.nan
        for name in self.plan.filters:
            if name in SLOW and not shot.slow:
                continue
            told: Facts = {"kind": "filter", "sigma": sigma, "sigma_source": source}
            told |= {"method": name, "noise": noise}
            started = time.perf_counter()
            try:
                values = run_filter(name, noisy, sigma)
                spent = (time.perf_counter() - started) * 1e3
                result = measure(values, picture.clean, picture.scale)
            except ImageError as error:
                notes.add_row(bench.failed(shot, error, **told))
                continue
            identity = result.psnr if name == IDENTITY else identity
            row = bench.row(shot, picture, result, milliseconds=spent, **told)
            notes.add(row, result.histogram)
            if shot.shown:
                uri = self.plan.example("shown", shot, method=name, noise=noise)
                bench.keep(uri, noisy, picture, result, at_worst=False, psnr_noisy=identity)


class RunModels:
    """Actor: holds all models; denoises the images of a batch together, for each noise."""

    misses_gpu = False

    def __init__(self, plan: Plan, *, threads: int | None, use_gpu: bool) -> None:
        configure_tensorflow(threads=threads, use_gpu=use_gpu)
        self.prepare(plan)
        self.models = [
            Model(source, precision=plan.config.precision, options=plan.options)
            for source in plan.models
        ]
        self.misses_gpu = use_gpu and any(each.denoiser.device != "gpu" for each in self.models)

    def prepare(self, plan: Plan) -> None:
        """Make all but the models."""
        self.plan, self.bench, self.ends = plan, Bench(plan), Ends()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Map names to names with results, those of the stage before included."""
        notes, shots = Notes(self.misses_gpu), _shots(table)
        earlier = table["result"].to_pylist()
        readable = [
            shot
            for shot, text in zip(shots, earlier, strict=True)
            if not any(_is_whole_failure(row) for part in json.loads(text) for row in part["rows"])
        ]
        for group in self._groups(readable, notes):
            for noise in self.plan.noises:
                suited, noisy = self._suited(group, noise)
                for model in self.models if suited else ():
                    self._measure(notes, model, suited, noisy, noise)
        return notes.to_table(shots, earlier)

    def _groups(self, shots: list[Shot], notes: Notes) -> Iterator[list[tuple[Shot, Picture]]]:
        """Read the images, so many as are denoised together; one that has gone fails alone."""
        group: list[tuple[Shot, Picture]] = []
        pixels = 0
        for shot in shots:
            try:
                picture = self.bench.read(shot)
            except (ImageError, StorageError) as error:
                notes.add_row(self.bench.failed(shot, error))
                continue
            pixels += picture.clean.size // 3
            group.append((shot, picture))
            if pixels >= GROUP_PIXELS:
                yield group
                group, pixels = [], 0
        if group:
            yield group

    def _suited(
        self, group: list[tuple[Shot, Picture]], noise: str
    ) -> tuple[list[tuple[Shot, Picture]], list[Array]]:
        """Return the images that the noise takes, and them with it; the filters told of others."""
        suited, noisy = [], []
        for shot, picture in group:
            with suppress(ImageError):
                noisy.append(self.bench.noisy(shot, picture, noise))
                suited.append((shot, picture))
        return suited, noisy

    def _measure(
        self,
        notes: Notes,
        model: Model,
        group: list[tuple[Shot, Picture]],
        noisy: list[Array],
        noise: str,
    ) -> None:
        told = {
            "kind": "model",
            "model_hash": model.source.hash,
            "method": model.source.label,
            "noise": noise,
        }
        started = time.perf_counter()
        try:
            outputs = model.denoise(noisy)
        except ImageError as error:
            if len(group) == 1:
                notes.add_row(self.bench.failed(group[0][0], error, **told))
                return
            # Each alone, so that only the culprit fails.
            for pair, start in zip(group, noisy, strict=True):
                self._measure(notes, model, [pair], [start], noise)
            return
        spent = (time.perf_counter() - started) * 1e3 / len(group)
        for (shot, picture), values, start in zip(group, outputs, noisy, strict=True):
            try:
                result = measure(values, picture.clean, picture.scale)
            except ImageError as error:
                notes.add_row(self.bench.failed(shot, error, **told))
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
            self.bench.drop(uri)
        kinds = ["ends"] * wanted + ["shown"] * shot.shown
        if not kinds:
            return
        before = measure(noisy, picture.clean, picture.scale).psnr
        for kind in kinds:
            uri = self.plan.example(kind, shot, method=method, noise=noise)
            self.bench.keep(uri, noisy, picture, result, at_worst=kind == "ends", psnr_noisy=before)
