"""Measure models on clean images or pairs: `python -m jobs.evaluate DATA --model A B --output OUT`.

    python -m jobs.evaluate PHOTOS --noise gaussian:15 gaussian:25 gaussian:50 --output OUT
    python -m jobs.evaluate FOLDER --noisy '*_real.JPG' --clean '*_mean.JPG' --output OUT
    python -m jobs.evaluate t10k-images-idx3-ubyte.gz --limit 500 --noise factor:0.5 --output OUT

Leaves OUT/evaluation.html, OUT/pictures, OUT/summary.json and OUT/reports/evaluation.
Exit codes: 0 done, 1 the run failed, 2 wrong usage, 3 finished, but more images could not be used
than --max-error-rate allows, 130 interrupted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from denoise_core.config import EvaluateConfig
from denoise_core.pipelines.evaluate import Outcome, Watcher, run_evaluation
from jobs._cli import settings_command
from jobs._ray import end_on_sigterm, start_ray

EXIT_OVER_BUDGET = 3
PLAIN_EVERY_S = 10.0
SHOWN_FAILURES = 5


def run(config: EvaluateConfig) -> int:
    """Evaluate by `config`, show progress, print the table. Returns the exit code."""
    end_on_sigterm()
    with display() as watcher:
        outcome = run_evaluation(config, watcher=watcher, start_ray=start_ray)
    print_outcome(outcome, config)
    return 0 if outcome.error_rate <= config.max_error_rate else EXIT_OVER_BUDGET


class Plain(Watcher):
    """A line every ten seconds, for logs."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def note(self, text: str) -> None:
        """Print a line."""
        click.echo(text)

    def update(self, done: int, total: int) -> None:
        """Print the state now and then."""
        if time.monotonic() - self.last >= PLAIN_EVERY_S:
            self.last = time.monotonic()
            click.echo(f"{done}/{total} images")


class Bar(Watcher):
    """A live bar on a terminal."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            transient=True,
        )
        self.task = self.progress.add_task("Starting workers", total=None)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self.progress.console.print(text, markup=False, highlight=False)

    def update(self, done: int, total: int) -> None:
        """Move the bar."""
        self.progress.update(self.task, description="Measuring", total=total, completed=done)


@contextmanager
def display() -> Iterator[Watcher]:
    """Yield the watcher: a bar where stdout is a terminal, else plain lines."""
    if not sys.stdout.isatty():
        yield Plain()
        return
    bar = Bar()
    with bar.progress:
        yield bar


HEADER = ("noise", "method", "images", "PSNR dB", "SSIM", "gain dB")


def result_lines(results: list[dict[str, Any]]) -> list[str]:
    """Return the table of all noises and methods as aligned lines."""
    rows = [HEADER]
    for entry in results:
        rows.append(
            (
                entry["noise"],
                entry["method"],
                str(entry["images"]),
                _measure(entry["psnr"], 2),
                _measure(entry["ssim"], 3),
                "" if entry["method"] == "identity" else _measure(entry["gain"], 2, sign="+"),
            )
        )
    widths = [max(len(row[place]) for row in rows) for place in range(len(HEADER))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _measure(interval: dict[str, Any], digits: int, *, sign: str = "") -> str:
    if interval["mean"] is None:
        return "-"
    text = f"{interval['mean']:{sign}.{digits}f}"
    if interval["high"] is None:
        return text
    return f"{text} ± {interval['high'] - interval['mean']:.{digits}f}"


def print_outcome(outcome: Outcome, config: EvaluateConfig) -> None:
    """Print the table, the warnings and where to look."""
    summary = outcome.summary
    for line in result_lines(summary["results"]):
        click.echo(line)
    click.echo("Means over images with 95 % confidence intervals; identity is the noisy input.")
    for warning in summary["warnings"]:
        click.echo(f"Warning: {warning}")
    for row in outcome.failures[:SHOWN_FAILURES]:
        click.echo(f"  failed {row['image']!r} ({row['error_type']}): {row['error_message']}")
    if len(outcome.failures) > SHOWN_FAILURES:
        click.echo(f"  and {len(outcome.failures) - SHOWN_FAILURES} more on the page.")
    root = config.output.rstrip("/")
    click.echo(
        f"Page: {root}/evaluation.html   Pictures: {root}/pictures   "
        f"Rows: {root}/reports/evaluation   Summary: {root}/summary.json"
    )
    if outcome.error_rate > config.max_error_rate:
        click.echo(
            f"Over the error budget: {outcome.error_rate:.1%} of the images could not be used, "
            f"--max-error-rate allows {config.max_error_rate:.1%}."
        )


main: click.Command = settings_command(
    EvaluateConfig,
    run,
    name="jobs.evaluate",
    help=str(__doc__).replace("\n\n    ", "\n\n\b\n    "),
    interrupted="Nothing was published; start it again.",
)

if __name__ == "__main__":
    main()
