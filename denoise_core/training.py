"""The training loop: a custom step on a Keras 3 model, resumable at any step. Not Ray.

Keras 3's `fit` fails under `MultiWorkerMirroredStrategy` (keras#20585), so the step is written out:
forward and backward pass compiled by XLA, gradients summed over the replicas, one optimizer step.
"""

from __future__ import annotations

import json
import math
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from denoise_core.checkpoints import load_checkpoint
from denoise_core.config import TrainConfig
from denoise_core.errors import CheckpointError, RunFailed, UsageError
from denoise_core.noise import parse_noise
from denoise_core.presets import Preset, Stage
from denoise_core.training_data import (
    CleanImages,
    CropSampler,
    check_images,
    find_images,
    prefetch,
)

Array = np.ndarray
VALIDATION_SIGMA = 25.0
VALIDATION_SIDE = 256
EMA_EVERY = 8
# One row for each report, in the output folder: the sign that a training was begun there.
HISTORY = "history.csv"


@dataclass(slots=True)
class Progress:
    """How far the schedule is: optimizer steps, pixels seen and seconds spent, over all resumes."""

    step: int = 0
    pixels: int = 0
    seconds: float = 0.0
    best_psnr: float = -math.inf

    def fraction(self, config: TrainConfig) -> float:
        """Return the share of the schedule that is done, 0 to 1."""
        if config.steps is not None:
            return min(1.0, self.step / config.steps)
        assert config.hours is not None
        return min(1.0, self.seconds / (config.hours * 3600.0))


def check_training(config: TrainConfig, preset: Preset) -> None:
    """Raise UsageError or CheckpointError for what can be told without reading pixels.

    Starting Ray and a worker to hear it takes half a minute.
    """
    parse_noise(config.noise)
    check_images(find_images(config.data), crop=max(stage.crop for stage in preset.stages))
    if config.init is not None:
        load_checkpoint(config.init)
    if (Path(config.output) / HISTORY).exists() and not config.resume:
        raise UsageError(
            f"--output {config.output} holds a training: go on with --resume or name another."
        )


def stage_at(stages: tuple[Stage, ...], fraction: float) -> Stage:
    """Return the stage that the schedule is in."""
    return next(stage for stage in reversed(stages) if fraction >= stage.start)


def learning_rate(preset: Preset, config: TrainConfig, progress: Progress) -> float:
    """Linear warm-up over the first steps, then a cosine from the peak to zero."""
    peak = config.learning_rate or preset.learning_rate
    warm = min(1.0, (progress.step + 1) / preset.warmup_steps)
    return peak * warm * 0.5 * (1.0 + math.cos(math.pi * progress.fraction(config)))


