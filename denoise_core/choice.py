"""What becomes of an image by what it shows: left alone or denoised, and by which model.

Before the model: by estimates of the noise. After it: by how much it would take away, which in a
quiet image is less than in a noisy one, however much texture there is. Figures behind the rules are
in the models' cards (`break_even`) and in the README.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from denoise_core import metrics
from denoise_core.images import ImageHeader, ImageMetadata, camera_of

Array = np.ndarray

AUTO = "auto"
"""The `--model` that chooses among AUTO_MODELS for each image."""

AUTO_MODELS = ("unet-s", "unet-s-photo")
"""For noise that is white, as scans and sensors' raw values have it; for pictures of cameras, whose
noise went through a demosaic, a tone curve and often a JPEG. Of one architecture: one geometry."""

# What these codecs leave of noise is not white.
LOSSY = ("jpeg", "webp")
# Texture adds up to so many levels to the wavelet estimate: 14 were seen in BSDS500.
TEXTURE_LEVELS = 16.0
# Measuring white noise costs a sixth of a second for a megapixel: a grid of so many by so many
# windows, of so many pixels a side, stands for a larger image.
GRID, WINDOW_SIDE = 4, 256
# 12 bits in 16 use a sixteenth of the range.
DIM_SHARE = 1 / 8
# Mean step of a JPEG's luma table: 5.8 at quality 95, 11.5 at 90, of the tables in the standard.
COARSE_STEP = 8.5
# Side of the squares, in pixels, that are blank or not.
SQUARE_SIDE = 8


def noise_sigma(windows: Sequence[Array], *, spread: float) -> float:
    """Mean of the wavelet estimate over windows (h, w, C) of one image, in levels.

    `spread` is the data range.
    """
    return float(np.mean([metrics.estimate_sigma(each, data_range=spread) for each in windows]))


def is_quiet(
    windows: Sequence[Array], *, codec: str, sigma: float, below: float, spread: float
) -> bool:
    """Whether an image has noise under `below`, in levels; `sigma` is its wavelet estimate.

    That reads no less than the true noise, but more where there is texture: there the white noise
    is measured too. `windows` are the image, or samples of a large one; `codec` is its format.
    """
    if sigma < below or sigma >= below + TEXTURE_LEVELS or codec in LOSSY:
        return sigma < below
    parts = [part for each in windows for part in _grid(each)]
    return float(np.mean([metrics.white_sigma(e, data_range=spread) for e in parts])) < below


def _grid(image: Array) -> list[Array]:
    """Return evenly spread windows of a large image, or a small one as it is."""
    height, width = image.shape[:2]
    if height * width <= (GRID * WINDOW_SIDE) ** 2:
        return [image]
    tops, lefts = (
        np.linspace(0, max(0, side - WINDOW_SIDE), GRID).astype(int) for side in (height, width)
    )
    return [image[y : y + WINDOW_SIDE, x : x + WINDOW_SIDE] for y in tops for x in lefts]


def residual_rms(noisy: Array, denoised: Array, *, spread: float) -> float:
    """Return the root mean square of what a model took away, in levels; images are (H, W, C).

    Of a large image it is that of a grid of windows. Blank squares, as the background of a scan or
    around a cell, do not count.
    """
    total, count, channels = 0.0, 0, noisy.shape[2]
    for windows in zip(_grid(noisy), _grid(denoised), strict=True):
        before, after = map(_squares, windows)
        top = before[:, 0]
        textured = (before != before[:, :1]).any(axis=1).any(axis=2)
        textured |= (top[..., channels:] != top[..., :-channels]).any(axis=2)
        taken = np.subtract(after, before, dtype=np.float32) / np.float32(spread)
        squares = np.square(taken, out=taken).sum(axis=1).sum(axis=2, dtype=np.float64)
        total += float(squares[textured].sum())
        count += int(textured.sum()) * taken[0, :, 0].size
    return 255.0 * math.sqrt(total / count) if count else 0.0


def _squares(image: Array) -> Array:
    """Return (rows, h, columns, w * C): squares of SQUARE_SIDE, without what is left over."""
    height, width = (min(SQUARE_SIDE, side) for side in image.shape[:2])
    rows, columns = image.shape[0] // height, image.shape[1] // width
    return image[: rows * height, : columns * width].reshape(rows, height, columns, -1)


def is_dim(pixels: Array, low: float, high: float) -> bool:
    """Whether deep integers use little of their range: what is noise to the eye is none to it."""
    if pixels.dtype.kind not in "ui" or pixels.dtype.itemsize == 1:
        return False
    # Where there is room for negative values, their size counts as well.
    start = 0.0 if low < 0 else low
    most = max(float(pixels.max()) - start, start - float(pixels.min()))
    return most < DIM_SHARE * (high - start)


def is_coarse(metadata: ImageMetadata) -> bool:
    """Whether a lossy file's own artefacts outweigh what a model takes of a quiet image.

    They do in a JPEG of quality 90, and not in one of 95; a WebP does not tell its quality.
    """
    if metadata.format == "jpeg":
        return float(np.mean(metadata.native["qtables"][0])) > COARSE_STEP
    return metadata.format == "webp" and not metadata.native["lossless"]


def from_camera(header: ImageHeader, metadata: ImageMetadata) -> bool:
    """Whether an image is a camera's picture: 8 bits, lossy or with a camera named in its EXIF."""
    eight = np.dtype(header.dtype) == np.uint8
    return eight and (header.format in LOSSY or camera_of(metadata.exif) is not None)


def choose(header: ImageHeader, metadata: ImageMetadata) -> int:
    """Return the place in AUTO_MODELS of the model for an image."""
    return int(from_camera(header, metadata))
