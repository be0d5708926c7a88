"""Training on Ray Train: a worker group runs `Trainer`, Ray Data makes its crops.

On a failure Ray restarts the whole group, which goes on from the last reported checkpoint. A new
driver with the same output folder does the same (`--resume`). Rank 0 sends its reports to the
driver through a queue: Ray Train's callbacks run in the controller's process, where nobody looks.

OUT has `train.json` (settings), `history.csv`, `best/` (the model), `curves.png`, `samples/`,
`tensorboard/` and `ray/` (checkpoints to resume from).
"""

from __future__ import annotations

import csv
import errno
import io
import itertools
import json
import math
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
from ray.util.queue import Empty, Queue

from denoise_core.checkpoints import load_checkpoint, save_checkpoint
from denoise_core.config import TrainConfig, as_dict
from denoise_core.devices import NO_GPU, choose_precision, configure_tensorflow, has_gpu
from denoise_core.errors import DenoiseError, RunFailed, StorageError, UsageError
from denoise_core.lock import Lock, new_run_id, output_lock
from denoise_core.models import architecture, input_size
from denoise_core.pipelines.cluster import beside_driver, end_training, keep_actors_here
from denoise_core.pipelines.crops import STREAM_CPUS, RayStream
from denoise_core.pipelines.tensorflow_trainer import Config, TensorflowTrainer
from denoise_core.presets import Preset, Stage
from denoise_core.storage import StorageOptions, join, storage_for
from denoise_core.storage.arrow import arrow_s3
from denoise_core.training import HISTORY, SETTINGS, Plan, Source, Trainer, held_out
from denoise_core.training_data import TrainingData

HISTORY_COLUMNS = ("step", "pixels", "seconds", "loss", "val_loss", "psnr", "rate")
# What a worker asks of Ray; with its stream it fits on one core, so that two workers train on a
# laptop. Threads, not these numbers, share out the cores.
WORKER_CPUS = 0.5
# Of the validations one in so many leaves a picture of samples; and so do the first and the last.
SAMPLES_EVERY = 5
# Drawing curves takes half a second, as long as an epoch of a small preset may.
CURVES_S = 30.0

# A training that nobody waits for any more has so long to end before the process goes on to exit.
END_S = 10.0

Array = np.ndarray
Show = Callable[[dict[str, Any]], None]


def run_training(plan: Plan, *, show: Show) -> str:
    """Train by `plan`; call `show` with each report. Returns the folder of the best model.

    A report with `tick` tells of progress between validations, one with `note` is a sentence. Ray
    must be initialised. Raises UsageError for images that do not fit and for more workers than this
    machine holds, OutputLocked where another run holds the output, CheckpointError for a checkpoint
    that does not fit the preset, RunFailed where training ended early, left no model or lost the
    output to another run.
    """
    grows, there = bool(os.environ.get("RAY_ADDRESS")), ray.cluster_resources()
    plan = replace(plan, config=with_gpus(plan.config, there))
    notes = room_notes(plan.config, there, grows=grows)
    for note in (*notes, split_note(plan)):
        show({"note": note})
    files = RunFiles(plan.config)
    with output_lock(files.storage, files.root, run_id=new_run_id()) as lock:
        try:
            keep_actors_here()
            mail = Queue(actor_options=beside_driver())
            _fit(_ray_trainer(plan, mail), mail=mail, show=show, lock=lock)
        except ray.exceptions.RayError as error:
            raise RunFailed(
                f"Ray ended before the training did ({type(error).__name__}). Go on with --resume."
            ) from error
        mail.shutdown(force=True)
    if not files.has_best():
        raise RunFailed(
            "No validation had a finite loss, so there is no best model. Look for broken values in "
            "the held-out images, or begin anew with a lower --learning-rate or --precision "
            "float32."
        )
    return files.uri("best")


def split_note(plan: Plan) -> str:
    """Return what is trained on and what is held out, in numbers."""
    config, data = plan.config, plan.data
    held, kind = len(data.validation), "pairs" if config.mode == "pairs" else "images"
    looked_at = len(held_out(plan.preset, data))
    fewer = f"; {looked_at} of these, evenly spread, are measured" if looked_at < held else ""
    if config.validation_data:
        named = ", ".join(config.validation_data)
        return f"{data.files} {kind} to train on; validation by {held} of {named}{fewer}."
    return f"{data.files + held} {kind}, {held} of them held out for validation{fewer}."


