"""The work list: inputs minus finished work, as Parquet shards. Never decodes pixels.

Planning streams: of each input only hashes of its name and of its output's stay in memory, and all
only of those few whose output may still be another's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq

from denoise_core.config import DenoiseConfig
from denoise_core.errors import DenoiseError, ObjectNotFound, OutputConflict, UsageError
from denoise_core.images import output_name
from denoise_core.images.zarr import ROOT_FILES
from denoise_core.results import Done
from denoise_core.storage import Entry, Found, Storage, is_bundle, is_hidden, join

SHARD_ROWS = 10_000
# Images that wait for the end of the listing; more are refused at once, for --retry-failed.
MOST_CONTESTED = 100_000
OWN_NAMES = ("images", "reports", ".denoise", "report.html", "run.json", "_SUCCESS")

WORK_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("source_uri", pa.string()),
        ("path", pa.string()),
        ("output_uri", pa.string()),
        ("source_bytes", pa.int64()),
        ("source_fingerprint", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One image to denoise. `path` is relative to its INPUT."""

    image_id: str
    source_uri: str
    path: str
    output_uri: str
    source_bytes: int
    source_fingerprint: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """An input that cannot even be planned; it becomes a failed row."""

    item: WorkItem
    error: DenoiseError


Planned = WorkItem | Refusal


@dataclass(slots=True)
class Counts:
    """What planning saw. `earlier_failures` are skipped images whose earlier row says `failed`.

    `left_out` are new, changed or missing, and not --retry-failed's to do.
    """

    listed: int = 0
    skipped: int = 0
    left_out: int = 0
    earlier_failures: int = 0
    to_do: int = 0
    refused: int = 0
    bytes_to_do: int = 0


@dataclass(slots=True)
class Planner:
    """Compares what is listed with what is done. One use."""

    config: DenoiseConfig
    config_hash: str
    done: Done
    present: Present | None
    counts: Counts = field(default_factory=Counts)
    _outputs: set[int] = field(default_factory=set)
    _seen: set[int] = field(default_factory=set)
    _moved: set[int] = field(default_factory=set)
    _contested: list[tuple[Refusal, int, str]] = field(default_factory=list)

    def plan(self, found: Iterable[Found]) -> Iterator[Planned]:
        """Yield what is to be done, in the order of listing.

        An image whose output is another's by an earlier row comes last: only once all is listed can
        it be told whether that one has moved.
        """
        for planned in chain(self._listed(found), self._settled()):
            if isinstance(planned, Refusal):
                self.counts.refused += 1
            else:
                self.counts.to_do += 1
                self.counts.bytes_to_do += planned.source_bytes
            yield planned

    def _listed(self, found: Iterable[Found]) -> Iterator[Planned]:
        own = Own(self.config.output)
        for item in found:
            if isinstance(item, Entry) and own.holds(item.uri):
                continue
            if self.config.limit is not None and self.counts.listed >= self.config.limit:
                return
            identity = image_id(item.uri if isinstance(item, Entry) else item[0])
            if _key(identity) in self._seen:
                # INPUTs overlap.
                continue
            self._seen.add(_key(identity))
            self.counts.listed += 1
            planned = self._plan_one(item, identity)
            if planned is not None:
                yield planned

    def _settled(self) -> Iterator[Planned]:
        """Yield the contested images: to be done where the owner's row will name another output."""
        for refusal, key, owner in self._contested:
            if _key(owner) in self._moved and key not in self._outputs:
                self._outputs.add(key)
                yield refusal.item
            else:
                yield refusal

    def _plan_one(self, found: Found, identity: str) -> Planned | None:
        if not isinstance(found, Entry):
            uri, error = found
            if self._is_finished(identity, "", path=None):
                return None
            return Refusal(WorkItem(identity, uri, uri, "", 0, ""), error)
        try:
            name = output_name(found.path, self.config.format)
            output = join(self.config.output, "images", name)
        except UsageError as error:
            item = WorkItem(identity, found.uri, found.path, "", found.size, found.fingerprint)
            return Refusal(item, error)
        item = WorkItem(identity, found.uri, found.path, output, found.size, found.fingerprint)
        key, owner = _key(name), self.done.owner(output)
        free, own = key not in self._outputs, owner in (None, identity)
        if free and own:
            self._outputs.add(key)
        if self._is_finished(identity, found.fingerprint, path=name):
            return None
        if owner != identity and identity in self.done.images:
            self._moved.add(_key(identity))
        if free and own:
            return item
        text = (
            f"{found.uri}: another input also maps to {output}; name the inputs by their "
            "common parent folder, or run them to two outputs."
        )
        refusal = Refusal(item, OutputConflict(text))
        if free and owner is not None and len(self._contested) < MOST_CONTESTED:
            self._contested.append((refusal, key, owner))
            return None
        return refusal

    def _is_finished(self, identity: str, fingerprint: str, *, path: str | None) -> bool:
        before = self.done.images.get(identity)
        failed = before is not None and before[2]
        done = before is not None and before[:2] == (fingerprint, self.config_hash)
        if done and not failed and path is not None:
            done = not self._is_missing(path)
        if self.config.retry_failed:
            self.counts.skipped += done and not failed
            self.counts.left_out += not done and not failed
            return not failed
        if not done or self.config.existing == "overwrite":
            return False
        self.counts.skipped += 1
        self.counts.earlier_failures += failed
        return True

    def _is_missing(self, path: str) -> bool:
        return self.present is not None and path not in self.present


