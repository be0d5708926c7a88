"""Settings are checked when they are made, and every message says what was expected."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from denoise_core.config import (
    PIXEL_SETTINGS,
    DenoiseConfig,
    TrainConfig,
    as_dict,
    check_keys,
    nearest,
    parse_actors,
    parse_auto_int,
    parse_data_range,
    pixel_hash,
)
from denoise_core.errors import UsageError


def denoise(**settings) -> DenoiseConfig:
    return DenoiseConfig(**{"inputs": ("in",), "output": "out", **settings})


def train(**settings) -> TrainConfig:
    return TrainConfig(**{"data": ("in",), "output": "out", "steps": 10, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"inputs": ()},
        {"output": ""},
        {"patch": "31"},
        {"patch": "huge"},
        {"halo": "-1"},
        {"halo": "exactly"},
        {"batch_size": "0"},
        {"strength": -0.1},
        {"strength": 1.1},
        {"strength": math.nan},
        {"precision": "float16"},
        {"data_range": "0"},
        {"format": "gif"},
        {"bit_depth": "12"},
        {"format": "jpeg", "bit_depth": "16"},
        {"format": "png", "bit_depth": "32f"},
        {"format": "jpeg", "compression": "zstd"},
        {"format": "tiff", "compression": "9"},
        {"format": "png", "compression": "none"},
        {"existing": "keep"},
        {"max_error_rate": 1.5},
        {"max_attempts": 0},
        {"timeout_per_image": 0.0},
        {"max_pixels": 0},
        {"region": 1000},
        {"region": 0},
        {"limit": 0},
        {"actors": "0"},
        {"gpus_per_actor": "half"},
        {"gpus_per_actor": "-1"},
        {"copy_below": "low"},
        {"progress": "loud"},
    ],
    ids=str,
)
def test_what_denoise_cannot_use_is_refused_by_its_flag(settings):
    flags = ["INPUT" if name == "inputs" else "--" + name.replace("_", "-") for name in settings]
    with pytest.raises(UsageError, match=".*".join(flags)):
        denoise(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"data": ()},
        {"output": ""},
        {"steps": 0},
        {"hours": 0.0, "steps": None},
        {"hours": math.nan, "steps": None},
        {"hours": math.inf, "steps": None},
        {"grey": 1.5},
        {"grey": 0.5, "noisy": "n/*", "clean": "c/*"},
        {"grey": 0.5, "self_supervised": "noise2void"},
        {"loss": "l1", "self_supervised": "noise2void"},
        {"augment": "flip, affine", "self_supervised": "neighbor2neighbor"},
        {"validate_minutes": 5.0, "validate_steps": 5},
        {"validation": 0.0},
        {"validation": 1.0},
        {"workers": 0},
        {"batch_scale": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
        {"seed": -1},
        {"seed": 2**32},
        {"validate_minutes": 0.0},
        {"validate_steps": 0},
        {"checkpoint_minutes": -1.0},
        {"gpus_per_worker": -1.0},
        {"gpus_per_worker": 2.0},
        {"threads": 0},
        {"max_failures": -1},
        {"precision": "float16"},
    ],
    ids=str,
)
def test_what_train_cannot_use_is_refused_by_its_flag(settings):
    name = next(iter(settings))
    flag = "DATA" if name == "data" else "--" + name.replace("_", "-")
    with pytest.raises(UsageError, match=flag):
        train(**settings)


@pytest.mark.parametrize("length", [{"steps": 10, "hours": 1.0}, {"steps": 10, "epochs": 1.0}])
def test_the_length_of_training_is_given_once(length):
    with pytest.raises(UsageError, match="one of --steps N, --epochs N and --hours H"):
        TrainConfig(data=("in",), output="out", **length)


def test_several_workers_count_steps_and_not_hours():
    train(workers=2)
    with pytest.raises(UsageError, match="--workers above 1"):
        train(workers=2, steps=None, hours=1.0)
    with pytest.raises(UsageError, match="--workers above 1 validate by steps"):
        train(workers=2, validate_minutes=5.0)


def test_what_agrees_with_noisy_images_alone_is_taken():
    train(self_supervised="noise2void", loss="mse", augment="flip,scale", grey=0.0)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        denoise().strength = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("settings", [DenoiseConfig, TrainConfig])
def test_every_setting_has_a_help_text(settings):
    for each in dataclasses.fields(settings):
        assert each.metadata["help"].endswith("."), each.name
        assert (
            each.default is dataclasses.MISSING
            or not each.metadata["choices"]
            or each.default is None
            or each.default in each.metadata["choices"]
        )


def test_a_choice_gets_the_nearest_one():
    with pytest.raises(UsageError, match=r"--precision 'bfloat': .*float32.* mean 'bfloat16'"):
        denoise(precision="bfloat")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("auto", None), ("0:4095", (0.0, 4095.0)), ("-1:1e3", (-1.0, 1000.0)), ("0:0.5", (0.0, 0.5))],
)
def test_data_ranges(text, expected):
    assert parse_data_range(text) == expected


@pytest.mark.parametrize(
    "text", ["", ":", "1", "1:", ":1", "2:1", "1:1", "0:inf", "nan:1", "a:b", "0:1:2"]
)
def test_data_ranges_that_are_none(text):
    with pytest.raises(UsageError, match="for example 0:4095"):
        parse_data_range(text)


@given(low=st.floats(-1e30, 1e30), high=st.floats(-1e30, 1e30))
def test_any_two_finite_numbers_in_order_are_a_range(low, high):
    if low < high:
        assert parse_data_range(f"{low!r}:{high!r}") == (low, high)
    else:
        with pytest.raises(UsageError):
            parse_data_range(f"{low!r}:{high!r}")


@pytest.mark.parametrize(
    ("text", "expected"), [("auto", None), ("1", (1, 1)), ("2:8", (2, 8)), ("3:3", (3, 3))]
)
def test_actors(text, expected):
    assert parse_actors(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0:4", "4:2", "two", "1:", ":2", "-1", "1.5"])
def test_actors_that_are_none(text):
    with pytest.raises(UsageError, match="for example 1:8"):
        parse_actors(text)


def test_numbers_or_words():
    assert parse_auto_int("exact", name="halo", words=("auto", "exact"), low=0) == "exact"
    assert parse_auto_int("16", name="halo", words=("auto",), low=0) == 16
    with pytest.raises(UsageError, match="--halo '-1': expected auto or a whole number from 0"):
        parse_auto_int("-1", name="halo", words=("auto",), low=0)


def test_unknown_keys_get_the_nearest_and_dashes_are_underscores():
    check_keys({"batch-size": 4, "model": "x"}, DenoiseConfig, source="a.toml")
    with pytest.raises(
        UsageError, match=r"a\.toml: unknown setting 'modle'\. Did you mean 'model'"
    ):
        check_keys({"modle": "x"}, DenoiseConfig, source="a.toml")


def test_nearest():
    assert nearest("unet-S", ["unet-s", "unet-m"]) == " Did you mean 'unet-s'?"
    assert nearest("qqqq", ["unet-s"]) == ""


def test_the_pixel_hash_changes_with_what_changes_pixels_and_with_nothing_else():
    other = {
        "patch": "512",
        "halo": "exact",
        "strength": 0.5,
        "precision": "float32",
        "data_range": "0:4095",
        "format": "png",
        "bit_depth": "8",
        "compression": "zstd",
        "copy_below": "2",
        "model_range": "0:255",
    }
    assert set(other) == set(PIXEL_SETTINGS)
    base = pixel_hash(denoise(), model_hash="a")
    assert pixel_hash(denoise(), model_hash="b") != base
    hashes = {pixel_hash(denoise(**{name: value}), model_hash="a") for name, value in other.items()}
    assert len(hashes | {base}) == len(other) + 1
    # Batches and regions never show in a pixel: see test_denoiser.py.
    same = {"batch_size": "4", "region": 512, "actors": "2", "output": "else", "limit": 3}
    assert {pixel_hash(denoise(**{n: v}), model_hash="a") for n, v in same.items()} == {base}


def test_settings_are_plain_json():
    table = as_dict(denoise(include=("*.png",)))
    assert json.loads(json.dumps(table)) == table
    assert table["include"] == ["*.png"]
    assert set(table) == {each.name for each in dataclasses.fields(DenoiseConfig)}
