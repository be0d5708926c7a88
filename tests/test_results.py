"""Rows of evidence: made, journalled, merged to one for each image. Starts no Ray."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from denoise_core.results import Journal, Row, iter_rows, new_row
from denoise_core.storage import LocalStorage

START = datetime(2026, 1, 1, tzinfo=UTC)
LOCAL = LocalStorage()


def row(number: int, *, later: float = 0.0, **values: Any) -> Row:
    moment = START + timedelta(seconds=later)
    return new_row(image_id=f"{number:032x}", finished_at=moment, status="ok", **values)


def stored(out: Path) -> list[Row]:
    return [each for table in iter_rows(LOCAL, str(out)) for each in table.to_pylist()]


def test_row_that_utf_8_cannot_hold_is_escaped(tmp_path: Path) -> None:
    journal = Journal(LOCAL, str(tmp_path), run_id="run")
    journal.append(row(1, error_message="\ud800 \u00e9", metadata_lost=["axes \ud800", "EXIF"]))
    journal.flush()
    (found,) = stored(tmp_path)
    assert found["error_message"] == "\\ud800 \u00e9"
    assert found["metadata_lost"] == ["axes \\ud800", "EXIF"]
