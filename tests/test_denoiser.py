"""Denoiser: patched equals whole, and a result depends on its own image alone."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from denoise_core.checkpoints import load_checkpoint, save_checkpoint
from denoise_core.denoiser import Denoiser, Geometry, Part, resolve_geometry
from denoise_core.errors import ImageError, UsageError
from denoise_core.images import data_range
from denoise_core.models import architecture, build_model

ARGUMENTS = {"widths": [4, 6, 8], "blocks": [1, 1, 2], "channels": 3}
MODULE = architecture("unet")
STRIDE = MODULE.total_stride(**ARGUMENTS)
EXACT = Geometry(patch=32, halo=MODULE.exact_halo(**ARGUMENTS), stride=STRIDE)
WHOLE = Geometry(patch=4096, halo=0, stride=STRIDE)
CARD = {
    "architecture": "unet",
    "arguments": ARGUMENTS,
    "total_stride": STRIDE,
    "default_halo": 8,
    "exact_halo": EXACT.halo,
}
SIZES = st.tuples(*[st.one_of(st.integers(1, 20), st.sampled_from([31, 97, 127, 139]))] * 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A U-Net of random weights whose output is about as large as its input."""
    rng = np.random.default_rng(0)
    weights = [
        rng.normal(0, 0.7 / np.sqrt(np.prod(w.shape[:-1])), w.shape).astype(np.float32)
        for w in build_model("unet", **ARGUMENTS).get_weights()
    ]
    path = tmp_path_factory.mktemp("model")
    save_checkpoint(path, weights, CARD)
    return path


@pytest.fixture(scope="module")
def make(folder):
    """Denoisers by their settings, each built once."""
    made = {}

    def get(geometry=EXACT, **settings):
        key = (geometry, *sorted(settings.items()))
        if key not in made:
            made[key] = Denoiser(
                load_checkpoint(str(folder)), geometry=geometry, precision="float32", **settings
            )
        return made[key]

    return get


def picture(height, width, channels=3, *, seed=0):
    return np.random.default_rng(seed).random((height, width, channels), dtype=np.float32)


def whole_image(denoiser, image):
    """The bare model on the whole image, mirrored to a multiple of the stride."""
    height, width, _ = image.shape
    missing = -height % STRIDE, -width % STRIDE
    padded = np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")
    return denoiser.predict(padded[None])[0, :height, :width]


@settings(max_examples=30)
@given(size=SIZES)
def test_with_the_exact_halo_patches_give_the_whole_image(make, size):
    image = picture(*size)
    (patched,) = make().denoise([image])
    expected = whole_image(make(WHOLE), image)
    assert patched.shape == image.shape
    assert patched.dtype == np.float32
    assert np.abs(expected - image).max() > 0.01
    assert np.abs(patched - expected).max() < 1e-5


def test_such_an_image_is_cut_and_a_smaller_halo_is_seen(make):
    image = picture(139, 127)
    (region,) = EXACT.regions(139, 127)
    assert len(region.patches) > 4
    (patched,) = make(Geometry(patch=32, halo=EXACT.halo - STRIDE, stride=STRIDE)).denoise([image])
    (bare,) = make(Geometry(patch=32, halo=0, stride=STRIDE)).denoise([image])
    expected = whole_image(make(WHOLE), image)
    assert np.abs(bare - expected).max() > 0.01
    assert np.abs(patched - expected).max() < np.abs(bare - expected).max()


@settings(max_examples=15)
@given(size=SIZES, region=st.sampled_from([32, 64]))
def test_regions_give_the_bytes_of_the_whole_image(make, size, region):
    image = picture(*size)
    (expected,) = make().denoise([image])
    parts = []
    for part in EXACT.regions(*size, region=region):
        y0, y1, x0, x1 = part.window(*size)
        parts.append(Part(image[y0:y1, x0:x1], part, (y0, x0), 0.0, 1.0))
    result = np.full_like(image, np.nan)
    for part, values in zip(parts, make().denoise_parts(parts), strict=True):
        y0, y1, x0, x1 = part.region.core
        result[y0:y1, x0:x1] = values
    np.testing.assert_array_equal(result, expected)


