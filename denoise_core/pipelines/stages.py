"""The stages of bulk denoising: expand, read, denoise, write. Each maps Arrow tables to tables.

Between stages a row is the work item's facts as one JSON text, and the pixels as raw bytes, so
that images of any shapes and dtypes share a table. Every stage catches an image's own error and
notes it in the facts; the write stage turns it into a failed row. A bug still stops the run.
"""

from __future__ import annotations

import faulthandler
import io
import json
import math
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from denoise_core import metrics
from denoise_core.choice import choose, is_coarse, is_dim, is_quiet, noise_sigma, residual_rms
from denoise_core.config import DenoiseConfig, parse_data_range
from denoise_core.denoiser import Denoiser, Part
from denoise_core.devices import configure_tensorflow, has_gpu
from denoise_core.errors import (
    AccessDenied,
    ImageError,
    ImageTimeout,
    RunFailed,
    StorageError,
    StorageUnavailable,
    UnsupportedImage,
    UsageError,
    WorkerDied,
)
from denoise_core.images import (
    DecodedImage,
    ImageHeader,
    ImageMetadata,
    Source,
    data_range,
    decode,
    encode,
    fetch,
    inverted,
    is_negative,
    left_behind,
    open_image,
    read_header,
    read_metadata,
    read_window,
    rescale,
    to_dtype,
)
from denoise_core.images.values import BIT_DEPTHS, UNIT_SHARE
from denoise_core.images.zarr import METADATA_FILES
from denoise_core.pipelines.job import (
    Facts,
    Job,
    merge_reference,
    now,
    reference_figures,
)
from denoise_core.pipelines.ledger import Place, cause_of_death
from denoise_core.storage import Storage, is_bundle, join, storage_for
from denoise_core.tiling import Region

Array = np.ndarray

BUFFERS = ("pixels", "denoised", "alpha", "metadata")
TABLE_SCHEMA = pa.schema([("facts", pa.string()), *((name, pa.large_binary()) for name in BUFFERS)])

# A TIFF below this many pixels is one region even where its tiles could be read one by one.
REGION_FROM_PIXELS = 36_000_000
# Regions are multiples of this many pixels a side.
MIN_REGION = 256
# Pixels that the actor holds as floats at a time, beyond those of one region.
GROUP_PIXELS = 8_000_000
# A large image's noise is estimated on so many windows of so many pixels a side.
SAMPLES, SAMPLE_SIDE = 16, 256
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


