"""The stages of bulk denoising: expand, read, denoise, write. Each maps Arrow tables to tables.

Between stages a row is the work item's facts as one JSON text, and the pixels as raw bytes, so
that images of any shapes and dtypes share a table. Every stage catches an image's own error and
notes it in the facts; the write stage turns it into a failed row. A bug still stops the run.
"""

from __future__ import annotations

import faulthandler
import io
import json
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from denoise_core import metrics
from denoise_core.config import DenoiseConfig, parse_data_range
from denoise_core.denoiser import Denoiser, Geometry, Part
from denoise_core.errors import (
    ImageError,
    ImageTimeout,
    StorageError,
    WorkerDied,
)
from denoise_core.images import (
    DecodedImage,
    ImageMetadata,
    data_range,
    decode,
    encode,
    read_header,
    read_metadata,
    read_window,
    to_dtype,
)
from denoise_core.storage import StorageOptions, join, storage_for
from denoise_core.tiling import Region

Array = np.ndarray
Facts = dict[str, Any]

BUFFERS = ("pixels", "denoised", "alpha", "metadata")
TABLE_SCHEMA = pa.schema([("facts", pa.string()), *((name, pa.large_binary()) for name in BUFFERS)])

# A TIFF below this many pixels is one region even where its tiles could be read one by one.
REGION_FROM_PIXELS = 36_000_000
# A watchdog ends the process itself this many times the limit after the polite time-out failed.
HARD_TIMEOUT = 1.5


@dataclass(frozen=True, slots=True)
class Job:
    """What every stage of one run needs to know. Picklable; holds no credential."""

    config: DenoiseConfig
    run_id: str
    options: StorageOptions
    geometry: Geometry
    model_id: str
    model_hash: str
    config_hash: str
    copy_below: float

    def staging(self, facts: Facts, name: str) -> str:
        """URI of one region's file between its writer and the assembly of its image."""
        work = f"{facts['image_id']}-{self.config_hash}-{facts['source_fingerprint']}"
        return join(self.config.output, ".denoise", "regions", work, name)


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


@ray.remote(num_cpus=0)
class Ledger:
    """Counts how often work on an image was begun and not ended: attempts that killed a worker."""

    def __init__(self) -> None:
        self.open: dict[str, int] = {}

    def begin(self, keys: list[str]) -> list[int]:
        """Note the start of work; return how many times each was started without an end."""
        for key in keys:
            self.open[key] = self.open.get(key, 0) + 1
        return [self.open[key] for key in keys]

    def end(self, keys: list[str]) -> None:
        """Note that the worker outlived the work."""
        for key in keys:
            self.open.pop(key, None)


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
    faulthandler.dump_traceback_later(seconds * HARD_TIMEOUT + 5, exit=True, file=sys.__stderr__)
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

    def begin(self, items: list[Item]) -> None:
        """Count the attempts; mark those that have used up theirs as failed."""
        attempts = ray.get(self.ledger.begin.remote([self.key(item.facts) for item in items]))
        for item, count in zip(items, attempts, strict=True):
            item.facts["attempts"] = max(count, item.facts.get("attempts", 1))
            if count > self.job.config.max_attempts:
                item.facts["attempts"] = self.job.config.max_attempts
                self.fail(
                    item,
                    WorkerDied(
                        f"the worker died {self.job.config.max_attempts} times at this image, in "
                        f"stage {self.stage}; look at the image alone, or at the workers' memory."
                    ),
                )

    def end(self, items: list[Item]) -> None:
        """Tell the ledger that this process outlived the items."""
        self.ledger.end.remote([self.key(item.facts) for item in items])

    def fail(self, item: Item, error: Exception) -> None:
        """Note an error in the facts and drop the pixels."""
        item.facts |= {
            "error_stage": self.stage,
            "error_type": type(error).__name__,
            "error_message": str(error),
        }
        item.pixels = item.denoised = item.alpha = item.metadata = None

    @contextmanager
    def catch(self, items: list[Item]) -> Iterator[None]:
        """Turn an image's error in the body into facts and add the time to each item's."""
        started = time.perf_counter()
        seconds = self.job.config.timeout_per_image * len(items)
        try:
            with deadline(seconds, items[0].facts["path"]):
                yield
        except (ImageError, StorageError) as error:
            for item in items:
                self.fail(item, error)
        except MemoryError as error:
            for item in items:
                self.fail(item, ImageError(f"not enough memory ({error}); use a tiled TIFF."))
        spent = (time.perf_counter() - started) * 1e3 / len(items)
        for item in items:
            item.facts[f"{self.stage}_ms"] = round(spent, 3)


