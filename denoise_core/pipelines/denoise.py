"""Bulk denoising on Ray Data: plan, run the stages, collect rows, publish.

The driver lists, keeps the lock and the journal, and shows progress. It never holds a pixel and
never imports TensorFlow.
"""

from __future__ import annotations

import json
import logging
import platform
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import ray
import ray.data

from denoise_core import results, worklist
from denoise_core.checkpoints import Checkpoint, load_checkpoint
from denoise_core.config import DenoiseConfig, as_dict, parse_actors, pixel_hash
from denoise_core.denoiser import resolve_geometry
from denoise_core.errors import ImageError, RunFailed, StorageError, UsageError
from denoise_core.lock import output_lock
from denoise_core.pipelines.stages import (
    Denoise,
    Expand,
    Facts,
    Job,
    Ledger,
    Read,
    Write,
    now,
    publish_image,
)
from denoise_core.storage import Storage, StorageOptions, expand, join, storage_for

# A shard of rows is written when this many seconds or rows have gathered.
FLUSH_S = 1.0
FLUSH_ROWS = 2_000
# Source bytes of the images that share one read task: small ones travel together.
TASK_BYTES = 4_000_000
TASK_IMAGES = 32
# A run without any finished row for this long, beyond one image's own limit, is stuck.
NO_PROGRESS_S = 600


@dataclass(slots=True)
class Totals:
    """What a run has done so far; `skipped` were done by earlier runs."""

    to_do: int = 0
    skipped: int = 0
    ok: int = 0
    copied: int = 0
    failed: int = 0
    old_failures: int = 0
    megapixels: float = 0.0
    first_image_s: float | None = None
    seconds: float = 0.0

    @property
    def done(self) -> int:
        """Images that this run has finished, failed ones included."""
        return self.ok + self.copied + self.failed

    def error_rate(self) -> float:
        """Share of failed images of all inputs of this run, earlier failures included."""
        return (self.failed + self.old_failures) / max(1, self.done + self.skipped)


@dataclass(slots=True)
class Outcome:
    """How a run ended."""

    run_id: str
    totals: Totals
    within_budget: bool
    dry_run: bool = False
    listed: list[str] = field(default_factory=list)
    worst_failures: list[Facts] = field(default_factory=list)


class Watcher:
    """What a run tells while it goes on; a display overrides what it wants to show."""

    def note(self, text: str) -> None:
        """Tell something worth a line."""

    def update(self, totals: Totals) -> None:
        """Tell of progress; called at least once a second."""


def run_denoising(config: DenoiseConfig, *, watcher: Watcher) -> Outcome:
    """Denoise `config.inputs` to `config.output`.

    Ray must be initialised. Raises UsageError for settings that cannot work, OutputLocked where
    another run holds the output, RunFailed where this one cannot go on.
    """
    options = StorageOptions(s3_endpoint=config.s3_endpoint)
    storage = storage_for(config.output, options)
    checkpoint = load_checkpoint(config.model)
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    job = _make_job(config, checkpoint, run_id=run_id, options=options)
    _refuse_circular(config)
    if config.dry_run:
        return _dry_run(job, storage)
    with output_lock(storage, config.output, run_id=run_id) as taken_from:
        if taken_from:
            watcher.note(f"Took over the lock of run {taken_from}, which is dead.")
        return _Run(job, checkpoint, storage, watcher).run()


def _make_job(
    config: DenoiseConfig, checkpoint: Checkpoint, *, run_id: str, options: StorageOptions
) -> Job:
    geometry = resolve_geometry(checkpoint.card, patch=config.patch, halo=config.halo)
    auto = float(checkpoint.card.get("break_even_sigma", 0.0))
    return Job(
        config=config,
        run_id=run_id,
        options=options,
        geometry=geometry,
        model_id=checkpoint.name,
        model_hash=checkpoint.hash,
        config_hash=pixel_hash(config, model_hash=checkpoint.hash),
        copy_below=auto if config.copy_below == "auto" else float(config.copy_below),
    )


def _refuse_circular(config: DenoiseConfig) -> None:
    for uri in config.inputs:
        if worklist.is_own(config.output, uri):
            raise UsageError(
                f"INPUT {uri} lies among the outputs of --output {config.output}: "
                "name another output."
            )


def _listing(job: Job) -> Iterator[Any]:
    config = job.config
    return expand(
        config.inputs,
        job.options,
        recursive=config.recursive,
        include=config.include,
        exclude=config.exclude,
    )


