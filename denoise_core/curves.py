"""Pictures of a training: its curves, and samples noisy, denoised and perhaps clean. PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from denoise_core.metrics import error_sums

Array = np.ndarray


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _figure(width: float, height: float) -> Any:
    # Without pyplot there is no global state, and nothing looks for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw_curves(rows: Sequence[dict[str, float]], *, title: str) -> bytes:
    """Draw loss, validation PSNR and rate over the steps, from rows of the history."""
    figure = _figure(8, 7)
    panels = figure.subplots(3, 1, sharex=True)
    for panel, names, label in zip(
        panels,
        (("loss", "val_loss"), ("psnr",), ("rate",)),
        ("loss", "validation PSNR in dB", "learning rate"),
        strict=True,
    ):
        for name in names:
            points = [(r["step"], r[name]) for r in rows if math.isfinite(r.get(name, math.nan))]
            if points:
                steps, values = zip(*points, strict=True)
                panel.plot(steps, values, marker=".", label=_NAMES.get(name, name))
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[0].legend()
    panels[-1].set_xlabel("optimizer step")
    panels[0].set_title(title)
    return _png(figure)


_NAMES = {"loss": "training", "val_loss": "held out"}


def draw_samples(samples: Sequence[tuple[Array, Array | None, Array]], *, title: str) -> bytes:
    """Draw rows of (noisy, clean, output), float (h, w, C) in [0, 1], with PSNR and SSIM.

    Where nothing clean is known, rows have two pictures and no figures.
    """
    columns = 2 if samples[0][1] is None else 3
    figure = _figure(2.5 * columns, 2.7 * len(samples) + 0.4)
    figure.suptitle(title)
    panels = figure.subplots(len(samples), columns, squeeze=False)
    for row, (noisy, clean, output) in zip(panels, samples, strict=True):
        _show(row[0], "noisy", noisy, clean=clean)
        _show(row[1], "denoised", output, clean=clean)
        if clean is not None:
            _show(row[2], "clean", clean, clean=None)
    return _png(figure)


def _show(panel: Any, name: str, values: Array, *, clean: Array | None) -> None:
    shown = np.clip(values, 0, 1)
    grey = shown.shape[2] == 1
    panel.imshow(shown[..., 0] if grey else shown, cmap="gray" if grey else None, vmin=0, vmax=1)
    panel.set_xticks([])
    panel.set_yticks([])
    if clean is not None:
        sums = error_sums(np.clip(values, 0, 1), clean, data_range=1.0)
        ssim = "" if sums.ssim is None else f", SSIM {sums.ssim:.3f}"
        name = f"{name}: {sums.psnr:.2f} dB{ssim}"
    panel.set_xlabel(name, fontsize=9)
