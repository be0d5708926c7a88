"""Noise models: statistics against theory, seeding, and what a specification may say."""

from __future__ import annotations

import numpy as np
import pytest

from denoise_core.errors import UsageError
from denoise_core.noise import Gaussian, parse_noise

SHAPE = (400, 500, 3)


def noise_of(spec, clean, *, seed=0):
    return parse_noise(spec).apply(clean, np.random.default_rng(seed)) - clean


@pytest.mark.parametrize("sigma", [5.0, 25.0, 50.0])
def test_gaussian_noise_has_the_stated_sigma_no_mean_and_no_memory(sigma):
    noise = noise_of(f"gaussian:{sigma:g}", np.full(SHAPE, 0.5, np.float32)) * 255.0 / sigma
    error = 1.0 / np.sqrt(noise.size)
    assert abs(noise.mean()) < 4 * error
    assert abs(noise.std() - 1.0) < 4 * error
    assert abs(np.mean(noise**3)) < 4 * np.sqrt(15) * error
    assert abs(np.mean(noise**4) - 3.0) < 4 * np.sqrt(96) * error
    for axis in range(3):
        before, after = np.delete(noise, -1, axis), np.delete(noise, 0, axis)
        assert abs(np.mean(before * after)) < 4 / np.sqrt(before.size)


def test_noise_is_independent_of_the_image_and_is_not_clipped():
    dark, bright = np.zeros(SHAPE, np.float32), np.ones(SHAPE, np.float32)
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


def test_noise_is_a_function_of_its_seed():
    clean = np.zeros((8, 8, 3), np.float32)
    first, again, other = (noise_of("gaussian:0-55", clean, seed=seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_level_0_changes_nothing_and_the_clean_image_is_left_alone():
    clean = np.random.default_rng(0).random((8, 8, 3), dtype=np.float32)
    before = clean.copy()
    np.testing.assert_array_equal(
        parse_noise("gaussian:0").apply(clean, np.random.default_rng(0)), clean
    )
    parse_noise("gaussian:50").apply(clean, np.random.default_rng(0))
    np.testing.assert_array_equal(clean, before)


@pytest.mark.parametrize(
    ("spec", "low", "high"),
    [
        ("gaussian:25", 25.0, 25.0),
        ("gaussian:0-55", 0.0, 55.0),
        ("gaussian:2.5-2.5", 2.5, 2.5),
    ],
)
def test_specifications(spec, low, high):
    assert parse_noise(spec) == Gaussian(low, high)


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
        "",
    ],
)
def test_what_cannot_be_read_is_refused_by_name(spec):
    with pytest.raises(UsageError, match="--noise"):
        parse_noise(spec)


def test_an_unknown_noise_gets_the_nearest_name():
    with pytest.raises(UsageError, match=r"unknown noise 'gausian'\. Did you mean 'gaussian'"):
        parse_noise("gausian:25")
