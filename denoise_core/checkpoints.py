"""Checkpoints: a folder or a pair of files with weights (safetensors) and a JSON card, or a user's
own Keras file; on this machine or on S3.

`NAME.safetensors` holds arrays named `0000`, `0001`, ... in the order of the model's weights;
`NAME.json`, the card, says everything else: architecture and arguments, halo, noise, data,
figures and the SHA-256 of the weights. Loading runs no code from either file, and none from a Keras
file, whose card is made by `keras_files`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from denoise_core.config import nearest
from denoise_core.errors import CheckpointError, ObjectNotFound, UsageError
from denoise_core.keras_files import is_keras_file, load_model, read_card
from denoise_core.models import architecture, can_trim
from denoise_core.storage import (
    LocalStorage,
    StorageOptions,
    absolute,
    cache_folder,
    join,
    storage_for,
)

SHIPPED = Path(__file__).parent / "models" / "weights"
CARD_VERSION = 1
REQUIRED = ("architecture", "arguments", "total_stride", "default_halo", "exact_halo", "sha256")


def _are(kinds: tuple[type, ...], values: Any, *, low: float, count: int = 2) -> bool:
    """Whether `values` is a list of so many numbers from `low` to a finite one."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(each) in kinds and low <= each < 1e300 for each in values)
    )


def _is_level(value: Any) -> bool:
    return _are((int, float), [value], low=0, count=1)


# What a card may say besides REQUIRED and steers a run -> whether a value fits, how that is called.
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda v: isinstance(v, str), "a text"),
    "architecture": (lambda v: isinstance(v, str), "a text"),
    "data_range": (
        lambda v: _are((int, float), v, low=-1e300) and v[0] < v[1],
        "two numbers, the lower one first",
    ),
    "input_size": (lambda v: _are((int,), v, low=1), "[height, width] in pixels"),
    "channels": (lambda v: _are((int,), [v], low=1, count=1), "a whole number from 1"),
    "least_side": (lambda v: _are((int,), [v], low=0, count=1), "a whole number from 0"),
    "break_even_sigma": (_is_level, "a number from 0"),
    "break_even_residual": (_is_level, "a number from 0"),
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's card and the place of its weights.

    `architecture` and `arguments` say what to build; `total_stride`, `default_halo` and
    `exact_halo`, in pixels, steer the cutting; `break_even_sigma` and `break_even_residual` (of
    255), where a card has them, are the noise, and the root mean square of what the model takes
    away, under which it does an image more harm than good. The rest is for people.
    """

    name: str
    weights_path: Path
    card: dict[str, Any] = field(repr=False)

    @property
    def hash(self) -> str:
        """SHA-256 of the weights file."""
        return str(self.card["sha256"])

    def weights(self) -> list[np.ndarray]:
        """Read the weights as float32 arrays in the model's order. Raises CheckpointError."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            data = self.weights_path.read_bytes()
            self.check(data)
            tensors = load(data)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.weights_path}: cannot be read ({error}).") from error
        return [tensors[name].astype(np.float32) for name in sorted(tensors)]

    def check(self, data: bytes) -> None:
        """Raise CheckpointError for other bytes than those of the weights file."""
        if hashlib.sha256(data).hexdigest() != self.hash:
            raise CheckpointError(
                f"{self.weights_path}: the weights do not have the card's SHA-256; "
                "the file is damaged or of another model."
            )

    @property
    def can_trim(self) -> bool:
        """Whether `build` can make a model that takes [windows, context]."""
        return can_trim(self.card["architecture"])

    def build(self, *, precision: str = "float32", trimmed: bool = False) -> Any:
        """Build the Keras model and set its weights; see `build_model`. Raises CheckpointError."""
        from denoise_core.models import build_model

        weights = self.weights()
        try:
            model = build_model(
                self.card["architecture"],
                precision=precision,
                trimmed=trimmed,
                **self.card["arguments"],
            )
            model.set_weights(weights)
        except (UsageError, ValueError, TypeError, IndexError) as error:
            raise CheckpointError(
                f"{self.weights_path}: does not fit its card ({error})."
            ) from error
        return model


