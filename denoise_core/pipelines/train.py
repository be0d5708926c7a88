"""Training on Ray Train: a worker group runs `Trainer`, reports and keeps checkpoints.

On a failure Ray restarts the whole group, which goes on from the last reported checkpoint. A new
driver with the same output folder does the same (`--resume`). Rank 0 sends its reports to the
driver through a queue: Ray Train's callbacks run in the controller's process, where nobody looks.
"""

from __future__ import annotations

import csv
import json
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.tensorflow import TensorflowTrainer
from ray.util.queue import Empty, Queue

from denoise_core.checkpoints import load_checkpoint, save_checkpoint
from denoise_core.config import TrainConfig, as_dict
from denoise_core.errors import DenoiseError, RunFailed
from denoise_core.models import architecture
from denoise_core.presets import Preset
from denoise_core.presets import preset as find_preset
from denoise_core.training import HISTORY, check_training
from denoise_core.training_data import CleanImages, find_images

HISTORY_COLUMNS = ("step", "pixels", "seconds", "loss", "psnr")

Show = Callable[[dict[str, Any]], None]


def run_training(config: TrainConfig, *, show: Show, preset: Preset | None = None) -> Path:
    """Train by `config`; call `show` with each report. Returns the folder of the best model.

    `preset` takes the place of the one that `config` names. Ray must be initialised. Raises
    UsageError for settings that do not fit the data, CheckpointError for a checkpoint that does not
    fit the preset, RunFailed where training ended early.
    """
    recipe = preset or find_preset(config.preset)
    check_training(config, recipe)
    output = Path(config.output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    (output / "train.json").write_text(json.dumps(as_dict(config), indent=1) + "\n")
    config = replace(
        config,
        data=tuple(_absolute(name) for name in config.data),
        init=config.init and _absolute(config.init),
        output=str(output),
    )
    try:
        mail = Queue(actor_options={"num_cpus": 0})
        _fit(_ray_trainer(config, recipe, mail), mail=mail, show=show)
    except ray.exceptions.RayError as error:
        raise RunFailed(
            f"Ray ended before the training did ({type(error).__name__}). Go on with --resume."
        ) from error
    mail.shutdown(force=True)
    return output / "best"


def _absolute(name: str) -> str:
    """Return a path as one that holds in the workers' own folders; other names as they are."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def _ray_trainer(config: TrainConfig, preset: Preset, mail: Queue) -> TensorflowTrainer:
    # Under load a group start took 52 s against the default limit of 60.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    return TensorflowTrainer(
        _train_worker,
        train_loop_config={"config": asdict(config), "preset": preset, "mail": mail},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={"CPU": 0.5, "GPU": config.gpus_per_worker}
            if config.gpus_per_worker > 0
            else {"CPU": 0.5},
        ),
        run_config=ray.train.RunConfig(
            name="run",
            storage_path=str(Path(config.output) / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )


def _fit(trainer: TensorflowTrainer, *, mail: Queue, show: Show) -> None:
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
    while thread.is_alive():
        _read(mail, told=told, show=show, wait_s=0.5)
    _read(mail, told=told, show=show, wait_s=0.1)
    if told:
        raise told[0]
    for error in errors:
        if isinstance(error, ray.train.TrainingFailedError):
            raise RunFailed(f"Training ended early: {_root_cause(error)}") from error
        raise error


def _read(mail: Queue, *, told: list[DenoiseError], show: Show, wait_s: float) -> None:
    """Show the rows that came within `wait_s` and whatever came with them; keep the errors."""
    try:
        while True:
            item = mail.get(timeout=wait_s)
            if isinstance(item, DenoiseError):
                told.append(item)
            else:
                show(item)
    except Empty:
        return


def _root_cause(error: BaseException) -> str:
    causes = getattr(error, "worker_failures", None) or {0: error}
    first = next(iter(causes.values()))
    return str(first).strip().splitlines()[-1] if str(first).strip() else repr(first)


def _train_worker(arguments: dict[str, Any]) -> None:
    config = TrainConfig(**arguments["config"])
    try:
        _train(config, arguments["preset"], arguments["mail"])
    except DenoiseError as error:
        arguments["mail"].put(error)
        # Alone, a worker ends here: the next attempt would fail alike. Others would wait for it at
        # the next barrier, so there Ray has to know.
        if config.workers > 1:
            raise


def _train(config: TrainConfig, preset: Preset, mail: Queue) -> None:
    from denoise_core.devices import choose_precision, configure_tensorflow
    from denoise_core.training import Trainer

    tf = configure_tensorflow(threads=config.threads, use_gpu=config.gpus_per_worker > 0)
    images = CleanImages.load(
        find_images(config.data), validation=config.validation, seed=config.seed
    )
    precision = choose_precision(config.precision, tf)
    trainer = Trainer(
        config,
        preset,
        images,
        rank=ray.train.get_context().get_world_rank(),
        precision=precision,
        initial=load_checkpoint(config.init).weights() if config.init else None,
    )
    last = ray.train.get_checkpoint()
    if last is not None:
        with last.as_directory() as folder:
            trainer.load_state(Path(folder))
    if trainer.rank == 0:
        _forget_later(Path(config.output) / HISTORY, step=trainer.progress.step)
    trainer.run(lambda metrics, save: _report(trainer, metrics, precision=precision, mail=mail))


def _report(trainer: Any, metrics: dict[str, float], *, precision: str, mail: Queue) -> None:
    progress = trainer.progress
    row = {
        "step": progress.step,
        "pixels": progress.pixels,
        "seconds": round(progress.seconds, 1),
        "fraction": progress.fraction(trainer.config),
        **metrics,
    }
    if trainer.rank != 0:
        ray.train.report(row)
        return
    output = Path(trainer.config.output).absolute()
    if metrics["psnr"] > progress.best_psnr:
        progress.best_psnr = metrics["psnr"]
        save_checkpoint(output / "best", trainer.ema, _card(trainer, row, precision=precision))
    _append_history(output / HISTORY, row)
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_state(Path(folder))
        ray.train.report(row, checkpoint=ray.train.Checkpoint.from_directory(folder))
    mail.put(row)


def _forget_later(path: Path, *, step: int) -> None:
    """Drop the rows of steps after `step`, which a killed run had done beyond its checkpoint."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, HISTORY_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def _append_history(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, HISTORY_COLUMNS, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _card(trainer: Any, row: dict[str, Any], *, precision: str) -> dict[str, Any]:
    config, preset = trainer.config, trainer.preset
    module = architecture(preset.architecture)
    return {
        "name": config.preset,
        "architecture": preset.architecture,
        "arguments": preset.arguments,
        "parameters": int(trainer.model.count_params()),
        "mflop_per_pixel": round(module.mflop_per_pixel(**preset.arguments), 4),
        "total_stride": module.total_stride(**preset.arguments),
        "default_halo": preset.default_halo,
        "exact_halo": module.exact_halo(**preset.arguments),
        "data_range": [0.0, 1.0],
        "noise": config.noise,
        "training": {
            "data": [Path(folder).name for folder in config.data],
            "images": len(trainer.images.training),
            "validation_images": len(trainer.images.validation),
            "grey_share": config.grey,
            "steps": row["step"],
            "pixels": row["pixels"],
            "hours": round(row["seconds"] / 3600.0, 3),
            "precision": precision,
            "seed": config.seed,
            "init": config.init,
        },
        "figures": {"validation_psnr_sigma25": round(row["psnr"], 3)},
    }
