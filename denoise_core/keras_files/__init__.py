"""A user's own Keras file, `.keras` or the classic `.h5`, as a checkpoint like ours.

    card = read_card(Path("mine.keras"))           # no TensorFlow: a driver can
    model = load_model(Path("mine.keras"))

`reading` opens a file, refuses what could run code, and reads what the file says of itself;
`measuring` finds what it does not say, total stride and halo, in a process of its own, by
`receptive`; `loading` makes a Keras model of what is left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from denoise_core.config import parse_data_range
from denoise_core.keras_files.loading import load_model
from denoise_core.keras_files.measuring import figures_of
from denoise_core.keras_files.reading import ENDINGS, Description, describe

__all__ = ["Description", "describe", "is_keras_file", "load_model", "read_card"]


def is_keras_file(name: str) -> bool:
    """Return whether `name` is, by its ending, a Keras file and not a checkpoint of ours."""
    return name.lower().endswith(ENDINGS)


def read_card(
    path: Path,
    *,
    model_range: str = "auto",
    measure: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return a card like that of our own checkpoints. Raises CheckpointError, UsageError.

    `model_range` is 'LO:HI', the values of black and white that the model was trained on; 'auto'
    is 0:1. Without `measure` the card has no stride and halo: enough for those who know a geometry.
    `tell` hears a sentence where a measurement begins.
    """
    low, high = parse_data_range(model_range, flag="model-range") or (0.0, 1.0)
    description = describe(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    card: dict[str, Any] = {
        "name": path.name,
        "architecture": "keras-file",
        "arguments": {"channels": description.channels},
        "input_size": list(description.input_size) if description.input_size else None,
        "data_range": [low, high],
        "float32_only": True,
        "sha256": digest,
    }
    return {**card, **figures_of(path, digest, (low, high), tell=tell)} if measure else card
