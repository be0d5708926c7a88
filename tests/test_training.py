"""Training without Ray: data by (seed, step, place), schedule, learning, resume, failure."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from denoise_core.checkpoints import save_checkpoint
from denoise_core.config import TrainConfig
from denoise_core.errors import CheckpointError, RunFailed, UsageError
from denoise_core.noise import parse_noise
from denoise_core.presets import PRESETS, Preset, Stage
from denoise_core.training import Progress, Trainer, learning_rate, stage_at, validation_psnr
from denoise_core.training_data import (
    CleanImages,
    CropSampler,
    check_images,
    find_images,
    load_clean,
    prefetch,
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


@pytest.fixture(scope="module")
def images():
    return CleanImages([picture(seed=seed) for seed in range(6)], [picture(seed=9)])


def sampler(images, *, seed=0, grey=0.2) -> CropSampler:
    return CropSampler(images, parse_noise("gaussian:0-55"), grey, seed)


def run(trainer) -> list[tuple[dict[str, float], bool]]:
    reports = []
    trainer.run(lambda metrics, save: reports.append((dict(metrics), save)))
    return reports


# --- data


def test_images_are_found_sorted_and_by_ending(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "folder.png").mkdir()
    for name in ("b/2.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    found = find_images([str(tmp_path), str(tmp_path / "a.jpg")])
    assert [path.name for path in found] == ["a.jpg", "2.PNG", "a.jpg"]
    with pytest.raises(UsageError, match=r"No images found in .*none.*: expected .*\.png"):
        find_images([str(tmp_path / "none")])


def write(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path)
    return path


def test_images_are_loaded_as_8_bit_rgb(tmp_path):
    grey = write(tmp_path / "grey.png", picture()[..., 0])
    (loaded,) = load_clean(grey)
    assert loaded.shape == (48, 64, 3)
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded[..., 1], picture()[..., 0])
    deep = np.array([[0, 128, 129, 65535, 32767]], np.uint16)
    (rounded,) = load_clean(write(tmp_path / "deep.png", deep))
    assert rounded[0, :, 0].tolist() == [0, 0, 1, 255, 127]


def test_large_images_also_enter_at_half_their_size(tmp_path):
    path = write(tmp_path / "large.png", picture(1000, 1200))
    assert [image.shape for image in load_clean(path)] == [(1000, 1200, 3), (500, 600, 3)]


def test_files_that_cannot_be_trained_on_are_named(tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UsageError, match=r"cut\.png"):
        load_clean(tmp_path / "cut.png")
    with pytest.raises(UsageError, match=r"cut\.png"):
        check_images([tmp_path / "cut.png"], crop=8)
    np_file = tmp_path / "floats.tiff"
    Image.fromarray(np.zeros((8, 8), np.float32)).save(np_file)
    with pytest.raises(UsageError, match=r"floats\.tiff: training takes 8- or 16-bit"):
        load_clean(np_file)


def test_small_images_are_named_by_their_headers(tmp_path):
    paths = [write(tmp_path / f"{side}.png", picture(side, 64)) for side in (32, 31)]
    check_images(paths[:1], crop=32)
    with pytest.raises(UsageError, match=r"31\.png: crops of 32 px do not fit into 64x31"):
        check_images(paths, crop=32)


def test_validation_images_are_held_out_by_the_seed(tmp_path):
    paths = [write(tmp_path / f"{i}.png", picture(seed=i)) for i in range(8)]
    first, again, other = (CleanImages.load(paths, validation=0.25, seed=s) for s in (0, 0, 1))
    assert (len(first.training), len(first.validation)) == (6, 2)
    assert all(map(np.array_equal, first.validation, again.validation))
    assert not all(map(np.array_equal, first.validation, other.validation))
    held = {image.tobytes() for image in first.validation}
    assert held & {image.tobytes() for image in first.training} == set()
    with pytest.raises(UsageError, match=r"1 image\(s\) cannot be split"):
        CleanImages.load(paths[:1], validation=0.05, seed=0)


@given(seed=st.integers(0, 2**32), step=st.integers(0, 10**6), place=st.integers(0, 1000))
def test_a_sample_is_a_function_of_seed_step_and_place(images, seed, step, place):
    first = sampler(images.training, seed=seed).sample(step=step, place=place, crop=16)
    again = sampler(images.training, seed=seed).sample(step=step, place=place, crop=16)
    other = sampler(images.training, seed=seed).sample(step=step, place=place + 1, crop=16)
    for values, same in zip(first, again, strict=True):
        assert values.shape == (16, 16, 3)
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, same)
    assert not np.array_equal(first[0], other[0])
    assert 0.0 <= first[1].min() <= first[1].max() <= 1.0


def test_the_batch_of_one_worker_is_that_of_two_together(images):
    one = sampler(images.training).batch(step=5, crop=16, places=range(8))
    halves = [
        sampler(images.training).batch(step=5, crop=16, places=range(*p)) for p in ((0, 4), (4, 8))
    ]
    for whole, *parts in zip(one, *halves, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_workers_share_the_places_of_a_batch(images):
    def first_batch(rank, workers):
        trainer = object.__new__(Trainer)
        trainer.config, trainer.rank, trainer.progress = config(workers=workers), rank, Progress(7)
        trainer.sampler = sampler(images.training)
        return next(trainer._batches(TINY.stages[0]))

    (one,) = [first_batch(0, 1)]
    shares = [first_batch(rank, 2) for rank in range(2)]
    for whole, *parts in zip(one, *shares, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_crops_come_from_the_image_in_all_eight_orientations():
    image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    drawn = {
        np.rint(clean * 255).astype(np.uint8).tobytes()
        for step in range(100)
        for _, clean in [sampler([image], grey=0.0).sample(step=step, place=0, crop=16)]
    }
    turns = [np.rot90(image, k) for k in range(4)]
    assert drawn == {each.tobytes() for turn in turns for each in (turn, turn[:, ::-1])}


def test_larger_images_are_drawn_more_often_by_the_root_of_their_pixels():
    small, large = np.zeros((20, 20, 3), np.uint8), np.full((60, 60, 3), 255, np.uint8)
    draw = sampler([small, large], grey=0.0)
    bright = [draw.sample(step=s, place=0, crop=4)[1].mean() for s in range(1000)]
    assert np.mean(bright) == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 1000))


def test_grey_crops_have_one_luma_and_one_noise():
    draw = sampler([picture()], grey=1.0)
    for values in draw.sample(step=0, place=0, crop=16):
        np.testing.assert_array_equal(values[..., 0], values[..., 2])
    coloured = [
        sampler([picture()], grey=0.3).sample(step=s, place=0, crop=8)[0] for s in range(300)
    ]
    share = np.mean([np.array_equal(c[..., 0], c[..., 1]) for c in coloured])
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 300))


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
    time.sleep(0.1)
    count = len(made)
    assert count <= 8
    time.sleep(0.1)
    assert len(made) == count

    def broken():
        yield 1
        raise UsageError("broken")

    failing = prefetch(broken())
    assert next(failing) == 1
    with pytest.raises(UsageError, match="broken"):
        next(failing)


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


def test_validation_is_protocol_a():
    images = [picture(40, 600, seed=seed) for seed in range(3)]
    seen = []

    def remember(noisy):
        seen.append(noisy)
        return noisy

    psnr = validation_psnr(remember, images, stride=16)
    assert [noisy.shape for noisy in seen] == [(1, 32, 256, 3)] * 3
    clean = [image[4:36, 172:428] / 255.0 for image in images]
    expected = [
        -10 * np.log10(np.mean((np.round(np.clip(noisy[0], 0, 1) * 255) / 255 - c) ** 2))
        for noisy, c in zip(seen, clean, strict=True)
    ]
    assert psnr == pytest.approx(np.mean(expected), abs=1e-4)
    first, second = ((noisy[0] - c) for noisy, c in zip(seen[:2], clean[:2], strict=True))
    np.testing.assert_allclose(first, second, atol=1e-6)
    assert first.std() * 255 == pytest.approx(25, rel=0.02)


# --- training


def test_the_loss_goes_down_and_the_psnr_up(images):
    settings = config(steps=150, validate_steps=50, noise="gaussian:25")
    reports = run(Trainer(settings, TINY, images))
    losses = [metrics["loss"] for metrics, _ in reports]
    psnrs = [metrics["psnr"] for metrics, _ in reports]
    assert len(reports) == 3
    assert losses[1] < 0.9 * losses[0]
    noisy_psnr = validation_psnr(lambda x: x, images.validation)
    assert psnrs[-1] > noisy_psnr + 2.0


def test_a_schedule_reports_and_counts(images):
    trainer = Trainer(config(), TINY, images)
    reports = run(trainer)
    assert [save for _, save in reports] == [True, True]
    assert all(math.isfinite(value) for metrics, _ in reports for value in metrics.values())
    assert trainer.progress.step == 24
    assert trainer.progress.pixels == 12 * 4 * 16**2 + 12 * 2 * 32**2
    assert trainer.progress.seconds > 0
    assert run(trainer) == []


def test_the_seed_decides_the_first_weights(images):
    first, again, other = (
        Trainer(config(seed=seed), TINY, images).model.get_weights() for seed in (0, 0, 1)
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


def test_a_resumed_run_ends_with_the_weights_of_one_never_stopped(images, tmp_path):
    settings = config(steps=24, validate_steps=6)
    whole = Trainer(settings, TINY, images)
    reports = run(whole)
    stop_at(6)(Trainer(settings, TINY, images), tmp_path)
    resumed = Trainer(settings, TINY, images)
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


def test_a_state_comes_back_exactly(images, tmp_path):
    trainer = Trainer(config(steps=12, validate_steps=6), TINY, images)
    run(trainer)
    trainer.progress.best_psnr = -math.inf
    trainer.save_state(tmp_path)
    other = Trainer(config(steps=12, seed=3), TINY, images)
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


def test_the_layout_of_a_state_stays(images, tmp_path):
    """Runs that were begun with an earlier version go on with a later one."""
    trainer = Trainer(config(), TINY, images)
    trainer.save_state(tmp_path)
    with np.load(tmp_path / "state.npz") as arrays:
        names = set(arrays.files)
    count = len(trainer.model.get_weights())
    expected = {f"{kind}{i:04d}" for kind in "we" for i in range(count)}
    # Adam: step count, rate and two moments of each weight.
    expected |= {f"o{i:04d}" for i in range(2 + 2 * count)}
    assert names == expected
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert set(progress) == {"step", "pixels", "seconds", "best_psnr"}


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "json", "keys", "preset"])
def test_a_damaged_state_is_refused_and_changes_nothing(images, tmp_path, damage):
    Trainer(config(), TINY, images).save_state(tmp_path)
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
    trainer = Trainer(config(), preset, images)
    before = trainer.model.get_weights()
    with pytest.raises(CheckpointError, match="no checkpoint of this preset"):
        trainer.load_state(tmp_path)
    assert trainer.progress == Progress()
    for got, expected in zip(trainer.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_loss_that_is_not_finite_ends_the_run(images):
    trainer = Trainer(config(), TINY, images)
    trainer.model.set_weights([np.full_like(w, np.nan) for w in trainer.model.get_weights()])
    with pytest.raises(RunFailed, match=r"loss became nan at step 0\. The last checkpoint is good"):
        run(trainer)


def test_weights_that_the_last_step_broke_are_never_kept(images):
    trainer = Trainer(config(steps=2, validate_steps=1), TINY, images)
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


def test_the_squared_loss_takes_over_and_stages_change(images, monkeypatch):
    trainer = Trainer(config(steps=10), TINY, images)
    calls = []
    step = trainer._step

    def watch(noisy, clean, rate, squared):
        calls.append((noisy.shape, bool(squared)))
        return step(noisy, clean, rate, squared)

    trainer._step = watch
    run(trainer)
    assert [shape for shape, _ in calls] == [(4, 16, 16, 3)] * 5 + [(2, 32, 32, 3)] * 5
    assert [squared for _, squared in calls] == [False] * 8 + [True] * 2


def test_first_weights_can_come_from_a_checkpoint(images, tmp_path):
    first = Trainer(config(), TINY, images)
    run(first)
    card = {"architecture": "unet", "arguments": dict(TINY.arguments)}
    saved = save_checkpoint(tmp_path, first.ema, card).weights()
    second = Trainer(config(), TINY, images, initial=saved)
    for got, expected in zip(second.model.get_weights(), first.ema, strict=True):
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(CheckpointError, match="--init"):
        Trainer(config(), TINY, images, initial=saved[:-1])


def test_what_does_not_fit_is_refused_before_the_first_step(images):
    with pytest.raises(UsageError, match=r"Crops of 64 px do not fit: .* side of 48 px"):
        Trainer(config(), Preset("unet", TINY.arguments, 8, 1e-3, (Stage(0.0, 64, 4),)), images)
    small = CleanImages(images.training, [picture(20, 64)])
    with pytest.raises(UsageError, match=r"Crops of 32 px do not fit: .* side of 20 px"):
        Trainer(config(), TINY, small)
    with pytest.raises(UsageError, match="--workers 3: batches of 4 crops"):
        Trainer(config(workers=3), TINY, images)
