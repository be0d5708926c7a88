"""`python -m jobs.tune`: spaces, tables and plots; a search on a real Ray, killed and resumed."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
import shutil
import signal
import time
import tomllib
from collections import Counter as Counts
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from ray import tune as ray_tune
from tiny_training import TINY, kill_all, start_tiny

from denoise_core.config import TrainConfig, TuneConfig
from denoise_core.errors import OutputLocked, RunFailed, StorageError, UsageError
from denoise_core.lock import Lock, output_lock
from denoise_core.presets import PRESETS, Preset
from denoise_core.space import (
    Choices,
    Range,
    Space,
    applied,
    read_space,
    shaped,
    train_toml,
    with_arguments,
)
from denoise_core.storage import LocalStorage
from denoise_core.training import adapt
from denoise_core.trials import Trial, baseline_of, best_of, csv_bytes, plot_bytes, ranked
from jobs.tune import print_end

ROOT = Path(__file__).parents[1]
UNET = PRESETS["unet-s"]
SPACE = "learning_rate = {log = [1e-3, 3e-2]}\nloss = ['l1', 'mse']\n"
TRIALS, STEPS = 3, 160
# Of each search of a fixture, by its output.
ARGUMENTS: dict[str, list[object]] = {}


def train(**settings) -> TrainConfig:
    return TrainConfig(**{"data": ("in",), "output": "out", "steps": 10, **settings})


def space(text: str, preset: Preset = UNET) -> Space:
    return read_space(text, source="space.toml", preset=preset)


# --- spaces -------------------------------------------------------------------------------------


def test_a_space_is_read_from_toml():
    found = space(
        """
        learning_rate = {log = [1e-4, 3e-3]}
        ema = {uniform = [0.9, 0.999]}
        batch = {whole = [4, 16]}
        loss = ["l1", "mse"]
        widths = [[16, 32, 64, 128], [24, 48, 96, 192]]
        """
    )
    assert found.dimensions == {
        "learning_rate": Range(1e-4, 3e-3, "log"),
        "ema": Range(0.9, 0.999, "uniform"),
        "batch": Range(4, 16, "whole"),
        "loss": Choices(("l1", "mse")),
        "widths": Choices(([16, 32, 64, 128], [24, 48, 96, 192])),
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "learning_rat = [1e-3]",
            "'learning_rat' cannot be searched. Did you mean 'learning_rate'",
        ),
        ("width_s = [[8]]", "Did you mean 'width"),
        ("qqqqqqqq = [1]", "Expected some of learning_rate, noise"),
        ("channels = [1, 3]", "'channels' cannot be searched"),
        ("loss = 'l1'", 'space.toml: loss = "l1": expected a list of values, {log = '),
        ("loss = []", "expected a list of values"),
        ("ema = {log = [1, 2], uniform = [1, 2]}", "expected a list of values"),
        ("ema = {linear = [1, 2]}", "expected a list of values"),
        ("ema = {uniform = [1]}", "expected a list of values"),
        ("ema = {uniform = ['a', 'b']}", "expected a list of values"),
        ("batch = {whole = [1.5, 2]}", "expected a list of values"),
        ("ema = {uniform = [2, 1]}", "expected LOW below HIGH, got 2 and 1"),
        ("learning_rate = {log = [0, 1]}", "LOW below HIGH, both above 0, got 0 and 1"),
        ("ema = {uniform = [0, nan]}", "expected LOW below HIGH"),
        ("loss = [", "is not valid TOML"),
        ("", "is empty"),
        ("learning_rate = ['1e-3']", 'learning_rate = "1e-3": expected a number'),
        ("learning_rate = [nan]", "learning_rate = NaN: expected a number"),
        ("grey = [true]", "expected a number"),
        ("warmup_steps = ['a']", "expected a whole number"),
        ("batch = {uniform = [2, 6]}", "expected a whole number (of a range: {whole = "),
        ("augment = [3]", "augment = 3: expected a text"),
        ("noise = [5]", "expected a text or a list of texts"),
        ("noise = [['gaussian:5', 3]]", "expected a text or a list of texts"),
        ("width = ['a']", "expected a number above 0"),
        ("depth = ['x']", "expected a whole number from 1 to 16"),
        ("depth = [1000000]", "expected a whole number from 1 to 16"),
        ("widths = [24]", "widths = 24: expected a list of whole numbers above 0"),
        ("blocks = [[1, 1.5]]", "expected a list of whole numbers"),
        ("arguments = [1]", "arguments = 1: expected a table of some of widths, blocks"),
        ("arguments = [{up = 'x'}]", "expected a table of some of widths, blocks"),
        ("arguments = [{widths = 5}]", "arguments: widths = 5: expected a list"),
        ("clip_norm = [1979-05-27]", 'clip_norm = "1979-05-27": expected a number'),
        ("clip_norm = 1979-05-27", "expected a list of values"),
    ],
)
def test_what_is_no_space_gets_a_sentence(text, sentence):
    with pytest.raises(UsageError) as caught:
        space(text)
    assert str(caught.value).startswith("--space space.toml: ")
    assert sentence in str(caught.value)


def test_the_example_space_can_be_read_and_tried():
    text = (ROOT / "jobs" / "configs" / "tune.toml").read_text()
    for settings in space(text).trials(30, seed=1):
        applied(settings, UNET, train())
    # What is commented out works too: lines of TOML, no prose.
    toml = re.findall(r"^# (\w+ = \[.*|    {.*|\])$", text, re.MULTILINE)
    for settings in space("\n".join(toml)).trials(8, seed=1):
        applied(settings, UNET, train())


def test_trials_are_distinct_seeded_within_their_ranges_and_begin_with_the_preset():
    found = space("learning_rate = {log = [1e-4, 1e-2]}\nbatch = {whole = [4, 6]}\nloss = ['l1']")
    trials = found.trials(200, seed=3)
    assert trials[0] == {}
    assert trials == found.trials(200, seed=3)
    assert trials != found.trials(200, seed=4)
    assert len({json.dumps(t) for t in trials}) == 200
    rates = np.log10([t["learning_rate"] for t in trials[1:]])
    assert rates.min() >= -4
    assert rates.max() <= -2
    assert np.median(rates) == pytest.approx(-3, abs=0.2)
    assert {t["batch"] for t in trials[1:]} == {4, 5, 6}


def test_a_small_space_has_no_more_trials_than_combinations():
    assert len(space("loss = ['l1', 'mse']\ndepth = [3, 4]").trials(50, seed=0)) == 5


@pytest.mark.parametrize(
    ("settings", "widths", "blocks"),
    [
        ({"width": 0.5}, (12, 24, 48, 96), (1, 1, 1, 2)),
        ({"width": 0.01}, (4, 4, 4, 4), (1, 1, 1, 2)),
        ({"depth": 3}, (24, 48, 96), (1, 1, 2)),
        ({"depth": 5}, (24, 48, 96, 192, 384), (1, 1, 1, 1, 2)),
        ({"depth": 1}, (24,), (2,)),
        ({"depth": 2, "width": 2}, (48, 96), (1, 2)),
        ({"widths": [8, 8, 8, 8]}, (8, 8, 8, 8), (1, 1, 1, 2)),
        ({"arguments": {"widths": [8, 16], "blocks": [3, 1]}}, (8, 16), (3, 1)),
    ],
)
def test_width_and_depth_change_the_architecture(settings, widths, blocks):
    preset, config = applied(settings, UNET, train())
    assert preset.arguments == {"widths": widths, "blocks": blocks, "channels": 3}
    assert preset.default_halo % 2 ** (len(widths) - 1) == 0
    assert config == train()


def test_the_halo_of_a_changed_network_keeps_its_proportion_to_the_exact_one():
    assert applied({"width": 2}, UNET, train())[0].default_halo == UNET.default_halo
    assert applied({"depth": 2}, UNET, train())[0].default_halo < UNET.default_halo
    assert applied({"depth": 5}, UNET, train())[0].default_halo > UNET.default_halo


def test_depth_of_a_network_without_blocks():
    conv = PRESETS["photo-conv"].arguments
    assert shaped(conv, {"depth": 4})["widths"] == (32, 64, 128, 256)


@pytest.mark.parametrize(
    "settings", [{"widths": [8, 16]}, {"depth": 0}, {"blocks": [1]}, {"arguments": {"widths": []}}]
)
def test_arguments_that_do_not_fit_together_are_refused(settings):
    fits = r"unet cannot be built.*tables of `arguments`|needs a level.*raise depth"
    with pytest.raises(UsageError, match=fits):
        applied(settings, UNET, train())


def test_a_network_of_one_size_has_no_more_levels_than_the_size_allows():
    dense = PRESETS["mnist-latent16"]
    applied({"depth": 1}, dense, train())
    with pytest.raises(UsageError, match="28x28 px are no multiple of 8"):
        applied({"depth": 3}, dense, train())


def test_settings_of_the_training_go_into_its_config():
    _, config = applied({"loss": "mse", "noise": ["gaussian:5", "clean"]}, UNET, train())
    assert (config.loss, config.noise) == ("mse", ("gaussian:5", "clean"))
    assert applied({"noise": "gaussian:5"}, UNET, train())[1].noise == ("gaussian:5",)
    with pytest.raises(UsageError, match="--loss 'l3'"):
        applied({"loss": "l3"}, UNET, train())


def test_arguments_of_the_architecture_on_the_command_line():
    assert with_arguments(UNET, ()) is UNET
    changed = with_arguments(UNET, ["widths=[8,16]", "blocks=[1,2]"])
    assert changed.arguments == {"widths": (8, 16), "blocks": (1, 2), "channels": 3}
    for text, sentence in (
        ("width=[8]", "no argument 'width' to change. Did you mean 'widths'"),
        ("widths=8,16", "expected KEY=VALUE"),
        ("widths", "expected KEY=VALUE"),
        ("widths=[8,16]", r"unet cannot be built.*`--arguments widths=\[24,48\] blocks=\[1,1\]`"),
        ("widths=[]", r"needs a level.*name one in `--arguments widths=\[24\]`"),
        ("channels=1", "no argument 'channels'"),
        ("widths=24", "--arguments widths = 24: expected a list of whole numbers above 0"),
    ):
        with pytest.raises(UsageError, match=sentence):
            with_arguments(UNET, [text])
    for preset, text, sentence in (
        ("mnist-latent16", "latent=0", "latent = 0: expected a whole number from 1"),
        ("mnist-conv", 'up="down"', "expected one of upsample, transposed"),
    ):
        with pytest.raises(UsageError, match=sentence):
            with_arguments(PRESETS[preset], [text])


def trained_by(text: str, folder: Path) -> TrainConfig:
    """Read a file of best settings by the real command line, up to the call of the job."""
    from jobs._cli import settings_command

    (folder / "best.toml").write_text(text)
    seen = []
    command = settings_command(TrainConfig, lambda c: seen.append(c) or 0, name="t", help="")
    arguments = ["in", "--output", "out", "--steps", "5", "--config", str(folder / "best.toml")]
    with pytest.raises(SystemExit, match="0"):
        command.main(arguments)
    (config,) = seen
    return config


def test_the_best_settings_are_a_config_of_the_training_job(tmp_path):
    settings = {"learning_rate": 0.00123, "loss": "mse", "noise": ["clean", "gaussian:9"]}
    settings |= {"depth": 3, "width": 0.5}
    text = train_toml(settings, preset=UNET, shared=train(), notes="found\nby hand")
    assert text.startswith("# found\n# by hand\n\npreset = ")
    config = trained_by(text, tmp_path)
    assert (config.learning_rate, config.loss) == (0.00123, "mse")
    assert config.noise == ("clean", "gaussian:9")
    searched, _ = applied(settings, UNET, train())
    assert adapt(config, UNET).arguments == searched.arguments
    assert adapt(config, UNET).default_halo == searched.default_halo
    assert adapt(config, UNET).loss == "mse"


def test_the_preset_as_it_is_needs_no_arguments():
    text = train_toml({}, preset=UNET, shared=train(), notes="")
    assert tomllib.loads(text) == {"preset": "unet-s"}


@pytest.mark.parametrize(
    "told",
    [
        {"noise": ("poisson:30", "gaussian:5-20+clip"), "validation": 0.2, "seed": 4},
        {"noisy": "n/*.png", "clean": 'c/"*.png', "precision": "float32"},
        {"self_supervised": "noise2void", "validation_data": ("/a b", "s3://held/out")},
        {"crop": 32, "batch": 4},
    ],
)
def test_the_best_settings_keep_what_the_search_was_told_of_its_data(tmp_path, told):
    shared = train(**told, validate_steps=20)
    settings = {"learning_rate": 0.002}
    text = train_toml(settings, preset=UNET, shared=shared, notes="")
    config = trained_by(text, tmp_path)
    assert config == train(**told, **settings, steps=5)
    assert config.mode == shared.mode
    # A noise that was searched goes before the one that the others had.
    if "noise" in told:
        text = train_toml({"noise": "clean"}, preset=UNET, shared=shared, notes="")
        assert trained_by(text, tmp_path).noise == ("clean",)


# --- tables and plots ---------------------------------------------------------------------------


def trial(number, psnr, *, status="done", share=1.0, **settings):
    curve = ((share / 2, psnr - 1), (share, psnr)) if math.isfinite(psnr) else ()
    return Trial(number, settings, status, curve, steps=round(100 * share), seconds=9.5)


TABLE = [
    trial(0, 20.0),
    trial(1, 21.0, loss="l1", learning_rate=1e-3),
    trial(2, 25.0, status="stopped", share=0.25, loss="mse", learning_rate=2e-3),
    trial(3, 19.0, status="stopped", share=0.5, loss="mse", learning_rate=3e-2),
    replace(trial(4, math.nan, status="failed", loss="mse", learning_rate=9.0), note="NaN, alas"),
    trial(5, math.nan, status="waiting", loss="mse", learning_rate=4e-3),
]


def test_only_trials_that_ran_to_their_end_can_be_best():
    assert [t.number for t in ranked(TABLE)] == [1, 0, 3, 2, 5, 4]
    assert best_of(TABLE) is TABLE[1]
    assert baseline_of(TABLE) is TABLE[0]
    assert best_of(TABLE[2:]) is None
    assert baseline_of(TABLE[1:]) is None


def test_the_table_has_a_row_for_each_trial():
    rows = list(csv.DictReader(io.StringIO(csv_bytes(TABLE).decode())))
    assert [row["trial"] for row in rows] == ["1", "0", "3", "2", "5", "4"]
    assert rows[0]["psnr"] == "21.000"
    assert rows[0]["learning_rate"] == "0.001"
    assert rows[1]["loss"] == ""
    assert rows[2]["done"] == "0.500"
    assert rows[5]["note"] == "NaN, alas"
    assert rows[5]["psnr"] == ""


@pytest.mark.parametrize("trials", [TABLE, TABLE[:1], TABLE[4:5]])
def test_the_plot_can_be_drawn_of_any_table(trials):
    picture = Image.open(io.BytesIO(plot_bytes(trials, title="$ title")))
    assert picture.format == "PNG"
    assert np.asarray(picture.convert("L")).std() > 1


# --- halving ------------------------------------------------------------------------------------


def report(scheduler, number, values):
    """Feed a trial's PSNR values to the scheduler; return how many it had when it was ended."""
    one = SimpleNamespace(trial_id=str(number), config={"trial": number}, last_result=None)
    scheduler.on_trial_add(None, one)
    for place, psnr in enumerate(values, 1):
        if psnr is None:
            continue
        decision = scheduler.on_trial_result(None, one, {"validations": place, "psnr": psnr})
        if decision == "STOP":
            return place
    return len(values)


