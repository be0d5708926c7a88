"""What is compared: models and classical filters behind one call; codes of a model's bottleneck.

A method maps noisy images, float32 (H, W, C) in [0, 1] with values outside allowed, to denoised
ones of the same shapes. A model sees a whole list at once, so that its patches share batches; a
filter sees one image and the sigma of its noise.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from denoise_core.checkpoints import Checkpoint, load_checkpoint, shipped_names
from denoise_core.config import nearest, require
from denoise_core.denoiser import DEFAULT_PATCH, Denoiser, Geometry, resolve_geometry
from denoise_core.errors import UsageError
from denoise_core.keras_files import is_keras_file
from denoise_core.models.classical import CLASSICAL
from denoise_core.storage import StorageOptions

Array = npt.NDArray[Any]

IDENTITY = "identity"
SLOW = ("tv", "nlm", "nlm-opencv", "bm3d")
"""Filters that see only `--limit-slow` images."""

NEEDS = {"bilateral": "cv2", "nlm-opencv": "cv2", "bm3d": "bm3d"}
"""Filters of packages that only the extra 'benchmark' brings."""

LATENT = "latent"
CODE_SIDE = 256
"""Codes are taken of the centre of an image, so many pixels a side at most."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """One of the models: the label that rows and pictures show, and where to load it from."""

    label: str
    path: str
    hash: str
    model_range: str
    geometry: Geometry


def split_names(words: Sequence[str]) -> list[str]:
    """Return the names in `words`, each of which may hold several with commas; no name twice."""
    names = [name.strip() for word in words for name in word.split(",")]
    return list(dict.fromkeys(name for name in names if name))


def choose_filters(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the filters to run, `identity` first, and the asked ones whose package is absent.

    Raises UsageError for an unknown name.
    """
    names = [name for name in split_names(words) if name != "none"]
    for name in names:
        if name not in CLASSICAL:
            raise UsageError(
                f"--baselines {name!r}: unknown; expected some of {', '.join(CLASSICAL)}, or "
                f"none.{nearest(name, CLASSICAL)}"
            )
    absent = [n for n in names if n in NEEDS and importlib.util.find_spec(NEEDS[n]) is None]
    chosen = [name for name in names if name not in (IDENTITY, *absent)]
    return [IDENTITY, *chosen], absent


def find_model(path: str, *, model_range: str, **more: Any) -> Checkpoint:
    """Load a checkpoint; `model_range` is of Keras files alone, `more` as `load_checkpoint` has."""
    return load_checkpoint(path, model_range=model_range if is_keras_file(path) else "auto", **more)


def label_models(
    paths: Sequence[str], *, model_range: str = "auto", options: StorageOptions | None = None
) -> list[ModelSource]:
    """Return the models with labels that differ: their names, or else their paths.

    A name that belongs to a shipped model, or to a filter, stands for that alone.

    Raises UsageError for an unknown model, one that is given twice, and for a range where there is
    no Keras file, CheckpointError for a damaged one.
    """
    require(
        model_range == "auto" or any(map(is_keras_file, paths)),
        f"--model-range {model_range}: no --model is a Keras file (.keras, .h5), and the others "
        "state their own range; leave the flag out.",
    )
    found = [(path, find_model(path, model_range=model_range, options=options)) for path in paths]
    names = [checkpoint.name for _, checkpoint in found]
    taken = {*CLASSICAL, *shipped_names()}
    models = [
        ModelSource(
            checkpoint.name
            if path == checkpoint.name
            or (names.count(checkpoint.name) == 1 and checkpoint.name not in taken)
            else path,
            path,
            checkpoint.hash,
            model_range,
            resolve_geometry(checkpoint.card, patch=DEFAULT_PATCH, halo="auto"),
        )
        for path, checkpoint in found
    ]
    labels = [model.label for model in models]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"--model {label!r} is given twice: name each model once.")
    return models


def run_filter(name: str, noisy: Array, sigma: float) -> Array:
    """Denoise one image by a classical filter that is told `sigma` (of 255)."""
    return CLASSICAL[name](noisy, sigma)


class Model:
    """A loaded model, and its encoder where it has a bottleneck."""

    def __init__(self, source: ModelSource, *, precision: str, options: StorageOptions) -> None:
        checkpoint = find_model(
            source.path,
            model_range=source.model_range,
            measure=False,
            sha256=source.hash,
            options=options,
        )
        self.source = source
        self.denoiser = Denoiser(checkpoint, geometry=source.geometry, precision=precision)
        self.denoiser.warm_up()
        least = source.geometry.least
        self.coder = Coder.of(checkpoint, stride=source.geometry.stride, least=least)

    def denoise(self, noisy: Sequence[Array]) -> list[Array]:
        """Denoise images; the results are float32, neither clipped nor rounded."""
        return self.denoiser.denoise(noisy, ranges=[(0.0, 1.0)] * len(noisy))


