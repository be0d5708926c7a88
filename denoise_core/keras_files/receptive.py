"""Measures what an unknown network needs around a pixel: its total stride and its halo.

    found = measure(predict, channels=3, input_size=None, strides=(1, 2, 4))

Nothing but the function is looked at, in float32 on made pictures:
- where half of a picture is changed to other values, the change reaches as far into the other half
  as the receptive radius (the exact halo), to within INVISIBLE of the value range;
- two windows, moved against each other, agree where both have enough context: the least halo with
  which they do to within half an 8-bit level is the default.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from denoise_core.errors import CheckpointError
from denoise_core.tiling import round_up

Array = np.ndarray
Predict = Callable[[Array], Array | None]
"""(N, h, w, C) float32 in [0, 1] -> the same, or None where the network does not take that size."""

INVISIBLE = 1e-5
HALF_LEVEL = 0.5 / 255
# Windows of a network of any size, in pixels: doubled up to where an influence ends inside one.
WINDOWS = (64, 128, 256, 512)
# Wider halos than this, or than a quarter of a network's one size, cost more than they are worth.
MOST_HALO = 64
# Halos are tried in steps of at least so many pixels.
STEP = 4
# Two odd numbers: sizes of an odd number of cells show a cell that is too small.
CELLS = (11, 13)


@dataclass(frozen=True, slots=True)
class Receptive:
    """What was measured, in pixels; `note` is a sentence where no halo makes patches equal.

    `least` is the shortest side of an image that comes back in its own shape, of any size; else 0.
    """

    stride: int
    default_halo: int
    exact_halo: int
    note: str = ""
    least: int = 0


def smooth_picture(height: int, width: int) -> Array:
    """Return (h, w) float32 in [0.25, 0.75] without noise."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return np.asarray(0.5 + 0.25 * np.sin(x / 7) * np.cos(y / 5), np.float32)


def measure(
    predict: Predict,
    *,
    channels: int,
    input_size: tuple[int, int] | None,
    strides: Sequence[int],
) -> Receptive:
    """Measure `predict`, a network of any size or of `input_size` (h, w).

    `strides`, ascending, are the total strides that it can have; the first that fits is taken.
    Raises CheckpointError where an output is not of its input's shape at any of them.
    """
    probe = _Probe(predict, channels)
    if input_size is None:
        return _measure_free(probe, strides)
    return _measure_fixed(probe, input_size, strides)


def _measure_free(probe: _Probe, strides: Sequence[int]) -> Receptive:
    taken = _taken(probe, strides)
    for stride, height in taken.items():
        least = probe.least(stride, height)
        radius = _free_radius(probe, stride, least)
        if radius is None:
            break
        side = max(least, round_up(2 * radius, stride) + 6 * stride)
        if probe.repeats((side, side), stride=stride, radius=radius):
            exact = round_up(radius, stride)
            halo, _ = _least_halo(probe, None, stride=stride, most=exact, least=least)
            return Receptive(stride, halo, exact, least=least)
    stride, height = list(taken.items())[-1]
    least = probe.least(stride, height)
    halo, seam = _least_halo(probe, None, stride=stride, most=MOST_HALO, least=least)
    note = f"A pixel depends on the whole input, however large. {_remaining(halo, seam)}".strip()
    return Receptive(stride, halo, halo, note, least)


def _taken(probe: _Probe, strides: Sequence[int]) -> dict[int, int]:
    """Return the strides at which images come back in their own shape, each with a height that did.

    Larger images are tried only where none do: convolutions without padding need some pixels.
    """
    for pixels in (0, *WINDOWS[:3]):
        sizes = {
            stride: _cells(stride, pixels)
            for stride in strides
            if not pixels or CELLS[0] * stride < pixels
        }
        taken = {stride: size[0] for stride, size in sizes.items() if probe.takes(*size)}
        if taken:
            return taken
    height, width = _cells(strides[-1], 0)
    raise CheckpointError(
        f"the model does not give images of {height}x{width} pixels back in their own shape, nor "
        f"larger ones up to {WINDOWS[2]}; expected padding 'same' and as much up- as downsampling."
    )


