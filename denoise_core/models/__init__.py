"""Architectures by name, and the geometry that tiling needs to know of each.

`MODELS` is the whole list. `build_model` imports Keras; looking a name up does not.
"""

from __future__ import annotations

from typing import Any

from denoise_core.config import nearest
from denoise_core.devices import import_tensorflow
from denoise_core.errors import UsageError
from denoise_core.models import autoencoder, dense, unet

MODELS = {"unet": unet, "autoencoder": autoencoder, "dense": dense}
"""Architecture name -> module with `build(**arguments)`, `total_stride(...)`, `exact_halo(...)` and
`mflop_per_pixel(...)`, all of which take the same arguments; `input_size(...)` where the network
takes one size only, `build_trimmed(...)` where it can leave out what a window's core does not need
(see `unet`)."""


def architecture(name: str) -> Any:
    """Return the module of an architecture. Raises UsageError for an unknown name."""
    if name not in MODELS:
        raise UsageError(f"Unknown architecture {name!r}.{nearest(name, MODELS)}")
    return MODELS[name]


def input_size(name: str, **arguments: Any) -> tuple[int, int] | None:
    """Return the one (height, width) that a network takes, None where it is free."""
    module = architecture(name)
    return module.input_size(**arguments) if hasattr(module, "input_size") else None


def can_trim(name: str) -> bool:
    """Return whether an architecture can leave out what a window's core does not need."""
    return hasattr(architecture(name), "build_trimmed")


def build_model(
    name: str, *, precision: str = "float32", trimmed: bool = False, **arguments: Any
) -> Any:
    """Build a Keras model of (N, H, W, C) float values, with fresh weights.

    `precision` is 'float32', or 'bfloat16' for bfloat16 compute over float32 weights. A `trimmed`
    one takes [windows, context]; see `unet.build_trimmed`.
    """
    import_tensorflow()
    import keras

    policy = "mixed_bfloat16" if precision == "bfloat16" else "float32"
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        module = architecture(name)
        return module.build_trimmed(**arguments) if trimmed else module.build(**arguments)
    finally:
        keras.config.set_dtype_policy(previous)
