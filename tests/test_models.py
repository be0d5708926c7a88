"""The geometry and cost that architectures state of themselves, against the networks they build."""

from __future__ import annotations

import numpy as np
import pytest

from denoise_core.errors import UsageError
from denoise_core.models import MODELS, architecture, build_model, can_trim, input_size
from denoise_core.presets import PRESETS, preset

keras = pytest.importorskip("keras")

SMALL = [
    {"widths": (2,), "blocks": (2,), "channels": 1},
    {"widths": (2, 3), "blocks": (0, 1), "channels": 1},
    {"widths": (2, 2, 3), "blocks": (1, 1, 2), "channels": 1},
    {"widths": (2, 2, 2, 2), "blocks": (1, 1, 1, 2), "channels": 1},
    {"widths": (2, 2, 2, 2), "blocks": (1, 1, 2, 4), "channels": 1},
]


def averaging(arguments):
    """A model of positive weights: what an input pixel reaches, it changes."""
    model = build_model("unet", **arguments)
    weights = [np.full(w.shape, 1.0 / np.prod(w.shape[:-1]), "f") for w in model.get_weights()]
    model.set_weights(weights)
    return lambda x: np.asarray(model(x, training=False))


def random_weights(model, rng):
    """Set weights that keep activations near 1, so that differences are seen."""
    model.set_weights(
        [
            rng.normal(0, 0.7 / np.sqrt(np.prod(w.shape[:-1])), w.shape).astype("f")
            for w in model.get_weights()
        ]
    )
    return model


CONTEXTS = ((0, 0, 0, 0), (16, 16, 16, 16), (48, 32, 0, 8), (0, 8, 64, 0))


@pytest.mark.parametrize("arguments", SMALL, ids=str)
@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_trimmed_models_give_the_core_of_the_whole_one(arguments, context):
    rng = np.random.default_rng(0)
    whole = random_weights(build_model("unet", **arguments), rng)
    trimmed = build_model("unet", trimmed=True, **arguments)
    trimmed.set_weights(whole.get_weights())
    windows = rng.random((2, 112, 96, 1), dtype=np.float32)
    top, bottom, left, right = context
    expected = np.asarray(whole(windows))[:, top : 112 - bottom, left : 96 - right]
    got = np.asarray(trimmed([windows, np.array(context, np.int32)]))
    assert np.abs(expected - windows[:, top : 112 - bottom, left : 96 - right]).max() > 0.01
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_that_can_trim_say_so(name):
    assert can_trim(name) == (name == "unet")