def now() -> str:
    """The time as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat()


class Expand:
    """Work list row -> one item for each region. Opens headers of TIFFs, of nothing else."""

    def __init__(self, job: Job, ledger: Any) -> None:
        self.job, self.guard = job, Guard(job, "read", ledger)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Map rows of WORK_SCHEMA to rows of TABLE_SCHEMA."""
        for row in table.to_pylist():
            item = Item({**row, "started_at": now(), "regions": 1, "region": 0})
            items = [item]
            with self.guard.catch(items):
                items = self._regions(item)
            yield from map(to_table, items)

    def _regions(self, item: Item) -> list[Item]:
        facts = item.facts
        if not facts["path"].lower().endswith((".tif", ".tiff")):
            return [item]
        storage = storage_for(facts["source_uri"], self.job.options)
        with storage.open(facts["source_uri"]) as file:
            try:
                header = read_header(file, name=facts["path"], max_pixels=1 << 62)
            except ImageError:
                # The read stage meets the same error and has the whole file to explain it.
                return [item]
        pixels = header.height * header.width
        if not header.windowed or header.format != "tiff" or pixels < REGION_FROM_PIXELS:
            return [item]
        size = self.job.config.region
        count = len(self.job.geometry.regions(header.height, header.width, region=size))
        facts |= {"regions": count, "size": [header.height, header.width]}
        return [Item({**facts, "region": index}) for index in range(count)]


