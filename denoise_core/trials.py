"""The trials of a search: one row each, as a table, a plot and the best settings.

`trials.csv` has a row for each trial, `tune.png` a curve for each, `best.toml` the settings of the
best one that ran to its end.
"""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from denoise_core.space import Settings

COLUMNS = (
    "rank",
    "trial",
    "status",
    "psnr",
    "done",
    "steps",
    "seconds",
    "parameters",
    "mflop_per_pixel",
)
# Up to so many different numbers are choices, more a range.
FEW = 5
# Any trial, the preset as it is, the best.
GREY, BLUE, ORANGE = "#b8b8b8", "#1f5fbf", "#d9730d"


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial. `settings` are empty for the preset as it is.

    `status` is 'waiting', 'running', 'done', 'stopped' (fell behind) or 'failed', then `note` says
    why. `curve` has (share of the schedule, validation PSNR in dB); `seconds` are those of training
    without start and validation. `mflop_per_pixel` is the forward cost.
    """

    number: int
    settings: Settings
    status: str = "waiting"
    curve: tuple[tuple[float, float], ...] = ()
    steps: int = 0
    seconds: float = 0.0
    parameters: int = 0
    mflop_per_pixel: float = 0.0
    note: str = ""

    @property
    def psnr(self) -> float:
        """The last validation PSNR in dB, NaN before the first."""
        return self.curve[-1][1] if self.curve else math.nan

    @property
    def fraction(self) -> float:
        """The share of the schedule that is done, 0 to 1."""
        return self.curve[-1][0] if self.curve else 0.0


def trial_from(row: dict[str, Any]) -> Trial:
    """Return the trial that `dataclasses.asdict` and JSON made `row` of."""
    return Trial(**{**row, "curve": tuple((share, psnr) for share, psnr in row["curve"])})


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials, the best first: those that ran to their end before those that did not."""
    order = ("done", "running", "stopped", "waiting", "failed")
    return sorted(
        trials,
        key=lambda t: (
            order.index(t.status),
            -t.fraction if t.status == "stopped" else 0.0,
            -t.psnr if t.curve else math.inf,
            t.number,
        ),
    )


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Return the best trial that ran to its end, None where there is none."""
    done = [trial for trial in trials if trial.status == "done"]
    return ranked(done)[0] if done else None


def baseline_of(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial of the preset as it is where it ran to its end, else None."""
    return next((t for t in trials if not t.settings and t.status == "done"), None)


def keys_of(trials: Sequence[Trial]) -> list[str]:
    """Return the searched keys in the order of the space."""
    return list(dict.fromkeys(key for trial in trials for key in trial.settings))


def text_of(value: Any) -> str:
    """Return a setting as a person would write it; nothing for the preset's own."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def csv_bytes(trials: Sequence[Trial]) -> bytes:
    """Return `trials.csv`: COLUMNS, the searched keys, the note."""
    keys = keys_of(trials)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*COLUMNS, *keys, "note"])
    for rank, trial in enumerate(ranked(trials), 1):
        psnr = "" if math.isnan(trial.psnr) else f"{trial.psnr:.3f}"
        figures = [psnr, f"{trial.fraction:.3f}", trial.steps, f"{trial.seconds:.1f}"]
        size = [trial.parameters, f"{trial.mflop_per_pixel:.4f}"]
        settings = [text_of(trial.settings.get(key)) for key in keys]
        writer.writerow([rank, trial.number, trial.status, *figures, *size, *settings, trial.note])
    return buffer.getvalue().encode()


def plot_bytes(trials: Sequence[Trial], *, title: str) -> bytes:
    """Return `tune.png`: every trial's curve, and PSNR over each searched number or choice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = keys_of(trials)
    columns = min(3, max(1, len(keys)))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(3.6 * max(2, columns), 3.6 + 2.8 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[1.3, *[1.0] * rows])
    _draw_curves(figure.add_subplot(grid[0, :]), trials)
    for place, key in enumerate(keys):
        _draw_key(figure.add_subplot(grid[1 + place // columns, place % columns]), key, trials)
    # Twelve points: ten letters take an inch.
    figure.suptitle(textwrap.fill(title, int(10 * figure.get_figwidth())))
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _colour(trial: Trial, trials: Sequence[Trial]) -> str:
    if trial is best_of(trials):
        return ORANGE
    return GREY if trial.settings else BLUE


def _draw_curves(axes: Any, trials: Sequence[Trial]) -> None:
    best = best_of(trials)
    for trial in trials:
        if not trial.curve or trial.status == "failed":
            continue
        special = trial is best or not trial.settings
        label = f"best: trial {trial.number}" if trial is best else "the preset as it is"
        axes.plot(
            [100 * share for share, _ in trial.curve],
            [psnr for _, psnr in trial.curve],
            color=_colour(trial, trials),
            linewidth=2.2 if special else 1.0,
            marker="x" if trial.status == "stopped" else "",
            markevery=[-1],
            zorder=3 if special else 2,
            label=label if special else None,
        )
    axes.set_xlabel("share of the schedule in %; a cross: ended early")
    axes.set_ylabel("validation PSNR in dB")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower right")


def _draw_key(axes: Any, key: str, trials: Sequence[Trial]) -> None:
    """Draw the last PSNR of the trials over one setting; open circles ended early."""
    shown = [t for t in trials if t.curve and t.status != "failed" and key in t.settings]
    values = [trial.settings[key] for trial in shown]
    words = _words(values)
    for trial, value in zip(shown, values, strict=True):
        colour = _colour(trial, trials)
        axes.plot(
            words.index(text_of(value)) if words else value,
            trial.psnr,
            "o",
            color=colour,
            markerfacecolor=colour if trial.status == "done" else "white",
        )
    if words:
        axes.set_xticks(range(len(words)), [_short(word) for word in words], fontsize=7)
        axes.set_xlim(-0.5, len(words) - 0.5)
    elif values and min(values) > 0 and max(values) / min(values) >= 8:
        _scale_by_logarithm(axes)
    axes.set_xlabel(key)
    axes.set_ylabel("dB")
    axes.grid(alpha=0.3)


def _words(values: Sequence[Any]) -> list[str]:
    """Return the choices in order where values are choices, nothing where they are a range."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    different = sorted(set(values)) if numbers else values
    words = list(dict.fromkeys(text_of(value) for value in different))
    return words if not numbers or len(words) <= FEW else []


def _scale_by_logarithm(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)


def _short(word: str) -> str:
    return word if len(word) <= 18 else word[:17] + "…"
