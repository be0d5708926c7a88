"""The training loop: a custom step on a Keras 3 model, resumable at any step. Not Ray.

Keras 3's `fit` fails under `MultiWorkerMirroredStrategy` (keras#20585), so the step is written out:
forward and backward pass compiled by XLA, gradients summed over the replicas, one optimizer step.
With the same global batch, seed and data one worker and two follow the same curve up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from denoise_core.checkpoints import absolute_name, load_checkpoint
from denoise_core.config import TrainConfig, as_dict
from denoise_core.devices import has_gpu, import_tensorflow
from denoise_core.errors import CheckpointError, RunFailed, UsageError
from denoise_core.export import check_export
from denoise_core.models import architecture, build_model, input_size
from denoise_core.noise import parse_noise
from denoise_core.presets import Preset, Stage
from denoise_core.presets import preset as find_preset
from denoise_core.self_supervised import REGULARIZER, blind_spots_loss, neighbours_loss
from denoise_core.space import with_arguments
from denoise_core.storage import StorageOptions, absolute, join, storage_for
from denoise_core.training_data import (
    Picture,
    Sampler,
    TrainingData,
    measured,
    parse_augment,
    prefetch,
    stages_of,
    validation_pairs,
)

Array = np.ndarray
Batches = Iterator[tuple[Array, Array]]

VALIDATION_SIDE = 256
PREDICT_PIXELS = 500_000
EMA_EVERY = 8
# Held-out crops that a picture of samples shows.
SHOWN = 4
# Several workers save and validate by steps, which all count alike; their clocks differ.
CHECKPOINT_STEPS = VALIDATE_STEPS = 500
# One worker does by its clock, unless its length is in epochs.
VALIDATE_MINUTES = 10.0
# What Keras uses in its own binary cross-entropy.
EPSILON = 1e-7
# Zeiler's own rate (2012); Keras' default of 1e-3 hardly moves.
ADADELTA_RATE = 1.0
# Somebody who watches hears of the loss this often.
TICK_S = 2.0
# One row for each report, in the output folder: the sign that a training was begun there.
HISTORY = "history.csv"
# The settings that a training was begun or last resumed with, beside it.
SETTINGS = "train.json"
# What `--resume` takes as it was: the task, so that losses compare, and the network. All else may
# change: the length, the machine, what helps a training that diverged. So may DATA, which may
# have moved: what is held out is chosen by the paths below it. Where that changes all the same, a
# state tells, and the best loss is looked for anew.
TASK = (
    *("preset", "arguments", "noise", "noisy", "clean", "self_supervised", "validation"),
    *("validation_data", "seed", "grey", "augment", "crop", "loss", "optimizer", "ema"),
)


class Source(Protocol):
    """Makes the batches of a stage, from `step` on: this worker's share of each.

    A batch is (noisy, clean), float32 (samples, crop, crop, C); clean is in [0, 1].
    """

    def __call__(self, stage: Stage, *, step: int) -> Batches:
        """Return an iterator without end, with `close()`."""


@dataclass(slots=True)
class Progress:
    """How far the schedule is, over all resumes: optimizer steps, pixels seen, seconds spent.

    `rate_scale` is what reduce-on-plateau has made of the rate; `waited` counts the validations
    since the last better loss, `waited_rate` those since the rate was last reduced.
    """

    step: int = 0
    pixels: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_psnr: float = -math.inf
    rate_scale: float = 1.0
    waited: int = 0
    waited_rate: int = 0
    stopped: bool = False

    def fraction(self, config: TrainConfig) -> float:
        """Return the share of the schedule that is done, 0 to 1."""
        if self.stopped:
            return 1.0
        if config.steps is not None:
            return min(1.0, self.step / config.steps)
        assert config.hours is not None
        return min(1.0, self.seconds / (config.hours * 3600.0))


def adapt(config: TrainConfig, preset: Preset) -> Preset:
    """Return the preset with what the settings state of its recipe. Raises UsageError."""
    parse_noise(config.noise or preset.noise)
    parse_augment(config.augment or preset.augment)
    names = ("loss", "optimizer", "schedule", "warmup_steps", "ema", "clip_norm", "augment")
    changes: dict[str, Any] = {
        name: getattr(config, name) for name in names if getattr(config, name) is not None
    }
    if config.loss is not None:
        changes["mse_from"] = 1.1
    if config.mode != "clean":
        # Only the squared error has the clean image as its minimum where the target is noisy.
        changes |= {"loss": "mse"} if config.self_supervised else {}
        changes |= {"grey": 0.0}
    elif config.grey and preset.channels == 1:
        raise UsageError(
            f"--grey {config.grey}: images of --preset {config.preset} are grey already; leave it "
            "out."
        )
    if config.self_supervised and config.augment is None:
        # Interpolated noise is no longer independent from pixel to pixel.
        words = [word for word in parse_augment(preset.augment) if word != "affine"]
        changes["augment"] = ",".join(words) or "none"
    if config.noise:
        changes |= {"noise": " | ".join(config.noise), "validation_noise": None}
    if config.optimizer == "adadelta" and config.learning_rate is None:
        changes["learning_rate"] = ADADELTA_RATE
    preset = with_arguments(preset, config.arguments)
    preset = replace(preset, **changes, stages=stages_of(config, preset))
    _check_crops(preset)
    return preset


def _check_crops(preset: Preset) -> None:
    """Raise UsageError for crops that the network does not take."""
    only = input_size(preset.architecture, **preset.arguments)
    stride = int(architecture(preset.architecture).total_stride(**preset.arguments))
    for stage in preset.stages:
        if only is not None and (stage.crop, stage.crop) != only:
            raise UsageError(
                f"--crop {stage.crop}: the network takes images of {only[1]}x{only[0]} px, no "
                "others."
            )
        if stage.crop % stride:
            raise UsageError(
                f"--crop {stage.crop}: the network takes sides that are multiples of {stride}; "
                f"{-(-stage.crop // stride) * stride} is the next one."
            )


def with_length(config: TrainConfig, preset: Preset, data: TrainingData) -> TrainConfig:
    """Return settings whose length is in steps or hours; an epoch sees every image, or pixel, once.

    Raises UsageError where neither the settings nor the preset state a length.
    """
    if config.steps is not None or config.hours is not None:
        return config
    epochs = config.epochs or preset.epochs
    if epochs is None:
        raise UsageError(
            f"--preset {config.preset} has no length of its own: give --hours H, --steps N or "
            "--epochs N."
        )
    each = steps_of_epoch(preset, data)
    every = config.validate_steps or (each if config.validate_minutes is None else None)
    return replace(config, steps=max(1, round(epochs * each)), validate_steps=every, epochs=None)


def steps_of_epoch(preset: Preset, data: TrainingData) -> int:
    """Return the optimizer steps of one pass over the training images."""
    stage = preset.stages[0]
    if preset.order == "epochs":
        return max(1, -(-len(data.training) // stage.batch))
    pixels = sum(p.sides[0] * p.sides[1] for p in data.training) or len(data.training) * 10**6
    return max(1, round(pixels / (stage.crop**2 * stage.batch)))


def held_out(preset: Preset, data: TrainingData) -> list[Picture]:
    """Return the held-out images that a validation measures."""
    return measured(data.validation, side=_validation_side(preset))


def _validation_side(preset: Preset) -> int:
    return min(VALIDATION_SIDE, *(preset.sample or (VALIDATION_SIDE,)))


@dataclass(frozen=True, slots=True)
class Plan:
    """What to train with: settings with a length and whole paths, the recipe, the data's index.

    `init_hash` is that of the checkpoint that `config.init` names.
    """

    config: TrainConfig
    preset: Preset
    data: TrainingData
    init_hash: str | None = None


def prepare(config: TrainConfig, preset: Preset | None = None) -> Plan:
    """Check what can be told without pixels; starting Ray to hear it takes half a minute.

    `preset` takes the place of the one that `config` names. Raises UsageError, CheckpointError.
    """
    options = StorageOptions(s3_endpoint=config.s3_endpoint)
    init = None
    if config.init is not None:
        init = load_checkpoint(config.init, options=options, flag="--init").hash
    config = with_absolute_paths(config)
    recipe = adapt(config, preset or find_preset(config.preset))
    for stage in recipe.stages:
        if stage.batch % config.workers:
            raise UsageError(
                f"--workers {config.workers}: batches of {stage.batch} crops cannot be shared "
                "equally. Change --workers, --batch or --batch-scale."
            )
    if config.export is not None:
        check_export(config.export)
    history = join(config.output, HISTORY)
    storage = storage_for(config.output, options)
    if storage.stat(history) is not None:
        if not config.resume:
            raise UsageError(
                f"--output {config.output} holds a training: go on with --resume or name another."
            )
        settings = join(config.output, SETTINGS)
        if storage.stat(settings) is not None:
            _require_same(json.loads(storage.read(settings)), as_dict(config))
    data = TrainingData.index(config, recipe)
    return Plan(with_length(config, recipe, data), recipe, data, init)


def _require_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UsageError where the settings of a resumed training make another task of it."""

    def differs(name: str) -> bool:
        if name == "validation_data":
            return bool(before[name]) != bool(now[name])
        return bool(before[name] != now[name])

    def text(value: Any) -> str:
        parts = value if isinstance(value, list) else [value]
        return " ".join("not given" if part is None else str(part) for part in parts or [None])

    changed = [
        f"--{name.replace('_', '-')} ({text(before[name])}, now {text(now[name])})"
        for name in TASK
        if name in before and differs(name)
    ]
    if changed:
        raise UsageError(
            f"--resume: the training in {now['output']} was begun with another "
            f"{', '.join(changed)}: give what it was, or another --output."
        )


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return settings with absolute local paths."""
    return replace(
        config,
        data=tuple(map(absolute, config.data)),
        validation_data=tuple(map(absolute, config.validation_data)),
        init=config.init and absolute_name(config.init),
        output=absolute(config.output),
    )


def stage_at(stages: tuple[Stage, ...], fraction: float) -> Stage:
    """Return the stage that the schedule is in."""
    return next(stage for stage in reversed(stages) if fraction >= stage.start)


def learning_rate(preset: Preset, config: TrainConfig, progress: Progress) -> float:
    """Linear warm-up over the first steps, then the preset's schedule from the peak."""
    peak = config.learning_rate or preset.learning_rate
    warm = min(1.0, (progress.step + 1) / max(1, _warmup_steps(preset, config)))
    if preset.schedule == "cosine":
        return peak * warm * 0.5 * (1.0 + math.cos(math.pi * progress.fraction(config)))
    return peak * warm * progress.rate_scale


