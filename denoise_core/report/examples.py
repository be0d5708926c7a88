"""The best and worst images of a run, each as one crop before and after, in data URIs."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denoise_core.errors import DenoiseError, ObjectNotFound
from denoise_core.report.rows import OK, Floats, Survey
from denoise_core.report.summary import derived
from denoise_core.storage import StorageOptions, is_bundle, join, storage_for, to_path
from denoise_core.storage.base import path_problem

CROP = 384
"""Side of an example in pixels: three of them side by side fill the page at 1:1."""
WHOLE_PIXELS = 100e6
"""Larger images are previewed only where their format can be read in windows."""
SEARCH_PIXELS = 25e6
"""Up to here input and output are held at once to find the crop where they differ most."""

Image = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One image before and after: two data URIs of one crop, or a note why there is none."""

    row: dict[str, Any]
    before: str = ""
    after: str = ""
    crop: str = ""
    small: bool = False
    note: str = ""


Gallery = tuple[str, str, NDArray[np.int64]]
"""A label, what its images were ranked by, and their row numbers."""


def rank(survey: Survey, count: int) -> tuple[Gallery, Gallery]:
    """The best rows and the worst (worst first), `count` together; no row is in both.

    By PSNR gain where any reference is known. Else the best are those that lost most noise, and
    the worst those whose residual looks least like noise: structure was taken out with it.
    """
    ok = survey.status == OK
    values = derived(survey)
    gain = np.where(ok, values["psnr_gain"], np.nan)
    if np.isfinite(gain).any():
        best, worst = _two_ends(gain, gain, count)
        return ("Best", "PSNR gain", best), ("Worst", "PSNR gain", worst)
    drop = np.where(ok, values["sigma_in"] - values["sigma_out"], np.nan)
    residual = np.where(ok, np.abs(values["residual_autocorrelation"]), np.nan)
    best, worst = _two_ends(drop, -residual, count)
    return ("Best", "noise removed", best), ("Worst", "residual autocorrelation", worst)


