"""Items -> items with pixels: fetch, decode, estimate the noise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from denoise_core import metrics
from denoise_core.choice import choose, is_coarse, is_quiet
from denoise_core.config import parse_data_range
from denoise_core.images import data_range, decode, fetch, open_image, read_window, valid
from denoise_core.pipelines.job import Facts, Job
from denoise_core.pipelines.stages.items import (
    Guard,
    Item,
    filled_of,
    is_converted,
    region_of,
    to_items,
    to_table,
    untouched,
)
from denoise_core.storage import storage_for

Array = np.ndarray

# What a region's marker holds of its reference.
AGAINST = frozenset(("reference_uri", "reference_problem", "after", "before"))


class Read:
    """Fetch and decode; estimate the noise; decide whether the image is copied."""

    def __init__(self, job: Job, ledger: Any) -> None:
        self.job, self.guard = job, Guard(job, "read", ledger)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Fill in `pixels`, `alpha` and `metadata`."""
        for item in to_items(table):
            if not item.failed:
                with self.guard.attempt([item]) as todo:
                    for each in todo:
                        with self.guard.catch(each):
                            self._read(each)
            yield to_table(item)

    def _read(self, item: Item) -> None:
        facts = item.facts
        storage = storage_for(facts["source_uri"], self.job.options)
        if facts.get("streamed"):
            return
        if facts.get("in_regions"):
            self._read_region(item, storage)
            return
        data = fetch(storage, facts["source_uri"])
        image = decode(
            data, name=facts["path"], max_pixels=self.job.config.max_pixels, keep_nodata=True
        )
        nodata = image.header.nodata
        low, high = parse_data_range(self.job.config.data_range) or data_range(
            valid(image.pixels, nodata), bits=image.header.bits
        )
        self._note(facts, image.pixels, low, high, has_alpha=image.alpha is not None)
        facts |= {"size": list(image.pixels.shape[:2]), "nodata": nodata}
        pixels = filled_of(facts, image.pixels)
        facts["sigma_in"] = metrics.estimate_sigma(pixels, data_range=high - low)
        facts["coarse"] = is_coarse(image.metadata)
        facts["converted"] = is_converted(self.job.config, image.header)
        item.metadata = image.metadata.to_bytes()
        if len(self.job.models) > 1:
            facts["model"] = choose(image.header, image.metadata)
        if is_quiet(
            [pixels],
            codec=image.header.format,
            sigma=facts["sigma_in"],
            below=self.job.model(facts).copy_below,
            spread=high - low,
        ):
            facts |= {"copied": True, **untouched(facts, pixels)}
            if self.job.config.reference is None and not facts["converted"]:
                return
        item.pixels, item.alpha = image.pixels, image.alpha

    def _read_region(self, item: Item, storage: Any) -> None:
        facts = item.facts
        staged = self.job.staging(facts, f"{facts['region']:06d}.json")
        target = storage_for(self.job.config.output, self.job.options)
        if target.stat(staged) is not None:
            done = json.loads(target.read(staged))
            run_id, reference = done.pop("run_id"), done.pop("reference", None)
            wanted = self.job.config.reference
            if wanted is None:
                done = {name: value for name, value in done.items() if name not in AGAINST}
            # A region of this run is read again: of a task that lost its machine Ray takes only
            # what it has not seen, and expects what comes before to be as large as it was. So is
            # one that was held against another reference than this run's, or against none.
            if run_id != self.job.run_id and wanted in (None, reference):
                # What this run knows of the item itself goes before what a killed one noted.
                facts |= {**done, **facts, "staged": True}
                return
        height, width = facts["size"]
        region = region_of(self.job, facts)
        y0, y1, x0, x1 = region.window(height, width)
        with open_image(storage, facts["source_uri"]) as file:
            pixels, alpha = read_window(
                file, y=slice(y0, y1), x=slice(x0, x1), name=facts["path"], keep_nodata=True
            )
        low, high = facts["data_range"]
        self._note(facts, pixels, low, high, has_alpha=alpha is not None)
        seen = filled_of(facts, pixels)
        facts["sigma_in"] = metrics.estimate_sigma(seen, data_range=high - low)
        item.pixels, item.alpha = pixels, alpha

    @staticmethod
    def _note(facts: Facts, pixels: Array, low: float, high: float, *, has_alpha: bool) -> None:
        facts |= {
            "shape": list(pixels.shape),
            "dtype": pixels.dtype.name,
            "has_alpha": has_alpha,
            "data_range": [low, high],
        }