class Coder:
    """The part of a model up to its bottleneck: images to vectors."""

    def __init__(
        self, encoder: Callable[[Array], Any], card: dict[str, Any], *, stride: int, least: int = 0
    ) -> None:
        self.encoder = encoder
        self.channels = int(card["arguments"].get("channels", 3))
        self.stride, self.least = stride, least
        low, high = card.get("data_range") or (0.0, 1.0)
        self.low, self.high = float(low), float(high)
        size = card.get("input_size")
        self.size = (int(size[0]), int(size[1])) if size else None

    @staticmethod
    def of(checkpoint: Checkpoint, *, stride: int, least: int = 0) -> Coder | None:
        """Build it; None for a model without a bottleneck, or one that cannot be taken apart."""
        import tensorflow as tf

        model = checkpoint.build()
        try:
            encoder = encoder_of(model, stride=stride)
        except (AttributeError, LookupError, TypeError, ValueError):
            # Such as a nested model applied twice: it denoises well, and codes are an extra.
            return None
        if encoder is None:
            return None
        # Traced once for all sizes: called eagerly, a small model takes 20 ms for a digit.
        shape = tf.TensorSpec((None, *model.inputs[0].shape[1:]), tf.float32)
        traced = tf.function(lambda x: encoder(x, training=False), input_signature=[shape])
        return Coder(traced, checkpoint.card, stride=stride, least=least)

    def code(self, noisy: Array) -> Array:
        """Return float32 (D,): the code of the centre of (H, W, C); feature maps are averaged.

        Grey is repeated to the model's channels, more channels are averaged to its one.
        """
        window = fit(noisy, self._side(noisy.shape[0], 0), self._side(noisy.shape[1], 1))
        if window.shape[2] != self.channels:
            window = np.repeat(window.mean(axis=2, keepdims=True), self.channels, axis=2)
        values = (window * (self.high - self.low) + self.low).astype(np.float32)
        latent = np.asarray(self.encoder(values[None]))[0]
        flat = latent.reshape(-1, latent.shape[-1])
        return flat.mean(axis=0).astype(np.float32)

    def _side(self, length: int, axis: int) -> int:
        if self.size is not None:
            return self.size[axis]
        wanted = max(self.least, min(length, CODE_SIDE))
        # Rounded up for small images, so that nothing of a 28x28 digit is cut away.
        return -(-wanted // self.stride) * self.stride


def encoder_of(model: Any, *, stride: int) -> Any | None:
    """Return a Keras model up to its bottleneck; None where nothing in it is smaller than an image.

    The bottleneck is the layer `latent`. Without one it is what has the fewest values for an image:
    of all that every path from input to output crosses, or, where skips go round all that is small,
    of all layers.
    """
    import keras

    if LATENT in {layer.name for layer in model.layers}:
        return keras.Model(model.inputs[0], model.get_layer(LATENT).output)
    given = keras.Input(model.inputs[0].shape[1:])
    found = [given]
    crossed = {id(given): {0}}  # by every path to a tensor: places in `found`

    def walk(inner: Any, x: Any) -> None:
        """Call all layers of a model on `x`, its output last."""
        keras.models.clone_model(
            keras.Model(inner.inputs, inner.outputs),
            input_tensors=[x],
            clone_function=lambda layer: layer,
            call_function=call,
        )

    def call(layer: Any, *inputs: Any, **more: Any) -> Any:
        if isinstance(layer, keras.Model) and len(layer.inputs) == len(layer.outputs) == 1:
            walk(layer, keras.tree.flatten(inputs)[0])
            return found[-1]
        before = [crossed[id(x)] for x in keras.tree.flatten((inputs, more)) if id(x) in crossed]
        output = layer(*inputs, **more)
        for tensor in keras.tree.flatten(output):
            crossed[id(tensor)] = {len(found)}.union(set.intersection(*before))
            found.append(tensor)
        return output

    walk(model, given)
    sides = [side or -(-CODE_SIDE // stride) * stride for side in given.shape[1:3]]
    shapes = keras.Model(given, found).compute_output_shape((1, *sides, given.shape[-1]))
    sizes = [math.prod(shape) for shape in shapes]
    smaller = [place for place, size in enumerate(sizes) if size < sizes[0]]
    if not smaller:
        return None
    last = crossed[id(found[-1])]
    return keras.Model(given, found[min(smaller, key=lambda at: (at not in last, sizes[at]))])


def fit(image: Array, height: int, width: int) -> Array:
    """Return the centre of (H, W, C) in the given size, mirrored where it is smaller."""
    pads = [(max(0, want - have)) for want, have in zip((height, width), image.shape, strict=False)]
    around = [(pad // 2, pad - pad // 2) for pad in pads]
    image = np.pad(image, (*around, (0, 0)), mode="symmetric")
    y, x = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[y : y + height, x : x + width]
