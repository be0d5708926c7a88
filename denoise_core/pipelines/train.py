"""Training on Ray Train: a worker group runs `Trainer`, reports and keeps checkpoints.

On a failure Ray restarts the whole group, which goes on from the last reported checkpoint. A new
driver with the same output folder does the same (`--resume`).
"""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.tensorflow import TensorflowTrainer

from denoise_core.checkpoints import load_checkpoint, save_checkpoint
from denoise_core.config import TrainConfig, as_dict
from denoise_core.errors import RunFailed, UsageError
from denoise_core.models import architecture
from denoise_core.presets import preset as find_preset
from denoise_core.training_data import CleanImages, find_images

HISTORY_COLUMNS = ("step", "pixels", "seconds", "loss", "psnr")


def run_training(config: TrainConfig, *, show: Callable[[dict[str, Any]], None]) -> Path:
    """Train by `config`; call `show` with each report. Returns the folder of the best model.

    Raises UsageError for settings that do not fit the data, RunFailed where training ended early.
    """
    find_preset(config.preset)
    find_images(config.data)
    output = Path(config.output).absolute()
    storage = output / "ray"
    if storage.exists() and not config.resume:
        raise UsageError(
            f"--output {output} holds a training: go on with --resume or name another."
        )
    output.mkdir(parents=True, exist_ok=True)
    (output / "train.json").write_text(json.dumps(as_dict(config), indent=1) + "\n")
    # Under load a group start took 52 s against the default limit of 60.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    trainer = TensorflowTrainer(
        _train_worker,
        train_loop_config={"config": asdict(config)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={"CPU": 0.5, "GPU": config.gpus_per_worker}
            if config.gpus_per_worker > 0
            else {"CPU": 0.5},
        ),
        run_config=ray.train.RunConfig(
            name="run",
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=[_Reports(show)],
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise RunFailed(f"Training ended early: {_root_cause(error)}") from error
    return output / "best"


def _root_cause(error: BaseException) -> str:
    causes = getattr(error, "worker_failures", None) or {0: error}
    first = next(iter(causes.values()))
    return str(first).strip().splitlines()[-1] if str(first).strip() else repr(first)


class _Reports(ray.train.UserCallback):  # type: ignore[misc]
    """Hands rank 0's metrics to the driver's display."""

    def __init__(self, show: Callable[[dict[str, Any]], None]) -> None:
        self.show = show

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        self.show(metrics[0])


def _train_worker(arguments: dict[str, Any]) -> None:
    from denoise_core.devices import choose_precision, configure_tensorflow
    from denoise_core.training import Trainer

    config = TrainConfig(**arguments["config"])
    tf = configure_tensorflow(threads=config.threads, use_gpu=config.gpus_per_worker > 0)
    preset = find_preset(config.preset)
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
    trainer.run(lambda metrics, save: _report(trainer, metrics, precision=precision))


def _report(trainer: Any, metrics: dict[str, float], *, precision: str) -> None:
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
    _append_history(output / "history.csv", row)
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_state(Path(folder))
        ray.train.report(row, checkpoint=ray.train.Checkpoint.from_directory(folder))


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
