"""Denoise sample photographs and show the result: `python -m jobs.demo --output demo`."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from denoise_core.checkpoints import load_checkpoint
from denoise_core.config import DenoiseConfig
from denoise_core.errors import UsageError
from denoise_core.samples import before_after, write_samples
from jobs import denoise
from jobs._cli import guarded
from jobs._ray import end_on_sigterm, start_ray

PARTS = ("noisy", "clean", "out")
MARKER = ".denoise-demo"
"""Lies in a folder whose PARTS the demo made, and may delete."""


def make_room(root: Path) -> None:
    """Delete what an earlier demo left. Raises UsageError where it may be someone's own."""
    found = [part for part in PARTS if (root / part).exists()]
    if found and not (root / MARKER).exists():
        raise UsageError(
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
    sys.exit(guarded(lambda: run(Path(output), model), interrupted="The same command begins anew."))


def run(root: Path, model: str) -> int:
    """Make the demo in `root` and print where to look. Returns the exit code."""
    end_on_sigterm()
    load_checkpoint(model, measure=False)  # a wrong name is said before anything is deleted
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
    return code


if __name__ == "__main__":
    main()