class Expand:
    """Work list row -> one item for each region. Opens headers of TIFFs and Zarrs, of nothing else.

    The items of an image that is written in pieces have `in_regions` set; a Zarr always is.
    """

    def __init__(self, job: Job, ledger: Any) -> None:
        self.job, self.guard = job, Guard(job, "read", ledger)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Map rows of WORK_SCHEMA to rows of TABLE_SCHEMA."""
        for row in table.to_pylist():
            first = {"started_at": now(), "regions": 1, "region": 0, "attempts": 1}
            item = Item({**row, **first})
            items = [item]
            if self._may_be_large(item.facts):
                with self.guard.attempt(items) as todo:
                    for item in todo:
                        with self.guard.catch(item):
                            items = self._regions(item)
            yield from map(to_table, items)

    def _may_be_large(self, facts: Facts) -> bool:
        # Only a TIFF and a Zarr can be written in pieces.
        kept = self.job.config.format in ("preserve", "tiff")
        path = facts["path"].lower()
        return kept and (path.endswith((".tif", ".tiff")) or is_bundle(path))

    def _regions(self, item: Item) -> list[Item]:
        facts = item.facts
        storage = storage_for(facts["source_uri"], self.job.options)
        with open_image(storage, facts["source_uri"]) as file:
            try:
                header = read_header(file, name=facts["path"], max_pixels=1 << 62)
            except ImageError:
                # The read stage meets the same error and has the whole file to explain it.
                return [item]
            size = self._region_size(header)
            if size is None:
                return [item]
            regions = self.job.geometry.regions(header.height, header.width, region=size)
            if len(regions) == 1 and header.format != "zarr":
                return [item]
            self._refuse_depth(header, name=facts["path"])
            facts |= {
                "regions": len(regions),
                "in_regions": True,
                "region_size": size,
                "size": [header.height, header.width],
            }
            facts["data_range"] = list(
                parse_data_range(self.job.config.data_range)
                or self._range(file, header, regions, name=facts["path"])
            )
            if len(self.job.models) > 1:
                facts["model"] = choose(header, read_metadata(file, name=facts["path"]))
            converted = is_converted(self.job.config, header)
            if not converted and self._is_quiet(file, header, regions, facts):
                return [item]
        return [Item({**facts, "region": index}) for index in range(len(regions))]

    def _region_size(self, header: ImageHeader) -> int | None:
        """Side of this image's regions; None where it is read whole."""
        # Stacks are deep: of more than four samples every four count as one pixel.
        groups = -(-header.samples // 4)
        large = header.height * header.width * groups >= REGION_FROM_PIXELS
        if not header.windowed or not (header.format == "zarr" or large):
            return None
        shorter = self.job.config.region // math.ceil(math.sqrt(groups))
        return max(MIN_REGION, shorter // MIN_REGION * MIN_REGION)

    def _refuse_depth(self, header: ImageHeader, *, name: str) -> None:
        config = self.job.config
        kept = output_dtype(self.job, header.dtype) == header.dtype
        if header.format == "zarr" and config.format == "preserve" and not kept:
            raise UnsupportedImage(
                f"{name}: --bit-depth {config.bit_depth} does not change a Zarr of {header.dtype}; "
                "use --format tiff with it, or --bit-depth preserve"
            )

    def _is_quiet(
        self, file: Source, header: ImageHeader, regions: list[Region], facts: Facts
    ) -> bool:
        """Decide by samples whether the image is copied whole; if so, note what there is to say."""
        low, high = facts["data_range"]
        windows = list(sample_windows(file, regions, name=facts["path"]))
        sigma = noise_sigma(windows, spread=high - low)
        below = self.job.model(facts).copy_below
        if not is_quiet(windows, codec=header.format, sigma=sigma, below=below, spread=high - low):
            return False
        facts |= {
            "regions": 1,
            "in_regions": False,
            "region_count": len(regions),
            "copied": True,
            "streamed": True,
            "shape": [header.height, header.width, header.channels],
            "dtype": header.dtype,
            "has_alpha": header.has_alpha,
            "sigma_in": sigma,
        }
        return True

    @staticmethod
    def _range(
        file: Source, header: ImageHeader, regions: list[Region], *, name: str
    ) -> tuple[float, float]:
        if np.dtype(header.dtype).kind == "f":
            return float_range(file, regions, name=name)
        return data_range(header.dtype, bits=header.bits)


def float_range(file: Source, regions: list[Region], *, name: str) -> tuple[float, float]:
    """Return `data_range` of a whole float image that is read region by region."""
    inside, size, low, high = 0, 0, np.inf, -np.inf
    for region in regions:
        y0, y1, x0, x1 = region.core
        pixels, _ = read_window(file, y=slice(y0, y1), x=slice(x0, x1), name=name)
        inside += int(np.count_nonzero((pixels >= 0) & (pixels <= 1)))
        size += pixels.size
        low, high = min(low, float(pixels.min())), max(high, float(pixels.max()))
    if inside >= UNIT_SHARE * size:
        return 0.0, 1.0
    return (low, high) if high > low else (low, low + 1.0)


def sample_windows(file: Source, regions: list[Region], *, name: str) -> Iterator[Array]:
    """Yield (h, w, C) pixels from the middle of evenly spread regions of a large image."""
    for index in sorted({round(i) for i in np.linspace(0, len(regions) - 1, SAMPLES)}):
        y0, y1, x0, x1 = regions[index].core
        y, x = (max(a, (a + b - SAMPLE_SIDE) // 2) for a, b in ((y0, y1), (x0, x1)))
        rows, columns = slice(y, min(y1, y + SAMPLE_SIDE)), slice(x, min(x1, x + SAMPLE_SIDE))
        yield read_window(file, y=rows, x=columns, name=name)[0]


class Read:
    """Fetch and decode; estimate the noise; decide whether the image is copied."""

    def __init__(self, job: Job, ledger: Any) -> None:
        self.job, self.guard = job, Guard(job, "read", ledger)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Fill in `pixels`, `alpha` and `metadata`."""
        for item in to_items(table):
            if not item.failed:
                with self.guard.attempt([item]) as todo:
                    for each in todo:
                        with self.guard.catch(each):
                            self._read(each)
            yield to_table(item)

    def _read(self, item: Item) -> None:
        facts = item.facts
        storage = storage_for(facts["source_uri"], self.job.options)
        if facts.get("streamed"):
            return
        if facts.get("in_regions"):
            self._read_region(item, storage)
            return
        data = fetch(storage, facts["source_uri"])
        image = decode(data, name=facts["path"], max_pixels=self.job.config.max_pixels)
        low, high = parse_data_range(self.job.config.data_range) or data_range(
            image.pixels, bits=image.header.bits
        )
        self._note(facts, image.pixels, low, high, has_alpha=image.alpha is not None)
        facts["size"] = list(image.pixels.shape[:2])
        facts["sigma_in"] = metrics.estimate_sigma(image.pixels, data_range=high - low)
        facts["coarse"] = is_coarse(image.metadata)
        facts["converted"] = is_converted(self.job.config, image.header)
        item.metadata = image.metadata.to_bytes()
        if len(self.job.models) > 1:
            facts["model"] = choose(image.header, image.metadata)
        if is_quiet(
            [image.pixels],
            codec=image.header.format,
            sigma=facts["sigma_in"],
            below=self.job.model(facts).copy_below,
            spread=high - low,
        ):
            facts |= {"copied": True, **untouched(facts, image.pixels)}
            if self.job.config.reference is None and not facts["converted"]:
                return
        item.pixels, item.alpha = image.pixels, image.alpha

    def _read_region(self, item: Item, storage: Any) -> None:
        facts = item.facts
        staged = self.job.staging(facts, f"{facts['region']:06d}.json")
        target = storage_for(self.job.config.output, self.job.options)
        if target.stat(staged) is not None:
            done = json.loads(target.read(staged))
            # A region of this run is read again: of a task that lost its machine Ray takes only
            # what it has not seen, and expects what comes before to be as large as it was.
            if done.pop("run_id") != self.job.run_id:
                # What this run knows of the item itself goes before what a killed one noted.
                facts |= {**done, **facts, "staged": True}
                return
        height, width = facts["size"]
        region = region_of(self.job, facts)
        y0, y1, x0, x1 = region.window(height, width)
        with open_image(storage, facts["source_uri"]) as file:
            pixels, alpha = read_window(file, y=slice(y0, y1), x=slice(x0, x1), name=facts["path"])
        low, high = facts["data_range"]
        self._note(facts, pixels, low, high, has_alpha=alpha is not None)
        facts["sigma_in"] = metrics.estimate_sigma(pixels, data_range=high - low)
        item.pixels, item.alpha = pixels, alpha

    @staticmethod
    def _note(facts: Facts, pixels: Array, low: float, high: float, *, has_alpha: bool) -> None:
        facts |= {
            "shape": list(pixels.shape),
            "dtype": pixels.dtype.name,
            "has_alpha": has_alpha,
            "data_range": [low, high],
        }


def is_converted(config: DenoiseConfig, header: ImageHeader) -> bool:
    """Whether an output is of another format, depth or compression than its input."""
    if config.format not in ("preserve", header.format):
        return True
    if config.bit_depth != "preserve" and BIT_DEPTHS[config.bit_depth] != header.dtype:
        return True
    return config.compression is not None and header.format in ("png", "tiff")


def region_of(job: Job, facts: Facts) -> Region:
    """Return the region that an item stands for."""
    return regions_of(job, facts)[facts["region"]]


def regions_of(job: Job, facts: Facts) -> list[Region]:
    """Return the regions that an image is cut to; one where it is read whole."""
    size = facts["region_size"] if facts.get("in_regions") else None
    return job.geometry.regions(*facts["size"], region=size)


def groups(items: list[Item]) -> Iterator[list[Item]]:
    """Cut a list so that no group has more than GROUP_PIXELS, or it is a single item."""
    group: list[Item] = []
    pixels = 0
    for item in items:
        height, width, channels = item.facts["shape"]
        size = height * width * max(1, channels // 3)
        if group and pixels + size > GROUP_PIXELS:
            yield group
            group, pixels = [], 0
        group.append(item)
        pixels += size
    if group:
        yield group


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


def core_in_window(job: Job, facts: Facts) -> tuple[slice, slice]:
    """Return where a region's core lies in the window that was read of it."""
    region = region_of(job, facts)
    y0, y1, x0, x1 = region.core
    top, _, left, _ = region.window(*facts["size"])
    return slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)


class Denoise:
    """The actor: holds the models, cuts patches of all items it is given, pastes the results.

    On CPUs it measures too, so that the noisy pixels need not go on to the write stage, which
    would take the same cores for it. A GPU's time is dearer than the memory.
    """

    def __init__(self, job: Job, ledger: Any, *, threads: int | None, use_gpu: bool) -> None:
        tf = configure_tensorflow(threads=threads, use_gpu=use_gpu)
        self.job, self.guard = job, Guard(job, "denoise", ledger)
        self.measures = not use_gpu
        self.misses_gpu = use_gpu and not has_gpu(tf)
        self.denoisers: dict[str, Denoiser] = {}
        self._denoiser(job.models[0].name)

    def _denoiser(self, name: str) -> Denoiser:
        """Return a model, warm; those that no image asks for are never loaded."""
        from denoise_core.checkpoints import load_checkpoint

        if name not in self.denoisers:
            config = self.job.config
            # A user's Keras file: stride and halo are in the geometry, measured by the driver.
            checkpoint = load_checkpoint(
                name,
                model_range=config.model_range,
                measure=False,
                sha256={model.name: model.hash for model in self.job.models}[name],
                options=self.job.options,
            )
            denoiser = Denoiser(
                checkpoint,
                geometry=self.job.geometry,
                batch_size=None if config.batch_size == "auto" else int(config.batch_size),
                strength=config.strength,
                precision=config.precision,
            )
            denoiser.warm_up()
            self.denoisers[name] = denoiser
        return self.denoisers[name]

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Fill in `denoised` with the core's values in the image's own dtype."""
        todo = []
        for item in to_items(table):
            if item.failed or item.facts.get("copied") or item.facts.get("staged"):
                yield to_table(item)
            else:
                todo.append(item)
        fresh, suspects = self.guard.sort(todo) if todo else ([], [])
        # Work that once killed a worker is done alone, so that its neighbours come out.
        for group in (*groups(fresh), *([item] for item in suspects)):
            with self.guard.attempt(group) as left:
                self._denoise(left)
            for item in group:
                converted = item.facts.get("copied") and item.facts["converted"]
                measured = "sigma_out" in item.facts and self.job.config.reference is None
                if measured and not converted:
                    item.pixels = None
                yield to_table(item)

    def _denoise(self, items: list[Item]) -> None:
        """Denoise together; where that fails each alone, so that only the culprit fails."""
        if len(items) > 1:
            try:
                with self.guard.timed(items):
                    self._predict(items)
                return
            except (ImageError, StorageError, UsageError, MemoryError):
                pass
        for item in items:
            with self.guard.catch(item):
                self._predict([item])

    def _predict(self, items: list[Item]) -> None:
        for model in self.job.models:
            chosen = [item for item in items if self.job.model(item.facts) == model]
            if chosen:
                self._predict_by(self._denoiser(model.name), chosen)

    def _predict_by(self, denoiser: Denoiser, items: list[Item]) -> None:
        parts = [self._part(item) for item in items]
        try:
            results = denoiser.denoise_parts(parts)
        except Exception as error:
            if type(error).__name__ != "ResourceExhaustedError":
                raise
            raise MemoryError("on the device: use a smaller --batch-size or --patch") from None
        for item, part, values in zip(items, parts, results, strict=True):
            facts, pixels = item.facts, item.array("pixels")
            if self._changes_too_little(item, values):
                facts |= {"copied": True, **untouched(facts, pixels)}
            else:
                item.denoised = values
                if self.measures:
                    noisy = pixels[core_in_window(self.job, facts)]
                    facts |= measures(self.job, facts, noisy, values)
            facts |= {
                "core_shape": list(values.shape),
                "patches": len(part.region.patches),
                "device": denoiser.device,
                "precision": denoiser.precision,
                "misses_gpu": self.misses_gpu,
            }

    def _changes_too_little(self, item: Item, values: Array) -> bool:
        """Whether a whole image is better left alone, by what the model would take away."""
        config, facts = self.job.config, item.facts
        limit = self.job.model(facts).copy_residual * config.strength
        if facts.get("in_regions") or not limit or facts["coarse"]:
            return False
        low, high = facts["data_range"]
        return residual_rms(item.array("pixels"), values, spread=high - low) < limit

    def _part(self, item: Item) -> Part:
        facts = item.facts
        region = region_of(self.job, facts)
        y0, _, x0, _ = region.window(*facts["size"])
        low, high = facts["data_range"]
        return Part(item.array("pixels"), region, (y0, x0), low, high, facts["dtype"])


class Write:
    """Encode and write; measure what no stage before has; the row that comes out has no pixels."""

    def __init__(self, job: Job, ledger: Any) -> None:
        self.job, self.guard = job, Guard(job, "write", ledger)
        self.output = storage_for(job.config.output, job.options)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Map items to rows of facts alone."""
        facts = []
        for item in to_items(table):
            if not (item.failed or item.facts.get("staged")):
                with self.guard.attempt([item]) as todo:
                    for each in todo:
                        with self.guard.catch(each):
                            self._write(each)
            item.facts["finished_at"] = now()
            item.facts["node_id"] = ray.get_runtime_context().get_node_id()
            facts.append(json.dumps(item.facts))
        yield pa.table({"facts": pa.array(facts, pa.string())})

    def _write(self, item: Item) -> None:
        facts = item.facts
        if facts.get("in_regions"):
            self._stage_region(item)
            return
        if facts.get("streamed"):
            self._copy_streamed(facts)
            return
        metadata = ImageMetadata.from_bytes(bytes(item.metadata))
        # Without pixels there is nothing left to measure.
        noisy = item.array("pixels") if item.pixels is not None else None
        lost: tuple[str, ...] = ()
        if facts.get("copied") and not facts["converted"]:
            denoised = noisy
            data = storage_for(facts["source_uri"], self.job.options).read(facts["source_uri"])
        else:
            denoised = item.array("pixels" if facts.get("copied") else "denoised")
            alpha = item.array("alpha") if item.alpha is not None else None
            config = self.job.config
            data, lost = encode(
                denoised,
                alpha,
                metadata,
                format=config.format,
                bit_depth=config.bit_depth,
                compression=config.compression,
                value_range=tuple(facts["data_range"]),
            )
        facts["metadata_lost"] = list(lost)
        if noisy is not None and denoised is not None:
            if "sigma_out" not in facts:
                facts |= measures(self.job, facts, noisy, denoised)
            facts |= self._against_reference(facts, metadata, noisy, denoised)
        # Last, so that a failed row never leaves an image behind.
        write_output(self.output, facts["output_uri"], data)

    def _against_reference(
        self, facts: Facts, metadata: ImageMetadata, noisy: Array, denoised: Array
    ) -> Facts:
        root = self.job.config.reference
        if root is None:
            return {}
        uri = join(root, facts["path"])
        storage = storage_for(root, self.job.options)
        try:
            most = self.job.config.max_pixels
            reference = decode(fetch(storage, uri), name=uri, max_pixels=most)
        except (ImageError, StorageError) as error:
            return {"reference_problem": str(error)}
        if reference.pixels.shape != denoised.shape:
            return {"reference_problem": f"{uri}: shape {reference.pixels.shape}"}
        low, high = facts["data_range"]
        clean = self._same_units(reference, denoised.dtype, low, high)
        if is_negative(reference.metadata) != is_negative(metadata):
            clean = inverted(clean, (low, high))
        after = metrics.error_sums(denoised, clean, data_range=high - low)
        before = metrics.error_sums(noisy, clean, data_range=high - low)
        return {"reference_uri": uri, **reference_figures(after, before)}

    def _region_against_reference(
        self, facts: Facts, core: tuple[slice, slice], noisy: Array, denoised: Array
    ) -> Facts:
        """Return sums that merge over the regions, of `core`, a region's place in the image."""
        root = self.job.config.reference
        if root is None:
            return {}
        uri = join(root, facts["path"])
        try:
            with open_image(storage_for(root, self.job.options), uri) as file:
                header = read_header(file, name=uri, max_pixels=1 << 62)
                if not header.windowed or np.dtype(header.dtype) != denoised.dtype:
                    return {
                        "reference_problem": f"{uri}: {header.dtype} {header.format}; that "
                        f"of a large image has to be a Zarr or a tiled TIFF of {denoised.dtype}"
                    }
                shape = [header.height, header.width, header.channels]
                if shape != [*facts["size"], denoised.shape[2]]:
                    return {"reference_problem": f"{uri}: shape {tuple(shape)}"}
                clean, _ = read_window(file, y=core[0], x=core[1], name=uri)
        except (ImageError, StorageError) as error:
            return {"reference_problem": str(error)}
        low, high = facts["data_range"]
        before = metrics.error_sums(noisy, clean, data_range=high - low)
        after = (
            before
            if denoised is noisy
            else metrics.error_sums(denoised, clean, data_range=high - low)
        )
        return {"reference_uri": uri, "after": asdict(after), "before": asdict(before)}

    def _copy_streamed(self, facts: Facts) -> None:
        """Copy a large quiet image."""
        source = storage_for(facts["source_uri"], self.job.options)
        config, sums = self.job.config, []
        regions = regions_of(self.job, {**facts, "in_regions": True})
        with open_image(source, facts["source_uri"]) as file:
            for region in regions if config.reference is not None else ():
                y0, y1, x0, x1 = region.core
                core = slice(y0, y1), slice(x0, x1)
                pixels, _ = read_window(file, y=core[0], x=core[1], name=facts["path"])
                sums.append(self._region_against_reference(facts, core, pixels, pixels))
                if "reference_problem" in sums[-1]:
                    break
        if is_bundle(facts["source_uri"]):
            copy_folder(source, facts["source_uri"], self.output, facts["output_uri"])
        else:
            copy_file(source, facts["source_uri"], self.output, facts["output_uri"])
        if sums:
            facts |= merge_reference(sums)
        facts |= {"metadata_lost": [], **untouched(facts)}

    @staticmethod
    def _same_units(reference: DecodedImage, dtype: Any, low: float, high: float) -> Array:
        if reference.pixels.dtype == dtype:
            return reference.pixels
        own = data_range(reference.pixels, bits=reference.header.bits)
        unit = (reference.pixels.astype(np.float32) - own[0]) / (own[1] - own[0])
        return to_dtype(unit * (high - low) + low, dtype, low, high)

    def _stage_region(self, item: Item) -> None:
        facts = item.facts
        denoised = item.array("denoised")
        y0, y1, x0, x1 = region_of(self.job, facts).core
        core = core_in_window(self.job, facts)
        alpha = item.array("alpha")[core] if item.alpha is not None else None
        if item.pixels is not None:
            noisy = item.array("pixels")[core]
            if "sigma_out" not in facts:
                facts |= measures(self.job, facts, noisy, denoised)
            place = slice(y0, y1), slice(x0, x1)
            facts |= self._region_against_reference(facts, place, noisy, denoised)
        samples = self._samples(facts, denoised, alpha)
        buffer = io.BytesIO()
        np.save(buffer, samples, allow_pickle=False)
        pixels = self.job.staging(facts, f"{facts['region']:06d}.npy")
        write_output(self.output, pixels, buffer.getbuffer())
        # The marker comes last: a region with it is finished, whatever happens afterwards.
        marker = {k: v for k, v in facts.items() if k != "started_at"} | {"run_id": self.job.run_id}
        uri = self.job.staging(facts, f"{facts['region']:06d}.json")
        write_output(self.output, uri, json.dumps(marker).encode())

    def _samples(self, facts: Facts, denoised: Array, alpha: Array | None) -> Array:
        """Return channels and alpha in the output's dtype."""
        dtype = output_dtype(self.job, facts["dtype"])
        if dtype != denoised.dtype:
            low, high = facts["data_range"]
            if alpha is not None:
                alpha = rescale(alpha, dtype, source=data_range(alpha.dtype))
            denoised = rescale(denoised, dtype, source=(low, high))
        return denoised if alpha is None else np.dstack([denoised, alpha])


def output_dtype(job: Job, dtype: str) -> np.dtype[Any]:
    """Return the dtype that the settings make of an image's own."""
    return np.dtype(BIT_DEPTHS.get(job.config.bit_depth, dtype))


@contextmanager
def no_fault_of_an_image() -> Iterator[None]:
    """Raise RunFailed in place of what would befall every other image too: a full disk, say."""
    try:
        yield
    except (AccessDenied, StorageUnavailable) as error:
        raise RunFailed(str(error)) from None


def write_output(storage: Storage, uri: str, data: Any) -> None:
    """Write to the output. Raises StorageError for what concerns `uri` alone, else RunFailed."""
    with no_fault_of_an_image():
        storage.write(uri, data)


def copy_file(source: Storage, uri: str, output: Storage, target: str) -> None:
    """Copy a file of any size by way of a temporary one."""
    with source.open(uri) as file, tempfile.TemporaryDirectory(prefix="denoise-") as folder:
        path = Path(folder) / "image.tif"
        with path.open("wb") as copy:
            shutil.copyfileobj(file, copy, 1 << 24)
        with no_fault_of_an_image():
            output.upload(path, target)


def copy_folder(source: Storage, uri: str, output: Storage, target: str) -> None:
    """Copy a Zarr, file by file; it appears whole. Raises ImageError where the source fails."""

    def files() -> Iterator[tuple[str, bytes]]:
        try:
            for entry in source.tree(uri):
                yield entry.path, source.read(entry.uri)
        except StorageError as error:
            raise ImageError(f"{error} (of the folder {uri})") from error

    with no_fault_of_an_image():
        output.publish(target, files(), last=METADATA_FILES)


def publish_image(job: Job, facts: Facts) -> tuple[str, ...]:
    """Assemble an image's staged regions to one TIFF or Zarr and publish it.

    The regions stay, so that it can be done again. Memory is bounded by one row of regions. Returns
    the names of what metadata was lost.
    """
    from denoise_core.assemble import Region as Piece
    from denoise_core.assemble import assemble_tiff, zarr_files

    source = storage_for(facts["source_uri"], job.options)
    output = storage_for(job.config.output, job.options)
    with open_image(source, facts["source_uri"]) as file:
        header = read_header(file, name=facts["path"], max_pixels=1 << 62)
        metadata = read_metadata(file, name=facts["path"])

    def load(uri: str) -> Array:
        return np.load(io.BytesIO(output.read(uri)), allow_pickle=False)

    pieces = []
    for index, region in enumerate(regions_of(job, {**facts, "in_regions": True})):
        y0, y1, x0, x1 = region.core
        uri = job.staging(facts, f"{index:06d}.npy")
        pieces.append(Piece(y0, x0, y1 - y0, x1 - x0, partial(load, uri)))
    if (metadata.format, job.config.format) == ("zarr", "preserve"):
        lost = metadata.lost
        files = zarr_files(pieces, header=header, metadata=metadata)
        with no_fault_of_an_image():
            output.publish(facts["output_uri"], files, last=METADATA_FILES)
    else:
        with tempfile.TemporaryDirectory(prefix="denoise-") as folder:
            path = Path(folder) / "image.tif"
            lost = assemble_tiff(
                pieces,
                path=path,
                header=header,
                metadata=metadata,
                dtype=output_dtype(job, header.dtype).name,
                compression=job.config.compression,
            )
            lost = tuple(dict.fromkeys((*lost, *left_behind(metadata, "tiff"))))
            with no_fault_of_an_image():
                output.upload(path, facts["output_uri"])
    return lost


def drop_regions(job: Job, facts: Facts) -> None:
    """Delete the staged regions of an image whose row is safe."""
    output = storage_for(job.config.output, job.options)
    # Markers go first: one without its pixels would tell the next run of a region that is no more.
    for kind in ("json", "npy"):
        for region in range(facts["regions"]):
            output.delete(job.staging(facts, f"{region:06d}.{kind}"))
