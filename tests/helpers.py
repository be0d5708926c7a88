"""What the end-to-end tests share: a tiny checkpoint, pictures, a way to run the job, its rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq

ARGUMENTS = {"widths": (8, 16), "blocks": (1, 1), "channels": 3}


def make_checkpoint(folder: Path, *, seed: int = 0, **more: Any) -> str:
    """Write a tiny U-Net with random weights that change an image a little; return its path.

    `more` goes into the card.

    The weights are drawn by NumPy from the layers' known shapes, so that no test process needs
    TensorFlow.
    """
    from denoise_core.checkpoints import save_checkpoint
    from denoise_core.models.unet import exact_halo, total_stride

    rng = np.random.default_rng(seed)
    shapes = [
        (3, 3, 3, 8),  # first convolution
        (3, 3, 8, 8), (3, 3, 8, 8),  # block of the upper level
        (2, 2, 8, 16),  # down
        (3, 3, 16, 16), (3, 3, 16, 16),  # block of the lower level
        (2, 2, 8, 16),  # up: transposed
        (3, 3, 8, 8), (3, 3, 8, 8),
        (3, 3, 8, 3),  # last convolution, zeros before training
    ]  # fmt: skip
    weights = [rng.normal(0, 0.5 / np.sqrt(np.prod(s[:3])), s).astype("f4") for s in shapes]
    card = {
        "name": f"tiny-{seed}",
        "architecture": "unet",
        "arguments": ARGUMENTS,
        "default_halo": 16,
        "exact_halo": exact_halo(**ARGUMENTS),
        "total_stride": total_stride(**ARGUMENTS),
        **more,
    }
    save_checkpoint(folder, weights, card)
    return str(folder)


def make_keras_file(path: Path, monkeypatch: Any) -> str:
    """Save a user's model and return its path; what it would be measured to have is given.

    It is for values of 0:255 and gives black below 8: all is black to it in 0:1. A branch of zeros
    narrows to a fifth of an image's values.
    """
    import keras
    from keras import layers

    noisy = keras.Input((None, None, 3))
    x = layers.Conv2D(10, 4, strides=4)(noisy)
    x = layers.Conv2DTranspose(3, 4, strides=4, kernel_initializer="zeros")(x)
    keras.Model(noisy, layers.Add()([layers.ReLU(threshold=8.0)(noisy), x])).save(path)
    figures = {"total_stride": 4, "default_halo": 0, "exact_halo": 0, "notes": []}
    monkeypatch.setattr("denoise_core.keras_files.figures_of", lambda *_, **__: figures)
    return str(path)


def picture(
    height: int, width: int, channels: int = 3, *, seed: int = 0, sigma: float = 20.0
) -> np.ndarray:
    """A smooth picture with noise of `sigma`/255: float32 (h, w, C), a little outside [0, 1]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    planes = [
        0.5 + 0.4 * np.sin(x / (17 + 3 * c) + seed) * np.cos(y / (13 + 2 * c))
        for c in range(channels)
    ]
    clean = np.stack(planes, axis=-1).astype(np.float32)
    return clean + rng.normal(0, sigma / 255, clean.shape).astype(np.float32)


def as_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """Scale [0, 1] to the dtype's range."""
    info = np.iinfo(dtype)
    return np.clip(np.rint(values * info.max), 0, info.max).astype(dtype)


class Notes(list[str]):
    """A watcher that keeps what a run tells."""

    def note(self, text: str) -> None:
        self.append(text)

    def update(self, *state: Any) -> None:
        pass


def rows_of(out: Path | str) -> list[dict[str, Any]]:
    """The rows of the report table of a local OUT."""
    parts = sorted((Path(out) / "reports" / "images").glob("part-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def by_name(out: Path | str) -> dict[str, dict[str, Any]]:
    """The rows by the last part of their source's name; fails where two rows share an image."""
    rows = rows_of(out)
    assert len({row["image_id"] for row in rows}) == len(rows)
    return {Path(row["source_uri"]).name: row for row in rows}


def files_below(root: Path) -> list[str]:
    """Relative paths of all files, hidden ones too."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def files_with(hidden: list[str], folder: Path) -> list[str]:
    """The files below a folder that hold one of these texts."""
    return [
        name
        for name in files_below(folder)
        if (folder / name).is_file()
        and any(text.encode() in (folder / name).read_bytes() for text in hidden)
    ]


def ray_folder() -> Path:
    """Where this process's Ray keeps logs and packages."""
    import ray

    return Path(ray._private.worker._global_node.get_session_dir_path())


def job_environment(**more: str) -> dict[str, str]:
    """The environment of a job's process: no settings of the tester's own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DENOISE_", "RAY_ADDRESS"))}
    return {**kept, **more}


def start_job(*arguments: str, environment: dict[str, str] | None = None, **more: Any) -> Any:
    """Start `python -m jobs.denoise` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.denoise", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment or job_environment(),
        **more,
    )


def kill_everything(process: subprocess.Popen[str]) -> None:
    """SIGKILL for the driver, the raylet, the workers: all at once, none can tidy up."""
    victims = [process.pid, *(each.pid for each in psutil.Process(process.pid).children(True))]
    for sent in (signal.SIGSTOP, signal.SIGKILL):
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, sent)
    process.wait(timeout=30)


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen[str], *, timeout_s: float = 200
) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def run_job(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run `python -m jobs.denoise` to its end; return the exit code and what it printed."""
    process = start_job(*arguments, environment=environment)
    text, _ = process.communicate(timeout=240)
    assert "Traceback" not in text, text
    return process.returncode, text


def json_lines(text: str) -> list[dict[str, Any]]:
    """Every line as JSON; a line that is none fails the test."""
    return [json.loads(line) for line in text.splitlines()]


def denoise(inputs: Any, output: Any, model: str, **settings: Any) -> Any:
    """Run the pipeline in this process, on the Ray that is there; return its outcome.

    Float32 and one actor unless `settings` say otherwise.
    """
    from denoise_core.config import DenoiseConfig
    from denoise_core.pipelines.denoise import Watcher, run_denoising

    paths = inputs if isinstance(inputs, list | tuple) else [inputs]
    config = DenoiseConfig(
        inputs=tuple(map(str, paths)),
        output=str(output),
        model=model,
        **{"precision": "float32", "actors": "1", **settings},
    )
    return run_denoising(config, watcher=Watcher())
