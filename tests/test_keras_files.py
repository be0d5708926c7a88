"""A user's Keras file: what it says, what is measured and computed, and that it runs nothing."""

from __future__ import annotations

import hashlib
import io
import json
import marshal
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import helpers
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from denoise_core import keras_files
from denoise_core.checkpoints import load_checkpoint
from denoise_core.denoiser import Denoiser, Geometry, resolve_geometry
from denoise_core.errors import CheckpointError, ImageError, UsageError
from denoise_core.keras_files import describe, load_model, measuring, reading
from denoise_core.keras_files.receptive import measure

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Figures of other runs and of the tester's home are none of these tests'."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "denoise-jobs" / "keras"


def conv_net(shape, channels=3):
    """Two levels with a skip: total stride 2."""
    import keras
    from keras import layers

    noisy = keras.Input(shape)
    skip = layers.Conv2D(4, 3, padding="same", activation="relu")(noisy)
    x = layers.MaxPooling2D()(skip)
    x = layers.Conv2D(6, 3, padding="same", activation="relu")(x)
    x = layers.Conv2DTranspose(4, 3, strides=2, padding="same")(x)
    x = layers.Conv2D(channels, 3, padding="same")(layers.Add()([x, skip]))
    return keras.Model(noisy, layers.Subtract()([noisy, x]))


def dense_net():
    import keras
    from keras import layers

    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Flatten(),
            layers.Dense(16, activation="relu"),
            layers.Dense(784, activation="sigmoid"),
            layers.Reshape((28, 28, 1)),
        ]
    )


