"""Figures as PNG, by matplotlib without a display: grids, galleries, curves, histograms, PCA."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from denoise_core.evaluation.examples import Example
from denoise_core.evaluation.methods import IDENTITY
from denoise_core.evaluation.protocol import BINS

Array = npt.NDArray[Any]

DPI = 110
INK, SOFT, LINE = "#15191e", "#57616c", "#e0e4e8"
# Most are Okabe and Ito's, told apart also by those who see few; the first is the page's accent.
COLORS = (
    "#0d6a85", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5e4fa2", "#7a8a2e",
    "#a6761d", "#b3261e",
)  # fmt: skip
ERROR_MAP = "magma"
MOST_POINTS = 4000
LEGEND_LINES = 22  # of nine points beside a plot of the usual height
SMALL = 128  # pixels a side below which an image is shown pixel by pixel, in a smaller place
TALLEST = 2.0  # height by width of an image's place; a taller image is drawn narrower


@dataclass(frozen=True, slots=True)
class Drawn:
    """One picture: its file's name without ending, its words, its PNG.

    `photo`: made of pixels, so that a WebP may stand for it where bytes count. `section` is where
    the page shows it.
    """

    name: str
    section: str
    title: str
    caption: str
    png: bytes
    width: int
    height: int
    photo: bool = False


def _figure(width: float, height: float) -> Any:
    """Return an empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _pack(figure: Any) -> None:
    """Leave no more between pictures than their words need."""
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.0, hspace=0.0)


def _finish(
    figure: Any, *, name: str, section: str, title: str, caption: str, photo: bool = False
) -> Drawn:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    width, height = (int(side) for side in figure.canvas.get_width_height())
    return Drawn(name, section, title, caption, buffer.getvalue(), width, height, photo)


def file_name(*words: str) -> str:
    """Return words as a file's name: `gaussian:15` becomes `gaussian-15`."""
    return re.sub(r"[^\w.-]+", "-", "-".join(words)).strip("-.")[:120]


def _stem(model: str) -> str:
    """A label for a file's name: of a path its end, with folders, for many are called `best`."""
    return model[-60:].strip("/")


def _plain(text: str) -> str:
    """Text as it is: matplotlib would set what stands between dollars as mathematics."""
    return text.replace("$", r"\$")


def _short(name: str, most: int = 30, parts: int = 1) -> str:
    """A name's last parts, their middle left out where long; of `best`, every training's, two."""
    path = name.split("/")
    base = "/".join(path[-max(parts, 2 if path[-1] == "best" else 1) :])
    half = (most - 1) // 2
    return _plain(base if len(base) <= most else f"{base[:half]}…{base[-half:]}")


def _shorts(names: Iterable[str], most: int = 30) -> dict[str, str]:
    """Names by short ones that differ: by so many last parts, or, failing that, so much longer."""
    names = list(names)
    deepest = 1 + max((name.count("/") for name in names), default=0)
    for length in (most, 2 * most, 4 * most):
        for parts in range(1, deepest + 1):
            found = {name: _short(name, length, parts) for name in names}
            if len(set(found.values())) == len(found):
                return found
    return {name: _plain(name) for name in names}


def _fitting(name: str, width: float) -> str:
    """A name short enough to stand under a picture of so many inches, in nine points."""
    return _short(name, int(width * 12))


def _noise(text: str) -> str:
    """A noise in a legend: at most two lines, the middle left out where it is longer."""
    return "\n".join(textwrap.wrap(_short(text, 55), 28, break_on_hyphens=False))


def _db(value: float) -> str:
    return "∞ dB" if np.isinf(value) else f"{value:.2f} dB"


# --- Pixels -----------------------------------------------------------------------------------


def _show(axes: Any, pixels: Array, *, title: str = "", below: str = "") -> None:
    """Draw uint8 (h, w, 1 or 3) with words above and under it."""
    picture = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation=_interpolation(pixels))
    _bare(axes, title=title, below=below)