def halving(known=()):
    from denoise_core.pipelines.tune import Halving

    scheduler = Halving(known)
    scheduler.set_search_properties("psnr", "max")
    return scheduler


def test_trials_that_fall_behind_end_and_the_preset_as_it_is_does_not():
    scheduler = halving()
    assert report(scheduler, 1, [20.0] * 8) == 8
    assert report(scheduler, 0, [1.0] * 8) == 8
    assert report(scheduler, 2, [2.0] * 8) == 2
    assert report(scheduler, 3, [30.0] * 3 + [5.0] * 5) == 4
    assert report(scheduler, 4, [30.0] * 8) == 8


def test_after_a_restart_new_trials_are_compared_with_the_old_ones():
    curve = tuple((place / 8, 20.0) for place in range(1, 9))
    assert report(halving(), 2, [2.0] * 8) == 8
    assert report(halving([Trial(1, {}, "done", curve)]), 2, [2.0] * 8) == 2
    # One that had passed the first cut is judged by what it showed there.
    begun = Trial(2, {}, "running", ((0.125, 30.0), (0.25, 30.0)))
    scheduler = halving([Trial(1, {}, "done", curve), begun])
    assert report(scheduler, 2, [None, None, 2.0, 2.0]) == 4


# --- what a search knows of a trial -------------------------------------------------------------


