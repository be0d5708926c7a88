"""What a search tries: a TOML file of ranges and lists -> the settings of each trial.

    learning_rate = {log = [1e-4, 3e-3]}
    loss = ["l1", "mse"]
    width = {uniform = [0.5, 1.5]}

    space = read_space(text, source="space.toml", preset=preset("unet-s"))
    for settings in space.trials(16, seed=0): preset, config = applied(settings, preset, config)

A key is a setting of `jobs.train` (TRAINING), an argument of the preset's architecture such as
`widths`, or one of three about the architecture: `width` multiplies all widths, `depth` is the
number of levels, `arguments` is a list of tables of arguments that belong together.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args, get_type_hints

import numpy as np

from denoise_core.config import TrainConfig, nearest, require
from denoise_core.errors import UsageError
from denoise_core.models import architecture, input_size
from denoise_core.models.autoencoder import UPS
from denoise_core.presets import Preset

TRAINING = (
    "learning_rate",
    "noise",
    "grey",
    "augment",
    "crop",
    "batch",
    "loss",
    "optimizer",
    "weight_decay",
    "schedule",
    "warmup_steps",
    "ema",
    "clip_norm",
)
"""The settings of `jobs.train` that may be searched."""

SHAPE = ("width", "depth", "arguments")
# What a search was told of its data: a training with the settings it found needs to know it too.
TOLD = (
    "noise",
    "noisy",
    "clean",
    "self_supervised",
    "validation",
    "validation_data",
    "crop",
    "batch",
    "precision",
    "seed",
    "s3_endpoint",
)
# What the data decide, not a search.
FIXED = ("channels", "size")
FORM = (
    "a list of values, {log = [LOW, HIGH]}, {uniform = [LOW, HIGH]} or {whole = [LOW, HIGH]}, "
    "for example {log = [1e-4, 3e-3]}"
)
# Narrower networks than this have nothing left to learn with.
LEAST_WIDTH = 4
# Each level halves the image: deeper ones have no pixel left.
MOST_DEPTH = 16

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Choices:
    """One of the values, all as likely."""

    values: tuple[Any, ...]

    def draw(self, rng: np.random.Generator) -> Any:
        """Draw a value."""
        return self.values[int(rng.integers(len(self.values)))]


@dataclass(frozen=True, slots=True)
class Range:
    """A number from `low` to `high`: `kind` 'uniform', 'log' (of its logarithm) or 'whole'."""

    low: float
    high: float
    kind: str

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends, of the type that is drawn."""
        kind = int if self.kind == "whole" else float
        return kind(self.low), kind(self.high)

    def draw(self, rng: np.random.Generator) -> float | int:
        """Draw a number, rounded to four digits so that it can be read and typed."""
        if self.kind == "whole":
            return int(rng.integers(int(self.low), int(self.high) + 1))
        if self.kind == "log":
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = float(rng.uniform(self.low, self.high))
        return float(f"{value:.4g}")


@dataclass(frozen=True, slots=True)
class Space:
    """What is searched, by key."""

    dimensions: dict[str, Choices | Range]

    def trials(self, count: int, *, seed: int) -> list[Settings]:
        """Return the settings of up to `count` trials, no two alike; fewer where there are no more.

        The first is empty: the preset as it is, which the others have to beat.
        """
        rng = np.random.default_rng(seed)
        found: dict[str, Settings] = {"{}": {}}
        for _ in range(100 * count):
            if len(found) == count:
                break
            settings = {key: part.draw(rng) for key, part in self.dimensions.items()}
            found.setdefault(json.dumps(settings), settings)
        return list(found.values())


