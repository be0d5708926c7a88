"""`python -m jobs.train` on a real Ray: a run killed and resumed, and what a user is told."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from denoise_core.checkpoints import load_checkpoint
from denoise_core.config import TrainConfig
from denoise_core.errors import RunFailed
from denoise_core.presets import Preset, Stage

TINY = Preset(
    "unet",
    {"widths": (4, 8), "blocks": (1, 1), "channels": 3},
    default_halo=8,
    learning_rate=1e-2,
    stages=(Stage(0.0, 16, 4),),
    warmup_steps=4,
    ema=0.9,
)
# The job in a process of its own, with the tiny preset among the others.
DRIVER = f"""
from denoise_core.presets import PRESETS, Preset, Stage
PRESETS["tiny"] = {TINY!r}
from jobs.train import main
main()
"""
STEPS, EVERY = 200, 20

# Two starts of Ray, TensorFlow and XLA in one fixture: half a minute, or five on a busy machine.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    rng = np.random.default_rng(0)
    for index in range(6):
        values = np.repeat(np.repeat(rng.integers(0, 256, (6, 8, 3)), 8, 0), 8, 1)
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def environment() -> dict[str, str]:
    """Ours without what quiets TensorFlow; Ray Train takes reports ten times as often."""
    mine = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "TF_CPP_MIN_LOG_LEVEL")}
    return {**mine, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env=environment(),
    )


def finish(*arguments: object) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def history(output: Path) -> list[dict[str, str]]:
    path = output / "history.csv"
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL a driver and all that it started: raylet, store, workers."""
    parent = psutil.Process(process.pid)
    for each in [parent, *parent.children(recursive=True)]:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.communicate(timeout=30)


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory):
    """A run killed and resumed: rows before the kill, folder, exit code, stdout, stderr."""
    output = tmp_path_factory.mktemp("run")
    arguments = [data, "--output", output, "--preset", "tiny", "--steps", STEPS]
    arguments += ["--validate-steps", EVERY, "--precision", "float32"]
    process = start(*arguments)
    known = output / "ray" / "run" / "checkpoint_manager_snapshot.json"
    deadline = time.monotonic() + 240
    # Ray learns of a checkpoint some time after the worker has written it.
    while not (
        len(history(output)) >= 2 and known.exists() and '"checkpoint_2' in known.read_text()
    ):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_all(process)
    before = history(output)
    return before, output, *finish(*arguments, "--resume")


@pytest.mark.ray
def test_a_killed_run_goes_on_from_its_checkpoint(resumed):
    before, output, code, _, err = resumed
    assert code == 0, err
    assert 2 <= len(before) < STEPS // EVERY
    steps = [int(row["step"]) for row in history(output)]
    assert steps == list(range(EVERY, STEPS + 1, EVERY))
    # What was done before is not done again: a row from then still stands, its seconds too.
    assert history(output)[0] == before[0]
    seconds = [float(row["seconds"]) for row in history(output)]
    assert seconds == sorted(seconds)


@pytest.mark.ray
def test_the_driver_prints_each_report_and_nothing_on_stderr(resumed):
    before, output, _, out, err = resumed
    assert err == ""
    lines = out.splitlines()
    assert len(lines) > STEPS // EVERY - len(before)
    pattern = (
        r" *\d+\.\d%  step \d+  \d+ Mpx  \d+\.\d{3} Mpx/s  loss \d\.\d{5}"
        r"  validation PSNR \d+\.\d\d dB  \d+:\d\d:\d\d left"
    )
    assert [line for line in lines[:-1] if not re.fullmatch(pattern, line)] == []
    assert lines[-2].startswith("100.0%")
    assert lines[-1].endswith(f"--model {output / 'best'}")


@pytest.mark.ray
def test_the_best_model_is_there_with_its_card(resumed, data):
    _, output, *_ = resumed
    best = load_checkpoint(str(output / "best"))
    assert len(best.weights()) > 0
    assert best.card["name"] == "tiny"
    assert best.card["training"]["images"] == 5
    assert best.card["training"]["data"] == [data.name]
    figures = [float(row["psnr"]) for row in history(output)]
    assert best.card["figures"]["validation_psnr_sigma25"] == pytest.approx(max(figures), abs=1e-3)
    assert json.loads((output / "train.json").read_text())["resume"] is True


def test_a_second_training_in_one_place_is_refused(data, tmp_path):
    (tmp_path / "history.csv").touch()
    code, out, err = finish(data, "--output", tmp_path, "--preset", "tiny", "--steps", 10)
    assert (code, out) == (2, "")
    assert err == (
        f"Error: --output {tmp_path} holds a training: go on with --resume or name another.\n"
    )


@pytest.mark.ray
def test_a_loss_that_is_not_finite_ends_the_job_without_another_try(ray_session, data, tmp_path):
    from denoise_core.pipelines.train import run_training

    config = TrainConfig(
        data=(str(data),), output=str(tmp_path), steps=1000, learning_rate=1e30, threads=1
    )
    rows: list[dict[str, float]] = []
    with pytest.raises(RunFailed, match=r"became .* at step \d+\. .*--resume and a lower"):
        run_training(config, show=rows.append, preset=TINY)
    assert rows == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"--preset": "unet-z"}, "Unknown preset 'unet-z'. Did you mean 'unet-"),
        ({"--noise": "gausian:25"}, "unknown noise 'gausian'. Did you mean 'gaussian'"),
        ({"--init": "no-such"}, "--model 'no-such': neither a shipped model"),
        ({"--preset": "unet-xs"}, "0.png: crops of 128 px do not fit into 64x48 px"),
        ({"DATA": "empty"}, "No images found in "),
        ({"--steps": "0"}, "--steps: expected a number from 1"),
        ({"--hours": "1"}, "one of --steps N and --hours H"),
    ],
    ids=str,
)
def test_wrong_usage_gets_one_sentence_and_exit_code_2(data, tmp_path, changes, sentence):
    flags = {"--output": tmp_path / "run", "--preset": "tiny", "--steps": 10, **changes}
    source = tmp_path / str(flags.pop("DATA")) if "DATA" in flags else data
    code, out, err = finish(source, *(part for pair in flags.items() for part in pair))
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