@settings(max_examples=10)
@given(sizes=st.lists(SIZES, min_size=1, max_size=8), data=st.data())
def test_bytes_do_not_depend_on_neighbours_order_or_batch_size(make, sizes, data):
    images = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    alone = [make().denoise([image])[0] for image in images]
    order = data.draw(st.permutations(range(len(images))))
    denoiser = make(batch_size=data.draw(st.sampled_from([1, 3, 8, 64])))
    for place, got in zip(order, denoiser.denoise([images[i] for i in order]), strict=True):
        np.testing.assert_array_equal(got, alone[place])


SCRIPT = """
import hashlib, sys
import numpy as np
from denoise_core.checkpoints import load_checkpoint
from denoise_core.denoiser import Denoiser
from denoise_core.devices import configure_tensorflow

configure_tensorflow(threads=int(sys.argv[2]), use_gpu=False)
denoiser = Denoiser(load_checkpoint(sys.argv[1]), precision="float32")
assert denoiser.threads == int(sys.argv[2])
rng = np.random.default_rng(0)
sides = (8, 16, 24, 32, 40, 64, 96, 128, 139)
images = [rng.random((side, side, 3), dtype=np.float32) for side in sides for _ in range(4)]
if denoiser.threads == 1:
    results = {i: denoiser.denoise([image])[0] for i, image in enumerate(images)}
else:
    order = rng.permutation(len(images))
    results = dict(zip(order, denoiser.denoise([images[i] for i in order])))
digest = hashlib.sha256(b"".join(results[i].tobytes() for i in range(len(images))))
print(digest.hexdigest())
"""


def test_bytes_do_not_depend_on_the_threads_of_an_actor_nor_on_its_batches(tmp_path):
    """With the widths of unet-s: oneDNN orders the sums of wide layers by threads and batch."""
    arguments = {"widths": [24, 48, 96, 192], "blocks": [1, 1, 1, 2], "channels": 3}
    rng = np.random.default_rng(0)
    weights = [
        rng.normal(0, 0.7 / np.sqrt(np.prod(w.shape[:-1])), w.shape).astype(np.float32)
        for w in build_model("unet", **arguments).get_weights()
    ]
    save_checkpoint(tmp_path, weights, {**CARD, "arguments": arguments, "total_stride": 8})
    digests = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path), str(threads)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        ).stdout
        for threads in (1, 3)
    ]
    assert len(digests[0].strip()) == len(hashlib.sha256().hexdigest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_channels_other_than_three_are_grey_planes(make, channels):
    image = picture(41, 67, channels)
    (result,) = make().denoise([image])
    assert result.shape == image.shape
    if channels == 3:
        expected = whole_image(make(WHOLE), image)
    else:
        planes = [np.repeat(image[..., i, None], 3, axis=2) for i in range(channels)]
        outputs = [whole_image(make(WHOLE), plane) for plane in planes]
        expected = np.stack([output.mean(axis=2) for output in outputs], axis=2)
    assert np.abs(result - expected).max() < 1e-5


def test_a_model_of_one_channel_takes_colour_plane_by_plane(tmp_path):
    arguments = {"widths": [4], "blocks": [1], "channels": 1}
    rng = np.random.default_rng(0)
    shapes = [w.shape for w in build_model("unet", **arguments).get_weights()]
    weights = [rng.normal(0, 0.2, shape).astype(np.float32) for shape in shapes]
    card = {**CARD, "arguments": arguments, "total_stride": 1, "exact_halo": 4}
    denoiser = Denoiser(save_checkpoint(tmp_path, weights, card), precision="float32")
    image = picture(20, 30)
    (colour,) = denoiser.denoise([image])
    planes = denoiser.denoise([image[..., i, None] for i in range(3)])
    np.testing.assert_array_equal(colour, np.concatenate(planes, axis=2))


def test_images_of_all_kinds_share_a_call(make):
    images = [picture(9, 70, 1), picture(40, 40, 4), picture(1, 1), picture(100, 33)]
    together = make().denoise(images)
    for image, got in zip(images, together, strict=True):
        np.testing.assert_array_equal(got, make().denoise([image])[0])
    assert make().denoise([]) == []


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_strength_blends_from_the_noisy_image_to_the_models_output(make, strength):
    image = picture(70, 50)
    (full,) = make().denoise([image])
    (blended,) = make(strength=strength).denoise([image])
    np.testing.assert_allclose(blended, image + strength * (full - image), atol=1e-6)
    if strength == 0.0:
        np.testing.assert_array_equal(blended, image)


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "int32", "float32", "float64"])
def test_a_strength_of_zero_keeps_every_bit(make, dtype):
    rng = np.random.default_rng(3)
    image = rng.integers(0, 2**31, (70, 50, 2)) / (3.0 if dtype.startswith("float") else 1)
    image = image.astype(dtype)
    denoiser = make(strength=0.0)
    (region,) = denoiser.geometry.regions(70, 50)
    part = Part(image, region, (0, 0), *data_range(image), dtype=dtype)
    (got,) = denoiser.denoise_parts([part])
    np.testing.assert_array_equal(got, image)
    second = denoiser.geometry.regions(70, 50, region=32)[-1]
    y0, y1, x0, x1 = second.window(70, 50)
    part = Part(image[y0:y1, x0:x1], second, (y0, x0), *data_range(image), dtype=dtype)
    y0, y1, x0, x1 = second.core
    np.testing.assert_array_equal(denoiser.denoise_parts([part])[0], image[y0:y1, x0:x1])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_integers_are_denoised_in_their_own_range(make, dtype):
    info = np.iinfo(dtype)
    span = float(info.max) - info.min
    image = (picture(40, 50) * span + info.min).astype(dtype)
    (result,) = make().denoise([image])
    (unit,) = make().denoise([((image.astype(np.float64) - info.min) / span).astype(np.float32)])
    assert result.dtype == np.float32
    np.testing.assert_allclose((result - info.min) / span, unit, atol=1e-5)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_part_can_ask_for_its_own_type_rounded_and_clipped(make, dtype):
    image = (picture(40, 50) * np.iinfo(dtype).max).astype(dtype)
    (region,) = EXACT.regions(40, 50)
    high = float(np.iinfo(dtype).max)
    (floats,) = make().denoise([image])
    (result,) = make().denoise_parts([Part(image, region, (0, 0), 0.0, high, dtype)])
    assert result.dtype == dtype
    assert floats.min() < 0.0
    np.testing.assert_array_equal(result, np.clip(np.rint(floats), 0, high))


