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
from typing import Any

from denoise_core.errors import UsageError


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    choices: tuple[str, ...] = (),
    positional: bool = False,
    metavar: str = "",
) -> Any:
    """Declare one setting."""
    metadata = {
        "help": help,
        "choices": choices,
        "positional": positional,
        "metavar": metavar,
    }
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


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


def parse_data_range(value: str) -> tuple[float, float] | None:
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
        f"--data-range {value!r}: expected 'auto' or LO:HI with LO < HI, for example 0:4095.",
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


COMPRESSIONS = ("none", "deflate", "lzw", "zstd", "lzma", *"0123456789")


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiseConfig:
    """Settings of `jobs.denoise`."""

    inputs: tuple[str, ...] = setting(
        help="Files, folders, globs or s3://bucket/prefix.", positional=True, metavar="INPUT..."
    )
    output: str = setting(help="Folder or s3://bucket/prefix for images and reports.")
    model: str = setting(
        "unet-s", "A shipped model's name or the path of a checkpoint.", metavar="NAME|PATH"
    )
    reference: str | None = setting(
        None, "Clean images under the same relative paths; adds PSNR, SSIM and MSE.", metavar="URI"
    )
    recursive: bool = setting(True, "Descend into sub-folders.")
    include: tuple[str, ...] = setting(
        (), "Only relative paths that match; may be given several times.", metavar="GLOB"
    )
    exclude: tuple[str, ...] = setting((), "No relative paths that match.", metavar="GLOB")
    limit: int | None = setting(None, "Stop after the first N inputs.", metavar="N")
    dry_run: bool = setting(False, "List what would be done and stop.")
    patch: str = setting(
        "256", "Core of a patch in pixels; auto: as large as memory allows.", metavar="256|N|auto"
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
        "auto", "Black and white; auto: the integer type's, or 0:1 for floats.", metavar="LO:HI"
    )
    format: str = setting(
        "preserve",
        "Output format.",
        choices=("preserve", "png", "tiff", "jpeg", "webp", "bmp", "npy"),
    )
    bit_depth: str = setting(
        "preserve", "Output bit depth.", choices=("preserve", "8", "16", "32f")
    )
    compression: str | None = setting(
        None,
        "TIFF: none, deflate, lzw, zstd or lzma; PNG: a level of 0 to 9; default: the source's.",
        choices=COMPRESSIONS,
    )
    copy_below: str = setting(
        "auto",
        "Copy images of a lower noise sigma (of 255); auto: the model's break-even.",
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
            len(self.inputs) > 0, "No INPUT given: name a file, a folder or s3://bucket/prefix."
        )
        require(bool(self.output), "--output is empty: name a folder or s3://bucket/prefix.")
        parse_auto_int(self.patch, name="patch", words=("auto",), low=32)
        parse_auto_int(self.halo, name="halo", words=("auto", "exact"), low=0)
        parse_auto_int(self.batch_size, name="batch-size", words=("auto",), low=1)
        parse_data_range(self.data_range)
        parse_actors(self.actors)
        require(0.0 <= self.strength <= 1.0, f"--strength {self.strength}: expected 0.0 to 1.0.")
        require(
            0.0 <= self.max_error_rate <= 1.0,
            f"--max-error-rate {self.max_error_rate}: expected 0.0 to 1.0.",
        )
        require(self.timeout_per_image > 0, "--timeout-per-image: expected seconds above 0.")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of `jobs.train`."""

    data: tuple[str, ...] = setting(
        help="Folders of clean images.", positional=True, metavar="DATA..."
    )
    output: str = setting(help="Folder for checkpoints, history and the best model.")
    preset: str = setting("unet-s", "Architecture and recipe.", metavar="NAME")
    noise: str = setting("gaussian:0-55", "Noise added to clean images.", metavar="SPEC")
    grey: float = setting(0.2, "Share of crops turned to grey.", metavar="0..1")
    steps: int | None = setting(None, "Optimizer steps of the whole schedule.", metavar="N")
    hours: float | None = setting(
        None,
        "Hours of training of the whole schedule, over all resumes; validation comes on top.",
        metavar="H",
    )
    learning_rate: float | None = setting(None, "Peak rate; default: the preset's.", metavar="F")
    batch_scale: int = setting(1, "Multiply the preset's batch sizes.", metavar="N")
    seed: int = setting(0, "Seed of initial weights, crops and noise.", metavar="N")
    validation: float = setting(
        0.05, "Share of the images held out for validation.", metavar="0..1"
    )
    validate_minutes: float = setting(10.0, "Minutes between two validations.", metavar="M")
    validate_steps: int | None = setting(
        None, "Steps between two validations, instead of minutes.", metavar="N"
    )
    checkpoint_minutes: float = setting(5.0, "Minutes between two checkpoints.", metavar="M")
    init: str | None = setting(
        None, "Checkpoint to take the first weights from.", metavar="NAME|PATH"
    )
    precision: str = setting(
        "auto",
        "Compute type; auto: bfloat16 where the device is fast at it.",
        choices=("auto", "float32", "bfloat16"),
    )
    workers: int = setting(1, "Data-parallel workers.", metavar="N")
    gpus_per_worker: float = setting(0.0, "GPUs of one worker.", metavar="F")
    threads: int | None = setting(None, "CPU threads of one worker.", metavar="N")
    max_failures: int = setting(3, "Times the worker group is restarted.", metavar="N")
    resume: bool = setting(False, "Go on from the last checkpoint in --output.")

    def __post_init__(self) -> None:
        check_choices(self)
        require(len(self.data) > 0, "No DATA given: name a folder of images.")
        require(bool(self.output), "--output is empty: name a folder.")
        require(
            (self.steps is None) != (self.hours is None),
            "Give the length of training by one of --steps N and --hours H.",
        )
        require(self.steps is None or self.steps >= 1, "--steps: expected a number from 1.")
        require(
            self.hours is None or 0 < self.hours < math.inf, "--hours: expected a number above 0."
        )
        require(0 <= self.grey <= 1, f"--grey {self.grey}: expected 0.0 to 1.0.")
        require(0 < self.validation < 1, f"--validation {self.validation}: expected 0 to 1.")
        require(self.seed >= 0, "--seed: expected a whole number from 0.")
        require(self.validate_minutes > 0, "--validate-minutes: expected a number above 0.")
        require(
            self.validate_steps is None or self.validate_steps >= 1,
            "--validate-steps: expected a number from 1.",
        )
        require(self.checkpoint_minutes > 0, "--checkpoint-minutes: expected a number above 0.")
        require(self.workers >= 1, "--workers: expected a number from 1.")
        # Clocks differ between workers; steps do not, and all must change stage and stop alike.
        require(
            self.workers == 1 or self.steps is not None,
            "--workers above 1 needs the length of training in --steps.",
        )
        require(self.gpus_per_worker >= 0, "--gpus-per-worker: expected a number from 0.")
        require(self.threads is None or self.threads >= 1, "--threads: expected a number from 1.")
        require(self.max_failures >= 0, "--max-failures: expected a number from 0.")
        require(self.batch_scale >= 1, "--batch-scale: expected a number from 1.")
        require(
            self.learning_rate is None or 0 < self.learning_rate < math.inf,
            "--learning-rate: expected a number above 0.",
        )


def as_dict(config: Any) -> dict[str, Any]:
    """Return a settings object as plain JSON types."""
    table: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return table
