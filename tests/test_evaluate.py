"""Evaluation without Ray: settings, sources, protocol, statistics, stages in a plain loop, page."""

from __future__ import annotations

import gzip
import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browsing import browser_test, resize, visit
from click.testing import CliRunner
from helpers import as_dtype, files_below, make_checkpoint, picture

from denoise_core.checkpoints import load_checkpoint
from denoise_core.config import EvaluateConfig, TrainConfig
from denoise_core.denoiser import Geometry
from denoise_core.devices import NO_GPU
from denoise_core.errors import ImageError, NonFiniteValues, RunFailed, UnsupportedImage, UsageError
from denoise_core.evaluation import pictures, protocol, statistics
from denoise_core.evaluation.examples import CROP, Ends, Example, cut_example
from denoise_core.evaluation.methods import (
    Coder,
    ModelSource,
    choose_filters,
    encoder_of,
    fit,
    label_models,
)
from denoise_core.evaluation.page import data_uri
from denoise_core.evaluation.publish import Collected, gallery_pairs
from denoise_core.evaluation.sources import Shot, find_shots, read_shot
from denoise_core.lock import Lock
from denoise_core.metrics import psnr
from denoise_core.models.classical import CLASSICAL
from denoise_core.pipelines.evaluate import Watcher, _publish, collect, run_evaluation
from denoise_core.pipelines.measuring import Notes, Plan, RunFilters, RunModels
from denoise_core.storage import StorageOptions
from jobs import evaluate
from jobs._cli import repeat_flags, settings_command

OPTIONS = StorageOptions()


def config(*data: Any, **settings: Any) -> EvaluateConfig:
    given = {"output": "out", **settings}
    return EvaluateConfig(data=tuple(map(str, data)) or ("in",), **given)


def write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(imagecodecs.png_encode(np.squeeze(pixels)))


def clean_picture(height: int, width: int, channels: int = 3, *, seed: int = 0) -> np.ndarray:
    return as_dtype(picture(height, width, channels, seed=seed, sigma=0), "uint8")


def write_idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    data = head + array.astype("u1").tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


# --- The command line -------------------------------------------------------------------------


def parse(settings: type, *arguments: Any) -> tuple[int, str, list[Any]]:
    seen: list[Any] = []
    command = settings_command(
        settings, lambda each: seen.append(each) or 0, name="x", help="Help."
    )
    done = CliRunner().invoke(command, [str(each) for each in arguments])
    assert "Traceback" not in done.output
    return done.exit_code, done.output, seen


def test_marked_flags_take_several_words_and_may_be_repeated():
    words = "in more --model a b --noise gaussian:15 gaussian:0-55 --output o --model c"
    code, text, (made,) = parse(EvaluateConfig, *words.split())
    assert code == 0, text
    assert made.data == ("in", "more")
    assert made.model == ("a", "b", "c")
    assert made.noise == ("gaussian:15", "gaussian:0-55")
    assert made.output == "o"


def test_other_flags_take_one_word_as_before():
    words = ["--include", "*.png", "in", "--x", "-", "--", "--include", "a"]
    assert repeat_flags(words, frozenset({"--model"})) == words
    spread = repeat_flags(["--model", "a", "b", "--", "c", "d"], frozenset({"--model"}))
    assert spread == ["--model", "a", "--model", "b", "--", "c", "d"]
    code, text, (made,) = parse(EvaluateConfig, "--output", "o", "in")
    assert (code, made.data, made.model) == (0, ("in",), ("unet-s",)), text


def test_lists_in_a_file_give_way_to_flags(tmp_path: Path):
    file = tmp_path / "e.toml"
    file.write_text('data = ["in"]\noutput = "o"\nmodel = ["a", "b"]\nnoise = "gaussian:5"\n')
    _, _, (made,) = parse(EvaluateConfig, "--config", file)
    assert (made.model, made.noise) == (("a", "b"), ("gaussian:5",))
    _, _, (made,) = parse(EvaluateConfig, "--config", file, "--model", "c", "d")
    assert made.model == ("c", "d")


def test_the_example_configuration_is_valid():
    file = Path(__file__).parents[1] / "jobs" / "configs" / "evaluate.toml"
    code, text, (made,) = parse(EvaluateConfig, "in", "--output", "o", "--config", file)
    assert code == 0, text
    assert len(made.noise) == 3


def test_a_flag_that_swallows_data_is_explained():
    code, text, seen = parse(EvaluateConfig, "--output", "o", "--model", "unet-s", "in")
    assert (code, seen) == (2, [])
    assert "before the flags" in text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": ()}, "--model"),
        ({"model_range": "1:0"}, "--model-range"),
        ({"limit": 0}, "--limit"),
        ({"limit_slow": 0}, "--limit-slow"),
        ({"protocol": "b"}, "--protocol"),
        ({"max_error_rate": 2.0}, "--max-error-rate"),
        ({"actors": "0"}, "--actors"),
        ({"gpus_per_actor": "half"}, "--gpus-per-actor"),
        ({"noisy": "*_a.png"}, "--noisy and --clean"),
        ({"noisy": "a.png", "clean": "*.png"}, "one '\\*'"),
        ({"noisy": "*a", "clean": "*b", "reference": "c"}, "--reference"),
        ({"reference": "c", "noise": ("gaussian:5",)}, "leave --noise out"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_by_its_flag(settings: dict[str, Any], said: str):
    with pytest.raises(UsageError, match=said):
        config(**settings)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "unet-z"], "--model 'unet-z'"),
        (["--noise", "gausian:5"], "Did you mean 'gaussian'"),
        (["--baselines", "identity,nml"], "Did you mean 'nlm'"),
        (["--noisy", "*_a.png", "--clean", "*_b.png"], "no image in DATA has such a path"),
    ],
    ids=str,
)
def test_bad_names_end_before_ray_with_code_2(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(evaluate, "start_ray", lambda: pytest.fail("Ray was started"))
    write_png(tmp_path / "in" / "a.png", clean_picture(16, 16))
    where = [str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(evaluate.main, [*where, *words])
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert not (tmp_path / "out").exists()


# --- Sources ----------------------------------------------------------------------------------


def test_images_are_listed_by_name_and_others_left_out(tmp_path: Path):
    for name in ("b.png", "a/c.png", "a.png"):
        write_png(tmp_path / name, clean_picture(16, 16))
    (tmp_path / "notes.txt").write_text("x")
    write_png(tmp_path / "out" / "pictures" / "grid.png", clean_picture(16, 16))
    shots = find_shots(config(tmp_path, output=str(tmp_path / "out")), OPTIONS)
    assert [shot.name for shot in shots] == ["a.png", "a/c.png", "b.png"]
    assert all(shot.slow and shot.shown and shot.coded for shot in shots)


def test_limits_spread_evenly(tmp_path: Path):
    for index in range(20):
        write_png(tmp_path / f"{index:02}.png", clean_picture(16, 16))
    shots = find_shots(config(tmp_path, limit=10, limit_slow=5), OPTIONS, shown=2, coded=3)
    assert [shot.name for shot in shots] == [f"{index:02}.png" for index in range(0, 20, 2)]
    assert [i for i, shot in enumerate(shots) if shot.slow] == [0, 2, 4, 6, 8]
    assert [i for i, shot in enumerate(shots) if shot.shown] == [0, 4]
    assert [i for i, shot in enumerate(shots) if shot.coded] == [0, 3, 6]


def test_equal_paths_below_two_folders_stay_apart(tmp_path: Path):
    for folder in ("x", "y"):
        write_png(tmp_path / folder / "a.png", clean_picture(16, 16))
    shots = find_shots(config(tmp_path / "x", tmp_path / "y"), OPTIONS)
    assert [shot.name for shot in shots] == [str(tmp_path / f / "a.png") for f in "xy"]


def test_an_image_that_several_data_name_is_taken_once(tmp_path: Path):
    write_png(tmp_path / "x" / "a.png", clean_picture(16, 16))
    shots = find_shots(config(tmp_path, tmp_path / "x", tmp_path / "x" / "a.png"), OPTIONS)
    assert [shot.uri for shot in shots] == [str(tmp_path / "x" / "a.png")]


@pytest.mark.parametrize("ending", ["ubyte", "ubyte.gz"])
def test_idx_files_with_their_labels(tmp_path: Path, ending: str):
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 4))
    write_idx(tmp_path / f"t-images-idx3-{ending}", images)
    write_idx(tmp_path / f"t-labels-idx1-{ending}", np.arange(7))
    shots = find_shots(config(tmp_path), OPTIONS)
    assert [shot.name for shot in shots] == [f"t-images-idx3-{ending}#{i}" for i in range(7)]
    third = read_shot(shots[3], OPTIONS)
    np.testing.assert_array_equal(third.clean[..., 0], images[3])
    assert (third.label, third.clean.dtype, third.noisy) == (3, np.uint8, None)


