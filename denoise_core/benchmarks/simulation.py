"""One run of the bulk job with stand-ins for its stages: what `jobs.benchmark scale` starts.

    python -m jobs.benchmark simulate --output DIR --actors 16 --images 1000 --patch-ms 5

Listing, work list, Ray Data pipeline, journal, table and page are those of `jobs.denoise`; the
images are names (`_WIDTHxHEIGHT.jpg`), the device sleeps. Writes DIR/simulation.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from denoise_core import results, worklist
from denoise_core.benchmarks.model import ModelConfig
from denoise_core.config import DenoiseConfig, pixel_hash, require, setting
from denoise_core.denoiser import resolve_geometry
from denoise_core.errors import RunFailed
from denoise_core.storage import Entry, LocalStorage, StorageOptions, join

SOURCE = "/simulated/photos"
FOLDER_FILES = 10_000
# From a thumbnail of 160x120 to 50 Mpx.
PIXELS = (160 * 120, 50_000_000)
ASPECT = 1.5
# For as many as 64 actors to have started.
ACTORS_START_S = 900
# A photograph's JPEG; with it the job decides how many images share a task.
FILE_BYTES_PER_PIXEL = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig(ModelConfig):
    """Settings of `jobs.benchmark simulate`."""

    output: str = setting(help="Folder for the run and simulation.json.", metavar="DIR")
    actors: int = setting(2, "Denoising actors.", metavar="N")
    images: int = setting(1_000, "Images.", metavar="N")
    patch_ms: float = setting(10.0, "Milliseconds of the device for a full window.", metavar="MS")
    most_bytes: int = setting(
        200_000, "An item carries its pixels' bytes, but at most so many.", metavar="N"
    )
    model: str = setting("unet-s", "The model whose windows are counted.", metavar="NAME|PATH")
    seed: int = setting(0, "Seed of the order of the sizes.", metavar="N")

    def __post_init__(self) -> None:
        require(self.actors >= 1, "--actors: expected a number from 1.")
        require(self.images >= 1, "--images: expected a number from 1.")
        require(self.patch_ms > 0, "--patch-ms: expected a number above 0.")
        require(self.most_bytes >= 1, "--most-bytes: expected a number from 1.")


def image_sizes(images: int, *, seed: int) -> list[tuple[int, int]]:
    """Return (width, height), evenly spread over the logarithm of the pixels, in random order."""
    low, high = PIXELS
    pixels = low * (high / low) ** ((np.arange(images) + 0.5) / images)
    widths = np.sqrt(np.random.default_rng(seed).permutation(pixels) * ASPECT)
    return [(round(width), round(width / ASPECT)) for width in widths]


def entries(images: int, *, seed: int) -> Iterator[Entry]:
    """Yield the listing."""
    for number, (width, height) in enumerate(image_sizes(images, seed=seed)):
        path = f"{number // FOLDER_FILES:04d}/IMG_{number:08d}_{width}x{height}.jpg"
        size = int(width * height * FILE_BYTES_PER_PIXEL)
        yield Entry(join(SOURCE, path), path, size, f"17{number:017d}")


@dataclass(slots=True)
class Phases:
    """Seconds of the driver's work, wall time and CPU of all its threads, by what it did."""

    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure the body."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[name] = time.perf_counter() - wall
        self.cpu[name] = time.process_time() - cpu


def simulate(config: SimulationConfig, *, start_ray: Callable[[], None]) -> None:
    """Run the images through; write simulation.json. Raises RunFailed where one fails."""
    from denoise_core.pipelines.standins import StoreWatch
    from denoise_core.report import build_report

    job, storage, phases = _job(config), LocalStorage(), Phases()
    with phases.timed("plan"):
        shards, counts = _plan(job, storage, config)
    with phases.timed("start_ray"):
        start_ray()
    with phases.timed("work"):
        images, rows_s = _work(job, shards, counts, config)
    with phases.timed("publish"):
        results.publish(storage, config.output, run_id=job.run_id)
    table = sum(entry.size for entry in storage.list(results.parts_root(config.output)))
    with phases.timed("report"):
        build_report(config.output)
    content = {
        "images": images,
        "wall_s": phases.wall,
        "cpu_s": phases.cpu,
        "rows_cpu_s": rows_s,
        "table_bytes": table,
        "operators": StoreWatch.operators,
        "most_bytes_held": StoreWatch.most_bytes,
    }
    (Path(config.output) / "simulation.json").write_text(json.dumps(content))


def _job(config: SimulationConfig) -> Any:
    from denoise_core.pipelines.job import Job, Model

    settings = DenoiseConfig(
        inputs=(SOURCE,), output=config.output, actors=str(config.actors), gpus_per_actor="0"
    )
    card = config.load().card
    return Job(
        config=settings,
        run_id="simulation",
        options=StorageOptions(),
        geometry=resolve_geometry(card, patch=settings.patch, halo=settings.halo),
        models=(Model("stand-in", "stand-in", "0" * 64, 0.0),),
        config_hash=pixel_hash(settings, model_hash="0" * 64),
    )


def _plan(
    job: Any, storage: LocalStorage, config: SimulationConfig
) -> tuple[list[str], worklist.Counts]:
    done = results.Done.load(storage, config.output)
    planner = worklist.Planner(job.config, job.config_hash, done, None)
    items = planner.plan(entries(config.images, seed=config.seed))
    written = worklist.write_shards(storage, config.output, items, run_id=job.run_id)
    return [uri for uri, _ in written if uri is not None], planner.counts


def _work(
    job: Any, shards: list[str], counts: worklist.Counts, config: SimulationConfig
) -> tuple[list[dict[str, Any]], float]:
    """Return what is to be known of each image, and the CPU seconds of the thread of the rows."""
    from denoise_core.pipelines.flow import Flow
    from denoise_core.pipelines.standins import StoreWatch, stand_ins

    flow = Flow(
        job,
        shards,
        mean_bytes=counts.bytes_to_do / counts.to_do,
        images=counts.to_do,
        stages=stand_ins(patch_s=config.patch_ms / 1e3, most_bytes=config.most_bytes),
    )
    flow.dataset.context.custom_execution_callback_classes.append(StoreWatch)
    # Many processes on few cores take minutes to start; what is measured comes after that.
    flow.dataset.context.wait_for_min_actors_s = ACTORS_START_S
    started = time.thread_time()
    with flow:
        images = list(_collect(flow, job))
    return images, time.thread_time() - started


def _collect(flow: Any, job: Any) -> Iterator[dict[str, Any]]:
    """Journal the rows as a run does; yield what is to be known of each image."""
    from denoise_core.pipelines.denoise import FLUSH_ROWS, FLUSH_S, to_row

    journal = results.Journal(LocalStorage(), job.config.output, run_id=job.run_id)
    flushed = time.monotonic()
    for facts in flow:
        if facts is not None:
            if "error_type" in facts:
                raise RunFailed(f"{facts['path']}: {facts['error_message']}")
            row = to_row(job, facts)
            journal.append(row)
            names = ("began", "device_s", "actor", "size", "patches", "carried")
            yield {name: facts[name] for name in names} | {
                "finished": row["finished_at"].timestamp()
            }
        if time.monotonic() - flushed >= FLUSH_S or len(journal.waiting) >= FLUSH_ROWS:
            journal.flush()
            flushed = time.monotonic()
    journal.flush()
