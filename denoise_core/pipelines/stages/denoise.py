"""Items -> items with denoised pixels: the actor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from denoise_core.choice import residual_rms
from denoise_core.denoiser import Denoiser, Part
from denoise_core.devices import configure_tensorflow
from denoise_core.errors import ImageError, StorageError, UsageError
from denoise_core.images import restore
from denoise_core.pipelines.job import GROUP_PIXELS, Job
from denoise_core.pipelines.stages.items import (
    Guard,
    Item,
    core_in_window,
    filled_of,
    measures,
    region_of,
    to_items,
    to_table,
    untouched,
)

Array = np.ndarray


class Denoise:
    """The actor: holds the models, cuts patches of all items it is given, pastes the results.

    On CPUs it measures too, so that the noisy pixels need not go on to the write stage, which
    would take the same cores for it. A GPU's time is dearer than the memory.
    """

    def __init__(self, job: Job, ledger: Any, *, threads: int | None, use_gpu: bool) -> None:
        configure_tensorflow(threads=threads, use_gpu=use_gpu)
        self.job, self.guard = job, Guard(job, "denoise", ledger)
        self.use_gpu = use_gpu
        self.denoisers: dict[str, Denoiser] = {}
        self._denoiser(job.models[0].name)

    def _denoiser(self, name: str) -> Denoiser:
        """Return a model, warm; those that no image asks for are never loaded."""
        from denoise_core.checkpoints import load_checkpoint

        if name not in self.denoisers:
            config = self.job.config
            # A user's Keras file: stride and halo are in the geometry, measured by the driver.
            checkpoint = load_checkpoint(
                name,
                model_range=config.model_range,
                measure=False,
                sha256={model.name: model.hash for model in self.job.models}[name],
                options=self.job.options,
            )
            denoiser = Denoiser(
                checkpoint,
                geometry=self.job.geometry,
                batch_size=None if config.batch_size == "auto" else int(config.batch_size),
                strength=config.strength,
                precision=config.precision,
            )
            denoiser.warm_up()
            self.denoisers[name] = denoiser
        return self.denoisers[name]

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Fill in `denoised` with the core's values in the image's own dtype."""
        todo = []
        for item in to_items(table):
            if item.failed or item.facts.get("copied") or item.facts.get("staged"):
                yield to_table(item)
            else:
                todo.append(item)
        fresh, suspects = self.guard.sort(todo) if todo else ([], [])
        # Work that once killed a worker is done alone, so that its neighbours come out.
        for group in (*groups(fresh), *([item] for item in suspects)):
            with self.guard.attempt(group) as left:
                self._denoise(left)
            for item in group:
                converted = item.facts.get("copied") and item.facts["converted"]
                measured = "sigma_out" in item.facts and self.job.config.reference is None
                if measured and not converted:
                    item.pixels = None
                yield to_table(item)

    def _denoise(self, items: list[Item]) -> None:
        """Denoise together; where that fails each alone, so that only the culprit fails."""
        if len(items) > 1:
            try:
                with self.guard.timed(items):
                    self._predict(items)
                return
            except (ImageError, StorageError, UsageError, MemoryError):
                pass
        for item in items:
            with self.guard.catch(item):
                self._predict([item])

    def _predict(self, items: list[Item]) -> None:
        for model in self.job.models:
            chosen = [item for item in items if self.job.model(item.facts) == model]
            if chosen:
                self._predict_by(self._denoiser(model.name), chosen)

    def _predict_by(self, denoiser: Denoiser, items: list[Item]) -> None:
        parts = [self._part(item) for item in items]
        results = denoiser.denoise_parts(parts)
        for item, part, values in zip(items, parts, results, strict=True):
            facts = item.facts
            if self._changes_too_little(item, part.pixels, values):
                facts |= {"copied": True, **untouched(facts, part.pixels)}
            else:
                noisy = item.array("pixels")[core_in_window(self.job, facts)]
                restore(values, noisy, facts.get("nodata"))
                item.denoised = values
                if not self.use_gpu:
                    facts |= measures(self.job, facts, noisy, values)
            facts |= {
                "core_shape": list(values.shape),
                "patches": len(part.region.patches),
                "device": denoiser.device,
                "precision": denoiser.precision,
                "misses_gpu": self.use_gpu and denoiser.device != "gpu",
            }

    def _changes_too_little(self, item: Item, pixels: Array, values: Array) -> bool:
        """Whether a whole image is better left alone, by what the model would take away."""
        config, facts = self.job.config, item.facts
        limit = self.job.model(facts).copy_residual * config.strength
        if facts.get("in_regions") or not limit or facts["coarse"]:
            return False
        low, high = facts["data_range"]
        return residual_rms(pixels, values, spread=high - low) < limit

    def _part(self, item: Item) -> Part:
        facts = item.facts
        region = region_of(self.job, facts)
        y0, _, x0, _ = region.window(*facts["size"])
        low, high = facts["data_range"]
        pixels = filled_of(facts, item.array("pixels"))
        return Part(pixels, region, (y0, x0), low, high, facts["dtype"])


def groups(items: list[Item]) -> Iterator[list[Item]]:
    """Cut a list so that no group has more than GROUP_PIXELS, or it is a single item."""
    group: list[Item] = []
    pixels = 0
    for item in items:
        height, width, channels = item.facts["shape"]
        size = height * width * max(1, channels // 3)
        if group and pixels + size > GROUP_PIXELS:
            yield group
            group, pixels = [], 0
        group.append(item)
        pixels += size
    if group:
        yield group
