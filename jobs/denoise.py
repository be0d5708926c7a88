"""Denoise images in bulk: `python -m jobs.denoise INPUT... --output OUT`.

An INPUT is a file, a folder, a glob or s3://bucket/prefix; a folder called *.zarr is one image.

Exit codes: 0 done within the error budget, 1 the run failed, 2 wrong usage, 3 finished with more
failed images, those of earlier runs included, than --max-error-rate allows, 130 interrupted.
"""

from __future__ import annotations

import click

from denoise_core.config import DenoiseConfig
from jobs._cli import settings_command
from jobs._ray import end_on_sigterm, start_ray

EXIT_OVER_BUDGET = 3


def run(config: DenoiseConfig) -> int:
    """Denoise by `config`, show progress, print where to look. Returns the exit code."""
    from denoise_core.pipelines.denoise import run_denoising
    from jobs._progress import display, print_outcome

    end_on_sigterm()
    with display(config.progress) as watcher:
        outcome = run_denoising(config, watcher=watcher, start_ray=start_ray)
    print_outcome(outcome, config)
    return 0 if outcome.within_budget else EXIT_OVER_BUDGET


main: click.Command = settings_command(DenoiseConfig, run, name="jobs.denoise", help=str(__doc__))

if __name__ == "__main__":
    main()
