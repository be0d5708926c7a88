"""The page: summary, figures and pictures -> one HTML string without any outside request.

Style and script are those of `report/`, with a few rules of its own in `page.css`; escaping and
Content-Security-Policy are as there.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from denoise_core.evaluation.methods import IDENTITY
from denoise_core.evaluation.pictures import Drawn
from denoise_core.evaluation.statistics import Figures
from denoise_core.report.page import asset, content_hash, template_environment

SHOWN_ROWS = 1000
SHOWN_FAILURES = 100
WEBP_FROM = 100_000
"""Bytes of a picture's PNG above which the page shows a WebP; the PNG is in OUT/pictures."""
WEBP_SIDE = 16383  # pixels a side that the format can hold
WEBP_QUALITY = 75  # half the bytes of a JPEG that looks the same: most of them are noise

SECTIONS = (
    ("curves", "Curves"),
    ("pictures", "Pictures"),
    ("errors", "Best and worst images"),
    ("residuals", "Residuals"),
    ("latent", "Latent space"),
)


def render(
    summary: dict[str, Any],
    drawn: Sequence[Drawn],
    *,
    data: Figures,
    failures: Sequence[dict[str, Any]],
) -> str:
    """The whole page."""
    environment = template_environment(_own_asset)
    environment.filters["span"] = half_width
    style = asset("page.css") + _own_asset("page.css")
    script = asset("page.js")
    sections = [
        (key, title, [(picture, data_uri(picture)) for picture in drawn if picture.section == key])
        for key, title in SECTIONS
    ]
    return environment.get_template("page.html").render(
        style=style,
        script=script,
        style_hash=content_hash(style),
        script_hash=content_hash(script),
        summary=summary,
        title=", ".join(model["label"] for model in summary["models"]),
        tables=[
            (noise, [entry for entry in summary["results"] if entry["noise"] == noise])
            for noise in summary["noises"]
        ],
        sections=[section for section in sections if section[2]],
        methods=data.methods,
        rows=_rows(data),
        total_rows=len(data.images) * len(data.noises),
        failures=[{"method": None, **row} for row in failures[:SHOWN_FAILURES]],
        failed=len(failures),
        settings=[(key, _setting(value)) for key, value in summary["settings"].items()],
        identity=IDENTITY,
    )


def _own_asset(name: str) -> str:
    return (files("denoise_core.evaluation") / name).read_text("utf-8")


def half_width(interval: dict[str, Any], digits: int) -> str:
    """Half of a confidence interval, with its sign; an empty text where there is none."""
    if interval["high"] is None:
        return ""
    return f"± {interval['high'] - interval['mean']:.{digits}f}"


def data_uri(picture: Drawn) -> str:
    """A picture for the page: its PNG, or a WebP where that is large and made of pixels."""
    small = len(picture.png) < WEBP_FROM
    if small or not picture.photo or max(picture.width, picture.height) > WEBP_SIDE:
        return f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(picture.png)) as image:
        image.convert("RGB").save(buffer, "WEBP", quality=WEBP_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _rows(data: Figures) -> list[dict[str, Any]]:
    """PSNR of every method, a row for each image and noise, the first SHOWN_ROWS by name."""
    rows = []
    for place, image in enumerate(data.images):
        for number, noise in enumerate(data.noises):
            values = [float(value) for value in data.psnr[:, number, place]]
            known = [None if math.isnan(value) else value for value in values]
            rows.append({"image": image, "noise": noise, "psnr": known})
            if len(rows) == SHOWN_ROWS:
                return rows
    return rows


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else str(value)
