"""What passes between the stages: items, as rows of a table; and what guards the work on them."""

from __future__ import annotations

import faulthandler
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from denoise_core import metrics
from denoise_core.choice import is_dim
from denoise_core.config import COMPRESSIONS, DenoiseConfig
from denoise_core.errors import ImageError, ImageTimeout, StorageError, UsageError, WorkerDied
from denoise_core.images import ImageHeader, filled
from denoise_core.images.values import BIT_DEPTHS
from denoise_core.pipelines.job import Facts, Job
from denoise_core.pipelines.ledger import Place, cause_of_death
from denoise_core.tiling import Region

Array = np.ndarray

BUFFERS = ("pixels", "denoised", "alpha", "metadata")
TABLE_SCHEMA = pa.schema([("facts", pa.string()), *((name, pa.large_binary()) for name in BUFFERS)])
# A watchdog ends the process itself this many times the limit after the polite time-out failed.
HARD_TIMEOUT = 1.5


@dataclass(slots=True)
class Item:
    """One region of one image on its way: facts, and what the stages so far made of it."""

    facts: Facts
    pixels: Any = None
    denoised: Any = None
    alpha: Any = None
    metadata: Any = None

    @property
    def failed(self) -> bool:
        """Whether an earlier stage met an error."""
        return "error_type" in self.facts

    def array(self, name: str) -> Array:
        """Return 'pixels' or 'denoised' as (h, w, C), 'alpha' as (h, w); read-only."""
        shape = self.facts["shape" if name != "denoised" else "core_shape"]
        flat = np.frombuffer(getattr(self, name), dtype=self.facts["dtype"])
        return flat.reshape(shape[:2] if name == "alpha" else shape)


def to_table(item: Item) -> pa.Table:
    """Return a table of one row that shares the item's buffers."""
    columns = [pa.array([json.dumps(item.facts)], pa.string())]
    for name in BUFFERS:
        value = getattr(item, name)
        if value is None:
            columns.append(pa.nulls(1, pa.large_binary()))
            continue
        data = pa.py_buffer(value)
        offsets = pa.py_buffer(np.array([0, data.size], np.int64))
        columns.append(pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data]))
    return pa.Table.from_arrays(columns, schema=TABLE_SCHEMA)


def to_items(table: pa.Table) -> Iterator[Item]:
    """Yield the rows of a table; their buffers point into it."""
    for index in range(len(table)):
        buffers = {}
        for name in BUFFERS:
            scalar = table[name][index]
            buffers[name] = scalar.as_buffer() if scalar.is_valid else None
        yield Item(json.loads(table["facts"][index].as_py()), **buffers)


@contextmanager
def deadline(seconds: float, name: str) -> Iterator[None]:
    """Raise ImageTimeout in the body after `seconds`; end the process where that does not help.

    The alarm interrupts Python code and system calls in the main thread. A codec stuck in C code
    is ended with its process by a watchdog thread that needs no interpreter lock.
    """

    def expire(*_: object) -> None:
        raise ImageTimeout(
            f"{name}: gave up after {seconds:g} s; raise --timeout-per-image if it is only slow."
        )

    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGALRM, expire) if main else None
    if main:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds * HARD_TIMEOUT + 5, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        if main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


