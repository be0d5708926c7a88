"""`python -m jobs.train` on a real Ray: a run killed and resumed, and what a user is told."""

from __future__ import annotations

import csv
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from helpers import by_name, denoise, files_with, ray_folder, wait_until
from PIL import Image
from rich.console import Console
from tiny_training import TINY, kill_all, start_tiny

from denoise_core import training_data
from denoise_core.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from denoise_core.config import TrainConfig
from denoise_core.errors import (
    CheckpointError,
    DenoiseError,
    OutputLocked,
    RunFailed,
    StorageUnavailable,
    UsageError,
)
from denoise_core.lock import HEARTBEAT_S, Lock, output_lock
from denoise_core.models import build_model
from denoise_core.presets import PRESETS
from denoise_core.storage import LocalStorage, storage_for
from denoise_core.training import Plan, Trainer, prepare, psnr_of
from denoise_core.training_data import Sampler
from jobs.train import Display, main

STEPS, EVERY = 200, 20
SHORT = ("--preset", "tiny", "--steps", STEPS, "--validate-steps", EVERY, "--precision", "float32")

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


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start a training; Ray Train takes its reports ten times as often."""
    return start_tiny("train", *arguments, RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2")


def finish(*arguments: object) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def history(output: Path) -> list[dict[str, str]]:
    path = output / "history.csv"
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory):
    """A run killed and resumed: rows before the kill, folder, exit code, stdout, stderr."""
    output = tmp_path_factory.mktemp("run")
    arguments = [data, "--output", output, *SHORT]
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
def test_sigterm_ends_in_order(data, tmp_path):
    process = start_tiny(
        "train", data, "--output", tmp_path / "run", *SHORT, "--steps", 10_000, STRETCH_THE_END="1"
    )
    wait_until(lambda: history(tmp_path / "run"), process)
    process.terminate()
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert err == "Interrupted. The last checkpoint is safe; go on with --resume.\n"
    assert not (tmp_path / "run/.denoise/lock.json").exists()


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
    assert len(lines) > 1 + STEPS // EVERY - len(before)
    assert lines[0] == "6 images, 1 of them held out for validation."
    pattern = (
        r" *\d+\.\d%  step \d+  loss \d\.\d{5}  validation PSNR \d+\.\d\d dB"
        r"  [1-9]\d*\.\d images/s  \d+:\d\d:\d\d left"
    )
    assert [line for line in lines[1:-1] if not re.fullmatch(pattern, line)] == []
    assert lines[-2].startswith("100.0%")
    assert re.fullmatch(r"Done, validation PSNR \d+\.\d\d dB at step \d+\. Use it .*", lines[-1])
    assert lines[-1].endswith(f"--model {output / 'best'}")


@pytest.mark.ray
def test_the_run_leaves_curves_samples_and_logs(resumed):
    _, output, *_ = resumed
    curves = np.asarray(Image.open(output / "curves.png"))
    assert curves.shape[0] > 400
    assert len(np.unique(curves.reshape(-1, curves.shape[2]), axis=0)) > 100
    samples = sorted(path.name for path in (output / "samples").iterdir())
    assert samples[0] == f"step-{EVERY:07d}.png"
    assert samples[-1] == f"step-{STEPS:07d}.png"
    assert any((output / "tensorboard").iterdir())


@pytest.mark.ray
def test_the_best_model_is_there_with_its_card(resumed, data):
    _, output, *_ = resumed
    best = load_checkpoint(str(output / "best"))
    assert len(best.weights()) > 0
    assert best.card["name"] == "tiny"
    assert best.card["training"]["images"] == 5
    assert best.card["training"]["data"] == [data.name]
    lowest = min(history(output), key=lambda row: float(row["val_loss"]))
    figures = best.card["figures"]
    assert figures["validation_loss"] == pytest.approx(float(lowest["val_loss"]), rel=1e-4)
    assert figures["validation_psnr"] == pytest.approx(float(lowest["psnr"]), abs=1e-3)
    assert json.loads((output / "train.json").read_text())["resume"] is True


@pytest.mark.parametrize(
    ("settings", "noise", "measured_on", "grey"),
    [
        ({}, "gaussian:0-55", "gaussian:0-55", 0.2),
        ({"noise": ("gaussian:9",), "grey": 0.5}, "gaussian:9", "gaussian:9", 0.5),
        ({"self_supervised": "noise2void"}, "noise2void", None, 0.0),
        ({"noisy": "n/*", "clean": "c/*"}, "pairs", None, 0.0),
    ],
)
def test_the_card_says_what_was_done(data, tmp_path, settings, noise, measured_on, grey):
    from denoise_core.pipelines.train import Reporter

    for name in "nc":
        shutil.copytree(data, tmp_path / name)
    source = tmp_path if "noisy" in settings else tmp_path / "c"
    config = TrainConfig(data=(str(source),), output=str(tmp_path / "r"), steps=1, **settings)
    plan = prepare(config, TINY)
    trainer = Trainer(plan.config, plan.preset, plan.data)
    reporter = Reporter(trainer, plan.data, precision="float32", mail=None)
    card = reporter._card({"psnr": 30.0, "val_loss": 0.1, "step": 1, "pixels": 1, "seconds": 1.0})
    assert card["noise"] == noise
    assert card["figures"]["validation_noise"] == measured_on
    assert card["training"]["grey_share"] == grey
    assert card["training"]["loss"] == ("mse" if noise == "noise2void" else "l1")
    assert card["training"]["validation_images"] == 1


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
        data=(str(data),), output=str(tmp_path / "run"), steps=1000, learning_rate=1e30, threads=1,
        input="thread",
    )  # fmt: skip
    rows: list[dict[str, float]] = []
    with pytest.raises(RunFailed, match=r"became .* at step \d+\. .*--resume and a lower"):
        run_training(prepare(config, TINY), show=rows.append)
    assert [row for row in rows if not (row.get("tick") or "note" in row)] == []


@pytest.mark.ray
def test_a_disk_that_fills_ends_the_job_in_one_sentence(
    ray_session, data, small_disk, monkeypatch, capfd
):
    arguments = {"widths": (32, 64), "blocks": (1, 1), "channels": 3}
    # The model fits on the disk, its state with averages and moments does not.
    monkeypatch.setitem(PRESETS, "tiny", replace(TINY, arguments=arguments))
    words = [data, "--output", small_disk / "out", "--preset", "tiny", "--steps", 2]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in (*words, "--threads", 1, "--input", "thread")])
    assert ended.value.code == 1
    out, err = capfd.readouterr()
    assert out == "6 images, 1 of them held out for validation.\n"
    sentence = r"Error: .*: no space left\. The last checkpoint is good: make room and go on .*\n"
    assert re.fullmatch(sentence, err)
    assert (small_disk / "out/best/model.json").exists()


# As TensorFlow names it, which this file does not import.
OutOfDeviceMemory = type("ResourceExhaustedError", (Exception,), {})


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EDQUOT, "", "/out/a"), "/out/a: no space left. The last checkpoint is good"),
        (
            OSError(errno.EIO, "broken"),
            "out or /.*: broken. The last checkpoint is good: make room",
        ),
        (StorageUnavailable("/a: full"), "/a: full. The last checkpoint is good: go on with --res"),
        (OutOfDeviceMemory("OOM"), ".* no memory for a step: give a smaller --batch"),
    ],
    ids=repr,
)
def test_a_worker_that_runs_out_of_something_says_so_in_a_sentence(monkeypatch, error, sentence):
    from denoise_core.pipelines import train

    def fail(*_):
        raise error

    monkeypatch.setattr(train, "_train", fail)
    monkeypatch.setattr(train.ray, "get", lambda reference: reference)
    settings, mail = asdict(TrainConfig(data=("in",), output="out", steps=1)), Outbox()
    arguments = {"preset": TINY, "data": None, "mail": mail, "init_hash": None}
    train._train_worker({"config": settings, **arguments})
    (told,) = mail
    assert isinstance(told, RunFailed)
    assert re.match(sentence, str(told))


def test_a_training_that_has_no_room_is_refused_on_a_machine_and_noted_on_a_cluster():
    from denoise_core.pipelines.train import room_notes

    def notes(cpus, gpus=0.0, *, grows=False, **settings):
        config = TrainConfig(data=("in",), output="out", steps=1, **settings)
        return room_notes(config, {"CPU": cpus, "GPU": gpus}, grows=grows)

    assert notes(1.0) == notes(2.0, workers=2) == notes(1.0, workers=2, input="thread") == []
    assert notes(2.0, workers=3) == notes(16.0, 2.0, workers=2, gpus_per_worker=1.0) == []
    with pytest.raises(UsageError, match=r"2 worker\(s\) ask for 1\.2 CPU\(s\) .* there are 1 and"):
        notes(1.0, workers=2)
    with pytest.raises(UsageError, match=r"and 2 GPU\(s\); there are 16 and 1\. Give fewer"):
        notes(16.0, 1.0, workers=2, gpus_per_worker=1.0)
    (note,) = notes(0.0, grows=True, workers=2, gpus_per_worker=1.0)
    assert note.startswith("2 worker(s) ask for 1.2 CPU(s) and 2 GPU(s); there are 0 and 0, and")
    assert notes(8.0, 2.0) == ["2 GPU(s) are not used: --gpus-per-worker is 0."]


@pytest.mark.parametrize(
    ("there", "stated", "each"),
    [
        ({}, None, 0.0),
        ({"GPU": 2.0}, None, 1.0),
        ({"GPU": 1.0}, None, 0.0),
        ({"GPU": 2.0}, 0.0, 0.0),
    ],
)
def test_workers_have_a_gpu_each_where_there_are_enough(there, stated, each):
    from denoise_core.pipelines.train import with_gpus

    config = TrainConfig(data=("in",), output="out", steps=1, workers=2, gpus_per_worker=stated)
    assert with_gpus(config, there).gpus_per_worker == each


def test_a_training_holds_the_lock_of_its_output_and_takes_that_of_a_dead_one(
    data, tmp_path, monkeypatch
):
    from denoise_core.pipelines import train

    monkeypatch.setattr(train.ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(train, "beside_driver", dict)
    monkeypatch.setattr(train, "keep_actors_here", lambda: None)
    monkeypatch.setattr(train, "_ray_trainer", lambda *_: None)
    monkeypatch.setattr(train, "Queue", lambda **_: SimpleNamespace(shutdown=lambda force: None))
    output = tmp_path / "run"
    held = output / ".denoise" / "lock.json"
    plan = prepare(TrainConfig(data=(str(data),), output=str(output), steps=1), TINY)
    during = []
    monkeypatch.setattr(train, "_fit", lambda *_, **__: during.append(held.exists()))
    (output / "best").mkdir(parents=True)
    (output / "best/model.json").touch()
    with output_lock(LocalStorage(), str(output), run_id="first"):
        with pytest.raises(OutputLocked, match=r"run first on .* is at work here"):
            train.run_training(plan, show=print)
        assert not (output / "train.json").exists()
        dead = json.loads(held.read_text())
    gone = subprocess.Popen(["true"])
    gone.wait()
    held.write_text(json.dumps({**dead, "pid": gone.pid}))
    started = time.monotonic()
    assert train.run_training(plan, show=print) == str(output / "best")
    # After a kill -9 on this machine --resume does not wait for the heartbeat to grow old.
    assert time.monotonic() - started < 1.5 * HEARTBEAT_S
    assert during == [True]
    assert not held.exists()
    (output / "best/model.json").unlink()
    with pytest.raises(RunFailed, match=r"No validation had a finite loss, .* begin anew with a"):
        train.run_training(plan, show=print)


def test_a_training_whose_output_another_took_over_is_ended(monkeypatch):
    from denoise_core.pipelines import train

    def no_mail(timeout):
        lock.lost_to = "thief"
        raise train.Empty

    lock, ended = Lock("mine"), threading.Event()
    monkeypatch.setattr(train, "end_training", lambda *_, **__: ended.set())
    trainer, mail = SimpleNamespace(fit=lambda: ended.wait(60)), SimpleNamespace(get=no_mail)
    with pytest.raises(RunFailed, match="run thief took over"):
        train._fit(trainer, mail=mail, show=print, lock=lock)
    assert ended.is_set()


@pytest.mark.parametrize(
    ("psnr", "text"), [(31.257, "validation PSNR 31.26 dB"), (None, "validation loss 0.01250")]
)
def test_the_last_line_has_the_figures_of_a_best_model_from_before(tmp_path, capsys, psnr, text):
    figures = {"validation_loss": 0.0125, "validation_psnr": psnr}
    card = {"training": {"steps": 40}, "figures": figures}
    best = tmp_path / "my best"
    best.mkdir()
    (best / "model.json").write_text(json.dumps(card))
    for progress in ("plain", "json"):
        settings = TrainConfig(data=("in",), output="out", progress=progress)
        Display(settings).finish(str(best))
    plain, line = capsys.readouterr().out.splitlines()
    assert plain.startswith(f"Done, {text} at step 40. Use it with: ")
    assert shlex.split(plain)[-2:] == ["--model", str(best)]
    done = {"step": 40, "val_loss": 0.0125, "psnr": psnr, "model": str(best)}
    assert json.loads(line) == {"done": done}


class Outbox(list[object]):
    """A queue that keeps what it is given."""

    put = list.append


def trainer_of(output: Path, steps: int, load: Callable[[Path], None]) -> SimpleNamespace:
    settings = TrainConfig(data=("in",), output=str(output), steps=steps, resume=True)
    return SimpleNamespace(config=settings, rank=0, load_state=load)


def test_the_settings_are_written_once_the_checkpoint_fits(tmp_path):
    import ray.train

    from denoise_core.pipelines.train import take_up

    def refuse(folder: Path) -> None:
        raise CheckpointError(f"{folder}: no checkpoint of this preset.")

    (tmp_path / "state").mkdir()
    last, mail = ray.train.Checkpoint.from_directory(tmp_path / "state"), Outbox()
    take_up(trainer_of(tmp_path, 5, lambda folder: None), last, mail=mail)
    with pytest.raises(CheckpointError):
        take_up(trainer_of(tmp_path, 9, refuse), last, mail=mail)
    assert json.loads((tmp_path / "train.json").read_text())["steps"] == 5
    assert mail == []


def test_a_training_whose_checkpoints_are_gone_says_that_it_starts_anew(tmp_path):
    from denoise_core.pipelines.train import take_up

    mail = Outbox()
    take_up(trainer_of(tmp_path, 5, lambda folder: None), None, mail=mail)
    note = f"--resume: no checkpoint in {tmp_path}; training starts anew."
    assert mail == [{"note": note}]


def test_the_bar_keeps_the_last_validation_and_fits_into_80_columns(monkeypatch):
    monkeypatch.setattr("jobs.train.is_live", lambda kind: True)
    display = Display(TrainConfig(data=("in",), output="out"))
    row = {"step": 1234567, "seconds": 50_000.0, "fraction": 0.6, "loss": 0.01234}
    row |= {"images_per_s": 10512.3, "tick": True}
    shown = "loss 0.01234  validation PSNR 30.12 dB  10512.3 images/s  9:15:33 left"
    display.show({**row, "tick": False, "val_loss": 0.02, "psnr": 30.12})
    # A checkpoint between validations, and a tick.
    for later in ({**row, "tick": False, "psnr": math.nan}, row):
        display.show(later)
        console = Console(width=80, file=io.StringIO())
        console.print(display.bar.progress.get_renderable())
        assert console.file.getvalue().rstrip().endswith(shown)


def test_what_is_held_out_is_said_in_one_sentence(data, tmp_path, monkeypatch):
    from denoise_core.pipelines.train import split_note

    def note(**settings):
        return split_note(
            prepare(TrainConfig(output=str(tmp_path / "run"), steps=1, **settings), TINY)
        )

    assert note(data=(str(data),)) == "6 images, 1 of them held out for validation."
    held = str(data / "0.png")
    given = f"5 images to train on; validation by 1 of {held}."
    assert note(data=(str(data),), validation_data=(held,)) == given
    for name in "ab":
        for kind in ("n", "c"):
            shutil.copy(held, tmp_path / f"{name}_{kind}.png")
    monkeypatch.setattr(training_data, "VALIDATION_IMAGES", 2)
    half = note(data=(str(data),), validation=0.5)
    assert half.endswith(
        "3 of them held out for validation; 2 of these, evenly spread, are measured."
    )
    pairs = {"noisy": "*_n.png", "clean": "*_c.png"}
    assert note(data=(str(tmp_path),), **pairs).startswith("2 pairs, 1 of them held out")


def test_samples_are_drawn_with_the_weights_that_were_validated(data, tmp_path, monkeypatch):
    from denoise_core import curves
    from denoise_core.pipelines import train

    monkeypatch.setattr(train.ray.train, "report", lambda *_, **__: None)
    drawn, draw = [], curves.draw_samples
    monkeypatch.setattr(
        curves, "draw_samples", lambda s, title: drawn.append(s) or draw(s, title=title)
    )
    settings = TrainConfig(
        data=(str(data),), output=str(tmp_path / "run"), steps=5, learning_rate=0.1
    )
    plan = prepare(settings, replace(TINY, warmup_steps=0, schedule="constant"))
    trainer, mail = Trainer(plan.config, plan.preset, plan.data), Outbox()
    reporter = train.Reporter(trainer, plan.data, precision="float32", mail=mail)
    trainer.run(lambda metrics, save: reporter.report(metrics))
    ((row,), (samples,)) = mail, drawn
    assert len(samples) == 1
    figures = [psnr_of(output, clean) for _, clean, output in samples]
    assert np.mean(figures) == pytest.approx(row["psnr"], abs=1e-6)
    raw = [psnr_of(output, clean) for _, clean, output in trainer.outputs(trainer.held_out)]
    assert abs(np.mean(raw) - row["psnr"]) > 0.01


@pytest.mark.parametrize(("every_s", "steps"), [(1e6, [1, 4]), (0.0, [1, 2, 3, 4])])
def test_curves_are_drawn_now_and_then_and_at_the_end(data, tmp_path, monkeypatch, every_s, steps):
    from denoise_core import curves
    from denoise_core.pipelines import train

    monkeypatch.setattr(train.ray.train, "report", lambda *_, **__: None)
    monkeypatch.setattr(train, "CURVES_S", every_s)
    drawn = []
    monkeypatch.setattr(
        curves, "draw_curves", lambda rows, title: drawn.append(rows[-1]["step"]) or b""
    )
    monkeypatch.setattr(curves, "draw_samples", lambda *_, **__: b"")
    settings = TrainConfig(
        data=(str(data),), output=str(tmp_path / "run"), steps=4, validate_steps=1
    )
    plan = prepare(settings, TINY)
    trainer = Trainer(plan.config, plan.preset, plan.data)
    reporter = train.Reporter(trainer, plan.data, precision="float32", mail=Outbox())
    trainer.run(lambda metrics, save: reporter.report(metrics))
    assert drawn == steps


def test_a_note_is_a_line_of_text_or_of_json(capsys):
    for progress, line in (("plain", "Mind.\n"), ("json", '{"note": "Mind."}\n')):
        config = TrainConfig(data=("in",), output="out", progress=progress)
        Display(config).show({"note": "Mind."})
        assert capsys.readouterr().out == line


class Mail:
    """A queue that holds what it was given, as Ray's does."""

    def __init__(self, *items: object) -> None:
        self.items = list(items)

    def get(self, timeout: float) -> object:
        from ray.exceptions import ActorUnavailableError
        from ray.util.queue import Empty

        if not self.items:
            raise Empty
        if isinstance(self.items[0], ActorUnavailableError):
            raise self.items.pop(0)
        return self.items.pop(0)