def validation_psnr(
    predict: Callable[[Array], Array], images: list[Array], *, stride: int = 16
) -> float:
    """Mean PSNR in dB over centre crops of 8-bit images at sigma 25, protocol A.

    The crops have at most VALIDATION_SIDE pixels a side, multiples of `stride`. The noise is seeded
    for each image; the output is clipped and rounded to 8 bits.
    """
    values = []
    for image in images:
        height, width = (min(VALIDATION_SIDE, side // stride * stride) for side in image.shape[:2])
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        clean = image[top : top + height, left : left + width].astype(np.float32) / 255.0
        noise = np.random.default_rng(0).standard_normal(clean.shape, dtype=np.float32)
        noisy = clean + noise * np.float32(VALIDATION_SIGMA / 255.0)
        output = np.round(np.clip(predict(noisy[None])[0], 0.0, 1.0) * 255.0) / 255.0
        values.append(-10.0 * math.log10(max(float(np.mean((output - clean) ** 2)), 1e-12)))
    return float(np.mean(values))


class Trainer:
    """One worker's training of one model. `rank` 0 writes checkpoints; all ranks call alike.

    Raises UsageError for images and batches that do not fit the preset or the workers,
    CheckpointError for `initial` weights of another model.
    """

    def __init__(
        self,
        config: TrainConfig,
        preset: Preset,
        images: CleanImages,
        *,
        rank: int = 0,
        precision: str = "float32",
        initial: list[Array] | None = None,
    ) -> None:
        import keras
        import tensorflow as tf

        from denoise_core.models import architecture, build_model

        self.config, self.preset, self.images, self.rank = config, preset, images, rank
        self.progress = Progress()
        self.sampler = CropSampler(
            images.training, parse_noise(config.noise), config.grey, config.seed
        )
        for stage in preset.stages:
            images.check_crop(stage.crop)
            if stage.batch * config.batch_scale % config.workers:
                raise UsageError(
                    f"--workers {config.workers}: batches of {stage.batch * config.batch_scale} "
                    "crops cannot be shared equally. Change --workers or --batch-scale."
                )
        if config.workers > 1:
            self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
        else:
            self.strategy = tf.distribute.get_strategy()
        keras.utils.set_random_seed(config.seed)
        with self.strategy.scope():
            self.model = build_model(preset.architecture, precision=precision, **preset.arguments)
            self.optimizer = keras.optimizers.Adam(0.0, global_clipnorm=preset.clip_norm)
            self.optimizer.build(self.model.trainable_variables)
        if initial is not None:
            try:
                self.model.set_weights(initial)
            except ValueError as error:
                raise CheckpointError(
                    f"--init {config.init}: not of the architecture of --preset {config.preset} "
                    f"({error})."
                ) from error
        self.stride = int(architecture(preset.architecture).total_stride(**preset.arguments))
        self.ema = self.model.get_weights()
        self._predict = tf.function(lambda x: self.model(x, training=False))
        self._step = self._make_step(tf)

    def _make_step(self, tf: Any) -> Any:
        model, optimizer, strategy = self.model, self.optimizer, self.strategy
        replicas = self.config.workers

        @tf.function(jit_compile=True)
        def gradients(noisy: Any, clean: Any, squared: Any) -> Any:
            with tf.GradientTape() as tape:
                error = tf.cast(model(noisy, training=True), tf.float32) - clean
                each = tf.where(squared, tf.square(error), tf.abs(error))
                # Divided by the global batch: the optimizer sums over the replicas.
                loss = tf.reduce_mean(each) / replicas
            return loss, tape.gradient(loss, model.trainable_variables)

        @tf.function
        def step(noisy: Any, clean: Any, rate: Any, squared: Any) -> Any:
            def replica() -> Any:
                loss, grads = gradients(noisy, clean, squared)
                optimizer.apply(grads, model.trainable_variables)
                return loss

            optimizer.learning_rate.assign(rate)
            return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(replica), axis=None)

        return step

    def _batches(self, stage: Stage) -> Iterator[tuple[Array, Array]]:
        share = stage.batch * self.config.batch_scale // self.config.workers
        places = range(self.rank * share, (self.rank + 1) * share)
        step = self.progress.step
        while True:
            yield self.sampler.batch(step=step, crop=stage.crop, places=places)
            step += 1

    def run(self, report: Callable[[dict[str, float], bool], None]) -> None:
        """Train to the end of the schedule.

        `report(metrics, save)` is called at the same steps on every rank; where `save` is true,
        rank 0 should keep a checkpoint with `save_state`. Raises RunFailed on a loss that is not
        finite; the last checkpoint is then still good.
        """
        now = validated = time.monotonic()
        saved_seconds = self.progress.seconds
        losses: list[float] = []
        while (fraction := self.progress.fraction(self.config)) < 1.0:
            stage = stage_at(self.preset.stages, fraction)
            with closing(prefetch(self._batches(stage))) as batches:
                for noisy, clean in batches:
                    losses.append(self._train_step(noisy, clean, fraction=fraction))
                    before, now = now, time.monotonic()
                    self.progress.seconds += now - before
                    self.progress.pixels += noisy.size // noisy.shape[-1] * self.config.workers
                    fraction = self.progress.fraction(self.config)
                    if fraction >= 1.0 or self._validation_due(now - validated):
                        report(self._validate(losses), True)
                        losses, validated = [], time.monotonic()
                        saved_seconds, now = self.progress.seconds, validated
                    elif self._checkpoint_due(saved_seconds):
                        self._require_finite()
                        report({"loss": float(np.mean(losses)), "psnr": math.nan}, True)
                        saved_seconds, now = self.progress.seconds, time.monotonic()
                    if fraction >= 1.0 or stage_at(self.preset.stages, fraction) is not stage:
                        break

    def _validation_due(self, seconds: float) -> bool:
        if self.config.validate_steps is not None or self.config.workers > 1:
            return self.progress.step % (self.config.validate_steps or 500) == 0
        return seconds >= self.config.validate_minutes * 60.0

    def _checkpoint_due(self, saved_seconds: float) -> bool:
        waited = self.progress.seconds - saved_seconds
        return self.config.workers == 1 and waited >= self.config.checkpoint_minutes * 60.0

    def _train_step(self, noisy: Array, clean: Array, *, fraction: float) -> float:
        import tensorflow as tf

        rate = learning_rate(self.preset, self.config, self.progress)
        squared = fraction >= self.preset.mse_from
        loss = float(self._step(noisy, clean, tf.constant(rate, tf.float32), tf.constant(squared)))
        if not math.isfinite(loss):
            raise self._diverged(f"The loss became {loss}")
        self.progress.step += 1
        if self.progress.step % EMA_EVERY == 0:
            # The average starts short, so that the first weights are soon forgotten.
            momentum = min(self.preset.ema, (1 + self.progress.step) / (10 + self.progress.step))
            keep = momentum**EMA_EVERY
            for average, value in zip(self.ema, self.model.get_weights(), strict=True):
                average *= keep
                average += (1.0 - keep) * value
        return loss

    def _diverged(self, what: str) -> RunFailed:
        return RunFailed(
            f"{what} at step {self.progress.step}. The last checkpoint is good; go on from it with "
            "--resume and a lower --learning-rate."
        )

    def _require_finite(self) -> None:
        """Raise RunFailed for weights that the last step broke: its loss came before its update."""
        if not all(np.isfinite(weight).all() for weight in self.model.get_weights()):
            raise self._diverged("The weights became NaN or infinite")

    def _validate(self, losses: list[float]) -> dict[str, float]:
        self._require_finite()
        current = self.model.get_weights()
        self.model.set_weights(self.ema)
        psnr = validation_psnr(
            lambda x: self._predict(x).numpy(), self.images.validation, stride=self.stride
        )
        self.model.set_weights(current)
        return {"loss": float(np.mean(losses)), "psnr": psnr}

    def save_state(self, folder: Path) -> None:
        """Write everything that `load_state` needs to go on as if never stopped."""
        arrays = {f"w{i:04d}": w for i, w in enumerate(self.model.get_weights())}
        arrays |= {f"e{i:04d}": e for i, e in enumerate(self.ema)}
        arrays |= {f"o{i:04d}": v.numpy() for i, v in enumerate(self.optimizer.variables)}
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "state.npz", **arrays)
        progress = {name: getattr(self.progress, name) for name in Progress.__slots__}
        (folder / "progress.json").write_text(json.dumps(progress))

    def load_state(self, folder: Path) -> None:
        """Take up weights, averages, optimizer and progress, or none of them.

        Raises CheckpointError.
        """
        try:
            progress = Progress(**json.loads((folder / "progress.json").read_text()))
            with np.load(folder / "state.npz", allow_pickle=False) as arrays:
                parts = {
                    kind: [arrays[name] for name in sorted(arrays.files) if name[0] == kind]
                    for kind in "weo"
                }
            state = [*self.model.weights, *self.model.weights, *self.optimizer.variables]
            values = [*parts["w"], *parts["e"], *parts["o"]]
            for variable, value in zip(state, values, strict=True):
                if tuple(variable.shape) != value.shape:
                    raise ValueError(f"{value.shape} where {tuple(variable.shape)} is expected")
            self.model.set_weights(parts["w"])
            for variable, value in zip(self.optimizer.variables, parts["o"], strict=True):
                variable.assign(value)
            self.ema, self.progress = parts["e"], progress
        except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{folder}: no checkpoint of this preset can be read there ({error})."
            ) from error
