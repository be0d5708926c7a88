"""Search for better settings of a preset: `python -m jobs.tune DATA... --output OUT ...`.

A trial trains the preset with settings drawn from --space; those that fall behind end early. OUT
gets `trials.csv`, `tune.png` and `best.toml`, which `jobs.train --config` takes.

Exit codes: 0 done, 1 the run failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from denoise_core.config import TuneConfig
from denoise_core.devices import NO_GPU
from denoise_core.trials import Trial, baseline_of, best_of, keys_of, ranked, text_of
from jobs._cli import settings_command
from jobs._ray import keep_freed_memory, silent_stderr, start_ray

if TYPE_CHECKING:
    from denoise_core.pipelines.tune import Search

SHOWN = 12
WIDTH = 160


def run(config: TuneConfig) -> int:
    """Search by `config`, print a line for each cut and end, and a table. Returns the exit code."""
    with silent_stderr():
        from denoise_core.pipelines.tune import plan_search, run_search

    search = plan_search(config)
    fewer = "" if len(search.trials) == config.trials else ", all that the space has"
    click.echo(
        f"{len(search.trials)} trials{fewer}, compared by PSNR on {search.compared_on}; "
        "trial 0 is the preset as it is."
    )
    keep_freed_memory()
    start_ray()
    trials = run_search(search, show=show)
    print_table(trials)
    print_end(trials, search)
    return 0


def show(event: str, trial: Trial, trials: Sequence[Trial]) -> None:
    """Print a line for a validation, an end, or a GPU that is not seen."""
    if event == "misses_gpu":
        click.echo(NO_GPU)
        return
    ended = sum(t.status in ("done", "stopped", "failed") for t in trials)
    # The last validation is followed by the end.
    if event == "validated" and 0.0 < trial.fraction < 1.0:
        what = f"{trial.fraction:4.0%}  {trial.psnr:.2f} dB"
    elif event == "ended" and trial.status == "failed":
        what = f"failed: {trial.note}"
    elif event == "ended":
        word = "done" if trial.status == "done" else f"ended early at {trial.fraction:.0%}"
        what = f"{word}, {trial.psnr:.2f} dB  [{ended} of {len(trials)} trials]"
    else:
        return
    click.echo(f"trial {trial.number:>2}  {what}  {settings_text(trial)}")


def settings_text(trial: Trial) -> str:
    """Return a trial's settings in a line."""
    pairs = [f"{key}={text_of(value)}" for key, value in trial.settings.items()]
    return " ".join(pairs) or "the preset as it is"


def print_table(trials: Sequence[Trial]) -> None:
    """Print the best trials and the preset as it is."""
    from rich.console import Console
    from rich.table import Table

    keys = keys_of(trials)
    table = Table(title="Trials, the best first", title_justify="left")
    for name in ("trial", "PSNR dB", "done", "seconds", "MFLOP/px"):
        table.add_column(name, justify="right")
    for key in keys:
        table.add_column(key, overflow="fold")
    best = ranked(trials)
    for trial in [t for t in best if t in best[:SHOWN] or not t.settings]:
        own = "" if trial.settings else "preset"
        table.add_row(
            str(trial.number),
            "failed" if trial.status == "failed" else f"{trial.psnr:.2f}",
            f"{trial.fraction:.0%}",
            f"{trial.seconds:.0f}",
            f"{trial.mflop_per_pixel:.3f}",
            *(text_of(trial.settings.get(key)) or own for key in keys),
            style=None if trial.settings else "bold",
        )
    # A file or a pipe has no width of its own.
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


def print_end(trials: Sequence[Trial], search: Search) -> None:
    """Print the gain and what to do with it."""
    best, baseline = best_of(trials), baseline_of(trials)
    assert best is not None
    gain = "" if baseline is None else f", {best.psnr - baseline.psnr:+.2f} dB against the preset"
    if best is baseline:
        gain = ": the preset as it is"
    click.echo(f"Best: trial {best.number}, {best.psnr:.2f} dB{gain}. Table, plot and settings:")
    output = search.config.output
    for name in ("trials.csv", "tune.png", "best.toml"):
        click.echo(f"  {output}/{name}")
    data, settings = shlex.join(search.config.data), shlex.quote(f"{output}/best.toml")
    command = search.training_command(best, data=data, settings=settings)
    click.echo(f"Train with them: {command}")


main = settings_command(
    TuneConfig,
    run,
    name="jobs.tune",
    help=str(__doc__),
    interrupted="Finished trials are safe; go on with --resume.",
)

if __name__ == "__main__":
    main()
