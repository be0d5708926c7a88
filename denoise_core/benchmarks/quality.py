"""PSNR and SSIM beside Mpx/s: models and the filters one would use instead, under protocol A.

Protocol A, the one of DnCNN, FFDNet, KAIR, SwinIR and Restormer: the 8-bit image as floats in
[0, 1]; N(0, sigma/255) added with NumPy's seed 0 set again for each image; neither clipped nor
quantised; the output clipped and rounded to uint8; PSNR over all values, no border cut; mean over
images. Grey images are denoised as one channel.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from denoise_core import metrics
from denoise_core.benchmarks.model import ModelConfig
from denoise_core.benchmarks.pictures import picture_files, read_picture
from denoise_core.benchmarks.tables import Result, number, table
from denoise_core.config import nearest, require, setting
from denoise_core.devices import cores
from denoise_core.errors import UsageError
from denoise_core.evaluation.methods import SLOW, find_model, label_models
from denoise_core.evaluation.protocol import noisy_of, to_bytes
from denoise_core.models.classical import CLASSICAL
from denoise_core.pairs import spread

Array = np.ndarray
Method = Callable[[Array, float], Array]

BASELINES = "identity,wavelet,tv,nlm,nlm-opencv,bm3d"
PROTOCOL = (
    "Protocol A: 8-bit image as floats in [0, 1], N(0, sigma/255) added with NumPy's seed 0 set "
    "again for each image, neither clipped nor quantised; output clipped and rounded to 8 bits; "
    "PSNR over all values, no border cut. SSIM on the 8-bit output with a data range of 255: "
    "Gaussian window of sigma 1.5, 11x11, whole windows only, mean over channels. Mpx/s: one "
    "process, one image after another, the method alone; cores: CPU time by wall time of it."
)


def split_words(text: str) -> tuple[str, ...]:
    """Return the words between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def parse_sigmas(text: str) -> list[float]:
    """Return the noise levels, of 255, between commas. Raises UsageError."""
    try:
        sigmas = [float(word) for word in split_words(text)]
    except ValueError:
        sigmas = []
    require(
        bool(sigmas) and all(0 <= sigma < math.inf for sigma in sigmas),
        f"--sigma {text}: expected numbers from 0, with commas.",
    )
    return sigmas


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityConfig(ModelConfig):
    """Settings of `jobs.benchmark quality`."""

    output: str = setting(help="Folder for quality.md and quality.json.", metavar="DIR")
    data: str = setting(
        "", "Folders of clean 8-bit images; default: scikit-image's.", metavar="DIR[,DIR]"
    )
    sigma: str = setting("15,25,50", "Noise, of 255.", metavar="S[,S]")
    model: str = setting("unet-s", "Shipped names or paths.", metavar="NAME|PATH[,...]")
    baselines: str = setting(
        BASELINES,
        f"Of {', '.join(CLASSICAL)}; or none.",
        metavar="NAME[,NAME]",
    )
    limit: int = setting(
        10, f"Images, evenly spread, for the slow ones ({', '.join(SLOW)}).", metavar="N"
    )
    images: int | None = setting(None, "Images for all, evenly spread.", metavar="N")
    precision: str = setting(
        "float32", "Compute type of the models.", choices=("auto", "float32", "bfloat16")
    )

    def __post_init__(self) -> None:
        require(self.limit >= 1, "--limit: expected a number from 1.")
        parse_sigmas(self.sigma)
        for name in self.filters:
            if name not in CLASSICAL:
                raise UsageError(f"--baselines {name!r}: unknown.{nearest(name, CLASSICAL)}")

    @property
    def sigmas(self) -> list[float]:
        """The noise levels."""
        return parse_sigmas(self.sigma)

    @property
    def filters(self) -> tuple[str, ...]:
        """The baselines' names."""
        return tuple(name for name in split_words(self.baselines) if name != "none")


def run(config: QualityConfig) -> Result:
    """Measure every method on every folder."""
    folders: Sequence[str | None] = split_words(config.data) or (None,)
    methods = _methods(config)
    tables, data = [PROTOCOL], []
    for folder in folders:
        files = spread(picture_files(folder), config.images)
        rows = [
            _measure(name, method, files, sigma=sigma, config=config)
            for name, method in methods.items()
            for sigma in config.sigmas
        ]
        tables.append(_table(Path(folder).name if folder else "scikit-image", rows, files, config))
        data.append({"data": folder, "images": len(files), "figures": rows})
    return Result("quality", "Quality and speed", "\n\n".join(tables), {"folders": data})