class Tuned(SimpleNamespace):
    """A trial as Ray Tune tells of it."""

    def __init__(self, number, *, status="RUNNING", **result):
        super().__init__(config={"trial": number}, status=status, last_result=result)


def board_of(tmp_path, *, resume=False):
    from denoise_core.pipelines.tune import Board

    settings = ({}, {"loss": "l1"}, {"loss": "mse"}, {"loss": "l2"})
    search = SimpleNamespace(trials=settings, config=SimpleNamespace(resume=resume))
    heard = []

    def hear(event, row, _):
        heard.append((event, row.number))

    return Board(search, tmp_path, hear, Lock("mine")), heard


def test_a_search_whose_output_another_took_over_stops(tmp_path):
    from denoise_core.pipelines.tune import Messenger, _heard_by

    board, _ = board_of(tmp_path)
    with _heard_by(board):
        Messenger().on_step_begin(0, [])
        board.lock.lost_to = "thief"
        with pytest.raises(RunFailed, match="run thief took over"):
            Messenger().on_step_begin(1, [])


def test_the_board_follows_the_events_of_a_search_and_outlives_it(tmp_path):
    from denoise_core.pipelines.tune import Messenger, _heard_by

    board, heard = board_of(tmp_path)
    half, whole = [(0.5, 20.0)], [(0.5, 20.0), (1.0, 21.0)]
    tell = Messenger()
    with _heard_by(board):
        tell.on_trial_result(0, [], Tuned(0), {"curve": whole, "steps": 7})
        tell.on_trial_complete(0, [], Tuned(0, status="TERMINATED", curve=whole, steps=7))
        tell.on_trial_complete(0, [], Tuned(2, status="TERMINATED", note="The loss became nan"))
        tell.on_trial_error(0, [], Tuned(3, status="ERROR"))
        tell.on_trial_result(0, [], Tuned(1), {"curve": half, "steps": 7})
        assert board.left == [1]
        again, _ = board_of(tmp_path, resume=True)
        assert again.trials[:2] == board.trials[:2]
        # Those that failed are tried again, whatever the reason was.
        assert again.left == [1, 2, 3]
        tell.on_trial_complete(0, [], Tuned(1, status="TERMINATED", curve=half))
    tell.on_trial_complete(0, [], Tuned(1, status="ERROR"))
    assert [row.status for row in board.trials] == ["done", "stopped", "failed", "failed"]
    assert board.trials[2].note == "The loss became nan"
    assert "worker died" in board.trials[3].note
    assert board.left == []
    assert [event for event, _ in heard].count("validated") == 2
    assert [number for event, number in heard if event == "ended"] == [0, 2, 3, 1]
    assert board_of(tmp_path)[0].left == [0, 1, 2, 3]


