"""Integer geometry: how an axis, and by product an image, is cut to tiles. No NumPy, no images.

A tile has a *core*, the pixels that it owns, and a *window*, the pixels that the model sees. Cores
are disjoint and cover the axis. A window reaches at least `halo` pixels beyond its core, or to the
end of the axis, where the model's own zero padding then stands just as in whole-image inference.
Window origins are multiples of the model's total stride; the axis itself is taken as padded at its
end to such a multiple. So with a halo of the receptive radius the result is that of the whole
image. A network that takes one size only gets windows of just that size (`split_fixed`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

# A window at an end of an axis is cut to what its core needs in steps of so many pixels.
STEP = 32


@dataclass(frozen=True, slots=True)
class Tile:
    """One axis of a tile: the half-open core [start, stop) and window [first, last)."""

    start: int
    stop: int
    first: int
    last: int

    @property
    def length(self) -> int:
        """Length of the window."""
        return self.last - self.first

    def context(self, stride: int) -> tuple[int, int]:
        """Pixels of the window before and behind the core, in whole multiples of `stride`."""
        before, behind = self.start - self.first, max(0, self.last - self.stop)
        return before - before % stride, behind - behind % stride


@dataclass(frozen=True, slots=True)
class Patch:
    """A tile of an image: one `Tile` for each axis."""

    y: Tile
    x: Tile

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the window."""
        return self.y.length, self.x.length

    def context(self, stride: int) -> tuple[int, int, int, int]:
        """Context at the top, bottom, left and right; see `Tile.context`."""
        return *self.y.context(stride), *self.x.context(stride)


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of patches that is read, denoised and written as one work item.

    Core [y0, y1) x [x0, x1) is what the region owns; the window is what must be read for it,
    clipped to the image.
    """

    rows: tuple[Tile, ...]
    columns: tuple[Tile, ...]

    @property
    def core(self) -> tuple[int, int, int, int]:
        """(y0, y1, x0, x1) of the pixels that the region owns."""
        return self.rows[0].start, self.rows[-1].stop, self.columns[0].start, self.columns[-1].stop

    def window(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(y0, y1, x0, x1) of the pixels to read from an image of that size."""
        return (
            min(tile.first for tile in self.rows),
            min(height, max(tile.last for tile in self.rows)),
            min(tile.first for tile in self.columns),
            min(width, max(tile.last for tile in self.columns)),
        )

    @property
    def patches(self) -> list[Patch]:
        """The patches of the region, row by row."""
        return [Patch(y, x) for y in self.rows for x in self.columns]


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def split(length: int, *, core: int, halo: int, stride: int, least: int = 0) -> tuple[Tile, ...]:
    """Cut an axis of `length` pixels to tiles with cores of `core` pixels.

    `core` and `halo` are rounded up to multiples of `stride`. No window is shorter than `least`, a
    multiple of `stride`; that of a shorter axis reaches beyond its end. An axis of at most two
    cores stays whole: cutting it would cost two halos and save nothing. A last core that would fit
    into the halo behind its neighbour is merged with it. Windows of a cut axis have few lengths, so
    that patches of many images stack: core + halo, core + 2 halo and shorter multiples of STEP.
    """
    if length < 1 or core < 1 or halo < 0:
        raise ValueError(f"split({length}, core={core}, halo={halo}): sizes must be positive")
    core, halo = round_up(core, stride), round_up(halo, stride)
    padded, step = max(round_up(length, stride), least), round_up(STEP, stride)
    if length <= max(2 * core, core + 2 * halo, round_up(least, step)):
        return (Tile(0, length, 0, padded),)
    starts = list(range(0, length, core))
    if length - starts[-1] <= halo:
        starts.pop()
    stops = [*starts[1:], length]
    return tuple(
        _tile(start, stop, padded=padded, core=core, halo=halo, step=step, least=least)
        for start, stop in zip(starts, stops, strict=True)
    )


def _tile(
    start: int, stop: int, *, padded: int, core: int, halo: int, step: int, least: int
) -> Tile:
    needed = max(least, min(padded, stop + halo) - max(0, start - halo))
    sizes = (round_up(needed, step), core + halo, core + 2 * halo)
    size = min(size for size in sizes if size >= needed)
    first = min(max(0, start - halo), padded - size)
    return Tile(start, stop, first, first + size)


def split_fixed(length: int, *, size: int, halo: int, stride: int) -> tuple[Tile, ...]:
    """Cut an axis of `length` pixels to windows of exactly `size`, for a network of that size.

    `halo` is a multiple of `stride` and leaves a core: 2 halo + stride <= size. The last window is
    moved back to the end of the axis, so that the network's own padding stands there; cores meet
    in the middle of what their windows share. An axis shorter than `size` is one window that
    reaches beyond it.
    """
    core = size - 2 * halo
    if length < 1 or halo < 0 or core < stride or halo % stride:
        raise ValueError(f"split_fixed({length}, size={size}, halo={halo}, stride={stride})")
    if length <= size:
        return (Tile(0, length, 0, size),)
    final = round_up(length - size, stride)
    firsts = [*range(0, final, core // stride * stride), final]
    bounds = [0, *((left + size + right) // 2 for left, right in pairwise(firsts)), length]
    return tuple(
        Tile(start, stop, first, first + size)
        for (start, stop), first in zip(pairwise(bounds), firsts, strict=True)
    )


def regions(
    height: int,
    width: int,
    *,
    core: int,
    halo: int,
    stride: int,
    least: int = 0,
    region: int | None = None,
) -> list[Region]:
    """Cut an image to regions of whole patches, `region` pixels a side or, with None, to one."""
    rows = split(height, core=core, halo=halo, stride=stride, least=least)
    columns = split(width, core=core, halo=halo, stride=stride, least=least)
    return _group(rows, columns, count=None if region is None else max(1, region // core))


def fixed_regions(
    height: int,
    width: int,
    *,
    size: tuple[int, int],
    halo: int,
    stride: int,
    region: int | None = None,
) -> list[Region]:
    """Cut an image to regions of patches whose windows all have `size` (h, w) pixels."""
    rows = split_fixed(height, size=size[0], halo=halo, stride=stride)
    columns = split_fixed(width, size=size[1], halo=halo, stride=stride)
    core = max(size) - 2 * halo
    return _group(rows, columns, count=None if region is None else max(1, region // core))


def _group(rows: tuple[Tile, ...], columns: tuple[Tile, ...], *, count: int | None) -> list[Region]:
    count = count or max(len(rows), len(columns))
    return [
        Region(rows[i : i + count], columns[j : j + count])
        for i in range(0, len(rows), count)
        for j in range(0, len(columns), count)
    ]
