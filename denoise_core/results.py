"""The row of evidence: its schema, the journal of a run and the final report table.

A run appends small Parquet shards to a journal as images finish. At its end the journal and the
table of earlier runs are merged to `reports/images/part-*.parquet` with one row for each image.
Both are keyed by `image_id`. Of several rows of one image that of the last run counts, whatever its
workers' clocks said: a row in the journal goes before one in the table, and in the journal that of
the run with the higher number, which the driver gives. Within a run the latest `finished_at` does.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from denoise_core.errors import ObjectNotFound, RunFailed
from denoise_core.storage import Storage, is_bundle, join, path_problem

SCHEMA_VERSION = 1

SCHEMA = pa.schema(
    [
        ("schema_version", pa.int32()),
        ("run_id", pa.string()),
        ("image_id", pa.string()),
        ("source_uri", pa.string()),
        ("output_uri", pa.string()),
        ("status", pa.string()),
        ("source_bytes", pa.int64()),
        ("source_fingerprint", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("channels", pa.int64()),
        ("dtype", pa.string()),
        ("has_alpha", pa.bool_()),
        ("model_id", pa.string()),
        ("model_hash", pa.string()),
        ("config_hash", pa.string()),
        ("patch", pa.int64()),
        ("halo", pa.int64()),
        ("regions", pa.int64()),
        ("patches", pa.int64()),
        ("strength", pa.float64()),
        ("sigma_in", pa.float64()),
        ("sigma_out", pa.float64()),
        ("mean_shift", pa.list_(pa.float64())),
        ("clipped_fraction", pa.float64()),
        ("residual_autocorrelation", pa.float64()),
        ("seam_ratio", pa.float64()),
        ("psnr", pa.float64()),
        ("ssim", pa.float64()),
        ("mse", pa.float64()),
        ("psnr_noisy", pa.float64()),
        ("ssim_noisy", pa.float64()),
        ("mse_noisy", pa.float64()),
        ("reference_uri", pa.string()),
        ("data_range", pa.list_(pa.float64())),
        ("metadata_lost", pa.list_(pa.string())),
        ("attempts", pa.int64()),
        ("error_stage", pa.string()),
        ("error_type", pa.string()),
        ("error_message", pa.string()),
        ("read_ms", pa.float64()),
        ("denoise_ms", pa.float64()),
        ("write_ms", pa.float64()),
        ("device", pa.string()),
        ("node_id", pa.string()),
        ("started_at", pa.timestamp("us", tz="UTC")),
        ("finished_at", pa.timestamp("us", tz="UTC")),
    ]
)
"""One row for each image. Sigmas and mean shifts are in 1/255 of the data range, MSE in its square
as a share of 1, PSNR in dB, times in milliseconds, `data_range` is [lo, hi] in the image's own
units. Nullable where a column does not apply to the row's status."""

PART_ROWS = 100_000
JOURNAL_SHARDS = 200
Row = dict[str, Any]


def parts_root(out: str) -> str:
    """Folder of the final table."""
    return join(out, "reports", "images")


def journal_root(out: str) -> str:
    """Folder of the rows that are not yet in the final table."""
    return join(out, ".denoise", "journal")


def new_row(**values: Any) -> Row:
    """Return a row with every column of SCHEMA, None where not given.

    Lone surrogates, which the JSON of a Zarr may hold and no table can, are escaped.
    """
    unknown = set(values) - set(SCHEMA.names)
    if unknown:
        raise KeyError(f"no columns of the row schema: {sorted(unknown)}")
    storable = {name: _storable(value) for name, value in values.items()}
    return {**dict.fromkeys(SCHEMA.names), "schema_version": SCHEMA_VERSION, **storable}


