"""Train a denoiser: `python -m jobs.train DATA... --output RUN --preset NAME`.

Exit codes: 0 done, 1 the run failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import click

from denoise_core.config import TrainConfig
from denoise_core.storage import StorageOptions, join, storage_for
from denoise_core.training import prepare
from jobs._cli import settings_command
from jobs._progress import TrainingBar, is_live
from jobs._ray import keep_freed_memory, silent_stderr, start_ray


def run(config: TrainConfig) -> int:
    """Train by `config`, show progress, print where the best model is. Returns the exit code."""
    plan = prepare(config)
    keep_freed_memory()
    start_ray()
    # TensorFlow, which Ray Train imports here, greets on stderr whatever its log level.
    with silent_stderr():
        from denoise_core.pipelines.train import run_training

    display = Display(config)
    with display.open():
        best = run_training(plan, show=display.show)
    display.finish(best)
    return 0


class Display:
    """What a person sees: a live bar on a terminal, lines elsewhere, JSON lines for programs."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.json = config, config.progress == "json"
        self.bar = TrainingBar() if is_live(config.progress) else None
        self.exported: dict[str, Any] = {}
        self.validated: dict[str, Any] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keep the bar, if there is one, on the terminal."""
        if self.bar is None:
            yield
            return
        with self.bar.progress:
            yield

    def show(self, row: dict[str, Any]) -> None:
        """Show a report; those between validations only move the bar."""
        if "export" in row:
            self.exported = row
            return
        if "note" in row:
            self.note(row["note"])
            return
        if "val_loss" in row:
            self.validated = {name: row[name] for name in ("val_loss", "psnr")}
        if self.bar is not None:
            self.bar.update(row["fraction"], line({**row, **self.validated}, step=False))
        if row.get("tick") and not self.json:
            return
        if self.json:
            known = {k: v for k, v in row.items() if math.isfinite(v)}
            click.echo(json.dumps({"progress": known}))
        elif self.bar is not None:
            self.bar.progress.console.print(line(row), markup=False, highlight=False)
        else:
            click.echo(line(row))

    def note(self, text: str) -> None:
        """Show a sentence, above the bar where there is one."""
        if self.bar is not None:
            self.bar.progress.console.print(text, markup=False, highlight=False)
        else:
            click.echo(json.dumps({"note": text}) if self.json else text)

    def finish(self, best: str) -> None:
        """Print the figures and the path of the best model, `best`."""
        row = self.figures_of(best)
        if self.json:
            known = {k: row.get(k) for k in ("step", "val_loss", "psnr")}
            click.echo(json.dumps({"done": {**known, "model": best, **self.exported}}))
            return
        if self.exported:
            click.echo(
                f"Exported to {self.exported['export']}; run beside the model it differs by at "
                f"most {self.exported['difference']:.1e}."
            )
        figures = f", {figure_text(row)} at step {row['step']}" if row else ""
        model = shlex.quote(best)
        click.echo(
            f"Done{figures}. Use it with: python -m jobs.denoise INPUT --output OUT --model {model}"
        )

    def figures_of(self, best: str) -> dict[str, Any]:
        """Return step, loss and PSNR by the card of a model, which a run before may have made."""
        storage = storage_for(best, StorageOptions(s3_endpoint=self.config.s3_endpoint))
        path = join(best, "model.json")
        if storage.stat(path) is None:
            return {}
        card = json.loads(storage.read(path))
        figures = card["figures"]
        row = {"val_loss": figures["validation_loss"], "psnr": figures["validation_psnr"]}
        known = {name: value for name, value in row.items() if value is not None}
        return {"step": card["training"]["steps"], **known}


def figure_text(row: dict[str, Any]) -> str:
    """Return validation PSNR, or the validation loss where nothing clean is known."""
    if math.isfinite(row.get("psnr", math.nan)):
        return f"validation PSNR {row['psnr']:.2f} dB"
    return f"validation loss {row['val_loss']:.5f}" if "val_loss" in row else ""


def line(row: dict[str, Any], *, step: bool = True) -> str:
    """Return one report as a line: share done, step, loss, PSNR, speed, time left.

    Images are the crops that the network sees. Without the step it fits into 80 columns.
    """
    done = max(row["fraction"], 1e-9)
    left = timedelta(seconds=round(row["seconds"] * (1.0 - done) / done))
    words = [f"{row['fraction']:6.1%}", f"step {row['step']}" * step, f"loss {row['loss']:.5f}"]
    words += [figure_text(row), f"{row['images_per_s']:.1f} images/s", f"{left} left"]
    return "  ".join(word for word in words if word)


main = settings_command(
    TrainConfig,
    run,
    name="jobs.train",
    help=str(__doc__),
    interrupted="The last checkpoint is safe; go on with --resume.",
)

if __name__ == "__main__":
    main()