def test_an_output_that_cannot_be_written_gets_a_sentence(tiny, data, tmp_path, monkeypatch):
    from denoise_core.pipelines import tune

    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(StorageError, match=str(blocked)):
        tune.run_search(plan(data, tmp_path, output=str(blocked)), show=print)
    board, _ = board_of(blocked)

    def fit():
        try:
            tune.Messenger().on_trial_result(0, [], Tuned(0), {})
        except Exception as error:
            raise ray_tune.TuneError("as Ray Tune says it") from error

    monkeypatch.setattr(tune, "_tuner", lambda *_: SimpleNamespace(fit=fit))
    with tune._heard_by(board), pytest.raises(StorageError, match=str(blocked)):
        tune._fit(None, board, blocked)


class Counter:
    """A trainer whose state is a number."""

    def __init__(self, number=0):
        self.number = number

    def save_state(self, folder):
        folder.mkdir(parents=True)
        (folder / "number").write_text(str(self.number))

    def load_state(self, folder):
        self.number = int((folder / "number").read_text())


BOX, SMALL, BARE = {"CPU": 16.0}, {"CPU": 4.0, "GPU": 1.0}, {"memory": 8e9}


@pytest.mark.parametrize(
    ("hosts", "gpus", "concurrent", "at_once", "each"),
    [
        ([{"CPU": 8.0}], None, "auto", 4, {"cpu": 2, "gpu": 0.0}),
        ([{"CPU": 8.0, "GPU": 2.0}], None, "auto", 2, {"cpu": 4, "gpu": 1.0}),
        ([{"CPU": 8.0, "GPU": 2.0}], 0.5, "auto", 4, {"cpu": 2, "gpu": 0.5}),
        ([{"CPU": 8.0, "GPU": 2.0}], 0.6, "auto", 2, {"cpu": 4, "gpu": 0.6}),
        ([{"CPU": 8.0, "GPU": 2.0}], 0.0, "auto", 4, {"cpu": 2, "gpu": 0.0}),
        # What stands on other machines is not beside the GPU.
        ([BOX, SMALL], None, "auto", 1, {"cpu": 4, "gpu": 1.0}),
        ([SMALL, {"CPU": 16.0, "GPU": 1.0}], None, "9", 2, {"cpu": 4, "gpu": 1.0}),
        ([BARE, {"CPU": 1.0, "GPU": 4.0}], None, "2", 2, {"cpu": 0.25, "gpu": 1.0}),
        ([BARE, {"CPU": 2.0}, {"CPU": 16.0}], None, "1", 1, {"cpu": 16, "gpu": 0.0}),
        # An autoscaler will start what is stated.
        ([BARE], 1.0, "3", 3, {"cpu": 1.0, "gpu": 1.0}),
        ([BARE], 1.0, "99", 20, {"cpu": 1.0, "gpu": 1.0}),
    ],
)
def test_a_trial_asks_for_what_one_machine_has(hosts, gpus, concurrent, at_once, each):
    assert chosen(hosts, gpus_per_trial=gpus, concurrent=concurrent) == (at_once, each)


