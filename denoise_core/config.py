"""The settings of every job: frozen, checked when they are made, told apart by what they change.

Each field carries its help text and its short facts in the dataclass metadata, so that a command
line, a configuration file and an environment variable are all derived from this one statement.
Nothing here knows a command-line library or Ray.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from denoise_core.errors import UsageError


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    choices: tuple[str, ...] = (),
    positional: bool = False,
    metavar: str = "",
    many: bool = False,
) -> Any:
    """Declare one setting. `many`: the flag takes all words that follow it, up to the next flag."""
    metadata = {
        "help": help,
        "choices": choices,
        "positional": positional,
        "metavar": metavar,
        "many": many,
    }
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def model_range_setting() -> Any:
    """Declare the setting `model_range`, as every job with a model has it."""
    text = "Black and white as a Keras file's model was trained on them; auto: 0:1."
    return setting("auto", text, metavar="LO:HI")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ' Did you mean X?' for the known word nearest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_keys(table: dict[str, Any], settings: type, *, source: str) -> None:
    """Raise UsageError where `table` has a key that is no field of `settings`."""
    known = [f.name for f in dataclasses.fields(settings)]
    for key in table:
        if key.replace("-", "_") not in known:
            raise UsageError(
                f"{source}: unknown setting {key!r}.{nearest(key.replace('-', '_'), known)}"
            )


def require(condition: bool, message: str) -> None:
    """Raise UsageError with `message` unless `condition` holds."""
    if not condition:
        raise UsageError(message)


def check_choices(settings: Any) -> None:
    """Raise UsageError where a field of `settings` has a value outside its choices."""
    for f in dataclasses.fields(settings):
        value, choices = getattr(settings, f.name), f.metadata["choices"]
        if choices and value is not None and value not in choices:
            flag = f.name.replace("_", "-")
            raise UsageError(
                f"--{flag} {value!r}: expected one of {', '.join(choices)}."
                f"{nearest(str(value), choices)}"
            )


def parse_auto_int(value: str, *, name: str, words: tuple[str, ...], low: int) -> int | str:
    """Read a whole number of at least `low`, or one of `words`."""
    if value in words:
        return value
    if re.fullmatch(r"\d+", value) and int(value) >= low:
        return int(value)
    allowed = ", ".join(words)
    raise UsageError(f"--{name} {value!r}: expected {allowed} or a whole number from {low}.")


def parse_data_range(value: str, *, flag: str = "data-range") -> tuple[float, float] | None:
    """Read 'auto' as None and 'LO:HI' as two numbers with LO < HI."""
    if value == "auto":
        return None
    low, colon, high = value.partition(":")
    try:
        bounds = float(low), float(high)
    except ValueError:
        bounds = (0.0, 0.0)
    require(
        bool(colon) and bounds[0] < bounds[1] and all(abs(b) != float("inf") for b in bounds),
        f"--{flag} {value!r}: expected 'auto' or LO:HI with LO < HI, for example 0:4095.",
    )
    return bounds


def parse_actors(value: str) -> tuple[int, int] | None:
    """Read 'auto' as None, 'N' as (N, N) and 'MIN:MAX' as (MIN, MAX)."""
    if value == "auto":
        return None
    match = re.fullmatch(r"(\d+)(?::(\d+))?", value)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    require(
        1 <= low <= high,
        f"--actors {value!r}: expected 'auto', a number from 1 or MIN:MAX, for example 1:8.",
    )
    return low, high


MOST_SECONDS = 10_000_000
# What a format can hold, where that is not all of --bit-depth.
FORMAT_DEPTHS = {"png": ("8", "16"), "jpeg": ("8",), "webp": ("8",), "bmp": ("8",)}
COMPRESSIONS = {
    "tiff": ("none", "deflate", "lzw", "zstd", "lzma"),
    "png": tuple("0123456789"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiseConfig:
    """Settings of `jobs.denoise`."""

    inputs: tuple[str, ...] = setting(
        help="Files, .zarr folders, folders, globs or s3://bucket/prefix.",
        positional=True,
        metavar="INPUT...",
    )
    output: str = setting(help="Folder or s3://bucket/prefix for images and reports.")
    model: str = setting(
        "auto",
        "A shipped model's name, or the path or URI of a checkpoint or a Keras file (.keras, .h5); "
        "auto: unet-s-photo for 8-bit pictures from cameras, unet-s for the rest.",
        metavar="NAME|PATH|URI",
    )
    model_range: str = model_range_setting()
    reference: str | None = setting(
        None, "Clean images under the same relative paths; adds PSNR, SSIM and MSE.", metavar="URI"
    )
    recursive: bool = setting(True, "Descend into sub-folders.")
    include: tuple[str, ...] = setting(
        (), "Only relative paths that match; may be given several times.", metavar="GLOB"
    )
    exclude: tuple[str, ...] = setting((), "No relative paths that match.", metavar="GLOB")
    limit: int | None = setting(
        None, "Stop after the first N inputs, in the order of listing.", metavar="N"
    )
    dry_run: bool = setting(False, "List what would be done and stop.")
    patch: str = setting(
        "256",
        "Core of a patch in pixels; auto: as large as memory allows, on a rerun as before.",
        metavar="256|N|auto",
    )
    halo: str = setting(
        "auto", "Context around a core; exact: the receptive radius.", metavar="auto|exact|N"
    )
    batch_size: str = setting("auto", "Patches in one step of the model.", metavar="auto|N")
    strength: float = setting(
        1.0, "Blend: 0 leaves the image alone, 1 is the model's output.", metavar="0..1"
    )
    precision: str = setting(
        "auto",
        "Compute type; auto: bfloat16 where the device is fast at it.",
        choices=("auto", "float32", "bfloat16"),
    )
    data_range: str = setting(
        "auto",
        "Black and white; auto: the integer type's, of floats 0:1 or, beyond it, their own.",
        metavar="LO:HI",
    )
    format: str = setting(
        "preserve",
        "Output format; a Zarr becomes a Zarr, a TIFF or, where it is small, another.",
        choices=("preserve", "png", "tiff", "jpeg", "webp", "bmp", "npy"),
    )
    bit_depth: str = setting(
        "preserve", "Output bit depth.", choices=("preserve", "8", "16", "32f")
    )
    compression: str | None = setting(
        None,
        "TIFF: none, deflate, lzw, zstd or lzma; PNG: a level of 0 to 9; default: the source's.",
        choices=(*COMPRESSIONS["tiff"], *COMPRESSIONS["png"]),
    )
    copy_below: str = setting(
        "auto",
        "Copy images of a lower noise sigma (of 255); auto: by the model's break-even figures.",
        metavar="auto|SIGMA",
    )
    existing: str = setting(
        "skip",
        "What to do with images done by an earlier run.",
        choices=("skip", "overwrite", "fail"),
    )
    retry_failed: bool = setting(False, "Do only the images that failed in earlier runs.")
    max_error_rate: float = setting(
        0.0, "Share of failed images above which the exit code is 3.", metavar="0..1"
    )
    max_attempts: int = setting(
        3, "Times an image is tried whose worker dies before it is marked failed.", metavar="N"
    )
    timeout_per_image: float = setting(
        600.0, "Seconds of work after which one image is given up.", metavar="S"
    )
    max_pixels: int = setting(
        400_000_000, "Refuse images of more pixels that must be decoded whole.", metavar="N"
    )
    region: int = setting(
        2048, "Core of a region in pixels, for images read in windows.", metavar="N"
    )
    actors: str = setting("auto", "Denoising actors.", metavar="auto|N|MIN:MAX")
    gpus_per_actor: str = setting(
        "auto", "GPUs of one actor; fractions share one.", metavar="auto|F"
    )
    progress: str = setting(
        "auto", "Live bar on a terminal, plain lines, or JSON.", choices=("auto", "plain", "json")
    )
    s3_endpoint: str | None = setting(None, "URL of an S3-compatible server.", metavar="URL")

    def __post_init__(self) -> None:
        check_choices(self)
        require(
            len(self.inputs) > 0 and all(self.inputs),
            "No INPUT given, or an empty one: name a file, a folder or s3://bucket/prefix.",
        )
        require(bool(self.output), "--output is empty: name a folder or s3://bucket/prefix.")
        depths = FORMAT_DEPTHS.get(self.format, (self.bit_depth,))
        require(
            self.bit_depth in ("preserve", *depths),
            f"--format {self.format} cannot hold --bit-depth {self.bit_depth}, only "
            f"{' or '.join(depths)}.",
        )
        fitting = COMPRESSIONS.get(self.format, ())
        require(
            self.compression in (None, *fitting) or self.format == "preserve",
            f"--format {self.format} has no --compression {self.compression}"
            + (f", only {', '.join(fitting)}." if fitting else "; leave it out."),
        )
        parse_auto_int(self.patch, name="patch", words=("auto",), low=32)
        parse_auto_int(self.halo, name="halo", words=("auto", "exact"), low=0)
        parse_auto_int(self.batch_size, name="batch-size", words=("auto",), low=1)
        parse_data_range(self.data_range)
        parse_data_range(self.model_range, flag="model-range")
        parse_actors(self.actors)
        require(0.0 <= self.strength <= 1.0, f"--strength {self.strength}: expected 0.0 to 1.0.")
        require(
            0.0 <= self.max_error_rate <= 1.0,
            f"--max-error-rate {self.max_error_rate}: expected 0.0 to 1.0.",
        )
        require(
            0 < self.timeout_per_image <= MOST_SECONDS,
            f"--timeout-per-image {self.timeout_per_image:g}: expected seconds above 0, at most "
            f"{MOST_SECONDS:,}.",
        )
        require(self.max_attempts >= 1, "--max-attempts: expected a whole number from 1.")
        require(self.max_pixels >= 1, "--max-pixels: expected a whole number from 1.")
        require(self.limit is None or self.limit >= 1, "--limit: expected a number from 1.")
        require(
            self.region >= 256 and self.region % 256 == 0,
            f"--region {self.region}: expected a multiple of 256.",
        )
        self.check_number("gpus-per-actor", self.gpus_per_actor)
        self.check_number("copy-below", self.copy_below)

    @staticmethod
    def check_number(name: str, value: str) -> None:
        """Raise UsageError unless `value` is 'auto' or a number of at least 0."""
        if value != "auto":
            require(
                re.fullmatch(r"\d+(\.\d*)?|\.\d+", value) is not None,
                f"--{name} {value!r}: expected 'auto' or a number from 0.",
            )


# Settings that change an output's pixels or bytes. A change of any of them redoes an image.
PIXEL_SETTINGS = (
    "model_range",
    "patch",
    "halo",
    "strength",
    "precision",
    "data_range",
    "format",
    "bit_depth",
    "compression",
    "copy_below",
)


def pixel_hash(config: DenoiseConfig, *, model_hash: str) -> str:
    """Hash what decides an output's pixels: the model and the settings that change them."""
    decisive = {name: getattr(config, name) for name in PIXEL_SETTINGS}
    text = json.dumps({"model": model_hash, **decisive}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


LENGTHS = ("steps", "epochs", "hours")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of `jobs.train`. What is None here, the preset says."""

    # One of each at most is not None.
    EXCLUSIVE: ClassVar = (LENGTHS, ("validate_minutes", "validate_steps"))

    data: tuple[str, ...] = setting(
        help="Folders, files, globs or s3://bucket/prefix of images; IDX files.",
        positional=True,
        metavar="DATA...",
    )
    output: str = setting(help="Folder or s3://bucket/prefix for checkpoints and the best model.")
    preset: str = setting("unet-s", "Architecture and recipe.", metavar="NAME")
    noise: tuple[str, ...] = setting(
        (),
        "Noise added to clean images, such as gaussian:0-55 (sigma in 1/255; README has all); "
        "of several, each crop draws one.",
        metavar="SPEC...",
        many=True,
    )
    noisy: str | None = setting(
        None, "Train on pairs: the noisy files' paths, '*' for what pairs share.", metavar="PATTERN"
    )
    clean: str | None = setting(
        None, "Train on pairs: the clean files' paths, such as '*_mean.JPG'.", metavar="PATTERN"
    )
    self_supervised: str | None = setting(
        None,
        "DATA is noisy and there is nothing clean: how to learn from it.",
        choices=("neighbor2neighbor", "noise2void"),
    )
    validation: float = setting(
        0.05, "Share of the images held out for validation.", metavar="0..1"
    )
    validation_data: tuple[str, ...] = setting(
        (), "Images to validate on, instead of a share.", metavar="DATA...", many=True
    )
    grey: float | None = setting(None, "Share of crops turned to grey.", metavar="0..1")
    augment: str | None = setting(
        None, "Of flip, rotate90, scale and affine, with commas; or none.", metavar="WORD[,WORD]"
    )
    steps: int | None = setting(None, "Optimizer steps of the whole schedule.", metavar="N")
    epochs: float | None = setting(None, "Length as passes over the images.", metavar="N")
    hours: float | None = setting(
        None,
        "Hours of training of the whole schedule, over all resumes; validation comes on top.",
        metavar="H",
    )
    learning_rate: float | None = setting(None, "Peak rate; default: the preset's.", metavar="F")
    crop: int | None = setting(None, "Side of the crops in pixels.", metavar="N")
    batch: int | None = setting(None, "Crops of one step, over all workers.", metavar="N")
    batch_scale: int = setting(1, "Multiply the preset's batch sizes.", metavar="N")
    arguments: tuple[str, ...] = setting(
        (),
        "Arguments of the preset's architecture, such as widths=[24,48,96] blocks=[1,1,2].",
        metavar="KEY=VALUE...",
        many=True,
    )
    loss: str | None = setting(
        None, "What is minimised.", choices=("l1", "mse", "charbonnier", "crossentropy")
    )
    optimizer: str | None = setting(
        None, "How it is minimised.", choices=("adam", "adamw", "adadelta")
    )
    weight_decay: float = setting(1e-4, "Of adamw.", metavar="F")
    schedule: str | None = setting(
        None,
        "Rate after the warm-up: to zero, halved where the loss stands still, or as it is.",
        choices=("cosine", "plateau", "constant"),
    )
    warmup_steps: int | None = setting(None, "Steps of linear warm-up.", metavar="N")
    ema: float | None = setting(
        None, "Momentum of the weights' moving average; 0: none.", metavar="0..1"
    )
    clip_norm: float | None = setting(None, "Bound on the gradients' norm; 0: none.", metavar="F")
    early_stop: int | None = setting(
        None, "End after so many validations without a better loss.", metavar="N"
    )
    seed: int = setting(0, "Seed of initial weights, crops and noise.", metavar="N")
    validate_minutes: float | None = setting(
        None,
        "Minutes between two validations, of one worker; default: 10, with epochs one epoch.",
        metavar="M",
    )
    validate_steps: int | None = setting(
        None,
        "Steps between two validations, instead of minutes; several workers: 500, or one epoch.",
        metavar="N",
    )
    checkpoint_minutes: float = setting(
        5.0,
        "Minutes between two checkpoints; several workers keep one every 500 steps.",
        metavar="M",
    )
    init: str | None = setting(
        None, "Checkpoint to take the first weights from.", metavar="NAME|PATH|URI"
    )
    precision: str = setting(
        "auto",
        "Compute type; auto: bfloat16 where the device is fast at it.",
        choices=("auto", "float32", "bfloat16"),
    )
    input: str = setting(
        "ray",
        "Who makes the crops: Ray Data, or a thread of the worker.",
        choices=("ray", "thread"),
    )
    workers: int = setting(1, "Data-parallel workers.", metavar="N")
    gpus_per_worker: float | None = setting(
        None,
        "GPUs of one worker; a fraction shares one; default: one where each can have one.",
        metavar="0..1",
    )
    threads: int | None = setting(None, "CPU threads of one worker.", metavar="N")
    max_failures: int = setting(3, "Times the worker group is restarted.", metavar="N")
    resume: bool = setting(False, "Go on from the last checkpoint in --output.")
    export: str | None = setting(
        None,
        "Also write the best model for other tools.",
        choices=("onnx", "savedmodel"),
    )
    progress: str = setting(
        "auto", "Live bar on a terminal, plain lines, or JSON.", choices=("auto", "plain", "json")
    )
    s3_endpoint: str | None = setting(None, "URL of an S3-compatible server.", metavar="URL")

    def __post_init__(self) -> None:
        check_choices(self)
        require(
            len(self.data) > 0 and all(self.data),
            "No DATA given, or an empty one: name a folder of images, before the flags (a word "
            "after --noise belongs to that flag).",
        )
        require(bool(self.output), "--output is empty: name a folder or s3://bucket/prefix.")
        self._check_data()
        self._check_length()
        self._check_numbers()

    @property
    def mode(self) -> str:
        """'clean', 'pairs', 'neighbor2neighbor' or 'noise2void'."""
        return self.self_supervised or ("pairs" if self.noisy is not None else "clean")

    def _check_data(self) -> None:
        check_pair_patterns(self.noisy, self.clean)
        require(
            self.noisy is None or self.self_supervised is None,
            "--self-supervised learns without clean images: leave out --noisy and --clean.",
        )
        require(
            self.mode == "clean" or not self.noise,
            f"--noise is added to clean images; with {self.mode} the images bring their own.",
        )
        require(
            self.grey is None or 0 <= self.grey <= 1, f"--grey {self.grey}: expected 0.0 to 1.0."
        )
        require(
            self.mode == "clean" or not self.grey,
            f"--grey {self.grey} is for clean images that get noise; with {self.mode} they are "
            "taken as they are: leave it out.",
        )
        if self.self_supervised is not None:
            self._check_self_supervised()
        require(0 < self.validation < 1, f"--validation {self.validation}: expected 0 to 1.")

    def _check_self_supervised(self) -> None:
        require(
            self.loss in (None, "mse"),
            f"--loss {self.loss}: --self-supervised learns from noisy targets, of which only the "
            "squared error tends to the clean image; leave --loss out.",
        )
        # A lag-1 correlation of 0.25 in what was white noise.
        require(
            "affine" not in (self.augment or ""),
            f"--augment {self.augment}: affine interpolates, which makes neighbours' noise alike, "
            "and --self-supervised takes it to be independent; leave affine out.",
        )

    def _check_length(self) -> None:
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        require(
            len(given) <= 1,
            "Give the length of training by one of --steps N, --epochs N and --hours H.",
        )
        require(self.steps is None or self.steps >= 1, "--steps: expected a number from 1.")
        for name in ("hours", "epochs"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"--{name}: expected a number above 0.")
        require(
            self.validate_minutes is None or self.validate_steps is None,
            "Give the time between validations by one of --validate-minutes and --validate-steps.",
        )
        # Clocks differ between workers; steps do not, and all must change stage and stop alike.
        require(
            self.workers <= 1 or self.validate_minutes is None,
            "--workers above 1 validate by steps: give --validate-steps N, not --validate-minutes.",
        )
        require(
            self.workers <= 1 or self.hours is None,
            "--workers above 1 needs the length of training in --steps or --epochs.",
        )

    def _check_numbers(self) -> None:
        for name in ("crop", "batch", "batch_scale", "workers", "validate_steps", "threads"):
            value = getattr(self, name)
            flag = name.replace("_", "-")
            require(value is None or value >= 1, f"--{flag}: expected a number from 1.")
        for name in ("warmup_steps", "max_failures", "weight_decay", "seed"):
            value, flag = getattr(self, name), name.replace("_", "-")
            require(value is None or 0 <= value < math.inf, f"--{flag}: expected a number from 0.")
        require(self.seed < 2**32, f"--seed {self.seed}: expected a number below {2**32}.")
        require(
            self.gpus_per_worker is None or 0 <= self.gpus_per_worker <= 1,
            f"--gpus-per-worker {self.gpus_per_worker}: expected 0 to 1, since a worker trains on "
            "one GPU; for more give --workers.",
        )
        for name in ("validate_minutes", "checkpoint_minutes"):
            value, flag = getattr(self, name), name.replace("_", "-")
            require(value is None or value > 0, f"--{flag}: expected a number above 0.")
        require(self.ema is None or 0 <= self.ema < 1, f"--ema {self.ema}: expected 0 to 1.")
        require(
            self.clip_norm is None or 0 <= self.clip_norm < math.inf,
            "--clip-norm: expected a number from 0.",
        )
        require(self.early_stop is None or self.early_stop >= 1, "--early-stop: expected from 1.")
        require(
            self.learning_rate is None or 0 < self.learning_rate < math.inf,
            "--learning-rate: expected a number above 0.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    """Settings of `jobs.tune`."""

    # One at most is not None.
    EXCLUSIVE: ClassVar = (LENGTHS,)

    data: tuple[str, ...] = setting(
        help="Folders, files, globs or s3://bucket/prefix of images; IDX files.",
        positional=True,
        metavar="DATA...",
    )
    output: str = setting(help="Local folder for the table, the plot and the best settings.")
    space: str = setting(help="TOML file of what is searched.", metavar="FILE.toml")
    preset: str = setting("unet-s", "Architecture and recipe to begin with.", metavar="NAME")
    trials: int = setting(16, "Trials; the first is the preset as it is.", metavar="N")
    noise: tuple[str, ...] = setting(
        (), "Noise in the preset's place, where the space has none.", metavar="SPEC...", many=True
    )
    validation_noise: str | None = setting(
        None, "Noise that all trials are compared on; default: the preset's.", metavar="SPEC"
    )
    noisy: str | None = setting(
        None, "Train on pairs: the noisy files' paths, '*' for what pairs share.", metavar="PATTERN"
    )
    clean: str | None = setting(
        None, "Train on pairs: the clean files' paths, such as '*_mean.JPG'.", metavar="PATTERN"
    )
    validation: float = setting(
        0.05, "Share of the images held out for validation.", metavar="0..1"
    )
    validation_data: tuple[str, ...] = setting(
        (), "Images to validate on, instead of a share.", metavar="DATA...", many=True
    )
    crop: int | None = setting(
        None, "Side of the crops in pixels, where the space has none.", metavar="N"
    )
    batch: int | None = setting(None, "Crops of one step, where the space has none.", metavar="N")
    steps: int | None = setting(None, "Length of a trial in optimizer steps.", metavar="N")
    epochs: float | None = setting(None, "Length as passes over the images.", metavar="N")
    hours: float | None = setting(None, "Length in hours.", metavar="H")
    stop: str = setting(
        "halving",
        "halving: trials that fall behind end after a quarter or a half of their length.",
        choices=("halving", "none"),
    )
    concurrent: str = setting(
        "auto",
        "Trials at one time, which share the CPUs; auto: one for two CPUs, or by the GPUs.",
        metavar="auto|N",
    )
    gpus_per_trial: float | None = setting(
        None,
        "GPUs of one trial; fractions share one; default: one, if there is any.",
        metavar="0..1",
    )
    precision: str = setting(
        "auto",
        "Compute type; auto: bfloat16 where the device is fast at it.",
        choices=("auto", "float32", "bfloat16"),
    )
    seed: int = setting(0, "Seed of the drawn settings and of every trial.", metavar="N")
    max_failures: int = setting(2, "Times a trial whose worker dies is taken up.", metavar="N")
    resume: bool = setting(False, "Go on with the search in --output.")
    s3_endpoint: str | None = setting(None, "URL of an S3-compatible server.", metavar="URL")

    def __post_init__(self) -> None:
        check_choices(self)
        require(
            bool(self.output) and "://" not in self.output,
            f"--output {self.output!r}: expected a local folder, on a cluster a shared one.",
        )
        require(self.trials >= 1, "--trials: expected a number from 1.")
        require(self.max_failures >= 0, "--max-failures: expected a number from 0.")
        require(
            self.gpus_per_trial is None or 0 <= self.gpus_per_trial <= 1,
            f"--gpus-per-trial {self.gpus_per_trial}: expected 0 to 1, since a trial trains on one "
            "GPU.",
        )
        parse_auto_int(self.concurrent, name="concurrent", words=("auto",), low=1)
        shared = self.training()
        require(
            self.validation_noise is None or shared.mode == "clean",
            f"--validation-noise {self.validation_noise}: trials on pairs are compared on the "
            "held-out pairs as they are; leave it out.",
        )

    def training(self) -> TrainConfig:
        """Return the settings that all trials share. Raises UsageError."""
        shared = {f.name for f in dataclasses.fields(self)} & {
            f.name for f in dataclasses.fields(TrainConfig)
        }
        values = {name: getattr(self, name) for name in shared - {"resume"}}
        return TrainConfig(**values, gpus_per_worker=self.gpus_per_trial, input="thread")


def check_pair_patterns(noisy: str | None, clean: str | None) -> None:
    """Raise UsageError unless both patterns are given, with one '*' each, or none."""
    require(
        (noisy is None) == (clean is None),
        "--noisy and --clean belong together: give both, for example "
        "--noisy '*_real.JPG' --clean '*_mean.JPG'.",
    )
    for flag, pattern in (("noisy", noisy), ("clean", clean)):
        require(
            pattern is None or pattern.count("*") == 1,
            f"--{flag} {pattern!r}: expected one '*', which stands for what the names of a "
            "pair share, for example '*_real.JPG'.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Settings of `jobs.evaluate`."""

    data: tuple[str, ...] = setting(
        help="Files, folders, globs or s3://bucket/prefix of images; IDX files.",
        positional=True,
        metavar="DATA...",
    )
    output: str = setting(help="Folder or s3://bucket/prefix for figures, pictures and the page.")
    model: tuple[str, ...] = setting(
        ("unet-s",),
        "Shipped names, or paths or URIs of checkpoints or Keras files (.keras, .h5).",
        metavar="NAME|PATH|URI...",
        many=True,
    )
    model_range: str = model_range_setting()
    noise: tuple[str, ...] = setting(
        (),
        "Noise added to clean images, each measured by itself; default: gaussian:25.",
        metavar="SPEC...",
        many=True,
    )
    protocol: str = setting(
        "a",
        "a: noisy values as they are; quantised: clipped and rounded to 8 bits, as files are.",
        choices=("a", "quantised"),
    )
    noisy: str | None = setting(
        None, "Pairs: the noisy files' paths, '*' for what pairs share.", metavar="PATTERN"
    )
    clean: str | None = setting(
        None, "Pairs: the clean files' paths, such as '*_mean.JPG'.", metavar="PATTERN"
    )
    reference: str | None = setting(
        None,
        "Pairs: DATA is noisy; clean images lie here under the same relative paths.",
        metavar="URI",
    )
    baselines: tuple[str, ...] = setting(
        ("identity", "median", "bilateral", "tv", "wavelet", "nlm"),
        "Classical filters to compare with, also with commas: those and gaussian, nlm-opencv, "
        "bm3d; or none.",
        metavar="NAME...",
        many=True,
    )
    limit: int | None = setting(None, "At most N images, evenly spread.", metavar="N")
    limit_slow: int = setting(
        10, "At most N images, evenly spread, for tv, nlm, nlm-opencv and bm3d.", metavar="N"
    )
    precision: str = setting(
        "float32",
        "Compute type of the models; float32 gives the same figures on every machine.",
        choices=("auto", "float32", "bfloat16"),
    )
    max_error_rate: float = setting(
        0.0, "Share of unreadable images above which the exit code is 3.", metavar="0..1"
    )
    max_pixels: int = setting(100_000_000, "Refuse images of more pixels.", metavar="N")
    actors: str = setting("auto", "Actors that hold the models.", metavar="auto|N|MIN:MAX")
    gpus_per_actor: str = setting(
        "auto", "GPUs of one actor; fractions share one.", metavar="auto|F"
    )
    s3_endpoint: str | None = setting(None, "URL of an S3-compatible server.", metavar="URL")

    def __post_init__(self) -> None:
        check_choices(self)
        require(
            len(self.data) > 0 and all(self.data),
            "No DATA given, or an empty one: name a folder, a file or s3://bucket/prefix, before "
            "the flags (a word after --model, --noise or --baselines belongs to that flag).",
        )
        require(bool(self.output), "--output is empty: name a folder or s3://bucket/prefix.")
        require(
            all(self.model) and len(self.model) > 0, "--model: expected a name or a path, or some."
        )
        self._check_pairs()
        parse_data_range(self.model_range, flag="model-range")
        require(self.limit is None or self.limit >= 1, "--limit: expected a number from 1.")
        require(self.limit_slow >= 1, "--limit-slow: expected a number from 1.")
        require(self.max_pixels >= 1, "--max-pixels: expected a whole number from 1.")
        require(
            0.0 <= self.max_error_rate <= 1.0,
            f"--max-error-rate {self.max_error_rate}: expected 0.0 to 1.0.",
        )
        parse_actors(self.actors)
        DenoiseConfig.check_number("gpus-per-actor", self.gpus_per_actor)

    @property
    def paired(self) -> bool:
        """Whether DATA holds noisy images with clean partners."""
        return self.reference is not None or self.noisy is not None

    def _check_pairs(self) -> None:
        check_pair_patterns(self.noisy, self.clean)
        require(
            self.noisy is None or self.reference is None,
            "--reference and --noisy/--clean are two ways to name pairs: give one of them.",
        )
        require(
            not (self.paired and self.noise),
            "--noise is added to clean images, and pairs bring their own: leave --noise out.",
        )


def as_dict(config: Any) -> dict[str, Any]:
    """Return a settings object as plain JSON types."""
    table: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return table
