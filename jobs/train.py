"""Train a denoiser on clean images: `python -m jobs.train DATA... --output RUN --hours 2`."""

from __future__ import annotations

from typing import Any

import click

from denoise_core.config import TrainConfig
from jobs._cli import settings_command
from jobs._ray import start_ray


def run(config: TrainConfig) -> int:
    """Train by `config` and print a line for each report. Returns the exit code."""
    start_ray()
    from denoise_core.pipelines.train import run_training

    best = run_training(config, show=_show)
    click.echo(f"Done. Use it with: python -m jobs.denoise INPUT --output OUT --model {best}")
    return 0


def _show(row: dict[str, Any]) -> None:
    psnr = "" if row["psnr"] != row["psnr"] else f"  validation PSNR {row['psnr']:.2f} dB"
    click.echo(
        f"{row['fraction']:6.1%}  step {row['step']}  {row['pixels'] / 1e6:.0f} Mpx  "
        f"{row['pixels'] / 1e6 / max(row['seconds'], 1e-9):.3f} Mpx/s  loss {row['loss']:.5f}{psnr}"
    )


main = settings_command(TrainConfig, run, name="jobs.train", help=str(__doc__))

if __name__ == "__main__":
    main()