def test_idx_without_labels_and_what_is_none(tmp_path: Path):
    write_idx(tmp_path / "t-images-idx3-ubyte", np.zeros((2, 4, 4)))
    (shot, _) = find_shots(config(tmp_path), OPTIONS)
    assert read_shot(shot, OPTIONS).label is None
    (tmp_path / "t-images-idx3-ubyte").write_bytes(b"no")
    with pytest.raises(UsageError, match="not an IDX file of images"):
        find_shots(config(tmp_path), OPTIONS)
    damaged = gzip.compress(b"")[:10] + b"\xff" * 40
    (tmp_path / "t-images-idx3-ubyte").write_bytes(damaged)
    with pytest.raises(UsageError, match="cannot be read as an IDX file"):
        find_shots(config(tmp_path), OPTIONS)


def test_an_image_of_an_idx_file_that_is_not_finite_is_an_error_of_its_own(tmp_path: Path):
    values = np.zeros((2, 4, 4), ">f4")
    values[1, 2, 2] = np.nan
    file = tmp_path / "t-images-idx3-float"
    file.write_bytes(struct.pack(">4I", 0x0D03, *values.shape) + values.tobytes())
    first, second = find_shots(config(tmp_path), OPTIONS)
    assert read_shot(first, OPTIONS).clean.dtype == np.float32
    with pytest.raises(NonFiniteValues, match="t-images-idx3-float#1: 1 of 16 values"):
        read_shot(second, OPTIONS)


def test_labels_that_are_not_one_for_each_image_are_left_out(tmp_path: Path):
    write_idx(tmp_path / "t-images-idx3-ubyte", np.zeros((4, 5, 5)))
    write_idx(tmp_path / "t-labels-idx1-ubyte", np.arange(2))
    shots = find_shots(config(tmp_path), OPTIONS)
    assert [read_shot(shot, OPTIONS).label for shot in shots] == [None] * 4


def write_pairs(root: Path, names: Sequence[str]) -> None:
    for seed, name in enumerate(names):
        write_png(root / name, clean_picture(20, 24, seed=seed))


def test_pairs_by_pattern_in_one_folder(tmp_path: Path):
    write_pairs(tmp_path, ["a_real.png", "a_mean.png", "sub/b_real.png", "sub/b_mean.png"])
    shots = find_shots(config(tmp_path, noisy="*_real.png", clean="*_mean.png"), OPTIONS)
    assert [shot.name for shot in shots] == ["a_real.png", "sub/b_real.png"]
    pair = read_shot(shots[0], OPTIONS)
    np.testing.assert_array_equal(pair.clean, clean_picture(20, 24, seed=1))
    np.testing.assert_allclose(pair.noisy * 255, clean_picture(20, 24, seed=0), atol=1e-3)


def test_a_file_that_fits_both_patterns_belongs_to_the_one_that_states_more(tmp_path: Path):
    write_pairs(tmp_path, ["a.png", "a_clean.png", "b.png", "b_clean.png"])
    shots = find_shots(config(tmp_path, noisy="*.png", clean="*_clean.png"), OPTIONS)
    assert [shot.name for shot in shots] == ["a.png", "b.png"]
    assert [shot.uri for shot in shots] == [str(tmp_path / f"{name}_clean.png") for name in "ab"]
    shots = find_shots(config(tmp_path, noisy="*_clean.png", clean="*.png"), OPTIONS)
    assert [shot.name for shot in shots] == ["a_clean.png", "b_clean.png"]
    with pytest.raises(UsageError, match=r"a\.png fits both --noisy '\*\.png' and --clean"):
        find_shots(config(tmp_path, noisy="*.png", clean="*.png"), OPTIONS)


def test_two_noisy_images_of_one_reference_are_refused(tmp_path: Path):
    for folder in ("clean", "n15", "n25"):
        write_pairs(tmp_path, [f"{folder}/a.png", f"{folder}/b.png"])
    made = config(tmp_path / "n15", tmp_path / "n25", reference=str(tmp_path / "clean"))
    with pytest.raises(UsageError, match=r"n15/a\.png and .*n25/a\.png both belong to"):
        find_shots(made, OPTIONS)


def test_pairs_by_reference_folder(tmp_path: Path):
    write_pairs(tmp_path, ["noisy/a.png", "noisy/s/b.png", "clean/a.png", "clean/s/b.png"])
    write_pairs(tmp_path, ["clean/unused.png"])
    made = config(tmp_path / "noisy", reference=str(tmp_path / "clean"))
    shots = find_shots(made, OPTIONS)
    assert [(s.name, s.uri) for s in shots] == [
        (name, str(tmp_path / "clean" / name)) for name in ("a.png", "s/b.png")
    ]