def _cells(stride: int, pixels: int) -> tuple[int, int]:
    """Return (h, w) of an odd number of cells, CELLS or more, of at least `pixels`."""
    count = max(CELLS[0], -(-pixels // stride) | 1)
    return count * stride, (count + CELLS[1] - CELLS[0]) * stride


def _free_radius(probe: _Probe, stride: int, least: int) -> int | None:
    for window in WINDOWS:
        side = round_up(max(window, 8 * stride, least), stride)
        radius = probe.radius((side, side), stride)
        if radius is not None:
            return radius
    return None


def _measure_fixed(probe: _Probe, size: tuple[int, int], strides: Sequence[int]) -> Receptive:
    if not probe.takes(*size):
        raise CheckpointError(
            f"the model does not give images of {size[0]}x{size[1]} pixels back in their own shape."
        )
    fitting = [stride for stride in strides if size[0] % stride == size[1] % stride == 0]
    stride, exact, radius = fitting[-1], 0, None
    for candidate in fitting:
        radius = probe.radius(size, candidate)
        if radius is None:
            break
        exact = round_up(radius, stride)
        room = min(size) - 2 * radius - 2 * candidate
        if room > 0 and probe.repeats(size, stride=candidate, radius=radius):
            stride, exact = candidate, round_up(radius, candidate)
            break
    most = min(size) // 4 // stride * stride
    if radius is not None:
        most = min(most, exact)
    halo, seam = _least_halo(probe, size, stride=stride, most=most)
    note = _remaining(halo, seam)
    if stride in size:
        # Windows moved by less than a stride say nothing, and moved by it they share no pixel.
        note = (
            f"{note} Its total stride of {stride} is a whole side of its window: patches share no "
            "pixel there, and how much they differ where they meet could not be measured."
        ).strip()
    if radius is None:
        note = f"A pixel depends on the whole {size[0]}x{size[1]} window. {note}".strip()
    return Receptive(stride, halo, max(halo, exact), note)


def _least_halo(
    probe: _Probe, size: tuple[int, int] | None, *, stride: int, most: int, least: int = 0
) -> tuple[int, float]:
    """Return the least halo whose seams are invisible, and its seam in units of the range.

    More context is taken to make no seam worse. Where even `most` leaves one, `most` is taken if
    its seam is at most a quarter of the seam without any halo; else 0, since more context would
    cost time and help little.
    """

    def seam(halo: int) -> float:
        side = round_up(max(32, least), stride) + 2 * halo
        return probe.seam(size or (side, side), halo=halo, stride=stride)

    halos = [*range(0, most, round_up(STEP, stride)), most]
    at_most = seam(most)
    if at_most > HALF_LEVEL:
        bare = seam(0)
        return (most, at_most) if at_most <= bare / 4 else (0, bare)
    halo = halos[bisect.bisect_left(halos, True, key=lambda each: seam(each) <= HALF_LEVEL)]
    return halo, seam(halo)


def _remaining(halo: int, seam: float) -> str:
    if seam <= HALF_LEVEL:
        return ""
    halo_text = f"a halo of {halo}" if halo else "no halo, as none would help"
    return (
        f"With {halo_text}, neighbouring patches of made pictures differ by up to "
        f"{255 * seam:.1f} levels of 255 where they meet."
    )


class _Probe:
    """A network and the pictures that it is tried on."""

    def __init__(self, predict: Predict, channels: int) -> None:
        self.predict, self.channels = predict, channels

    def takes(self, height: int, width: int) -> bool:
        """Return whether an input of that size comes back in its own shape."""
        result = self.predict(np.zeros((1, height, width, self.channels), np.float32))
        return result is not None and result.shape == (1, height, width, self.channels)

    def least(self, stride: int, height: int) -> int:
        """Return the least side that comes back in its own shape, as `height` and all between do.

        Smaller ones may come back larger, filled with whatever lay in memory.
        """
        counts = range(1, height // stride)
        takes = [stride * count for count in counts]
        place = bisect.bisect_left(takes, True, key=lambda side: self.takes(side, side))
        return (place + 1) * stride

    def run(self, batch: Array) -> Array:
        """Predict; a size that is not taken was asked for by mistake."""
        result = self.predict(batch)
        if result is None or result.shape != batch.shape:
            raise CheckpointError(
                f"the model does not give an input of shape {batch.shape} back in its own shape."
            )
        if not np.isfinite(result).all():
            raise CheckpointError(
                "the model gives NaN or infinite values; its weights are damaged, or its training "
                "went astray."
            )
        return result

    def pictures(self, height: int, width: int) -> Array:
        """Return (4, h, w, C): noise of 25/255, edges, noise of 64/255, white strokes on black."""
        rng = np.random.default_rng(0)
        y, x = np.mgrid[:height, :width].astype(np.float32)
        smooth = smooth_picture(height, width)
        edges = smooth + np.where((x // 13 + y // 9) % 2 == 0, 0.2, -0.2)
        strokes = np.where(np.abs(np.sin(x / 6 + np.cos(y / 5))) < 0.3, 1.0, 0.0)
        planes = np.stack([smooth, edges, np.full_like(smooth, 0.5), strokes])
        values = np.repeat(planes[..., None], self.channels, axis=3)
        sigma = np.array([25, 0, 64, 25]).reshape(4, 1, 1, 1) / 255
        noisy = values + sigma * rng.standard_normal(values.shape)
        return noisy.astype(np.float32)

    def radius(self, size: tuple[int, int], stride: int) -> int | None:
        """Return how far a change of one half reaches into the other; None where to the far end.

        The halves meet on a multiple of `stride`.
        """
        base = self.pictures(*size)
        before = self.run(base)
        reaches = []
        for axis in (1, 2):
            middle = size[axis - 1] // 2 // stride * stride
            for side in (slice(0, middle), slice(middle, None)):
                half = (slice(None),) * axis + (side,)
                for values in (0.0, 1.0 - base[half]):
                    other = base.copy()
                    other[half] = values
                    moved = np.abs(self.run(other) - before) > INVISIBLE
                    lines = moved.any(axis=tuple({0, 1, 2, 3} - {axis}))
                    # From where the halves meet outwards.
                    rest = lines[middle:] if side.start == 0 else lines[:middle][::-1]
                    reaches.append(int(np.max(np.nonzero(rest)[0], initial=-1)) + 1)
                    if reaches[-1] == rest.size:
                        return None
        return max(reaches)

    def repeats(self, size: tuple[int, int], *, stride: int, radius: int) -> bool:
        """Return whether a window moved by `stride` gives, in its middle, the moved output."""
        height, width = size
        whole = self.pictures(height + stride, width + stride)
        first = self.run(np.ascontiguousarray(whole[:, :height, :width]))
        second = self.run(np.ascontiguousarray(whole[:, stride:, stride:]))
        rows, columns = (slice(radius + stride, side - radius) for side in size)
        moved = second[:, radius : height - radius - stride, radius : width - radius - stride]
        return bool(np.abs(first[:, rows, columns] - moved).max() <= HALF_LEVEL)

    def seam(self, size: tuple[int, int], *, halo: int, stride: int) -> float:
        """Return the largest difference of two windows where both have a context of `halo`.

        `halo` is a multiple of `stride`, and the windows are moved by such a one.
        """
        return max(self._seam(size, halo, stride, axis) for axis in (1, 2))

    def _seam(self, size: tuple[int, int], halo: int, stride: int, axis: int) -> float:
        length = size[axis - 1]
        step = length - 2 * halo - stride
        if step == 0:
            return 0.0
        sides = list(size)
        sides[axis - 1] += step
        whole = self.pictures(*sides)
        first, second = (
            self.run(np.ascontiguousarray(np.take(whole, range(at, at + length), axis=axis)))
            for at in (0, step)
        )
        here = np.arange(length - halo - stride, length - halo)
        difference = np.take(first, here, axis=axis) - np.take(second, here - step, axis=axis)
        return float(np.abs(difference).max())
