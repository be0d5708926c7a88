"""A gigapixel TIFF, in regions, by one actor and by three with a kill on the way.

`make test-large`: ten minutes, so not among the default tests.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
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


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def test_a_gigapixel_over_several_workers_and_a_kill(checkpoint: str, tmp_path: Path) -> None:
    source = tmp_path / "in" / "slide.tif"
    source.parent.mkdir()
    with tifffile.TiffWriter(source, bigtiff=True) as writer:
        writer.write(
            tiles(), shape=(HEIGHT, WIDTH, 3), dtype=np.uint8, tile=(TILE, TILE),
            photometric="rgb", compression="zlib", compressionargs={"level": 1}, maxworkers=1,
        )  # fmt: skip
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
    outputs = [folder / "images/slide.tif" for folder in (alone, several)]
    assert digest(outputs[0]) == digest(outputs[1])
    with tifffile.TiffFile(outputs[1]) as made:
        page = made.pages.first
        assert (made.is_bigtiff, page.is_tiled, page.shape) == (True, True, (HEIGHT, WIDTH, 3))
    assert files_below(several / ".denoise/regions") == []
    print(
        f"{WIDTH}x{HEIGHT}: one actor {first.seconds:.0f} s, three after a kill with {len(staged)} "
        f"of {row['regions']} regions done {second.seconds:.0f} s; MB of the largest worker "
        f"{peaks(first)} and {peaks(second)}"
    )
    assert max(peaks(job)["pss"] for job in (first, second)) < WORKER_MB
