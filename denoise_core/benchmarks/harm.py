"""What becomes of images that have little noise or none: copied, gained or harmed.

8-bit images with N(0, sigma/255), clipped and rounded to 8 bits as in a file or saved as a JPEG, go
the way of `jobs.denoise`: those that `choice` finds quiet, or the model would hardly change, are
left alone, the others denoised and rounded. The reference is the image before noise and JPEG.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from denoise_core import metrics
from denoise_core.benchmarks.model import ModelConfig
from denoise_core.benchmarks.pictures import picture_files, read_picture
from denoise_core.benchmarks.quality import parse_sigmas
from denoise_core.benchmarks.tables import Result, number, table
from denoise_core.choice import is_coarse, is_quiet, noise_sigma, residual_rms
from denoise_core.config import DenoiseConfig, require, setting
from denoise_core.denoiser import Denoiser
from denoise_core.evaluation.protocol import noisy_of, to_bytes
from denoise_core.images import DecodedImage, decode
from denoise_core.pairs import spread

Array = np.ndarray


class Limits(NamedTuple):
    """What an image is copied under, in levels: noise, and what the model would take away."""

    sigma: float
    residual: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HarmConfig(ModelConfig):
    """Settings of `jobs.benchmark harm`."""

    output: str = setting(help="Folder for harm.md and harm.json.", metavar="DIR")
    data: str | None = setting(
        None, "Folder of clean 8-bit images; default: scikit-image's.", metavar="DIR"
    )
    sigma: str = setting("0,1,2,3,5", "Noise, of 255.", metavar="S[,S]")
    copy_below: str = setting(
        "auto", "As that of jobs.denoise; 0 denoises every image.", metavar="auto|SIGMA"
    )
    jpeg: int | None = setting(None, "Save the noisy images as JPEGs of this quality.", metavar="Q")
    images: int | None = setting(None, "Images, evenly spread over the folder.", metavar="N")

    def __post_init__(self) -> None:
        require(self.jpeg is None or 1 <= self.jpeg <= 100, "--jpeg: expected 1 to 100.")
        DenoiseConfig.check_number("copy-below", self.copy_below)
        parse_sigmas(self.sigma)


def run(config: HarmConfig) -> Result:
    """Send every image at every sigma through the decision and, where it says so, the model."""
    checkpoint = config.load()
    denoiser = Denoiser(checkpoint, precision="float32")
    auto = config.copy_below == "auto"
    card = checkpoint.card if auto else {"break_even_sigma": config.copy_below}
    limits = Limits(*(float(card.get(f"break_even_{name}", 0)) for name in Limits._fields))
    files = spread(picture_files(config.data), config.images)
    rows = []
    for sigma in parse_sigmas(config.sigma):
        images = _images(files, sigma, denoiser, limits, quality=config.jpeg)
        rows.append(_level(list(images), sigma))
    header = (
        "sigma", "copied", "denoised", "PSNR noisy", "PSNR after", "mean change, denoised",
        "worst change", "denoised and worse by > 0.05 dB", "estimated sigma, 5th-95th percentile",
    )  # fmt: skip
    lines = [
        (
            number(row["sigma"], 1),
            str(row["copied"]),
            str(row["denoised"]),
            number(row["psnr_noisy"]),
            number(row["psnr_after"]),
            number(row["mean_change"]),
            number(row["worst_change"]),
            str(row["harmed"]),
            "-".join(number(value, 1) for value in row["estimates"]),
        )
        for row in rows
    ]
    name = Path(config.data).name if config.data else "scikit-image"
    saved = "clipped and rounded to 8 bits" if config.jpeg is None else f"as JPEG {config.jpeg}"
    text = (
        f"**{name}**, {len(files)} images with noise, {saved}; copied "
        f"below an estimated sigma of {limits.sigma:g}, or where the model would take away under "
        f"{limits.residual:g} levels (root mean square); mean PSNR and changes in dB."
    )
    data = {"copy_below": limits._asdict(), "images": len(files), "levels": rows}
    return Result("harm", "Little noise or none", f"{text}\n\n{table(header, lines)}", data)


def _images(
    files: list[Path], sigma: float, denoiser: Denoiser, limits: Limits, *, quality: int | None
) -> Iterator[dict[str, float | bool]]:
    for path in files:
        clean = read_picture(path)
        noisy = to_bytes(noisy_of(clean, sigma))
        coarse = False
        if quality is not None:
            image = _through_jpeg(noisy, quality)
            noisy, coarse = image.pixels, is_coarse(image.metadata)
        estimate = noise_sigma([noisy], spread=255)
        # Whatever file the clean image came from.
        codec = "png" if quality is None else "jpeg"
        below = limits.sigma
        quiet = is_quiet([noisy], codec=codec, sigma=estimate, below=below, spread=255)
        after = noisy if quiet else to_bytes(denoiser.denoise([noisy])[0] / 255)
        if not quiet and not coarse and residual_rms(noisy, after, spread=255) < limits.residual:
            quiet, after = True, noisy
        yield {
            "copied": quiet,
            "noisy": metrics.psnr(noisy, clean, data_range=255),
            "after": metrics.psnr(after, clean, data_range=255),
            "estimate": estimate,
        }


def _through_jpeg(pixels: Array, quality: int) -> DecodedImage:
    file = io.BytesIO()
    grey = pixels.shape[2] == 1
    Image.fromarray(pixels[..., 0] if grey else pixels).save(file, "JPEG", quality=quality)
    return decode(file.getvalue(), name="picture")


def _level(images: list[dict[str, Any]], sigma: float) -> dict[str, Any]:
    # An image without noise has no finite PSNR to change from.
    changes = [
        0.0 if each["after"] == each["noisy"] else each["after"] - each["noisy"]
        for each in images
        if not each["copied"]
    ]
    return {
        "sigma": sigma,
        "copied": sum(each["copied"] for each in images),
        "denoised": len(changes),
        "psnr_noisy": float(np.mean([each["noisy"] for each in images])),
        "psnr_after": float(np.mean([each["after"] for each in images])),
        "mean_change": float(np.mean(changes)) if changes else None,
        "worst_change": min(changes, default=None),
        "harmed": sum(change < -0.05 for change in changes),
        "estimates": [float(p) for p in np.percentile([e["estimate"] for e in images], [5, 95])],
    }
