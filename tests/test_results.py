"""Rows of evidence: made, journalled, merged to one for each image. Starts no Ray."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers import files_below

from denoise_core import results
from denoise_core.results import Journal, Row, iter_rows, journal_root, new_row, publish
from denoise_core.storage import LocalStorage, Storage

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


def mortal(left: int) -> Storage:
    """A storage that writes and deletes so often; then its process is killed."""

    class Mortal(LocalStorage):
        def write(self, uri: str, data: bytes | memoryview) -> None:
            live()
            super().write(uri, data)

        def delete(self, uri: str) -> None:
            live()
            super().delete(uri)

    def live() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    return Mortal()


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
        storage = mortal(most)
        out, safe = tmp_path / str(most), 0
        journal = Journal(storage, str(out), run_id="run")
        try:
            for number in range(16):
                journal.append(row(number))
                journal.flush()
                safe = number + 1
            publish(storage, str(out), run_id="run")
        except Killed:
            found = {each["image_id"] for each in stored(out)}
            assert found >= {row(number)["image_id"] for number in range(safe)}
            assert publish(LOCAL, str(out), run_id="next") == len(found)
            assert sorted(each["image_id"] for each in stored(out)) == sorted(found)
        else:
            return
    pytest.fail("the journal never ended")


def write_run(out: str, run: str, numbers: Iterable[int], *, later: float = 0.0) -> None:
    journal = Journal(LOCAL, out, run_id=run)
    for number in numbers:
        journal.append(row(number, later=later, run_id=run))
        if number % 7 == 0:
            journal.flush()
    journal.flush()


def runs_of(out: Path) -> dict[str, str]:
    rows = stored(out)
    assert len({each["image_id"] for each in rows}) == len(rows)
    return {each["image_id"]: each["run_id"] for each in rows}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("published", [True, False])
def test_the_last_runs_row_counts_whatever_the_clocks_said(tmp_path: Path, published: bool) -> None:
    """The first run's clocks were an hour ahead; what it left lies in the table or the journal."""
    out = str(tmp_path)
    write_run(out, "z", range(90), later=3600)
    if published:
        assert publish(LOCAL, out, run_id="z") == 90
    write_run(out, "y", range(89, 29, -1), later=-3600)
    write_run(out, "x", range(60, 70))
    expected = {
        row(number)["image_id"]: "x" if 60 <= number < 70 else "y" if number >= 30 else "z"
        for number in range(90)
    }
    assert runs_of(tmp_path) == expected
    assert publish(LOCAL, out, run_id="x") == 90
    assert [len(pq.read_table(part)) for part in sorted(tmp_path.rglob("part-*"))] == [40, 40, 10]
    assert runs_of(tmp_path) == expected
    assert publish(LOCAL, out, run_id="w") == 90


@pytest.mark.usefixtures("small")
def test_the_latest_row_of_one_run_counts(tmp_path: Path) -> None:
    journal = Journal(LOCAL, str(tmp_path), run_id="run")
    for attempts, later in ((1, 0.0), (2, 2.0), (3, 1.0)):
        for number in range(30):
            journal.append(row(number, later=later, attempts=attempts))
        journal.flush()
    assert [each["attempts"] for each in stored(tmp_path)] == [2] * 30
    assert publish(LOCAL, str(tmp_path), run_id="run") == 30
    assert [each["attempts"] for each in stored(tmp_path)] == [2] * 30


FIRST = {1: "a.png", 2: "b.png", 3: "c.png", 4: "d.zarr", 5: "e.png"}
# The first and the fourth fail now, the last one takes the fifth's place.
SECOND = {1: None, 2: "b.png.tiff", 3: "c.png", 4: None, 5: "sub/e.png", 6: "e.png"}


def write_outputs(out: str, run: str, outputs: dict[int, str | None]) -> None:
    journal = Journal(LOCAL, out, run_id=run)
    for number, name in outputs.items():
        uri = name and f"{out}/images/{name}"
        if uri:
            LOCAL.write(f"{uri}/.zarray" if uri.endswith(".zarr") else uri, b"x")
        journal.append(row(number, output_uri=uri))
    journal.flush()


def test_output_that_no_row_names_any_more_is_deleted_wherever_a_run_is_killed(
    tmp_path: Path,
) -> None:
    """Seen: an image that changed and failed left its earlier output among the good ones."""
    for most in range(100):
        out = tmp_path / str(most)
        write_outputs(str(out), "first", dict(FIRST))
        publish(LOCAL, str(out), run_id="first")
        (tmp_path / "b.png").touch()
        write_outputs(str(out), "second", {**SECOND, 7: "../../b.png"})
        write_outputs(str(out), "third", {7: None})
        killed = True
        with suppress(Killed):
            publish(mortal(most), str(out), run_id="third")
            killed = False
        named = [each["output_uri"] for each in stored(out) if each["output_uri"]]
        assert all(map(os.path.exists, named))
        publish(LOCAL, str(out), run_id="fourth")
        left = files_below(out / "images")
        assert left == sorted(name for name in SECOND.values() if name)
        assert (tmp_path / "b.png").exists()
        if not killed:
            return
    pytest.fail("publishing never ended")


def test_no_output_is_deleted_where_out_has_two_names(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    write_outputs(str(tmp_path / "out"), "first", dict(FIRST))
    write_outputs(str(tmp_path / "link"), "second", dict(FIRST))
    publish(LOCAL, str(tmp_path / "out"), run_id="third")
    assert len(files_below(tmp_path / "out/images")) == len(FIRST)


@pytest.mark.usefixtures("small")
def test_kill_at_publishing_leaves_the_rows_that_count(tmp_path: Path) -> None:
    """A table, the journal of an older version, whose shards had no number, and of two of ours."""
    first = str(tmp_path / "first")
    write_run(first, "table", range(60))
    publish(LOCAL, first, run_id="table")
    write_run(first, "20260101T000000-abcdef", range(10, 60))
    for shard in Path(journal_root(first)).iterdir():
        shard.rename(shard.with_name(shard.name.removeprefix("000001-")))
    write_run(first, "b", range(20, 60))
    write_run(first, "a", range(30, 60), later=-3600)
    expected = runs_of(tmp_path / "first")
    assert Counter(expected.values()) == {
        "table": 10,
        "20260101T000000-abcdef": 10,
        "b": 10,
        "a": 30,
    }
    for most in range(100):
        out = tmp_path / str(most)
        shutil.copytree(first, out)
        try:
            publish(mortal(most), str(out), run_id="new")
        except Killed:
            assert runs_of(out) == expected, most
            assert publish(LOCAL, str(out), run_id="next") == 60
            assert runs_of(out) == expected
        else:
            return
    pytest.fail("publishing never ended")
