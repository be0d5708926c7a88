"""Training without Ray: data by (seed, step, place), schedule, learning, resume, failure."""

from __future__ import annotations

import gzip
import io
import json
import math
import shutil
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from two_ranks import CLIP_NORM, STEPS, train_together

from denoise_core import curves, training_data
from denoise_core.checkpoints import save_checkpoint
from denoise_core.config import TrainConfig, as_dict
from denoise_core.errors import CheckpointError, RunFailed, UsageError
from denoise_core.noise import parse_noise
from denoise_core.presets import PRESETS, Plateau, Preset, Stage, classic
from denoise_core.storage import StorageOptions
from denoise_core.training import (
    Progress,
    Trainer,
    communication,
    learning_rate,
    loss_function,
    note_validation,
    places_of,
    prepare,
    psnr_of,
    stage_at,
    steps_of_epoch,
)
from denoise_core.training_data import (
    Affine,
    Library,
    Picture,
    Sampler,
    TrainingData,
    measured,
    parse_augment,
    prefetch,
    validation_pairs,
)

TINY = Preset(
    "unet",
    {"widths": (4, 8), "blocks": (1, 1), "channels": 3},
    default_halo=8,
    learning_rate=1e-2,
    stages=(Stage(0.0, 16, 4), Stage(0.5, 32, 2)),
    warmup_steps=4,
    mse_from=0.8,
    ema=0.9,
)


def config(**settings) -> TrainConfig:
    return TrainConfig(
        **{"data": ("made",), "output": "none", "steps": 24, "validate_steps": 12, **settings}
    )


