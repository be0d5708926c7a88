"""float32 against bfloat16: speed of the model and its price in dB, on the same noisy images."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from denoise_core import metrics
from denoise_core.benchmarks.child import call
from denoise_core.benchmarks.model import ModelConfig
from denoise_core.benchmarks.pictures import picture_files, read_picture
from denoise_core.benchmarks.tables import Result, number, table
from denoise_core.checkpoints import load_checkpoint
from denoise_core.config import require, setting
from denoise_core.denoiser import Denoiser
from denoise_core.devices import cpu_has_bfloat16
from denoise_core.evaluation.protocol import noisy_of, to_bytes
from denoise_core.pairs import spread

TYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionConfig(ModelConfig):
    """Settings of `jobs.benchmark precision`."""

    output: str = setting(help="Folder for precision.md and precision.json.", metavar="DIR")
    data: str | None = setting(
        None, "Folder of clean 8-bit images; default: scikit-image's.", metavar="DIR"
    )
    sigma: float = setting(25.0, "Noise, of 255.", metavar="S")
    images: int = setting(8, "Images, evenly spread over the folder.", metavar="N")
    repeats: int = setting(3, "Times that each image is denoised; the fastest counts.", metavar="N")

    def __post_init__(self) -> None:
        require(self.images >= 1, "--images: expected a number from 1.")
        require(self.repeats >= 1, "--repeats: expected a number from 1.")


def run(config: PrecisionConfig) -> Result:
    """Measure both types, each in a process of its own, and compare their outputs."""
    config.load()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        figures = {
            precision: call(
                "precision:measure",
                **config.named,
                precision=precision,
                data=config.data,
                sigma=config.sigma,
                images=config.images,
                repeats=config.repeats,
                out=str(Path(folder) / precision),
            ).value
            for precision in TYPES
        }
        differences = [
            np.abs(np.load(path) - np.load(Path(folder) / TYPES[1] / path.name)).ravel() * 255
            for path in sorted((Path(folder) / TYPES[0]).iterdir())
        ]
    low, high = figures[TYPES[0]], figures[TYPES[1]]
    data = {
        "figures": figures,
        "bfloat16_hardware": cpu_has_bfloat16(),
        "speed_ratio": high["mpx_per_s"] / low["mpx_per_s"],
        "psnr_difference": high["psnr"] - low["psnr"],
        "worst_difference": max(float(each.max()) for each in differences),
        "mean_difference": float(np.concatenate(differences).mean()),
        "images": len(differences),
    }
    return Result("precision", "float32 against bfloat16", _body(data, config), data)


def measure(
    *,
    model: str,
    model_range: str,
    precision: str,
    data: str | None,
    sigma: float,
    images: int,
    repeats: int,
    out: str,
) -> dict[str, Any]:
    """Denoise the images in one precision; keep the float outputs as OUT/NNN.npy."""
    denoiser = Denoiser(load_checkpoint(model, model_range=model_range), precision=precision)
    Path(out).mkdir(parents=True)
    seconds = pixels = 0.0
    decibels = []
    for index, path in enumerate(spread(picture_files(data), images)):
        clean = read_picture(path)
        noisy = noisy_of(clean, sigma)
        denoiser.denoise([noisy], ranges=[(0.0, 1.0)])
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            (values,) = denoiser.denoise([noisy], ranges=[(0.0, 1.0)])
            times.append(time.perf_counter() - started)
        seconds += min(times)
        pixels += clean[..., 0].size
        decibels.append(metrics.psnr(to_bytes(values), clean, data_range=255))
        np.save(Path(out) / f"{index:03d}.npy", values)
    return {
        "mpx_per_s": pixels / 1e6 / seconds,
        "psnr": float(np.mean(decibels)),
        "device": denoiser.device,
    }


def _body(data: dict[str, Any], config: PrecisionConfig) -> str:
    figures = data["figures"]
    rows = [
        (name, number(figures[name]["mpx_per_s"]), number(figures[name]["psnr"], 3))
        for name in TYPES
    ]
    hardware = (
        "The CPU multiplies bfloat16 in hardware."
        if data["bfloat16_hardware"]
        else "This CPU has no bfloat16 hardware: TensorFlow emulates it, and `--precision auto` "
        "takes float32 here."
    )
    if figures[TYPES[0]]["device"] == "gpu":
        hardware = "Measured on the GPU."
    text = (
        f"bfloat16 runs at **{data['speed_ratio']:.2f}** times the speed of float32, PSNR "
        f"**{data['psnr_difference']:+.3f} dB**; outputs differ by {data['mean_difference']:.2f} "
        f"levels of 255 on average, {data['worst_difference']:.1f} at worst, before rounding. "
        f"{hardware} {data['images']} images, sigma {config.sigma:g}, protocol A, fastest of "
        f"{config.repeats}."
    )
    return f"{table(('compute type', 'Mpx/s', 'PSNR, dB'), rows)}\n\n{text}"