def test_noise_does_not_change_the_units_of_a_float_pair(tmp_path: Path):
    clean = np.linspace(0, 1, 40 * 40, dtype=np.float32).reshape(40, 40)
    noisy = clean + np.random.default_rng(0).normal(0, 0.1, clean.shape).astype(np.float32)
    for name, values in (("clean/a", clean), ("noisy/a", noisy)):
        (tmp_path / name).parent.mkdir()
        np.save(tmp_path / f"{name}.npy", values)
    made = config(tmp_path / "noisy", reference=str(tmp_path / "clean"))
    pair = read_shot(find_shots(made, OPTIONS)[0], OPTIONS)
    np.testing.assert_array_equal(pair.noisy[..., 0], noisy)


def test_files_without_a_partner_are_named(tmp_path: Path):
    write_pairs(tmp_path, ["a_real.png", "a_mean.png", "b_real.png", "c_mean.png"])
    with pytest.raises(UsageError, match=r"2 file.*b_real\.png \(no clean.*c_mean\.png \(no noisy"):
        find_shots(config(tmp_path, noisy="*_real.png", clean="*_mean.png"), OPTIONS)
    (tmp_path / "ref").mkdir()
    write_pairs(tmp_path / "ref", ["a_real.png"])
    with pytest.raises(UsageError, match=r"3 file.*a_mean\.png \(no clean one\)"):
        find_shots(
            config(tmp_path / "*.png", reference=str(tmp_path / "ref")),
            OPTIONS,
        )


def test_a_pair_of_other_sizes_is_an_error_of_its_own(tmp_path: Path):
    write_png(tmp_path / "n.png", clean_picture(8, 9))
    write_png(tmp_path / "c.png", clean_picture(8, 8))
    shot = Shot("n.png", str(tmp_path / "c.png"), noisy_uri=str(tmp_path / "n.png"))
    with pytest.raises(UnsupportedImage, match=r"9x8 with 3 channel.*8x8 with 3"):
        read_shot(shot, OPTIONS)


# --- Protocol ---------------------------------------------------------------------------------


def test_gaussian_is_protocol_a_to_the_bit():
    clean = clean_picture(40, 50)
    np.random.seed(0)
    noise = np.random.normal(0, 25 / 255, clean.shape)
    expected = (clean / 255 + noise).astype(np.float32)
    np.testing.assert_array_equal(protocol.noisy_of(clean, 25), expected)
    unit = protocol.Scale(0, 255, "uint8").unit(clean)
    for name in ("a", "b"):
        made = protocol.add_noise(unit, "gaussian:25", name=name, quantised=False)
        np.testing.assert_array_equal(made, expected)
    assert made.min() < 0, "not clipped"


def test_quantised_noise_is_that_of_an_8_bit_file():
    unit = clean_picture(40, 50) / 255
    free = protocol.add_noise(unit, "gaussian:50", name="a", quantised=False)
    made = protocol.add_noise(unit, "gaussian:50", name="a", quantised=True)
    np.testing.assert_array_equal(np.rint(made * 255), np.rint(np.clip(free, 0, 1) * 255))
    np.testing.assert_allclose(made * 255, np.rint(made * 255), atol=1e-4)


def test_other_noise_is_seeded_by_the_image_and_the_noise():
    unit = np.full((64, 64, 1), 0.5)

    def made(spec: str, name: str) -> np.ndarray:
        return protocol.add_noise(unit, spec, name=name, quantised=False)

    first = made("salt-pepper:0.1", "a.png")
    np.testing.assert_array_equal(first, made("salt-pepper:0.1", "a.png"))
    assert (first != made("salt-pepper:0.1", "b.png")).any()
    assert np.mean(first != 0.5) == pytest.approx(0.1, abs=0.02)
    assert (made("gaussian:20-30", "a.png") != made("gaussian:20-30", "b.png")).any()


def test_filters_are_told_the_sigma_that_the_noise_states_or_an_estimate():
    unit = clean_picture(128, 128) / 255
    noisy = protocol.add_noise(unit, "gaussian:20-20", name="a", quantised=False)
    assert protocol.sigma_for(noisy, "gaussian:25") == (25.0, "given")
    sigma, source = protocol.sigma_for(noisy, "gaussian:20-20")
    assert (sigma, source) == (pytest.approx(20, rel=0.1), "estimated")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_measures_of_known_errors(dtype: str):
    unit = picture(48, 40, 3, sigma=0) * 0.5
    scale = protocol.Scale(0, 255, "uint8")
    if dtype == "uint16":
        scale = protocol.Scale(0, 65535, "uint16")
    if dtype == "float32":
        scale = protocol.Scale(0, 1, "float32")
    clean = scale.back(unit)
    same = protocol.measure(scale.unit(clean), clean, scale)
    assert (same.mse, same.psnr, same.ssim) == (0, math.inf, pytest.approx(1))
    shifted = protocol.measure(scale.unit(clean) + 10 / 255, clean, scale)
    assert shifted.psnr == pytest.approx(20 * math.log10(25.5), abs=1e-3)
    assert shifted.histogram.argmax() - protocol.BINS // 2 == 10
    assert shifted.histogram.sum() == clean.size
    assert shifted.output.dtype == dtype


def test_outputs_are_clipped_and_rounded_before_measuring():
    clean = np.full((16, 16, 1), 255, np.uint8)
    over = protocol.measure(np.full(clean.shape, 1.7), clean, protocol.Scale(0, 255, "uint8"))
    assert over.mse == 0


# --- Statistics -------------------------------------------------------------------------------


def test_interval_is_students():
    found = statistics.interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    # t(4, 0.975) = 2.776, s = 1.5811, n = 5.
    assert (found.mean, found.count) == (3.0, 5)
    assert found.high - found.mean == pytest.approx(2.776 * 1.5811 / 5**0.5, rel=1e-3)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_interval_does_not_depend_on_the_order():
    values = np.random.default_rng(0).normal(30, 3, 500)
    assert statistics.interval(values) == statistics.interval(values[::-1].copy())


def test_interval_of_few_and_of_infinite_values():
    assert statistics.interval(np.array([np.nan])).mean is None
    one = statistics.interval(np.array([7.0, np.inf, np.nan]))
    assert (one.mean, one.low, one.high, one.count) == (7.0, None, None, 1)


def test_the_interval_covers_the_mean_in_95_of_100():
    rng = np.random.default_rng(0)
    found = [statistics.interval(rng.normal(30, 3, 6)) for _ in range(2000)]
    covered = np.mean([each.low <= 30 <= each.high for each in found])
    assert covered == pytest.approx(0.95, abs=0.015)


