"""The value range of images and the way back from floats: rounded and clipped, never truncated."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from denoise_core.errors import NonFiniteValues, UsageError
from denoise_core.images.types import Array

UNIT_SHARE = 0.99
"""Share of the values of a float image that must lie in [0, 1] for that to be its range."""

BIT_DEPTHS = {"8": "uint8", "16": "uint16", "32f": "float32"}


def data_range(image: Array | npt.DTypeLike, *, bits: int = 0) -> tuple[float, float]:
    """(lo, hi) of an image or a dtype, in the image's own units.

    Integers: the dtype's range, or [0, 2**bits - 1] where unsigned ones use fewer `bits`. Floats:
    [0, 1] when 99 % of the values lie in it, else the image's own minimum and maximum; a flat image
    far from [0, 1] gets a range of length 1, so that nobody divides by zero. A float dtype alone
    gives (0, 1).
    """
    dtype = image.dtype if isinstance(image, np.ndarray) else np.dtype(image)
    if dtype.kind in "ui":
        info = np.iinfo(dtype)
        if dtype.kind == "u" and 0 < bits < info.bits:
            return 0.0, float(2**bits - 1)
        return float(info.min), float(info.max)
    if not isinstance(image, np.ndarray) or image.size == 0:
        return 0.0, 1.0
    inside = np.count_nonzero((image >= 0) & (image <= 1))
    if inside >= UNIT_SHARE * image.size:
        return 0.0, 1.0
    lo, hi = float(image.min()), float(image.max())
    return (lo, hi) if hi > lo else (lo, lo + 1.0)


def to_dtype(
    values: Array, dtype: npt.DTypeLike, lo: float | None = None, hi: float | None = None
) -> Array:
    """`values` (any shape, in the image's own units) in `dtype`.

    Integers are rounded half to even and clipped to [lo, hi] (default: the dtype's range) and to
    the dtype. Floats keep values outside [lo, hi], since a range of floats is an estimate and
    highlights above 1 are data; they are only kept finite in the dtype. Raises NonFiniteValues
    for NaN or infinite values.
    """
    target = np.dtype(dtype)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise NonFiniteValues(
            "the denoised values hold NaN or infinity; expected finite ones: replace no-data "
            "values such as -3.4e38 in the image, which make its range too wide; where it has "
            "none, check the model's weights, or use --precision float32"
        )
    if values.dtype == target:
        return values
    if target.kind == "f":
        info = np.finfo(target)
        return np.clip(values, float(info.min), float(info.max)).astype(target)
    return _to_integer(values, target, lo=lo, hi=hi)


def _to_integer(
    values: Array, target: np.dtype[Any], *, lo: float | None, hi: float | None
) -> Array:
    info = np.iinfo(target)
    low = info.min if lo is None else max(float(np.ceil(lo)), info.min)
    high = info.max if hi is None else min(float(np.floor(hi)), info.max)
    if low > high:
        raise UsageError(
            f"the data range {lo}:{hi} holds no {target.name} value; expected LO < HI within "
            f"[{info.min}, {info.max}]"
        )
    # float32 holds integers up to 2**24 only, so 32-bit bounds would round to outside the dtype.
    work = np.float64 if target.itemsize > 2 or values.dtype.kind in "ui" else np.float32
    if values.dtype == np.float64:
        work = np.float64
    out = np.rint(values, dtype=work)
    return np.clip(out, low, high, out=out).astype(target)


def inverted(values: Array, bounds: tuple[float, float]) -> Array:
    """The negative of `values` within `bounds` (lo, hi): lo becomes hi, and hi becomes lo."""
    lo, hi = bounds
    if values.dtype.kind == "f":
        return np.asarray(lo + hi - values, dtype=values.dtype)
    info = np.iinfo(values.dtype)
    low, high = max(int(np.ceil(lo)), info.min), min(int(np.floor(hi)), info.max)
    # Steps may leave a signed dtype, but wrap around to a result that lies within it.
    return values.dtype.type(high) - np.clip(values, low, high) + values.dtype.type(low)


def rescale(values: Array, dtype: npt.DTypeLike, *, source: tuple[float, float]) -> Array:
    """`values` moved linearly from the range `source` to the dtype's own range, then `to_dtype`.

    The range of floats is [0, 1]. 8 to 16 bits is therefore a multiplication by 257.
    """
    lo, hi = data_range(np.dtype(dtype))
    unit = (values.astype(np.float64) - source[0]) / (source[1] - source[0])
    return to_dtype(unit * (hi - lo) + lo, dtype)