def picture(height=48, width=64, *, seed=0) -> np.ndarray:
    """Smooth colours with an edge, 8-bit RGB."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(5, 20)) + np.cos(y / rng.uniform(5, 20)) for _ in range(3)]
    image = 0.5 + 0.2 * np.stack(waves, axis=2)
    image[:, width // 2 :] *= 0.6
    return np.clip(image * 255, 0, 255).astype(np.uint8)


def write(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean")
    for seed in range(7):
        write(root / f"{seed}.png", picture(seed=seed))
    return root


@pytest.fixture(scope="module")
def data(folder):
    return TrainingData.index(config(data=(str(folder),)), TINY)


def sampler(folder, preset=TINY, **settings) -> Sampler:
    settings = config(data=(str(folder),), **settings)
    return Sampler.make(TrainingData.index(settings, preset).training, settings, preset)


def sampler_of(tmp_path, *images, preset=TINY, **settings) -> Sampler:
    """A sampler of these images, none of them held out."""
    for index, image in enumerate(images):
        write(tmp_path / f"{index}.png", image)
    held = write(tmp_path / "held" / "held.png", images[0])
    settings = config(
        data=tuple(str(tmp_path / f"{i}.png") for i in range(len(images))),
        validation_data=(str(held),),
        **settings,
    )
    return Sampler.make(TrainingData.index(settings, preset).training, settings, preset)


def run(trainer) -> list[tuple[dict[str, float], bool]]:
    reports = []
    trainer.run(lambda metrics, save: reports.append((dict(metrics), save)))
    return reports


# --- data


def index(*data, preset=TINY, **settings) -> TrainingData:
    return TrainingData.index(config(data=tuple(map(str, data)), **settings), preset)


def test_images_are_found_sorted_and_by_ending(tmp_path):
    for name in ("b/2.PNG", "a.jpg", "c.tif", "d.png"):
        write(tmp_path / name, picture())
    (tmp_path / "notes.txt").write_text("no image")
    found = index(tmp_path, validation_data=(str(tmp_path / "d.png"),))
    assert [Path(p.uri).name for p in found.training] == ["a.jpg", "2.PNG", "c.tif"]
    assert [(p.height, p.width, p.channels) for p in found.training] == [(48, 64, 3)] * 3
    with pytest.raises(UsageError, match=r"No images found in .*none"):
        index(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"No images found in .*empty.*: expected .*\.png"):
        index(tmp_path / "empty")


def test_zarrs_are_named_where_nothing_else_is_found_or_one_is_given(tmp_path):
    for name in ("a.zarr", "b.ome.zarr"):
        (tmp_path / "zarrs" / name).mkdir(parents=True)
        (tmp_path / "zarrs" / name / "zarr.json").touch()
    zarrs, one = tmp_path / "zarrs", tmp_path / "zarrs/a.zarr"
    sentence = (
        r"No images found in .*zarrs.* Zarrs such as .*\.zarr: .* convert them; jobs\.denoise"
    )
    with pytest.raises(UsageError, match=sentence):
        index(zarrs)
    with pytest.raises(UsageError, match=sentence):
        index(zarrs, noisy="*_n.png", clean="*_c.png")
    image = write(tmp_path / "c.png", picture())
    with pytest.raises(UsageError, match=sentence):
        index(image, one)
    shutil.copy(image, zarrs)
    shutil.copy(image, zarrs / "d.png")
    assert index(zarrs).files == 1


def idx(path: Path, values: np.ndarray) -> Path:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))
    return path


def test_idx_files_are_images_but_labels_and_test_sets_are_not(tmp_path):
    digits = np.random.default_rng(0).integers(0, 256, (5, 28, 28)).astype(np.uint8)
    idx(tmp_path / "train-images-idx3-ubyte.gz", digits)
    idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(5, dtype=np.uint8))
    test = idx(tmp_path / "t10k-images-idx3-ubyte.gz", digits[:2])
    found = index(tmp_path, preset=PRESETS["mnist-conv"], validation=0.2)
    assert (len(found.training), len(found.validation)) == (4, 1)
    members = sorted(p.member for p in (*found.training, *found.validation))
    assert members == [0, 1, 2, 3, 4]
    library = Library(StorageOptions(), channels=1)
    for each in found.training:
        np.testing.assert_array_equal(library.get(each)[0][..., 0], digits[each.member])
    named = index(test, preset=PRESETS["mnist-conv"], validation=0.5)
    assert len(named.training) == 1


def test_images_are_loaded_in_their_own_depth_with_the_networks_channels(tmp_path):
    library = Library(StorageOptions(), channels=3)
    grey = write(tmp_path / "grey.png", picture()[..., 0])
    loaded, partner = library.get(Picture(str(grey)))
    assert (loaded.shape, loaded.dtype, partner) == ((48, 64, 3), np.uint8, None)
    np.testing.assert_array_equal(loaded[..., 1], picture()[..., 0])
    deep = np.array([[0, 128, 129, 65535, 32767]], np.uint16)
    loaded, _ = library.get(Picture(str(write(tmp_path / "deep.png", deep))))
    np.testing.assert_array_equal(loaded[..., 2], deep)
    np.testing.assert_allclose(training_data.to_unit(loaded, loaded)[..., 0], deep / 65535)
    colour = write(tmp_path / "colour.png", picture())
    luma, _ = Library(StorageOptions(), channels=1).get(Picture(str(colour)))
    expected = picture() @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(luma[..., 0], expected, atol=0.51)
    tifffile.imwrite(tmp_path / "five.tif", np.zeros((8, 8, 5), np.uint8))
    with pytest.raises(UsageError, match=r"five\.tif: training takes images of 1 or 3 channels"):
        library.get(Picture(str(tmp_path / "five.tif")))


def test_a_library_keeps_no_more_than_it_may(tmp_path):
    paths = [write(tmp_path / f"{i}.png", picture(seed=i)) for i in range(4)]
    library = Library(StorageOptions(), channels=3, capacity=2 * picture().nbytes)
    for path in (*paths, paths[3], paths[0]):
        assert library.get(Picture(str(path)))[0].shape == (48, 64, 3)
        assert library.bytes <= library.capacity
    assert [Path(p.uri).name for p in library.kept] == ["3.png", "0.png"]


def test_large_images_also_enter_at_half_their_size(tmp_path):
    write(tmp_path / "large.png", picture(1000, 1200))
    write(tmp_path / "small.png", picture())
    held = write(tmp_path / "validation.png", picture())
    found = index(tmp_path, validation_data=(str(held),))
    assert [p.sides for p in found.training] == [(1000, 1200), (500, 600), (48, 64)]
    assert found.files == 2
    library = Library(StorageOptions(), channels=3)
    assert [library.get(p)[0].shape[:2] for p in found.training] == [
        p.sides for p in found.training
    ]


def test_a_half_size_copy_that_holds_no_crop_is_left_out(tmp_path):
    write(tmp_path / "large.png", picture(1000, 1200))
    held = (str(write(tmp_path / "validation.png", picture(600, 600))),)
    sides = [p.sides for p in index(tmp_path, validation_data=held, crop=500).training]
    assert sides == [(1000, 1200), (500, 600)]
    sides = [p.sides for p in index(tmp_path, validation_data=held, crop=502).training]
    assert sides == [(1000, 1200)]
    noisy = {"self_supervised": "neighbor2neighbor", "crop": 252}
    assert len(index(tmp_path, validation_data=held, **noisy).training) == 1


def test_files_that_cannot_be_trained_on_are_named(tmp_path):
    write(tmp_path / "good.png", picture())
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UsageError, match=r"cut\.png"):
        index(tmp_path)


def test_small_images_are_named_by_their_headers(tmp_path):
    for side in (32, 31):
        write(tmp_path / f"{side}.png", picture(side, 64))
    with pytest.raises(UsageError, match=r"31\.png: crops of 32 px do not fit into 64x31"):
        index(tmp_path)
    assert len(index(tmp_path, crop=16).training) == 1


def test_of_many_files_some_are_looked_at_and_the_others_where_they_are_opened(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(training_data, "MOST_HEADERS", 6)
    sentence = r"png: --preset .* is for images of 28x28 px with 1 .*; got 64x48 px with 3"
    with pytest.raises(UsageError, match=sentence):
        index(folder, preset=PRESETS["mnist-conv"])
    with pytest.raises(UsageError, match=r"png: crops of 64 px do not fit into 64x48 px"):
        index(folder, crop=64)
    found = index(folder)
    assert {picture.height for picture in (*found.training, *found.validation)} == {0}
    monkeypatch.setattr(training_data, "_opened", lambda *_: [])
    for preset, crop, words in (
        (PRESETS["mnist-conv"], None, sentence),
        (TINY, 64, "crops of 64 px do not fit into 64x48 px"),
    ):
        draws = sampler(folder, preset, crop=crop)
        with pytest.raises(UsageError, match=words):
            draws.batch(step=0, crop=16, places=range(1))
        with pytest.raises(UsageError, match=words):
            validation_pairs(draws.pictures, draws, noise=draws.noise, side=28, stride=4)


def test_a_preset_for_mnist_refuses_photographs(folder):
    with pytest.raises(
        UsageError,
        match=r"png: --preset mnist-conv is for images of 28x28 px with 1 channel\(s\), such as "
        r"MNIST; got 64x48 px with 3\. For photographs choose unet-s or photo-conv",
    ):
        prepare(config(data=(str(folder),), preset="mnist-conv"))


@pytest.mark.parametrize("name", ["a.png", "z.png"])
def test_a_photograph_among_idx_files_is_refused_wherever_its_name_sorts(tmp_path, name):
    digits = np.zeros((5, 28, 28), np.uint8)
    idx(tmp_path / "train-images-idx3-ubyte.gz", digits)
    write(tmp_path / name, picture())
    with pytest.raises(UsageError, match=rf"{name}: --preset .* is for images of 28x28"):
        index(tmp_path, preset=PRESETS["mnist-conv"])


def test_validation_images_are_held_out_by_the_seed(folder):
    first, again, other = (index(folder, validation=0.3, seed=s) for s in (0, 0, 1))
    assert (len(first.training), len(first.validation)) == (5, 2)
    assert first == again
    assert first.validation != other.validation
    assert {p.uri for p in first.validation} & {p.uri for p in first.training} == set()
    with pytest.raises(UsageError, match=r"1 image\(s\) cannot be split"):
        index(folder / "0.png")


def test_what_is_validated_on_is_not_trained_on_wherever_it_lies(tmp_path):
    for name in ("a.png", "b.png", "held/c.png", "held/d.png"):
        write(tmp_path / name, picture())
    found = index(tmp_path, validation_data=(str(tmp_path / "held"),))
    assert [Path(p.uri).name for p in found.training] == ["a.png", "b.png"]
    assert [Path(p.uri).name for p in found.validation] == ["c.png", "d.png"]
    pairs = {"noisy": "*_n.png", "clean": "*_c.png"}
    for name in ("1_n", "1_c", "held/2_n", "held/2_c"):
        write(tmp_path / "pairs" / f"{name}.png", picture())
    found = index(tmp_path / "pairs", validation_data=(str(tmp_path / "pairs/held"),), **pairs)
    assert [Path(p.uri).name for p in found.training] == ["1_n.png"]
    with pytest.raises(UsageError, match="--validation-data holds all images of DATA"):
        index(tmp_path / "held", validation_data=(str(tmp_path),))


def test_an_image_that_several_data_stand_for_comes_once(folder):
    once = index(folder)
    assert index(folder, folder / "3.png", f"{folder}/*.png") == once
    assert len(once.training) + len(once.validation) == 7


def test_one_image_more_or_less_moves_no_other_to_the_held_out_ones(tmp_path):
    for number in range(40):
        write(tmp_path / "a" / f"{number:02}.png", picture(16, 16))

    def held(folder):
        return {p.path for p in index(folder, validation=0.25, crop=16).validation}

    before = held(tmp_path / "a")
    assert len(before) == 10
    # Wherever the folder is mounted.
    (tmp_path / "a").rename(tmp_path / "b")
    assert held(tmp_path / "b") == before
    write(tmp_path / "b" / "00_new.png", picture(16, 16))
    assert len(before - held(tmp_path / "b")) <= 1
    (tmp_path / "b" / "00_new.png").unlink()
    trained = next(f"{number:02}.png" for number in range(40) if f"{number:02}.png" not in before)
    (tmp_path / "b" / trained).unlink()
    assert held(tmp_path / "b") == before


def test_what_a_run_leaves_below_the_data_is_not_trained_on(tmp_path):
    for name in ("a.png", "b.png", "run/samples/step-1.png", "run/curves.png", "run2/c.png"):
        write(tmp_path / name, picture())
    found = index(tmp_path, output=str(tmp_path / "run"))
    names = {Path(p.uri).name for p in (*found.training, *found.validation)}
    assert names == {"a.png", "b.png", "c.png"}
    # Data in a folder of the output are named on purpose.
    found = index(tmp_path / "run2", tmp_path / "a.png", output=str(tmp_path))
    assert len(found.training) + len(found.validation) == 2
    with pytest.raises(UsageError, match="is where images are taken from"):
        index(tmp_path, output=str(tmp_path))


def test_images_of_other_channels_are_named_by_their_headers(tmp_path):
    write(tmp_path / "good.png", picture())
    tifffile.imwrite(tmp_path / "five.tif", np.zeros((64, 64, 5), np.uint8))
    with pytest.raises(UsageError, match=r"five\.tif: training takes images of 1 or 3 channels"):
        index(tmp_path)


def test_pairs_go_by_their_names_and_are_cut_alike(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abc":
        clean = rng.integers(0, 200, (40, 48, 3)).astype(np.uint8)
        write(tmp_path / f"{name}_mean.png", clean)
        write(tmp_path / f"{name}_real.png", clean + 7)
    patterns = {"noisy": "*_real.png", "clean": "*_mean.png"}
    settings = config(data=(str(tmp_path),), **patterns)
    found = TrainingData.index(settings, TINY)
    assert (len(found.training), len(found.validation)) == (2, 1)
    draw = Sampler.make(found.training, settings, TINY)
    for step in range(10):
        noisy, clean = draw.sample(step=step, place=0, crop=16)
        np.testing.assert_allclose(noisy - clean, 7 / 255, atol=1e-6)
    (tmp_path / "b_mean.png").unlink()
    with pytest.raises(UsageError, match=r"1 file\(s\) without a partner: b_real\.png"):
        TrainingData.index(settings, TINY)


@pytest.mark.parametrize(
    "patterns",
    [{"noisy": "noisy/*", "clean": "clean/*"}, {"noisy": "*/low.png", "clean": "*/high.png"}],
)
def test_pairs_may_lie_in_folders(tmp_path, patterns):
    for name in "abc":
        for pattern, value in zip(patterns.values(), (90, 70), strict=True):
            path = tmp_path / pattern.replace("*", name)
            path.parent.mkdir(exist_ok=True)
            write(path.with_suffix(".png"), np.full((40, 48, 3), value, np.uint8))
    settings = config(data=(str(tmp_path),), **patterns)
    found = TrainingData.index(settings, TINY)
    assert len(found.training) + len(found.validation) == 3
    noisy, clean = Sampler.make(found.training, settings, TINY).sample(step=0, place=0, crop=16)
    assert (noisy * 255).mean() == pytest.approx(90)
    assert (clean * 255).mean() == pytest.approx(70)


def test_no_data_of_a_raster_is_not_learnt(tmp_path):
    band = np.linspace(0, 1, 40 * 40, dtype=np.float32).reshape(40, 40)
    band[:9] = np.nan
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, band, extratags=[(42113, 2, None, "nan", True)])
    loaded, _ = Library(StorageOptions(), channels=1).get(Picture(str(path)))
    assert loaded[:9].max() == 0
    np.testing.assert_array_equal(loaded[9:, :, 0], band[9:])


def test_a_float_image_is_looked_at_once_for_its_range(tmp_path, monkeypatch):
    for number in range(2):
        values = np.random.default_rng(number).random((40, 48, 3)).astype(np.float32)
        np.save(tmp_path / f"{number}.npy", 4000 * values)
    draws = sampler(tmp_path, grey=0.0, noise=("clean",))
    looks, look = [], training_data.data_range
    monkeypatch.setattr(training_data, "data_range", lambda a: looks.append(1) or look(a))
    crops = [draws.sample(step=step, place=0, crop=16)[1] for step in range(9)]
    assert len(looks) == 1
    assert 0.9 < max(crop.max() for crop in crops) <= 1.0


@pytest.mark.parametrize("scale", [1, 4000])
def test_noise_does_not_change_the_units_of_float_pairs(tmp_path, scale):
    rng = np.random.default_rng(0)
    for name in "ab":
        clean = np.repeat(rng.random((40, 1, 1)), 48, axis=1).astype(np.float32) * scale
        noisy = clean + rng.normal(0, 0.2 * scale, clean.shape).astype(np.float32)
        np.save(tmp_path / f"{name}_mean.npy", clean)
        np.save(tmp_path / f"{name}_real.npy", noisy)
    settings = config(data=(str(tmp_path),), noisy="*_real.npy", clean="*_mean.npy")
    found = TrainingData.index(settings, TINY)
    sampler = Sampler.make(found.training, settings, TINY)
    drawn = [sampler.sample(step=step, place=0, crop=32) for step in range(4)]
    held = validation_pairs(
        found.validation, sampler, noise=parse_noise("clean"), side=32, stride=16
    )
    for noisy, clean in (*drawn, *held):
        slope = np.polyfit(clean.ravel(), noisy.ravel(), 1)[0]
        assert slope == pytest.approx(1, abs=0.05)


def test_twelve_bits_in_sixteen_are_trained_on_as_all_of_the_range(tmp_path):
    pixels = np.array([[0, 1, 4095]], np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, bitspersample=12)
    loaded, _ = Library(StorageOptions(), channels=1).get(Picture(str(tmp_path / "a.tif")))
    values = training_data.to_unit(loaded, loaded)[..., 0]
    np.testing.assert_allclose(values, pixels / 4095, rtol=3e-4)


@pytest.mark.parametrize("headers", [0, 100])
def test_of_many_held_out_images_an_even_spread_is_measured(folder, tmp_path, monkeypatch, headers):
    monkeypatch.setattr(training_data, "MOST_HEADERS", headers)
    other = write(tmp_path / "other.png", picture())
    held = index(other, validation_data=(str(folder),)).validation
    assert measured(held, side=32) == held
    monkeypatch.setattr(training_data, "VALIDATION_PIXELS", 4 * 32 * 32 - 1)
    assert [p.path for p in measured(held, side=32)] == ["0.png", "2.png", "4.png"]
    monkeypatch.setattr(training_data, "VALIDATION_IMAGES", 2)
    assert [p.path for p in measured(held, side=32)] == ["0.png", "3.png"]
    monkeypatch.setattr(training_data, "VALIDATION_PIXELS", 1)
    assert len(measured(held, side=32)) == 1


def test_a_trainer_keeps_no_image_that_it_cut_validation_crops_of(data):
    trainer = Trainer(config(), TINY, data)
    assert len(trainer.held_out) == 1
    assert trainer.sampler.library.bytes == 0


@given(seed=st.integers(0, 2**32), step=st.integers(0, 10**6), place=st.integers(0, 1000))
def test_a_sample_is_a_function_of_seed_step_and_place(folder, seed, step, place):
    draws = replaced_seed(sampler_once(folder), seed)
    first = draws.sample(step=step, place=place, crop=16)
    again = replaced_seed(draws, seed).sample(step=step, place=place, crop=16)
    other = draws.sample(step=step, place=place + 1, crop=16)
    for values, same in zip(first, again, strict=True):
        assert values.shape == (16, 16, 3)
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, same)
    assert not np.array_equal(first[0], other[0])
    assert 0.0 <= first[1].min() <= first[1].max() <= 1.0


KNOWN: dict[str, Sampler] = {}


def sampler_once(folder) -> Sampler:
    return KNOWN.setdefault(str(folder), sampler(folder))


def replaced_seed(draws: Sampler, seed: int) -> Sampler:
    made = {f: getattr(draws, f) for f in ("pictures", "library", "noise", "mode", "order")}
    return Sampler(**made, grey=draws.grey, augment=draws.augment, seed=seed)


@pytest.mark.parametrize("order", ["draws", "epochs"])
def test_the_batch_of_one_worker_is_that_of_two_together(folder, order):
    draws = sampler(folder, replace(TINY, order=order))
    stage = Stage(0.0, 16, 8)
    one = draws.batch(step=5, crop=16, places=places_of(stage, rank=0, workers=1), size=8)
    halves = [
        draws.batch(step=5, crop=16, places=places_of(stage, rank=r, workers=2), size=8)
        for r in range(2)
    ]
    for whole, *parts in zip(one, *halves, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_an_epoch_shows_every_image_once(tmp_path):
    images = [np.full((16, 16, 3), 20 * i, np.uint8) for i in range(6)]
    draws = sampler_of(
        tmp_path, *images, preset=replace(TINY, order="epochs", grey=0.0), crop=16, noise=("clean",)
    )
    shown = [
        round(float(draws.sample(step=s, place=p, crop=16, size=2)[1].mean()) * 255)
        for s in range(6)
        for p in range(2)
    ]
    assert sorted(shown[:6]) == sorted(shown[6:]) == [0, 20, 40, 60, 80, 100]
    assert shown[:6] != shown[6:]


def test_a_large_collection_is_read_about_once_a_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(training_data, "WINDOW_IMAGES", 4)
    monkeypatch.setattr(training_data, "CROPS_OF_EACH", 4)
    draws = sampler_of(tmp_path, *(picture(seed=i) for i in range(24)))
    small = Library(StorageOptions(), channels=3, capacity=6 * picture().nbytes)
    draws = Sampler(draws.pictures, small, draws.noise, 0)
    reads = []
    read = small.read
    monkeypatch.setattr(small, "read", lambda p: reads.append(p) or read(p))
    for step in range(24 * 4):
        draws.sample(step=step, place=0, crop=16)
    assert len({p.uri for p in reads}) >= 20
    assert len(reads) <= 40


@pytest.mark.parametrize("headers", [0, 100])
@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "pairs"])
def test_a_window_is_no_larger_than_the_memory(tmp_path, monkeypatch, kind, headers):
    """A window of more images than are kept reads one for most crops."""
    monkeypatch.setattr(training_data, "MOST_HEADERS", headers)
    monkeypatch.setattr(training_data, "CROPS_OF_EACH", 16)
    for number in range(40):
        values = picture(seed=number)
        if kind == "16 bits":
            np.save(tmp_path / f"{number}.npy", values.astype(np.uint16) * 257)
            continue
        write(tmp_path / f"{number}_n.png", values)
        if kind == "pairs":
            write(tmp_path / f"{number}_c.png", values)
    settings = {"noisy": "*_n.png", "clean": "*_c.png"} if kind == "pairs" else {}
    made = sampler(tmp_path, **settings)
    size = 9 * picture().nbytes * (1 if kind == "8 bits" else 2)

    def draws(steps, places):
        library = Library(StorageOptions(), channels=3, capacity=size)
        reads, read = [], library.read
        monkeypatch.setattr(library, "read", lambda p: reads.append(p) or read(p))
        mine = Sampler(made.pictures, library, made.noise, 0, mode=made.mode)
        drawn = [mine.batch(step=s, crop=16, places=places, size=4) for s in steps]
        return drawn, reads

    count = len(made.pictures)
    whole, reads = draws(range(count * 16 // 4), range(4))
    assert len({p.uri for p in reads}) >= 0.9 * count
    assert len(reads) <= 1.25 * count
    # A resumed run and each of two workers see what one does, whatever they keep.
    later, _ = draws(range(100, 110), range(4))
    halves = [draws(range(100, 110), places)[0] for places in (range(2), range(2, 4))]
    for at in range(10):
        for expected, got, one, two in zip(
            whole[100 + at], later[at], halves[0][at], halves[1][at], strict=True
        ):
            np.testing.assert_array_equal(got, expected)
            np.testing.assert_array_equal(np.concatenate([one, two]), expected)


def test_crops_come_from_the_image_in_all_eight_orientations(tmp_path):
    image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    draws = sampler_of(tmp_path, image, grey=0.0, crop=16)
    drawn = {
        np.rint(draws.sample(step=s, place=0, crop=16)[1] * 255).astype(np.uint8).tobytes()
        for s in range(100)
    }
    turns = [np.rot90(image, k) for k in range(4)]
    assert drawn == {each.tobytes() for turn in turns for each in (turn, turn[:, ::-1])}
    plain = sampler_of(tmp_path, image, grey=0.0, crop=16, augment="none")
    for step in range(20):
        _, clean = plain.sample(step=step, place=0, crop=16)
        np.testing.assert_allclose(clean * 255, image, atol=1e-3)


def test_reduced_crops_see_more_of_the_image(tmp_path):
    ramp = np.repeat(np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 4, 64, 0), 3, 2)
    draws = sampler_of(tmp_path, ramp, grey=0.0, augment="scale", crop=32)
    spans = [np.ptp(draws.sample(step=s, place=0, crop=32)[1]) * 255 / 4 for s in range(50)]
    assert min(spans) == pytest.approx(31, abs=2)
    assert max(spans) > 45


def test_a_turned_image_keeps_its_middle_and_its_size():
    image = np.zeros((28, 28, 1), np.float32)
    image[10:18, 10:18] = 1.0
    same = Affine(0.0, 1.0, (0.0, 0.0)).apply(image)
    np.testing.assert_allclose(same, image, atol=1e-6)
    moved = Affine(0.0, 1.0, (2.0, -1.0)).apply(image)
    np.testing.assert_allclose(moved, np.roll(image, (2, -1), (0, 1)), atol=1e-6)
    large = Affine(8.0, 1.1, (0.0, 0.0)).apply(image)
    assert large.sum() == pytest.approx(image.sum() * 1.21, rel=0.05)


def test_words_of_augmentation():
    assert parse_augment("flip, rotate90") == ("flip", "rotate90")
    assert parse_augment("none") == ()
    with pytest.raises(
        UsageError, match=r"'rotate' ?: expected some of .* Did you mean 'rotate90'"
    ):
        parse_augment("rotate")


def test_larger_images_are_drawn_more_often_by_the_root_of_their_pixels(tmp_path):
    small, large = np.zeros((20, 20, 3), np.uint8), np.full((60, 60, 3), 255, np.uint8)
    draws = sampler_of(tmp_path, small, large, grey=0.0, crop=4)
    bright = [draws.sample(step=s, place=0, crop=4)[1].mean() for s in range(1000)]
    assert np.mean(bright) == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 1000))


def test_grey_crops_have_one_luma_and_one_noise(tmp_path):
    draws = sampler_of(tmp_path, picture(), grey=1.0)
    for values in draws.sample(step=0, place=0, crop=16):
        np.testing.assert_array_equal(values[..., 0], values[..., 2])
    draws = sampler_of(tmp_path, picture(), grey=0.3)
    coloured = [draws.sample(step=s, place=0, crop=8)[0] for s in range(300)]
    share = np.mean([np.array_equal(c[..., 0], c[..., 1]) for c in coloured])
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 300))


@pytest.mark.parametrize("side", [48, 1000])
def test_a_grey_image_has_one_noise_for_all_channels(tmp_path, side):
    draws = sampler_of(tmp_path, picture(side, side)[..., 0], grey=0.0, augment="flip,scale")
    held = validation_pairs(draws.pictures, draws, noise=draws.noise, side=32, stride=16)
    for noisy, clean in (*held, *(draws.sample(step=s, place=0, crop=32) for s in range(20))):
        assert noisy.shape == clean.shape == (32, 32, 3)
        assert not np.array_equal(noisy, clean)
        np.testing.assert_array_equal(noisy[..., :1].repeat(3, axis=2), noisy)


def test_validation_pairs_are_the_middle_with_noise_of_their_own(folder, data):
    draws = sampler_once(folder)
    pairs = validation_pairs(
        data.validation, draws, noise=parse_noise("gaussian:25"), side=40, stride=16
    )
    again = validation_pairs(
        data.validation, draws, noise=parse_noise("gaussian:25"), side=40, stride=16
    )
    (noisy, clean), (same, _) = pairs[0], again[0]
    np.testing.assert_array_equal(noisy, same)
    assert clean.shape == (32, 32, 3)
    image, _ = draws.library.get(data.validation[0])
    np.testing.assert_allclose(clean * 255, image[8:40, 16:48], atol=1e-3)
    assert (noisy - clean).std() * 255 == pytest.approx(25, rel=0.1)


def test_prefetch_keeps_the_order_hands_on_errors_and_stops():
    made = []

    def source():
        for number in range(1000):
            made.append(number)
            yield number

    assert list(prefetch(iter([1, 2, 3]))) == [1, 2, 3]
    ahead = prefetch(source(), depth=2)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    ahead.close()
    count = len(made)
    assert count <= 8
    time.sleep(0.1)
    assert len(made) == count
    busy, finished = threading.Event(), []

    def slow():
        yield 0
        busy.set()
        time.sleep(0.2)
        finished.append(1)
        yield 1

    # What is under way when it is closed comes to its end: the next stage has the same sampler.
    ahead = prefetch(slow())
    next(ahead)
    busy.wait()
    ahead.close()
    assert finished == [1]

    def broken():
        yield 1
        raise UsageError("broken")

    failing = prefetch(broken())
    assert next(failing) == 1
    with pytest.raises(UsageError, match="broken"):
        next(failing)


def test_samples_show_what_is_clean_with_figures_or_neither(monkeypatch):
    names = []
    show = curves._show

    def watch(panel, name, values, *, clean):
        show(panel, name, values, clean=clean)
        names.append(panel.get_xlabel().split(",")[0])

    monkeypatch.setattr(curves, "_show", watch)
    noisy, clean = (np.full((16, 16, 3), v, np.float32) for v in (0.6, 0.5))
    for target, expected in (
        (clean, ["noisy: 20.00 dB", "denoised: 20.00 dB", "clean"]),
        (None, ["noisy", "denoised"]),
    ):
        names.clear()
        png = curves.draw_samples([(noisy, target, noisy)], title="A step")
        assert names == expected
        assert Image.open(io.BytesIO(png)).width == 250 * len(names)


# --- schedule


def test_stages_begin_at_their_share():
    stages = (Stage(0.0, 64, 8), Stage(0.6, 96, 8), Stage(0.85, 128, 8))
    crops = [stage_at(stages, f).crop for f in (0.0, 0.59, 0.6, 0.84, 0.85, 1.0)]
    assert crops == [64, 64, 96, 96, 128, 128]


def test_progress_is_counted_in_steps_or_in_hours():
    assert Progress(step=6).fraction(config(steps=24)) == 0.25
    assert Progress(step=60).fraction(config(steps=24)) == 1.0
    by_hours = config(steps=None, hours=2.0)
    assert Progress(step=999, seconds=1800.0).fraction(by_hours) == 0.25
    assert Progress(seconds=9999.0).fraction(by_hours) == 1.0


def test_the_rate_warms_up_to_the_peak_and_falls_as_a_cosine_to_zero():
    recipe, settings = PRESETS["unet-s"], config(steps=10_000)

    def rate(step, **more):
        return learning_rate(recipe, config(steps=10_000, **more), Progress(step=step))

    peak, warm = recipe.learning_rate, recipe.warmup_steps
    assert rate(0) == pytest.approx(peak / warm, rel=1e-6)
    assert rate(warm // 2 - 1) == pytest.approx(peak / 2, rel=1e-3)
    assert rate(5000) == pytest.approx(peak / 2)
    assert rate(2500) == pytest.approx(peak * (0.5 + math.sqrt(0.5) / 2))
    assert rate(10_000) == pytest.approx(0.0, abs=1e-12)
    assert rate(5000, learning_rate=0.5) == pytest.approx(0.25)
    rates = [learning_rate(recipe, settings, Progress(step=s)) for s in range(warm, 10_000, 50)]
    assert rates == sorted(rates, reverse=True)


def test_a_short_training_warms_up_over_a_tenth_of_it_unless_told_otherwise():
    def rate(steps, **more):
        settings = config(steps=steps, schedule="constant", **more)
        recipe = replace(PRESETS["unet-s"], schedule="constant", warmup_steps=200)
        return learning_rate(recipe, settings, Progress(step=0)) / recipe.learning_rate

    assert rate(100) == pytest.approx(1 / 10)
    assert rate(5) == 1.0
    assert rate(10_000) == rate(100, warmup_steps=200) == pytest.approx(1 / 200)


def test_the_rate_falls_where_the_loss_stands_still():
    recipe = classic(
        "dense", "", crop=28, batch=4, arguments={}, default_halo=0, schedule="plateau",
        plateau=Plateau(0.5, 2, 3e-4),
    )  # fmt: skip
    settings, progress = config(), Progress(step=50)
    losses = [1.0, 0.9, 0.95, 0.95, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]
    rates = []
    for loss in losses:
        note_validation(progress, loss, recipe, settings)
        rates.append(learning_rate(recipe, settings, progress))
    assert rates == pytest.approx([1e-3] * 3 + [5e-4] * 3 + [3e-4] * 5)
    assert not progress.stopped
    # A peak below the floor stays: nothing raises the rate.
    settings, progress = config(learning_rate=1e-4), Progress(step=50, best_loss=0.0)
    for _ in range(4):
        note_validation(progress, 1.0, recipe, settings)
    assert learning_rate(recipe, settings, progress) == pytest.approx(1e-4)


def test_training_ends_early_where_the_loss_stands_still():
    progress, settings = Progress(step=5), config(early_stop=3)
    best = [note_validation(progress, loss, TINY, settings) for loss in (1.0, 0.5, 0.6, 0.5, 0.7)]
    assert best == [True, True, False, False, False]
    assert progress.fraction(settings) == 1.0
    assert progress.best_loss == 0.5


def test_a_validation_loss_that_is_not_finite_is_never_the_best(data, monkeypatch):
    trainer = Trainer(config(steps=3, validate_steps=1), TINY, data)
    losses = iter([(-math.inf, 50.0), (math.nan, math.nan), (math.inf, 10.0)])
    monkeypatch.setattr(trainer, "measure", lambda: next(losses))
    assert [metrics["best"] for metrics, _ in run(trainer)] == [0.0, 0.0, 0.0]
    assert trainer.progress.best_loss == math.inf


def test_epochs_become_steps_and_validations(folder):
    plan = prepare(
        config(data=(str(folder),), steps=None, validate_steps=None, epochs=2.5, batch=4),
        replace(TINY, order="epochs"),
    )
    assert (plan.config.steps, plan.config.validate_steps) == (5, 2)
    draws = prepare(config(data=(str(folder),), steps=None, epochs=1), TINY)
    assert draws.config.steps == steps_of_epoch(TINY, draws.data) == 18
    with pytest.raises(UsageError, match="unet-s has no length of its own: give --hours H"):
        prepare(config(data=(str(folder),), steps=None, crop=32))
    own = prepare(config(data=(str(folder),), steps=None, preset="photo-conv", crop=32))
    assert own.config.steps == 50 * 3


def test_settings_go_before_the_recipe(folder):
    plan = prepare(
        config(
            data=(str(folder),), loss="charbonnier", optimizer="adamw", ema=0.5, crop=8, batch=2,
            batch_scale=3, noise=("poisson:100", "gaussian:5+clip"), grey=1.0,
        ),
        TINY,
    )  # fmt: skip
    recipe = plan.preset
    assert (recipe.loss, recipe.optimizer, recipe.ema) == ("charbonnier", "adamw", 0.5)
    assert recipe.stages == (Stage(0.0, 8, 6), Stage(0.5, 8, 6))
    assert parse_noise(recipe.noise) == parse_noise(["poisson:100", "gaussian:5+clip"])
    assert (
        prepare(config(data=(str(folder),), optimizer="adadelta"), TINY).preset.learning_rate == 1
    )


def test_self_supervised_training_interpolates_no_noise(tmp_path):
    for number in range(2):
        write(tmp_path / f"{number}.png", picture(28, 28, seed=number)[..., 0])
    settings = {"data": (str(tmp_path),), "preset": "mnist-conv"}
    assert prepare(config(**settings)).preset.augment == "affine"
    noisy = prepare(config(**settings, self_supervised="noise2void"))
    assert (noisy.preset.augment, noisy.preset.loss) == ("none", "mse")
    draws = Sampler.make(noisy.data.training, noisy.config, noisy.preset)
    assert draws.augment == ()
    with pytest.raises(
        UsageError, match=r"--grey 0\.5: images of --preset mnist-conv are grey alr"
    ):
        prepare(config(**settings, grey=0.5))


def test_validations_come_by_the_minutes_that_are_stated(folder, data):
    length = {"data": (str(folder),), "steps": None, "validate_steps": None, "epochs": 2}
    assert prepare(config(**length), TINY).config.validate_steps == 18
    timed = prepare(config(**length, validate_minutes=3.0), TINY).config
    assert (timed.steps, timed.validate_steps) == (36, None)
    for minutes, due in ((3.0, 180.0), (None, 600.0)):
        trainer = Trainer(replace(timed, validate_minutes=minutes), TINY, data)
        assert trainer._validation_due(due)
        assert not trainer._validation_due(due - 1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("l1", 0.25),
        ("mse", 0.0625),
        ("charbonnier", math.sqrt(0.0625 + 1e-6)),
        ("crossentropy", -(0.5 * math.log(0.75) + 0.5 * math.log(0.25))),
    ],
)
def test_losses_have_their_known_values(name, value):
    got = loss_function(name)(np.float32([0.75]), np.float32([0.5]))
    assert float(got[0]) == pytest.approx(value, rel=1e-5)


def test_psnr_is_of_8_bits():
    clean = np.full((4, 4, 3), 100 / 255, np.float32)
    assert psnr_of(clean + 0.4 / 255, clean) == pytest.approx(120)
    assert psnr_of(clean + 5.4 / 255, clean) == pytest.approx(20 * math.log10(255 / 5), abs=1e-3)
    assert psnr_of(clean + 9, clean) == pytest.approx(20 * math.log10(255 / 155), abs=1e-3)


# --- training


def test_the_loss_goes_down_and_the_psnr_up(data):
    settings = config(steps=150, validate_steps=50)
    recipe = replace(TINY, noise="gaussian:25")
    trainer = Trainer(settings, recipe, data)
    reports = run(trainer)
    losses = [metrics["loss"] for metrics, _ in reports]
    psnrs = [metrics["psnr"] for metrics, _ in reports]
    assert len(reports) == 3
    assert losses[1] < 0.9 * losses[0]
    assert psnrs[-1] > np.mean([psnr_of(*pair) for pair in trainer.held_out]) + 2.0
    assert reports[-1][0]["best"] == 1.0


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adadelta"])
def test_a_schedule_reports_and_counts(data, optimizer):
    trainer = Trainer(config(weight_decay=0.1), replace(TINY, optimizer=optimizer), data)
    before = trainer.model.get_weights()
    reports = run(trainer)
    after = trainer.model.get_weights()
    assert not any(np.array_equal(*pair) for pair in zip(before, after, strict=True))
    assert type(trainer.optimizer).__name__.lower() == optimizer
    assert [save for _, save in reports] == [True, True]
    assert all(math.isfinite(value) for metrics, _ in reports for value in metrics.values())
    assert set(reports[0][0]) == {"loss", "val_loss", "psnr", "rate", "best"}
    assert trainer.progress.step == 24
    assert trainer.progress.pixels == 12 * 4 * 16**2 + 12 * 2 * 32**2
    assert trainer.progress.seconds > 0
    assert run(trainer) == []


def test_each_report_has_the_mean_loss_since_the_last(data, monkeypatch):
    trainer = Trainer(config(steps=8, validate_steps=4), TINY, data)
    monkeypatch.setattr(trainer, "_checkpoint_due", lambda _: trainer.progress.step == 2)
    step, losses = trainer.train_step, []

    def kept(*batch, fraction):
        losses.append(step(*batch, fraction=fraction))
        return losses[-1]

    monkeypatch.setattr(trainer, "train_step", kept)
    told = [metrics["loss"] for metrics, _ in run(trainer)]
    parts = losses[:2], losses[2:4], losses[4:]
    assert told == [pytest.approx(np.mean(part)) for part in parts]


def test_the_seed_decides_the_first_weights(data):
    first, again, other = (
        Trainer(config(seed=seed), TINY, data).model.get_weights() for seed in (0, 0, 1)
    )
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))


def stop_at(step):
    """A report function that saves the state at `step` and then dies as a killed run does."""

    class Killed(BaseException):
        pass

    def start(trainer, folder):
        def report(_metrics, _save):
            if trainer.progress.step == step:
                trainer.save_state(folder)
                raise Killed

        with pytest.raises(Killed):
            trainer.run(report)

    return start


def test_a_resumed_run_ends_with_the_weights_of_one_never_stopped(data, tmp_path):
    settings = config(steps=24, validate_steps=6)
    whole = Trainer(settings, TINY, data)
    reports = run(whole)
    stop_at(6)(Trainer(settings, TINY, data), tmp_path)
    resumed = Trainer(settings, TINY, data)
    resumed.load_state(tmp_path)
    assert resumed.progress.step == 6
    later = run(resumed)
    assert resumed.progress.step == whole.progress.step == 24
    assert resumed.progress.pixels == whole.progress.pixels
    for got, expected in zip(
        [*resumed.model.get_weights(), *resumed.ema],
        [*whole.model.get_weights(), *whole.ema],
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, atol=1e-4)
    assert later[-1][0]["psnr"] == pytest.approx(reports[-1][0]["psnr"], abs=0.01)


def test_a_resumed_run_goes_on_with_the_dropout_of_one_never_stopped(tmp_path):
    for seed in range(4):
        write(tmp_path / f"{seed}.png", picture(8, 8, seed=seed)[..., 0])
    arguments = {"size": (8, 8), "channels": 1, "widths": (4,), "latent": 8, "dropout": 0.5}
    recipe = classic("dense", "", crop=8, batch=2, arguments=arguments, default_halo=0, xla=False)
    settings = config(data=(str(tmp_path),), steps=12, validate_steps=6)
    data = TrainingData.index(settings, recipe)
    whole = Trainer(settings, recipe, data)
    run(whole)
    stop_at(6)(Trainer(settings, recipe, data), tmp_path / "state")
    resumed, forgetful = Trainer(settings, recipe, data), Trainer(settings, recipe, data)
    resumed.load_state(tmp_path / "state")
    # As states were before they had the seeds.
    with np.load(tmp_path / "state" / "state.npz") as arrays:
        old = {name: arrays[name] for name in arrays.files if name[0] != "s"}
        assert len(old) < len(arrays.files)
    np.savez(tmp_path / "state" / "state.npz", **old)
    forgetful.load_state(tmp_path / "state")
    for trainer in (resumed, forgetful):
        run(trainer)

    def distance(trainer):
        pairs = zip(trainer.model.get_weights(), whole.model.get_weights(), strict=True)
        return max(float(np.abs(a - b).max()) for a, b in pairs)

    assert distance(resumed) < 1e-5 < 1e-4 < distance(forgetful)


def test_what_is_kept_has_the_steps_since_the_average_was_last_updated(data):
    trainer = Trainer(config(steps=11, validate_steps=5), TINY, data)
    first = trainer.model.get_weights()
    kept = []
    trainer.run(lambda *_: kept.append((trainer.best_weights(), trainer.model.get_weights())))

    def distance(weights, others):
        return math.sqrt(
            sum(float(np.sum((a - b) ** 2)) for a, b in zip(weights, others, strict=True))
        )

    # Steps 5, 10 and 11: the average follows the weights, though its own updates come every eighth.
    assert len(kept) == 3
    for averaged, weights in kept:
        assert 0 < distance(averaged, weights) < 0.5 * distance(weights, first)
    assert distance(kept[2][0], trainer.ema) > 0


def test_a_state_comes_back_exactly(data, tmp_path):
    trainer = Trainer(config(steps=12, validate_steps=6), TINY, data)
    run(trainer)
    trainer.progress.best_psnr = -math.inf
    trainer.save_state(tmp_path)
    other = Trainer(config(steps=12, seed=3), TINY, data)
    other.load_state(tmp_path)
    assert other.progress == trainer.progress
    mine = [*other.model.get_weights(), *other.ema, *(v.numpy() for v in other.optimizer.variables)]
    its = [
        *trainer.model.get_weights(),
        *trainer.ema,
        *(v.numpy() for v in trainer.optimizer.variables),
    ]
    for got, expected in zip(mine, its, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_run_that_stopped_early_goes_on_where_it_may_wait_longer(data, tmp_path):
    trainer = Trainer(config(), TINY, data)
    trainer.progress = Progress(step=4, waited=3, stopped=True)
    trainer.save_state(tmp_path)
    for early_stop, stopped in ((None, False), (5, False), (3, True)):
        other = Trainer(config(early_stop=early_stop), TINY, data)
        other.load_state(tmp_path)
        assert other.progress.stopped is stopped


def test_losses_over_other_held_out_images_are_not_compared(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    trainer = Trainer(config(), TINY, index(folder))
    trainer.progress = Progress(step=4, best_loss=0.1, best_psnr=30.0, waited=3, waited_rate=2)
    trainer.save_state(tmp_path)
    for held, others in ((None, False), (moved / "0.png", True)):
        named = {} if held is None else {"validation_data": (str(held),)}
        settings = config(early_stop=3, **named)
        resumed = Trainer(settings, TINY, index(moved, **named))
        assert resumed.load_state(tmp_path) is others
        expected = Progress(step=4) if others else replace(trainer.progress, stopped=False)
        assert resumed.progress == expected


def begun(folder, output, **settings) -> None:
    """Leave what a training with these settings leaves in its output."""
    plan = prepare(config(data=(str(folder),), output=str(output), **settings), TINY)
    output.mkdir()
    (output / "history.csv").touch()
    (output / "train.json").write_text(json.dumps(as_dict(plan.config)))


def test_a_training_is_resumed_as_the_same_task(folder, tmp_path):
    output = tmp_path / "run"
    begun(folder, output, noise=("gaussian:25",), crop=16)
    moved = shutil.copytree(folder, tmp_path / "moved")

    def resume(**changes):
        same = {"noise": ("gaussian:25",), "crop": 16, **changes}
        prepare(config(data=(str(moved),), output=str(output), resume=True, **same), TINY)

    resume(steps=99, learning_rate=1e-4, workers=2, batch=8, clip_norm=0.01, early_stop=3)
    for changes, differing in (
        ({"seed": 7}, r"--seed \(0, now 7\)"),
        (
            {"preset": "unet-xs", "noise": ("clean", "jpeg:50")},
            r"--preset \(unet-s, now unet-xs\), --noise \(gaussian:25, now clean jpeg:50\)",
        ),
        ({"noise": ()}, r"--noise \(gaussian:25, now not given\)"),
        ({"loss": "mse"}, r"--loss \(not given, now mse\)"),
        ({"validation_data": (str(folder),)}, "--validation-data"),
    ):
        sentence = f"run was begun with another {differing}.*: give what it was, or another --outp"
        with pytest.raises(UsageError, match=sentence):
            resume(**changes)


def test_the_layout_of_a_state_stays(data, tmp_path):
    """Runs that were begun with an earlier version go on with a later one."""
    trainer = Trainer(config(), TINY, data)
    trainer.save_state(tmp_path)
    with np.load(tmp_path / "state.npz") as arrays:
        names = set(arrays.files)
    count = len(trainer.model.get_weights())
    expected = {f"{kind}{i:04d}" for kind in "we" for i in range(count)}
    # Adam: step count, rate and two moments of each weight.
    expected |= {f"o{i:04d}" for i in range(2 + 2 * count)}
    assert names == expected
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert set(progress) >= {"step", "pixels", "seconds", "best_psnr", "best_loss"}
    (tmp_path / "progress.json").write_text(
        '{"step": 7, "pixels": 70, "seconds": 1.5, "best_psnr": 30.0}'
    )
    trainer.load_state(tmp_path)
    assert trainer.progress == Progress(7, 70, 1.5, best_psnr=30.0)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "json", "keys", "preset"])
def test_a_damaged_state_is_refused_and_changes_nothing(data, tmp_path, damage):
    Trainer(config(), TINY, data).save_state(tmp_path)
    state, progress = tmp_path / "state.npz", tmp_path / "progress.json"
    preset = TINY
    if damage == "missing":
        state.unlink()
    elif damage == "empty":
        state.write_bytes(b"")
    elif damage == "cut":
        state.write_bytes(state.read_bytes()[:-100])
    elif damage == "json":
        progress.write_text("{")
    elif damage == "keys":
        progress.write_text('{"stepp": 1}')
    else:
        preset = Preset(
            **{
                **{n: getattr(TINY, n) for n in Preset.__slots__},
                "arguments": {"widths": (4, 6), "blocks": (1, 1), "channels": 3},
            }
        )
    trainer = Trainer(config(), preset, data)
    before = trainer.model.get_weights()
    with pytest.raises(CheckpointError, match="no checkpoint of this preset"):
        trainer.load_state(tmp_path)
    assert trainer.progress == Progress()
    for got, expected in zip(trainer.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_loss_that_is_not_finite_ends_the_run(data):
    trainer = Trainer(config(), TINY, data)
    trainer.model.set_weights([np.full_like(w, np.nan) for w in trainer.model.get_weights()])
    with pytest.raises(RunFailed, match=r"loss became nan at step 0\. The last checkpoint is good"):
        run(trainer)


def test_weights_that_the_last_step_broke_are_never_kept(data):
    trainer = Trainer(config(steps=2, validate_steps=1), TINY, data)
    step = trainer._step

    def breaking(*arguments):
        loss = step(*arguments)
        trainer.model.set_weights([np.full_like(w, np.nan) for w in trainer.model.get_weights()])
        return loss

    trainer._step = breaking
    reports = []
    with pytest.raises(RunFailed, match="weights became NaN"):
        trainer.run(lambda *report: reports.append(report))
    assert reports == []


def test_the_squared_loss_takes_over_and_stages_change(data, monkeypatch):
    trainer = Trainer(config(steps=10), TINY, data)
    calls = []
    step = trainer._step

    def watch(noisy, clean, rate, squared, fraction):
        calls.append((noisy.shape, bool(squared)))
        return step(noisy, clean, rate, squared, fraction)

    trainer._step = watch
    run(trainer)
    assert [shape for shape, _ in calls] == [(4, 16, 16, 3)] * 5 + [(2, 32, 32, 3)] * 5
    assert [squared for _, squared in calls] == [False] * 8 + [True] * 2


def test_first_weights_can_come_from_a_checkpoint(data, tmp_path):
    first = Trainer(config(), TINY, data)
    run(first)
    card = {"architecture": "unet", "arguments": dict(TINY.arguments)}
    saved = save_checkpoint(tmp_path, first.ema, card).weights()
    second = Trainer(config(), TINY, data, initial=saved)
    for got, expected in zip(second.model.get_weights(), first.ema, strict=True):
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(CheckpointError, match="--init"):
        Trainer(config(), TINY, data, initial=saved[:-1])


def test_what_does_not_fit_is_refused_before_the_first_step(folder):
    with pytest.raises(UsageError, match="--workers 3: batches of 4 crops"):
        prepare(config(data=(str(folder),), workers=3), TINY)
    with pytest.raises(UsageError, match=r"crops of 64 px do not fit into 64x48"):
        prepare(config(data=(str(folder),), crop=64), TINY)
    with pytest.raises(UsageError, match=r"--crop 31: .* multiples of 2; 32 is the next one"):
        prepare(config(data=(str(folder),), crop=31), TINY)
    with pytest.raises(UsageError, match=r"--crop 36: .* multiples of 8; 40 is the next one"):
        prepare(config(data=(str(folder),), crop=36))
    with pytest.raises(UsageError, match="--crop 20: the network takes images of 28x28 px, no oth"):
        prepare(config(data=(str(folder),), preset="mnist-latent16", crop=20))
    with pytest.raises(UsageError, match="--weight-decay: expected a number from 0"):
        config(weight_decay=math.inf)


@pytest.mark.timeout(600)
def test_two_ranks_decide_alike_and_keep_one_model(tmp_path):
    for number in range(4):
        write(tmp_path / "train" / f"{number}.png", picture(seed=number))
    for rank in range(2):
        write(tmp_path / f"held{rank}" / "held.png", picture(seed=10 + rank))
    first, second = train_together(tmp_path)
    assert first["own"] != second["own"]
    assert len(first["losses"]) == 2
    assert first["losses"] == second["losses"]
    assert first["losses"][-1] == pytest.approx(first["own"], rel=1e-5)
    assert first["best"] == second["best"]
    # The third step is a checkpoint between validations.
    assert first["steps"] == second["steps"] == [3, 4, 6]
    # The norm of the gradients' sum is bounded, and nothing sums them once more.
    expected = CLIP_NORM**2 * (1 - 0.999**STEPS)
    assert [rank["squares"] for rank in (first, second)] == pytest.approx([expected] * 2, rel=1e-3)
    # Statistics of the batch normalisations, of which each rank saw other crops.
    assert min(first["moved"]) > 0
    for mine, its in zip(first["weights"], second["weights"], strict=True):
        np.testing.assert_array_equal(mine, its)


@pytest.mark.parametrize(
    ("gpus", "seen", "way"),
    [(1.0, True, "NCCL"), (1.0, False, "RING"), (0.5, True, "RING"), (0.0, True, "RING")],
)
def test_gradients_go_by_nccl_where_every_worker_has_a_gpu_of_its_own(gpus, seen, way):
    assert communication(gpus, seen=seen) == way
    assert communication(None, seen=seen) == "RING"


@pytest.mark.parametrize("mode", ["neighbor2neighbor", "noise2void"])
def test_noisy_images_alone_teach_something(tmp_path, mode):
    rng = np.random.default_rng(0)
    for seed in range(5):
        noisy = picture(seed=seed) + rng.normal(0, 30, (48, 64, 3))
        write(tmp_path / f"{seed}.png", np.clip(noisy, 0, 255).astype(np.uint8))
    settings = config(data=(str(tmp_path),), steps=120, self_supervised=mode, crop=16, batch=8)
    plan = prepare(settings, TINY)
    trainer = Trainer(plan.config, plan.preset, plan.data)
    run(trainer)
    clean = picture(seed=9)[None] / np.float32(255)
    noisy = clean + rng.normal(0, 30 / 255, clean.shape).astype(np.float32)
    trainer.model.set_weights(trainer.ema)
    output = trainer._predict(noisy).numpy()
    assert psnr_of(output, clean) > psnr_of(noisy, clean) + 2.0
