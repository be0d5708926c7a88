"""The rows of a run as columns: one pass over all of them, then a few by number."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from denoise_core.errors import ObjectNotFound, RunFailed
from denoise_core.results import (
    SCHEMA,
    SCHEMA_VERSION,
    damaged,
    journal_root,
    latest_rows,
    parts_root,
)
from denoise_core.storage import Storage, StorageOptions, join, storage_for

SHOWN_IMAGES = 1000
BATCH_ROWS = 65_536
Floats = NDArray[np.float64]

STATUSES = ("ok", "copied", "failed")
OK, COPIED, FAILED = range(3)
_NUMBERS = [
    "width",
    "height",
    "source_bytes",
    "attempts",
    "sigma_in",
    "sigma_out",
    "clipped_fraction",
    "residual_autocorrelation",
    "seam_ratio",
    "psnr",
    "ssim",
    "psnr_noisy",
    "ssim_noisy",
    "read_ms",
    "denoise_ms",
    "write_ms",
]
_SURVEYED = [
    *_NUMBERS,
    *["schema_version", "status", "source_uri", "run_id", "model_id", "model_hash"],
    *["error_stage", "error_type", "metadata_lost", "started_at", "finished_at"],
]


class Table:
    """The rows below OUT, one for each image, read batch by batch or by their numbers.

    Of a finished run they are all in the Parquet parts. Where a journal lies beside them, as of a
    run at work or a killed one, the rows that count are first found over both.
    """

    def __init__(self, out: str, options: StorageOptions | None) -> None:
        self._storage = storage_for(out, options)
        parts = _parquets(self._storage, parts_root(out), pattern=r"part-.*\.parquet")
        # Each with the places of its rows that count, None for all of them.
        self.shards: list[tuple[str, NDArray[np.int64] | None]] = [(uri, None) for uri in parts]
        if _parquets(self._storage, journal_root(out), pattern=r".*\.parquet"):
            latest = latest_rows(self._storage, out)
            self.shards = list(zip(latest.shards, latest.keep, strict=True))

    def batches(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """All rows in order, up to BATCH_ROWS at a time; a column that a part lacks is null."""
        for uri, keep in self.shards:
            with self._storage.open(uri) as file:
                parquet = _parquet(file, uri)
                present = [name for name in columns if name in parquet.schema_arrow.names]
                first = 0
                for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=present):
                    table = pa.Table.from_batches([batch])
                    if keep is not None:
                        table = table.take(pa.array(_inside(keep, first, len(batch)) - first))
                    yield _complete(table, columns)
                    first += len(batch)

    def take(self, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        """The rows of these numbers as dictionaries of all columns, in the order asked for."""
        found: dict[int, dict[str, Any]] = {}
        start = 0
        for uri, keep in self.shards:
            with self._storage.open(uri) as file:
                parquet = _parquet(file, uri)
                size = parquet.metadata.num_rows if keep is None else len(keep)
                numbers = _inside(rows, start, size)
                places = numbers - start if keep is None else keep[numbers - start]
                by_place = dict(_rows_at(parquet, places))
                found.update(
                    (number, by_place[place])
                    for number, place in zip(numbers.tolist(), places.tolist(), strict=True)
                )
                start += size
        return [found[row] for row in rows.tolist()]


def _parquets(storage: Storage, root: str, *, pattern: str) -> list[str]:
    try:
        uris = [entry.uri for entry in storage.list(root, recursive=False)]
    except ObjectNotFound:
        return []
    return sorted(uri for uri in uris if re.fullmatch(pattern, uri.rsplit("/", 1)[-1]))


def _inside(numbers: NDArray[np.int64], first: int, size: int) -> NDArray[np.int64]:
    return numbers[(numbers >= first) & (numbers < first + size)]


def _rows_at(
    parquet: pq.ParquetFile, places: NDArray[np.int64]
) -> Iterator[tuple[int, dict[str, Any]]]:
    start = 0
    for group in range(parquet.num_row_groups):
        size = parquet.metadata.row_group(group).num_rows
        inside = _inside(places, start, size)
        if inside.size:
            yield from _rows_of_group(parquet, group, inside - start, start=start)
        start += size


def _rows_of_group(
    parquet: pq.ParquetFile, group: int, rows: NDArray[np.int64], *, start: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """By batches: one group may hold a million rows, of which a few are wanted."""
    first = 0
    for batch in parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=[group]):
        inside = _inside(rows, first, len(batch))
        if inside.size:
            some = pa.Table.from_batches([batch]).take(pa.array(inside - first))
            picked = _complete(some, SCHEMA.names).to_pylist()
            yield from zip((inside + start).tolist(), picked, strict=True)
        first += len(batch)


def _parquet(file: Any, uri: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise damaged(uri, error) from error


def _complete(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    arrays = [
        table.column(name) if name in table.column_names else pa.nulls(len(table), _type(name))
        for name in columns
    ]
    return pa.table(arrays, names=list(columns))


def _type(name: str) -> pa.DataType:
    return SCHEMA.field(name).type


def read_run(out: str, options: StorageOptions | None) -> dict[str, Any] | None:
    """OUT/run.json, or None where there is none. A broken one is no reason to have no report."""
    try:
        loaded = json.loads(storage_for(out, options).read(join(out, "run.json")))
    except ObjectNotFound:
        return None
    except ValueError as error:
        return {"run.json": f"could not be read: {error}"}
    return loaded if isinstance(loaded, dict) else {"run.json": loaded}


@dataclass(slots=True)
class Survey:
    """What one pass leaves: numbers by column, status codes, counts, and which rows to show."""

    numbers: dict[str, Floats]
    status: NDArray[np.int64]
    spans: dict[str, tuple[datetime, datetime]] = field(default_factory=dict)
    models: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    failures: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    metadata_lost: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    prefix: str = ""
    first_by_name: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def failed(self) -> NDArray[np.int64]:
        """Numbers of the failed rows."""
        return np.flatnonzero(self.status == FAILED)


def survey_rows(table: Table) -> Survey:
    """Read every row once. Raises RunFailed for damaged parts and for a newer schema."""
    chunks: dict[str, list[Floats]] = {name: [np.empty(0)] for name in _NUMBERS}
    status: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    survey = Survey(numbers={}, status=status[0])
    names = pa.table({"name": pa.array([], pa.string()), "row": pa.array([], pa.int64())})
    low: str | None = None
    high: str | None = None
    start = 0
    for batch in table.batches(_SURVEYED):
        _check_version(batch)
        for name in _NUMBERS:
            chunks[name].append(_floats(batch.column(name)))
        codes = pc.index_in(batch.column("status"), value_set=pa.array(STATUSES))
        status.append(pc.fill_null(codes, len(STATUSES)).to_numpy().astype(np.int64))
        _count(survey, batch, failed=pa.array(status[-1] == FAILED))
        names = _smallest(names, batch.column("source_uri"), start)
        ends = pc.min_max(batch.column("source_uri")).as_py()
        low = min(filter(None, (low, ends["min"])), default=None)
        high = max(filter(None, (high, ends["max"])), default=None)
        start += len(batch)
    survey.numbers = {name: np.concatenate(parts) for name, parts in chunks.items()}
    survey.status = np.concatenate(status)
    survey.prefix = _common_folder(low or "", high or "")
    survey.first_by_name = names.column("row").to_numpy()
    return survey


def _check_version(batch: pa.Table) -> None:
    newest = pc.max(batch.column("schema_version")).as_py() or 0
    if newest > SCHEMA_VERSION:
        raise RunFailed(
            f"The rows are of schema version {newest}, this program reads up to {SCHEMA_VERSION}. "
            "Update denoise-jobs."
        )


def _floats(column: pa.ChunkedArray) -> Floats:
    """Values as float64, null as NaN."""
    return pc.fill_null(column.cast(pa.float64()), math.nan).to_numpy()


def _count(survey: Survey, batch: pa.Table, *, failed: pa.Array) -> None:
    """Add this batch's groups to the counts. Groups are few, so they may be Python objects."""
    survey.failures.update(_groups(batch.filter(failed), ["error_stage", "error_type"]))
    survey.models.update(_groups(batch, ["model_id", "model_hash"]))
    lost = pa.table({"lost": pc.list_flatten(batch.column("metadata_lost"))})
    survey.metadata_lost.update(_groups(lost, ["lost"]))
    # What is refused as a run is planned is noted before it begins.
    at_work = batch.filter(pc.fill_null(pc.not_equal(batch.column("error_stage"), "plan"), True))
    times = at_work.group_by("run_id").aggregate([("started_at", "min"), ("finished_at", "max")])
    for row in times.to_pylist():
        first, last = row["started_at_min"], row["finished_at_max"]
        if first is None or last is None:
            continue
        before = survey.spans.get(row["run_id"], (first, last))
        survey.spans[row["run_id"]] = (min(before[0], first), max(before[1], last))


def _groups(table: pa.Table, keys: list[str]) -> dict[tuple[Any, ...], int]:
    rows = table.group_by(keys).aggregate([([], "count_all")]).to_pylist()
    return {tuple(row[key] for key in keys): row["count_all"] for row in rows}


def _smallest(names: pa.Table, column: pa.ChunkedArray, start: int) -> pa.Table:
    """The SHOWN_IMAGES first rows by name of those kept so far and this batch."""
    rows = pa.array(np.arange(start, start + len(column)))
    both = pa.concat_tables([names, pa.table({"name": column, "row": rows})])
    keys = [("name", "ascending"), ("row", "ascending")]
    kept = min(SHOWN_IMAGES, len(both))
    return both.take(pc.select_k_unstable(both, k=kept, sort_keys=keys))


def _common_folder(low: str, high: str) -> str:
    """The folder, with its '/', that all names share: that of the first and last in order."""
    shared = 0
    for a, b in zip(low, high, strict=False):
        if a != b:
            break
        shared += 1
    return low[: low.rfind("/", 0, shared) + 1]
