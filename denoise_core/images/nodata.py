"""No-data of rasters: values that stand for no picture, as GDAL_NODATA in a TIFF names them.

They take part in no range and no measure, a model sees an end of the range in their place, and they
come out as they went in.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from denoise_core.images.types import Array, DecodedImage
from denoise_core.images.values import data_range


def parse_nodata(text: str, dtype: np.dtype[Any]) -> float | None:
    """The value that a tag's text names; None for one that `dtype` cannot hold."""
    try:
        value = float(text.strip("\0 ").replace(",", "."))
    except ValueError:
        return None
    if dtype.kind == "f":
        # Programs write the lowest float32 with more or fewer digits than it has.
        info = np.finfo(dtype)
        return float(dtype.type(np.clip(value, info.min, info.max)))
    bounds = np.iinfo(dtype)
    return value if bounds.min <= value <= bounds.max and value.is_integer() else None


def is_nodata(pixels: Array, nodata: float | None) -> Array:
    """Which of the values (any shape) are no data, as bool."""
    if nodata is None:
        return np.zeros(pixels.shape, bool)
    return np.isnan(pixels) if math.isnan(nodata) else pixels == pixels.dtype.type(nodata)


def valid(pixels: Array, nodata: float | None) -> Array:
    """The values that are data: `pixels` itself where all are, else in one dimension."""
    if nodata is None:
        return pixels
    none = is_nodata(pixels, nodata)
    return pixels[~none] if none.any() else pixels


def filled(pixels: Array, nodata: float | None, *, low: float, high: float) -> Array:
    """`pixels` with the end of the range [low, high] that is nearer to no data in its place.

    `pixels` itself where nothing changes. NaN becomes `low`.
    """
    if nodata is None:
        return pixels
    value = low if math.isnan(nodata) else min(max(nodata, low), high)
    none = is_nodata(pixels, nodata)
    if value == nodata or not none.any():
        return pixels
    return np.where(none, pixels.dtype.type(value), pixels)


def picture_of(image: DecodedImage) -> tuple[Array, tuple[float, float]]:
    """Pixels (H, W, C) with an end of their range in place of no data, and that range."""
    nodata = image.header.nodata
    low, high = data_range(valid(image.pixels, nodata), bits=image.header.bits)
    return filled(image.pixels, nodata, low=low, high=high), (low, high)


def restore(denoised: Array, pixels: Array, nodata: float | None) -> None:
    """Write no data into `denoised` where `pixels` have it, and there alone.

    Both are of one shape and dtype. A valid value that came out as the one that stands for no data
    becomes its neighbour.
    """
    if nodata is None:
        return
    taken = is_nodata(denoised, nodata)
    if taken.any():
        denoised[taken] = _neighbour(denoised.dtype, nodata)
    denoised[is_nodata(pixels, nodata)] = nodata


def _neighbour(dtype: np.dtype[Any], nodata: float) -> float:
    if dtype.kind == "f":
        return float(np.nextafter(dtype.type(nodata), dtype.type(0 if nodata else 1)))
    return nodata + 1 if nodata < np.iinfo(dtype).max else nodata - 1