@dataclass(frozen=True, slots=True)
class KerasCheckpoint(Checkpoint):
    """A user's own Keras file: `weights_path` is the file, and its `hash` that of the whole file.

    It computes in float32 whatever precision is asked for.
    """

    def weights(self) -> list[np.ndarray]:
        """Read the weights as float32 arrays in the model's order. Raises CheckpointError."""
        return [np.asarray(each, np.float32) for each in self.build().get_weights()]

    @property
    def can_trim(self) -> bool:
        """Whether `build` can make a model that takes [windows, context]: never."""
        return False

    def build(self, *, precision: str = "float32", trimmed: bool = False) -> Any:
        """Load the Keras model, (N, h, w, C) -> the same. Raises CheckpointError."""
        return load_model(self.weights_path, sha256=self.hash)


def shipped_names() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def absolute_name(name: str) -> str:
    """Return the name of a shipped model or an S3 URI as it is, a path made absolute."""
    return name if name in shipped_names() else absolute(name)


def load_checkpoint(
    name: str,
    *,
    model_range: str = "auto",
    measure: bool = True,
    tell: Callable[[str], None] = lambda _: None,
    sha256: str | None = None,
    options: StorageOptions | None = None,
    flag: str = "--model",
) -> Checkpoint:
    """Find a checkpoint by shipped name, folder, card or weights file, or a user's Keras file.

    All but the first may lie on S3, reached by `options`; what is loaded then is this machine's own
    copy. With `sha256` a model of another hash is refused. `flag` is what the sentences of errors
    call it. The rest is of Keras files alone: 'LO:HI', the values that the model was trained on;
    whether stride and halo are measured (some seconds, once for each file), which who has a
    geometry does not need; and who is told when that begins. Raises UsageError where there is no
    such model, CheckpointError where it is damaged or refused, StorageError where it cannot be
    reached.
    """
    keras: dict[str, Any] = {"model_range": model_range, "measure": measure, "tell": tell}
    if name.startswith("s3://"):
        found = _copy_from_s3(name, options, flag=flag, **keras)
    else:
        found = _find(name, flag=flag, **keras)
    if sha256 is not None and found.hash != sha256:
        raise CheckpointError(
            f"{flag} {name}: its weights are not those that this run began with; wait until it is "
            "no longer written, and have the same copy on all machines."
        )
    return found


def _find(
    name: str, *, flag: str, model_range: str, measure: bool, tell: Callable[[str], None]
) -> Checkpoint:
    card_path = _card_path(name)
    if is_keras_file(name) and Path(name).is_file():
        card = read_card(Path(name), model_range=model_range, measure=measure, tell=tell)
        return KerasCheckpoint(card["name"], Path(name), card)
    if not card_path.is_file():
        known = shipped_names()
        raise UsageError(
            f"{flag} {name!r}: neither a shipped model ({', '.join(known) or 'none'}) nor a "
            "folder with model.json and model.safetensors nor a Keras file (.keras, .h5)."
            f"{nearest(name, known)}"
        )
    if model_range != "auto":
        raise UsageError(
            f"--model-range {model_range}: {name} states its own range; the flag is for Keras "
            "files (.keras, .h5)."
        )
    card = _read_card(card_path)
    return Checkpoint(card.get("name", card_path.stem), card_path.with_suffix(".safetensors"), card)