def row(image: str, method: str, psnr_: float, *, noise: str = "gaussian:25") -> dict[str, Any]:
    return {"image": image, "method": method, "noise": noise, "status": "ok", "psnr": psnr_}


def table(rows: list[dict[str, Any]]) -> pa.Table:
    collected = Collected()
    collected.add([{"rows": rows}])
    return collected.table()


def test_gains_are_paired_and_a_loss_is_a_warning():
    rows = [row("a", "identity", 20), row("b", "identity", 30)]
    rows += [row("a", "m", 19), row("b", "m", 29), row("b", "slow", 33)]
    data = statistics.figures(
        table(rows), methods=["identity", "m", "slow"], noises=["gaussian:25"]
    )
    entries = {each["method"]: each for each in statistics.summarise(data, models=["m"])}
    assert entries["m"]["gain"]["mean"] == -1
    assert (entries["m"]["loses"], entries["identity"]["loses"]) == (2, 0)
    assert entries["slow"]["images"] == 1
    assert entries["slow"]["gain"]["mean"] == 3
    assert entries["slow"]["first_model_psnr"] == 29
    (warning,) = statistics.find_losses(list(entries.values()))
    assert "m loses to the noisy input itself at gaussian:25: -1.00 dB" in warning
    assert "2 of 2 images" in warning


@pytest.mark.filterwarnings("error")
def test_a_model_that_changes_images_without_noise_is_a_warning():
    rows = [row(name, "identity", math.inf) for name in "abc"]
    rows += [row("a", "m", 40), row("b", "m", 41), row("c", "m", math.inf)]
    data = statistics.figures(table(rows), methods=["identity", "m"], noises=["gaussian:25"])
    entries = statistics.summarise(data, models=["m"])
    assert (entries[1]["gain"]["mean"], entries[1]["spoiled"]) == (None, 2)
    (warning,) = statistics.find_losses(entries)
    assert "m changes images that have no noise, 2 of 3 at gaussian:25" in warning


def test_two_ends_share_no_image():
    values = np.array([3.0, np.nan, 1.0, 2.0])
    assert statistics.two_ends(values, 10) == ([2, 3], [0])
    low, high = statistics.two_ends(np.arange(100.0), 10)
    assert (low[0], low[-1], high[0], high[-1]) == (0, 9, 99, 90)


def test_principal_components_of_a_known_plane():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(200, 2)) * (10, 1)
    axes = np.linalg.qr(rng.normal(size=(16, 16)))[0][:2]
    points, shares = statistics.principal_components(flat @ axes + 5)
    assert shares.sum() == pytest.approx(1)
    assert shares[0] > 0.95
    centred = flat - flat.mean(axis=0)
    distance = np.linalg.norm(centred, axis=1)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), distance, rtol=1e-6)


# --- Methods and examples ---------------------------------------------------------------------


def test_filters_are_chosen_by_name_with_commas_or_without():
    assert choose_filters(["median,wavelet", "median"])[0] == ["identity", "median", "wavelet"]
    assert choose_filters(["none"]) == (["identity"], [])


def test_absent_packages_leave_a_filter_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_filters(["median,bm3d"]) == (["identity", "median"], ["bm3d"])


def test_a_range_is_of_keras_files_alone(tmp_path: Path):
    residual(12).save(tmp_path / "mine.keras")
    paths = ["unet-s", str(tmp_path / "mine.keras")]
    assert [each.model_range for each in label_models(paths, model_range="0:255")] == ["0:255"] * 2
    with pytest.raises(UsageError, match=r"^--model-range 0:255: no --model is a Keras file"):
        label_models(["unet-s"], model_range="0:255")


def test_pictures_of_models_whose_folders_have_one_name_have_names_of_their_own():
    names = {
        pictures.file_name("worst", pictures._stem(f"/runs/{run}/best"), "gaussian:25")
        for run in "ab"
    }
    assert names == {"worst-runs-a-best-gaussian-25", "worst-runs-b-best-gaussian-25"}
    long = {
        pictures.file_name("worst", pictures._stem(f"/{'x' * 200}/{run}/best"), "gaussian:25")
        for run in "ab"
    }
    assert len(long) == 2
    assert [pictures._short(f"/runs/{run}/best") for run in "ab"] == ["a/best", "b/best"]
    assert pictures._short("sub/coffee.png") == "coffee.png"


def test_methods_shown_together_have_short_names_that_differ():
    def shorts(*names: str) -> list[str]:
        return list(pictures._shorts(names, 24).values())

    assert shorts("/runs/a/model.keras", "median") == ["model.keras", "median"]
    assert shorts("/a/model.keras", "/b/model.keras") == ["a/model.keras", "b/model.keras"]
    seeds = [f"/runs/seed{seed}/unet-s/best" for seed in (1, 2)]
    assert shorts(*seeds, "median") == ["seed1/unet-s/best", "seed2/unet-s/best", "median"]
    assert shorts("unet-s", "/runs/unet-s") == ["unet-s", "runs/unet-s"]
    # Apart only in what a short name leaves out.
    long = [f"/runs/{'x' * 20}{seed}{'y' * 20}/{'z' * 200}/best" for seed in (1, 2)]
    for several in (long, [name.replace("z" * 200, "z") for name in long]):
        assert len(set(shorts(*several))) == 2


def test_models_of_one_name_are_told_apart_by_path(tmp_path: Path):
    paths = [make_checkpoint(tmp_path / name) for name in "ab"]
    assert [each.label for each in label_models(paths)] == paths
    assert label_models(paths[:1])[0].label == "tiny-0"
    card = tmp_path / "a/model.json"
    card.write_text(card.read_text().replace('"tiny-0"', '"unet-s"'))
    assert [each.label for each in label_models([paths[0], "unet-s"])] == [paths[0], "unet-s"]
    assert label_models(paths[:1])[0].label == paths[0]
    with pytest.raises(UsageError, match="given twice"):
        label_models([paths[0], paths[0]])


def test_fit_takes_the_centre_and_mirrors_what_is_missing():
    image = np.arange(25.0).reshape(5, 5, 1)
    np.testing.assert_array_equal(fit(image, 3, 1)[..., 0], image[1:4, 2:3, 0])
    wide = fit(image, 5, 8)
    assert wide.shape == (5, 8, 1)
    np.testing.assert_array_equal(wide[0, :, 0], [0, 0, 1, 2, 3, 4, 4, 3])


