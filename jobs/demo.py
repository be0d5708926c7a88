"""Denoise sample photographs and show the result: `python -m jobs.demo --output demo`."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from denoise_core.config import DenoiseConfig
from denoise_core.samples import before_after, write_samples
from jobs import denoise


@click.command(help=__doc__)
@click.option("--output", default="demo", show_default=True, help="Folder; made anew.")
@click.option("--model", default=None, help="A shipped model's name or a path.")
def main(output: str, model: str | None) -> None:
    """Write noisy samples, run the denoising job on them, draw before and after."""
    root = Path(output)
    for part in ("noisy", "clean", "out"):
        shutil.rmtree(root / part, ignore_errors=True)
    write_samples(root)
    given = {} if model is None else {"model": model}
    config = DenoiseConfig(
        inputs=(str(root / "noisy"),),
        output=str(root / "out"),
        reference=str(root / "clean"),
        **given,
    )
    code = denoise.run(config)
    if code == 0:
        click.echo(f"Before and after: {before_after(root, root / 'out')}")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