def _methods(config: QualityConfig) -> dict[str, Method]:
    models = label_models(split_words(config.model), model_range=config.model_range)
    methods = {model.label: _of_model(model.path, config) for model in models}
    return {**methods, **{name: CLASSICAL[name] for name in config.filters}}


def _of_model(name: str, config: QualityConfig) -> Method:
    from denoise_core.denoiser import Denoiser

    checkpoint = find_model(name, model_range=config.model_range)
    denoiser = Denoiser(checkpoint, precision=config.precision)

    def method(image: Array, sigma: float) -> Array:
        # Blind: the model is not told sigma.
        return denoiser.denoise([image], ranges=[(0.0, 1.0)])[0]

    return method


def _measure(
    name: str, method: Method, files: Sequence[Path], *, sigma: float, config: QualityConfig
) -> dict[str, Any]:
    """Figures of one method at one sigma, with those of every image."""
    chosen = spread(files, config.limit) if name in SLOW else list(files)
    # The first call traces, allocates and starts threads.
    method(noisy_of(read_picture(chosen[0])[:64, :64], sigma), sigma)
    images = [_one_image(path, method, sigma) for path in chosen]
    wall, cpu, pixels = (sum(image[key] for image in images) for key in ("wall", "cpu", "pixels"))
    known = [image["ssim"] for image in images if image["ssim"] is not None]
    return {
        "method": name,
        "sigma": sigma,
        "psnr": float(np.mean([image["psnr"] for image in images])),
        "ssim": float(np.mean(known)) if known else None,
        "mpx_per_s": pixels / 1e6 / wall,
        "cores": cpu / wall,
        "images": {image["name"]: image["psnr"] for image in images},
    }


def _one_image(path: Path, method: Method, sigma: float) -> dict[str, Any]:
    clean = read_picture(path)
    if clean.dtype != np.uint8:
        raise UsageError(f"{path}: got {clean.dtype} samples; protocol A is for 8-bit images.")
    noisy = noisy_of(clean, sigma)
    wall, cpu = time.perf_counter(), time.process_time()
    values = method(noisy, sigma)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    sums = metrics.error_sums(to_bytes(values), clean, data_range=255)
    return {
        "name": path.name,
        "psnr": sums.psnr,
        "ssim": sums.ssim,
        "wall": wall,
        "cpu": cpu,
        "pixels": clean[..., 0].size,
    }


def _speeds(group: Sequence[dict[str, Any]]) -> str:
    """Mpx/s with three digits for the slow."""
    return "/".join(number(v, 2 if v >= 0.1 else 4) for v in (row["mpx_per_s"] for row in group))


def _table(
    title: str, rows: Sequence[dict[str, Any]], files: Sequence[Path], config: QualityConfig
) -> str:
    """One row for each method; slow ones beside the first method on the images that they had."""
    sigmas = config.sigmas
    shown = "/".join(f"{sigma:g}" for sigma in sigmas)
    header = ["method", "images", f"PSNR at {shown}", f"SSIM at {shown}", "Mpx/s", "cores"]
    subsets = any(len(row["images"]) < len(files) for row in rows)
    header += [f"PSNR of {rows[0]['method']} there"] * subsets
    lines = []
    for start in range(0, len(rows), len(sigmas)):
        group, reference = rows[start : start + len(sigmas)], rows[: len(sigmas)]
        line = [
            group[0]["method"],
            str(len(group[0]["images"])),
            "/".join(number(row["psnr"]) for row in group),
            "/".join(number(row["ssim"], 4) for row in group),
            "-" if group[0]["method"] == "identity" else _speeds(group),
            number(float(np.mean([row["cores"] for row in group])), 1),
        ]
        there = [
            np.mean([other["images"][name] for name in row["images"]])
            for row, other in zip(group, reference, strict=True)
            if set(row["images"]) <= set(other["images"])
        ]
        line += ["/".join(number(float(value)) for value in there) or "-"] * subsets
        lines.append(line)
    text = f"**{title}**, {len(files)} images; models in {config.precision}; {cores()} core(s)."
    return f"{text}\n\n{table(header, lines)}"