def gated() -> Any:
    """Free sizes, a code of four channels, and a gate beside it that has fewer values."""
    import keras
    from keras import layers

    noisy = keras.Input((None, None, 3))
    x = layers.Conv2D(8, 3, strides=4, padding="same", activation="relu")(noisy)
    x = layers.Conv2D(4, 3, padding="same", name="narrow")(x)
    gate = layers.Dense(4)(layers.GlobalAveragePooling2D(keepdims=True)(x))
    x = layers.Multiply()([x, gate])
    return keras.Model(noisy, layers.Conv2DTranspose(3, 4, strides=4)(x))


def nested() -> Any:
    """A dense autoencoder as the only layer of another model."""
    import keras
    from keras import layers

    inner = [layers.Flatten(), layers.Dense(16, name="narrow"), layers.ReLU(), layers.Dense(784)]
    noisy = keras.Input((28, 28, 1))
    flat = keras.Sequential([keras.Input((28, 28)), *inner])(layers.Reshape((28, 28))(noisy))
    return keras.Model(noisy, layers.Reshape((28, 28, 1))(flat))


def residual(width: int) -> Any:
    """A level below, round which a skip goes, and the noise taken from the image."""
    import keras
    from keras import layers

    noisy = keras.Input((None, None, 3))
    x = layers.Conv2D(6, 3, padding="same")(noisy)
    deep = layers.Conv2D(width, 2, strides=2, name="narrow")(x)
    x = layers.Add()([x, layers.Conv2DTranspose(6, 2, strides=2)(deep)])
    return keras.Model(noisy, layers.Subtract()([noisy, layers.Conv2D(3, 1)(x)]))


@pytest.mark.parametrize("build", [gated, nested, lambda: residual(11)])
def test_the_bottleneck_of_a_users_model_is_found(build: Any):
    model = build()
    encoder = encoder_of(model, stride=4)
    assert encoder.layers[-1].name == "narrow"
    assert encoder.output.shape[-1] in (4, 16, 11)


def test_a_nested_model_called_with_a_list_is_taken_apart():
    import keras
    from keras import layers

    noisy, given = keras.Input((8, 8, 1)), keras.Input((8, 8, 1))
    narrow = layers.Conv2D(1, 2, strides=2, name="narrow")(given)
    inner = keras.Model(given, layers.Conv2DTranspose(1, 2, strides=2)(narrow))
    assert encoder_of(keras.Model(noisy, inner([noisy])), stride=2).layers[-1].name == "narrow"


def test_a_model_that_cannot_be_taken_apart_has_no_code(tmp_path: Path):
    import keras
    from keras import layers

    noisy = keras.Input((8, 8, 1))
    twice = keras.Sequential([layers.Conv2D(2, 3, padding="same"), layers.Conv2D(1, 1)])
    model = keras.Model(noisy, twice(twice(noisy)))
    with pytest.raises(ValueError, match="not connected"):
        encoder_of(model, stride=1)
    model.save(tmp_path / "twice.keras")
    checkpoint = load_checkpoint(str(tmp_path / "twice.keras"), measure=False)
    assert Coder.of(checkpoint, stride=1) is None


def test_a_model_that_never_narrows_has_no_code(tmp_path: Path):
    residual(12).save(tmp_path / "wide.keras")
    checkpoint = load_checkpoint(str(tmp_path / "wide.keras"), measure=False)
    assert Coder.of(checkpoint, stride=2) is None


def test_a_users_model_codes_images_in_its_own_range(tmp_path: Path):
    import keras

    keras.utils.set_random_seed(0)
    model = gated()
    model.save(tmp_path / "mine.keras")
    checkpoint = load_checkpoint(str(tmp_path / "mine.keras"), model_range="0:255", measure=False)
    coder = Coder.of(checkpoint, stride=4)
    noisy = picture(30, 33, 3)
    expected = keras.Model(model.inputs[0], model.get_layer("narrow").output)(
        255 * fit(noisy, 32, 36)[None]
    )
    np.testing.assert_allclose(coder.code(noisy), np.mean(expected, (0, 1, 2)), rtol=1e-3)


def test_ends_keep_the_ten_best_and_the_ten_worst_whatever_the_order():
    values = np.random.default_rng(0).permutation(500).astype(float)
    ends, files = Ends(count=10), set()
    for value in values:
        keep, dropped = ends.offer(("m", "n"), value, str(value))
        files |= {str(value)} if keep else set()
        files -= {dropped}
    assert files == {str(float(v)) for v in (*range(10), *range(490, 500))}


def test_example_shows_the_worst_place_and_survives_its_file():
    clean = np.full((700, 600, 3), 100, np.uint8)
    output = clean.copy()
    output[600:640, 400:440] = 160
    made = cut_example(
        clean / np.float32(255),
        output,
        clean,
        protocol.Scale(0, 255, "uint8"),
        at_worst=True,
        psnr=30.0,
        psnr_noisy=20.0,
        ssim=None,
    )
    assert made.clean.shape == (CROP, CROP, 3)
    assert (made.error == 60).sum() == 1600
    read = Example.from_bytes(made.to_bytes())
    np.testing.assert_array_equal(read.error, made.error)
    assert (read.at, read.size, read.psnr, read.ssim) == (made.at, (700, 600), 30.0, None)


def test_galleries_of_many_pairs_show_the_middle_noise():
    assert gallery_pairs(["a", "b"], ["1", "2"]) == [(m, n) for n in "12" for m in "ab"]
    assert gallery_pairs(["a", "b"], ["1", "2", "3"]) == [(m, "2") for m in "ab"]


# --- The stages in a plain loop ---------------------------------------------------------------


class FakeCoder:
    """Means of the channels and of the two halves."""

    def code(self, noisy: np.ndarray) -> np.ndarray:
        half = len(noisy) // 2
        parts = (noisy, noisy[:half], noisy[half:])
        return np.array([part.mean() for part in parts], np.float32)