def read_space(text: str, *, source: str, preset: Preset) -> Space:
    """Read a space file. Raises UsageError, naming the nearest key."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--space {source}: is not valid TOML ({error}).") from error
    known = [*TRAINING, *SHAPE, *(key for key in preset.arguments if key not in FIXED)]
    for key in table:
        require(
            key in known,
            f"--space {source}: {key!r} cannot be searched."
            + (nearest(key, known) or f" Expected some of {', '.join(known)}."),
        )
    require(bool(table), f"--space {source}: is empty; expected lines such as loss = ['l1', 'mse']")
    found = {key: _dimension(value, f"{source}: {key}") for key, value in table.items()}
    for key, part in found.items():
        for value in part.values if isinstance(part, Choices) else part.ends:
            _check(key, value, preset, f"--space {source}: {key}")
    return Space(found)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


# What a sentence about arguments that do not fit together ends with, by where they were given:
# for a network without levels, for lists of several lengths.
IN_SPACE = (
    "raise depth",
    "Lists that belong together, such as widths and blocks, need one length: put them into tables "
    "of `arguments`",
)
IN_FLAGS = (
    "name one in `--arguments widths=[24]`, or several",
    "Lists that belong together, such as widths and blocks, need one length: give both, such as "
    "`--arguments widths=[24,48] blocks=[1,1]`",
)

# A setting, or the type of one -> whether a value of a space fits, and how that is called.
KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    "noise": (lambda v: isinstance(v, str) or _is_texts(v), "a text or a list of texts"),
    "width": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "depth": (
        lambda v: type(v) is int and 0 < v <= MOST_DEPTH,
        f"a whole number from 1 to {MOST_DEPTH}",
    ),
    "widths": (
        lambda v: isinstance(v, list) and all(type(each) is int and each > 0 for each in v),
        "a list of whole numbers above 0",
    ),
    "latent": (lambda v: type(v) is int and v > 0, "a whole number from 1"),
    "up": (lambda v: v in UPS, f"one of {', '.join(UPS)}"),
    tuple: (
        lambda v: isinstance(v, list) and all(type(each) is int and each >= 0 for each in v),
        "a list of whole numbers",
    ),
    bool: (lambda v: isinstance(v, bool), "true or false"),
    int: (lambda v: type(v) is int, "a whole number (of a range: {whole = [LOW, HIGH]})"),
    float: (_is_number, "a number"),
    str: (lambda v: isinstance(v, str), "a text"),
}


def _check(key: str, value: Any, preset: Preset, name: str) -> None:
    """Raise UsageError unless a setting can have a value; `name` begins the sentence."""
    if key == "arguments":
        own = [each for each in preset.arguments if each not in FIXED]
        fits = isinstance(value, dict) and all(each in own for each in value)
        words = f"a table of some of {', '.join(own)}"
    else:
        kind: Any = key
        if key in preset.arguments and key not in KINDS:
            kind = type(preset.arguments[key])
        elif key not in KINDS:
            hint = get_type_hints(TrainConfig)[key]
            kind = next(each for each in (*get_args(hint), hint) if each in KINDS)
        check, words = KINDS[kind]
        fits = check(value)
    require(fits, f"{name} = {json.dumps(value, default=str)}: expected {words}.")
    for inner, each in value.items() if key == "arguments" else ():
        _check(inner, each, preset, f"{name}: {inner}")


def _dimension(value: Any, name: str) -> Choices | Range:
    if isinstance(value, list) and value:
        return Choices(tuple(value))
    form = f"--space {name} = {json.dumps(value, default=str)}: expected {FORM}."
    require(isinstance(value, dict) and len(value) == 1, form)
    ((kind, ends),) = value.items()
    require(kind in ("log", "uniform", "whole"), form)
    number = (int,) if kind == "whole" else (int, float)
    require(
        isinstance(ends, list)
        and len(ends) == 2
        and all(isinstance(end, number) and not isinstance(end, bool) for end in ends),
        form,
    )
    low, high = ends
    require(
        -math.inf < low < high < math.inf and (kind != "log" or low > 0),
        f"--space {name}: expected LOW below HIGH{', both above 0' if kind == 'log' else ''}, "
        f"got {low} and {high}.",
    )
    return Range(low, high, kind)


def applied(settings: Settings, preset: Preset, config: TrainConfig) -> tuple[Preset, TrainConfig]:
    """Return preset and config of a trial. Raises UsageError for settings that do not fit."""
    training = {key: value for key, value in settings.items() if key in TRAINING}
    if "noise" in training:
        noise = training["noise"]
        training["noise"] = (noise,) if isinstance(noise, str) else tuple(noise)
    arguments = shaped(preset.arguments, {k: v for k, v in settings.items() if k not in TRAINING})
    return reshaped(preset, arguments, IN_SPACE), replace(config, **training)


def with_arguments(preset: Preset, texts: Sequence[str]) -> Preset:
    """Return a preset with arguments of its architecture changed, such as `widths=[24,48,96]`.

    Raises UsageError.
    """
    if not texts:
        return preset
    changes = {}
    for text in texts:
        key, _, value = text.partition("=")
        known = [name for name in preset.arguments if name not in FIXED]
        require(
            key in known,
            f"--arguments {text!r}: {preset.architecture} has no argument {key!r} to change."
            + (nearest(key, known) or f" Expected some of {', '.join(known)}."),
        )
        changes[key] = _argument(value, text)
        _check(key, changes[key], preset, f"--arguments {key}")
    return reshaped(preset, shaped(preset.arguments, changes), IN_FLAGS)


def _argument(value: str, text: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise UsageError(
            f"--arguments {text!r}: expected KEY=VALUE with a number, a list in brackets, true, "
            'false or a word in double quotes, for example widths=[24,48,96] or up="upsample".'
        ) from error


def reshaped(preset: Preset, arguments: dict[str, Any], advice: tuple[str, str]) -> Preset:
    """Return a preset with other arguments, its default halo in proportion to the exact one.

    Raises UsageError, with `advice`, for arguments that the architecture cannot be built with.
    """
    _check_arguments(preset.architecture, arguments, advice)
    module = architecture(preset.architecture)
    before, now = (int(module.exact_halo(**a)) for a in (preset.arguments, arguments))
    halo = preset.default_halo
    if before not in (0, now):
        stride = int(module.total_stride(**arguments))
        halo = -(-halo * now // (before * stride)) * stride
    return replace(preset, arguments=arguments, default_halo=halo)


def shaped(arguments: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Return an architecture's arguments changed by `arguments`, its own keys, depth and width."""
    own = {key: value for key, value in settings.items() if key not in SHAPE}
    result = {**arguments, **settings.get("arguments", {}), **own}
    for key, value in result.items():
        result[key] = tuple(value) if isinstance(value, list) else value
    if "depth" in settings:
        result |= _with_depth(result, int(settings["depth"]))
    if "width" in settings:
        factor = float(settings["width"])
        result["widths"] = tuple(_even(factor * width) for width in result["widths"])
    return result