def nested_net():
    """An encoder and a decoder, models themselves and compiled, computing in float16."""
    import keras
    from keras import layers

    keras.config.set_dtype_policy("mixed_float16")
    try:
        down = [keras.Input((28, 28, 1)), layers.Conv2D(4, 3, strides=2, padding="same")]
        up = [keras.Input((14, 14, 4)), layers.Conv2DTranspose(1, 3, strides=2, padding="same")]
        encoder, decoder = keras.Sequential(down), keras.Sequential(up)
        encoder.compile("adam", lambda truth, made: made)
        noisy = keras.Input((28, 28, 1))
        return keras.Model(noisy, decoder(encoder(noisy)))
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files by name, and the models that they were saved from."""
    import keras

    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("keras")
    made = {
        "fixed.keras": conv_net((32, 48, 3)),
        "free.keras": conv_net((None, None, 3)),
        "free.h5": conv_net((None, None, 1), 1),
        "dense.h5": dense_net(),
        "dense.keras": dense_net(),
        "nested.keras": nested_net(),
        "nested.h5": nested_net(),
    }
    for name, model in made.items():
        model.compile("adam", "mse")
        model.save(folder / name)
    return folder, made


# What a file says


@pytest.mark.parametrize(
    ("name", "channels", "size", "strides"),
    [
        ("fixed.keras", 3, (32, 48), (1, 2)),
        ("free.keras", 3, None, (1, 2)),
        ("free.h5", 1, None, (1, 2)),
        ("dense.h5", 1, (28, 28), (1,)),
        ("nested.keras", 1, (28, 28), (1, 2)),
    ],
)
def test_channels_and_size_are_those_of_the_input(files, name, channels, size, strides):
    found = describe(files[0] / name)
    assert (found.channels, found.input_size, found.strides) == (channels, size, strides)


def test_a_card_is_read_and_measured_without_tensorflow_and_kept(files, cache, monkeypatch):
    path = files[0] / "free.keras"
    script = (
        "import json, sys; from denoise_core.checkpoints import load_checkpoint\n"
        "card = load_checkpoint(sys.argv[1], model_range='-1:1').card\n"
        "assert not {'tensorflow', 'keras', 'ray'} & set(sys.modules)\n"
        "print(json.dumps(card))"
    )
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=DATA.parents[1])
    assert done.returncode == 0, done.stderr
    card = json.loads(done.stdout)
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (card["name"], card["input_size"], card["data_range"]) == ("free.keras", None, [-1, 1])
    assert (card["total_stride"], card["arguments"]) == (2, {"channels": 3})
    assert 2 < card["default_halo"] <= card["exact_halo"] == 6
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("measured again"))
    assert load_checkpoint(str(path), model_range="-1:1").card == card


def test_a_measurement_that_dies_is_one_sentence(files, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CheckpointError, match="ended with code 1"):
        load_checkpoint(str(files[0] / "free.keras"))


def test_another_range_in_which_it_denoises_is_suggested(tmp_path):
    import keras
    from keras import layers

    # Means of 3x3 of what it takes for bytes; below 8 of 255 it is black.
    noisy = keras.Input((None, None, 1))
    x = layers.ReLU(threshold=8.0)(layers.AveragePooling2D(3, 1, padding="same")(noisy))
    keras.Model(noisy, x).save(tmp_path / "bytes.keras")
    (note,) = measuring.measure_file(tmp_path / "bytes.keras", (0.0, 1.0))["notes"]
    assert "--model-range 0:255" in note
    assert measuring.measure_file(tmp_path / "bytes.keras", (0.0, 255.0))["notes"] == []


def test_a_model_that_gives_the_noise_or_harms_is_told(tmp_path):
    import keras
    from keras import layers

    def notes_of(model, bounds):
        model.save(tmp_path / "model.keras")
        return measuring.measure_file(tmp_path / "model.keras", bounds)["notes"]

    noisy = keras.Input((None, None, 1))
    mean = layers.AveragePooling2D(3, 1, padding="same")(noisy)
    noise = keras.Model(noisy, layers.Subtract()([noisy, mean]))
    for bounds in ((0.0, 1.0), (-1.0, 1.0)):
        (note,) = notes_of(noise, bounds)
        assert "makes a made picture worse" in note
        assert "seems to give the noise and not the picture" in note
        assert notes_of(keras.Model(noisy, mean), bounds) == []
    (note,) = notes_of(keras.Model(noisy, layers.Rescaling(0.1)(mean)), (0.0, 1.0))
    assert re.search(r"worse \(\d\.\d dB than 20\.\d dB\): is it trained.*--model-range", note)


# What is measured


def smooth(radius, padding="constant"):
    """A mean over 2 radius + 1 pixels a side, zeros beyond the border."""
    size = (1, 2 * radius + 1, 2 * radius + 1, 1)
    return lambda batch: ndimage.uniform_filter(batch, size, mode=padding)


@pytest.mark.parametrize("radius", [0, 1, 5, 12])
@pytest.mark.parametrize("size", [None, (64, 96)])
def test_the_halo_is_the_radius_of_a_known_filter(radius, size):
    found = measure(smooth(radius), channels=1, input_size=size, strides=(1, 2, 4))
    assert (found.stride, found.exact_halo, found.note) == (1, radius, "")
    assert radius / 2 <= found.default_halo <= radius


def coarse(batch, cell):
    """The mean of each cell of cell x cell pixels; None where they do not fill the picture."""
    count, height, width, channels = batch.shape
    if height % cell or width % cell:
        return None
    cells = batch.reshape(count, height // cell, cell, width // cell, cell, channels)
    return np.broadcast_to(cells.mean(axis=(2, 4), keepdims=True), cells.shape).reshape(batch.shape)


@pytest.mark.parametrize("size", [None, (48, 48)])
@pytest.mark.parametrize("cell", [2, 3, 4])
def test_the_stride_is_the_cell_of_a_known_network(cell, size):
    found = measure(
        lambda batch: coarse(batch, cell), channels=2, input_size=size, strides=(1, 2, 3, 4, 6, 12)
    )
    assert (found.stride, found.default_halo, found.exact_halo) == (cell, 0, 0)


def test_what_takes_any_size_but_has_cells_is_seen_by_its_shifts():
    def network(batch):
        height, width = batch.shape[1:3]
        padded = np.pad(batch, ((0, 0), (0, -height % 4), (0, -width % 4), (0, 0)), mode="edge")
        return coarse(padded, 4)[:, :height, :width]

    assert measure(network, channels=1, input_size=None, strides=(1, 2, 4)).stride == 4


def test_what_depends_on_everything_has_no_halo_and_says_so():
    def contrast(batch):
        mean = batch.mean(axis=(1, 2), keepdims=True)
        return mean + (batch - mean) * batch.std(axis=(1, 2), keepdims=True)

    for size in (None, (40, 40)):
        found = measure(contrast, channels=1, input_size=size, strides=(1,))
        assert "depends on the whole" in found.note
    assert found.default_halo == 0
    assert "levels of 255 where they meet" in found.note


def test_a_radius_that_leaves_no_core_is_stated_and_not_the_default():
    found = measure(smooth(20), channels=1, input_size=(64, 64), strides=(1,))
    assert found.exact_halo == 20
    assert found.default_halo <= 16
    assert "With" in found.note


@pytest.mark.parametrize("size", [(8, 8), (8, 16)])
def test_a_stride_of_the_whole_window_leaves_seams_that_are_said_to_be_unknown(size):
    found = measure(
        lambda batch: coarse(batch, 8), channels=1, input_size=size, strides=(1, 2, 4, 8)
    )
    assert found.stride == 8
    assert "of 8 is a whole side of its window: patches share no pixel" in found.note
    wide = measure(lambda b: coarse(b, 8), channels=1, input_size=(48, 48), strides=(1, 2, 4, 8))
    assert wide.note == ""


def test_what_gives_nan_is_refused():
    for size in (None, (32, 32)):
        with pytest.raises(CheckpointError, match="gives NaN"):
            measure(lambda b: b * np.nan, channels=1, input_size=size, strides=(1,))


def test_an_output_of_another_shape_is_refused():
    for size in (None, (40, 40)):
        with pytest.raises(CheckpointError, match="back in their own shape"):
            measure(lambda batch: batch[:, 1:-1, 1:-1], channels=1, input_size=size, strides=(1, 2))


# What it computes


@pytest.mark.parametrize(
    "name",
    [
        "fixed.keras",
        "free.keras",
        "free.h5",
        "dense.h5",
        "dense.keras",
        "nested.keras",
        "nested.h5",
    ],
)
def test_a_loaded_model_is_the_saved_one_in_float32(files, name):
    folder, made = files
    shape = [side or 24 for side in made[name].input_shape[1:]]
    batch = np.random.default_rng(0).random((2, *shape), dtype=np.float32)
    got, expected = load_model(folder / name)(batch), made[name](batch)
    assert got.dtype == "float32"
    assert np.std(got) > 1e-3
    half = expected.dtype == "float16"
    np.testing.assert_allclose(got, np.float32(expected), atol=5e-3 if half else 1e-6)


@pytest.mark.parametrize("name", ["keras2-layers.h5", "keras2-nested.h5", "keras2-mixed.keras"])
def test_files_of_keras_2_give_what_keras_2_gave(name):
    """Written and run by tf_keras 2.21: groups, alpha, nested models and batch_input_shape.

    The .keras computed in mixed_float16 and was compared in float32; its normalization has a list
    of axes.
    """
    expected = np.load(DATA / "keras2.npz")[Path(name).stem]
    batch = np.random.default_rng(0).random(expected.shape, dtype=np.float32)
    got = load_model(DATA / name)(batch)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_policy_of_keras_2_in_hdf5_is_float32(tmp_path):
    policy = '"dtype": {"class_name": "Policy", "config": {"name": "mixed_float16"}}'
    path = edited(
        DATA / "keras2-layers.h5",
        tmp_path / "mixed.h5",
        lambda text: text.replace('"dtype": "float32", "filters"', f'{policy}, "filters"'),
    )
    batch = np.random.default_rng(0).random((1, 16, 16, 1), dtype=np.float32)
    expected = np.load(DATA / "keras2.npz")["keras2-layers"]
    np.testing.assert_allclose(load_model(path)(batch), expected, atol=1e-6)
    with h5py.File(path) as file:
        assert "mixed_float16" in file.attrs["model_config"]


def test_the_first_bytes_decide_how_a_file_is_read(files, tmp_path):
    """Up to TensorFlow 2.11 a .keras was HDF5."""
    batch = np.random.default_rng(0).random((1, 24, 24, 1), dtype=np.float32)
    shutil.copy(files[0] / "free.h5", tmp_path / "free.keras")
    got = load_model(tmp_path / "free.keras")(batch)
    np.testing.assert_allclose(got, files[1]["free.h5"](batch), atol=1e-6)


def test_missing_channel_axes_and_flat_outputs_are_reshaped(tmp_path):
    import keras
    from keras import layers

    noisy = keras.Input((8, 6))
    flat = layers.Dense(48)(layers.Flatten()(noisy))
    keras.Model(noisy, flat).save(tmp_path / "flat.keras")
    assert describe(tmp_path / "flat.keras").channels == 1
    batch = np.random.default_rng(0).random((2, 8, 6, 1), dtype=np.float32)
    got = load_model(tmp_path / "flat.keras")(batch)
    expected = keras.Model(noisy, flat)(batch[..., 0])
    np.testing.assert_allclose(got, np.reshape(expected, batch.shape), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "output", "taken"),
    [
        ((8, 8, 4), (16, 16, 1), False),
        ((8, 6, 1), (6, 8, 1), False),
        ((8, 8, 1), (4, 4, 4), False),
        ((8, 6, 3), (144,), True),
        ((8, 6, 3), (1, 1, 144), True),
        ((8, 6, 3), (48, 3), True),
        ((8, 6, 1), (8, 6), True),
    ],
)
def test_only_what_is_in_the_order_of_pixels_is_reshaped(tmp_path, shape, output, taken):
    import keras

    given = keras.Input(shape)
    model, path = keras.Model(given, keras.layers.Reshape(output)(given)), tmp_path / "x.keras"
    model.save(path)
    batch = np.random.default_rng(0).random((2, *shape), dtype=np.float32)
    if taken:
        np.testing.assert_array_equal(load_model(path)(batch), batch)
        return
    with pytest.raises(CheckpointError, match="expected a model whose output has the shape of its"):
        load_model(path)


def test_its_checkpoint_denoises_in_its_range_and_in_float32(files):
    import keras

    folder, made = files
    path = str(folder / "fixed.keras")
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    for text, low, high in (("auto", 0, 1), ("0:255", 0, 255), ("-1:1", -1, 1)):
        checkpoint = load_checkpoint(path, model_range=text, measure=False)
        card = {**checkpoint.card, "total_stride": 2, "default_halo": 8, "exact_halo": 8}
        geometry = resolve_geometry(card, patch="256", halo="auto")
        denoiser = Denoiser(checkpoint, geometry=geometry, precision="bfloat16")
        assert denoiser.precision == "float32"
        (got,) = denoiser.denoise([image])
        values = image / np.float32(255) * (high - low) + low
        expected = (keras.ops.convert_to_numpy(made["fixed.keras"](values[None]))[0] - low) / (
            high - low
        )
        np.testing.assert_allclose(got / 255, expected, atol=1e-5)


def valid_net(kernel):
    """Without padding: three convolutions, and three that give back the pixels which those took.

    With a kernel of 3 it may make 8x8 pixels of whatever lies in memory of 2, 4 or 6, and fails at
    5.
    """
    import keras
    from keras import layers

    x = noisy = keras.Input((None, None, 1))
    for kind in (layers.Conv2D,) * 3 + (layers.Conv2DTranspose,) * 3:
        x = kind(1, kernel, kernel_initializer=keras.initializers.Constant(kernel**-2))(x)
    return keras.Model(noisy, x)


@pytest.mark.parametrize("kernel", [3, 5])
def test_images_too_small_for_a_net_without_padding_are_mirrored(tmp_path, kernel):
    """With a kernel of 5, even the 11x13 cells of the first try are too small."""
    model, path = valid_net(kernel), tmp_path / "valid.keras"
    model.save(path)
    figures = measuring.measure_file(path, (0.0, 1.0))
    radius = 3 * (kernel - 1)
    least = radius + 1
    assert (figures["least_side"], figures["exact_halo"]) == (least, radius)
    assert f"takes {least} pixels a side or more" in figures["notes"][0]
    checkpoint = load_checkpoint(str(path), measure=False)
    checkpoint.card.update(figures)
    denoiser = Denoiser(checkpoint)
    denoiser.warm_up()
    for height, width in ((1, 1), (2, 5), (4, 40), (least, least)):
        image = np.random.default_rng(0).random((height, width, 1), dtype=np.float32)
        (got,) = denoiser.denoise([image])
        missing = [(0, max(0, least - side)) for side in (height, width)]
        padded = np.pad(image, (*missing, (0, 0)), mode="symmetric")
        expected = np.asarray(model(padded[None]))[0, :height, :width]
        assert expected.max() > 1e-5
        np.testing.assert_allclose(got, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("size", "body", "local"),
    [
        (None, lambda x, k: (x**2 + k.ops.rsqrt(k.ops.abs(x) + 1.0)) / 2.0, True),
        (None, lambda x, k: k.ops.concatenate(k.ops.split(x, 2, axis=-1)[::-1], axis=-1), True),
        (None, lambda x, k: k.ops.where(x > 0.1, x, k.ops.stack([x, x], axis=-1)[..., 0]), True),
        ((48, 48), lambda x, k: k.layers.RandomFlip()(k.layers.RandomRotation(0.1)(x)), True),
        (None, lambda x, k: x / (0.1 + k.ops.std(x, axis=(1, 2), keepdims=True)), False),
        (None, lambda x, k: k.ops.flip(x, axis=1), False),
    ],
)
def test_plain_operations_of_keras_are_loaded_and_measured(tmp_path, size, body, local):
    import keras

    noisy = keras.Input((*(size or (None, None)), 1))
    inner = keras.layers.Conv2D(4, 3, padding="same")(noisy)
    model = keras.Model(noisy, keras.layers.Conv2D(1, 3, padding="same")(body(inner, keras)))
    path = tmp_path / "plain.keras"
    model.save(path)
    batch = np.random.default_rng(0).random((2, 48, 48, 1), dtype=np.float32)
    got, expected = (each(batch, training=False) for each in (load_model(path), model))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    figures = measuring.measure_file(path, (0.0, 1.0))
    assert figures["total_stride"] == 1
    assert (figures["exact_halo"] == 2) is local
    assert any("depends on the whole" in note for note in figures["notes"]) is not local


def test_what_keras_has_and_this_program_has_not_is_said_to_be_unsupported(tmp_path):
    import keras

    noisy = keras.Input((28, 28, 1))
    keras.Model(noisy, keras.ops.image.resize(noisy, (28, 28))).save(tmp_path / "resized.keras")
    refused(tmp_path / "resized.keras", "holds 'Resize', which is not supported here; replace it")


def shrinking_net():
    import keras
    from keras import layers

    noisy = keras.Input((None, None, 1))
    return keras.Model(noisy, layers.Conv2D(1, 3)(noisy))


@pytest.mark.parametrize(
    ("make", "side", "match"),
    [(shrinking_net, 6, "makes 4x4 of it"), (lambda: valid_net(3), 5, "fails on it")],
)
def test_a_window_that_does_not_come_back_is_an_image_error(tmp_path, make, side, match):
    make().save(tmp_path / "valid.keras")
    checkpoint = load_checkpoint(str(tmp_path / "valid.keras"), measure=False)
    denoiser = Denoiser(checkpoint, geometry=Geometry(256, 6, 1))
    with pytest.raises(ImageError, match=f"{side}x{side} pixels: the model {match}.*smaller than"):
        denoiser.denoise([np.zeros((side, side, 1), np.float32)])


def test_what_a_cpu_makes_of_an_empty_picture_is_an_image_error(tmp_path, monkeypatch):
    """By the CPU, a convolution without padding aborts there or gives what lies in memory."""
    import tensorflow as tf

    def abort(*_):
        raise tf.errors.AbortedError(None, None, "could not create a memory object")

    valid_net(3).save(tmp_path / "valid.keras")
    checkpoint = load_checkpoint(str(tmp_path / "valid.keras"), measure=False)
    denoiser = Denoiser(checkpoint, geometry=Geometry(256, 6, 1))
    monkeypatch.setattr(denoiser, "_model", abort)
    with pytest.raises(ImageError, match="2x2 pixels: the model fails on it"):
        denoiser.denoise([np.zeros((2, 2, 1), np.float32)])


def test_cells_of_pixels_moved_to_channels_are_a_stride(tmp_path):
    import keras
    from keras import layers

    noisy = keras.Input((None, None, 1))
    x = layers.Conv2D(4, 3, padding="same")(keras.ops.space_to_depth(noisy, 2))
    keras.Model(noisy, keras.ops.depth_to_space(x, 2)).save(tmp_path / "cells.keras")
    assert describe(tmp_path / "cells.keras").strides == (1, 2)
    assert measuring.measure_file(tmp_path / "cells.keras", (0.0, 1.0))["total_stride"] == 2


def test_a_file_that_changed_is_refused(files, tmp_path):
    path = tmp_path / "mine.keras"
    shutil.copy(files[0] / "free.keras", path)
    checkpoint = load_checkpoint(str(path), measure=False)
    assert [w.dtype for w in checkpoint.weights()] == [np.float32] * 8
    shutil.copy(files[0] / "fixed.keras", path)
    with pytest.raises(CheckpointError, match="has changed since"):
        checkpoint.build()


def test_a_range_is_for_keras_files_alone(files):
    with pytest.raises(UsageError, match=r"--model-range 0:255: unet-s states its own"):
        load_checkpoint("unet-s", model_range="0:255")
    with pytest.raises(UsageError, match=r"--model-range '5:1'"):
        load_checkpoint(str(files[0] / "free.keras"), model_range="5:1", measure=False)
    with pytest.raises(UsageError, match="nor a Keras file"):
        load_checkpoint("none.keras")


# That it runs nothing


class Hack:
    """Unpickled, it writes the file that its tests look for."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fail where code of a file is made or anything is unpickled."""

    def refuse(*_, **__):
        raise AssertionError("code of a model file was read")

    for name in ("loads", "load", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr(marshal, "loads", refuse)


def refused(path, match):
    """Both the driver's look and the actor's load refuse it, in one sentence."""
    for read in (describe, load_model, lambda each: load_checkpoint(str(each))):
        with pytest.raises(CheckpointError, match=match) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def lambda_file(path, marker):
    """Save a model whose Lambda writes `marker`, as Keras saves it."""
    import keras

    noisy = keras.Input((8, 8, 1))
    text = str(marker)
    evil = keras.layers.Lambda(lambda x: (Path(text).touch(), x)[1], output_shape=(8, 8, 1))
    keras.Model(noisy, evil(noisy)).save(path)
    marker.unlink(missing_ok=True)


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_a_lambda_is_refused_and_not_run(tmp_path, ending, nothing_runs, request):
    path, marker = tmp_path / f"evil.{ending}", tmp_path / "hacked"
    request.getfixturevalue("monkeypatch").undo()
    lambda_file(path, marker)
    request.getfixturevalue("nothing_runs")
    refused(path, "holds the Lambda layer 'lambda.*by Keras' own layers")
    assert not marker.exists()


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_where_the_check_failed_keras_itself_would_refuse(tmp_path, ending, monkeypatch):
    path, marker = tmp_path / f"evil.{ending}", tmp_path / "hacked"
    lambda_file(path, marker)
    monkeypatch.setattr(reading, "_check", lambda *_: None)
    with pytest.raises(CheckpointError, match=r"cannot load it .*Lambda"):
        load_model(path)
    assert not marker.exists()


def rewritten(source, target, **members):
    """Copy a .keras file with some members replaced or added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            if name not in members:
                new.writestr(name, old.read(name))
        for name, data in members.items():
            new.writestr(name, data)
    return target


@pytest.mark.parametrize(
    "name", ["../../hacked", "/tmp/hacked", "assets/vocabulary.pkl", "model.weights.npz", "x.py"]
)
def test_an_archive_with_anything_else_in_it_is_refused(files, tmp_path, name, nothing_runs):
    data = pickle.dumps(Hack(tmp_path / "hacked"))
    path = rewritten(files[0] / "free.keras", tmp_path / "evil.keras", **{name: data})
    refused(path, f"holds '{name}'")
    assert [each.name for each in tmp_path.iterdir()] == ["evil.keras"]


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5"])
@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_that_unpack_without_a_limit_are_refused(files, tmp_path, name, method):
    path = tmp_path / "bomb.keras"
    with (
        zipfile.ZipFile(files[0] / "free.keras") as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for each in old.namelist():
            packing = method if each == name else zipfile.ZIP_DEFLATED
            new.writestr(each, old.read(each), packing)
    refused(path, f"packs '{name}' by method {method}; expected")
    with pytest.raises(CheckpointError, match="expected none or deflate"):
        reading.clean_copy(path, path.read_bytes(), tmp_path)


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_a_pickle_in_place_of_a_file_or_of_weights_is_refused(
    files, tmp_path, ending, nothing_runs
):
    data = pickle.dumps(Hack(tmp_path / "hacked"))
    path = tmp_path / f"evil.{ending}"
    path.write_bytes(data)
    refused(path, "save the model again")
    if ending == "keras":
        rewritten(files[0] / "free.keras", path, **{"model.weights.h5": data})
        with pytest.raises(CheckpointError, match="weights are damaged"):
            load_model(path)
    assert not (tmp_path / "hacked").exists()


def edited(source, target, edit):
    """Copy a .keras or .h5 file with its configuration edited as text."""
    if target.suffix == ".keras":
        with zipfile.ZipFile(source) as old:
            config = edit(old.read("config.json").decode())
        return rewritten(source, target, **{"config.json": config})
    shutil.copy(source, target)
    with h5py.File(target, "r+") as file:
        file.attrs["model_config"] = edit(file.attrs["model_config"])
    return target


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"class_name": "Conv2D"', '"class_name": "TFSMLayer"', "'TFSMLayer', which is not supp"),
        ('"class_name": "Subtract"', '"class_name": "TFOpLambda"', "TensorFlow operation"),
        ('"module": "keras.layers"', '"module": "os"', "holds 'InputLayer'"),
        ('"module": "keras.layers"', '"module": "kerasx.layers"', "holds 'InputLayer'"),
        ('"registered_name": null', '"registered_name": "mine>Conv2D"', "holds"),
        (
            '"activation": "relu"',
            '"activation": {"class_name": "function", "config": "system", "module": "os"}',
            "holds the function 'system'",
        ),
        ('"channels_last"', '"channels_first"', "are channels_first"),
        ('"batch_shape": [null, null, null, 3]', '"batch_shape": [null, 784]', "expected images"),
        ('"batch_shape": [null, null, null, 3]', '"batch_shape": [null, 64, null, 3]', "both"),
        ('"class_name": "Functional"', '"class_name": "Autoencoder"', "holds 'Autoencoder'"),
        ("{", "[", "no JSON"),
        ("{", "[" * 100_000, "no JSON"),
        ('"config"', '"cfg"', "no Keras model"),
        ('"layers": [', '"layers": 5, "x": [', "configuration is damaged"),
        ('"strides": [', '"strides": [null], "x": [', "configuration is damaged"),
        ('"strides": [', '"strides": "x", "x": [', "configuration is damaged"),
        ('"strides": [', '"strides": [0], "x": [', "a stride of 0"),
        ('"class_name": "Conv2D"', '"class_name": []', "configuration is damaged"),
        ('"batch_shape": [null, null, null, 3]', '"batch_shape": [null, "a", 0, 3]', "expected im"),
    ],
)  # fmt: skip
def test_a_configuration_that_needs_code_or_makes_no_images_is_refused(
    files, tmp_path, old, new, match, nothing_runs
):
    path = edited(
        files[0] / "free.keras", tmp_path / "x.keras", lambda text: text.replace(old, new)
    )
    refused(path, match)


def of_keras(path, version):
    """Change the version of Keras that wrote a file, in place; with None it does not say."""
    says = {} if version is None else {"keras_version": version}
    if path.suffix == ".keras":
        old = path.rename(path.with_name("old"))
        return rewritten(old, path, **{"metadata.json": json.dumps(says)})
    with h5py.File(path, "r+") as file:
        del file.attrs["keras_version"]
        file.attrs.update(says)
    return path


@pytest.mark.parametrize("name", ["keras2-layers.h5", "keras2-mixed.keras"])
@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('0, 0, {}]]]', '0, 0, {"training": true}]]]', "with training=True; Keras 3 would drop"),
        ('"activation": "linear"', '"activation": "hard_sigmoid"', r"is 0.2x\+0.5; in Keras 3"),
    ],
)  # fmt: skip
def test_what_keras_3_would_read_otherwise_is_refused_of_keras_2(tmp_path, name, old, new, match):
    path = edited(DATA / name, tmp_path / name, lambda text: text.replace(old, new, 1))
    refused(path, match)
    refused(of_keras(path, None), match)
    off = edited(DATA / name, path, lambda text: text.replace(old, new.replace("true", "false")))
    if "training" in new:
        assert describe(off).channels == 1


def test_hard_sigmoid_of_keras_3_is_its_own(files, tmp_path):
    for name in ("free.keras", "free.h5"):
        path = edited(
            files[0] / name, tmp_path / name, lambda text: text.replace('"relu"', '"hard_sigmoid"')
        )
        assert np.isfinite(load_model(path)(np.zeros((1, 8, 8, describe(path).channels)))).all()


def test_a_class_of_keras_2_is_taken_for_a_model_alone(tmp_path):
    path = edited(
        DATA / "keras2-mixed.keras",
        tmp_path / "x.keras",
        lambda text: text.replace('"module": "keras.layers"', '"module": "tf_keras.src.layers"'),
    )
    refused(path, "holds 'InputLayer'")


def test_keras_2_operations_and_weights_alone_are_refused(files, tmp_path):
    path = edited(
        DATA / "keras2-layers.h5",
        tmp_path / "plus.h5",
        lambda text: text.replace('"class_name": "Concatenate"', '"class_name": "TFOpLambda"'),
    )
    refused(path, "TensorFlow operation 'concatenate'.*Add for +")
    files[1]["free.h5"].save_weights(tmp_path / "only.weights.h5")
    refused(tmp_path / "only.weights.h5", "holds weights without the layers")


def test_links_out_of_a_file_are_refused(files, tmp_path):
    for kind, link in {
        "link to data elsewhere": h5py.ExternalLink("/etc/passwd", "/"),
        "'more' is a link": h5py.SoftLink("/model_weights"),
    }.items():
        path = tmp_path / "link.h5"
        shutil.copy(files[0] / "dense.h5", path)
        with h5py.File(path, "r+") as file:
            file["model_weights"]["more"] = link
        refused(path, kind)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["layers"] = h5py.ExternalLink("/etc/passwd", "/")
    path = rewritten(
        files[0] / "free.keras",
        tmp_path / "link.keras",
        **{"model.weights.h5": buffer.getvalue()},
    )
    with pytest.raises(CheckpointError, match="link to data elsewhere"):
        load_model(path)


@pytest.mark.parametrize("name", ["free.keras", "dense.h5"])
def test_a_damaged_file_is_refused(files, tmp_path, name):
    data = (files[0] / name).read_bytes()
    for cut in (0, 5, len(data) // 2, len(data) - 30):
        path = tmp_path / name
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=str(path)):
            load_model(path)


def test_the_ending_decides_and_nothing_else_is_one():
    assert keras_files.is_keras_file("a/B.KERAS")
    assert keras_files.is_keras_file("x.h5")
    assert not keras_files.is_keras_file("runs/best")


# In the job


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "model_range", "sizes", "channels"),
    [
        ("fixed.keras", "0:255", [(32, 48), (20, 30), (100, 90)], 3),
        ("dense.h5", "auto", [(28, 28), (70, 61)], 1),
    ],
)
def test_the_job_writes_what_the_denoiser_makes(
    files, ray_session, tmp_path, name, model_range, sizes, channels
):
    path = str(files[0] / name)
    source = tmp_path / "in"
    source.mkdir()
    images = {
        f"{height}.png": helpers.as_dtype(helpers.picture(height, width, channels), "uint8")
        for height, width in sizes
    }
    for file, pixels in images.items():
        Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(source / file)
    outcome = helpers.denoise(source, tmp_path / "out", path, model_range=model_range)
    assert (outcome.totals.ok, outcome.totals.failed) == (len(sizes), 0)
    denoiser = Denoiser(load_checkpoint(path, model_range=model_range))
    for file, pixels in images.items():
        expected = np.clip(np.rint(denoiser.denoise([pixels])[0]), 0, 255)
        got = np.asarray(Image.open(tmp_path / "out" / "images" / file)).reshape(pixels.shape)
        np.testing.assert_array_equal(got, expected)
        assert np.abs(got.astype(int) - pixels).max() > 3
    (row, *_) = helpers.rows_of(tmp_path / "out")
    assert row["model_hash"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    again = helpers.denoise(source, tmp_path / "out", path, model_range=model_range)
    assert (again.totals.to_do, again.totals.skipped) == (0, len(sizes))