def _warmup_steps(preset: Preset, config: TrainConfig) -> int:
    """Return the preset's warm-up, where the user states none at most a tenth of the steps."""
    if config.warmup_steps is not None or config.steps is None:
        return preset.warmup_steps
    return min(preset.warmup_steps, config.steps // 10)


def note_validation(progress: Progress, loss: float, preset: Preset, config: TrainConfig) -> bool:
    """Take in a validation loss: reduce on plateau, stop early. Returns whether it is the best."""
    if math.isfinite(loss) and loss < progress.best_loss:
        progress.best_loss, progress.waited, progress.waited_rate = loss, 0, 0
        return True
    progress.waited += 1
    progress.waited_rate += 1
    if preset.schedule == "plateau" and progress.waited_rate >= preset.plateau.patience:
        peak = config.learning_rate or preset.learning_rate
        lowest = preset.plateau.floor / peak
        lower = max(lowest, progress.rate_scale * preset.plateau.factor)
        progress.rate_scale = min(progress.rate_scale, lower)
        progress.waited_rate = 0
    if config.early_stop is not None and progress.waited >= config.early_stop:
        progress.stopped = True
    return False


def loss_function(name: str) -> Callable[[Any, Any], Any]:
    """Return (predicted, target) -> the loss of every value, as TensorFlow tensors.

    l1 |p - t|; mse (p - t)^2; charbonnier sqrt((p - t)^2 + 1e-6) (Charbonnier et al., 1994);
    crossentropy -t log p - (1 - t) log(1 - p), p held between 1e-7 and 1 - 1e-7.
    """
    import tensorflow as tf

    def crossentropy(predicted: Any, target: Any) -> Any:
        p = tf.clip_by_value(predicted, EPSILON, 1 - EPSILON)
        return -(target * tf.math.log(p) + (1 - target) * tf.math.log(1 - p))

    return {
        "l1": lambda p, t: tf.abs(p - t),
        "mse": lambda p, t: tf.square(p - t),
        "charbonnier": lambda p, t: tf.sqrt(tf.square(p - t) + 1e-6),
        "crossentropy": crossentropy,
    }[name]


def communication(gpus: float | None, *, seen: bool) -> str:
    """Return how workers of so many GPUs each sum gradients, as TensorFlow names it.

    Left to itself TensorFlow takes the ring through the hosts' memory. NCCL needs a GPU for each
    worker alone, and one that TensorFlow has `seen`.
    """
    return "NCCL" if seen and gpus == 1 else "RING"


def psnr_of(output: Array, clean: Array) -> float:
    """Return the PSNR in dB, at most 120, of float arrays of one shape in [0, 1].

    The output is clipped and rounded to 8 bits, the clean one taken as it is.
    """
    rounded = np.round(np.clip(output, 0.0, 1.0) * 255.0) / 255.0
    return -10.0 * math.log10(max(float(np.mean((rounded - clean) ** 2)), 1e-12))


class Trainer:
    """One worker's training of one model. `rank` 0 writes checkpoints; all ranks call alike.

    `images` counts the crops that all workers took since the start or resume; `shown` has the
    first held-out crops, (noisy, clean, output) of the weights last measured.

    `config` and `preset` are as `prepare` returns them. `source` makes the batches; by
    default a thread of this process does. Raises UsageError for images that do not fit,
    CheckpointError for `initial` weights of another model.
    """

    def __init__(
        self,
        config: TrainConfig,
        preset: Preset,
        data: TrainingData,
        *,
        rank: int = 0,
        precision: str = "float32",
        initial: list[Array] | None = None,
        source: Source | None = None,
    ) -> None:
        tf = import_tensorflow()
        import keras

        self.config, self.preset, self.rank, self.precision = config, preset, rank, precision
        self.progress = Progress()
        self.images = 0
        self.shown: list[tuple[Array, Array, Array]] = []
        self.sampler = Sampler.make(data.training, config, preset)
        self.source = source or self._in_thread
        self.strategy = (
            tf.distribute.MultiWorkerMirroredStrategy(
                communication_options=tf.distribute.experimental.CommunicationOptions(
                    implementation=communication(config.gpus_per_worker, seen=has_gpu(tf))
                )
            )
            if config.workers > 1
            else tf.distribute.get_strategy()
        )
        keras.utils.set_random_seed(config.seed)
        with self.strategy.scope():
            self.model = build_model(preset.architecture, precision=precision, **preset.arguments)
            self.optimizer = _optimizer(config, preset)
            self.optimizer.build(self.model.trainable_variables)
        if initial is not None:
            self._start_from(initial)
        stride = int(architecture(preset.architecture).total_stride(**preset.arguments))
        self.held_out = validation_pairs(
            held_out(preset, data),
            self.sampler,
            noise=parse_noise(preset.validation_noise or preset.noise),
            side=_validation_side(preset),
            stride=stride,
        )
        self.ema = self.model.get_weights()
        self._predict = tf.function(lambda x: self.model(x, training=False))
        self._loss = loss_function(preset.loss)
        self._step = self._make_step(tf)

    def _start_from(self, weights: list[Array]) -> None:
        try:
            self.model.set_weights(weights)
        except ValueError as error:
            raise CheckpointError(
                f"--init {self.config.init}: not of the architecture of --preset "
                f"{self.config.preset} ({error})."
            ) from error

    def _compiled(self, tf: Any) -> bool:
        """Return whether XLA compiles the gradients."""
        # Batch normalisations of several workers sum over them, outside of what XLA compiles.
        if not self.preset.xla or (self.config.workers > 1 and _has_state(self.model)):
            return False
        # On CPUs XLA computes bfloat16 no faster than float32; oneDNN, without it, in 2/3 the time.
        return self.precision == "float32" or bool(tf.config.list_logical_devices("GPU"))

    def _make_step(self, tf: Any) -> Any:
        model, optimizer, strategy = self.model, self.optimizer, self.strategy
        replicas, bound, each = self.config.workers, self.preset.clip_norm, self._loss
        mode = self.config.mode

        def predict(noisy: Any) -> Any:
            return tf.cast(model(noisy, training=True), tf.float32)

        def loss_of(noisy: Any, clean: Any, squared: Any, fraction: Any) -> Any:
            def loss(p: Any, t: Any) -> Any:
                return tf.where(squared, tf.square(p - t), each(p, t))

            if mode == "neighbor2neighbor":
                weight = REGULARIZER * fraction
                return neighbours_loss(predict, noisy, clean, loss=loss, weight=weight)
            if mode == "noise2void":
                return blind_spots_loss(predict(noisy), clean, loss=loss)
            return tf.reduce_mean(loss(predict(noisy), clean))

        def gradients(noisy: Any, clean: Any, squared: Any, fraction: Any) -> Any:
            with tf.GradientTape() as tape:
                # Divided by the global batch: `summed` adds up the replicas.
                loss = loss_of(noisy, clean, squared, fraction) / replicas
            return loss, tape.gradient(loss, model.trainable_variables)

        if self._compiled(tf):
            gradients = tf.function(gradients, jit_compile=True)

        def summed(grads: Any) -> Any:
            """Sum over all replicas and bound the sum's norm, the same whatever their number."""
            if replicas > 1:
                context = tf.distribute.get_replica_context()
                grads = context.all_reduce(tf.distribute.ReduceOp.SUM, grads)
            return tf.clip_by_global_norm(grads, bound)[0] if bound else grads

        @tf.function
        def step(noisy: Any, clean: Any, rate: Any, squared: Any, fraction: Any) -> Any:
            def replica() -> Any:
                loss, grads = gradients(noisy, clean, squared, fraction)
                return loss, summed(grads)

            loss, grads = strategy.run(replica)
            optimizer.learning_rate.assign(rate)
            # Out here Keras does not sum over the replicas once more.
            optimizer.apply(grads, model.trainable_variables)
            return strategy.reduce(tf.distribute.ReduceOp.SUM, loss, axis=None)

        return step

    def places(self, stage: Stage) -> range:
        """Return the places of the global batch that are this worker's."""
        return places_of(stage, rank=self.rank, workers=self.config.workers)

    def _in_thread(self, stage: Stage, *, step: int) -> Batches:
        places = self.places(stage)

        def endless() -> Batches:
            at = step
            while True:
                yield self.sampler.batch(step=at, crop=stage.crop, places=places, size=stage.batch)
                at += 1

        return prefetch(endless())

    def run(
        self,
        report: Callable[[dict[str, float], bool], None],
        *,
        tick: Callable[[float], None] | None = None,
    ) -> None:
        """Train to the end of the schedule.

        `report(metrics, save)` is called at the same steps on every rank; where `save` is true,
        rank 0 should keep a checkpoint with `save_state`. `metrics` has the mean loss since the
        last report, and after a validation `val_loss`, `psnr` (NaN where nothing clean is known)
        and `best`, 1.0 where the validation loss is the lowest yet. `tick(loss)` is called now and
        then. Raises RunFailed on a loss that is not finite; the last checkpoint is then good.
        """
        clock = _Clock()
        losses: list[float] = []
        while (fraction := self.progress.fraction(self.config)) < 1.0:
            stage = stage_at(self.preset.stages, fraction)
            batches: Any = self.source(stage, step=self.progress.step)
            with closing(batches):
                for at, (noisy, clean) in enumerate(batches):
                    if at == 0:
                        # Starting a stream of crops is no training.
                        clock.resume()
                    losses.append(self.train_step(noisy, clean, fraction=fraction))
                    self.progress.seconds += clock.lap()
                    self.progress.pixels += noisy.size // noisy.shape[-1] * self.config.workers
                    self.images += len(noisy) * self.config.workers
                    if tick is not None and clock.tick_due():
                        tick(losses[-1])
                    fraction = self.progress.fraction(self.config)
                    if fraction >= 1.0 or self._validation_due(clock.since_validation()):
                        report(self._validate(losses), True)
                        losses, fraction = [], self.progress.fraction(self.config)
                        clock.validated()
                    elif self._checkpoint_due(clock.since_save()):
                        self._require_finite()
                        report({"loss": float(np.mean(losses)), "psnr": math.nan}, True)
                        losses = []
                        clock.saved()
                    if fraction >= 1.0 or stage_at(self.preset.stages, fraction) is not stage:
                        break

    def _validation_due(self, seconds: float) -> bool:
        if self.config.validate_steps is not None or self.config.workers > 1:
            return self.progress.step % (self.config.validate_steps or VALIDATE_STEPS) == 0
        return seconds >= (self.config.validate_minutes or VALIDATE_MINUTES) * 60.0

    def _checkpoint_due(self, seconds: float) -> bool:
        if self.config.workers == 1:
            return seconds >= self.config.checkpoint_minutes * 60.0
        every = min(CHECKPOINT_STEPS, self.config.validate_steps or CHECKPOINT_STEPS)
        return self.progress.step % every == 0

    def train_step(self, noisy: Array, clean: Array, *, fraction: float) -> float:
        """Take one optimizer step at that share of the schedule; return the loss.

        `noisy` and `clean` are a `Source`'s batch. Raises RunFailed where the loss is not finite.
        """
        import tensorflow as tf

        rate = learning_rate(self.preset, self.config, self.progress)
        squared = tf.constant(fraction >= self.preset.mse_from)
        numbers = tf.constant(rate, tf.float32), squared, tf.constant(fraction, tf.float32)
        loss = float(self._step(noisy, clean, *numbers))
        if not math.isfinite(loss):
            raise self._diverged(f"The loss became {loss}")
        self.progress.step += 1
        if self.preset.ema and self.progress.step % EMA_EVERY == 0:
            self.ema = self._averaged(EMA_EVERY)
        return loss

    def _averaged(self, steps: int) -> list[Array]:
        """Return the moving average with the weights as they are, which stand for `steps` steps."""
        # The average starts short, so that the first weights are soon forgotten.
        momentum = min(self.preset.ema, (1 + self.progress.step) / (10 + self.progress.step))
        keep = momentum**steps
        pairs = zip(self.ema, self.model.get_weights(), strict=True)
        return [average * keep + (1.0 - keep) * value for average, value in pairs]

    def best_weights(self) -> list[Array]:
        """Return the weights to validate and to keep: the moving average, where there is one.

        The steps since its last update come in on the way out alone, so that the average does not
        depend on when somebody asks.
        """
        if not self.preset.ema:
            return list(self.model.get_weights())
        return self._averaged(self.progress.step % EMA_EVERY)

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
        if not self.preset.ema:
            self.ema = current
        self.model.set_weights(self.best_weights())
        val_loss, psnr = self.measure()
        val_loss = self._of_first(val_loss)
        self.model.set_weights(current)
        rate = learning_rate(self.preset, self.config, self.progress)
        best = note_validation(self.progress, val_loss, self.preset, self.config)
        if best:
            self.progress.best_psnr = psnr
        return {
            "loss": float(np.mean(losses)),
            "val_loss": val_loss,
            "psnr": psnr,
            "rate": rate,
            "best": float(best),
        }

    def _of_first(self, value: float) -> float:
        """Return rank 0's value on every rank.

        The loss decides rate and end. Machines differ in the last digits, and a rank that stops
        alone would leave the others waiting.
        """
        if self.config.workers == 1:
            return value
        import tensorflow as tf

        part = tf.constant(value if self.rank == 0 else 0.0, tf.float64)

        @tf.function
        def whole() -> Any:
            parts = self.strategy.run(lambda: part)
            return self.strategy.reduce(tf.distribute.ReduceOp.SUM, parts, axis=None)

        return float(whole())

    def measure(self) -> tuple[float, float]:
        """Return the mean loss and PSNR in dB over the held-out pairs, of the weights as they are.

        PSNR is NaN in the self-supervised modes, where the target is noisy too.
        """
        import tensorflow as tf

        values, psnrs, self.shown = [], [], []
        for noisy, clean, output in self.outputs(self.held_out):
            known = np.isfinite(clean)
            values.append(float(tf.reduce_mean(self._loss(output[known], clean[known]))))
            psnrs.append(math.nan if self.config.self_supervised else psnr_of(output, clean))
            if len(self.shown) < SHOWN:
                self.shown.append((noisy, clean, output))
        return float(np.mean(values)), float(np.mean(psnrs))

    def outputs(self, pairs: list[tuple[Array, Array]]) -> Iterator[tuple[Array, Array, Array]]:
        """Yield (noisy, clean, output), neighbours of one shape predicted together."""
        start = 0
        while start < len(pairs):
            shape = pairs[start][0].shape
            most = max(1, PREDICT_PIXELS // (shape[0] * shape[1]))
            group = []
            for pair in pairs[start : start + most]:
                if pair[0].shape != shape:
                    break
                group.append(pair)
            outputs = self._predict(np.stack([noisy for noisy, _ in group])).numpy()
            yield from ((n, c, o) for (n, c), o in zip(group, outputs, strict=True))
            start += len(group)

    def save_state(self, folder: Path) -> None:
        """Write everything that `load_state` needs to go on as if never stopped."""
        arrays = {f"w{i:04d}": w for i, w in enumerate(self.model.get_weights())}
        arrays |= {f"e{i:04d}": e for i, e in enumerate(self.ema)}
        arrays |= {f"o{i:04d}": v.numpy() for i, v in enumerate(self.optimizer.variables)}
        arrays |= {f"s{i:04d}": v.numpy() for i, v in enumerate(_seeds(self.model))}
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "state.npz", **arrays)
        progress = {**asdict(self.progress), "held_out": self._held_out_hash()}
        (folder / "progress.json").write_text(json.dumps(progress))

    def load_state(self, folder: Path) -> bool:
        """Take up weights, averages, optimizer and progress, or none of them.

        Returns whether its losses were over other held-out images: then the best loss and the waits
        for a better one begin anew. Raises CheckpointError.
        """
        try:
            told = dict(json.loads((folder / "progress.json").read_text()))
            # Earlier versions did not tell; their images are taken to be the same.
            mine = self._held_out_hash()
            other_images = told.pop("held_out", mine) != mine
            progress = Progress(**told)
            if other_images:
                fresh = Progress()
                for name in ("best_loss", "best_psnr", "waited", "waited_rate"):
                    setattr(progress, name, getattr(fresh, name))
            with np.load(folder / "state.npz", allow_pickle=False) as arrays:
                parts = {
                    kind: [arrays[name] for name in sorted(arrays.files) if name[0] == kind]
                    for kind in "weos"
                }
            # Earlier versions kept no seeds; their runs draw the first masks again.
            seeds = _seeds(self.model) if parts["s"] else []
            others = [*self.optimizer.variables, *seeds]
            state = [*self.model.weights, *self.model.weights, *others]
            values = [*parts["w"], *parts["e"], *parts["o"], *parts["s"]]
            for variable, value in zip(state, values, strict=True):
                if tuple(variable.shape) != value.shape:
                    raise ValueError(f"{value.shape} where {tuple(variable.shape)} is expected")
            self.model.set_weights(parts["w"])
            for variable, value in zip(others, [*parts["o"], *parts["s"]], strict=True):
                variable.assign(value)
            self.ema, self.progress = parts["e"], progress
            if self.config.early_stop is None or progress.waited < self.config.early_stop:
                progress.stopped = False
        except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{folder}: no checkpoint of this preset can be read there ({error})."
            ) from error
        return other_images

    def _held_out_hash(self) -> str:
        """Hash the targets of the held-out pairs, wherever their images lie."""
        digest = hashlib.sha256()
        for _, target in self.held_out:
            digest.update(str(target.shape).encode() + target.tobytes())
        return digest.hexdigest()


