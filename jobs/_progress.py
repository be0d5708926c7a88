"""What a person sees while a job runs: a live bar, plain lines or JSON lines; and the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import click

from denoise_core.config import DenoiseConfig
from denoise_core.pipelines.denoise import Outcome, Totals, Watcher
from denoise_core.storage import printable

PLAIN_EVERY_S = 10.0


def rate(totals: Totals) -> float:
    """Megapixels a second after the first image, start-up apart; 0 before it is known."""
    written = totals.ok + totals.copied
    if written < 2 or totals.first_image_s is None:
        return 0.0
    later = totals.megapixels * (written - 1) / written
    return later / max(1e-3, totals.seconds - totals.first_image_s)


def seconds_left(totals: Totals) -> float | None:
    """Time left by the rate of images so far, without those that fail; None before it is known."""
    written = totals.ok + totals.copied
    if written < 2 or totals.first_image_s is None:
        return None
    spent = totals.seconds - totals.first_image_s
    return (totals.to_do - totals.done) * spent / (written - 1)


def line(totals: Totals) -> str:
    """One line of progress."""
    left = seconds_left(totals)
    return (
        f"{totals.done}/{totals.to_do} images  {rate(totals):.2f} Mpx/s  {totals.failed} failed"
        + (f"  {left:.0f} s left" if left is not None else "")
    )


class Plain(Watcher):
    """A line every ten seconds, for logs."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def note(self, text: str) -> None:
        """Print a line."""
        click.echo(text)

    def update(self, totals: Totals) -> None:
        """Print the state now and then."""
        if time.monotonic() - self.last >= PLAIN_EVERY_S:
            self.last = time.monotonic()
            click.echo(line(totals))


class Json(Watcher):
    """A JSON object a line, for programs."""

    def note(self, text: str) -> None:
        """Print a note object."""
        click.echo(json.dumps({"note": text}))

    def update(self, totals: Totals) -> None:
        """Print the totals."""
        content = {
            **asdict(totals),
            "mpx_per_s": round(rate(totals), 3),
            "seconds_left": seconds_left(totals),
        }
        click.echo(json.dumps({"progress": content}))


class Bar(Watcher):
    """A live bar on a terminal."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[line]}"),
            transient=True,
        )
        self.task = self.progress.add_task("Starting workers", total=None, line="")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self.progress.console.print(text, markup=False, highlight=False)

    def update(self, totals: Totals) -> None:
        """Move the bar."""
        if totals.done:
            self.progress.update(
                self.task,
                description="Denoising",
                total=totals.to_do,
                completed=totals.done,
                line=line(totals),
            )


class TrainingBar:
    """A live bar of a training on a terminal."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.fields[line]}"))
        self.progress = Progress(*columns, transient=True)
        self.task = self.progress.add_task("", total=None, line="Starting workers")

    def update(self, fraction: float, text: str) -> None:
        """Move the bar to that share of the schedule."""
        self.progress.update(self.task, total=1.0, completed=fraction, line=text)


def is_live(kind: str) -> bool:
    """Whether a live bar is wanted and can be seen."""
    return kind == "auto" and sys.stdout.isatty()


@contextmanager
def display(kind: str) -> Iterator[Watcher]:
    """Yield the watcher for 'plain', 'json', or 'auto': a bar where stdout is a terminal."""
    if kind == "json":
        yield Json()
    elif not is_live(kind):
        yield Plain()
    else:
        bar = Bar()
        with bar.progress:
            yield bar


def print_outcome(outcome: Outcome, config: DenoiseConfig) -> None:
    """Print a short table and where to look."""
    totals = outcome.totals
    already = totals.skipped - totals.earlier_failures
    if config.progress == "json":
        final = {**asdict(totals), "run_id": outcome.run_id, "ok_budget": outcome.within_budget}
        final |= {"listed": outcome.listed} if outcome.dry_run else {}
        click.echo(json.dumps({"done": final}))
        return
    if outcome.dry_run:
        for uri in outcome.listed:
            click.echo(uri)
        click.echo(
            f"Dry run: {totals.to_do} to do, {already} already done, "
            f"{totals.failed} refused. Nothing was written."
        )
        return
    click.echo(
        f"{totals.ok} denoised, {totals.copied} copied, {totals.failed} failed, "
        f"{already} already done."
    )
    if totals.done:
        first = f"{totals.first_image_s:.1f} s" if totals.first_image_s is not None else "-"
        click.echo(
            f"{totals.megapixels:.1f} Mpx in {totals.seconds:.1f} s; first image after {first}, "
            f"then {rate(totals):.2f} Mpx/s."
        )
    for facts in outcome.worst_failures:
        click.echo(
            f"  failed {facts['path']!r} ({facts['error_stage']}, {facts['error_type']}): "
            f"{printable(facts['error_message'])}"
        )
    rest = totals.failed - len(outcome.worst_failures)
    if rest > 0:
        click.echo(f"  and {rest} more in the report.")
    if outcome.unreferenced:
        click.echo(
            f"{outcome.unreferenced} without a usable image of the same path and shape under "
            f"{config.reference}: no PSNR for them. The first: "
            f"{printable(outcome.reference_problem)}"
        )
    if outcome.dim:
        low, high = outcome.dim_ends
        bits = max(-low, high).bit_length()
        click.echo(
            f"{outcome.dim} of the copied use little of their range. If they look noisy, state it: "
            f"--data-range={-(1 << bits) if low < 0 else 0}:{(1 << bits) - 1}"
        )
    if totals.left_out:
        click.echo(
            f"{totals.left_out} new, changed or missing were left out by --retry-failed, so there "
            "is no _SUCCESS; the same command without it does them."
        )
    if totals.earlier_failures:
        click.echo(
            f"{totals.earlier_failures} failed in earlier runs; --retry-failed does them again."
        )
    root = config.output.rstrip("/")
    click.echo(f"Images: {root}/images   Rows: {root}/reports/images   Page: {root}/report.html")
    if not outcome.within_budget:
        click.echo(
            f"Over the error budget: {totals.error_rate():.1%} failed, "
            f"--max-error-rate allows {config.max_error_rate:.1%}."
        )
