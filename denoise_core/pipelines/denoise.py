"""Bulk denoising: plan, run the stages, collect rows, publish.

The driver lists, keeps the lock and the journal, and shows progress. It never holds a pixel and
never imports TensorFlow; it imports and starts Ray only when there is work.
"""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib.metadata import version
from typing import Any

import numpy as np

from denoise_core import __version__, results, worklist
from denoise_core.checkpoints import Checkpoint, absolute_name, load_checkpoint
from denoise_core.choice import AUTO, AUTO_MODELS
from denoise_core.config import DenoiseConfig, as_dict, pixel_hash
from denoise_core.denoiser import Geometry, resolve_geometry, working_bytes
from denoise_core.devices import NO_GPU, cpu_has_bfloat16, device_memory
from denoise_core.errors import ObjectNotFound, RunFailed, StorageError, UsageError
from denoise_core.images.codecs import SUFFIXES
from denoise_core.lock import Lock, new_run_id, output_lock
from denoise_core.pipelines.job import (
    GROUP_PIXELS,
    SAFE,
    Facts,
    Job,
    Model,
    merge_reference,
    now,
)
from denoise_core.report import build_report
from denoise_core.storage import (
    BUNDLE_SUFFIX,
    Entry,
    Selection,
    Storage,
    StorageOptions,
    absolute,
    expand,
    is_bundle,
    join,
    storage_for,
)

# A shard of rows is written when this many seconds or rows have gathered.
FLUSH_S = 1.0
FLUSH_ROWS = 2_000
# Whose versions are written down.
PACKAGES = ("ray", "tensorflow", "keras", "numpy", "pyarrow")


@dataclass(slots=True)
class Totals:
    """What a run has done so far.

    `skipped` were done by earlier runs, `earlier_failures` of them failed; `left_out` were done by
    none: --retry-failed does not touch them.
    """

    to_do: int = 0
    skipped: int = 0
    left_out: int = 0
    ok: int = 0
    copied: int = 0
    failed: int = 0
    earlier_failures: int = 0
    megapixels: float = 0.0
    first_image_s: float | None = None
    seconds: float = 0.0

    @property
    def done(self) -> int:
        """Images that this run has finished, failed ones included."""
        return self.ok + self.copied + self.failed

    def error_rate(self) -> float:
        """Share of failed images of all inputs of this run, earlier failures included."""
        return (self.failed + self.earlier_failures) / max(1, self.done + self.skipped)


@dataclass(slots=True)
class Outcome:
    """How a run ended. `unreferenced` images have no usable image under --reference;
    `reference_problem` says why, of the first of them.

    `dim` images were copied and use little of their range; `dim_ends` are the least value in them,
    0 at most, and the largest.
    """

    run_id: str
    totals: Totals
    within_budget: bool
    dry_run: bool = False
    listed: list[str] = field(default_factory=list)
    worst_failures: list[Facts] = field(default_factory=list)
    unreferenced: int = 0
    reference_problem: str = ""
    dim: int = 0
    dim_ends: tuple[int, int] = (0, 0)


class Watcher:
    """What a run tells while it goes on; a display overrides what it wants to show."""

    def note(self, text: str) -> None:
        """Tell something worth a line."""

    def update(self, totals: Totals) -> None:
        """Tell of progress; called at least once a second."""


def run_denoising(
    config: DenoiseConfig, *, watcher: Watcher, start_ray: Callable[[], None] | None = None
) -> Outcome:
    """Denoise `config.inputs` to `config.output`.

    `start_ray` is called when there is work; without it Ray must be initialised. Raises UsageError
    for settings that cannot work, OutputLocked where another run holds the output, RunFailed
    where this one cannot go on.
    """
    options = StorageOptions(s3_endpoint=config.s3_endpoint)
    checkpoints = [
        load_checkpoint(name, model_range=config.model_range, tell=watcher.note, options=options)
        for name in candidates(config)
    ]
    storage = storage_for(absolute(config.output), options)
    if config.patch == "auto":
        config = _keep_patch(config, checkpoints, storage, watcher)
    config, geometry = resolve(config, checkpoints[0])
    run_id = new_run_id()
    job = _make_job(config, checkpoints, geometry, run_id=run_id, options=options)
    _refuse_circular(config)
    _refuse_no_reference(config, options)
    for line in model_notes(config, checkpoints[0], job.geometry):
        watcher.note(line)
    if config.dry_run:
        return _dry_run(job, storage)
    _refuse_foreign(storage, config.output)
    with output_lock(storage, config.output, run_id=run_id) as lock:
        if lock.taken_from:
            watcher.note(f"Took over the lock of run {lock.taken_from}, which is dead.")
        return _Run(job, checkpoints, storage, watcher, lock, start_ray or (lambda: None)).run()