def context_needed(predict, *, stride, halo):
    """Pixels beyond a core on multiples of `stride` that change it, left and right, by trying."""
    length = (2 * halo // stride + 6) * stride
    flat = np.ones((1, length, stride, 1), np.float32)
    flat = np.repeat(flat, length // stride, axis=2)
    base = predict(flat)
    left = right = 0
    for place in range(length // 2 // stride * stride, length // 2 // stride * stride + stride):
        changed = flat.copy()
        changed[0, place] += 1e4
        reached = np.nonzero(np.abs(predict(changed) - base).max(axis=(0, 2, 3)))[0]
        last_core_start = reached.max() // stride * stride
        first_core_stop = reached.min() // stride * stride + stride
        left = max(left, last_core_start - place)
        right = max(right, place - (first_core_stop - 1))
    return left, right


@pytest.mark.parametrize("arguments", SMALL, ids=str)
def test_exact_halo_is_what_a_core_needs_and_not_a_stride_more(arguments):
    module = architecture("unet")
    halo, stride = module.exact_halo(**arguments), module.total_stride(**arguments)
    assert halo % stride == 0
    left, right = context_needed(averaging(arguments), stride=stride, halo=halo)
    assert max(left, right) <= halo
    assert max(left, right) > halo - stride


@pytest.mark.parametrize("arguments", SMALL, ids=str)
def test_total_stride_is_the_least_size_that_fits(arguments):
    stride = architecture("unet").total_stride(**arguments)
    assert stride == 2 ** (len(arguments["widths"]) - 1)
    model = build_model("unet", **arguments)
    assert model(np.zeros((1, stride, 3 * stride, 1), "f")).shape == (1, stride, 3 * stride, 1)


def test_shifting_by_the_total_stride_shifts_the_output():
    arguments = SMALL[2]
    predict, stride = averaging(arguments), architecture("unet").total_stride(**arguments)
    halo = architecture("unet").exact_halo(**arguments)
    rng = np.random.default_rng(0)
    image = rng.random((1, 6 * halo, 4 * stride, 1), dtype=np.float32)
    whole, shifted = predict(image), predict(image[:, stride:])
    inside = slice(2 * halo, 4 * halo)
    np.testing.assert_allclose(whole[:, stride:][:, inside], shifted[:, inside], atol=1e-5)
    off_by_one = predict(image[:, 1 : 1 - stride])
    assert np.abs(whole[:, 1:][:, inside] - off_by_one[:, inside]).max() > 1e-4


def counted_mflop(model, side=64):
    """10^6 multiplications and additions for a pixel, from the layers of a Keras model."""
    total = 0.0
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D | keras.layers.Conv2DTranspose):
            kernel = layer.get_weights()[0]
            inputs, outputs = layer.input.shape, layer.output.shape
            # Each kernel is applied once for each position of the coarser of its two sides.
            transposed = isinstance(layer, keras.layers.Conv2DTranspose)
            _, height, width, _ = inputs if transposed else outputs
            total += 2.0 * height * width * kernel.size
    return total / side**2 / 1e6


@pytest.mark.parametrize("name", ["unet-xs", "unet-s"])
def test_mflop_per_pixel_is_what_the_layers_sum_to(name):
    arguments = PRESETS[name].arguments
    model = build_model("unet", **arguments)
    fixed = keras.models.clone_model(
        model, input_tensors=keras.Input((64, 64, arguments["channels"]))
    )
    stated = architecture("unet").mflop_per_pixel(**arguments)
    assert stated == pytest.approx(counted_mflop(fixed), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "mflop", "parameters"), [("unet-xs", 0.08, 0.87), ("unet-s", 0.18, 1.96)]
)
def test_sizes_are_those_of_the_family(name, mflop, parameters):
    arguments = PRESETS[name].arguments
    assert architecture("unet").mflop_per_pixel(**arguments) == pytest.approx(mflop, abs=0.005)
    assert build_model("unet", **arguments).count_params() / 1e6 == pytest.approx(
        parameters, abs=0.01
    )


def test_without_biases_the_network_scales_with_its_input():
    rng = np.random.default_rng(0)
    model = random_weights(build_model("unet", widths=(4, 6, 8), blocks=(1, 1, 2)), rng)
    image = rng.normal(0.5, 0.3, (1, 32, 24, 3)).astype("f")
    once = np.asarray(model(image, training=False))
    assert np.abs(once - image).max() > 0.01
    for factor in (0.01, 3.0, 1000.0):
        scaled = np.asarray(model(image * np.float32(factor), training=False))
        np.testing.assert_allclose(scaled / factor, once, rtol=1e-4, atol=1e-5)


def test_fresh_weights_leave_the_image_alone():
    model = build_model("unet", widths=(4, 8), blocks=(1, 1))
    image = np.random.default_rng(0).random((1, 8, 8, 3), dtype=np.float32)
    np.testing.assert_array_equal(np.asarray(model(image)), image)


def test_bfloat16_computes_in_it_and_keeps_float32_weights_and_output():
    before = keras.config.dtype_policy().name
    model = build_model("unet", precision="bfloat16", widths=(4, 8), blocks=(1, 1))
    assert keras.config.dtype_policy().name == before
    assert {layer.compute_dtype for layer in model.layers if layer.get_weights()} == {"bfloat16"}
    assert {weight.dtype for weight in model.weights} == {"float32"}
    assert np.asarray(model(np.zeros((1, 8, 8, 3), "f"))).dtype == np.float32


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    recipe = preset(name)
    module = architecture(recipe.architecture)
    stride = module.total_stride(**recipe.arguments)
    assert recipe.default_halo % stride == 0
    assert recipe.default_halo <= module.exact_halo(**recipe.arguments)
    assert [stage.start for stage in recipe.stages] == sorted(s.start for s in recipe.stages)
    assert recipe.stages[0].start == 0.0
    assert all(stage.crop % stride == 0 for stage in recipe.stages)
    model = build_model(recipe.architecture, **recipe.arguments)
    size = input_size(recipe.architecture, **recipe.arguments) or (None, None)
    assert model.input_shape == model.output_shape == (None, *size, recipe.channels)
    assert model.get_layer("latent").output.shape[0] is None


CLASSIC = [n for n in PRESETS if PRESETS[n].architecture != "unet" and PRESETS[n].channels == 3]


@pytest.mark.parametrize("name", [*CLASSIC, "mnist-conv"])
def test_halo_of_a_classic_autoencoder_is_its_receptive_radius(name):
    """A core on multiples of the stride does not change with what lies beyond the halo."""
    recipe = preset(name)
    module, arguments = architecture(recipe.architecture), recipe.arguments
    stride, halo = module.total_stride(**arguments), module.exact_halo(**arguments)
    model = build_model(recipe.architecture, **arguments)
    rng = np.random.default_rng(0)
    side = 2 * halo + 2 * stride
    image = rng.random((1, side, side, recipe.channels), np.float32)
    other = rng.random(image.shape, np.float32)
    core = slice(halo, side - halo)

    def reach(radius: int) -> float:
        seen = other.copy()
        window = slice(halo - radius, side - halo + radius)
        seen[:, window, window] = image[:, window, window]
        difference = np.asarray(model(seen)) - np.asarray(model(image))
        return float(np.abs(difference[:, core, core]).max())

    assert reach(halo) == 0.0
    assert reach(halo - stride - 1) > 0.0


def test_unknown_names_get_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'unet-s'"):
        preset("unet_s")
    with pytest.raises(UsageError, match="Did you mean 'unet'"):
        architecture("unett")


def test_every_architecture_states_its_contract():
    for module in MODELS.values():
        for name in ("build", "total_stride", "exact_halo", "mflop_per_pixel"):
            assert callable(getattr(module, name))
