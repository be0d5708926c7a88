"""Writes a model for other tools, ONNX or TensorFlow's SavedModel, and checks that it is the same.

    export_model(load_checkpoint("unet-s"), format="onnx", path=Path("unet-s.onnx"))

What is written is the bare network in float32, (N, height, width, channels) -> the same, of values
in the card's `data_range`; sides are free or, where the card has an `input_size`, of that size.
It is run on random values beside the original, both on the CPU, before it gets its name.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from denoise_core.checkpoints import Checkpoint
from denoise_core.errors import CheckpointError, UsageError

FORMATS = ("onnx", "savedmodel")
ENDINGS = {"onnx": ".onnx", "savedmodel": ""}
TOLERANCE = 1e-4
# tf2onnx goes through sets whose order is by memory addresses. Of 290 exports of a small
# autoencoder of one channel 7 had a fifth axis; where it was tried, the next three were right.
ONNX_TRIES = 5

Array = np.ndarray


def check_export(format: str) -> None:
    """Raise UsageError for an unknown format, or where its packages are not installed."""
    if format not in FORMATS:
        raise UsageError(f"--export {format}: expected one of {', '.join(FORMATS)}.")
    needed = ("onnx", "onnxruntime", "tf2onnx") if format == "onnx" else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--export onnx needs {', '.join(missing)}, not installed here: install the extra "
            "'export' (uv pip install '.[export]')."
        )


def export_model(checkpoint: Checkpoint, *, format: str, path: Path) -> float:
    """Write `checkpoint` to `path`, a file for 'onnx' and a folder for 'savedmodel'.

    Returns the largest absolute difference between the exported model and the original on random
    values in the card's data range, at two sizes where sizes are free, else in two batch sizes; one
    above TOLERANCE of that range raises CheckpointError, and nothing is left at `path`. An earlier
    export is replaced.
    """
    check_export(format)
    if path.exists() and not _is_export(path, format):
        raise UsageError(f"--export: {path} exists and is no {format} export; move it away.")
    model = checkpoint.build(precision="float32")
    inputs = _inputs(checkpoint.card)
    expected = [_on_cpu(lambda x: model(x, training=False), batch) for batch in inputs]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        written = Path(folder) / "model"
        run = (_write_onnx if format == "onnx" else _write_savedmodel)(model, written)
        pairs = zip(inputs, expected, strict=True)
        worst = max(float(np.abs(run(batch) - result).max()) for batch, result in pairs)
        low, high = checkpoint.card.get("data_range") or (0.0, 1.0)
        if not worst <= TOLERANCE * (high - low):
            raise CheckpointError(
                f"{path}: the {format} export differs from the model by {worst:.2g}, expected at "
                f"most {TOLERANCE * (high - low):g}; it was not kept. Please report this."
            )
        if path.is_dir():
            shutil.rmtree(path)
        written.replace(path)
    return worst


def _on_cpu(run: Callable[[Array], Any], batch: Array) -> Array:
    """Return `run(batch)`; a GPU's TF32 has too few bits to compare by."""
    import tensorflow as tf

    with tf.device("CPU:0"):
        return np.asarray(run(batch))


def _is_export(path: Path, format: str) -> bool:
    return path.is_file() if format == "onnx" else (path / "saved_model.pb").is_file()


def _inputs(card: dict[str, Any]) -> list[Array]:
    stride, channels = int(card["total_stride"]), int(card["arguments"].get("channels", 3))
    size = card.get("input_size")
    shapes = [(1, *size), (3, *size)] if size else [(1, 8 * stride, 8 * stride)]
    if not size:
        shapes.append((2, 5 * stride, 11 * stride))
    low, high = card.get("data_range") or (0.0, 1.0)
    rng = np.random.default_rng(0)
    return [rng.uniform(low, high, (*shape, channels)).astype(np.float32) for shape in shapes]


def _write_savedmodel(model: Any, path: Path) -> Callable[[Array], Array]:
    import tensorflow as tf

    model.export(str(path), format="tf_saved_model", verbose=False)
    with tf.device("CPU:0"):
        loaded = tf.saved_model.load(str(path))
    return lambda batch: _on_cpu(loaded.serve, batch)


def _write_onnx(model: Any, path: Path) -> Callable[[Array], Array]:
    import onnx
    import onnxruntime

    logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Keras patches tf2onnx for NumPy 2 and warns of its own patch.
        warnings.simplefilter("ignore", FutureWarning)
        for _ in range(ONNX_TRIES):
            model.export(str(path), format="onnx", verbose=False)
            graph = onnx.load(str(path))
            if len(graph.graph.output[0].type.tensor_type.shape.dim) == 4:
                break
        else:
            raise CheckpointError(
                f"tf2onnx gave the exported model another number of axes {ONNX_TRIES} times; "
                "nothing was kept. --export savedmodel does without it. Please report this."
            )
    _name(graph)
    onnx.checker.check_model(graph)
    onnx.save(graph, str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda batch: np.asarray(session.run(["denoised"], {"noisy": batch})[0])


def _name(model: Any) -> None:
    """Name input and output 'noisy' and 'denoised', and the free axes by what they are."""
    for values, name in ((model.graph.input, "noisy"), (model.graph.output, "denoised")):
        (value,) = values
        for node in model.graph.node:
            for names in (node.input, node.output):
                for index, other in enumerate(names):
                    if other == value.name:
                        names[index] = name
        value.name = name
        axes = value.type.tensor_type.shape.dim
        for axis, word in zip(axes, ("batch", "height", "width", ""), strict=True):
            if word and not axis.dim_value:
                axis.dim_param = word