def chosen(hosts, **settings):
    from denoise_core.pipelines.tune import choose_trials

    cluster = Counts()
    for host in hosts:
        cluster.update(host)
    config = TuneConfig(data=("in",), output="out", space="s.toml", steps=9, **settings)
    return choose_trials(config, dict(cluster), hosts, trials=20)


@pytest.mark.parametrize(
    ("hosts", "settings", "sentence"),
    [
        ([BARE], {}, "no workers yet, .* state --gpus-per-trial and --concurrent N"),
        ([BARE], {"gpus_per_trial": 1.0}, "--gpus-per-trial and --concurrent N"),
        ([BARE], {"concurrent": "2"}, "--gpus-per-trial and --concurrent N"),
        ([BARE], {"gpus_per_trial": 0.0, "concurrent": "2"}, "--gpus-per-trial and --concurrent"),
        ([BOX], {"gpus_per_trial": 0.5}, r"--gpus-per-trial 0\.5: the cluster has 0 GPU"),
        ([{"GPU": 2.0}], {"gpus_per_trial": 0.0}, "--gpus-per-trial 0: the cluster has no CPU"),
    ],
)
def test_trials_that_fit_nowhere_are_refused(hosts, settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        chosen(hosts, **settings)


def test_a_gpu_that_tensorflow_does_not_see_is_told_once(tmp_path, capsys):
    from denoise_core.devices import NO_GPU
    from denoise_core.pipelines.tune import Board, Messenger, _heard_by
    from jobs.tune import show

    search = SimpleNamespace(trials=({}, {"loss": "l1"}), config=SimpleNamespace(resume=False))
    missed = {"curve": [(0.5, 20.0)], "misses_gpu": True}
    with _heard_by(Board(search, tmp_path, show, Lock("mine"))):
        Messenger().on_trial_result(0, [], Tuned(0), {**missed, "misses_gpu": False})
        assert NO_GPU not in capsys.readouterr().out
        for number in (0, 1, 0):
            Messenger().on_trial_result(0, [], Tuned(number), missed)
    assert capsys.readouterr().out.count(NO_GPU) == 1


def test_the_last_whole_state_of_a_trial_is_taken_up(tmp_path):
    from denoise_core.pipelines.tune import _load, _save

    states = tmp_path / "states" / "3"
    assert _load(Counter(), states) == []
    curve = []
    for number in range(1, 11):
        curve.append((number / 10, 20.0 + number))
        _save(Counter(number), states, curve)
    assert [folder.name for folder in states.iterdir()] == ["10"]
    # Killed while it wrote the next one, and while it removed the one before.
    (states / ".11.tmp").mkdir()
    _save(Counter(9), tmp_path / "other", curve[:9])
    (tmp_path / "other" / "9").rename(states / "9")
    taken = Counter()
    assert _load(taken, states) == curve
    assert taken.number == 10


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (RunFailed("The loss became nan at step 3."), "The loss became nan at step 3."),
        (ValueError("in user code:\n\n  Dimensions differ.\n"), "ValueError: Dimensions differ."),
        (MemoryError(), "MemoryError: no reason given"),
    ],
)
def test_a_trial_that_cannot_be_trained_is_the_worst_and_not_the_end(monkeypatch, error, note):
    from denoise_core.pipelines import tune

    def fail(*_):
        raise error

    reports = []
    monkeypatch.setattr(tune, "_train", fail)
    monkeypatch.setattr(tune.tune, "report", reports.append)
    tune.train_trial({"trial": 0}, search=None, threads=1)
    assert reports == [{"psnr": 0.0, "validations": 8, "note": note}]