def _copy_from_s3(
    uri: str, options: StorageOptions | None, *, flag: str, **keras: Any
) -> Checkpoint:
    """Copy what this machine does not have yet of a model, and load the copy.

    Its folder is named by the hash of the Keras file or of the card, which holds the weights': so
    processes may copy at once, and another model at the same URI is another copy.
    """
    storage, local = storage_for(uri, options), LocalStorage()
    stem, _, ending = uri.rpartition(".")
    source = uri
    if not is_keras_file(uri):
        ours = ending in ("json", "safetensors")
        source = f"{stem}.json" if ours else join(uri, "model.json")
    try:
        data = storage.read(source)
    except ObjectNotFound as error:
        raise UsageError(
            f"{flag} {uri!r}: neither a folder with model.json and model.safetensors nor a Keras "
            f"file (.keras, .h5): {error}."
        ) from error
    root, _, file = source.rpartition("/")
    folder = str(cache_folder("models") / hashlib.sha256(data).hexdigest())
    path = join(folder, file)
    if local.stat(path) is None or local.read(path) != data:
        local.write(path, data)
    try:
        found = _find(path, flag=flag, **keras)
        weights = found.weights_path
        try:
            found.check(local.read(str(weights)))
        except (CheckpointError, ObjectNotFound):
            data = storage.read(join(root, weights.name))
            found.check(data)
            local.write(str(weights), data)
    except (CheckpointError, UsageError) as error:
        # Said of the original, not of the copy.
        raise type(error)(str(error).replace(folder, root)) from error
    return found


def _card_path(name: str) -> Path:
    path = Path(name)
    if (SHIPPED / f"{name}.json").is_file():
        return SHIPPED / f"{name}.json"
    if path.is_dir():
        return path / "model.json"
    # Only an ending of ours is replaced: in `runs/v1.2` the `.2` belongs to the name.
    ours = path.suffix in (".json", ".safetensors")
    return path.with_suffix(".json") if ours else path.with_name(f"{path.name}.json")


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a model card ({error}).") from error
    if not isinstance(card, dict):
        raise CheckpointError(f"{path}: not a model card (expected a JSON object).")
    missing = [key for key in REQUIRED if key not in card]
    if missing:
        raise CheckpointError(f"{path}: the card lacks {', '.join(missing)}.")
    pixels = [card[key] for key in ("total_stride", "default_halo", "exact_halo")]
    numbers = all(type(value) is int and value >= 0 for value in pixels) and pixels[0] > 0
    if not numbers or not isinstance(card["arguments"], dict):
        raise CheckpointError(
            f"{path}: total_stride, default_halo and exact_halo must be whole numbers of pixels "
            "and arguments an object."
        )
    own = {**card, "channels": card["arguments"].get("channels", 3)}
    for key, (fits, words) in KINDS.items():
        if own.get(key) is not None and not fits(own[key]):
            raise CheckpointError(f"{path}: {key} is {str(own[key])[:60]}; expected {words}.")
    _check_stride(path, card)
    return card


def _check_stride(path: Path, card: dict[str, Any]) -> None:
    """Raise CheckpointError where the architecture needs another stride, or other arguments."""
    try:
        module = architecture(card["architecture"])
        if not 0 < module.mflop_per_pixel(**card["arguments"]) < 1e300:
            raise ValueError("its arguments are no numbers of channels")
        stride = int(module.total_stride(**card["arguments"]))
    except (UsageError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: the model does not fit its card ({error}).") from error
    if card["total_stride"] % stride:
        raise CheckpointError(
            f"{path}: total_stride is {card['total_stride']}; expected a multiple of {stride}, "
            "which its architecture needs."
        )


def save_checkpoint(
    folder: Path,
    weights: list[np.ndarray],
    card: dict[str, Any],
    *,
    name: str = "model",
    dtype: str = "float32",
) -> Checkpoint:
    """Write `name`.safetensors and then `name`.json, each in one atomic step.

    `dtype` float16 halves the file; loading gives float32 back.
    """
    from safetensors.numpy import save

    tensors = {f"{i:04d}": np.ascontiguousarray(w, dtype=dtype) for i, w in enumerate(weights)}
    data = save(tensors)
    card = {"card_version": CARD_VERSION, **card, "sha256": hashlib.sha256(data).hexdigest()}
    weights_path = folder / f"{name}.safetensors"
    text = json.dumps(card, indent=1) + "\n"
    storage = LocalStorage()
    storage.write(str(weights_path), data)
    storage.write(str(weights_path.with_suffix(".json")), text.encode())
    return Checkpoint(card.get("name", name), weights_path, card)