def _two_ends(
    best_by: Floats, worst_by: Floats, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows highest in `best_by`, and the rows lowest in `worst_by` that are not among them."""
    known = np.flatnonzero(np.isfinite(best_by))
    others = np.flatnonzero(np.isfinite(worst_by))
    count = min(count, np.union1d(known, others).size)
    best = known[np.argsort(-best_by[known], kind="stable")][: (count + 1) // 2]
    rest = np.setdiff1d(others, best)
    worst = rest[np.argsort(worst_by[rest], kind="stable")][: count - best.size]
    return best, worst


def read_example(row: dict[str, Any], options: StorageOptions | None, *, out: str) -> Example:
    """Read this row's two images and cut the crop; never raises for what is wrong with them.

    Rows are not trusted to name outputs: whoever can write to `out` writes them, and the page shows
    what the reader of the report alone may see.
    """
    try:
        if refusal := _refusal(row["source_uri"] or "", row["output_uri"] or "", out=out):
            return Example(row, note=f"No preview: {refusal}")
        return _cut_example(row, options)
    except ObjectNotFound:
        return Example(row, note="No preview: the input or the output is no longer there.")
    except (DenoiseError, OSError, ValueError) as error:
        return Example(row, note=f"No preview: {error}")


def _refusal(source: str, output: str, *, out: str) -> str:
    """Why these files of a row are not opened, "" where they are."""
    if not source or not output:
        return "the row names no input or no output."
    if not _lies_below(output, join(out, "images")):
        return "the row names a file outside this output."
    return ""


def _is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def _lies_below(uri: str, folder: str) -> bool:
    if _is_s3(uri) or _is_s3(folder):
        return uri.startswith(f"{folder}/") and not path_problem(uri.removeprefix(f"{folder}/"))
    # A folder may have two names, and a link in it may lead out of it.
    top = os.path.realpath(to_path(folder))
    return os.path.realpath(to_path(uri)).startswith(f"{top}/")


def _cut_example(row: dict[str, Any], options: StorageOptions | None) -> Example:
    source, output = row["source_uri"], row["output_uri"]
    # A deep stack counts as so many pixels of four channels.
    pixels = (row["height"] or 0) * (row["width"] or 0) * max(1, (row["channels"] or 1) / 4)
    crops: _Crops | None
    # A Zarr may be deep, however few its pixels are.
    if pixels > WHOLE_PIXELS or (is_bundle(source) and is_bundle(output)):
        crops = _window_crops(source, output, options)
    elif pixels > SEARCH_PIXELS:
        crops = _centre_crops(source, output, options)
    else:
        crops = _searched_crops(source, output, row["data_range"], options)
    if crops is None:
        limit = WHOLE_PIXELS / 1e6
        return Example(row, note=f"No preview: {pixels / 1e6:,.0f} Mpx, over {limit:.0f} Mpx.")
    before, after, (y, x) = crops
    pair = _tone_map(before, after, row["data_range"])
    height, width = before.shape[:2]
    return Example(
        row,
        before=_data_uri(pair[0]),
        after=_data_uri(pair[1]),
        crop=f"{width} × {height} at {x}, {y}{pair[2]}",
        small=max(height, width) <= CROP // 2,
    )


_Crops = tuple[Image, Image, tuple[int, int]]


def _decode(uri: str, options: StorageOptions | None) -> Image:
    from denoise_core import images

    data = images.fetch(storage_for(uri, options), uri)
    return images.picture_of(images.decode(data, name=uri, keep_nodata=True))[0]


def _same_size(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    if before[:2] != after[:2]:
        raise ValueError(
            f"the input is now {before[1]} × {before[0]} px, the output {after[1]} × {after[0]}; "
            "it has changed since the run."
        )


def _searched_crops(
    source: str, output: str, stated: Sequence[float] | None, options: StorageOptions | None
) -> _Crops:
    before, after = _decode(source, options), _decode(output, options)
    _same_size(before.shape, after.shape)
    y, x = _most_different(before, after, _display_ranges(before, after, stated))
    window = np.s_[y : y + CROP, x : x + CROP]
    return before[window].copy(), after[window].copy(), (y, x)


def _centre_crops(source: str, output: str, options: StorageOptions | None) -> _Crops:
    crops, shapes = [], []
    for uri in (source, output):  # one image in memory at a time
        pixels = _decode(uri, options)
        y, x = _centre(pixels.shape)
        shapes.append(pixels.shape)
        crops.append(pixels[y : y + CROP, x : x + CROP].copy())
    _same_size(*shapes)
    return crops[0], crops[1], (y, x)


def _window_crops(source: str, output: str, options: StorageOptions | None) -> _Crops | None:
    """The centre of two images too large to decode; None where one has no windows."""
    from denoise_core import images

    crops, shapes = [], []
    for uri in (source, output):
        with images.open_image(storage_for(uri, options), uri) as file:
            header = images.read_header(file, name=uri, max_pixels=10**12)
            if not header.windowed:
                return None
            y, x = _centre((header.height, header.width))
            rows, columns = slice(y, y + CROP), slice(x, x + CROP)
            pixels, _ = images.read_window(file, y=rows, x=columns, name=uri, keep_nodata=True)
            low, high = images.data_range(images.valid(pixels, header.nodata))
            shapes.append((header.height, header.width))
            crops.append(images.filled(pixels, header.nodata, low=low, high=high))
    _same_size(*shapes)
    return crops[0], crops[1], (y, x)


def _centre(shape: Sequence[int]) -> tuple[int, int]:
    return max(0, (shape[0] - CROP) // 2), max(0, (shape[1] - CROP) // 2)


def _most_different(
    before: Image, after: Image, ranges: list[tuple[float, float]], *, block: int = 32
) -> tuple[int, int]:
    """Top left of the crop with the largest absolute difference, on a grid of blocks.

    Each counts by its own data range of `ranges`, as depths may differ. Where nothing differs, or
    the crop covers the image, that is the centre or the origin.
    """
    height, width = before.shape[:2]
    rows, columns = -(-height // block), -(-width // block)
    sums = np.zeros((rows + 1, columns + 1))
    channels = min(before.shape[2], after.shape[2])
    for i in range(rows):
        strip = np.s_[i * block : (i + 1) * block, :, :channels]
        first, second = (
            (pixels[strip].astype(np.float32) - lo) / max(hi - lo, 1e-30)
            for pixels, (lo, hi) in zip((before, after), ranges, strict=True)
        )
        change = np.abs(first - second)
        line = change.sum(axis=(0, 2), dtype=np.float64)
        sums[i + 1, 1:] = np.add.reduceat(line, np.arange(0, width, block))
    integral = sums.cumsum(axis=0).cumsum(axis=1)
    side_y, side_x = min(CROP // block, rows), min(CROP // block, columns)
    boxes = (
        integral[side_y:, side_x:]
        - integral[:-side_y, side_x:]
        - integral[side_y:, :-side_x]
        + integral[:-side_y, :-side_x]
    )
    if not boxes.max() > 0:
        return _centre(before.shape)
    top, left = np.unravel_index(int(boxes.argmax()), boxes.shape)
    y, x = int(top) * block, int(left) * block
    return min(y, max(0, height - CROP)), min(x, max(0, width - CROP))


def _tone_map(
    before: Image, after: Image, stated_range: Sequence[float] | None
) -> tuple[Image, Image, str]:
    """Two crops (h, w, C) of any dtype -> uint8 (h, w) or (h, w, 3), and a remark for the caption.

    Each is scaled by its data range. Where a 16-bit or float crop uses under a quarter of it
    (a dark micrograph would be black), both are stretched alike over what the output uses.
    """
    remark = ""
    if before.shape[2] != 3:
        remark = f", channel 1 of {before.shape[2]}" if before.shape[2] > 1 else ""
        before, after = before[..., :1], after[..., :1]
    ranges = _display_ranges(before, after, stated_range)
    scaled = [
        (crop.astype(np.float32) - lo) / max(hi - lo, 1e-30)
        for crop, (lo, hi) in zip((before, after), ranges, strict=True)
    ]
    lo, hi = np.quantile(scaled[1], (0.001, 0.999))
    if before.dtype != np.uint8 and 1e-6 < hi - lo < 0.25:
        scaled = [(crop - lo) / (hi - lo) for crop in scaled]
        remark += ", contrast stretched"
    shown = [np.rint(np.clip(crop, 0, 1) * 255).astype(np.uint8) for crop in scaled]
    if before.shape[2] == 1:
        shown = [crop[..., 0] for crop in shown]
    return shown[0], shown[1], remark


def _display_ranges(
    before: Image, after: Image, stated_range: Sequence[float] | None
) -> list[tuple[float, float]]:
    from denoise_core import images

    if stated_range and len(stated_range) == 2 and stated_range[1] > stated_range[0]:
        first = (float(stated_range[0]), float(stated_range[1]))
    else:
        first = images.data_range(before)
    second = first if after.dtype == before.dtype else images.data_range(after)
    return [first, second]


def _data_uri(pixels: Image) -> str:
    """A PNG, or a JPEG where that would be large: its artefacts are far below the noise shown."""
    from PIL import Image as Pillow

    picture = Pillow.fromarray(pixels)
    buffer, kind = io.BytesIO(), "png"
    picture.save(buffer, "PNG")
    if buffer.tell() > 48 * 1024:
        buffer, kind = io.BytesIO(), "jpeg"
        picture.save(buffer, "JPEG", quality=92, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