def _bare(axes: Any, *, title: str = "", below: str = "") -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if title:
        axes.set_title(title, fontsize=10, color=INK)
    if below:
        axes.set_xlabel(below, fontsize=9, color=SOFT, labelpad=3)


def _interpolation(pixels: Array) -> str:
    """Small images are shown pixel by pixel."""
    return "nearest" if max(pixels.shape[:2]) < SMALL else "antialiased"


def _side(examples: Sequence[Example]) -> float:
    """Width of one image in a figure, in inches."""
    return 1.8 if max(max(example.clean.shape[:2]) for example in examples) < SMALL else 2.4


def _ratio(examples: Sequence[Example]) -> float:
    """Height by width of the place of each: that of the tallest, but at most TALLEST."""
    tallest = max(example.clean.shape[0] / example.clean.shape[1] for example in examples)
    return min(tallest, TALLEST)


def _ssim(value: float | None) -> str:
    return "" if value is None else f", SSIM {value:.3f}"


def grid(
    rows: Sequence[tuple[str, Sequence[Example]]], *, noise: str, methods: Sequence[str]
) -> Drawn:
    """A row for each image: noisy, the output of each method, clean; figures under each."""
    columns = len(methods) + 2
    examples = [row[1][0] for row in rows]
    side = _side(examples)
    figure = _figure(side * columns, (side * _ratio(examples) + 0.26) * len(rows) + 0.24)
    _pack(figure)
    shorts = _shorts(methods)
    top = ["noisy", *(shorts[method] for method in methods), "clean"]
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (place, (name, row)) in zip(axes, enumerate(rows), strict=True):
        heads = top if place == 0 else [""] * columns
        _show(line[0], row[0].noisy, title=heads[0], below=_db(row[0].psnr_noisy))
        for axis, head, example in zip(line[1:-1], heads[1:-1], row, strict=True):
            _show(axis, example.denoised, title=head, below=_db(example.psnr) + _ssim(example.ssim))
        _show(line[-1], row[0].clean, title=heads[-1], below=_fitting(name, side))
    return _finish(
        figure,
        name=file_name("grid", noise),
        section="pictures",
        title=f"Noisy, denoised, clean at {noise}",
        caption="Images evenly spread over the set; large ones show their centre. Figures are of "
        "the whole image.",
        photo=True,
    )


