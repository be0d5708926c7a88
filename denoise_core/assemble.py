"""The regions of one large image -> one tiled BigTIFF or the files of one Zarr, streamed.

    regions = [Region(0, 0, 2048, 2048, load), ...]        # `load` returns the pixels
    lost = assemble_tiff(regions, path=temporary, header=header, metadata=metadata)
    storage.publish(uri, zarr_files(regions, header=header, metadata=metadata))

Memory is one row of regions and one row of tiles, however tall the image is; for a Zarr, one
region and chunks of as many pixels. The TIFF appears under `path`; publishing it atomically is the
caller's (`Storage.upload`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denoise_core.errors import ImageError
from denoise_core.images import ImageHeader, ImageMetadata, tiff, zarr
from denoise_core.images import exif as exif_block

TILE = (256, 256)
"""Tile (height, width) of the output when the source has none."""

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of the output, and how to load it.

    `load` returns (height, width, samples) in the output's dtype, or anything that can be sliced
    like it (a memory map). Samples are the channels, and alpha as the last one where there is one.
    """

    y0: int
    x0: int
    height: int
    width: int
    load: Callable[[], Array]


def assemble_tiff(
    regions: Iterable[Region],
    *,
    path: str | Path,
    header: ImageHeader,
    metadata: ImageMetadata,
    dtype: str | None = None,
    tile: tuple[int, int] | None = None,
    compression: str | None = None,
    max_workers: int = 1,
) -> tuple[str, ...]:
    """Write the regions to a tiled BigTIFF at `path`; returns the names of what was lost.

    Regions come in rows: those of equal `y0` have equal height, and the rows tile the image.
    Tile size, compression, resolution, ICC and all tags are the source's; `tile` (multiples of
    16), `compression` ("none", "deflate", "lzw", "zstd", "lzma") and `dtype` change them. Images
    of several pages or planes are written plane by plane, which loads each region once a plane.
    Raises ImageError when regions are missing or overlap, before anything is written.
    """
    rows = _rows(list(regions), header)
    target = np.dtype(dtype or header.dtype)
    shape = (header.height, header.width, header.samples)
    exif, damaged = exif_block.for_tiff(metadata.exif)
    metadata = replace(metadata, exif=exif)
    layout, tag_sets, left = tiff.layout_to_write(shape, target, metadata)
    layout |= {"bigtiff": True, "tile": list(tile or layout["tile"] or TILE)}
    options, lost = tiff.page_options(layout, target, compression=compression)
    options["maxworkers"] = max_workers
    plan = _Plan(layout, options, tag_sets, metadata, target, header.samples)
    try:
        _write(Path(path), rows, plan)
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
    return tuple(dict.fromkeys((*metadata.lost, *damaged, *left, *lost)))


def zarr_files(
    regions: Iterable[Region], *, header: ImageHeader, metadata: ImageMetadata
) -> Iterator[tuple[str, bytes]]:
    """Yield the (name, content) of every file of a Zarr like its source, metadata last.

    Every chunk is made once, so that the same pixels make the same bytes. Raises ImageError when
    regions are missing or overlap, before anything is yielded.
    """
    rows = _rows(list(regions), header)
    writer = zarr.ZarrWriter(metadata)
    height, width = _block(rows[0][0], writer.unit, header)
    dtype = np.dtype(header.dtype)
    for y in range(0, header.height, height):
        for x in range(0, header.width, width):
            shape = (min(height, header.height - y), min(width, header.width - x), header.samples)
            block = np.empty(shape, dtype)
            for row in rows:
                for region in row:
                    _paste(block, region, y=y, x=x)
            yield from writer.chunks(block, y0=y, x0=x)
    yield from writer.metadata_files()