def with_gpus(config: TrainConfig, there: dict[str, float]) -> TrainConfig:
    """Return settings that state --gpus-per-worker: by default one where each can have one."""
    if config.gpus_per_worker is not None:
        return config
    return replace(config, gpus_per_worker=float(there.get("GPU", 0.0) >= config.workers))


def room_notes(config: TrainConfig, there: dict[str, float], *, grows: bool) -> list[str]:
    """Return what to say of a training's share of the resources that are `there`.

    Raises UsageError where it asks for more of a Ray that never `grows`: it would wait for ever.
    """
    stream = STREAM_CPUS if config.input == "ray" else 0.0
    asked = {"CPU": WORKER_CPUS + stream, "GPU": config.gpus_per_worker or 0.0}
    asked = {name: round(config.workers * each, 4) for name, each in asked.items()}
    have = {name: there.get(name, 0.0) for name in asked}
    if any(asked[name] > have[name] for name in asked):
        text = (
            f"{config.workers} worker(s) ask for {asked['CPU']:g} CPU(s) and {asked['GPU']:g} "
            f"GPU(s); there are {have['CPU']:g} and {have['GPU']:g}"
        )
        if not grows:
            raise UsageError(f"{text}. Give fewer --workers or --gpus-per-worker.")
        return [f"{text}, and training begins once the cluster has grown."]
    if have["GPU"] and not asked["GPU"]:
        return [f"{have['GPU']:g} GPU(s) are not used: --gpus-per-worker is {asked['GPU']:g}."]
    return []