def side_by_side(each: Mapping[str, Example], *, noise: str, image: str) -> Drawn:
    """One image through every method, the noisy one first and the clean one last."""
    order = sorted(each, key=lambda method: method != IDENTITY)
    count = len(order) + 1
    columns = min(4, count)
    lines = -(-count // columns)
    side = _side(list(each.values()))
    figure = _figure(side * columns, (side * _ratio(list(each.values())) + 0.5) * lines)
    _pack(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.axis("off")
    shorts = {**_shorts(order), IDENTITY: "noisy"}
    for axis, method in zip(axes, order, strict=False):
        example = each[method]
        _show(
            axis,
            example.denoised,
            title=shorts[method],
            below=_db(example.psnr) + _ssim(example.ssim),
        )
    _show(axes[len(order)], each[order[0]].clean, title="clean", below=_fitting(image, side))
    return _finish(
        figure,
        name=file_name("methods", noise),
        section="pictures",
        title=f"Every method at {noise}",
        caption="One image of the set; a large one shows its centre.",
        photo=True,
    )


def gallery(examples: Sequence[tuple[str, Example]], *, kind: str, model: str, noise: str) -> Drawn:
    """The worst or best images of a model, one a row: noisy, denoised, clean, error map."""
    known = [example for _, example in examples]
    side, ratio = _side(known), _ratio(known)
    figure = _figure(side * 4 + 0.75, (side * ratio + 0.26) * len(examples) + 0.24)
    _pack(figure)
    axes = figure.subplots(len(examples), 5, squeeze=False, width_ratios=[1, 1, 1, 1, 0.06])
    for axis in axes[1:, 4]:
        axis.axis("off")
    levels = np.concatenate([example.error.ravel() for example in known])
    top = max(8, int(np.quantile(levels, 0.999)))
    for line, (place, (name, example)) in zip(axes, enumerate(examples), strict=True):
        heads = ("noisy", "denoised", "clean", "error") if place == 0 else ("",) * 4
        figures = _db(example.psnr) + _ssim(example.ssim)
        _show(line[0], example.noisy, title=heads[0], below=_db(example.psnr_noisy))
        _show(line[1], example.denoised, title=heads[1], below=figures)
        _show(line[2], example.clean, title=heads[2], below=_fitting(name, side))
        drawn = _show_error(line[3], example, top=top, title=heads[3])
    _color_bar(figure, drawn, axes[0, 4])
    which = f"{len(examples)} {kind} images" if len(examples) > 1 else f"{kind} image"
    return _finish(
        figure,
        name=file_name(kind, _stem(model), noise),
        section="errors",
        title=f"The {which} of {model} at {noise}",
        caption="By PSNR, the "
        + ("lowest" if kind == "worst" else "highest")
        + " first; large images show the place of their largest error.",
        photo=True,
    )


def _show_error(axes: Any, example: Example, *, top: int, title: str) -> Any:
    """Draw |denoised - clean|; black is none, the brightest `top` levels and more."""
    drawn = axes.imshow(
        example.error,
        cmap=ERROR_MAP,
        vmin=0,
        vmax=top,
        interpolation=_interpolation(example.error),
    )
    y, x = example.at
    whole = example.size == example.error.shape
    _bare(axes, title=title, below="" if whole else f"crop at {x}, {y}")
    return drawn


def _color_bar(figure: Any, drawn: Any, axes: Any) -> None:
    bar = figure.colorbar(drawn, cax=axes)
    bar.set_label("|denoised − clean|, of 255", fontsize=8, color=SOFT)
    bar.ax.tick_params(labelsize=8, colors=SOFT)
    bar.outline.set_visible(False)


# --- Plots ------------------------------------------------------------------------------------


def _style(axes: Any, *, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=11, color=SOFT)
    axes.set_ylabel(y, fontsize=11, color=SOFT)
    axes.tick_params(labelsize=10, colors=SOFT)
    axes.grid(True, color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(SOFT)


def _look(method: str, place: int, models: Sequence[str]) -> dict[str, Any]:
    """Models are thick lines, filters thin and dashed, the noisy input grey dots."""
    color = COLORS[(place - 1) % len(COLORS)]  # the noisy input is the first
    if method == IDENTITY:
        return {"color": SOFT, "linestyle": ":", "linewidth": 1.8, "zorder": 5}
    if method in models:
        return {"color": color, "linestyle": "-", "linewidth": 2.4}
    return {"color": color, "linestyle": "--", "linewidth": 1.4}


def _legends(methods: Iterable[str]) -> dict[str, str]:
    return {**_shorts(methods, 24), IDENTITY: "noisy input"}


def curves(
    entries: Sequence[dict[str, Any]],
    *,
    levels: Sequence[tuple[float, str]],
    models: Sequence[str],
) -> Drawn:
    """Mean PSNR against sigma, a line for each method, with the confidence interval as a band."""
    figure = _figure(6.2, 4.8)
    axes = figure.subplots()
    _style(axes, x="sigma of the Gaussian noise, of 255", y="PSNR, dB")
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    legends = _legends(methods)
    found = {(entry["method"], entry["noise"]): entry["psnr"] for entry in entries}
    for place, method in enumerate(methods):
        points = [(s, found[method, noise]) for s, noise in levels]
        points = [(s, value) for s, value in points if value["mean"] is not None]
        look = _look(method, place, models)
        x = [s for s, _ in points]
        axes.plot(
            x, [v["mean"] for _, v in points], label=legends[method], marker="o", ms=4, **look
        )
        if method in models and all(value["low"] is not None for _, value in points):
            low, high = ([value[end] for _, value in points] for end in ("low", "high"))
            axes.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
    axes.set_xticks([s for s, _ in levels], [f"{s:g}" for s, _ in levels])
    figure.legend(fontsize=9, frameon=False, loc="outside lower center", ncols=3)
    return _finish(
        figure,
        name="psnr-against-sigma",
        section="curves",
        title="PSNR against sigma",
        caption="Means over images; bands are 95 % confidence intervals of the models. Slow "
        "filters saw fewer images (see the table).",
    )


def residuals(counts: Mapping[str, Array], *, noise: str, models: Sequence[str]) -> Drawn:
    """Histograms of the result minus the clean image, on a logarithmic scale."""
    figure = _figure(6.2, 5.2)
    axes = figure.subplots()
    _style(axes, x="result − clean, levels of 255", y="share of values")
    levels = np.arange(BINS) - BINS // 2
    legends, widest = _legends(counts), 1
    for place, (method, histogram) in enumerate(counts.items()):
        share = histogram / max(1, int(histogram.sum()))
        summed = np.cumsum(share)
        middle = levels[(summed > 0.001) & (summed < 0.999)]
        widest = max(widest, int(np.abs(middle).max())) if middle.size else widest
        mean = float((levels * share).sum())
        deviation = float(np.sqrt((levels**2 * share).sum()))
        axes.plot(
            levels,
            np.where(share > 0, share, np.nan),
            label=f"{legends[method]}: mean {mean:+.2f}, RMS {deviation:.1f}",
            **_look(method, place, models),
        )
    axes.set_yscale("log")
    axes.set_xlim(-widest, widest)
    axes.set_ylim(1e-6, 1.5)
    longest = max(len(legends[method]) for method in counts)
    figure.legend(
        fontsize=9, frameon=False, loc="outside lower center", ncols=2 if longest < 14 else 1
    )
    return _finish(
        figure,
        name=file_name("residuals", noise),
        section="residuals",
        title=f"Residuals at {noise}",
        caption="Over all values of all images that a method saw. A mean off zero is a shift of "
        "brightness, a heavy tail are edges or texture lost.",
    )


def latent(
    points: Array,
    shares: Array,
    *,
    noises: Sequence[str],
    labels: Sequence[int | None],
    model: str,
    dimensions: int,
) -> Drawn:
    """The first two principal components of codes, coloured by noise and, where known, by label."""
    by_noise = [
        (_noise(noise), np.array([n == noise for n in noises])) for noise in dict.fromkeys(noises)
    ]
    known = sorted({label for label in labels if label is not None})
    by_label = [(str(label), np.array([one == label for one in labels])) for label in known]
    panels = [("label", by_label)] if known else []
    panels += [("noise", by_noise)] if len(by_noise) > 1 or not known else []
    lines = sum(1 + name.count("\n") for name, _ in by_noise)
    columns = 1 + len(by_label) // LEGEND_LINES  # of a legend of labels, which are short
    width = 5.6 * len(panels) + 0.6 * columns
    figure = _figure(width, 4.8 * max(1.0, lines / LEGEND_LINES))
    for axes, (title, groups) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        _style(axes, x=f"component 1 ({shares[0]:.0%})", y=f"component 2 ({shares[1]:.0%})")
        axes.set_title(f"by {title}", fontsize=11, color=INK, loc="left")
        for place, (name, inside) in enumerate(groups):
            axes.scatter(
                *points[inside][:MOST_POINTS].T,
                s=max(4.0, min(28.0, 6000 / len(points))),
                color=COLORS[place % len(COLORS)],
                alpha=0.75,
                linewidths=0,
                label=name,
            )
        axes.legend(
            fontsize=9,
            frameon=False,
            markerscale=2,
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
            ncols=columns if title == "label" else 1,
        )
    return _finish(
        figure,
        name=file_name("latent", _stem(model)),
        section="latent",
        title=f"Latent space of {model}",
        caption=f"PCA of the codes ({dimensions} values) of {len(points)} noisy images; feature "
        "maps averaged over the centre of the image. The share of the variance is at each axis.",
    )