def candidates(config: DenoiseConfig) -> tuple[str, ...]:
    """Return the names of the models that a run chooses from."""
    return AUTO_MODELS if config.model == AUTO else (config.model,)


def model_notes(config: DenoiseConfig, checkpoint: Checkpoint, geometry: Geometry) -> Iterator[str]:
    """Yield what a user should know of a Keras file of theirs; of our own models nothing."""
    card = checkpoint.card
    if "notes" not in card:
        return
    low, high = card["data_range"]
    channels = card["arguments"]["channels"]
    sizes = card["input_size"]
    takes = "x".join(map(str, [*sizes, channels])) if sizes else f"any size of {channels} channels"
    least, exact = card["default_halo"], card["exact_halo"]
    yield (
        f"{checkpoint.name}: takes {takes}, values {low:g}:{high:g}; patches of {geometry.patch} "
        f"with a halo of {geometry.halo} (measured: {least}"
        + (f", exact {exact})." if exact > least else ").")
    )
    yield from (f"{checkpoint.name}: {note}" for note in card["notes"])
    if config.precision == "bfloat16":
        yield f"{checkpoint.name}: --precision bfloat16 is for our own models; using float32."


def resolve(config: DenoiseConfig, checkpoint: Checkpoint) -> tuple[DenoiseConfig, Geometry]:
    """Return settings with absolute paths and the patch in pixels, and the model's geometry."""
    memory = device_memory() if config.patch == "auto" else None
    geometry = resolve_geometry(
        checkpoint.card, patch=config.patch, halo=config.halo, memory_bytes=memory
    )
    config = replace(
        config,
        inputs=tuple(map(absolute, config.inputs)),
        output=absolute(config.output),
        reference=absolute(config.reference) if config.reference else None,
        model=config.model if config.model == AUTO else absolute_name(config.model),
        # A number: what another machine would choose makes other pixels, and another hash.
        patch=str(geometry.patch) if config.patch == "auto" else config.patch,
    )
    return config, geometry


def _keep_patch(
    config: DenoiseConfig, checkpoints: list[Checkpoint], storage: Storage, watcher: Watcher
) -> DenoiseConfig:
    """Return settings with the patch of the run before, if its other settings are the same.

    What 'auto' comes to hangs on this machine's memory and cores, and with another patch all images
    would be done again.
    """
    before = _read_run_json(storage, absolute(config.output))
    same = replace(config, patch=str(before.get("patch", "auto")))
    if before.get("config_hash") != pixel_hash(same, model_hash=_model_hash(checkpoints)):
        return config
    watcher.note(f"--patch auto: {same.patch}, as in the run before on this output.")
    return same


def _read_run_json(storage: Storage, out: str) -> dict[str, Any]:
    """Return the run.json of the run before, empty where there was none."""
    try:
        content: dict[str, Any] = json.loads(storage.read(join(out, "run.json")))
    except ObjectNotFound:
        return {}
    return content


def _model_hash(checkpoints: list[Checkpoint]) -> str:
    return "+".join(each.hash for each in checkpoints)


def _make_job(
    config: DenoiseConfig,
    checkpoints: list[Checkpoint],
    geometry: Geometry,
    *,
    run_id: str,
    options: StorageOptions,
) -> Job:
    below = None if config.copy_below == "auto" else float(config.copy_below)
    models = tuple(
        Model(
            name,
            checkpoint.name,
            checkpoint.hash,
            float(checkpoint.card.get("break_even_sigma", 0.0)) if below is None else below,
            float(checkpoint.card.get("break_even_residual", 0.0)) if below is None else 0.0,
            working_bytes(
                checkpoint.card,
                geometry,
                region=config.region,
                batch=_cpu_batch(config, checkpoint.card, geometry),
            ),
        )
        for name, checkpoint in zip(candidates(config), checkpoints, strict=True)
    )
    return Job(
        config=config,
        run_id=run_id,
        options=options,
        geometry=geometry,
        models=models,
        config_hash=pixel_hash(config, model_hash=_model_hash(checkpoints)),
    )