class FakeModel:
    """Adds `shift`, so that what it does to the error is known; 0 gives the input back."""

    def __init__(self, label: str, shift: float) -> None:
        self.source = ModelSource(label, f"/runs/{label}", "f" * 64, "auto", Geometry(256, 16, 2))
        self.shift, self.coder = shift, FakeCoder()

    def denoise(self, noisy: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [each + np.float32(self.shift) for each in noisy]


class HereModels(RunModels):
    """The actor with models that are already there."""

    def __init__(self, plan: Plan, models: list[Any]) -> None:
        self.prepare(plan)
        self.models = models


def evaluate_here(
    made: EvaluateConfig,
    models: list[FakeModel],
    noises: Sequence[str],
    *,
    stage: type[HereModels] = HereModels,
) -> Any:
    """Run both stages and publish, in this process."""
    plan = Plan(
        config=made,
        run_id="run",
        options=OPTIONS,
        models=tuple(model.source for model in models),
        filters=tuple(choose_filters(made.baselines)[0]),
        noises=tuple(noises),
    )
    shots = find_shots(made, OPTIONS)
    texts = [json.dumps(shot.to_json()) for shot in shots]
    names = pa.table({"shot": texts, "result": [""] * len(shots)})
    results = stage(plan, models)(RunFilters(plan)(names))
    collected = Collected()
    for text in results["result"].to_pylist():
        collected.add(json.loads(text))
    return _publish(plan, shots, collected, Watcher()).summary


def rows_of(out: Path) -> list[dict[str, Any]]:
    parts = sorted((out / "reports" / "evaluation").glob("part-*.parquet"))
    assert len(parts) == 1
    return pq.read_table(parts[0]).to_pylist()


def test_stages_and_what_they_leave(tmp_path: Path):
    for name, channels in (("a.png", 3), ("b.png", 1)):
        write_png(tmp_path / "in" / name, clean_picture(300, 280, channels))
    made = config(tmp_path / "in", output=str(tmp_path / "out"), baselines=("median", "tv"))
    made = EvaluateConfig(**{**vars_of(made), "limit_slow": 1})
    models = [FakeModel("same", 0.0), FakeModel("off", 0.5)]
    noises = ["gaussian:15", "gaussian:25", "salt-pepper:0.1"]
    summary = evaluate_here(made, models, noises)
    rows = {(r["image"], r["method"], r["noise"]): r for r in rows_of(tmp_path / "out")}
    assert len(rows) == 2 * 3 * 4 + 3, "tv sees one image"
    for image, noise in ((i, n) for i in ("a.png", "b.png") for n in noises):
        same, identity = rows[image, "same", noise], rows[image, "identity", noise]
        assert [same[k] for k in ("mse", "psnr", "ssim")] == [
            identity[k] for k in ("mse", "psnr", "ssim")
        ]
    clean = clean_picture(300, 280)
    noisy = protocol.to_bytes(protocol.noisy_of(clean, 25))
    found = rows["a.png", "identity", "gaussian:25"]
    assert found["psnr"] == psnr(noisy, clean, data_range=255)
    # 10 log10(255^2 / 25^2) = 20.17 dB, and clipping the output takes a little of the noise away.
    assert 20.17 < found["psnr"] < 21.5
    assert (found["sigma"], found["sigma_source"]) == (25, "given")
    assert rows["a.png", "median", "salt-pepper:0.1"]["sigma_source"] == "estimated"
    assert rows["a.png", "same", "gaussian:25"]["sigma"] is None
    warned = " ".join(summary["warnings"])
    assert warned.count("off loses") == 3
    assert "same loses" not in warned
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


def test_an_image_that_a_model_does_not_take_is_a_failed_row_and_no_other(tmp_path: Path):
    for name, side in (("a.png", 60), ("b.png", 40), ("c.png", 70)):
        write_png(tmp_path / "in" / name, clean_picture(side, side, 1))

    class Choosy(FakeModel):
        def denoise(self, noisy: Sequence[np.ndarray]) -> list[np.ndarray]:
            if any(len(each) < 50 for each in noisy):
                raise ImageError("smaller than the model can take")
            return super().denoise(noisy)

    evaluate_here(
        config(tmp_path / "in", output=str(tmp_path / "out"), baselines=("none",)),
        [Choosy("choosy", 0.1), FakeModel("off", 0.5)],
        ["gaussian:25"],
    )
    told = {
        (row["image"], row["method"]): row["error_message"]
        for row in rows_of(tmp_path / "out")
        if row["method"] != "identity"
    }
    assert len(told) == 6
    failed = {key: text for key, text in told.items() if text}
    assert list(failed) == [("b.png", "choosy")]
    assert "smaller than the model can take" in failed["b.png", "choosy"]


def test_gpus_that_tensorflow_does_not_see_are_told_once(monkeypatch: pytest.MonkeyPatch):
    shots = [Shot("a.png", "/in/a.png"), Shot("b.png", "/in/b.png")]
    told: list[str] = []

    class Ear(Watcher):
        note = staticmethod(told.append)

    for misses in (False, True):
        table = Notes(misses).to_table(shots, ["", ""])
        monkeypatch.setattr(
            "denoise_core.pipelines.evaluate._results", lambda *_, table=table: [table, table]
        )
        collect(None, shots, Ear(), Lock("mine"))
        assert told == [NO_GPU] * misses


@pytest.mark.parametrize("tables", [0, 1])
def test_an_evaluation_whose_output_another_took_over_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: int
):
    """The other's pictures lie where its own would be swept away."""
    others = tmp_path / "out/.evaluate/shown/other.npz"

    @contextmanager
    def taken(*_: Any, **__: Any) -> Iterator[Lock]:
        yield Lock("mine", lost_to="thief")

    def results(*_: Any) -> list[Any]:
        others.parent.mkdir(parents=True)
        others.touch()
        return [Notes().to_table([Shot("a.png", "/in/a.png")], [""])] * tables

    write_png(tmp_path / "in/a.png", clean_picture(16, 16))
    monkeypatch.setattr("denoise_core.pipelines.evaluate._results", results)
    monkeypatch.setattr("denoise_core.pipelines.evaluate.output_lock", taken)
    monkeypatch.setattr("denoise_core.pipelines.evaluate.END_S", 0.0)
    with pytest.raises(RunFailed, match="run thief took over"):
        run_evaluation(config(tmp_path / "in", output=str(tmp_path / "out")), watcher=Watcher())
    assert files_below(tmp_path / "out") == [".evaluate/shown/other.npz"]


def vars_of(made: EvaluateConfig) -> dict[str, Any]:
    return {name: getattr(made, name) for name in made.__dataclass_fields__}


def test_pictures_are_png_and_those_of_an_earlier_run_go(tmp_path: Path):
    write_idx(
        tmp_path / "t-images-idx3-ubyte.gz", np.random.default_rng(0).integers(0, 256, (24, 28, 28))
    )
    write_idx(tmp_path / "t-labels-idx1-ubyte.gz", np.arange(24) % 10)
    made = config(tmp_path, output=str(tmp_path / "out"), baselines=("median",))
    first = evaluate_here(made, [FakeModel("m", 0.1)], ["gaussian:15", "gaussian:25"])
    folder = tmp_path / "out" / "pictures"
    assert {"latent-m.png", "psnr-against-sigma.png", "residuals-gaussian-15.png"} <= {
        path.name for path in folder.iterdir()
    }
    assert {f"pictures/{path.name}" for path in folder.iterdir()} == set(first["pictures"])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
    (folder / "mine.png").write_bytes(b"x")
    second = evaluate_here(made, [FakeModel("m", 0.1)], ["gaussian:25"])
    names = {f"pictures/{path.name}" for path in folder.iterdir()}
    assert names == {*second["pictures"], "pictures/mine.png"}
    assert {row["label"] for row in rows_of(tmp_path / "out")} == set(range(10))