@pytest.mark.parametrize(("low", "high"), [(0.0, 4095.0), (-5.0, 7.5), (1000.0, 1001.0)])
def test_a_stated_range_is_undone_on_the_way_out(make, low, high):
    image = picture(40, 50)
    (unit,) = make().denoise([image])
    moved = (image.astype(np.float64) * (high - low) + low).astype(np.float32)
    (result,) = make().denoise([moved], ranges=[(low, high)])
    precision = 1e-5 + 4 * np.spacing(np.float32(high)) / (high - low)
    np.testing.assert_allclose((result - low) / (high - low), unit, atol=precision)


def test_without_a_range_floats_beyond_0_to_1_have_their_own(make):
    image = picture(40, 50) * 300 - 20
    (result,) = make().denoise([image])
    low, high = float(image.min()), float(image.max())
    (stated,) = make().denoise([image], ranges=[(low, high)])
    np.testing.assert_array_equal(result, stated)


def test_values_outside_the_range_are_noise_and_not_clipped(make):
    """The model has no biases: an input of twice the size has an output of twice the size."""
    image = picture(40, 50) * 4 - 2
    (result,) = make().denoise([image], ranges=[(0.0, 1.0)])
    (half,) = make().denoise([image / 2], ranges=[(0.0, 1.0)])
    assert result.min() < -0.5
    assert result.max() > 1.5
    np.testing.assert_allclose(result, 2 * half, atol=1e-4)


def test_the_image_is_left_alone(make):
    image = picture(70, 50)
    before = image.copy()
    image.flags.writeable = False
    make(strength=0.5).denoise([image])
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("shape", [(8, 8), (0, 8, 3), (8, 8, 0), (1, 8, 8, 3)])
def test_arrays_of_another_shape_are_refused(make, shape):
    with pytest.raises(ValueError, match="expected \\(H, W, C\\)"):
        make().denoise([np.zeros(shape, np.float32)])


def test_predict_gives_each_image_of_a_batch_as_alone(make):
    batch = np.stack([picture(16, 24, seed=seed) for seed in range(5)])
    for place, output in enumerate(make().predict(batch)):
        np.testing.assert_array_equal(output, make().predict(batch[place : place + 1])[0])


