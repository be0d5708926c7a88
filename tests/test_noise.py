"""Noise models: statistics against theory, seeding, and what a specification may say."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from denoise_core.errors import UsageError
from denoise_core.noise import (
    NOISE_MODELS,
    Chain,
    Clean,
    Clip,
    Correlated,
    Gaussian,
    Jpeg,
    Mixture,
    Poisson,
    Quantize,
    Sensor,
    ShiftedGrid,
    ShotRead,
    from_linear,
    parse_noise,
    to_linear,
)

SHAPE = (400, 500, 3)

EXAMPLES = [
    "gaussian:25",
    "uniform:0-40",
    "poisson:30",
    "shot-read",
    "speckle:20",
    "correlated:25",
    "chroma:10",
    "salt-pepper:0.05",
    "factor:0.5",
    "jpeg:30-98",
    "sensor",
    "camera",
    "clean",
    "clip",
    "quantize",
    "gaussian:25+clip+jpeg:50",
    "0.1*clean|0.9*gaussian:0-55",
]


def noise_of(spec, clean, *, seed=0):
    return parse_noise(spec).apply(clean, np.random.default_rng(seed)) - clean


def flat(value, shape=SHAPE):
    return np.full(shape, value, np.float32)


def photo(height=96, width=96, channels=3):
    """A smooth picture with an edge and all of [0, 1], in 8-bit steps."""
    y, x = np.mgrid[:height, :width] / np.float32(max(height, width))
    planes = [np.clip(x + 0.3 * np.sin(9 * y + c), 0, 1) for c in range(channels)]
    picture = np.stack(planes, axis=-1)
    picture[: height // 3, width // 2 :] *= 0.2
    return (np.rint(picture * 255) / 255).astype(np.float32)


@pytest.mark.parametrize("sigma", [5.0, 25.0, 50.0])
def test_gaussian_noise_has_the_stated_sigma_no_mean_and_no_memory(sigma):
    noise = noise_of(f"gaussian:{sigma:g}", flat(0.5)) * 255.0 / sigma
    error = 1.0 / np.sqrt(noise.size)
    assert abs(noise.mean()) < 4 * error
    assert abs(noise.std() - 1.0) < 4 * error
    assert abs(np.mean(noise**3)) < 4 * np.sqrt(15) * error
    assert abs(np.mean(noise**4) - 3.0) < 4 * np.sqrt(96) * error
    for axis in range(3):
        before, after = np.delete(noise, -1, axis), np.delete(noise, 0, axis)
        assert abs(np.mean(before * after)) < 4 / np.sqrt(before.size)


def test_gaussian_noise_draws_the_sigma_first_and_then_the_field():
    """Trainings that are resumed depend on the order."""
    clean = photo(16, 16)
    rng = np.random.default_rng(3)
    sigma = np.float32(rng.uniform(0.0, 55.0) / 255.0)
    expected = rng.standard_normal(clean.shape, dtype=np.float32) * sigma + clean
    noisy = parse_noise("gaussian:0-55").apply(clean, np.random.default_rng(3))
    np.testing.assert_array_equal(noisy, expected)


def test_noise_is_independent_of_the_image_and_is_not_clipped():
    dark, bright = flat(0.0), flat(1.0)
    noisy = parse_noise("gaussian:25").apply(dark, np.random.default_rng(1))
    assert noisy.dtype == np.float32
    assert (noisy < 0).mean() == pytest.approx(0.5, abs=0.01)
    np.testing.assert_allclose(
        noise_of("gaussian:25", dark), noise_of("gaussian:25", bright), atol=1e-6
    )


def test_the_sigma_of_a_range_is_uniform_over_images():
    clean = np.zeros((64, 64, 1), np.float32)
    rng = np.random.default_rng(0)
    model = parse_noise("gaussian:0-55")
    sigmas = np.array([model.apply(clean, rng).std() * 255.0 for _ in range(1000)])
    assert sigmas.min() >= 0.0
    assert sigmas.max() < 55.0 * 1.06
    quartiles = np.percentile(sigmas, [25, 50, 75])
    np.testing.assert_allclose(quartiles, [13.75, 27.5, 41.25], atol=4 * 55 * 0.5 / np.sqrt(1000))


@pytest.mark.parametrize(
    ("spec", "level", "variance"),
    [
        ("uniform:40", 0.5, (40 / 255) ** 2 / 3),
        ("poisson:30", 0.5, 0.5 / 30),
        ("poisson:200", 0.1, 0.1 / 200),
        ("speckle:20", 0.5, (0.5 * 20 / 255) ** 2),
        ("speckle:20", 1.0, (20 / 255) ** 2),
        ("correlated:25", 0.5, (25 / 255) ** 2),
        ("correlated:25:3", 0.5, (25 / 255) ** 2),
        ("factor:0.05", 0.5, 0.05**2),
    ],
)
def test_mean_and_variance_are_those_of_the_formula(spec, level, variance):
    noise = noise_of(spec, flat(level))
    # Correlated noise of blur 3 has some (4 pi 3^2) times fewer independent values.
    count = noise.size / (4 * np.pi * 9 if ":3" in spec and "correlated" in spec else 12)
    assert abs(noise.mean()) < 4 * np.sqrt(variance / count)
    assert np.var(noise) == pytest.approx(variance, rel=4 * np.sqrt(2 / count))


@pytest.mark.parametrize("shot", [0.0005, 0.01])
def test_shot_and_read_noise_have_the_variance_of_brooks_et_al(shot):
    read = np.exp(2.18 * np.log(shot) + 1.20)
    model, rng = parse_noise(f"shot-read:{shot}"), np.random.default_rng(0)
    draws = np.array([model.variances(rng) for _ in range(2000)])
    assert draws[:, 0] == pytest.approx(shot)
    assert np.log(draws[:, 1]).mean() == pytest.approx(np.log(read), abs=4 * 0.26 / 2000**0.5)
    assert np.log(draws[:, 1]).std() == pytest.approx(0.26, rel=0.07)
    seed_read = model.variances(np.random.default_rng(7))[1]
    for level in (0.0, 0.2, 1.0):
        noise = noise_of(f"shot-read:{shot}", flat(level), seed=7)
        assert np.var(noise) == pytest.approx(shot * level + seed_read, rel=0.01)


def test_the_shot_noise_of_no_stated_level_is_log_uniform():
    model, rng = parse_noise("shot-read"), np.random.default_rng(0)
    logs = np.log([model.variances(rng)[0] for _ in range(2000)])
    low, high = np.log(1e-4), np.log(0.012)
    expected = low + (high - low) * np.array([0.25, 0.5, 0.75])
    np.testing.assert_allclose(np.percentile(logs, [25, 50, 75]), expected, atol=0.25)
    assert low <= logs.min() < logs.max() <= high


def test_salt_and_pepper_hits_the_stated_share_of_whole_pixels_half_of_them_black():
    noisy = parse_noise("salt-pepper:0.1").apply(flat(0.4), np.random.default_rng(0))
    salt, pepper = (noisy == 1.0), (noisy == 0.0)
    error = 4 * np.sqrt(0.05 / (SHAPE[0] * SHAPE[1]))
    assert salt.mean() == pytest.approx(0.05, abs=error)
    assert pepper.mean() == pytest.approx(0.05, abs=error)
    assert (noisy[~salt & ~pepper] == np.float32(0.4)).all()
    np.testing.assert_array_equal(salt.all(axis=2), salt.any(axis=2))


@pytest.mark.parametrize("blur", [0.6, 1.2])
def test_correlated_noise_has_the_correlation_of_a_gaussian_blur(blur):
    noise = Correlated(25, 25, blur, blur).apply(flat(0.5), np.random.default_rng(0)) - 0.5
    # A Gaussian kernel sampled at whole pixels, with itself.
    kernel = np.exp(-0.5 * (np.arange(-20, 21) / blur) ** 2)
    for lag in (1, 2, 3):
        expected = np.sum(kernel[lag:] * kernel[:-lag]) / np.sum(kernel**2)
        for axis in (0, 1):
            found = np.mean(noise * np.roll(noise, lag, axis)) / np.var(noise)
            assert found == pytest.approx(expected, abs=0.02)
    assert np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1] == pytest.approx(
        0, abs=0.03
    )
    border, middle = noise[:3].std(), noise[100:300].std()
    assert border == pytest.approx(middle, rel=0.1)


@pytest.mark.parametrize("blur", [2, 8, 20, 1000])
def test_correlated_noise_keeps_its_sigma_where_the_blur_is_wide_for_the_image(blur):
    rng, model = np.random.default_rng(0), parse_noise(f"correlated:25:{blur}")
    fields = 255 * np.array(
        [model.apply(np.zeros((28, 28, 3), np.float32), rng) for _ in range(60)]
    )
    assert np.sqrt(np.mean(fields**2)) == pytest.approx(25, rel=0.04)
    # Noise, no offset of the whole image.
    assert fields.std(axis=(1, 2)).mean() > 0.85 * 25


def test_chroma_noise_leaves_the_luma_and_grey_pictures_alone():
    noise = noise_of("chroma:10:2", flat(0.5))
    luma = noise @ np.array([0.299, 0.587, 0.114])
    assert np.abs(luma).max() < 1e-6
    # R = Y + 1.402 Cr and B = Y + 1.772 Cb.
    assert noise[..., 0].std() == pytest.approx(1.402 * 10 / 255, rel=0.1)
    assert noise[..., 2].std() == pytest.approx(1.772 * 10 / 255, rel=0.1)
    neighbours = np.corrcoef(noise[:, 1:, 0].ravel(), noise[:, :-1, 0].ravel())[0, 1]
    assert neighbours > 0.9
    grey = photo(channels=1)
    np.testing.assert_array_equal(
        parse_noise("chroma:10").apply(grey, np.random.default_rng(0)), grey
    )


def test_the_classic_noise_factor_is_clipped():
    noisy = parse_noise("factor:0.5").apply(flat(0.0), np.random.default_rng(0))
    assert noisy.min() == 0.0
    assert noisy.max() == 1.0
    assert (noisy == 0.0).mean() == pytest.approx(0.5, abs=0.01)
    # P(N(0, 0.5) > 1) = 0.02275
    assert (noisy == 1.0).mean() == pytest.approx(0.02275, abs=0.002)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_is_that_of_pillow_at_the_stated_quality(channels):
    clean = photo(50, 70, channels)
    pixels = np.rint(clean * 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, "JPEG", quality=40)
    expected = np.asarray(Image.open(file)).reshape(clean.shape)
    noisy = parse_noise("jpeg:40").apply(clean, np.random.default_rng(0))
    np.testing.assert_array_equal(np.rint(noisy * 255).astype(np.uint8), expected)


def test_the_quality_of_a_jpeg_is_drawn_from_all_of_its_range():
    clean, rng = photo(24, 24), np.random.default_rng(0)
    outputs = {parse_noise("jpeg:30-33").apply(clean, rng).tobytes() for _ in range(60)}
    single = {parse_noise(f"jpeg:{q}").apply(clean, rng).tobytes() for q in range(30, 34)}
    assert outputs == single


def test_better_jpegs_are_nearer():
    clean = photo()
    errors = [np.square(noise_of(f"jpeg:{quality}", clean)).mean() for quality in (10, 50, 98)]
    assert errors[0] > errors[1] > errors[2]


def test_a_shifted_jpeg_is_in_place_and_its_blocks_begin_anywhere():
    clean = photo(40, 40, 1)
    shifted, rng = ShiftedGrid(Jpeg(20, 20)), np.random.default_rng(0)
    outputs = [shifted.apply(clean, rng) for _ in range(40)]
    assert len({output.tobytes() for output in outputs}) > 10
    assert all(np.abs(output - clean).mean() < 0.05 for output in outputs)


def test_clip_and_quantize():
    values = np.array([-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 0.3, 1.0, 7.0], np.float32)
    values = values.reshape(1, -1, 1)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(Clip().apply(values, rng), np.clip(values, 0, 1))
    quantized = Quantize().apply(values, rng).ravel() * 255
    np.testing.assert_allclose(quantized, [0, 0, 0, 1, 76, 255, 255], atol=1e-4)


def test_the_curves_of_a_camera_are_inverse_and_monotonous():
    picture = np.linspace(0, 1, 256, dtype=np.float32).reshape(1, -1, 1)
    for tone in (False, True):
        linear = to_linear(picture, tone=tone)
        assert (np.diff(linear.ravel()) >= 0).all()
        assert linear.min() == pytest.approx(0.0, abs=1e-9)
        assert linear.max() == 1.0
        # A table's step is 1/65535 of linear light: up to 1/255 in the darkest shades.
        back = from_linear(linear, tone=tone)
        np.testing.assert_allclose(back, picture, atol=1.1 / 255)
        np.testing.assert_allclose(back[:, 8:], picture[:, 8:], atol=0.15 / 255)
    assert to_linear(flat(0.5, (1, 1, 1)), tone=False).item() == pytest.approx(0.5**2.2, rel=1e-4)


def test_sensor_noise_is_shot_noise_amplified_by_curve_and_white_balance():
    """To first order the picture's variance is the curve's slope squared times that of light."""
    level, shot = 0.5, 0.0005
    linear, rng = level**2.2, np.random.default_rng(0)
    slope = linear ** (1 / 2.2 - 1) / 2.2
    clean, model = flat(level, (96, 96, 3)), Sensor(shot, shot)
    found = np.array([model.apply(clean, rng).var(axis=(0, 1)) for _ in range(300)])
    # The half without the tone curve has the smaller slope.
    plain = found[found[:, 1] < np.median(found[:, 1])].mean(axis=0)
    read = np.exp(2.18 * np.log(shot) + 1.20)
    for channel, gain in enumerate((2.15, 1.0, 1.7)):
        expected = slope**2 * (shot * gain * linear + read * gain**2)
        assert plain[channel] == pytest.approx(expected, rel=0.15)


def test_a_camera_gives_8_bits_leaves_a_tenth_clean_and_is_noisy_otherwise():
    clean, rng = photo(32, 32), np.random.default_rng(0)
    camera = parse_noise("camera")
    outputs = [camera.apply(clean, rng) for _ in range(800)]
    same = np.mean([np.array_equal(output, clean) for output in outputs])
    # And a few that no part of the mixture touched: 0.9 x 0.1 x 0.7 x 0.8 x 0.9 x 0.95 x 0.4.
    expected = 0.1 + 0.9 * 0.1 * 0.7 * 0.8 * 0.9 * 0.95 * 0.4
    assert same == pytest.approx(expected, abs=4 * np.sqrt(expected / 800))
    for output in outputs[:50]:
        np.testing.assert_allclose(output * 255, np.rint(output * 255), atol=1e-4)
        assert 0.0 <= output.min() <= output.max() <= 1.0
    psnr = [-10 * np.log10(np.mean((o - clean) ** 2)) for o in outputs if (o != clean).any()]
    assert 24 < np.median(psnr) < 38


@pytest.mark.parametrize("spec", EXAMPLES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_noise_keeps_the_shape_is_a_function_of_its_seed_and_leaves_the_clean_image(
    spec, channels
):
    clean = photo(33, 47, channels)
    before = clean.copy()
    noise = parse_noise(spec)
    outputs = [noise.apply(clean, np.random.default_rng(seed)) for seed in (7, 7)]
    assert outputs[0].shape == clean.shape
    assert outputs[0].dtype == np.float32
    assert np.isfinite(outputs[0]).all()
    np.testing.assert_array_equal(*outputs)
    np.testing.assert_array_equal(clean, before)
    assert not np.shares_memory(outputs[0], clean)


@pytest.mark.parametrize("name", NOISE_MODELS)
def test_every_noise_is_among_the_examples(name):
    assert any(re.match(rf"{name}\b", spec) for spec in EXAMPLES)


def test_other_seeds_give_other_noise():
    assert not np.array_equal(
        noise_of("gaussian:0-55", photo(), seed=7), noise_of("gaussian:0-55", photo(), seed=8)
    )


@pytest.mark.parametrize("spec", ["gaussian:0", "uniform:0", "speckle:0", "salt-pepper:0", "clean"])
def test_level_0_changes_nothing(spec):
    clean = photo()
    np.testing.assert_array_equal(parse_noise(spec).apply(clean, np.random.default_rng(0)), clean)


def test_a_chain_applies_its_parts_from_left_to_right():
    clean = photo()
    rng = np.random.default_rng(5)
    step = Gaussian(50, 50).apply(clean, rng)
    expected = Jpeg(60, 60).apply(np.clip(step, 0, 1), rng)
    noisy = parse_noise("gaussian:50+clip+jpeg:60").apply(clean, np.random.default_rng(5))
    np.testing.assert_array_equal(noisy, expected)


@pytest.mark.parametrize(
    ("spec", "shares"),
    [
        ("clean|clip+gaussian:255", (0.5, 0.5)),
        (["clean", "clip+gaussian:255"], (0.5, 0.5)),
        ("0.1*clean|0.9*gaussian:255", (0.1, 0.9)),
        ("1 * clean | 3 * gaussian:255", (0.25, 0.75)),
        ("0*clean|1*gaussian:255", (0.0, 1.0)),
    ],
)
def test_a_mixture_draws_its_parts_by_their_weights(spec, shares):
    clean, rng = flat(0.5, (2, 2, 1)), np.random.default_rng(0)
    model = parse_noise(spec)
    same = np.mean([np.array_equal(model.apply(clean, rng), clean) for _ in range(2000)])
    assert same == pytest.approx(shares[0], abs=4 * np.sqrt(shares[0] * shares[1] / 2000))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("gaussian:25", Gaussian(25.0, 25.0)),
        ("gaussian:0-55", Gaussian(0.0, 55.0)),
        ("gaussian:2.5-2.5", Gaussian(2.5, 2.5)),
        ("shot-read", ShotRead(1e-4, 0.012)),
        ("shot-read:1e-4-0.012", ShotRead(1e-4, 0.012)),
        ("correlated:5-25", Correlated(5, 25, 0.4, 1.2)),
        ("correlated:5-25:0.8", Correlated(5, 25, 0.8, 0.8)),
        ("gaussian:25+clip", Chain((Gaussian(25, 25), Clip()))),
        ("0.1*clean|0.9*poisson:30", Mixture((Clean(), Poisson(30, 30)), (0.1, 0.9))),
        (("clean", "gaussian:5+clip"), Mixture((Clean(), Chain((Gaussian(5, 5), Clip()))))),
        (["gaussian:25"], Gaussian(25.0, 25.0)),
    ],
)
def test_specifications(spec, expected):
    assert parse_noise(spec) == expected


@pytest.mark.parametrize("spec", EXAMPLES)
def test_a_noise_says_how_it_is_written(spec):
    assert str(parse_noise(spec)) == spec


LEVELS = st.floats(0.0, 1e20, allow_subnormal=False)


@given(st.lists(st.tuples(LEVELS, LEVELS), min_size=1, max_size=4), st.booleans())
def test_the_text_of_a_noise_reads_as_the_same_noise(levels, chained):
    parts = tuple(Gaussian(*sorted(pair)) for pair in levels)
    if len(parts) == 1:
        noise = parts[0]
    else:
        noise = Chain(parts) if chained else Mixture(parts, (0.25,) * len(parts))
    assert parse_noise(str(noise)) == noise


@pytest.mark.parametrize(
    "spec",
    [
        "gaussian",
        "gaussian:",
        "gaussian:x",
        "gaussian:-5",
        "gaussian:5-",
        "gaussian:9-3",
        "gaussian:1:2",
        "gaussian:1e999",
        "",
        [],
        "clip:3",
        "camera:2",
        "poisson:0",
        "salt-pepper:2",
        "shot-read:0",
        "jpeg:0-50",
        "jpeg:50.5",
        "jpeg:30-101",
        "chroma:5:4-1",
        "gaussian:25+",
        "gaussian:25|",
        "gaussian:25,clip",
        "0.5*clean|gaussian:25",
        "0*clean|0*clip",
        "-1*clean|2*clip",
    ],
)
def test_what_cannot_be_read_is_refused_by_name(spec):
    with pytest.raises(UsageError, match="--noise"):
        parse_noise(spec)


def test_an_unknown_noise_gets_the_nearest_name():
    with pytest.raises(UsageError, match=r"unknown noise 'gausian'\. Did you mean 'gaussian'"):
        parse_noise("gausian:25")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("gaussian:9-3", r"'gaussian:9-3'.*cannot be 9-3: expected gaussian:SIGMA.*such as 25"),
        ("jpeg:x", r"'jpeg:x' cannot be read: expected jpeg:QUALITY.*whole numbers"),
        ("salt-pepper:5", r"cannot be 5: expected salt-pepper:SHARE.*0 to 1"),
        ("qqqqq", r"Expected one of gaussian, uniform"),
        ("0.5*clean|clip", r"1 of 2 noises of a mixture have a weight: give one to all"),
    ],
)
def test_errors_tell_the_right_form(spec, words):
    with pytest.raises(UsageError, match=words):
        parse_noise(spec)
