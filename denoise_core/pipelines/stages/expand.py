"""Work list -> items: which images are large, and the regions that they are cut to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from denoise_core.choice import choose, is_quiet, noise_sigma
from denoise_core.config import parse_data_range
from denoise_core.errors import ImageError, UnsupportedImage
from denoise_core.images import (
    ImageHeader,
    Source,
    data_range,
    open_image,
    read_header,
    read_metadata,
    read_window,
    uses_more_bits,
    valid,
)
from denoise_core.images.values import UNIT_SHARE
from denoise_core.pipelines.job import Facts, Job, now
from denoise_core.pipelines.stages.items import (
    Guard,
    Item,
    filled_of,
    is_converted,
    output_dtype,
    to_table,
)
from denoise_core.storage import is_bundle, storage_for
from denoise_core.tiling import Region

Array = np.ndarray

# A TIFF below this many pixels is one region even where its tiles could be read one by one.
REGION_FROM_PIXELS = 36_000_000
# Regions are multiples of this many pixels a side.
MIN_REGION = 256
# A large image's noise is estimated on so many windows of so many pixels a side.
SAMPLES, SAMPLE_SIDE = 16, 256


class Expand:
    """Work list row -> one item for each region. Opens headers of TIFFs and Zarrs, of nothing else.

    The items of an image that is written in pieces have `in_regions` set; a Zarr always is.
    """

    def __init__(self, job: Job, ledger: Any) -> None:
        self.job, self.guard = job, Guard(job, "read", ledger)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Map rows of WORK_SCHEMA to rows of TABLE_SCHEMA."""
        for row in table.to_pylist():
            first = {"started_at": now(), "regions": 1, "region": 0, "attempts": 1}
            item = Item({**row, **first})
            items = [item]
            if self._may_be_large(item.facts):
                with self.guard.attempt(items) as todo:
                    for item in todo:
                        with self.guard.catch(item):
                            items = self._regions(item)
            yield from map(to_table, items)

    def _may_be_large(self, facts: Facts) -> bool:
        # Only a TIFF and a Zarr can be written in pieces.
        kept = self.job.config.format in ("preserve", "tiff")
        path = facts["path"].lower()
        return kept and (path.endswith((".tif", ".tiff")) or is_bundle(path))

    def _regions(self, item: Item) -> list[Item]:
        facts = item.facts
        storage = storage_for(facts["source_uri"], self.job.options)
        with open_image(storage, facts["source_uri"]) as file:
            try:
                header = read_header(file, name=facts["path"], max_pixels=1 << 62)
            except ImageError:
                # The read stage meets the same error and has the whole file to explain it.
                return [item]
            size = self._region_size(header)
            if size is None:
                return [item]
            regions = self.job.geometry.regions(header.height, header.width, region=size)
            if len(regions) == 1 and header.format != "zarr":
                return [item]
            self._refuse_depth(header, name=facts["path"])
            facts |= {
                "regions": len(regions),
                "in_regions": True,
                "region_size": size,
                "size": [header.height, header.width],
                "nodata": header.nodata,
            }
            facts["data_range"] = list(
                parse_data_range(self.job.config.data_range)
                or self._range(file, header, regions, name=facts["path"])
            )
            if len(self.job.models) > 1:
                facts["model"] = choose(header, read_metadata(file, name=facts["path"]))
            converted = is_converted(self.job.config, header)
            if not converted and self._is_quiet(file, header, regions, facts):
                return [item]
        return [Item({**facts, "region": index}) for index in range(len(regions))]

    def _region_size(self, header: ImageHeader) -> int | None:
        """Side of this image's regions; None where it is read whole."""
        # Stacks are deep: of more than four samples every four count as one pixel.
        groups = -(-header.samples // 4)
        large = header.height * header.width * groups >= REGION_FROM_PIXELS
        if not header.windowed or not (header.format == "zarr" or large):
            return None
        shorter = self.job.config.region // math.ceil(math.sqrt(groups))
        return max(MIN_REGION, shorter // MIN_REGION * MIN_REGION)

    def _refuse_depth(self, header: ImageHeader, *, name: str) -> None:
        config = self.job.config
        kept = output_dtype(self.job, header.dtype) == header.dtype
        if header.format == "zarr" and config.format == "preserve" and not kept:
            raise UnsupportedImage(
                f"{name}: --bit-depth {config.bit_depth} does not change a Zarr of {header.dtype}; "
                "use --format tiff with it, or --bit-depth preserve"
            )

    def _is_quiet(
        self, file: Source, header: ImageHeader, regions: list[Region], facts: Facts
    ) -> bool:
        """Decide by samples whether the image is copied whole; if so, note what there is to say."""
        low, high = facts["data_range"]
        samples = sample_windows(file, regions, name=facts["path"])
        windows = [filled_of(facts, each) for each in samples]
        sigma = noise_sigma(windows, spread=high - low)
        below = self.job.model(facts).copy_below
        if not is_quiet(windows, codec=header.format, sigma=sigma, below=below, spread=high - low):
            return False
        facts |= {
            "regions": 1,
            "in_regions": False,
            "region_count": len(regions),
            "copied": True,
            "streamed": True,
            "shape": [header.height, header.width, header.channels],
            "dtype": header.dtype,
            "has_alpha": header.has_alpha,
            "sigma_in": sigma,
        }
        return True

    @staticmethod
    def _range(
        file: Source, header: ImageHeader, regions: list[Region], *, name: str
    ) -> tuple[float, float]:
        if np.dtype(header.dtype).kind == "f":
            return float_range(file, header, regions, name=name)
        # As `decode` does, which has all pixels at hand.
        told = header.bits < np.dtype(header.dtype).itemsize * 8
        if told and any(uses_more_bits(each, header) for each in cores(file, regions, name=name)):
            return data_range(header.dtype)
        return data_range(header.dtype, bits=header.bits)


def cores(file: Source, regions: list[Region], *, name: str) -> Iterator[Array]:
    """Yield the pixels (h, w, C) of every region's core; together they are the image."""
    for region in regions:
        y0, y1, x0, x1 = region.core
        yield read_window(file, y=slice(y0, y1), x=slice(x0, x1), name=name, keep_nodata=True)[0]


def float_range(
    file: Source, header: ImageHeader, regions: list[Region], *, name: str
) -> tuple[float, float]:
    """Return `data_range` of a whole float image that is read region by region."""
    inside, size, low, high = 0, 0, np.inf, -np.inf
    for core in cores(file, regions, name=name):
        pixels = valid(core, header.nodata)
        inside += int(np.count_nonzero((pixels >= 0) & (pixels <= 1)))
        size += pixels.size
        low = min(low, float(pixels.min(initial=np.inf)))
        high = max(high, float(pixels.max(initial=-np.inf)))
    if inside >= UNIT_SHARE * size:
        return 0.0, 1.0
    return (low, high) if high > low else (low, low + 1.0)


def sample_windows(file: Source, regions: list[Region], *, name: str) -> Iterator[Array]:
    """Yield (h, w, C) pixels from the middle of evenly spread regions of a large image."""
    for index in sorted({round(i) for i in np.linspace(0, len(regions) - 1, SAMPLES)}):
        y0, y1, x0, x1 = regions[index].core
        y, x = (max(a, (a + b - SAMPLE_SIDE) // 2) for a, b in ((y0, y1), (x0, x1)))
        rows, columns = slice(y, min(y1, y + SAMPLE_SIDE)), slice(x, min(x1, x + SAMPLE_SIDE))
        yield read_window(file, y=rows, x=columns, name=name, keep_nodata=True)[0]
