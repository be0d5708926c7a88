"""Train a denoiser on clean images: `python -m jobs.train DATA... --output RUN --hours 2`."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import click

from denoise_core.config import TrainConfig
from denoise_core.presets import preset
from denoise_core.training import check_training
from jobs._cli import settings_command
from jobs._ray import _silent_stderr, start_ray


def run(config: TrainConfig) -> int:
    """Train by `config` and print a line for each report. Returns the exit code."""
    check_training(config, preset(config.preset))
    start_ray()
    # TensorFlow, which Ray Train imports here, greets on stderr whatever its log level.
    with _silent_stderr():
        from denoise_core.pipelines.train import run_training

    best = run_training(config, show=lambda row: click.echo(line(row)))
    click.echo(f"Done. Use it with: python -m jobs.denoise INPUT --output OUT --model {best}")
    return 0


def line(row: dict[str, Any]) -> str:
    """Return one report as a line: share done, step, pixels, speed, loss, PSNR, time left."""
    done, seconds = max(row["fraction"], 1e-9), max(row["seconds"], 1e-9)
    psnr = "" if math.isnan(row["psnr"]) else f"  validation PSNR {row['psnr']:.2f} dB"
    left = timedelta(seconds=round(seconds * (1.0 - done) / done))
    return (
        f"{row['fraction']:6.1%}  step {row['step']}  {row['pixels'] / 1e6:.0f} Mpx  "
        f"{row['pixels'] / 1e6 / seconds:.3f} Mpx/s  loss {row['loss']:.5f}{psnr}  {left} left"
    )


main = settings_command(TrainConfig, run, name="jobs.train", help=str(__doc__))

if __name__ == "__main__":
    main()