# --- the job ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    rng = np.random.default_rng(0)
    for index in range(6):
        values = np.repeat(np.repeat(rng.integers(0, 256, (6, 8, 3)), 8, 0), 8, 1)
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def config_of(source, tmp_path, text=SPACE, **settings) -> TuneConfig:
    (tmp_path / "space.toml").write_text(text)
    defaults = {
        "data": (str(source),),
        "output": str(tmp_path / "out"),
        "space": str(tmp_path / "space.toml"),
        "preset": "tiny",
        "trials": TRIALS,
        "steps": STEPS,
    }
    return TuneConfig(**{**defaults, **settings})


def plan(*args, **settings):
    from denoise_core.pipelines.tune import plan_search

    return plan_search(config_of(*args, **settings))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def test_every_trial_validates_eight_times_on_one_noise(tiny, data, tmp_path):
    text = "noise = ['gaussian:5', 'gaussian:10+clip']\nloss = ['mse']"
    search = plan(data, tmp_path, text, steps=100)
    plans = [search.plan(number) for number in range(len(search.trials))]
    assert {p.config.validate_steps for p in plans} == {13}
    assert {p.preset.validation_noise for p in plans} == {"gaussian:0-55"}
    assert {p.preset.noise for p in plans} == {"gaussian:0-55", "gaussian:5", "gaussian:10+clip"}
    assert [p.preset.loss for p in plans] == ["l1", "mse", "mse"]
    named = plan(data, tmp_path, text, noise=("gaussian:20",))
    assert {p.preset.validation_noise for p in map(named.plan, range(3))} == {"gaussian:20"}
    other = plan(data, tmp_path, text, validation_noise="gaussian:15", steps=None, hours=0.8)
    assert other.plan(1).preset.validation_noise == "gaussian:15"
    assert other.plan(1).config.validate_minutes == pytest.approx(6.0)