def test_mail_that_does_not_come_for_a_while_ends_no_training():
    from ray.exceptions import ActorUnavailableError

    from denoise_core.pipelines.train import _read

    mail = Mail(ActorUnavailableError("busy", None), {"step": 6})
    shown: list[dict[str, object]] = []
    _read(mail, told=[], show=shown.append, wait_s=0.0)
    assert shown == []
    _read(mail, told=[], show=shown.append, wait_s=0.0)
    assert shown == [{"step": 6}]


def test_an_error_that_the_training_recovered_from_is_forgotten():
    from denoise_core.pipelines.train import _read

    error, tick, report = RunFailed("Disk."), {"step": 5, "tick": True}, {"step": 6}
    note = {"note": "Anew."}
    for items, left in (
        ((error,), [error]),
        ((error, tick, note), [error]),
        ((error, tick, report), []),
        ((report, error, report, error), [error]),
    ):
        told: list[DenoiseError] = []
        shown: list[dict[str, object]] = []
        _read(Mail(*items), told=told, show=shown.append, wait_s=0.0)
        assert told == left
        assert shown == [item for item in items if item is not error]


def kill_one_worker(process: subprocess.Popen[str]) -> None:
    """SIGKILL one of the processes that train."""
    trainers = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "RayTrainWorker" in "".join(child.cmdline()[:1]):
                trainers.append(child)
    assert len(trainers) == 2
    trainers[1].kill()


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_two_workers_one_killed_on_the_way_follow_the_curve_of_one(resumed, data, tmp_path):
    _, one, *_ = resumed
    two = tmp_path / "two"
    process = start(data, "--output", two, *SHORT, "--workers", 2)
    deadline = time.monotonic() + 400
    while len(history(two)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_one_worker(process)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    expected, got = history(one), history(two)
    assert [row["step"] for row in got] == [row["step"] for row in expected]
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(
            [float(row[name]) for row in got],
            [float(row[name]) for row in expected],
            rtol=1e-3,
        )


def test_a_rate_of_the_input_is_of_its_steps_without_warm_up_and_end(monkeypatch):
    from denoise_core.pipelines import train

    now = 0.0

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    def batches():
        try:
            passes(50.0)
            while True:
                yield None, None
        finally:
            passes(100.0)

    monkeypatch.setattr(train.time, "perf_counter", lambda: now)
    trainer = SimpleNamespace(train_step=lambda *_, fraction: passes(0.5))
    assert train._rate(trainer, batches(), steps=4, warm=2) == 2.0


def tiny_checkpoint(folder: Path) -> Checkpoint:
    """Write a checkpoint of TINY's architecture with random weights."""
    rng = np.random.default_rng(0)
    model = build_model(TINY.architecture, **TINY.arguments)
    weights = [rng.normal(0, 0.1, each.shape) for each in model.get_weights()]
    card = {"architecture": TINY.architecture, "arguments": TINY.arguments}
    return save_checkpoint(
        folder, weights, {**card, "total_stride": 2, "default_halo": 8, "exact_halo": 12}
    )


TRAINED = [name for name in PRESETS if name != "unet-s-photo"]
# This one learns from noisy images alone.
BLIND = "unet-xs"


def train_every_plan(arguments: dict[str, Any]) -> None:
    """What a worker runs: each plan in turn; its losses, weights and outputs go by mail."""
    import ray
    import tensorflow as tf

    from denoise_core.devices import configure_tensorflow

    configure_tensorflow(threads=1, use_gpu=False)
    # A process joins the others once.
    strategy = functools.cache(tf.distribute.MultiWorkerMirroredStrategy)
    tf.distribute.MultiWorkerMirroredStrategy = lambda **_: strategy()
    rank = ray.train.get_context().get_world_rank()
    for plan in ray.get(arguments["data"]):
        trainer = Trainer(plan.config, plan.preset, plan.data, rank=rank)
        before = trainer.model.get_weights()
        losses: list[float] = []
        trainer.run(lambda seen, _, to=losses: to.extend((seen["loss"], seen["val_loss"])))
        after = trainer.model.get_weights()
        outputs = [output for *_, output in trainer.outputs(trainer.held_out)]
        arguments["mail"].put(
            {
                "key": (plan.config.preset, rank),
                "losses": losses,
                "weights": hashlib.sha256(b"".join(w.tobytes() for w in after)).hexdigest(),
                "moved": [not np.array_equal(*pair) for pair in zip(before, after, strict=True)],
                "shape": outputs[0].shape,
                "range": (min(map(np.min, outputs)), max(map(np.max, outputs))),
            }
        )


def trained_presets(folder: Path, workers: int) -> dict[tuple[str, int], dict[str, Any]]:
    """Train every preset for two steps on one group of workers; what each told, by name and rank.

    `folder` has `digits` and `photos`.
    """
    from denoise_core.pipelines.cluster import beside_driver
    from denoise_core.pipelines.train import Queue, _fit, _ray_trainer

    common = {"steps": 2, "validate_steps": 2, "batch": 4, "max_failures": 0, "workers": workers}
    plans = []
    for name in TRAINED:
        preset = PRESETS[name]
        data, crop = ("digits", None) if preset.sample else ("photos", 16)
        config = TrainConfig(
            data=(str(folder / data),), output=str(folder / f"{workers}"), preset=name, crop=crop,
            self_supervised="noise2void" if name == BLIND else None, **common,
        )  # fmt: skip
        # Compiling takes longer than all the rest.
        xla = workers == 1 and name in ("unet-s", "mnist-conv")
        plans.append(prepare(config, replace(preset, xla=xla)))
    rows: list[dict[str, Any]] = []
    mail = Queue(actor_options=beside_driver())
    trainer = _ray_trainer(Plan(plans[0].config, plans[0].preset, plans), mail)
    _fit(trainer, mail=mail, show=rows.append, lock=Lock("mine"))
    mail.shutdown(force=True)
    return {row["key"]: row for row in rows}


@pytest.mark.ray
def test_every_preset_trains_alike_with_one_worker_and_with_two(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr("denoise_core.pipelines.train._train_worker", train_every_plan)
    rng = np.random.default_rng(0)
    for folder, shape in (("digits", (7, 7)), ("photos", (12, 12, 3))):
        (tmp_path / folder).mkdir()
        for index in range(6):
            values = rng.integers(0, 256, shape).astype(np.uint8)
            cells = np.repeat(np.repeat(values, 4, 0), 4, 1)
            Image.fromarray(cells).save(tmp_path / folder / f"{index}.png")
    one, two = trained_presets(tmp_path, 1), trained_presets(tmp_path, 2)
    assert (len(one), len(two)) == (len(TRAINED), 2 * len(TRAINED))
    for name in TRAINED:
        preset = PRESETS[name]
        alone, first, second = one[name, 0], two[name, 0], two[name, 1]
        assert len(alone["losses"]) == 2
        assert np.isfinite(alone["losses"]).all()
        assert all(alone["moved"]), name
        assert alone["shape"][2] == preset.channels
        if preset.architecture != "unet":
            assert 0 <= alone["range"][0] <= alone["range"][1] <= 1
        for told in ("losses", "weights"):
            assert first[told] == second[told], name
        np.testing.assert_allclose(first["losses"], alone["losses"], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("host", "gpus", "count"),
    [
        ({"CPU": 64.0}, 0.0, 1),
        ({"CPU": 64.0}, 1.0, 1),
        ({"CPU": 64.0, "GPU": 1.0}, 0.0, 1),
        ({"CPU": 4.0, "GPU": 1.0}, 1.0, 1),
        ({"CPU": 8.0, "GPU": 1.0}, 1.0, 2),
        ({"CPU": 64.0, "GPU": 8.0}, 1.0, 2),
        ({"CPU": 16.0, "GPU": 1.0}, 0.5, 2),
        ({"CPU": 64.0, "GPU": 1.0}, 1.0, 4),
        ({"GPU": 1.0}, 1.0, 1),
    ],
)
def test_crops_for_a_gpu_are_made_by_some_of_the_cpus_beside_it(host, gpus, count):
    from denoise_core.pipelines.crops import makers

    assert makers(host, gpus=gpus) == count


@pytest.mark.ray
def test_the_batches_of_several_processes_are_those_of_one_in_order(
    ray_session, data, tmp_path, monkeypatch
):
    from denoise_core.pipelines import crops

    config = TrainConfig(data=(str(data),), output=str(tmp_path / "run"), steps=120)
    plan = prepare(config, TINY)
    pictures, stage = plan.data.training, TINY.stages[0]
    assert crops.RayStream(pictures, plan.config, TINY, rank=0).makers == 1
    monkeypatch.setattr(crops, "makers", lambda host, *, gpus: 2)
    # Several tasks for each.
    monkeypatch.setattr(crops, "BLOCK_BYTES", 250_000)
    stream = crops.RayStream(pictures, plan.config, TINY, rank=0)
    assert stream.makers == 2
    sampler = Sampler.make(pictures, plan.config, TINY)
    batches = itertools.islice(stream(stage, step=0), 120)
    for step, (noisy, clean) in enumerate(batches):
        expected = sampler.batch(step=step, crop=stage.crop, places=range(stage.batch))
        np.testing.assert_array_equal(noisy, expected[0])
        np.testing.assert_array_equal(clean, expected[1])
    assert step == 119
    # Each process would read all of what is too much to keep.
    large = [replace(each, plane_bytes=10**9) for each in pictures]
    assert crops.RayStream(large, plan.config, TINY, rank=0).makers == 1


@pytest.mark.ray
def test_data_run_and_models_may_lie_on_s3(ray_session, s3_server, data, tmp_path, capsys):
    from ray import cloudpickle

    from denoise_core.pipelines.train import run_training

    root = s3_server.make_bucket()
    storage = storage_for(root)
    first = tiny_checkpoint(tmp_path / "first")
    for path in (*sorted(data.iterdir()), *(tmp_path / "first").iterdir()):
        folder = "photos" if path.suffix == ".png" else "first"
        storage.write(f"{root}/{folder}/{path.name}", path.read_bytes())
    output = f"{root}/runs/one"
    config = TrainConfig(
        data=(f"{root}/photos",), output=output, init=f"{root}/first", steps=6, validate_steps=3,
        learning_rate=1e-9, export="savedmodel", threads=1, progress="plain",
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    display = Display(config)

    def show(row: dict[str, Any]) -> None:
        rows.append(row)
        display.show(row)

    plan = prepare(config, TINY)
    best = run_training(plan, show=show)
    assert best == f"{output}/best"
    display.finish(best)
    text = capsys.readouterr().out
    hidden = [s3_server.secret_key, s3_server.access_key]
    kept = text.encode() + cloudpickle.dumps(plan)
    assert [secret for secret in hidden if secret.encode() in kept] == []
    run = s3_server.root / output.removeprefix("s3://")
    assert files_with(hidden, run) + files_with(hidden, ray_folder()) == []
    assert files_with([config.preset], run)
    *_, exported, last = text.splitlines()
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6]
    assert exported.startswith(f"Exported to {output}/export/unet-s; run beside the model it ")
    names = {entry.path for entry in storage.list(output)}
    assert names >= {
        "train.json", "history.csv", "best/model.json", "best/model.safetensors", "curves.png",
        "samples/step-0000006.png", "export/unet-s/saved_model.pb",
    }  # fmt: skip
    assert any(name.startswith("ray/run/checkpoint_") for name in names)
    made = load_checkpoint(best)
    for got, expected in zip(made.weights(), first.weights(), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)
    model = last.partition(" --model ")[2]
    assert model == best
    outcome = denoise(f"{root}/photos", tmp_path / "out", model, copy_below="0")
    assert (outcome.totals.ok, outcome.totals.failed) == (6, 0)
    assert {row["model_hash"] for row in by_name(tmp_path / "out").values()} == {made.hash}
    for name in ("model.json", "model.safetensors"):
        (tmp_path / name).write_bytes(storage.read(f"{output}/best/{name}"))
    again = denoise(f"{root}/photos", tmp_path / "out", str(tmp_path), copy_below="0")
    assert (again.totals.to_do, again.totals.skipped) == (0, 6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"--preset": "unet-z"}, "Unknown preset 'unet-z'. Did you mean 'unet-"),
        ({"--noise": "gausian:25"}, "unknown noise 'gausian'. Did you mean 'gaussian'"),
        ({"--init": "no-such"}, "--init 'no-such': neither a shipped model"),
        ({"--preset": "unet-xs"}, "0.png: crops of 128 px do not fit into 64x48 px"),
        ({"DATA": "empty"}, "No images found in "),
        ({"DATA": "notes.png"}, "Error: {tmp_path}/notes.png: begins with b'# notes'"),
        ({"--steps": "0"}, "--steps: expected a number from 1"),
        ({"--hours": "1"}, "one of --steps N, --epochs N and --hours H"),
        ({"--preset": "mnist-latent16"}, "is for images of 28x28 px with 1 channel(s)"),
        ({"--noisy": "*_real.png"}, "--noisy and --clean belong together"),
        ({"--noisy": "*a.png", "--clean": "*_c.png"}, "no image in DATA has such a path"),
        ({"--augment": "flop"}, "'flop': expected some of none, flip"),
        ({"--self-supervised": "noise2void", "--loss": "l1"}, "--loss l1: --self-supervised"),
        ({"--crop": "100"}, "0.png: crops of 100 px do not fit into 64x48 px"),
    ],
    ids=str,
)
def test_wrong_usage_gets_one_sentence_and_exit_code_2(data, tmp_path, changes, sentence):
    flags = {"--output": tmp_path / "run", "--preset": "tiny", "--steps": 10, **changes}
    source = tmp_path / str(flags.pop("DATA")) if "DATA" in flags else data
    (tmp_path / "notes.png").write_text("# notes")
    code, out, err = finish(source, *(part for pair in flags.items() for part in pair))
    assert (code, out) == (2, "")
    assert sentence.replace("{tmp_path}", str(tmp_path)) in err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
