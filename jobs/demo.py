"""Denoise sample photographs and show the result: `python -m jobs.demo --output demo`."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from denoise_core.config import DenoiseConfig
from denoise_core.samples import before_after, write_samples
from jobs import denoise
from jobs._ray import start_ray

PARTS = ("noisy", "clean", "out")
MARKER = ".denoise-demo"
"""Lies in a folder whose PARTS the demo made, and may delete."""


def make_room(root: Path) -> None:
    """Delete what an earlier demo left. Raises click.UsageError where it may be someone's own."""
    found = [part for part in PARTS if (root / part).exists()]
    if found and not (root / MARKER).exists():
        raise click.UsageError(
            f"--output {root}: its {' and '.join(found)} were not made by this demo, which would "
            "replace them. Name a new folder, or delete them first."
        )
    root.mkdir(parents=True, exist_ok=True)
    (root / MARKER).touch()
    for part in found:
        shutil.rmtree(root / part)


@click.command(help=__doc__)
@click.option("--output", default="demo", show_default=True, help="Folder; made anew.")
@click.option("--model", default="unet-s", show_default=True, help="A shipped name or a path.")
def main(output: str, model: str) -> None:
    """Write noisy samples, run the denoising job on them, draw before and after."""
    root = Path(output)
    make_room(root)
    with ThreadPoolExecutor(1) as pool:
        # The samples are made while Ray's processes start.
        samples = pool.submit(write_samples, root)
        start_ray()
        samples.result()
    config = DenoiseConfig(
        inputs=(str(root / "noisy"),),
        output=str(root / "out"),
        reference=str(root / "clean"),
        model=model,
    )
    code = denoise.run(config)
    if code == 0:
        click.echo(f"Before and after: {before_after(root, root / 'out')}")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