def test_trials_on_pairs_are_compared_on_the_held_out_pairs(tiny, data, tmp_path):
    from denoise_core.pipelines.tune import _notes

    for path in data.iterdir():
        for kind in ("real", "mean"):
            (tmp_path / "pairs" / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "pairs" / kind / path.name)
    patterns = {"noisy": "real/*.png", "clean": "mean/*.png"}
    search = plan(tmp_path / "pairs", tmp_path, **patterns)
    assert search.compared_on == "the held-out pairs"
    assert "30.00 dB on the held-out pairs after" in _notes(search, trial(1, 30.0), None)
    assert plan(data, tmp_path).compared_on == "gaussian:0-55"
    with pytest.raises(UsageError, match="trials on pairs are compared on the held-out"):
        plan(tmp_path / "pairs", tmp_path, validation_noise="camera", **patterns)


def test_all_trials_may_have_other_crops_and_batches_than_the_preset(tiny, data, tmp_path):
    search = plan(data, tmp_path, "batch = [2]", crop=8, batch=6)
    stages = [search.plan(number).preset.stages for number in range(2)]
    assert [{(s.crop, s.batch) for s in each} for each in stages] == [{(8, 6)}, {(8, 2)}]


@pytest.mark.parametrize(("epochs", "length"), [(None, " --steps 24\n"), (5, "\n")])
def test_the_command_states_a_length_where_the_preset_has_none(
    monkeypatch, data, tmp_path, capsys, epochs, length
):
    from denoise_core.pipelines.tune import _notes

    monkeypatch.setitem(PRESETS, "tiny", replace(TINY, epochs=epochs))
    search, best = plan(data, tmp_path), replace(trial(1, 30.0), steps=24)
    print_end([best], search)
    assert f"--output RUN --config {tmp_path}/out/best.toml{length}" in capsys.readouterr().out
    assert f"--config THIS_FILE{length}" in _notes(search, best, None)
    (tmp_path / "my runs").mkdir()
    print_end([best], plan(data, tmp_path / "my runs"))
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[command.index("--config") + 1] == f"{tmp_path}/my runs/out/best.toml"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"text": "loss = ['l1', 'l3']"}, r'space.toml: {"loss": "l3"} cannot be trained: --loss'),
        ({"text": "noise = ['gausian:5']"}, "Did you mean 'gaussian'"),
        ({"text": "widths = [[4, 8, 16]]"}, "put them into tables of `arguments`"),
        ({"space": "no-such.toml"}, "--space no-such.toml: cannot be read"),
        ({"preset": "tinny"}, "Unknown preset 'tinny'"),
        ({"validation_noise": "gausian:5"}, "Did you mean 'gaussian'"),
        ({"resume": True}, "holds no search; leave --resume out"),
    ],
)
def test_wrong_usage_is_told_before_ray_starts(tiny, data, tmp_path, settings, sentence):
    settings = dict(settings)
    with pytest.raises(UsageError, match=sentence):
        plan(data, tmp_path, settings.pop("text", SPACE), **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"trials": 0}, "--trials"),
        ({"output": "s3://bucket/x"}, "expected a local folder"),
        ({"concurrent": "0"}, "--concurrent '0'"),
        ({"gpus_per_trial": -1.0}, "--gpus-per-trial"),
        ({"gpus_per_trial": 2.0}, "--gpus-per-trial 2.0: expected 0 to 1"),
        ({"stop": "median"}, "--stop 'median': expected one of halving, none"),
        ({"epochs": 1.0}, "one of --steps N"),
        ({"data": ()}, "No DATA given"),
    ],
)
def test_settings_are_checked_when_they_are_made(data, tmp_path, settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        config_of(data, tmp_path, **settings)


def test_ctrl_c_is_left_to_the_job(tmp_path, monkeypatch):
    from ray.tune.tune import _setup_signal_catching

    from denoise_core.pipelines import tune

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(tune, "_tuner", lambda *_: SimpleNamespace(fit=_setup_signal_catching))
    tune._fit(None, None, tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler


def table(output: Path) -> dict[str, dict[str, str]]:
    path = output / "trials.csv"
    if not path.exists():
        return {}
    return {row["trial"]: row for row in csv.DictReader(path.open(newline=""))}


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory):
    """A search killed in its second trial and resumed: table before, output, code, out, err."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "space.toml").write_text(SPACE + "batch = [3, 5]\n")
    output = folder / "out"
    arguments = [data, "--output", output, "--preset", "tiny", "--space", folder / "space.toml"]
    arguments += ["--trials", TRIALS, "--steps", STEPS, "--precision", "float32", "--seed", 2]
    arguments += ["--concurrent", 1, "--stop", "none"]
    ARGUMENTS[str(output)] = arguments
    process = start_tiny("tune", *arguments)
    deadline = time.monotonic() + 400
    while float(table(output).get("1", {}).get("done", 0)) < 1 / 8:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_all(process)
    before = table(output)
    process = start_tiny("tune", *arguments, "--resume")
    out, err = process.communicate(timeout=500)
    return before, output, process.returncode, out, err


pytestmark = pytest.mark.timeout(1000)


@pytest.mark.ray
def test_a_killed_search_goes_on(resumed):
    before, output, code, out, err = resumed
    assert code == 0, err
    assert err == ""
    assert before["0"]["status"] == "done"
    assert before["1"]["status"] == "running"
    after = table(output)
    assert [row["status"] for row in after.values()] == ["done"] * TRIALS
    assert [row["steps"] for row in after.values()] == [str(STEPS)] * TRIALS
    # What was done before is not done again.
    assert after["0"] == {**before["0"], "rank": after["0"]["rank"]}
    assert "trial  0 " not in out
    assert "trial  1   12%" not in out
    assert "trial  1   88%" in out
    assert "trial  2   12%" in out


@pytest.mark.ray
def test_a_search_leaves_a_table_a_plot_and_the_best_settings(resumed):
    _, output, _, out, _ = resumed
    best = tomllib.loads((output / "best.toml").read_text())
    assert (best["seed"], best["precision"]) == (2, "float32")
    rows = sorted(table(output).values(), key=lambda row: int(row["rank"]))
    assert best["preset"] == "tiny"
    assert rows[0]["status"] == "done"
    assert rows[0]["loss"] == best.get("loss", "")
    assert Image.open(output / "tune.png").format == "PNG"
    # Of the lock a folder stays.
    left = {path.name for path in output.iterdir()} - {".denoise"}
    assert left == {"best.toml", "rows.json", "search.json", "trials.csv", "tune.png"}
    assert "Trials, the best first" in out
    assert f"Best: trial {rows[0]['trial']}, " in out
    assert f"--config {output}/best.toml" in out


@pytest.mark.ray
def test_another_search_in_one_place_is_refused(resumed, data, tiny, tmp_path):
    _, output, *_ = resumed
    settings = {"output": str(output), "seed": 2, "precision": "float32", "stop": "none"}
    text = SPACE + "batch = [3, 5]\n"
    with pytest.raises(UsageError, match="holds a search: go on with --resume"):
        plan(data, tmp_path, text, **settings)
    assert plan(data, tmp_path, text, resume=True, **settings).config.resume
    with pytest.raises(UsageError, match="--resume: --steps is not what the search"):
        plan(data, tmp_path, text, resume=True, **{**settings, "steps": 9})
    with pytest.raises(UsageError, match="--resume: --space is not what the search"):
        plan(data, tmp_path, SPACE, resume=True, **settings)


def test_a_second_search_in_one_place_is_refused_while_the_first_runs(tiny, data, tmp_path):
    from denoise_core.pipelines.tune import run_search

    search = plan(data, tmp_path)
    with (
        output_lock(LocalStorage(), str(tmp_path / "out"), run_id="first"),
        pytest.raises(OutputLocked, match=r"run first on .* is at work here"),
    ):
        run_search(search, show=print)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".denoise"]


@pytest.mark.ray
def test_a_finished_search_is_told_again(resumed):
    """The last test of the search: it runs the job once more."""
    _, output, _, out, _ = resumed
    before = (output / "trials.csv").read_bytes()
    process = start_tiny("tune", *ARGUMENTS[str(output)], "--resume")
    again, err = process.communicate(timeout=500)
    assert (process.returncode, err) == (0, "")
    assert again[again.index("Trials,") :] == out[out.index("Trials,") :]
    assert (output / "trials.csv").read_bytes() == before