def _even(width: float) -> int:
    """Round to a multiple of 4, as vector instructions like."""
    return max(LEAST_WIDTH, round(width / 4) * 4)


def _with_depth(arguments: dict[str, Any], depth: int) -> dict[str, Any]:
    """Return widths (and blocks) of `depth` levels: the upper ones, each deeper one twice as wide.

    The deepest level keeps its number of blocks, the levels above it have those of their place.
    """
    widths = list(arguments["widths"])[:depth]
    while len(widths) < depth:
        widths.append(2 * widths[-1])
    if "blocks" not in arguments:
        return {"widths": tuple(widths)}
    *upper, deepest = arguments["blocks"]
    upper = [*upper, *[1] * depth][: depth - 1]
    return {"widths": tuple(widths), "blocks": (*upper, deepest)}


def _check_arguments(name: str, arguments: dict[str, Any], advice: tuple[str, str]) -> None:
    """Raise UsageError where the architecture cannot be built with its arguments."""
    text = ", ".join(f"{key}={value}" for key, value in arguments.items())
    require(
        len(arguments.get("widths", (1,))) >= 1,
        f"an architecture needs a level at least, got {text}: {advice[0]}.",
    )
    try:
        architecture(name).mflop_per_pixel(**arguments)
        architecture(name).exact_halo(**arguments)
        stride, size = architecture(name).total_stride(**arguments), input_size(name, **arguments)
        if size is not None and any(side % stride for side in size):
            raise ValueError(f"{size[1]}x{size[0]} px are no multiple of {stride}")
    except (ValueError, TypeError, IndexError) as error:
        sentence = f"{name} cannot be built with {text} ({error}). {advice[1]}."
        raise UsageError(sentence) from error


def train_toml(settings: Settings, *, preset: Preset, shared: TrainConfig, notes: str) -> str:
    """Return a configuration file for `jobs.train --config` with a trial's settings.

    Of the `shared` settings it has the preset's name and those of TOLD that are not the default.
    `notes` are lines for its head; the architecture's arguments stand there as they turned out.
    """
    own = [f"preset = {json.dumps(shared.preset)}"]
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    told = {key: getattr(shared, key) for key in TOLD if getattr(shared, key) != defaults[key]}
    own += [f"{key} = {_toml(value)}" for key, value in told.items() if key not in settings]
    own += [f"{key} = {_toml(settings[key])}" for key in TRAINING if key in settings]
    shape = {key: value for key, value in settings.items() if key not in TRAINING}
    arguments = shaped(preset.arguments, shape)
    changed = {k: v for k, v in arguments.items() if v != preset.arguments.get(k)}
    if changed:
        own.append(f"arguments = {_toml([f'{k}={json.dumps(v)}' for k, v in changed.items()])}")
    return "".join(f"# {line}\n" for line in notes.splitlines()) + "\n" + "\n".join(own) + "\n"


def _toml(value: Any) -> str:
    """Text, numbers and lists of them are written alike in TOML and JSON."""
    return json.dumps(value, ensure_ascii=False)