@dataclass(slots=True)
class Guard:
    """Runs one stage's work on one item: counts attempts, keeps time, catches its errors."""

    job: Job
    stage: str
    ledger: Any

    def key(self, facts: Facts) -> str:
        """The ledger's name for this stage's work on a region."""
        return f"{self.stage}:{facts['image_id']}:{facts.get('region', 0)}"

    def sort(self, items: list[Item]) -> tuple[list[Item], list[Item]]:
        """Return those at which no worker has died yet, and those at which one has."""
        counts = ray.get(self.ledger.opened.remote([self.key(item.facts) for item in items]))
        pairs = list(zip(items, counts, strict=True))
        return [item for item, died in pairs if not died], [item for item, died in pairs if died]

    @contextmanager
    def attempt(self, items: list[Item]) -> Iterator[list[Item]]:
        """Count an attempt at each item; yield those that have not used up theirs.

        The ledger hears of the end whatever the body raises: this process has outlived it.
        """
        keys = [self.key(item.facts) for item in items]
        most = self.job.config.max_attempts
        begun = ray.get(self.ledger.begin.remote(keys, Place.here()))
        for item, (count, before) in zip(items, begun, strict=True):
            item.facts["attempts"] = min(most, max(count, item.facts.get("attempts", 1)))
            if count > most:
                cause = cause_of_death(before) if before else "for a reason unknown"
                text = (
                    f"the worker died {most} times at this image, in stage {self.stage}, last "
                    f"{cause}; look at the image alone, or at the workers' memory."
                )
                self.fail(item, WorkerDied(text))
        try:
            yield [item for item in items if not item.failed]
        finally:
            self.ledger.end.remote(keys)

    def fail(self, item: Item, error: Exception) -> None:
        """Note an error in the facts and drop the pixels."""
        item.facts |= {
            "error_stage": self.stage,
            "error_type": type(error).__name__,
            "error_message": str(error),
        }
        item.pixels = item.denoised = item.alpha = item.metadata = None

    @contextmanager
    def timed(self, items: list[Item]) -> Iterator[None]:
        """Bound the time of the body and share it out among the items."""
        started = time.perf_counter()
        try:
            with deadline(self.job.config.timeout_per_image * len(items), items[0].facts["path"]):
                yield
        finally:
            spent = (time.perf_counter() - started) * 1e3 / len(items)
            for item in items:
                item.facts[f"{self.stage}_ms"] = round(spent, 3)

    @contextmanager
    def catch(self, item: Item) -> Iterator[None]:
        """Turn an image's error in the body into facts; a bug goes through."""
        try:
            with self.timed([item]):
                yield
        except (ImageError, StorageError, UsageError) as error:
            self.fail(item, error)
        except MemoryError as error:
            text = f"{item.facts['path']}: not enough memory ({error}); make it a tiled TIFF."
            self.fail(item, ImageError(text))
        except RecursionError as error:
            text = f"{item.facts['path']}: nested too deeply ({error}); write the file again."
            self.fail(item, ImageError(text))


def filled_of(facts: Facts, pixels: Array) -> Array:
    """Return pixels (h, w, C) of an item with an end of its range in place of no data."""
    low, high = facts["data_range"]
    return filled(pixels, facts.get("nodata"), low=low, high=high)


def region_of(job: Job, facts: Facts) -> Region:
    """Return the region that an item stands for."""
    return regions_of(job, facts)[facts["region"]]


def regions_of(job: Job, facts: Facts) -> list[Region]:
    """Return the regions that an image is cut to; one where it is read whole."""
    size = facts["region_size"] if facts.get("in_regions") else None
    return job.geometry.regions(*facts["size"], region=size)


def core_in_window(job: Job, facts: Facts) -> tuple[slice, slice]:
    """Return where a region's core lies in the window that was read of it."""
    region = region_of(job, facts)
    y0, y1, x0, x1 = region.core
    top, _, left, _ = region.window(*facts["size"])
    return slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)


def output_dtype(job: Job, dtype: str) -> np.dtype[Any]:
    """Return the dtype that the settings make of an image's own."""
    return np.dtype(BIT_DEPTHS.get(job.config.bit_depth, dtype))


def is_converted(config: DenoiseConfig, header: ImageHeader) -> bool:
    """Whether an output is of another format, depth or compression than its input."""
    if config.format not in ("preserve", header.format):
        return True
    if config.bit_depth != "preserve" and BIT_DEPTHS[config.bit_depth] != header.dtype:
        return True
    return config.compression in COMPRESSIONS.get(header.format, ())


def untouched(facts: Facts, pixels: Array | None = None) -> Facts:
    """Return the measures of an image that stays as it is; `pixels` tell whether it is dim."""
    same: Facts = {
        "sigma_out": facts["sigma_in"],
        "mean_shift": [0.0] * facts["shape"][2],
        "clipped_fraction": 0.0,
    }
    if pixels is not None and is_dim(pixels, *facts["data_range"]):
        same["dim"] = [int(pixels.min()), int(pixels.max())]
    return same


def measures(job: Job, facts: Facts, noisy: Array, denoised: Array) -> Facts:
    """Return what can be said of a region's core without a reference; both are (h, w, C)."""
    low, high = facts["data_range"]
    region = region_of(job, facts)
    y0, _, x0, _ = region.core
    noisy, denoised = filled_of(facts, noisy), filled_of(facts, denoised)
    stats = metrics.residual_sums(
        noisy,
        denoised,
        lo=low,
        hi=high,
        cuts_y=[tile.start - y0 for tile in region.rows[1:]],
        cuts_x=[tile.start - x0 for tile in region.columns[1:]],
    ).stats()
    return {
        "sigma_out": metrics.estimate_sigma(denoised, data_range=high - low),
        "mean_shift": list(stats.mean_shift),
        "clipped_fraction": stats.clipped_fraction,
        "residual_autocorrelation": stats.residual_autocorrelation,
        "seam_ratio": stats.seam_ratio,
    }
