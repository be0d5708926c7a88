"""Histograms: bins, ticks and bars in SVG units. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from denoise_core.report.rows import Floats, Survey
from denoise_core.report.summary import measures
from denoise_core.report.text import number

WIDTH, HEIGHT = 360, 148
TOP, BOTTOM = 6, 124
"""The bars stand between these two lines; tick labels below."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bin: the top of each series' bar, and the words for a pointer over it."""

    x: float
    width: float
    tops: tuple[float, ...]
    title: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Geometry of one histogram in SVG units; the template draws it."""

    title: str
    headline: str
    unit: str
    label: str
    series: tuple[str, ...]
    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    medians: tuple[float, ...]
    zero: float | None
    tallest: int
    beyond: int


def _nice_step(rough: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not under `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))


def _bin_edges(values: Floats) -> Floats:
    """Edges on round numbers over all values, or over 99 % of them where there are many."""
    tail = 0.005 if values.size > 200 else 0.0
    lo, hi = np.quantile(values, [tail, 1 - tail])
    bins = int(np.clip(3 * values.size ** (1 / 3), 10, 40))
    step = _nice_step(max((hi - lo) / bins, abs(lo) * 1e-3, 1e-6))
    first = math.floor(lo / step + 1e-9)
    last = max(math.ceil(hi / step - 1e-9), first + 1)
    return np.arange(first, last + 1) * step


def _chart(
    title: str,
    values: Mapping[str, Floats],
    *,
    headline: str,
    unit: str,
    start_at_zero: bool = False,
) -> Chart | None:
    """A histogram of one or two series on shared bins; None where there is nothing to draw."""
    pooled = np.concatenate(list(values.values()))
    if not pooled.size:
        return None
    edges = _bin_edges(pooled)
    if start_at_zero and 0 < edges[0] <= 0.5 * edges[-1]:
        step = edges[1] - edges[0]
        edges = np.arange(0, round(edges[-1] / step) + 1) * step
    counts = [np.histogram(np.clip(v, edges[0], edges[-1]), edges)[0] for v in values.values()]
    top = max(1, max(int(c.max()) for c in counts))
    x = np.interp(edges, (edges[0], edges[-1]), (0, WIDTH))
    y = [BOTTOM - c / top * (BOTTOM - TOP) for c in counts]
    digits = _decimals(float(edges[1] - edges[0]))
    bars = tuple(
        Bar(
            x=round(float(x[i]), 2),
            width=round(float(x[i + 1] - x[i]), 2),
            tops=tuple(round(float(heights[i]), 2) for heights in y),
            title=f"{edges[i]:.{digits}f} to {edges[i + 1]:.{digits}f}: "
            + ", ".join(f"{c[i]:,} {name}".strip() for name, c in zip(values, counts, strict=True)),
        )
        for i in range(len(edges) - 1)
    )
    medians = [float(np.median(v)) for v in values.values() if v.size]
    return Chart(
        title=title,
        headline=headline,
        unit=unit,
        label=f"Histogram: {title}, {headline} {unit}",
        series=tuple(values),
        bars=bars,
        ticks=_ticks(edges),
        medians=tuple(_place(m, edges) for m in medians),
        zero=_place(0.0, edges) if edges[0] < 0 < edges[-1] else None,
        tallest=top,
        beyond=int(np.sum((pooled < edges[0]) | (pooled > edges[-1]))),
    )


def _place(value: float, edges: Floats) -> float:
    return round(float(np.interp(value, (edges[0], edges[-1]), (0, WIDTH))), 2)


def _decimals(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9))


def _ticks(edges: Floats) -> tuple[tuple[float, str], ...]:
    """At most seven labels on round numbers within the axis."""
    step = _nice_step(float(edges[-1] - edges[0]) / 6)
    digits = _decimals(step)
    first = math.ceil(edges[0] / step - 1e-9)
    last = math.floor(edges[-1] / step + 1e-9)
    marks = [k * step for k in range(first, last + 1)]
    return tuple((_place(mark, edges), f"{mark:.{digits}f}".replace("-", "−")) for mark in marks)


def draw_charts(survey: Survey) -> list[Chart]:
    """The histograms that this run has values for, at most four."""
    m = measures(survey)
    found = [
        _chart(
            "Noise before and after",
            {"before": m["sigma_in"], "after": m["sigma_out"]},
            headline=f"{_median(m['sigma_in'], 1)} → {_median(m['sigma_out'], 1)}",
            unit="median sigma, 1/255 of the range",
            start_at_zero=True,
        ),
        _chart(
            "PSNR gain",
            {"images": m["psnr_gain"]},
            headline=f"{_median(m['psnr_gain'], 2, sign=True)} dB",
            unit="median",
        ),
        _chart(
            "SSIM gain",
            {"images": m["ssim_gain"]},
            headline=_median(m["ssim_gain"], 3, sign=True),
            unit="median",
        ),
        _chart(
            "Residual autocorrelation",
            {"images": m["residual_autocorrelation"]},
            headline=_median(m["residual_autocorrelation"], 3),
            unit="median; near 0 only noise was taken out",
        ),
        _chart(
            "Speed of one image",
            {"images": m["mpx_per_s"]},
            headline=f"{_median(m['mpx_per_s'], 2)} Mpx/s",
            unit="median; read, denoise and write",
            start_at_zero=True,
        ),
    ]
    charts = [chart for chart in found if chart]
    # With references the gain says more than the residual, and four cards fill two even rows.
    return [c for c in charts if c.title != "Residual autocorrelation" or len(charts) < 5]


def _median(values: Floats, digits: int, *, sign: bool = False) -> str:
    return number(float(np.median(values)), digits, sign=sign) if values.size else "–"