def _storable(value: Any) -> Any:
    if isinstance(value, list):
        return [_storable(each) for each in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


class Journal:
    """Rows of finished images, made durable in small Parquet shards as they come.

    A row is safe once `flush` has returned. Small shards are merged, and what that made is merged
    again, up to PART_ROWS rows: less than twice as many are held, and a row is written four times
    at most. A shard goes after its rows are in another: a kill in between doubles them.

    To be made under the lock of `out`: its number is one more than any that killed runs left there.
    """

    def __init__(self, storage: Storage, out: str, *, run_id: str) -> None:
        self.storage, self.root = storage, journal_root(out)
        number = 1 + max(map(_run_number, _list(storage, self.root)), default=0)
        self.name = f"{number:06d}-{run_id}"
        self.waiting: list[Row] = []
        self.shards: defaultdict[int, dict[str, int]] = defaultdict(dict)
        self.written = 0

    def append(self, row: Row) -> None:
        """Take one row; it is not durable before `flush`."""
        self.waiting.append(row)

    def flush(self) -> None:
        """Write what waits as one shard."""
        if not self.waiting:
            return
        self._write(pa.Table.from_pylist(self.waiting, schema=SCHEMA), merges=0)
        self.waiting = []

    def _write(self, table: pa.Table, *, merges: int) -> None:
        """Write the rows of a shard that were merged so often; merge it with others like it."""
        uri = join(self.root, f"{self.name}-{self.written:06d}.parquet")
        self.storage.write(uri, _encode(table))
        self.written += 1
        alike = self.shards[merges]
        if len(table) < PART_ROWS:
            alike[uri] = len(table)
        if len(alike) >= JOURNAL_SHARDS or sum(alike.values()) >= PART_ROWS:
            del table, self.shards[merges]
            self._write(
                pa.concat_tables([_read(self.storage, each) for each in alike]), merges=merges + 1
            )
            for each in alike:
                self.storage.delete(each)


def _encode(table: pa.Table) -> memoryview:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return memoryview(sink.getvalue())


def _read(storage: Storage, uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(storage.read(uri)), columns=columns)
    except pa.ArrowInvalid as error:
        raise damaged(uri, error) from error


def damaged(uri: str, error: Exception) -> RunFailed:
    """Return the sentence about a shard that cannot be read."""
    return RunFailed(
        f"{uri} is not a Parquet file that can be read ({error}). Move it away and run "
        "jobs.denoise again on this OUT: the images whose rows it held are then done again."
    )


def _list(storage: Storage, root: str) -> list[str]:
    try:
        return sorted(e.uri for e in storage.list(root) if e.uri.endswith(".parquet"))
    except ObjectNotFound:
        return []


def _run_number(uri: str) -> int:
    """Return the number of the run that wrote a shard of the journal; old ones have none, so 0."""
    numbered = re.match(r"(\d{6})-", uri.rsplit("/", 1)[-1])
    return int(numbered[1]) if numbered else 0


@dataclass(frozen=True, slots=True)
class Latest:
    """Which rows count: for each shard the places of the rows that are the last of their image.

    `rows` is the number of these, `earlier` that of the others.
    """

    shards: list[str]
    keep: list[np.ndarray]
    rows: int
    earlier: int
    has_journal: bool


def latest_rows(storage: Storage, out: str) -> Latest:
    """Find the last row of every image in the table and the journal, reading two columns only.

    A killed `publish` may leave different rows of an image in old and new parts; the journal then
    has the one that counts. Shards come in the order of their runs.
    """
    parts = _list(storage, parts_root(out))
    journal = sorted(_list(storage, journal_root(out)), key=_run_number)
    shards = parts + journal
    if not shards:
        return Latest([], [], 0, 0, False)
    image, moment, starts = _keys(storage, shards)
    ages = [0] * len(parts) + [1 + _run_number(uri) for uri in journal]
    age = np.repeat(np.array(ages, np.int32), np.diff(starts))
    # Of equal times the last shard's counts: the sort keeps the order of equals.
    order = np.lexsort((moment, age, image))
    image = image[order]
    chosen = np.sort(np.append(order[:-1][image[1:] != image[:-1]], order[-1:]))
    places = np.split(chosen, np.searchsorted(chosen, starts[1:-1]))
    keep = [each - start for each, start in zip(places, starts[:-1], strict=True)]
    return Latest(shards, keep, len(chosen), len(image) - len(chosen), bool(journal))


def _keys(storage: Storage, shards: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image and time of every row of the shards, and where each shard's rows start and end."""
    ids, times = [], []
    for uri in shards:
        table = _read(storage, uri, ["image_id", "finished_at"])
        ids.append(table["image_id"].to_numpy().astype("S32"))
        times.append(table["finished_at"].cast(pa.int64()).to_numpy())
    return np.concatenate(ids), np.concatenate(times), np.cumsum([0, *map(len, ids)])


def iter_rows(
    storage: Storage, out: str, *, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Yield tables that together hold the last row of every image once."""
    yield from _rows(storage, latest_rows(storage, out), columns)


def _rows(
    storage: Storage, latest: Latest, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    for uri, keep in zip(latest.shards, latest.keep, strict=True):
        if len(keep):
            yield _read(storage, uri, columns).take(keep)


def publish(storage: Storage, out: str, *, run_id: str) -> int:
    """Merge the journal into `reports/images/part-*.parquet`; return the number of images.

    New parts are written before old ones go, and the journal goes last, its first runs first: after
    a crash in between, the next run finds the journal and merges again. In between go the outputs
    that earlier rows name and none that counts: of images that fail now or have another output.
    """
    latest = latest_rows(storage, out)
    if not latest.has_journal:
        return latest.rows
    made: set[str] = set()
    waiting: list[pa.Table] = []

    def write(least: int) -> None:
        while waiting and sum(map(len, waiting)) >= least:
            table = pa.concat_tables(waiting)
            uri = join(parts_root(out), f"part-{run_id}-{len(made):05d}.parquet")
            storage.write(uri, _encode(table.slice(0, PART_ROWS)))
            made.add(uri)
            rest = table.slice(PART_ROWS)
            waiting[:] = [rest] if len(rest) else []

    for table in _rows(storage, latest):
        waiting.append(table)
        write(PART_ROWS)
    write(1)
    for uri in _orphans(storage, out, latest):
        if is_bundle(uri):
            storage.clear(_images(out), uri.removeprefix(f"{_images(out)}/"))
        else:
            storage.delete(uri)
    for uri in latest.shards:
        if uri not in made:
            storage.delete(uri)
    return latest.rows


def _images(out: str) -> str:
    return join(out, "images")


def _orphans(storage: Storage, out: str, latest: Latest) -> Iterator[str]:
    """Yield the outputs that are named by rows that count no more, and by none that does.

    None at all where one that counts is elsewhere: OUT was moved, or goes by two paths, and which
    file a row means cannot be told.
    """
    root = f"{_images(out)}/"
    counting, earlier = [], []
    for uri, keep in zip(latest.shards, latest.keep, strict=True) if latest.earlier else ():
        named, others = _outputs(storage, uri, keep)
        if not all(name.startswith(root) for name in named):
            return
        counting.append(_hashes(named))
        earlier.append(_hashes(others))
    known = np.concatenate(counting or [_hashes([])])
    for uri, keep, hashes in zip(latest.shards, latest.keep, earlier, strict=False):
        lost = set(np.setdiff1d(hashes, known).tolist())
        for name in _outputs(storage, uri, keep)[1] if lost else ():
            below = name.startswith(root) and path_problem(name.removeprefix(root)) is None
            if below and hash(name.casefold()) in lost:
                yield name


def _outputs(storage: Storage, uri: str, keep: np.ndarray) -> tuple[list[str], list[str]]:
    """Return the outputs that the rows of a shard name: those at `keep`, and the others."""
    names = _read(storage, uri, ["output_uri"])["output_uri"].to_pylist()
    kept = np.zeros(len(names), bool)
    kept[keep] = True
    named = [(name, each) for name, each in zip(names, kept, strict=True) if name is not None]
    return [name for name, each in named if each], [name for name, each in named if not each]


def _hashes(names: list[str]) -> np.ndarray:
    """Of names in any case: to some file systems they are one file."""
    return np.fromiter((hash(name.casefold()) for name in names), np.int64, len(names))


@dataclass(frozen=True, slots=True)
class Done:
    """What earlier runs on this OUT did.

    `images`: image id -> (fingerprint, config hash, failed); `owners`: hash of an output's URI ->
    id of the image that it was made from.
    """

    images: dict[str, tuple[str, str, bool]] = field(default_factory=dict)
    owners: dict[int, str] = field(default_factory=dict)

    def owner(self, output: str) -> str | None:
        """Return the id of the image that an output was made from."""
        return self.owners.get(hash(output))

    @staticmethod
    def load(storage: Storage, out: str) -> Done:
        """Read the rows of earlier runs, finished or killed."""
        columns = ["image_id", "source_fingerprint", "config_hash", "status", "output_uri"]
        done = Done()
        for table in iter_rows(storage, out, columns=columns):
            rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
            for image, fingerprint, settings, status, output in rows:
                # Few settings, many images: one string for all.
                settings = sys.intern(settings or "")
                done.images[image] = (fingerprint or "", settings, status == "failed")
                if output:
                    done.owners[hash(output)] = image
        return done
