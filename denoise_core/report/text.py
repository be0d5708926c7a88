"""Names and numbers as a person reads them."""

from __future__ import annotations

import math
import unicodedata
from datetime import datetime


def visible(text: str | None, prefix: str = "") -> str:
    """A name without `prefix`; control and direction marks spelled out, so that none can hide."""
    if not text:
        return "–"
    return "".join(
        f"\\u{ord(c):04x}" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c
        for c in text.removeprefix(prefix) or text
    )


def number(value: float | None, digits: int = 0, *, sign: bool = False) -> str:
    """Grouped by commas, a true minus sign, an en dash for what is unknown."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    rounded = round(value, digits) + 0.0  # no "-0.0"
    return f"{rounded:{'+' if sign and rounded else ''},.{digits}f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units that matter."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def moment(iso: str | None) -> str:
    """An ISO 8601 moment in UTC as day and minute."""
    return datetime.fromisoformat(iso).strftime("%-d %B %Y, %H:%M UTC") if iso else "–"