def test_bfloat16_is_batched_and_near_float32(folder, make):
    denoiser = Denoiser(load_checkpoint(str(folder)), geometry=EXACT, precision="bfloat16")
    denoiser.warm_up()
    image = picture(70, 90)
    (got,) = denoiser.denoise([image])
    (expected,) = make().denoise([image])
    assert got.dtype == np.float32
    assert 1e-4 < np.abs(got - expected).max() < 0.1


def test_a_batch_that_the_device_has_no_memory_for_is_halved_and_those_after_it(
    folder, monkeypatch
):
    import tensorflow as tf

    denoiser = Denoiser(
        load_checkpoint(str(folder)), geometry=EXACT, precision="bfloat16", batch_size=8
    )
    images = [picture(200, 230), picture(48, 40, seed=1)]
    expected = denoiser.denoise(images)
    tried, fits = [], 2
    whole = denoiser._run

    def small_device(batch, context):
        tried.append(len(batch))
        if len(batch) > fits:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM")
        return whole(batch, context)

    monkeypatch.setattr(denoiser, "_run", small_device)
    for got, whole_batches in zip(denoiser.denoise(images), expected, strict=True):
        np.testing.assert_allclose(got, whole_batches, atol=1e-2)
    assert max(tried) == 8
    tried.clear()
    denoiser.denoise(images)
    assert max(tried) == 2
    fits = 0
    with pytest.raises(ImageError, match="no memory for one patch; use a smaller --patch"):
        denoiser.denoise(images)


def test_geometry_is_resolved_by_the_card():
    card = {**CARD, "total_stride": 8, "default_halo": 12, "exact_halo": 60}
    assert resolve_geometry(card, patch="256", halo="auto") == Geometry(256, 16, 8)
    assert resolve_geometry(card, patch="64", halo="exact") == Geometry(64, 64, 8)
    assert resolve_geometry(card, patch="512", halo="0") == Geometry(512, 0, 8)
    small, large = (
        resolve_geometry(card, patch="auto", halo="auto", memory_bytes=memory).patch
        for memory in (1 << 20, 1 << 40)
    )
    assert (small, large) == (256, 1024)
    with pytest.raises(UsageError, match="--patch 100: the model needs a multiple of 8"):
        resolve_geometry(card, patch="100", halo="auto")


SIZE = (16, 24)
DENSE = {"size": list(SIZE), "channels": 1, "widths": [4, 4], "latent": 6, "dropout": 0.0}
DENSE_CARD = {
    "architecture": "dense",
    "arguments": DENSE,
    "total_stride": 4,
    "default_halo": 0,
    "exact_halo": 0,
    "input_size": list(SIZE),
}


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    """A checkpoint of a network that takes 16x24 grey pixels and nothing else."""
    rng = np.random.default_rng(0)
    shapes = [w.shape for w in build_model("dense", **DENSE).get_weights()]
    weights = [rng.normal(0, 0.4, shape).astype(np.float32) for shape in shapes]
    return save_checkpoint(tmp_path_factory.mktemp("dense"), weights, DENSE_CARD)


def test_an_image_of_the_input_size_is_one_window(sized):
    denoiser = Denoiser(sized, precision="float32")
    denoiser.warm_up()
    image = picture(*SIZE, 1)
    assert len(denoiser.geometry.regions(*SIZE)[0].patches) == 1
    (got,) = denoiser.denoise([image])
    expected = np.asarray(sized.build()(image[None]))[0]
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("size", [(16, 5), (3, 24), (1, 1), (7, 9)])
def test_a_smaller_image_is_mirrored_to_the_input_size(sized, size):
    image = picture(*size, 1)
    (got,) = Denoiser(sized, precision="float32").denoise([image])
    missing = [(0, whole - side) for whole, side in zip(SIZE, size, strict=True)]
    padded = np.pad(image, (*missing, (0, 0)), mode="symmetric")
    expected = np.asarray(sized.build()(padded[None]))[0, : size[0], : size[1]]
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("halo", ["0", "4"])
@pytest.mark.parametrize("size", [(17, 24), (50, 70), (16, 100)])
def test_every_pixel_of_a_larger_image_is_that_of_its_window(sized, size, halo):
    geometry = resolve_geometry(sized.card, patch="256", halo=halo)
    denoiser = Denoiser(sized, geometry=geometry, precision="float32")
    image = picture(*size, 3)
    (got,) = denoiser.denoise([image])
    seen = np.zeros(size, int)
    model = sized.build()
    for patch in geometry.regions(*size)[0].patches:
        y, x = patch.y, patch.x
        assert patch.shape == SIZE
        assert (y.first % 4, x.first % 4) == (0, 0)
        for tile, side in ((y, size[0]), (x, size[1])):
            assert tile.start == 0 or tile.start - tile.first >= int(halo)
            assert tile.stop == side or tile.last - tile.stop >= int(halo)
        window = image[y.first : y.last, x.first : x.last]
        missing = [(0, SIZE[0] - window.shape[0]), (0, SIZE[1] - window.shape[1]), (0, 0)]
        window = np.pad(window, missing, mode="symmetric")
        planes = np.asarray(model(np.moveaxis(window, 2, 0)[..., None]))
        core = np.moveaxis(planes[..., 0], 0, 2)[
            y.start - y.first : y.stop - y.first, x.start - x.first : x.stop - x.first
        ]
        np.testing.assert_allclose(got[y.start : y.stop, x.start : x.stop], core, atol=1e-6)
        seen[y.start : y.stop, x.start : x.stop] += 1
    np.testing.assert_array_equal(seen, 1)


