"""Time and peak memory of planning a million images: list, compare with what is done, write shards.

Three cases, each in a process of its own: a first run and a rerun where all is done, on a
generated listing; with `--tree` also a real folder tree of empty files, by the storage's own walk
and by the whole driver (`jobs.denoise --dry-run`, which also keeps every name to print it).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from denoise_core import results, worklist
from denoise_core.benchmarks.child import ChildRun, call, peak_rss
from denoise_core.benchmarks.model import ModelConfig
from denoise_core.benchmarks.processes import watch
from denoise_core.benchmarks.tables import Result, megabytes, number, table
from denoise_core.config import DenoiseConfig, pixel_hash, require, setting
from denoise_core.storage import Entry, Found, LocalStorage, Selection, Storage, expand, join

SOURCE = "/benchmark/photos"
FOLDER_FILES = 10_000
BUDGET = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ListingConfig(ModelConfig):
    """Settings of `jobs.benchmark listing`."""

    output: str = setting(help="Folder for listing.md and listing.json.", metavar="DIR")
    names: int = setting(1_000_000, "Images in the listing.", metavar="N")
    tree: bool = setting(False, "Also make and list a real tree of empty files.")
    model: str = setting("unet-s", "For the dry run of --tree.", metavar="NAME|PATH")

    def __post_init__(self) -> None:
        require(self.names >= 1, "--names: expected a number from 1.")


def run(config: ListingConfig) -> Result:
    """Plan the listing in each case."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        first = call("listing:plan", names=config.names, out=f"{folder}/first")
        call("listing:make_done", names=config.names, out=f"{folder}/rerun")
        rerun = call("listing:plan", names=config.names, out=f"{folder}/rerun", done=True)
        cases = {
            "first run, generated names": _figures(first),
            "rerun with all done, generated names": _figures(rerun),
        }
        if config.tree:
            cases |= _real_tree(Path(folder), config)
    data = {"names": config.names, "cases": cases, "budget": BUDGET}
    return Result("listing", f"Listing {config.names:,} names", _body(data), data)


def _real_tree(folder: Path, config: ListingConfig) -> dict[str, dict[str, Any]]:
    tree = folder / "tree"
    _make_tree(tree, config.names)
    walked = call("listing:plan", names=config.names, out=f"{folder}/walked", tree=str(tree))
    command = [sys.executable, "-m", "jobs.denoise", str(tree), "--output", f"{folder}/dry"]
    watched, seconds = watch([*command, *config.flags, "--dry-run"], every_s=0.2, memory=True)
    (driver,) = watched.kinds()["driver (jobs.denoise)"]
    dry = {"seconds": seconds, "peak_rss": driver.rss, "to_do": config.names}
    return {
        "first run, real tree": _figures(walked),
        "`jobs.denoise --dry-run`, real tree, whole driver": dry,
    }


def _make_tree(root: Path, names: int) -> None:
    for number_ in range(names):
        path = root / _path(number_)
        if number_ % FOLDER_FILES == 0:
            path.parent.mkdir(parents=True)
        path.touch()


def _path(number_: int) -> str:
    return f"2024/{number_ // FOLDER_FILES:04d}/IMG_{number_:08d}.jpg"


def _entry(root: str, number_: int) -> Entry:
    path = _path(number_)
    return Entry(join(root, path), path, 3_000_000 + number_, f"17{number_:017d}")


@dataclass(frozen=True, slots=True)
class GeneratedNames(LocalStorage):
    """A local disk whose `folders` pretend to hold so many images. Everything else is real."""

    names: int
    folders: tuple[str, ...]

    def walk(self, root: str, selection: Selection) -> Iterator[Found]:
        """See `Storage.walk`."""
        if root in self.folders:
            return (_entry(root, number_) for number_ in range(self.names))
        return LocalStorage().walk(root, selection)


# --- what runs in processes of its own ----------------------------------------------------------


def _settings(out: str, root: str) -> tuple[DenoiseConfig, str]:
    config = DenoiseConfig(inputs=(root,), output=out)
    return config, pixel_hash(config, model_hash="0" * 64)


def plan(names: int, out: str, done: bool = False, tree: str | None = None) -> dict[str, Any]:
    """Do what the driver does before the first image is read; count what it planned."""
    base, started = peak_rss(), time.perf_counter()
    root = tree or SOURCE
    config, config_hash = _settings(out, root)
    folders = (root, join(out, "images")) if done else (root,)
    storage: Storage = LocalStorage() if tree else GeneratedNames(names, folders)
    found = expand(config.inputs) if tree else storage.walk(root, Selection())
    before = results.Done.load(storage, out)
    present = worklist.outputs_present(storage, out) if before.images else None
    planner = worklist.Planner(config, config_hash, before, present)
    shards = list(worklist.write_shards(storage, out, planner.plan(found), run_id="benchmark"))
    return {
        "seconds": time.perf_counter() - started,
        "rss_before": base,
        "to_do": planner.counts.to_do,
        "skipped": planner.counts.skipped,
        "refused": planner.counts.refused,
        "shards": sum(uri is not None for uri, _ in shards),
    }


def make_done(names: int, out: str) -> int:
    """Write the table of a finished run on the generated names; return its number of parts."""
    _, config_hash = _settings(out, SOURCE)
    parts = range(0, names, results.PART_ROWS)
    for start in parts:
        entries = [_entry(SOURCE, n) for n in range(start, min(names, start + results.PART_ROWS))]
        _write_part(Path(results.parts_root(out)), start, entries, config_hash)
    return len(parts)


def _write_part(root: Path, start: int, entries: list[Entry], config_hash: str) -> None:
    known: dict[str, list[Any]] = {
        "image_id": [worklist.image_id(entry.uri) for entry in entries],
        "source_uri": [entry.uri for entry in entries],
        "source_fingerprint": [entry.fingerprint for entry in entries],
        "config_hash": [config_hash] * len(entries),
        "status": ["ok"] * len(entries),
        "finished_at": [datetime.now(UTC)] * len(entries),
    }
    columns = [
        pa.array(known[column.name], column.type)
        if column.name in known
        else pa.nulls(len(entries), column.type)
        for column in results.SCHEMA
    ]
    root.mkdir(parents=True, exist_ok=True)
    table_ = pa.Table.from_arrays(columns, schema=results.SCHEMA)
    pq.write_table(table_, root / f"part-made-{start:09d}.parquet", compression="zstd")


# --- words --------------------------------------------------------------------------------------


def _figures(child: ChildRun) -> dict[str, Any]:
    return {**child.value, "peak_rss": child.peak_rss}


def _body(data: dict[str, Any]) -> str:
    header = ("case", "seconds", "names/s", "to do", "done before", "peak RSS, MB", "under 1 GB")
    rows = [
        (
            case,
            number(each["seconds"], 1),
            number(data["names"] / each["seconds"], 0),
            f"{each['to_do']:,}",
            f"{each.get('skipped', 0):,}",
            megabytes(each["peak_rss"]),
            "yes" if each["peak_rss"] < data["budget"] else "**no**",
        )
        for case, each in data["cases"].items()
    ]
    base = next(iter(data["cases"].values()))["rss_before"]
    text = (
        "List, compare with the rows of earlier runs and with OUT/images, write the work list. "
        f"A process of its own for each case; {megabytes(base)} MB of the peak is Python with its "
        "packages."
    )
    return f"{table(header, rows)}\n\n{text}"
