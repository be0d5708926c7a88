"""Exports: another runtime gives the model's own values, and what differs is not kept."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from denoise_core import export
from denoise_core.checkpoints import Checkpoint, save_checkpoint
from denoise_core.errors import CheckpointError, UsageError
from denoise_core.export import check_export, export_model
from denoise_core.models import architecture, build_model, input_size

MODELS = {
    "unet": {"widths": [4, 6], "blocks": [1, 1], "channels": 3},
    "dense": {"size": [28, 28], "channels": 1, "widths": [4, 8], "latent": 16},
    "autoencoder": {"widths": [4, 6], "channels": 1, "up": "upsample", "norm": True},
}
PACKAGES = ("onnx", "onnxruntime", "tf2onnx")
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason="the extra 'export' is not installed",
)
CASES = [
    pytest.param("unet", "onnx", marks=needs_onnx),
    pytest.param("dense", "onnx", marks=needs_onnx),
    pytest.param("autoencoder", "onnx", marks=needs_onnx),
    ("unet", "savedmodel"),
    ("dense", "savedmodel"),
]


def make(folder, name):
    """A checkpoint of random weights that change an image."""
    arguments, module = MODELS[name], architecture(name)
    rng = np.random.default_rng(0)
    shapes = [w.shape for w in build_model(name, **arguments).get_weights()]
    weights = [
        rng.normal(0, 0.7 / np.sqrt(np.prod(shape[:-1])), shape)
        if len(shape) > 1
        # Biases and the figures of a batch normalisation, variances among them.
        else rng.uniform(0.1, 0.5, shape)
        for shape in shapes
    ]
    card = {
        "architecture": name,
        "arguments": arguments,
        "total_stride": module.total_stride(**arguments),
        "default_halo": 0,
        "exact_halo": module.exact_halo(**arguments),
        "input_size": input_size(name, **arguments),
    }
    return save_checkpoint(folder, weights, card)


@pytest.mark.parametrize(("name", "format"), CASES)
def test_an_export_gives_the_values_of_the_model(tmp_path, name, format):
    path = tmp_path / "out" / "exported"
    worst = export_model(make(tmp_path / "model", name), format=format, path=path)
    assert 0 <= worst < 1e-5
    assert path.is_file() if format == "onnx" else (path / "saved_model.pb").is_file()
    assert [each.name for each in path.parent.iterdir()] == ["exported"]


def test_the_model_is_compared_on_the_cpu_where_there_is_no_tf32(tmp_path, monkeypatch):
    from tensorflow.python.eager import context

    places = []
    build = Checkpoint.build

    class Watched:
        def __init__(self, model):
            self.model = model

        def __call__(self, *arguments, **more):
            places.append(context.context().device_name)
            return self.model(*arguments, **more)

        def export(self, *arguments, **more):
            return self.model.export(*arguments, **more)

    monkeypatch.setattr(Checkpoint, "build", lambda self, **more: Watched(build(self, **more)))
    export_model(make(tmp_path / "model", "dense"), format="savedmodel", path=tmp_path / "out")
    assert len(places) == 2
    assert all(place.endswith("CPU:0") for place in places)


@needs_onnx
def test_an_onnx_file_names_its_axes_and_takes_other_sizes(tmp_path):
    import onnxruntime

    path = tmp_path / "model.onnx"
    checkpoint = make(tmp_path / "model", "unet")
    for _ in range(2):
        export_model(checkpoint, format="onnx", path=path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("noisy", ["batch", "height", "width", 3])
    assert (made.name, made.shape) == ("denoised", ["batch", "height", "width", 3])
    image = np.random.default_rng(1).random((1, 6, 50, 3), dtype=np.float32)
    expected = np.asarray(checkpoint.build()(image))
    assert np.abs(expected - image).max() > 0.01
    np.testing.assert_allclose(session.run(None, {"noisy": image})[0], expected, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize(("wrong", "tries"), [(2, 3), (99, export.ONNX_TRIES)])
def test_an_onnx_file_with_an_axis_too_many_is_written_again(tmp_path, monkeypatch, wrong, tries):
    import onnx

    written = []
    build = Checkpoint.build

    def build_with_bad_exports(self, **more):
        model = build(self, **more)
        write = model.export

        def export(path, **more):
            write(path, **more)
            written.append(path)
            if len(written) <= wrong:
                graph = onnx.load(path)
                graph.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 1
                onnx.save(graph, path)

        model.export = export
        return model

    monkeypatch.setattr(Checkpoint, "build", build_with_bad_exports)
    checkpoint, path = make(tmp_path / "model", "unet"), tmp_path / "out" / "model.onnx"
    if wrong > tries:
        with pytest.raises(CheckpointError, match="another number of axes 5 times"):
            export_model(checkpoint, format="onnx", path=path)
        assert not list(path.parent.iterdir())
    else:
        assert export_model(checkpoint, format="onnx", path=path) < 1e-5
        assert path.is_file()
    # tf2onnx itself gets an axis too many now and then.
    assert tries <= len(written) <= export.ONNX_TRIES


def test_an_export_that_differs_is_not_kept(tmp_path, monkeypatch):
    def wrong(model, path):
        path.mkdir()
        return lambda batch: batch + 2e-4 + np.asarray(model(batch)) - batch

    monkeypatch.setattr(export, "_write_savedmodel", wrong)
    path = tmp_path / "exported"
    with pytest.raises(CheckpointError, match=r"differs from the model by 0\.0002"):
        export_model(make(tmp_path / "model", "dense"), format="savedmodel", path=path)
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_export("savedmodel")
    with pytest.raises(UsageError, match=r"onnx, onnxruntime, tf2onnx.*'\.\[export\]'"):
        check_export("onnx")
    with pytest.raises(UsageError, match="expected one of onnx, savedmodel"):
        check_export("tflite")


def test_what_is_no_export_is_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    with pytest.raises(UsageError, match="is no savedmodel export"):
        export_model(
            make(tmp_path / "model", "dense"), format="savedmodel", path=tmp_path / "photos"
        )
    assert (tmp_path / "photos" / "a.png").exists()