def test_narrow_images_leave_the_page_its_size(tmp_path: Path):
    for index in range(12):
        write_png(tmp_path / f"{index:02}.png", clean_picture(300, 7 if index == 5 else 24))
    made = config(tmp_path, output=str(tmp_path / "out"), baselines=("median",))
    evaluate_here(made, [FakeModel("m", 0.1)], ["gaussian:25"])
    for path in (tmp_path / "out" / "pictures").iterdir():
        height, width = imagecodecs.png_decode(path.read_bytes()).shape[:2]
        assert height <= 5 * width, path.name


def test_a_picture_too_large_for_webp_is_shown_as_png():
    noise = np.random.default_rng(0).integers(0, 256, (20000, 8, 3), np.uint8)
    for side, kind in ((16383, "webp"), (20000, "png")):
        cut = imagecodecs.png_encode(noise[:side])
        drawn = pictures.Drawn("n", "errors", "t", "c", cut, 8, side, photo=True)
        assert data_uri(drawn).startswith(f"data:image/{kind};")


def test_models_whose_long_paths_end_alike_have_pictures_of_their_own(tmp_path: Path):
    write_png(tmp_path / "a.png", clean_picture(30, 30))
    made = config(tmp_path, output=str(tmp_path / "out"), baselines=("none",))
    models = [FakeModel(f"/{run}/{'x' * 60}/best", 0.1) for run in "ab"]
    summary = evaluate_here(made, models, ["gaussian:25"])
    drawn = [name for name in summary["pictures"] if "worst" in name]
    assert len(set(drawn)) == 2
    assert all((tmp_path / "out" / name).is_file() for name in drawn)


def test_pairs_through_the_stages(tmp_path: Path):
    clean = clean_picture(40, 44)
    noisy = protocol.to_bytes(protocol.noisy_of(clean, 25))
    write_png(tmp_path / "a_mean.png", clean)
    write_png(tmp_path / "a_real.png", noisy)
    made = config(
        tmp_path,
        output=str(tmp_path / "out"),
        noisy="*_real.png",
        clean="*_mean.png",
        baselines=("median",),
    )
    summary = evaluate_here(made, [FakeModel("same", 0.0)], [protocol.PAIRS])
    rows = {row["method"]: row for row in rows_of(tmp_path / "out")}
    assert rows["same"]["psnr"] == rows["identity"]["psnr"] == psnr(noisy, clean, data_range=255)
    assert (rows["median"]["protocol"], rows["median"]["sigma_source"]) == ("pairs", "estimated")
    assert "noisy images were given" in summary["protocol"]


def test_an_unusable_image_is_a_row_and_not_the_end(tmp_path: Path):
    write_png(tmp_path / "a.png", clean_picture(30, 30))
    (tmp_path / "b.png").write_bytes(b"not an image")
    made = config(tmp_path, output=str(tmp_path / "out"), baselines=("none",))
    summary = evaluate_here(made, [FakeModel("m", 0.1)], ["gaussian:25"])
    assert summary["images"] == {"total": 2, "ok": 1, "failed": 1}
    (failed,) = (row for row in rows_of(tmp_path / "out") if row["status"] == "failed")
    assert (failed["image"], failed["method"]) == ("b.png", None)
    assert failed["error_message"] in re.sub(
        "&#39;|&#34;", "'", (tmp_path / "out" / "evaluation.html").read_text()
    )


def test_an_image_that_goes_between_the_stages_is_a_row(tmp_path: Path):
    for name in ("a.png", "b.png"):
        write_png(tmp_path / name, clean_picture(30, 30))

    class Late(HereModels):
        def __call__(self, table: pa.Table) -> pa.Table:
            (tmp_path / "b.png").unlink()
            return super().__call__(table)

    made = config(tmp_path, output=str(tmp_path / "out"), baselines=("none",))
    summary = evaluate_here(made, [FakeModel("m", 0.1)], ["gaussian:25"], stage=Late)
    assert summary["images"] == {"total": 2, "ok": 1, "failed": 1}
    told = {(row["image"], row["method"]): row["error_type"] for row in rows_of(tmp_path / "out")}
    assert told.pop(("b.png", None)) == "ObjectNotFound"
    assert told.pop(("a.png", "m")) is None


def test_an_output_that_takes_no_file_ends_the_run_in_either_stage(tmp_path: Path):
    write_png(tmp_path / "a.png", clean_picture(30, 30))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".evaluate").touch()
    made = config(tmp_path, output=str(tmp_path / "out"), baselines=("none",))
    model = FakeModel("m", 0.1)
    plan = Plan(made, "run", OPTIONS, (model.source,), ("identity",), ("gaussian:25",))
    (shot,) = find_shots(made, OPTIONS)
    names = pa.table({"shot": [json.dumps(shot.to_json())], "result": ["[]"]})
    for stage in (RunFilters(plan), HereModels(plan, [model])):
        with pytest.raises(RunFailed, match="a part of this path is a file"):
            stage(names)


def test_a_model_that_gives_nan_fails_by_a_row(tmp_path: Path):
    write_png(tmp_path / "a.png", clean_picture(30, 30))
    made = config(tmp_path, output=str(tmp_path / "out"), baselines=("none",))
    summary = evaluate_here(made, [FakeModel("m", math.nan)], ["gaussian:25"])
    failed = [row for row in rows_of(tmp_path / "out") if row["status"] == "failed"]
    assert [(row["method"], row["error_type"]) for row in failed] == [("m", "NonFiniteValues")]
    entry = next(each for each in summary["results"] if each["method"] == "m")
    assert (entry["images"], entry["psnr"]["mean"]) == (0, None)


def test_noise_that_takes_no_such_image_fails_by_a_row_and_leaves_the_others(tmp_path: Path):
    write_png(tmp_path / "a.png", clean_picture(30, 30))
    np.save(tmp_path / "b.npy", np.zeros((30, 30, 5), np.uint8))
    made = config(tmp_path, output=str(tmp_path / "out"), baselines=("none",))
    noises = ["gaussian:25", "jpeg:50", "jpeg:30"]
    summary = evaluate_here(made, [FakeModel("m", 0.1)], noises)
    assert summary["images"] == {"total": 2, "ok": 1, "failed": 1}
    rows = [row for row in rows_of(tmp_path / "out") if row["image"] == "b.npy"]
    told = {(row["noise"], row["method"]): row["error_message"] for row in rows}
    for noise in noises[1:]:
        message = told.pop((noise, None))
        assert "the noise jpeg takes images of 1 or 3 channels, not of 5" in message
    assert told == {("gaussian:25", "identity"): None, ("gaussian:25", "m"): None}
    counts = {(each["noise"], each["method"]): each["images"] for each in summary["results"]}
    assert counts == {(n, m): 2 - (n != "gaussian:25") for n in noises for m in ("identity", "m")}