def _planner(job: Job, storage: Storage) -> worklist.Planner:
    done = results.Done.load(storage, job.config.output)
    present = worklist.outputs_present(storage, job.config.output) if done.images else None
    if done.images and job.config.existing == "fail":
        raise UsageError(
            f"--existing fail: {job.config.output} already holds {len(done.images)} image(s)."
        )
    return worklist.Planner(job.config, job.config_hash, done, present)


def _dry_run(job: Job, storage: Storage) -> Outcome:
    planner = _planner(job, storage)
    listed = [
        (item.item if isinstance(item, worklist.Refusal) else item).source_uri
        for item in planner.plan(_listing(job))
    ]
    counts = planner.counts
    totals = Totals(to_do=counts.to_do, skipped=counts.skipped, failed=counts.refused)
    return Outcome(job.run_id, totals, True, dry_run=True, listed=listed)


class _Run:
    """One run's state on the driver."""

    def __init__(
        self, job: Job, checkpoint: Checkpoint, storage: Storage, watcher: Watcher
    ) -> None:
        self.job, self.checkpoint, self.storage, self.watcher = job, checkpoint, storage, watcher
        self.out = job.config.output
        self.journal = results.Journal(storage, self.out, run_id=job.run_id)
        self.totals = Totals()
        self.failures: list[Facts] = []
        self.taken: set[str] = set()
        self.partial: dict[str, dict[int, Facts]] = {}
        self.assembling: list[Any] = []
        self.unreferenced = 0
        self.started = time.monotonic()
        self.flushed = time.monotonic()

    def run(self) -> Outcome:
        """Plan, work, publish. The journal is flushed and published however it ends."""
        self.storage.delete(join(self.out, "_SUCCESS"))
        shards = self._plan()
        self._write_run_json(finished=False)
        try:
            if shards:
                self._work(shards)
            self._finish_assembly(wait=True)
        finally:
            self.journal.flush()
            self._tick(force=True)
            results.publish(self.storage, self.out, run_id=self.job.run_id)
        for uri in shards:
            self.storage.delete(uri)
        within = self.totals.error_rate() <= self.job.config.max_error_rate
        self._write_run_json(finished=True)
        if within:
            self.storage.write(join(self.out, "_SUCCESS"), b"")
        return Outcome(self.job.run_id, self.totals, within, worst_failures=self.failures[:5])

    def _plan(self) -> list[str]:
        planner = _planner(self.job, self.storage)
        items = planner.plan(_listing(self.job))
        shards = []
        for uri, refusals in worklist.write_shards(
            self.storage, self.out, items, run_id=self.job.run_id
        ):
            shards += [uri] if uri else []
            for refusal in refusals:
                self._take(self._refused(refusal))
        counts = planner.counts
        self.totals.to_do = counts.to_do + counts.refused
        self.totals.skipped, self.totals.old_failures = counts.skipped, counts.old_failures
        self.mean_bytes = counts.bytes_to_do / max(1, counts.to_do)
        if counts.listed == 0:
            raise UsageError(
                f"No inputs found in {', '.join(self.job.config.inputs)}: "
                "check the path, --include and --exclude."
            )
        return shards

    def _refused(self, refusal: worklist.Refusal) -> Facts:
        item = {name: getattr(refusal.item, name) for name in worklist.WORK_SCHEMA.names}
        return {
            **item,
            "regions": 1,
            "attempts": 1,
            "started_at": now(),
            "finished_at": now(),
            "error_stage": "plan",
            "error_type": type(refusal.error).__name__,
            "error_message": str(refusal.error),
        }

    def _work(self, shards: list[str]) -> None:
        ledger = Ledger.remote()
        dataset = build_dataset(
            self.job,
            shards,
            ledger,
            model=self.job.config.model,
            mean_bytes=self.mean_bytes,
            images=self.totals.to_do,
        )
        try:
            for batch in dataset.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                for text in batch["facts"].to_pylist():
                    self._take(json.loads(text))
                self._finish_assembly(wait=False)
                self._tick()
        except ray.exceptions.RayError as error:
            raise RunFailed(f"Ray could not go on: {_last_line(error)}") from error

    def _take(self, facts: Facts) -> None:
        if facts["image_id"] in self.taken:
            # Machines that are lost leave some rows to be made twice; the first counts.
            return
        if facts["regions"] > 1 and "error_type" not in facts:
            regions = self.partial.setdefault(facts["image_id"], {})
            regions[facts["region"]] = facts
            if len(regions) == facts["regions"]:
                merged = merge_regions(list(self.partial.pop(facts["image_id"]).values()))
                self.assembling.append(assemble_image.remote(self.job, merged))
            return
        self.taken.add(facts["image_id"])
        self.partial.pop(facts["image_id"], None)
        self._count(facts)
        self.journal.append(to_row(self.job, facts))

    def _finish_assembly(self, *, wait: bool) -> None:
        while self.assembling:
            ready, self.assembling = ray.wait(self.assembling, timeout=1.0 if wait else 0)
            for facts in ray.get(ready):
                self._take(facts)
            self._tick()
            if not wait and not ready:
                return

    def _count(self, facts: Facts) -> None:
        totals = self.totals
        if "error_type" in facts:
            totals.failed += 1
            self.failures.append(facts)
            self.failures = self.failures[:100]
            return
        totals.copied += bool(facts.get("copied"))
        totals.ok += not facts.get("copied")
        height, width = facts["size"]
        totals.megapixels += height * width / 1e6
        self.unreferenced += "reference_problem" in facts
        if totals.first_image_s is None:
            totals.first_image_s = time.monotonic() - self.started

    def _tick(self, *, force: bool = False) -> None:
        moment = time.monotonic()
        self.totals.seconds = moment - self.started
        rows = len(self.journal.waiting)
        if force or moment - self.flushed >= FLUSH_S or rows >= FLUSH_ROWS:
            self.journal.flush()
            self.flushed = time.monotonic()
            self.watcher.update(self.totals)

    def _write_run_json(self, *, finished: bool) -> None:
        job, totals = self.job, self.totals
        content = {
            "run_id": job.run_id,
            "finished": finished,
            "finished_at": now() if finished else None,
            "config": as_dict(job.config),
            "config_hash": job.config_hash,
            "patch": job.geometry.patch,
            "halo": job.geometry.halo,
            "model": {k: v for k, v in self.checkpoint.card.items() if k != "arguments"},
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("ray", "keras", "numpy", "pyarrow")},
            },
            "counts": {
                "to_do": totals.to_do,
                "skipped": totals.skipped,
                "ok": totals.ok,
                "copied": totals.copied,
                "failed": totals.failed,
                "earlier_failures": totals.old_failures,
                "without_reference": self.unreferenced,
            },
            "megapixels": round(totals.megapixels, 3),
            "seconds": round(totals.seconds, 3),
            "first_image_seconds": totals.first_image_s,
        }
        data = json.dumps(content, indent=1).encode()
        self.storage.write(join(self.out, "run.json"), data)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@dataclass(frozen=True, slots=True)