class RunFiles:
    """The files of a training's output, on local disk or S3. Writes are atomic."""

    def __init__(self, config: TrainConfig) -> None:
        self.root = config.output
        self.storage = storage_for(config.output, StorageOptions(s3_endpoint=config.s3_endpoint))

    def uri(self, name: str) -> str:
        """Return the URI of a file or folder of the output."""
        return join(self.root, *name.split("/"))

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes, None where there is none."""
        return self.storage.read(self.uri(name)) if self.storage.stat(self.uri(name)) else None

    def has_best(self) -> bool:
        """Whether a validation has left a model."""
        return self.storage.stat(self.uri("best/model.json")) is not None

    def write(self, name: str, data: bytes) -> None:
        """Write a file. Raises StorageError."""
        self.storage.write(self.uri(name), data)

    def write_folder(self, name: str, folder: Path) -> None:
        """Write the files of a local folder, those that end with `.json` last."""
        for path in sorted(folder.iterdir(), key=lambda path: path.suffix == ".json"):
            self.write(f"{name}/{path.name}", path.read_bytes())


# --- the driver ---------------------------------------------------------------------------------


def _ray_trainer(plan: Plan, mail: Queue) -> TensorflowTrainer:
    config = plan.config
    # Under load a group start took 52 s against the default limit of 60.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    # Ray looks for what the workers report at each such interval, by itself every 2 s, and a
    # checkpoint waits for that.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if not os.environ.get("RAY_ADDRESS"):
        # One machine is not taken away from under its own driver: a process less.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    path, filesystem = _ray_storage(config)
    gpus = config.gpus_per_worker or 0.0
    return TensorflowTrainer(
        _train_worker,
        train_loop_config={
            "config": asdict(config),
            "preset": plan.preset,
            "data": ray.put(plan.data),
            "mail": mail,
            "init_hash": plan.init_hash,
        },
        tensorflow_config=Config(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": WORKER_CPUS, **({"GPU": gpus} if gpus > 0 else {})},
            placement_strategy="SPREAD",
        ),
        run_config=ray.train.RunConfig(
            name="run",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )


def _ray_storage(config: TrainConfig) -> tuple[str, Any]:
    """Return where Ray keeps its checkpoints. The file system holds no credential."""
    path = join(config.output, "ray")
    if not path.startswith("s3://"):
        return path, None
    return path.removeprefix("s3://"), arrow_s3(config.s3_endpoint)


def _fit(trainer: TensorflowTrainer, *, mail: Queue, show: Show, lock: Lock) -> None:
    """Run `trainer` in a thread and hand its mail to `show`; raises what ended it early.

    In a thread, so that the driver can print, and so that Ray leaves Ctrl-C to the driver.
    """
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    told: list[DenoiseError] = []
    try:
        while thread.is_alive():
            lock.check()
            _read(mail, told=told, show=show, wait_s=0.5)
    except ray.exceptions.RayError:
        # Where Ray itself is lost, nobody answers any more.
        raise
    except BaseException:
        end_training(thread, patience_s=END_S)
        raise
    _read(mail, told=told, show=show, wait_s=0.1)
    if told:
        raise told[0]
    for error in errors:
        if isinstance(error, ray.train.TrainingFailedError):
            raise RunFailed(f"Training ended early: {_root_cause(error)}") from error
        raise error


def _read(mail: Queue, *, told: list[DenoiseError], show: Show, wait_s: float) -> None:
    """Show the rows that came within `wait_s` and whatever came with them; keep the errors.

    A report after an error says that the group was restarted and went on.
    """
    try:
        while True:
            item = mail.get(timeout=wait_s)
            if isinstance(item, DenoiseError):
                told.append(item)
                continue
            # The other ranks tick on until Ray ends them; a note tells of no step.
            if not (item.get("tick") or "note" in item):
                told.clear()
            show(item)
    except Empty:
        return
    except ray.exceptions.ActorUnavailableError:
        # It is there again soon, or dies, which is another error.
        time.sleep(wait_s)


def _root_cause(error: BaseException) -> str:
    causes = getattr(error, "worker_failures", None) or {0: error}
    first = next(iter(causes.values()))
    return str(first).strip().splitlines()[-1] if str(first).strip() else repr(first)


# --- the rates of the input ---------------------------------------------------------------------


def input_rates(plan: Plan, *, steps: int, warm: int) -> dict[str, float]:
    """Return optimizer steps a second with one batch in memory, a thread's and Ray Data's batches.

    Starts a local Ray. The batch in memory is measured first and last, and averaged: what else the
    machine does weighs on all alike.
    """
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    trainer = Trainer(plan.config, plan.preset, plan.data)
    stage = plan.preset.stages[0]

    def in_memory(stage: Stage, *, step: int) -> Iterator[tuple[Array, Array]]:
        places = trainer.places(stage)
        batch = trainer.sampler.batch(step=step, crop=stage.crop, places=places, size=stage.batch)
        while True:
            yield batch

    stream = RayStream(plan.data.training, plan.config, plan.preset, rank=0)
    rates: dict[str, list[float]] = {"memory": [], "ray": [], "thread": []}
    sources: dict[str, Source] = {"memory": in_memory, "ray": stream, "thread": trainer.source}
    for name in ("memory", "ray", "thread", "memory"):
        rates[name].append(_rate(trainer, sources[name](stage, step=0), steps=steps, warm=warm))
    return {name: float(np.mean(values)) for name, values in rates.items()}


def _rate(
    trainer: Trainer, batches: Iterator[tuple[Array, Array]], *, steps: int, warm: int
) -> float:
    def train(count: int) -> None:
        for noisy, clean in itertools.islice(batches, count):
            trainer.train_step(noisy, clean, fraction=0.0)

    # Closing ends Ray Data's actors, which is no training.
    with closing(batches):  # type: ignore[type-var]
        train(warm)
        started = time.perf_counter()
        train(steps)
        return steps / (time.perf_counter() - started)


# --- a worker -----------------------------------------------------------------------------------


def _train_worker(arguments: dict[str, Any]) -> None:
    config = TrainConfig(**arguments["config"])
    data = ray.get(arguments["data"])
    try:
        try:
            _train(config, arguments["preset"], data, arguments["mail"], arguments["init_hash"])
        except OSError as error:
            raise _disk_error(error, config.output) from error
        except StorageError as error:
            raise RunFailed(
                f"{error}. The last checkpoint is good: go on with --resume."
            ) from error
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, DenoiseError) else None
            if cause is None:
                raise
            raise cause from error
        except Exception as error:
            if type(error).__name__ != "ResourceExhaustedError":
                raise
            raise RunFailed(
                "The device has no memory for a step: give a smaller --batch, or a smaller --crop."
            ) from error
    except DenoiseError as error:
        arguments["mail"].put(error)
        # Alone, a worker ends here: the next attempt would fail alike. Others would wait for it at
        # the next barrier, so there Ray has to know.
        if config.workers > 1:
            raise


def _disk_error(error: OSError, output: str) -> RunFailed:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "no space left" if full else error.strerror or str(error)
    where = error.filename or f"{output} or {tempfile.gettempdir()}"
    return RunFailed(
        f"{where}: {what}. The last checkpoint is good: make room and go on with --resume."
    )


def _train(
    config: TrainConfig, preset: Preset, data: TrainingData, mail: Queue, init_hash: str | None
) -> None:
    use_gpu = bool(config.gpus_per_worker)
    tf = configure_tensorflow(threads=config.threads, use_gpu=use_gpu)
    if use_gpu and not has_gpu(tf):
        mail.put({"note": f"{socket.gethostname()}: {NO_GPU}"})
    rank = ray.train.get_context().get_world_rank()
    precision = choose_precision(config.precision, tf)
    ray_stream = RayStream(data.training, config, preset, rank=rank)
    initial = None
    if config.init:
        options = StorageOptions(s3_endpoint=config.s3_endpoint)
        found = load_checkpoint(config.init, sha256=init_hash, options=options, flag="--init")
        initial = found.weights()
    trainer = Trainer(
        config,
        preset,
        data,
        rank=rank,
        precision=precision,
        initial=initial,
        source=ray_stream if config.input == "ray" else None,
    )
    take_up(trainer, ray.train.get_checkpoint(), mail=mail)
    reporter = Reporter(trainer, data, precision=precision, mail=mail)
    trainer.run(
        lambda metrics, save: reporter.report(metrics), tick=reporter.tick if rank == 0 else None
    )
    if rank == 0 and config.export is not None and reporter.files.has_best():
        mail.put(export_best(config))


def take_up(trainer: Trainer, last: ray.train.Checkpoint | None, *, mail: Queue) -> None:
    """Go on from the checkpoint `last`, and only then write the settings down.

    Raises CheckpointError for a checkpoint of another network.
    """
    config, files = trainer.config, RunFiles(trainer.config)
    if last is not None:
        with last.as_directory() as folder:
            other_images = trainer.load_state(Path(folder))
        if other_images and trainer.rank == 0:
            mail.put({"note": "--resume: other images are held out now; best/ is chosen anew."})
    if trainer.rank != 0:
        return
    if last is None and config.resume:
        mail.put({"note": f"--resume: no checkpoint in {config.output}; training starts anew."})
    files.write(SETTINGS, (json.dumps(as_dict(config), indent=1) + "\n").encode())


def export_best(config: TrainConfig) -> dict[str, Any]:
    """Write the best model to OUT/export; return its URI and its largest difference."""
    from denoise_core.export import ENDINGS, export_model

    files, name = RunFiles(config), f"export/{config.preset}{ENDINGS[config.export or '']}"
    with tempfile.TemporaryDirectory(prefix="denoise-") as text:
        folder = Path(text)
        for part in ("model.json", "model.safetensors"):
            (folder / part).write_bytes(files.read(f"best/{part}") or b"")
        written = folder / "export"
        difference = export_model(load_checkpoint(text), format=config.export or "", path=written)
        for path in [written] if written.is_file() else sorted(written.rglob("*")):
            if path.is_file():
                inner = path.relative_to(written).as_posix() if path != written else ""
                files.write(f"{name}/{inner}" if inner else name, path.read_bytes())
    return {"export": files.uri(name), "difference": difference}


class Reporter:
    """What a worker does with a report: all ranks tell Ray, rank 0 writes and tells the driver."""

    def __init__(
        self, trainer: Trainer, data: TrainingData, *, precision: str, mail: Queue
    ) -> None:
        self.trainer, self.data, self.precision, self.mail = trainer, data, precision, mail
        self.files = RunFiles(trainer.config)
        self.reported = 0, trainer.progress.seconds
        self.rows: list[dict[str, float]] = []
        self.validations = 0
        self.curves_drawn = -math.inf
        self.logs: Path | None = None
        if trainer.rank == 0:
            self.rows = known_rows(self.files.read(HISTORY), step=trainer.progress.step)
            self._open_logs()

    def _open_logs(self) -> None:
        from tensorboardX import SummaryWriter

        local = not self.trainer.config.output.startswith("s3://")
        folder = self.files.uri("tensorboard") if local else tempfile.mkdtemp(prefix="denoise-")
        self.logs = None if local else Path(folder)
        self.writer = SummaryWriter(folder, flush_secs=10)

    def tick(self, loss: float) -> None:
        """Tell the driver how far the training is."""
        self.mail.put({**self._row(), "loss": loss, "tick": True})

    def _row(self) -> dict[str, Any]:
        progress = self.trainer.progress
        images, seconds = self.reported
        return {
            "step": progress.step,
            "pixels": progress.pixels,
            "seconds": round(progress.seconds, 1),
            "fraction": progress.fraction(self.trainer.config),
            # Since the last report: crops, and with them the speed, change with the stage.
            "images_per_s": round(
                (self.trainer.images - images) / max(1e-9, progress.seconds - seconds), 1
            ),
        }

    def report(self, metrics: dict[str, float]) -> None:
        """Take in a report of the trainer; the state becomes a checkpoint of Ray's."""
        row = {**self._row(), **metrics}
        if self.trainer.rank != 0:
            ray.train.report(row)
            return
        if "val_loss" in metrics:
            self._validated(row)
        self.rows.append(row)
        self.files.write(HISTORY, history_bytes(self.rows))
        self._log(row)
        folder = tempfile.mkdtemp(prefix="denoise-")
        try:
            self.trainer.save_state(Path(folder))
            ray.train.report(row, checkpoint=ray.train.Checkpoint.from_directory(folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.mail.put(row)
        self.reported = self.trainer.images, self.trainer.progress.seconds

    def _validated(self, row: dict[str, Any]) -> None:
        config, done = self.trainer.config, row["fraction"] >= 1.0
        if row["best"]:
            with tempfile.TemporaryDirectory(prefix="denoise-") as folder:
                save_checkpoint(Path(folder), self.trainer.best_weights(), self._card(row))
                self.files.write_folder("best", Path(folder))
        from denoise_core.curves import draw_curves, draw_samples

        title = f"{config.preset}, step {row['step']}"
        if done or time.monotonic() - self.curves_drawn >= CURVES_S:
            self.files.write("curves.png", draw_curves([*self.rows, row], title=title))
            self.curves_drawn = time.monotonic()
        if done or self.validations % SAMPLES_EVERY == 0:
            # The target of noisy images alone is noise too: nothing to look at or to measure by.
            clean = config.self_supervised is None
            rows = [(n, c if clean else None, o) for n, c, o in self.trainer.shown]
            samples = draw_samples(rows, title=title)
            self.files.write(f"samples/step-{row['step']:07d}.png", samples)
        self.validations += 1

    def _log(self, row: dict[str, Any]) -> None:
        for name in ("loss", "val_loss", "psnr", "rate"):
            if math.isfinite(row.get(name, math.nan)):
                self.writer.add_scalar(name, row[name], row["step"])
        self.writer.flush()
        if self.logs is not None:
            self.files.write_folder("tensorboard", self.logs)

    def _card(self, row: dict[str, Any]) -> dict[str, Any]:
        config, preset = self.trainer.config, self.trainer.preset
        module = architecture(preset.architecture)
        psnr, added = row["psnr"], config.mode == "clean"
        return {
            "name": config.preset,
            "architecture": preset.architecture,
            "arguments": preset.arguments,
            "parameters": int(self.trainer.model.count_params()),
            "mflop_per_pixel": round(module.mflop_per_pixel(**preset.arguments), 4),
            "total_stride": module.total_stride(**preset.arguments),
            "input_size": input_size(preset.architecture, **preset.arguments),
            "default_halo": preset.default_halo,
            "exact_halo": module.exact_halo(**preset.arguments),
            "data_range": [0.0, 1.0],
            "noise": preset.noise if added else config.mode,
            "training": {
                "data": [Path(folder).name for folder in config.data],
                "images": self.data.files,
                "validation_images": len(self.trainer.held_out),
                "loss": preset.loss,
                "grey_share": self.trainer.sampler.grey,
                "steps": row["step"],
                "pixels": row["pixels"],
                "hours": round(row["seconds"] / 3600.0, 3),
                "precision": self.precision,
                "workers": config.workers,
                "seed": config.seed,
                "init": config.init,
            },
            "figures": {
                "validation_loss": float(f"{row['val_loss']:.6g}"),
                "validation_noise": (preset.validation_noise or preset.noise) if added else None,
                "validation_psnr": None if math.isnan(psnr) else round(psnr, 3),
            },
        }


def known_rows(history: bytes | None, *, step: int) -> list[dict[str, float]]:
    """Return the rows up to `step`; a killed run may have done more than its checkpoint holds."""
    if history is None:
        return []
    rows = csv.DictReader(io.StringIO(history.decode()))
    numbers = [{k: float(v) if v else math.nan for k, v in row.items()} for row in rows]
    kept = [row for row in numbers if row["step"] <= step]
    return [{**row, "step": int(row["step"]), "pixels": int(row["pixels"])} for row in kept]


def history_bytes(rows: list[dict[str, float]]) -> bytes:
    """Return rows as CSV with HISTORY_COLUMNS; what is not known is empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(HISTORY_COLUMNS)
    for row in rows:
        values = [row.get(name, math.nan) for name in HISTORY_COLUMNS]
        writer.writerow(["" if math.isnan(v) else f"{v:.10g}" for v in values])
    return buffer.getvalue().encode()
