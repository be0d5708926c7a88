"""A gigapixel, as a TIFF and as an OME-Zarr, by one actor and by three with a kill on the way.

`make test-large`: twenty minutes, so not among the default tests.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from helpers import files_below, kill_everything, rows_of, start_job, wait_until

from denoise_core.benchmarks.memory import figures
from denoise_core.benchmarks.processes import JobRun, run_denoise

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(5400),
    pytest.mark.skipif(
        os.environ.get("DENOISE_TEST_LARGE") != "1", reason="takes long: `make test-large`"
    ),
]

HEIGHT, WIDTH, TILE = 25_000, 40_000, 512
WORKER_MB = 3000


def tiles() -> Iterator[np.ndarray]:
    """One tile in eight is noisy, the rest is blank, as on a slide."""
    rng = np.random.default_rng(0)
    blank = np.full((TILE, TILE, 3), 230, np.uint8)
    for number in range(-(-HEIGHT // TILE) * -(-WIDTH // TILE)):
        yield rng.integers(90, 160, blank.shape, np.uint8) if number % 8 == 3 else blank


def write_tiff(path: Path) -> None:
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        writer.write(
            tiles(), shape=(HEIGHT, WIDTH, 3), dtype=np.uint8, tile=(TILE, TILE),
            photometric="rgb", compression="zlib", compressionargs={"level": 1}, maxworkers=1,
        )  # fmt: skip


def write_zarr(path: Path) -> None:
    """OME-Zarr 0.5 with one level, channels first."""
    group = zarr.open_group(path, mode="w", zarr_format=3)
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space"} for n in "yx")]
    scale = [{"type": "scale", "scale": [1.0, 0.5, 0.5]}]
    levels = [{"path": "0", "coordinateTransformations": scale}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": levels}]}
    array = group.create_array(
        "0", shape=(3, HEIGHT, WIDTH), chunks=(3, TILE, TILE), dtype=np.uint8
    )
    places = itertools.product(range(0, HEIGHT, TILE), range(0, WIDTH, TILE))
    for (y, x), tile in zip(places, tiles(), strict=True):
        tile = tile[: HEIGHT - y, : WIDTH - x]
        array[:, y : y + TILE, x : x + TILE] = np.moveaxis(tile, 2, 0)


def digests(path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of every file of a folder."""
    files = [path / name for name in files_below(path)] if path.is_dir() else [path]
    found = {}
    for each in files:
        with each.open("rb") as file:
            found[str(each.relative_to(path))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def check_tiff(path: Path) -> None:
    with tifffile.TiffFile(path) as made:
        page = made.pages.first
        assert (made.is_bigtiff, page.is_tiled, page.shape) == (True, True, (HEIGHT, WIDTH, 3))


def check_zarr(path: Path) -> None:
    made = zarr.open_group(path, mode="r")["0"]
    assert (made.shape, made.chunks, made.dtype) == ((3, HEIGHT, WIDTH), (3, TILE, TILE), np.uint8)
    assert made[:, -TILE // 2 :, -TILE // 2 :].all()  # what is not written is 0


def watch_redone(staged: dict[Path, int], process: threading.Event, redone: set[str]) -> None:
    """Note finished regions that are written again; each would stay until all are done."""
    while not process.wait(0.5):
        for path, inode in staged.items():
            try:
                if path.stat().st_ino != inode:
                    redone.add(path.name)
            except FileNotFoundError:
                pass


def peaks(job: JobRun) -> dict[str, int]:
    """Of the largest worker. PSS divides the pages of Ray's object store by those who map them."""
    worker = figures(job)["largest_worker"]
    return {kind: round(worker[kind] / 1e6) for kind in ("rss", "pss", "uss")}


@pytest.mark.parametrize(
    ("name", "write", "check"),
    [("slide.tif", write_tiff, check_tiff), ("slide.ome.zarr", write_zarr, check_zarr)],
    ids=["tiff", "zarr"],
)
def test_a_gigapixel_over_several_workers_and_a_kill(
    checkpoint: str,
    tmp_path: Path,
    name: str,
    write: Callable[[Path], None],
    check: Callable[[Path], None],
) -> None:
    source = tmp_path / "in" / name
    source.parent.mkdir()
    write(source)
    options = ["--model", checkpoint, "--precision", "float32"]
    alone, several = tmp_path / "one", tmp_path / "three"
    first = run_denoise([str(source)], alone, *options, "--actors", "1", memory=True)

    process = start_job(source, "--output", several, *options, "--actors", "3")
    wait_until(
        lambda: len(list(several.glob(".denoise/regions/*/*.json"))) >= 12, process, timeout_s=900
    )
    kill_everything(process)
    assert files_below(several / "images") == []
    markers = list(several.glob(".denoise/regions/*/*.json"))
    staged = {path.with_suffix(".npy"): path.with_suffix(".npy").stat().st_ino for path in markers}
    done, redone = threading.Event(), set()
    watcher = threading.Thread(target=watch_redone, args=(staged, done, redone))
    watcher.start()
    second = run_denoise([str(source)], several, *options, "--actors", "3", memory=True)
    done.set()
    watcher.join()

    assert redone == set()
    (row,) = rows_of(several)
    assert (row["status"], row["width"], row["height"]) == ("ok", WIDTH, HEIGHT)
    assert row["regions"] > len(staged) >= 12
    outputs = [folder / "images" / name for folder in (alone, several)]
    assert digests(outputs[0]) == digests(outputs[1])
    check(outputs[1])
    assert files_below(several / ".denoise/regions") == []
    print(
        f"{name}, {WIDTH}x{HEIGHT}: one actor {first.seconds:.0f} s, three after a kill with "
        f"{len(staged)} of {row['regions']} regions done {second.seconds:.0f} s; MB of the largest "
        f"worker {peaks(first)} and {peaks(second)}"
    )
    assert max(peaks(job)["pss"] for job in (first, second)) < WORKER_MB