class Resources:
    """What one actor asks of Ray, and the threads that TensorFlow may use in it."""

    actors: tuple[int, int]
    cpus: float
    gpus: float
    threads: int | None


def choose_resources(config: DenoiseConfig, cluster: dict[str, float]) -> Resources:
    """Share the cluster's GPUs, or where there are none its CPUs, among the actors.

    On CPUs the actors ask for half of the cores in total, so that reading and writing never
    starve (ray#44687), while their threads cover all of them. A hundredth less keeps an actor's
    request unequal to a task's: Ray Data fuses equal neighbours, and decoding would wait for the
    model.
    """
    cpus, gpus = int(cluster.get("CPU", 1)), cluster.get("GPU", 0.0)
    wanted = parse_actors(config.actors)
    share = None if config.gpus_per_actor == "auto" else float(config.gpus_per_actor)
    if share is not None and share > gpus:
        raise UsageError(
            f"--gpus-per-actor {share:g}: the cluster has {gpus:g} GPU(s). Use 'auto' for CPUs."
        )
    if gpus > 0 and share != 0.0:
        share = share or 1.0
        return Resources(wanted or (1, max(1, int(gpus / share))), 1.0, share, None)
    count = wanted or ((min(cpus, 2),) * 2 if cpus <= 4 else (cpus // 4,) * 2)
    threads = max(1, cpus // count[1])
    return Resources(count, max(0.01, round(0.5 * cpus / count[1], 2) - 0.01), 0.0, threads)


def build_dataset(
    job: Job, shards: list[str], ledger: Any, *, model: str, mean_bytes: float, images: int
) -> ray.data.Dataset:
    """Return the lazy pipeline from work-list shards to rows of facts."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.execution_options.verbose_progress = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Ray retries what died without end; the ledger ends it for a poisoned image, this for the rest.
    context.execution_no_progress_timeout_s = int(NO_PROGRESS_S + job.config.timeout_per_image)
    config = job.config
    resources = choose_resources(config, ray.cluster_resources())
    together = int(max(1, min(TASK_IMAGES, TASK_BYTES // max(1, mean_bytes))))
    # With few images, smaller tasks keep every actor busy.
    together = max(1, min(together, images // (4 * resources.actors[1]) or 1))
    task = {"num_cpus": 0.5}
    dataset = ray.data.from_items(
        [{"shard": uri} for uri in shards], override_num_blocks=len(shards)
    )
    dataset = dataset.flat_map(_ReadShard(job), **task)
    dataset = dataset.repartition(target_num_rows_per_block=together)
    dataset = dataset.map_batches(
        Expand(job, ledger), batch_format="pyarrow", batch_size=None, **task
    )
    dataset = dataset.map_batches(
        Read(job, ledger), batch_format="pyarrow", batch_size=None, **task
    )
    dataset = dataset.map_batches(
        Denoise,
        fn_constructor_args=(job, ledger),
        fn_constructor_kwargs={
            "model": model,
            "threads": resources.threads,
            "use_gpu": resources.gpus > 0,
        },
        batch_format="pyarrow",
        batch_size=max(together, 1),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus or None,
        compute=ray.data.ActorPoolStrategy(
            min_size=resources.actors[0], max_size=resources.actors[1]
        ),
    )
    return dataset.map_batches(Write(job, ledger), batch_format="pyarrow", batch_size=None, **task)


@dataclass(frozen=True, slots=True)
class _ReadShard:
    job: Job

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        storage = storage_for(row["shard"], self.job.options)
        rows: list[dict[str, Any]] = worklist.read_shard(storage, row["shard"]).to_pylist()
        return rows


def to_row(job: Job, facts: Facts) -> results.Row:
    """Turn an item's final facts into a row of the report."""
    failed = "error_type" in facts
    height, width = facts.get("size", (None, None))
    shape = facts.get("shape", (None, None, None))
    same = {
        name: facts.get(name)
        for name in (
            "image_id", "source_uri", "source_bytes", "source_fingerprint", "dtype", "has_alpha",
            "patches", "sigma_in", "sigma_out", "mean_shift", "clipped_fraction",
            "residual_autocorrelation", "seam_ratio", "psnr", "ssim", "mse", "psnr_noisy",
            "ssim_noisy", "mse_noisy", "reference_uri", "data_range", "metadata_lost", "attempts",
            "error_stage", "error_type", "error_message", "read_ms", "denoise_ms", "write_ms",
            "device", "node_id",
        )
    }  # fmt: skip
    return results.new_row(
        **same,
        run_id=job.run_id,
        regions=facts.get("region_count", facts["regions"]),
        output_uri=None if failed else facts["output_uri"],
        status="failed" if failed else "copied" if facts.get("copied") else "ok",
        width=width,
        height=height,
        channels=shape[2],
        model_id=job.model_id,
        model_hash=job.model_hash,
        config_hash=job.config_hash,
        patch=job.geometry.patch,
        halo=job.geometry.halo,
        strength=job.config.strength,
        started_at=datetime.fromisoformat(facts["started_at"]),
        finished_at=datetime.fromisoformat(facts["finished_at"]),
    )


def merge_regions(regions: list[Facts]) -> Facts:
    """Merge the facts of an image's regions: sums of times, means weighted by the regions' pixels.

    Sigmas, shifts and correlations of regions are averaged; they are estimates of one quantity.
    """
    regions = sorted(regions, key=lambda facts: facts["region"])
    weights = np.array([np.prod(facts["core_shape"][:2]) for facts in regions], float)
    weights /= weights.sum()
    merged = dict(regions[0])
    for name in ("read_ms", "denoise_ms", "write_ms", "patches"):
        merged[name] = sum(facts.get(name, 0) for facts in regions)
    for name in (
        "sigma_in",
        "sigma_out",
        "clipped_fraction",
        "residual_autocorrelation",
        "seam_ratio",
    ):
        known = [(f[name], w) for f, w in zip(regions, weights, strict=True) if f[name] is not None]
        total = sum(w for _, w in known)
        merged[name] = sum(v * w for v, w in known) / total if total else None
    shifts = np.array([facts["mean_shift"] for facts in regions])
    merged["mean_shift"] = (weights @ shifts).tolist()
    merged["attempts"] = max(facts["attempts"] for facts in regions)
    return merged


@ray.remote(num_cpus=0.5, max_retries=3)
def assemble_image(job: Job, facts: Facts) -> Facts:
    """Stream the staged regions of one image to a tiled TIFF and publish it in one atomic step."""
    facts = {**facts, "regions": 1, "region_count": facts["regions"]}
    try:
        facts["metadata_lost"] = list(publish_image(job, facts))
    except (ImageError, StorageError) as error:
        facts |= {
            "error_stage": "write",
            "error_type": type(error).__name__,
            "error_message": str(error),
        }
    return {**facts, "finished_at": now()}