class _Clock:
    """Times between steps, reports and ticks, in seconds."""

    def __init__(self) -> None:
        self.now = self.checked = self.kept = self.told = time.monotonic()

    def lap(self) -> float:
        before, self.now = self.now, time.monotonic()
        return self.now - before

    def resume(self) -> None:
        self.now = time.monotonic()

    def tick_due(self) -> bool:
        due = self.now - self.told >= TICK_S
        self.told = self.now if due else self.told
        return due

    def since_validation(self) -> float:
        return self.now - self.checked

    def since_save(self) -> float:
        return self.now - self.kept

    def validated(self) -> None:
        """Begin anew: the time of a validation is none of training."""
        self.now = self.checked = self.kept = time.monotonic()

    def saved(self) -> None:
        self.now = self.kept = time.monotonic()


def places_of(stage: Stage, *, rank: int, workers: int) -> range:
    """Return the places of a stage's global batch that belong to one worker."""
    share = stage.batch // workers
    return range(rank * share, (rank + 1) * share)


def _optimizer(config: TrainConfig, preset: Preset) -> Any:
    import keras

    if preset.optimizer == "adamw":
        return keras.optimizers.AdamW(0.0, weight_decay=config.weight_decay)
    return {"adam": keras.optimizers.Adam, "adadelta": keras.optimizers.Adadelta}[preset.optimizer](
        0.0
    )


def _seeds(model: Any) -> list[Any]:
    """Return the states of a model's random numbers, such as a dropout's, which are no weights."""
    weights = {id(weight) for weight in model.weights}
    return [variable for variable in model.variables if id(variable) not in weights]


def _has_state(model: Any) -> bool:
    return len(model.weights) > len(model.trainable_weights)
