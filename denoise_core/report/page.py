"""The page: survey, summary and run.json -> one HTML string without any outside request.

`page.html` is a Jinja2 template with automatic escaping; `page.css` and `page.js` go into it and
are the only style and script that its Content-Security-Policy allows, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from typing import Any

from denoise_core.metrics import SSIM_RADIUS, SSIM_SIGMA
from denoise_core.report.charts import BOTTOM, HEIGHT, TOP, WIDTH, draw_charts
from denoise_core.report.examples import Example, rank, read_example
from denoise_core.report.rows import Survey, Table
from denoise_core.report.text import duration, moment, number, visible
from denoise_core.storage import StorageOptions

SHOWN_FAILURES = 500
_SECRET = re.compile(r"secret|passw|token|credential|access_?key|api_?key", re.IGNORECASE)


def render(
    table: Table,
    survey: Survey,
    *,
    summary: dict[str, Any],
    run: Mapping[str, Any],
    options: StorageOptions | None,
    examples: int,
) -> str:
    """The whole page. Reads the shown rows and the images of the examples from storage."""
    environment = template_environment(asset)
    style, script = asset("page.css"), asset("page.js")
    return environment.get_template("page.html").render(
        style=style,
        script=script,
        style_hash=content_hash(style),
        script_hash=content_hash(script),
        summary=summary,
        prefix=survey.prefix,
        title=summary["out"].rstrip("/").rsplit("/", 1)[-1] or summary["out"],
        charts=draw_charts(survey),
        ssim_window=2 * SSIM_RADIUS + 1,
        ssim_sigma=SSIM_SIGMA,
        plot={"width": WIDTH, "height": HEIGHT, "top": TOP, "bottom": BOTTOM},
        settings=_settings(run),
        galleries=_galleries(table, survey, summary["out"], options=options, count=examples),
        **_tables(table, survey),
    )


def _galleries(
    table: Table, survey: Survey, out: str, *, options: StorageOptions | None, count: int
) -> list[tuple[str, str, list[Example]]]:
    return [
        (label, by, [read_example(row, options, out=out) for row in table.take(numbers)])
        for label, by, numbers in rank(survey, count)
    ]


def _tables(table: Table, survey: Survey) -> dict[str, Any]:
    failures = table.take(survey.failed[:SHOWN_FAILURES])
    shown = table.take(survey.first_by_name)
    return {
        "failures": [{**row, "reason": _reason(row, survey.prefix)} for row in failures],
        "rows": [_table_row(row) for row in sorted(shown, key=_natural)],
    }


def template_environment(load: Callable[[str], str]) -> Any:
    """A Jinja2 environment that escapes, and whose templates `load` returns by name."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FunctionLoader(load),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(visible=visible, num=number, duration=duration, moment=moment)
    return environment


def asset(name: str) -> str:
    """A file of this package: `page.html`, `page.css` or `page.js`."""
    return (files("denoise_core.report") / name).read_text("utf-8")


def content_hash(text: str) -> str:
    """The source expression by which a Content-Security-Policy allows this style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _natural(row: dict[str, Any]) -> list[tuple[int, int, str]]:
    """Sort key by name in which 2 comes before 10."""
    pieces = re.split(r"([0-9]+)", row["source_uri"] or "")
    return [(0, int(p), p) if i % 2 else (1, 0, p) for i, p in enumerate(pieces)]


def _table_row(row: dict[str, Any]) -> dict[str, Any]:
    times = [row["read_ms"], row["denoise_ms"], row["write_ms"]]
    seconds = None if None in times else sum(times) / 1000
    pixels = row["width"] * row["height"] if row["width"] and row["height"] else None
    return {
        **row,
        "pixels": pixels,
        "seconds": seconds,
        "mpx_per_s": pixels / 1e6 / seconds if pixels and seconds else None,
        "psnr_gain": _gain(row["psnr"], row["psnr_noisy"]),
        "ssim_gain": _gain(row["ssim"], row["ssim_noisy"]),
    }


def _reason(row: Mapping[str, Any], prefix: str) -> str:
    """The message without the image's name at its start: that stands in the column beside it."""
    uri = row["source_uri"] or ""
    message = (row["error_message"] or "").removeprefix(f"{uri}: ")
    return message.removeprefix(f"{uri.removeprefix(prefix)}: ")


def _gain(after: float | None, before: float | None) -> float | None:
    gain = math.nan if after is None or before is None else after - before
    return gain if math.isfinite(gain) else None


def _settings(run: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """run.json as groups of names and values: its own values first, then one group a section."""
    plain = {k: v for k, v in run.items() if not isinstance(v, dict)}
    sections = [("run", plain), *((k, v) for k, v in run.items() if isinstance(v, dict))]
    groups = [(str(name), list(_flatten(section))) for name, section in sections]
    return [group for group in groups if group[1]]


def _flatten(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        name = f"{path}{key}"
        if _SECRET.search(str(key)):
            yield name, "not shown"
        elif isinstance(value, dict):
            yield from _flatten(value, f"{name}.")
        else:
            yield name, _setting(value)


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_setting(item) for item in value) or "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    # Someone may have put a password into an endpoint's address.
    return "–" if value is None else re.sub(r"(?<=://)[^/@\s]+@", "", str(value))
