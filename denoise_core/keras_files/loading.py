"""Loads a user's Keras file to a model of images; TensorFlow is imported here, in functions."""

from __future__ import annotations

import hashlib
import math
import tempfile
from pathlib import Path
from typing import Any

from denoise_core.devices import import_tensorflow
from denoise_core.errors import CheckpointError
from denoise_core.keras_files.reading import Description, clean_copy, describe, read_bytes


def load_model(path: Path, *, sha256: str | None = None) -> Any:
    """Load the Keras model (N, h, w, C) -> the same. Raises CheckpointError.

    With `sha256` a file of other bytes is refused. Its layers compute in float32.
    """
    import_tensorflow()
    import keras

    data = read_bytes(path)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{path}: has changed since the run began; start the run again.")
    description = describe(path)
    with tempfile.TemporaryDirectory(prefix="denoise-keras-") as folder:
        try:
            copy = clean_copy(path, data, Path(folder))
            model = keras.saving.load_model(copy, compile=False, safe_mode=True)
        except CheckpointError:
            raise
        except Exception as error:  # Keras raises whatever a layer's constructor does.
            text = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{path}: Keras {keras.__version__} cannot load it ({type(error).__name__}: "
                f"{text}); save it again with the newest Keras as .keras."
            ) from error
    return _as_images(path, model, description)


def _as_images(path: Path, model: Any, description: Description) -> Any:
    """Return the model with inputs and outputs (N, h, w, C), by reshaping where that is enough."""
    import keras

    outputs = model.output_shape
    if isinstance(outputs, list):
        raise CheckpointError(f"{path}: has {len(outputs)} outputs; expected one image.")
    size, channels = description.input_size, description.channels
    image = (*(size or (None, None)), channels)
    if description.has_channel_axis and tuple(outputs[1:]) == image:
        return model
    if size is None:
        if len(outputs) == 4 and outputs[-1] == channels:
            return model
    elif _is_image(tuple(outputs[1:]), size, channels):
        given = keras.Input(image)
        shaped = given if description.has_channel_axis else keras.layers.Reshape(size)(given)
        return keras.Model(given, keras.layers.Reshape(image)(model(shaped)))
    raise CheckpointError(
        f"{path}: makes {tuple(outputs[1:])} of {image}; expected a model whose output has the "
        "shape of its input."
    )


def _is_image(output: tuple[int | None, ...], size: tuple[int, int], channels: int) -> bool:
    """Return whether an output holds the values of an image in their order: flat, or by pixels."""
    height, width = size
    by_pixels = ((height, width), (height, width, channels), (height * width, channels))
    flat = sum(side != 1 for side in output) <= 1
    whole = math.prod(side or 0 for side in output) == height * width * channels
    return whole and (flat or output in by_pixels)