class Read:
    """Fetch and decode; estimate the noise; decide whether the image is copied."""

    def __init__(self, job: Job, ledger: Any) -> None:
        self.job, self.guard = job, Guard(job, "read", ledger)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Fill in `pixels`, `alpha` and `metadata`."""
        for item in to_items(table):
            if not item.failed:
                self.guard.begin([item])
                if not item.failed:
                    with self.guard.catch([item]):
                        self._read(item)
                self.guard.end([item])
            yield to_table(item)

    def _read(self, item: Item) -> None:
        facts = item.facts
        storage = storage_for(facts["source_uri"], self.job.options)
        if facts["regions"] > 1:
            self._read_region(item, storage)
            return
        data = storage.read(facts["source_uri"])
        image = decode(data, name=facts["path"], max_pixels=self.job.config.max_pixels)
        low, high = parse_data_range(self.job.config.data_range) or data_range(
            image.pixels, bits=image.header.bits
        )
        self._note(facts, image.pixels, low, high, has_alpha=image.alpha is not None)
        facts["size"] = list(image.pixels.shape[:2])
        facts["sigma_in"] = metrics.estimate_sigma(image.pixels, data_range=high - low)
        item.metadata = image.metadata.to_bytes()
        if facts["sigma_in"] < self.job.copy_below and self._keeps_format():
            facts["copied"] = True
        else:
            item.alpha = image.alpha
        item.pixels = image.pixels

    def _keeps_format(self) -> bool:
        config = self.job.config
        return (config.format, config.bit_depth, config.compression) == (
            "preserve",
            "preserve",
            None,
        )

    def _read_region(self, item: Item, storage: Any) -> None:
        facts = item.facts
        staged = self.job.staging(facts, f"{facts['region']:06d}.json")
        target = storage_for(self.job.config.output, self.job.options)
        if target.stat(staged) is not None:
            facts |= json.loads(target.read(staged))
            facts["staged"] = True
            return
        height, width = facts["size"]
        region = region_of(self.job, facts)
        y0, y1, x0, x1 = region.window(height, width)
        with storage.open(facts["source_uri"]) as file:
            pixels, alpha = read_window(file, y=slice(y0, y1), x=slice(x0, x1), name=facts["path"])
            header = read_header(file, name=facts["path"], max_pixels=1 << 62)
        low, high = parse_data_range(self.job.config.data_range) or data_range(
            pixels.dtype, bits=header.bits
        )
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


def region_of(job: Job, facts: Facts) -> Region:
    """Return the region that an item stands for."""
    size = job.config.region if facts["regions"] > 1 else None
    return job.geometry.regions(*facts["size"], region=size)[facts["region"]]


class Denoise:
    """The actor: holds the model, cuts patches of all items it is given, pastes the results."""

    def __init__(
        self, job: Job, ledger: Any, *, model: str, threads: int | None, use_gpu: bool
    ) -> None:
        from denoise_core.checkpoints import load_checkpoint
        from denoise_core.devices import configure_tensorflow

        configure_tensorflow(threads=threads, use_gpu=use_gpu)
        self.job, self.guard = job, Guard(job, "denoise", ledger)
        size = job.config.batch_size
        self.denoiser = Denoiser(
            load_checkpoint(model),
            geometry=job.geometry,
            batch_size=None if size == "auto" else int(size),
            strength=job.config.strength,
            precision=job.config.precision,
        )
        self.denoiser.warm_up()

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Fill in `denoised` with the core's values in the image's own dtype."""
        items = list(to_items(table))
        todo = [
            i for i in items if not (i.failed or i.facts.get("copied") or i.facts.get("staged"))
        ]
        if todo:
            self.guard.begin(todo)
            todo = [item for item in todo if not item.failed]
            # Work that once killed a worker is done alone, so that its neighbours come out.
            suspects = [item for item in todo if item.facts["attempts"] > 1]
            fresh = [item for item in todo if item.facts["attempts"] <= 1]
            for group in (*([item] for item in suspects), fresh):
                self._denoise(group)
            self.guard.end(todo)
        for item in items:
            yield to_table(item)

    def _denoise(self, items: list[Item]) -> None:
        if not items:
            return
        with self.guard.catch(items):
            parts = [self._part(item) for item in items]
            for item, part, values in zip(
                items, parts, self.denoiser.denoise_parts(parts), strict=True
            ):
                low, high = part.low, part.high
                item.denoised = to_dtype(values, item.facts["dtype"], low, high)
                patches = len(part.region.patches)
                item.facts |= {
                    "core_shape": list(values.shape),
                    "patches": patches,
                    "device": self.denoiser.device,
                    "precision": self.denoiser.precision,
                }

    def _part(self, item: Item) -> Part:
        facts = item.facts
        region = region_of(self.job, facts)
        y0, _, x0, _ = region.window(*facts["size"])
        low, high = facts["data_range"]
        return Part(item.array("pixels"), region, (y0, x0), low, high)