def _cpu_batch(config: DenoiseConfig, card: dict[str, Any], geometry: Geometry) -> int:
    """Return how many patches a CPU computes at once, at most all that an actor holds.

    In float32 it computes them one by one, and by default about so.
    """
    precision = "float32" if card.get("float32_only") else config.precision
    batched = precision == "bfloat16" or (precision == "auto" and cpu_has_bfloat16())
    if config.batch_size == "auto" or not batched:
        return 1
    held = max(GROUP_PIXELS, config.region**2)
    return min(int(config.batch_size), -(-held // geometry.patch**2))


def _refuse_circular(config: DenoiseConfig) -> None:
    own = worklist.Own(config.output)
    for uri in config.inputs:
        if own.holds(uri):
            raise UsageError(
                f"INPUT {uri} lies among the outputs of --output {config.output}: "
                "name another output."
            )
        if is_bundle(uri) and f"{config.output}/".startswith(f"{uri.rstrip('/')}/"):
            raise UsageError(f"--output {config.output} lies inside the image {uri}: name another.")


def _refuse_no_reference(config: DenoiseConfig, options: StorageOptions) -> None:
    """Refuse a reference with nothing in it, of which each image would have to tell."""
    if config.reference is None:
        return
    root = absolute(config.reference)
    try:
        # What cannot be listed is a matter of the images that ask for it.
        first = next(storage_for(root, options).walk(root, Selection()), None)
    except ObjectNotFound as error:
        raise UsageError(f"--reference {error}") from None
    if first is None or (isinstance(first, Entry) and first.uri == root):
        kind = "holds no files" if first is None else "is a file"
        raise UsageError(f"--reference {root}: {kind}; name a folder of clean images.")


def _refuse_foreign(storage: Storage, out: str) -> None:
    """Refuse an OUT whose images came from elsewhere: a run would hide or overwrite them."""
    if not out.startswith("s3://") and storage.stat(out) is not None:
        raise UsageError(f"--output {out}: is a file; name a folder.")
    if storage.stat(join(out, "run.json")) is not None:
        return
    for folder, foreign in (
        ("images", len(worklist.outputs_present(storage, out)) > 0),
        ("reports", _holds_images(storage, join(out, "reports"))),
    ):
        if foreign:
            raise UsageError(
                f"--output {out}: its folder '{folder}' holds files of no earlier run; name "
                "another --output, or move them away."
            )


def _holds_images(storage: Storage, root: str) -> bool:
    suffixes = (*(each for group in SUFFIXES.values() for each in group), BUNDLE_SUFFIX)
    try:
        return any(entry.path.lower().endswith(suffixes) for entry in storage.list(root))
    except ObjectNotFound:
        return False


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


def _plan(job: Job, storage: Storage) -> tuple[worklist.Counts, Iterator[worklist.Planned]]:
    """Return counts that grow as the iterator goes. Raises UsageError where there is no input."""
    planner = _planner(job, storage)

    def items() -> Iterator[worklist.Planned]:
        try:
            yield from planner.plan(_listing(job))
        except ObjectNotFound as error:
            raise UsageError(f"INPUT {error}") from error
        if planner.counts.listed == 0:
            raise UsageError(
                f"No inputs found in {', '.join(job.config.inputs)}: "
                "check the path, --include and --exclude."
            )

    return planner.counts, items()


def _dry_run(job: Job, storage: Storage) -> Outcome:
    counts, items = _plan(job, storage)
    listed = [
        (item.item if isinstance(item, worklist.Refusal) else item).source_uri for item in items
    ]
    totals = Totals(
        to_do=counts.to_do,
        skipped=counts.skipped,
        left_out=counts.left_out,
        failed=counts.refused,
        earlier_failures=counts.earlier_failures,
    )
    return Outcome(job.run_id, totals, True, dry_run=True, listed=listed)


class _Run:
    """One run's state on the driver."""

    def __init__(
        self,
        job: Job,
        checkpoints: list[Checkpoint],
        storage: Storage,
        watcher: Watcher,
        lock: Lock,
        start_ray: Callable[[], None],
    ) -> None:
        self.job, self.checkpoints, self.storage, self.watcher = job, checkpoints, storage, watcher
        self.lock, self.start_ray = lock, start_ray
        self.out = job.config.output
        self.journal = results.Journal(storage, self.out, run_id=job.run_id)
        self.totals = Totals()
        self.failures: list[Facts] = []
        self.taken: set[str] = set()
        self.partial: dict[str, dict[int, Facts]] = {}
        # Images at their assembly, and those that are published but have their regions yet.
        self.assembling: dict[str, Facts] = {}
        self.assembled: list[Facts] = []
        self.unreferenced = self.dim = 0
        self.reference_problem = ""
        self.dim_ends = 0, 0
        # Images by device and precision.
        self.computed: Counter[str] = Counter()
        self.misses_gpu = False
        self.before = _read_run_json(storage, self.out)
        self.started = time.monotonic()
        self.flushed = time.monotonic()

    def run(self) -> Outcome:
        """Plan, work, publish. The journal is flushed and published however it ends."""
        self._sweep("work")
        shards = self._plan()
        if self.totals.to_do or not self._is_published():
            try:
                self._do(shards)
            except StorageError as error:
                # The driver met it first; from a worker it comes in the same words.
                reason = str(error).removesuffix(".")
                raise RunFailed(f"the work stopped: {reason}. {SAFE}") from error
        within = self.totals.error_rate() <= self.job.config.max_error_rate
        success = join(self.out, "_SUCCESS")
        if not within or self.totals.left_out:
            self.storage.delete(success)
        elif self.storage.stat(success) is None:
            self.storage.write(success, b"")
        return Outcome(
            self.job.run_id,
            self.totals,
            within,
            worst_failures=self.failures[:5],
            unreferenced=self.unreferenced,
            reference_problem=self.reference_problem,
            dim=self.dim,
            dim_ends=self.dim_ends,
        )

    def _is_published(self) -> bool:
        """Whether the run before came to its end, and its page, the last report, is there."""
        page = join(self.out, "report.html")
        return bool(self.before.get("finished")) and self.storage.stat(page) is not None

    def _do(self, shards: list[str]) -> None:
        self.storage.delete(join(self.out, "_SUCCESS"))
        self._write_run_json(self._run_json(finished=False))
        with ExitStack() as afterwards:
            try:
                if shards:
                    self._work(shards, afterwards)
            finally:
                # First: who is told to end has seconds.
                self.journal.flush()
                self._tick(force=True)
                results.publish(self.storage, self.out, run_id=self.job.run_id)
        self._sweep("work")
        self._sweep("regions")
        # Last, so that what was killed at the page is not taken for finished.
        content = self._run_json(finished=True)
        build_report(self.out, self.job.options, run=content)
        self._write_run_json(content)

    def _sweep(self, folder: str) -> None:
        """Delete what is of no use once a run is over; killed runs leave some, hidden files too."""
        self.storage.clear(self.out, f".denoise/{folder}")

    def _plan(self) -> list[str]:
        counts, items = _plan(self.job, self.storage)
        shards = []
        for uri, refusals in worklist.write_shards(
            self.storage, self.out, items, run_id=self.job.run_id
        ):
            shards += [uri] if uri else []
            for refusal in refusals:
                self._take(self._refused(refusal))
        self.totals.to_do = counts.to_do + counts.refused
        self.totals.skipped, self.totals.earlier_failures = counts.skipped, counts.earlier_failures
        self.totals.left_out = counts.left_out
        before = self.before.get("config", {}).get("reference")
        if counts.skipped and self.job.config.reference not in (None, before):
            self.watcher.note(
                "--reference is another than before: images that are done keep the figures they "
                "have; --existing overwrite measures them again."
            )
        self.mean_bytes = counts.bytes_to_do / max(1, counts.to_do)
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

    def _work(self, shards: list[str], afterwards: ExitStack) -> None:
        self.start_ray()
        # Only now: Ray Data takes seconds to import, and a run without work needs none of it.
        from denoise_core.pipelines.flow import Flow

        flow = Flow(
            self.job,
            shards,
            mean_bytes=self.mean_bytes,
            images=self.totals.to_do,
            tell=self.watcher.note,
        )
        afterwards.enter_context(flow)
        for facts in flow:
            if facts is not None:
                whole = self._take(facts)
                if whole is not None:
                    self.assembling[whole["image_id"]] = whole
                    flow.assemble(whole)
            self._tick()
            if self.assembled and not self.journal.waiting:
                flow.drop(self.assembled)
                self.assembled = []
        if self.totals.done < self.totals.to_do:
            raise RunFailed(
                f"{self.totals.to_do - self.totals.done} of {self.totals.to_do} images came to no "
                f"end, neither written nor failed. {SAFE}"
            )

    def _take(self, facts: Facts) -> Facts | None:
        """Note what is finished; return an image whose regions are all there, to be assembled."""
        if facts["image_id"] in self.taken:
            # Machines that are lost leave some rows to be made twice; the first counts.
            return None
        if facts["image_id"] in self.assembling and "region_count" not in facts:
            # Such rows again: only what the assembly returns counts now.
            return None
        if facts.get("in_regions") and "error_type" not in facts:
            regions = self.partial.setdefault(facts["image_id"], {})
            regions[facts["region"]] = facts
            if len(regions) < facts["regions"]:
                return None
            return merge_regions(list(self.partial.pop(facts["image_id"]).values()))
        self.taken.add(facts["image_id"])
        self.partial.pop(facts["image_id"], None)
        whole = self.assembling.pop(facts["image_id"], None)
        if whole is not None and "error_type" not in facts:
            self.assembled.append(whole)
        self._count(facts)
        self.journal.append(to_row(self.job, facts))
        return None

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
        if "reference_problem" in facts:
            self.unreferenced += 1
            self.reference_problem = self.reference_problem or facts["reference_problem"]
        if "device" in facts:
            self.computed[f"{facts['device']}, {facts['precision']}"] += 1
        if facts.get("misses_gpu") and not self.misses_gpu:
            self.misses_gpu = True
            self.watcher.note(NO_GPU)
        if "dim" in facts:
            (low, high), (least, most) = self.dim_ends, facts["dim"]
            self.dim, self.dim_ends = self.dim + 1, (min(low, least), max(high, most))
        if totals.first_image_s is None:
            totals.first_image_s = time.monotonic() - self.started

    def _tick(self, *, force: bool = False) -> None:
        moment = time.monotonic()
        self.totals.seconds = moment - self.started
        self.lock.check()
        rows = len(self.journal.waiting)
        if force or moment - self.flushed >= FLUSH_S or rows >= FLUSH_ROWS:
            self.journal.flush()
            self.flushed = time.monotonic()
            self.watcher.update(self.totals)

    def _write_run_json(self, content: dict[str, Any]) -> None:
        data = json.dumps(content, indent=1).encode()
        self.storage.write(join(self.out, "run.json"), data)

    def _run_json(self, *, finished: bool) -> dict[str, Any]:
        """Return what run.json is to hold, as plain JSON types."""
        job, totals = self.job, self.totals
        content = {
            "run_id": job.run_id,
            "finished": finished,
            "finished_at": now() if finished else None,
            "config": as_dict(job.config),
            "config_hash": job.config_hash,
            "patch": job.geometry.patch,
            "halo": job.geometry.halo,
            "models": [
                {k: v for k, v in each.card.items() if k != "arguments"}
                for each in self.checkpoints
            ],
            "versions": {
                "denoise-jobs": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in PACKAGES},
            },
            "counts": {
                "to_do": totals.to_do,
                "skipped": totals.skipped,
                "left_out": totals.left_out,
                "ok": totals.ok,
                "copied": totals.copied,
                "failed": totals.failed,
                "earlier_failures": totals.earlier_failures,
                "without_reference": self.unreferenced,
            },
            "computed_on": dict(self.computed),
            "megapixels": round(totals.megapixels, 3),
            "seconds": round(totals.seconds, 3),
            "first_image_seconds": totals.first_image_s,
        }
        plain: dict[str, Any] = json.loads(json.dumps(content))
        return plain


def to_row(job: Job, facts: Facts) -> results.Row:
    """Turn an item's final facts into a row of the report."""
    failed = "error_type" in facts
    model = job.model(facts) if len(job.models) == 1 or "model" in facts else None
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
        model_id=model.id if model else None,
        model_hash=model.hash if model else None,
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
    if any("reference_uri" in facts or "reference_problem" in facts for facts in regions):
        merged |= merge_reference(regions)
    return merged