def _block(region: Region, unit: tuple[int, int], header: ImageHeader) -> tuple[int, int]:
    """Height and width in whole chunks, together about as many pixels as a region.

    Where regions are of whole chunks, blocks are regions, and each is loaded once.
    """
    height = min(header.height, max(1, region.height // unit[0]) * unit[0])
    columns = min(region.width, region.height * region.width // height) // unit[1]
    return max(height, unit[0]), max(1, columns) * unit[1]


def _paste(block: Array, region: Region, *, y: int, x: int) -> None:
    """Copy what a region has of the block whose first pixel is (y, x)."""
    top, bottom = max(y, region.y0), min(y + block.shape[0], region.y0 + region.height)
    left, right = max(x, region.x0), min(x + block.shape[1], region.x0 + region.width)
    if top >= bottom or left >= right:
        return
    pixels = _loaded(region, dtype=block.dtype, samples=block.shape[2])
    block[top - y : bottom - y, left - x : right - x] = pixels[
        top - region.y0 : bottom - region.y0, left - region.x0 : right - region.x0
    ]


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the file will be written."""

    layout: dict[str, Any]
    options: dict[str, Any]
    tag_sets: list[list[list[Any]]]
    metadata: ImageMetadata
    dtype: np.dtype[Any]
    samples: int

    def tags(self, page: int) -> list[tuple[Any, ...]]:
        return tiff.extra_tags(self.tag_sets, self.metadata, page=page)


def _rows(regions: list[Region], header: ImageHeader) -> list[list[Region]]:
    """Regions sorted to rows; raises when they do not tile the image."""
    found: dict[int, list[Region]] = {}
    for region in sorted(regions, key=lambda item: (item.y0, item.x0)):
        found.setdefault(region.y0, []).append(region)
    y = 0
    for y0, row in found.items():
        if y0 != y:
            raise _gap(y, 0, f"the next row of regions begins at y={y0}")
        _check_row(row, header)
        y += row[0].height
    if y != header.height:
        raise _gap(y, 0, f"the image is {header.height} rows high")
    return list(found.values())


def _check_row(row: Sequence[Region], header: ImageHeader) -> None:
    x = 0
    for region in row:
        if region.x0 != x or region.height != row[0].height:
            raise _gap(region.y0, x, f"found one at x={region.x0} of height {region.height}")
        x += region.width
    if x != header.width:
        raise _gap(row[0].y0, x, f"the image is {header.width} columns wide")


def _gap(y: int, x: int, found: str) -> ImageError:
    return ImageError(
        f"expected a region at y={y}, x={x}, but {found}; regions are missing or overlap: run the "
        "same command again to denoise what is missing"
    )


def _write(path: Path, rows: list[list[Region]], plan: _Plan) -> None:
    import tifffile

    layout = plan.layout
    separate, _, height, width, together = layout["page_shape"]
    shape = (separate,) * (separate > 1) + (height, width) + (together,) * (together > 1)
    with (
        tiff.refused_writes(),
        tifffile.TiffWriter(path, bigtiff=True, byteorder=layout["byteorder"]) as writer,
    ):
        for page in range(layout["pages"]):
            planes = [
                slice(number * together, (number + 1) * together)
                for number in range(page * separate, (page + 1) * separate)
            ]
            writer.write(
                _tiles(rows, planes, plan),
                shape=shape,
                dtype=plan.dtype,
                extratags=plan.tags(page),
                **plan.options,
            )
    if plan.metadata.exif:
        with path.open("r+b") as file:
            exif_block.append_to_tiff(file, plan.metadata.exif)


def _tiles(rows: list[list[Region]], planes: Sequence[slice], plan: _Plan) -> Iterator[Array]:
    """Tiles (tile height, tile width[, samples]) in the order of the file."""
    tile_height, tile_width = plan.options["tile"]
    for samples in planes:
        for band in _bands(rows, samples, plan, height=tile_height):
            for x in range(0, band.shape[1], tile_width):
                yield _whole_tile(band[:, x : x + tile_width], tile_height, tile_width)


def _whole_tile(part: Array, height: int, width: int) -> Array:
    """Tiles at the border are filled up with their last row and column, which compress well."""
    missing = (height - part.shape[0], width - part.shape[1])
    if any(missing):
        part = np.pad(part, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
    return part[..., 0] if part.shape[-1] == 1 else part


def _bands(
    rows: list[list[Region]], samples: slice, plan: _Plan, *, height: int
) -> Iterator[Array]:
    """The image in bands of `height` rows (the last may be lower), whatever the regions' are."""
    total, width = plan.layout["page_shape"][2:4]
    band = np.empty((height, width, samples.stop - samples.start), plan.dtype)
    y = 0
    for row in rows:
        parts = [_loaded(each, dtype=plan.dtype, samples=plan.samples) for each in row]
        end = y + row[0].height
        while y < end:
            top = y % height
            count = min(height - top, end - y)
            for region, part in zip(row, parts, strict=True):
                start = y - region.y0
                columns = slice(region.x0, region.x0 + region.width)
                band[top : top + count, columns] = part[start : start + count, :, samples]
            y += count
            if y % height == 0 or y == total:
                yield band[: top + count]
        del parts


def _loaded(region: Region, *, dtype: np.dtype[Any], samples: int) -> Array:
    pixels = region.load()
    expected = (region.height, region.width, samples)
    if pixels.shape != expected or pixels.dtype != dtype:
        raise ImageError(
            f"the region at y={region.y0}, x={region.x0} holds {pixels.dtype} {pixels.shape}; "
            f"expected {dtype} {expected}: --retry-failed denoises the image again"
        )
    return pixels
