"""How noise is added and a result is measured: the one statement of it for every figure.

Protocol A, the one of DnCNN, FFDNet, KAIR, SwinIR and Restormer: the image as floats in [0, 1];
N(0, sigma/255) added with NumPy's legacy seed 0 set again for each image; neither clipped nor
quantised; the output clipped and rounded to 8 bits; PSNR over all values of an image, no border
cut; mean over images. `gaussian:SIGMA` is added so; other noise is drawn from a generator seeded by
the image's name and the noise's, so that a rerun and another machine see the same noise.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from denoise_core import metrics
from denoise_core.images import to_dtype
from denoise_core.noise import parse_noise
from denoise_core.patches import is_wide

Array = npt.NDArray[Any]

PAIRS = "pairs"
"""What stands for the noise where the noisy images were given."""

BINS = 511
"""Residuals in whole levels (1/255 of the range) from -255 to 255."""

_SIGMA = re.compile(r"gaussian:(\d+(?:\.\d+)?)")


def sigma_of(spec: str) -> float | None:
    """Return the sigma of `gaussian:SIGMA`, which protocol A states; None for any other noise."""
    match = _SIGMA.fullmatch(spec)
    return float(match[1]) if match else None


def add_gaussian(unit: Array, sigma: float) -> Array:
    """Return float32 of the shape of `unit`, floats in [0, 1], with protocol A's noise added.

    The stream is that of `np.random.seed(0); np.random.normal(...)`; global state is left alone.
    """
    noise = np.random.RandomState(0).normal(0, sigma / 255, unit.shape)
    return (unit + noise).astype(np.float32)


def noisy_of(clean: Array, sigma: float) -> Array:
    """Return float32 (H, W, C): `clean` uint8 by protocol A."""
    return add_gaussian(clean / 255, sigma)


def to_bytes(values: Array) -> Array:
    """Clip and round values in [0, 1] to uint8."""
    out: Array = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return out


@dataclass(frozen=True, slots=True)
class Scale:
    """The data range and dtype of a clean image (H, W, C)."""

    low: float
    high: float
    dtype: str

    @property
    def span(self) -> float:
        """Length of the range."""
        return self.high - self.low

    def unit(self, pixels: Array) -> Array:
        """Return the values in [0, 1], float64."""
        scaled: Array = (pixels.astype(np.float64) - self.low) / self.span
        return scaled

    def back(self, values: Array) -> Array:
        """Return values in [0, 1] as the image's own: clipped, and rounded for integers."""
        work = np.float64 if is_wide(np.dtype(self.dtype)) else np.float32
        clipped = np.clip(values.astype(work), 0, 1) * work(self.span) + work(self.low)
        return to_dtype(clipped, self.dtype, self.low, self.high)


def add_noise(unit: Array, spec: str, *, name: str, quantised: bool) -> Array:
    """Return float32 (H, W, C): `unit`, floats in [0, 1], with the noise of `spec`.

    `name` is the image's, for the seed. `quantised` clips and rounds the result to 8 bits.
    Raises UsageError for an unknown noise.
    """
    sigma = sigma_of(spec)
    if sigma is not None:
        noisy = add_gaussian(unit, sigma)
    else:
        noisy = parse_noise(spec).apply(
            unit.astype(np.float32), np.random.default_rng(seed(name, spec))
        )
    return (to_bytes(noisy) / np.float32(255)).astype(np.float32) if quantised else noisy


def seed(name: str, spec: str) -> int:
    """Return the seed of the noise `spec` of the image `name`: the same everywhere."""
    text = f"{name}\n{spec}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def sigma_for(noisy: Array, spec: str) -> tuple[float, str]:
    """Return the sigma (of 255) that classical filters are told, and 'given' or 'estimated'.

    Given by `gaussian:SIGMA`; for other noise and for pairs estimated from the noisy image alone,
    float32 (H, W, C) in [0, 1] (see `metrics.estimate_sigma`).
    """
    sigma = sigma_of(spec)
    if sigma is not None:
        return sigma, "given"
    return metrics.estimate_sigma(noisy, data_range=1.0), "estimated"


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of one result: MSE in squared ranges, PSNR in dB, SSIM or None under 11 pixels.

    `histogram` counts residuals (result - clean) in BINS whole levels; `output` is the result in
    the clean image's dtype.
    """

    mse: float
    psnr: float
    ssim: float | None
    histogram: Array
    output: Array


def measure(values: Array, clean: Array, scale: Scale) -> Measured:
    """Compare a denoiser's output, floats in [0, 1], with the clean image (H, W, C).

    Raises NonFiniteValues where the output holds NaN or infinity.
    """
    output = scale.back(values)
    sums = metrics.error_sums(output, clean, data_range=scale.span)
    residual = (output.astype(np.float64) - clean.astype(np.float64)) * (255 / scale.span)
    places = np.rint(residual).astype(np.int64).ravel() + BINS // 2
    counts = np.bincount(np.clip(places, 0, BINS - 1), minlength=BINS)
    return Measured(sums.mse, sums.psnr, sums.ssim, counts, output)


def describe(noises: list[str], *, protocol: str, paired: bool) -> str:
    """Say in sentences how the figures were made."""
    if paired:
        made = "The noisy images were given; both sides of a pair are scaled to [0, 1]"
    elif all(sigma_of(spec) is not None for spec in noises):
        made = (
            "Images as floats in [0, 1], N(0, sigma/255) added with NumPy's seed 0 set again for "
            "each image"
        )
    else:
        made = (
            "Images as floats in [0, 1]; gaussian:SIGMA added with NumPy's seed 0 set again for "
            "each image, other noise from a generator seeded by the names of image and noise"
        )
    kind = {
        "a": "; the noisy values then neither clipped nor quantised (protocol A)",
        "quantised": "; the noisy values then clipped and rounded to 8 bits, as files hold them "
        "(protocol A does neither)",
    }
    made += "" if paired else kind[protocol]
    return (
        f"{made}. Outputs clipped and rounded to the image's own integers. PSNR over all values of "
        "an image, no border cut. SSIM with the data range of the image's type (255 for 8 bits), "
        "Gaussian window of sigma 1.5, 11x11, whole windows only, mean over channels. Means over "
        "images with 95 % confidence intervals by Student's t: mean ± t(n-1) s/√n. Alpha is left "
        "out. Classical filters are told sigma where the noise states one, else an estimate from "
        "the noisy image; models are told nothing."
    )