def test_with_one_input_size_regions_and_neighbours_change_no_byte(sized):
    geometry = resolve_geometry(sized.card, patch="256", halo="4")
    denoiser = Denoiser(sized, geometry=geometry, precision="float32")
    images = [picture(90, 70, 1), picture(16, 24, 1), picture(5, 40, 3)]
    alone = [denoiser.denoise([image])[0] for image in images]
    for got, expected in zip(denoiser.denoise(images), alone, strict=True):
        np.testing.assert_array_equal(got, expected)
    result = np.full((90, 70, 1), np.nan, np.float32)
    for region in geometry.regions(90, 70, region=32):
        y0, y1, x0, x1 = region.window(90, 70)
        part = Part(images[0][y0:y1, x0:x1], region, (y0, x0), 0.0, 1.0)
        y0, y1, x0, x1 = region.core
        (result[y0:y1, x0:x1],) = denoiser.denoise_parts([part])
    np.testing.assert_array_equal(result, alone[0])


@pytest.mark.parametrize(("low", "high"), [(0.0, 255.0), (-1.0, 1.0)])
def test_a_model_sees_the_range_of_its_card(sized, low, high):
    from dataclasses import replace

    checkpoint = replace(sized, card={**sized.card, "data_range": [low, high]})
    image = np.random.default_rng(0).integers(0, 65536, (*SIZE, 1), dtype=np.uint16)
    (got,) = Denoiser(checkpoint, precision="float32").denoise([image])
    seen = image / np.float32(65535) * np.float32(high - low) + np.float32(low)
    expected = (np.asarray(sized.build()(seen[None]))[0] - low) / (high - low)
    np.testing.assert_allclose(got / 65535, expected, atol=1e-5)


def test_a_patch_that_nobody_gave_is_rounded_up_to_the_stride():
    card = {"total_stride": 3, "default_halo": 4, "exact_halo": 9, "arguments": {"channels": 3}}
    assert resolve_geometry(card, patch="256", halo="auto") == Geometry(258, 6, 3)
    assert resolve_geometry(card, patch="auto", halo="auto").patch == 513
    assert resolve_geometry(card, patch="99", halo="auto").patch == 99
    with pytest.raises(UsageError, match=r"--patch 512: the model needs a multiple of 3"):
        resolve_geometry(card, patch="512", halo="auto")


def test_geometry_of_one_input_size():
    assert resolve_geometry(DENSE_CARD, patch="256", halo="auto") == Geometry(16, 0, 4, SIZE)
    assert resolve_geometry(DENSE_CARD, patch="auto", halo="3") == Geometry(8, 4, 4, SIZE)
    assert resolve_geometry(DENSE_CARD, patch="8", halo="4") == Geometry(8, 4, 4, SIZE)
    with pytest.raises(UsageError, match=r"--patch 64: the model takes 16x24 pixels and no other"):
        resolve_geometry(DENSE_CARD, patch="64", halo="auto")
    with pytest.raises(UsageError, match=r"--halo 8: .* leave no core; expected at most 4"):
        resolve_geometry(DENSE_CARD, patch="256", halo="7")