class Write:
    """Encode and write; measure; the row that comes out holds no pixels."""

    def __init__(self, job: Job, ledger: Any) -> None:
        self.job, self.guard = job, Guard(job, "write", ledger)
        self.output = storage_for(job.config.output, job.options)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Map items to rows of facts alone."""
        facts = []
        for item in to_items(table):
            if not (item.failed or item.facts.get("staged")):
                self.guard.begin([item])
                if not item.failed:
                    with self.guard.catch([item]):
                        self._write(item)
                self.guard.end([item])
            item.facts["finished_at"] = now()
            item.facts["node_id"] = ray.get_runtime_context().get_node_id()
            facts.append(json.dumps(item.facts))
        yield pa.table({"facts": pa.array(facts, pa.string())})

    def _write(self, item: Item) -> None:
        facts = item.facts
        if facts["regions"] > 1:
            self._stage_region(item)
            return
        if facts.get("copied"):
            data = storage_for(facts["source_uri"], self.job.options).read(facts["source_uri"])
            denoised = noisy = item.array("pixels")
            lost: tuple[str, ...] = ()
        else:
            noisy, denoised = item.array("pixels"), item.array("denoised")
            alpha = item.array("alpha") if item.alpha is not None else None
            config = self.job.config
            data, lost = encode(
                denoised,
                alpha,
                ImageMetadata.from_bytes(bytes(item.metadata)),
                format=config.format,
                bit_depth=config.bit_depth,
                compression=config.compression,
                value_range=tuple(facts["data_range"]),
            )
        self.output.write(facts["output_uri"], data)
        facts["metadata_lost"] = list(lost)
        facts |= self._measures(facts, noisy, denoised)
        facts |= self._against_reference(facts, noisy, denoised)

    def _measures(self, facts: Facts, noisy: Array, denoised: Array) -> Facts:
        low, high = facts["data_range"]
        region = region_of(self.job, facts)
        y0, _, x0, _ = region.core
        sums = metrics.residual_sums(
            noisy,
            denoised,
            lo=low,
            hi=high,
            cuts_y=[tile.start - y0 for tile in region.rows[1:]],
            cuts_x=[tile.start - x0 for tile in region.columns[1:]],
        )
        stats = sums.stats()
        return {
            "sigma_out": facts["sigma_in"]
            if facts.get("copied")
            else metrics.estimate_sigma(denoised, data_range=high - low),
            "mean_shift": list(stats.mean_shift),
            "clipped_fraction": stats.clipped_fraction,
            "residual_autocorrelation": stats.residual_autocorrelation,
            "seam_ratio": stats.seam_ratio,
        }

    def _against_reference(self, facts: Facts, noisy: Array, denoised: Array) -> Facts:
        root = self.job.config.reference
        if root is None:
            return {}
        uri = join(root, facts["path"])
        storage = storage_for(root, self.job.options)
        try:
            reference = decode(storage.read(uri), name=uri, max_pixels=self.job.config.max_pixels)
        except (ImageError, StorageError) as error:
            return {"reference_problem": str(error)}
        if reference.pixels.shape != denoised.shape:
            return {"reference_problem": f"{uri}: shape {reference.pixels.shape}"}
        low, high = facts["data_range"]
        clean = self._same_units(reference, denoised.dtype, low, high)
        after = metrics.error_sums(denoised, clean, data_range=high - low)
        before = metrics.error_sums(noisy, clean, data_range=high - low)
        return {
            "reference_uri": uri,
            "psnr": after.psnr,
            "ssim": after.ssim,
            "mse": after.mse,
            "psnr_noisy": before.psnr,
            "ssim_noisy": before.ssim,
            "mse_noisy": before.mse,
        }

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
        region = region_of(self.job, facts)
        y0, y1, x0, x1 = region.core
        top, _, left, _ = region.window(*facts["size"])
        core = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
        samples = denoised
        if item.alpha is not None:
            samples = np.dstack([denoised, item.array("alpha")[core]])
        buffer = io.BytesIO()
        np.save(buffer, samples, allow_pickle=False)
        self.output.write(self.job.staging(facts, f"{facts['region']:06d}.npy"), buffer.getbuffer())
        facts |= self._measures(facts, item.array("pixels")[core], denoised)
        # The marker comes last: a region with it is finished, whatever happens afterwards.
        marker = json.dumps({k: v for k, v in facts.items() if k not in ("started_at",)}).encode()
        self.output.write(self.job.staging(facts, f"{facts['region']:06d}.json"), marker)


def publish_image(job: Job, facts: Facts) -> tuple[str, ...]:
    """Assemble an image's staged regions to one TIFF, publish it, drop the regions.

    Memory is bounded by one row of regions. Returns the names of what metadata was lost.
    """
    from denoise_core.assemble import Region as Piece
    from denoise_core.assemble import assemble_tiff

    source = storage_for(facts["source_uri"], job.options)
    output = storage_for(job.config.output, job.options)
    with source.open(facts["source_uri"]) as file:
        header = read_header(file, name=facts["path"], max_pixels=1 << 62)
        metadata = read_metadata(file, name=facts["path"])

    def load(uri: str) -> Array:
        return np.load(io.BytesIO(output.read(uri)), allow_pickle=False)

    staged = []
    pieces = []
    for index, region in enumerate(job.geometry.regions(*facts["size"], region=job.config.region)):
        y0, y1, x0, x1 = region.core
        uri = job.staging(facts, f"{index:06d}.npy")
        staged += [uri, uri.replace(".npy", ".json")]
        pieces.append(Piece(y0, x0, y1 - y0, x1 - x0, partial(load, uri)))
    with tempfile.TemporaryDirectory(prefix="denoise-") as folder:
        path = Path(folder) / "image.tif"
        lost = assemble_tiff(pieces, path=path, header=header, metadata=metadata)
        output.upload(path, facts["output_uri"])
    for uri in staged:
        output.delete(uri)
    return lost
