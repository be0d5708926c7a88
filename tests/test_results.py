"""Rows of evidence: made, journalled, merged to one for each image. Starts no Ray."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from denoise_core import results
from denoise_core.results import Journal, Row, iter_rows, journal_root, new_row, publish
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


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "PART_ROWS", 40)
    monkeypatch.setattr(results, "JOURNAL_SHARDS", 4)


@pytest.mark.usefixtures("small")
def test_merges_stay_small_and_write_a_row_a_few_times(tmp_path: Path) -> None:
    """Seen: every merge took all that was merged before, in the end each row of the run."""
    sizes: list[int] = []

    class Noting(LocalStorage):
        def write(self, uri: str, data: bytes | memoryview) -> None:
            super().write(uri, data)
            sizes.append(pq.read_metadata(uri).num_rows)

    journal = Journal(Noting(), str(tmp_path), run_id="run")
    for number in range(400):
        journal.append(row(number))
        if number % 2:
            journal.flush()
    assert max(sizes) < 2 * 40
    assert sum(sizes) <= 4 * 400
    shards = list(Path(journal_root(str(tmp_path))).iterdir())
    assert len(shards) < 400 / 40 + 3 * 4
    assert sorted(each["image_id"] for each in stored(tmp_path)) == [
        row(number)["image_id"] for number in range(400)
    ]


@pytest.mark.usefixtures("small")
def test_kill_at_any_point_loses_no_row(tmp_path: Path) -> None:
    for most in range(100):
        left = most

        class Mortal(LocalStorage):
            def write(self, uri: str, data: bytes | memoryview) -> None:
                self._live()
                super().write(uri, data)

            def delete(self, uri: str) -> None:
                self._live()
                super().delete(uri)

            def _live(self) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed

        out, safe = tmp_path / str(most), 0
        journal = Journal(Mortal(), str(out), run_id="run")
        try:
            for number in range(16):
                journal.append(row(number))
                journal.flush()
                safe = number + 1
            publish(Mortal(), str(out), run_id="run")
        except Killed:
            found = {each["image_id"] for each in stored(out)}
            assert found >= {row(number)["image_id"] for number in range(safe)}
            assert publish(LOCAL, str(out), run_id="next") == len(found)
            assert sorted(each["image_id"] for each in stored(out)) == sorted(found)
        else:
            return
    pytest.fail("the journal never ended")


@pytest.mark.usefixtures("small")
def test_the_latest_row_of_an_image_counts(tmp_path: Path) -> None:
    out = str(tmp_path)
    for run, order in (("a", range(90)), ("b", range(89, 29, -1))):
        journal = Journal(LOCAL, out, run_id=run)
        for number in order:
            later = number % 3 - 1 if run == "b" else 0  # earlier, at the same time, later
            journal.append(row(number, later=later, run_id=run))
            if number % 7 == 0:
                journal.flush()
        journal.flush()
    expected = {
        row(number)["image_id"]: "b" if number >= 30 and number % 3 else "a" for number in range(90)
    }
    assert {each["image_id"]: each["run_id"] for each in stored(tmp_path)} == expected
    assert publish(LOCAL, out, run_id="b") == 90
    assert [len(pq.read_table(part)) for part in sorted(tmp_path.rglob("part-*"))] == [40, 40, 10]
    assert {each["image_id"]: each["run_id"] for each in stored(tmp_path)} == expected
    assert publish(LOCAL, out, run_id="c") == 90
