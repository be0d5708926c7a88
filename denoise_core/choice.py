"""What becomes of an image by what it shows: left alone or denoised, and by which model.

Figures behind the rules are in the models' cards (`break_even`) and in the README.
"""

from __future__ import annotations

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
# Texture adds up to so many levels to the wavelet estimate of the noise.
TEXTURE_LEVELS = 8.0


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
    white = [metrics.white_sigma(each, data_range=spread) for each in windows]
    return float(np.mean(white)) < below


def from_camera(header: ImageHeader, metadata: ImageMetadata) -> bool:
    """Whether an image is a camera's picture: 8 bits, lossy or with a camera named in its EXIF."""
    eight = np.dtype(header.dtype) == np.uint8
    return eight and (header.format in LOSSY or camera_of(metadata.exif) is not None)


def choose(header: ImageHeader, metadata: ImageMetadata) -> int:
    """Return the place in AUTO_MODELS of the model for an image."""
    return int(from_camera(header, metadata))