def test_noise_that_takes_no_image_at_all_ends_only_an_evaluation_of_nothing_else(tmp_path: Path):
    np.save(tmp_path / "b.npy", np.zeros((30, 30, 5), np.uint8))
    made = config(tmp_path, output=str(tmp_path / "out"), baselines=("none",))
    models = [FakeModel("m", 0.1)]
    summary = evaluate_here(made, models, ["jpeg:50", "gaussian:25"])
    assert summary["images"] == {"total": 1, "ok": 0, "failed": 1}
    assert [each["images"] for each in summary["results"]] == [0, 0, 1, 1]
    with pytest.raises(RunFailed, match=r"none of the 1 image\(s\) could be used; .* jpeg takes"):
        evaluate_here(made, models, ["jpeg:50", "jpeg:30"])


def test_a_filter_that_gives_nan_fails_by_a_row_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(CLASSICAL, "median", lambda image, sigma: image * np.float32(np.nan))
    write_png(tmp_path / "a.png", clean_picture(30, 30))
    made = config(tmp_path, output=str(tmp_path / "out"), baselines=("median",))
    summary = evaluate_here(made, [FakeModel("m", 0.1)], ["gaussian:25"])
    assert summary["images"] == {"total": 1, "ok": 1, "failed": 0}
    rows = {row["method"]: row["status"] for row in rows_of(tmp_path / "out")}
    assert rows == {"identity": "ok", "m": "ok", "median": "failed"}


def test_nothing_usable_is_told_before_ray(tmp_path: Path):
    with pytest.raises(UsageError, match="no such file or folder"):
        run_evaluation(config(tmp_path / "none", output=str(tmp_path / "o")), watcher=Watcher())
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match=r"No images found in .*: expected files .*\.png"):
        run_evaluation(config(tmp_path, output=str(tmp_path / "o")), watcher=Watcher())
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr/zarr.json").touch()
    for data in (tmp_path, tmp_path / "a.zarr"):
        with pytest.raises(UsageError, match=r"a\.zarr: training and evaluation .* convert them"):
            run_evaluation(config(data, output=str(tmp_path / "o")), watcher=Watcher())


def test_the_printed_table_is_aligned():
    measure = {"mean": 20.0, "low": 19.0, "high": 21.0, "count": 3}
    none = {"mean": None, "low": None, "high": None, "count": 0}
    entry = {"noise": "gaussian:5", "method": "m", "images": 3, "psnr": measure, "ssim": none}
    lines = evaluate.result_lines([{**entry, "gain": measure}, {**entry, "gain": none}])
    assert "20.00 ± 1.00" in lines[2]
    assert lines[2].index("+20.00") == lines[0].index("gain dB")
    assert len(lines[1]) == len(lines[0])


def test_training_takes_its_settings_as_before():
    words = ["in", "--output", "o", "--steps", "5"]
    code, text, (made,) = parse(TrainConfig, *words)
    assert (code, made.data) == (0, ("in",)), text


# --- The page in a browser --------------------------------------------------------------------

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.mark.filterwarnings("error")
def test_long_noises_and_many_labels_leave_a_plot_its_place():
    mixture = "gaussian:{}-40+clip|salt-pepper:0.01-0.1|speckle:20-60+clip|poisson:30-300+clip"
    noises = [mixture.format(each % 20) for each in range(100)]
    points = np.random.default_rng(0).normal(size=(100, 2))
    known: dict[str, Any] = {"noises": noises, "model": "m", "dimensions": 8}
    for labels in ([None] * 100, [each % 62 for each in range(100)]):
        drawn = pictures.latent(points, np.array([0.5, 0.2]), labels=labels, **known)
        assert drawn.png.startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("evaluation")
    for index in range(3):
        write_png(
            folder / "in" / f"{HOSTILE}{index}.png".replace("/", "_"),
            clean_picture(64, 300, seed=index),
        )
    (folder / "in" / "broken.png").write_bytes(b"not an image")
    made = config(folder / "in", output=str(folder / "out"), baselines=("median",))
    models = [FakeModel(f"{HOSTILE}" * 4, 0.0), FakeModel("off", 0.5)]
    evaluate_here(made, models, ["gaussian:15", "gaussian:25"])
    return (folder / "out" / "evaluation.html").as_uri()


class TestInChromium:
    pytestmark = browser_test

    def test_it_asks_for_nothing_and_runs_no_hostile_name(self, browser: Any, page: str) -> None:
        visit(browser, page)
        assert browser.get_log("browser") == []
        assert browser.title.endswith("– evaluation")
        asked = "return performance.getEntriesByType('resource').map(e => e.name)"
        assert all(name.startswith("data:") for name in browser.execute_script(asked))
        natural = browser.execute_script("return [...document.images].map(i => i.naturalWidth)")
        assert len(natural) >= 10
        assert all(width > 0 for width in natural)

    def test_warnings_and_failures_are_seen(self, browser: Any, page: str) -> None:
        visit(browser, page)
        shown = [each.text for each in browser.find_elements("css selector", ".warning")]
        assert [text.partition(" at ")[0] for text in shown] == [
            "Warning. off loses to the noisy input itself"
        ] * 2
        assert "broken.png" in browser.find_element("id", "failures").text
        losing = browser.find_elements("css selector", ".loses")
        assert any(each.text.startswith("−") for each in losing)

    @pytest.mark.parametrize("width", [360, 768, 1280])
    def test_it_never_scrolls_sideways(self, browser: Any, page: str, width: int) -> None:
        resize(browser, width)
        visit(browser, page)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        wide = (
            "const f = document.querySelector('.picture .frame');"
            "return [f.scrollWidth > f.clientWidth, f.querySelector('img').offsetWidth]"
        )
        scrolls, picture_width = browser.execute_script(wide)
        assert width > 360 or (scrolls and picture_width >= 500), "a picture stays readable"

    def test_the_table_of_images_sorts_and_filters(self, browser: Any, page: str) -> None:
        resize(browser, 1280)
        visit(browser, page)
        heads = browser.find_elements("css selector", "#images-table thead button")
        heads[2].click()
        script = "return [...document.querySelectorAll('#images-table tbody td:nth-child(3)')]"
        values = [float(v) for v in browser.execute_script(f"{script}.map(c => c.textContent)")]
        assert values == sorted(values)
        browser.find_element("id", "filter").send_keys("gaussian:15")
        count = "return document.querySelectorAll('#images-table tbody tr:not([hidden])').length"
        assert browser.execute_script(count) == 3
