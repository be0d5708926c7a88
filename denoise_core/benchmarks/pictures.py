"""Pictures for the benchmarks: read from a folder, or made of the photographs in scikit-image.

What is made is seeded: the same settings give the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from denoise_core.devices import cores
from denoise_core.errors import UsageError
from denoise_core.images import decode
from denoise_core.pairs import spread

Array = np.ndarray

SHIPPED = (
    "astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png",
    "hubble_deep_field.jpg", "ihc.png", "retina.jpg",
)  # fmt: skip
"""Colour photographs in scikit-image's wheel."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".npy")
SIZES = (
    (1024, 768), (481, 321), (2048, 1536), (640, 480), (1920, 1080), (800, 600), (3000, 2000),
    (1200, 1600),
)  # fmt: skip
"""(width, height) of the made PNGs, in turn: 15 Mpx a round, from a thumbnail to a photograph."""

MOST_SOURCES = 32
TIFF_TILE = 256


def picture_files(folder: str | None) -> list[Path]:
    """Return the images of a folder by name, or the shipped photographs where it is None."""
    if folder is None:
        import skimage.data

        return [Path(skimage.data.__file__).parent / name for name in SHIPPED]
    files = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in SUFFIXES]
    if not files:
        raise UsageError(
            f"--data {folder}: no images there; name a folder of {', '.join(SUFFIXES)}"
        )
    return files


def read_picture(path: Path) -> Array:
    """Return the pixels (H, W, C) without alpha, C 1 for grey images."""
    return decode(path.read_bytes(), name=path.name).pixels


def photographs(folder: str | None) -> list[Array]:
    """Return 8-bit RGB photographs to make pictures of; grey ones are repeated to three channels.

    Raises UsageError where there is no 8-bit image.
    """
    found = []
    for path in spread(picture_files(folder), MOST_SOURCES):
        pixels = read_picture(path)
        if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):
            found.append(np.repeat(pixels, 3 // pixels.shape[2], axis=2))
    if not found:
        raise UsageError(f"--data {folder}: no 8-bit grey or RGB image there.")
    return found


def compose(source: Array, size: tuple[int, int], *, at: tuple[int, int] = (0, 0)) -> Array:
    """Return (height, width, C) from the plane that the source mirrored without end covers.

    `size` is (width, height), `at` the place (y, x) where it begins.
    """
    width, height = size
    rows = _mirrored(at[0], height, source.shape[0])
    columns = _mirrored(at[1], width, source.shape[1])
    return source[rows[:, None], columns]


def _mirrored(start: int, length: int, period: int) -> Array:
    index = np.arange(start, start + length) % (2 * period)
    return np.minimum(index, 2 * period - 1 - index)


def add_noise(pixels: Array, sigma: float, rng: np.random.Generator) -> Array:
    """Return uint8 with N(0, sigma) added, rounded and clipped: a noisy 8-bit file."""
    noise = rng.standard_normal(pixels.shape, dtype=np.float32)
    noise *= np.float32(sigma)
    noise += pixels
    np.rint(noise, out=noise)
    return np.clip(noise, 0, 255, out=noise).astype(np.uint8)


def make_pngs(folder: Path, *, megapixels: float, sigma: float, data: str | None) -> float:
    """Write noisy 8-bit RGB PNGs of mixed sizes, at least so many Mpx; return how many."""
    sizes = list(_sizes(megapixels))
    _make(folder, [(size, "png") for size in sizes], sigma=sigma, data=data)
    return sum(width * height for width, height in sizes) / 1e6


def _sizes(megapixels: float) -> Iterator[tuple[int, int]]:
    total = 0.0
    for size in itertools.cycle(SIZES):
        if total >= megapixels:
            return
        yield size
        total += size[0] * size[1] / 1e6


def make_photos(folder: Path, *, megapixels: Sequence[float], sigma: float) -> float:
    """Write 4:3 photographs of those sizes, JPEG and PNG in turn; return the sum of Mpx."""
    sizes = [(round((m * 4e6 / 3) ** 0.5), round((m * 3e6 / 4) ** 0.5)) for m in megapixels]
    suffixes = itertools.cycle(("jpg", "png"))
    _make(folder, list(zip(sizes, suffixes, strict=False)), sigma=sigma, data=None)
    return sum(width * height for width, height in sizes) / 1e6


def _make(
    folder: Path, wanted: Sequence[tuple[tuple[int, int], str]], *, sigma: float, data: str | None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sources = photographs(data)

    def write(index: int) -> None:
        size, suffix = wanted[index]
        rng = np.random.default_rng(index)
        at = (int(rng.integers(1024)), int(rng.integers(1024)))
        clean = compose(sources[index % len(sources)], size, at=at)
        content = _encode(add_noise(clean, sigma, rng), suffix)
        (folder / f"{index:05d}-{size[0]}x{size[1]}.{suffix}").write_bytes(content)

    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(write, range(len(wanted))))


def _encode(pixels: Array, suffix: str) -> bytes:
    import imagecodecs

    if suffix == "jpg":
        return bytes(imagecodecs.jpeg_encode(pixels, level=95))
    return bytes(imagecodecs.png_encode(pixels, level=1))


def make_tiff(path: Path, *, side: int, sigma: float) -> None:
    """Write a square RGB uint8 TIFF in deflated tiles, one row of tiles in memory at a time."""
    import tifffile

    with tifffile.TiffWriter(path, bigtiff=side * side * 3 > 2**31) as writer:
        writer.write(
            _tiles(side, sigma),
            shape=(side, side, 3),
            dtype=np.uint8,
            tile=(TIFF_TILE, TIFF_TILE),
            photometric="rgb",
            compression="zlib",
            compressionargs={"level": 1},
            maxworkers=1,
        )


def _tiles(side: int, sigma: float) -> Iterator[Array]:
    rng = np.random.default_rng(0)
    source = photographs(None)[0]
    for y in range(0, side, TIFF_TILE):
        clean = compose(source, (side + -side % TIFF_TILE, TIFF_TILE), at=(y, 0))
        row = add_noise(clean, sigma, rng)
        for x in range(0, side, TIFF_TILE):
            yield np.ascontiguousarray(row[:, x : x + TIFF_TILE])