def image_id(uri: str) -> str:
    """Return the identity of an image: 32 hex digits of its URI's SHA-256."""
    return hashlib.sha256(uri.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _key(path: str) -> int:
    # 62 bits: two of a million names meet by chance once in ten million runs.
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big") >> 2


class Own:
    """Knows the files that a run on `out` makes itself, however links spell their paths."""

    def __init__(self, out: str) -> None:
        self.names = {join(_resolved(out), name) for name in OWN_NAMES}
        self.prefixes = tuple(f"{name}/" for name in self.names)

    def holds(self, uri: str) -> bool:
        """Return whether `uri` is one of them."""
        folder, slash, name = uri.rpartition("/")
        uri = f"{_resolved(folder)}/{name}" if slash else uri
        return uri in self.names or uri.startswith(self.prefixes)


@lru_cache(maxsize=1024)
def _resolved(folder: str) -> str:
    return folder if folder.startswith("s3://") else os.path.realpath(folder).rstrip("/")


@dataclass(frozen=True, slots=True)
class Present:
    """The images that lie under OUT/images, of Zarrs only whole ones."""

    storage: Storage
    out: str
    keys: set[int]

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, path: str) -> bool:
        key = _key(path)
        # One that was named itself may be hidden, and is in no listing.
        return key in self.keys or (
            is_hidden(path) and key in _keys(self.storage, join(self.out, "images", path))
        )


def outputs_present(storage: Storage, out: str) -> Present:
    """List what lies under OUT/images."""
    return Present(storage, out, _keys(storage, join(out, "images")))


def _keys(storage: Storage, root: str) -> set[int]:
    try:
        return {
            _key(entry.path)
            for entry in storage.list(root)
            # A run killed at publishing on S3 leaves a Zarr without its root's metadata.
            if not is_bundle(entry.path) or not entry.about.isdisjoint(ROOT_FILES)
        }
    except ObjectNotFound:
        return set()


def write_shards(
    storage: Storage, out: str, items: Iterable[Planned], *, run_id: str
) -> Iterator[tuple[str | None, list[Refusal]]]:
    """Write the work list to `OUT/.denoise/work/`, SHARD_ROWS images a file.

    Yields (shard URI, refusals met on the way) as it goes, the URI None where only refusals came.
    """
    rows: list[WorkItem] = []
    refusals: list[Refusal] = []
    count = 0
    for item in items:
        (refusals if isinstance(item, Refusal) else rows).append(item)  # type: ignore[arg-type]
        if len(rows) == SHARD_ROWS or len(refusals) == SHARD_ROWS:
            yield _write_shard(storage, out, rows, f"{run_id}-{count:05d}"), refusals
            rows, refusals, count = [], [], count + 1
    yield _write_shard(storage, out, rows, f"{run_id}-{count:05d}"), refusals


def _write_shard(storage: Storage, out: str, rows: list[WorkItem], name: str) -> str | None:
    if not rows:
        return None
    columns = {f: [getattr(row, f) for row in rows] for f in WORK_SCHEMA.names}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=WORK_SCHEMA), sink, compression="zstd")
    uri = join(out, ".denoise", "work", f"{name}.parquet")
    storage.write(uri, memoryview(sink.getvalue()))
    return uri


def read_shard(storage: Storage, uri: str) -> pa.Table:
    """Read one shard of the work list."""
    return pq.read_table(pa.BufferReader(storage.read(uri)))
