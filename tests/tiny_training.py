"""A preset that trains in seconds, and the jobs that train run with it, each as a process.

`python tiny_training.py JOB ARGUMENTS` is `python -m jobs.JOB ARGUMENTS` that knows preset 'tiny'.
STRETCH_THE_END in the environment: see `worker_hook.stretch_the_end`.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import psutil
import worker_hook

from denoise_core.presets import PRESETS, Preset, Stage

TINY = Preset(
    "unet",
    {"widths": (4, 8), "blocks": (1, 1), "channels": 3},
    default_halo=8,
    learning_rate=1e-2,
    stages=(Stage(0.0, 16, 4),),
    warmup_steps=4,
    ema=0.9,
    # Compiling takes as long as all else that a worker does.
    xla=False,
)
SCRIPT = Path(__file__)


def start_tiny(job: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start `python -m jobs.<job>` that knows the preset 'tiny', with TensorFlow's own logging."""
    mine = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "TF_CPP_MIN_LOG_LEVEL")}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), job, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=SCRIPT.parents[1],
        # Ray starts its workers at niceness 15: beside other work they would hardly run.
        env={**mine, "RAY_worker_niceness": "0", **environment},
    )


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL a driver and all that it started: raylet, store, workers."""
    parent = psutil.Process(process.pid)
    for each in [parent, *parent.children(recursive=True)]:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.communicate(timeout=30)


if __name__ == "__main__":
    PRESETS["tiny"] = TINY
    if "STRETCH_THE_END" in os.environ:
        os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
        worker_hook.stretch_the_end()
    importlib.import_module(f"jobs.{sys.argv.pop(1)}").main()
