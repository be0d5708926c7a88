"""Cut and paste arrays with tiles, and stack the cut patches to batches of one fixed shape.

Pixels keep their own dtype until a patch is cut; then they are float32 with the data range mapped
to [0, 1], not clipped: values outside the range are noise, not an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from denoise_core.tiling import Patch

Array = np.ndarray
Context = tuple[int, int, int, int]
NO_CONTEXT: Context = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Cut:
    """A patch of one of several images: `source` is the image's place in its list.

    `plane` is the channel that the patch is of, or None for all channels together; `context` what
    the model takes off its window, in pixels at the top, bottom, left and right.
    """

    source: int
    patch: Patch
    plane: int | None
    context: Context = NO_CONTEXT


def cut(pixels: Array, patch: Patch, *, origin: tuple[int, int], low: float, high: float) -> Array:
    """Return the patch's window as float32 (h, w, C), mirrored where it leaves the image.

    `pixels` is (H, W, C) of any real dtype with its first pixel at `origin` of the image.
    """
    top, left = origin
    rows = slice(patch.y.first - top, min(patch.y.last - top, pixels.shape[0]))
    columns = slice(patch.x.first - left, min(patch.x.last - left, pixels.shape[1]))
    kind = np.float64 if is_wide(pixels.dtype) else np.float32
    window: Array = pixels[rows, columns].astype(kind)
    if (low, high) != (0.0, 1.0):
        np.subtract(window, kind(low), out=window)
        np.multiply(window, kind(1.0 / (high - low)), out=window)
    window = window.astype(np.float32, copy=False)
    missing = patch.y.length - window.shape[0], patch.x.length - window.shape[1]
    if missing == (0, 0):
        return window
    return np.pad(window, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")


def is_wide(dtype: np.dtype[Any]) -> bool:
    """Return whether values of `dtype` are moved to and from [0, 1] in float64.

    float32 holds integers up to 2**24: a picture on a large offset would lose its digits.
    """
    return dtype.itemsize > (4 if dtype.kind == "f" else 2)


def core_of(window: Array, patch: Patch, context: Context = NO_CONTEXT) -> Array:
    """Return the core's part (h, w, C) of a window's values, of which `context` is off already."""
    top, _, left, _ = context
    y, x = patch.y, patch.x
    rows = slice(y.start - y.first - top, y.stop - y.first - top)
    return window[rows, x.start - x.first - left : x.stop - x.first - left]


def batches(cuts: Iterable[Cut], *, batch_pixels: int, most: int) -> Iterator[list[Cut]]:
    """Group patches of one window shape and context, of whatever images, to batches.

    A batch has as many patches as fit into `batch_pixels`, at least one and at most `most`.
    """
    waiting: dict[Any, list[Cut]] = defaultdict(list)
    for item in cuts:
        kind = item.patch.shape, item.context
        size = batch_size(item.patch.shape, batch_pixels=batch_pixels, most=most)
        waiting[kind].append(item)
        if len(waiting[kind]) == size:
            yield waiting.pop(kind)
    yield from waiting.values()


def batch_size(shape: tuple[int, int], *, batch_pixels: int, most: int) -> int:
    """Return the patches of one window shape that make a full batch, a power of two."""
    fit = max(1, min(most, batch_pixels // (shape[0] * shape[1])))
    return 1 << (fit.bit_length() - 1)


def stack(windows: Sequence[Array]) -> Array:
    """Stack windows to (N, h, w, C), N rounded up to a power of two with zeros.

    So a shape meets the model in few batch sizes: each new one costs a device some tuning.
    """
    count = 1 << (len(windows) - 1).bit_length()
    batch = np.zeros((count, *windows[0].shape), np.float32)
    for place, window in zip(batch, windows, strict=False):
        place[...] = window
    return batch
