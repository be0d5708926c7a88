"""The whole job where Ray has one CPU, as in a small container, with several work lists."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import as_dtype, job_environment, make_checkpoint, picture, rows_of
from PIL import Image

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

JOB = """
import sys

from denoise_core import worklist
from denoise_core.config import DenoiseConfig
from denoise_core.pipelines.denoise import Watcher, run_denoising
from jobs._ray import start_local

worklist.SHARD_ROWS = 4
folder, out, model, gpus = sys.argv[1:]

def start():
    start_local(num_cpus=1, num_gpus=int(gpus))

config = DenoiseConfig(inputs=(folder,), output=out, model=model)
run_denoising(config, watcher=Watcher(), start_ray=start)
"""


@pytest.mark.parametrize("gpus", ["0", "1"])
def test_one_core_suffices(tmp_path: Path, gpus: str) -> None:
    """Also beside a GPU, here one that only Ray knows of."""
    for index in range(10):
        pixels = as_dtype(picture(20, 24, 3, seed=index), "uint8")
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"in/{index}.png")
    model = make_checkpoint(tmp_path / "model")
    command = [sys.executable, "-c", JOB, str(tmp_path / "in"), str(tmp_path / "out"), model, gpus]
    # Before, it hung for ever: one stage asked for a whole CPU beside the actor.
    done = subprocess.run(
        command, env=job_environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["status"] for row in rows_of(tmp_path / "out")] == ["ok"] * 10
    assert not list((tmp_path / "out/.denoise").glob("work/*"))
