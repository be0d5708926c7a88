"""Total stride and halo of a user's Keras file, measured once in a process of its own.

    python -m denoise_core.keras_files.measuring FILE LO:HI      # prints one line of JSON

The process computes on the CPU in float32, whatever the caller has; so a driver needs no TensorFlow
and a GPU's rounding changes nothing. The figures are kept under ~/.cache/denoise-jobs.
A model of a million weights takes some seconds, one of thirty millions minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from denoise_core.config import parse_data_range
from denoise_core.devices import configure_tensorflow
from denoise_core.errors import CheckpointError, StorageError
from denoise_core.keras_files.loading import load_model
from denoise_core.keras_files.reading import Description, describe
from denoise_core.keras_files.receptive import Receptive, measure, smooth_picture
from denoise_core.storage import LocalStorage, cache_folder
from denoise_core.tiling import round_up

# A new way of measuring makes earlier figures void.
MEASUREMENT = 2
MEASURE_S = 1800
# Ranges that models are trained on, and by how much another one must be better to be spoken of.
RANGES = ((0.0, 1.0), (0.0, 255.0), (-1.0, 1.0))
RANGE_DB = 3.0
NOISE = 25 / 255

Figures = dict[str, Any]


def figures_of(
    path: Path, digest: str, bounds: tuple[float, float], *, tell: Callable[[str], None]
) -> Figures:
    """Return total_stride, default_halo, exact_halo, least_side and notes: kept, or from a process.

    `tell` hears a sentence before a measurement begins.
    """
    text = f"{bounds[0]!r}:{bounds[1]!r}"
    kept = cache_folder("keras") / f"{digest}-{text.replace(':', '-')}-{MEASUREMENT}.json"
    try:
        return _figures(kept.read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        tell(f"{path.name}: measuring its stride and halo, once for this file.")
    done = _measure_apart(path, text)
    try:
        result = json.loads(done.stdout.splitlines()[-1])
        if "error" in result:
            raise CheckpointError(str(result["error"]))
        figures = _figures(json.dumps(result).encode())
    except (IndexError, ValueError, KeyError, TypeError) as error:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise CheckpointError(
            f"{path}: the process that measured it ended with code {done.returncode} "
            f"({''.join(last)})."
        ) from error
    _keep(kept, figures)
    return figures


def _measure_apart(path: Path, bounds: str) -> subprocess.CompletedProcess[bytes]:
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    command = [sys.executable, "-m", "denoise_core.keras_files.measuring", str(path), bounds]
    try:
        return subprocess.run(command, capture_output=True, timeout=MEASURE_S, env=environment)
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(
            f"{path}: could not be measured in {MEASURE_S} s; it is too large for this machine."
        ) from error


def _figures(data: bytes) -> Figures:
    table = json.loads(data)
    names = ("total_stride", "default_halo", "exact_halo", "least_side")
    return {**{name: int(table[name]) for name in names}, "notes": [str(n) for n in table["notes"]]}


def _keep(path: Path, figures: Figures) -> None:
    """Write the figures for later runs; a home that cannot be written costs them only time."""
    with suppress(StorageError):
        LocalStorage().write(str(path), json.dumps(figures).encode())


def measure_file(path: Path, bounds: tuple[float, float]) -> Figures:
    """Load and measure a file in this process. Raises CheckpointError."""
    description = describe(path)
    model = load_model(path)
    try:
        found = measure(
            _predict(model, bounds),
            channels=description.channels,
            input_size=description.input_size,
            strides=description.strides,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    notes = found.note, _least_note(found), _range_note(model, description, found, bounds)
    return {
        "total_stride": found.stride,
        "default_halo": found.default_halo,
        "exact_halo": found.exact_halo,
        "least_side": found.least,
        "notes": [note for note in notes if note],
    }


def _least_note(found: Receptive) -> str:
    if found.least <= found.stride:
        return ""
    return f"It takes {found.least} pixels a side or more; smaller images are mirrored up to that."


def _range_note(
    model: Any, description: Description, found: Receptive, bounds: tuple[float, float]
) -> str:
    """Return a sentence where the model makes a made picture worse, or is better in another range.

    Of all usual ranges; where its result looks like the noise, the sentence says that.
    """
    side = round_up(max(96, found.least), found.stride)
    height, width = description.input_size or (side, side)
    clean = smooth_picture(height, width)[None, ..., None].repeat(description.channels, axis=3)
    noise = np.random.default_rng(0).normal(0, NOISE, clean.shape)
    noisy = (clean + noise).astype(np.float32)
    results = {pair: _predict(model, pair)(noisy) for pair in (bounds, *RANGES)}
    psnr = {pair: _psnr(result, clean) for pair, result in results.items()}
    best, before = max(RANGES, key=psnr.__getitem__), _psnr(noisy, clean)
    if max(psnr.values()) < before:
        worse = f"It makes a made picture worse ({psnr[bounds]:.1f} dB than {before:.1f} dB)"
        subtract = _noise_note(results, noisy, clean)
        return f"{worse}{subtract or ': is it trained, and on which --model-range?'}"
    if psnr[best] < max(psnr[bounds] + RANGE_DB, before):
        return ""
    return (
        f"It removes noise better from a made picture with --model-range {best[0]:g}:{best[1]:g} "
        f"({psnr[best]:.1f} dB) than with {bounds[0]:g}:{bounds[1]:g} ({psnr[bounds]:.1f} dB): is "
        "that the range it was trained on?"
    )


def _noise_note(
    results: dict[tuple[float, float], np.ndarray | None], noisy: np.ndarray, clean: np.ndarray
) -> str:
    """Say so where the picture less a result is clearly better: that is noise, of which none is 0.

    A result was moved to where black is 0, which noise was not.
    """
    rest = {
        (low, high): _psnr(None if made is None else noisy - made - low / (high - low), clean)
        for (low, high), made in results.items()
    }
    low, high = max(rest, key=rest.__getitem__)
    if rest[low, high] < _psnr(noisy, clean) + RANGE_DB:
        return ""
    return (
        f", but less its result, with --model-range {low:g}:{high:g}, that has "
        f"{rest[low, high]:.1f} dB: the model seems to give the noise and not the picture. Nothing "
        "is subtracted here; end the model with keras.layers.Subtract()([noisy, noise]) and save "
        "it again."
    )


def _psnr(result: np.ndarray | None, clean: np.ndarray) -> float:
    """PSNR in dB of pictures in [0, 1]; -inf for none."""
    error = np.inf if result is None else float(np.mean((result - clean) ** 2))
    return -10 * float(np.log10(error + 1e-12))


def _predict(model: Any, bounds: tuple[float, float]) -> Callable[[np.ndarray], np.ndarray | None]:
    import tensorflow as tf

    low, span = np.float32(bounds[0]), np.float32(bounds[1] - bounds[0])

    def predict(batch: np.ndarray) -> np.ndarray | None:
        try:
            result: np.ndarray = model(batch * span + low, training=False).numpy()
        except (ValueError, tf.errors.OpError):
            return None
        return (result - low) / span

    return predict


def main() -> None:
    """Measure the file named on the command line and print its figures, or an error, as JSON."""
    path, text = sys.argv[1:3]
    configure_tensorflow(threads=None, use_gpu=False)
    try:
        bounds = parse_data_range(text) or (0.0, 1.0)
        result = measure_file(Path(path), bounds)
    except CheckpointError as error:
        result = {"error": str(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
