"""metrics.py against scikit-image, closed forms, and the rule that sums of parts are the whole."""

import itertools
import math
import warnings
from functools import reduce
from operator import add

import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from skimage.restoration import estimate_sigma as skimage_sigma

from denoise_core import metrics
from denoise_core.errors import UnsupportedImage, UsageError
from denoise_core.metrics import error_sums, estimate_sigma, residual_sums, white_sigma

RANGES = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}
DTYPES = tuple(RANGES)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def scene(shape, *, seed=0):
    """A smooth picture in [0.2, 0.8], float64."""
    height, width, channels = shape
    phase = np.random.default_rng(seed).uniform(0, 6, channels)
    y, x = np.mgrid[:height, :width][..., None]
    return 0.5 + 0.3 * np.sin(y / 9 + phase) * np.cos(x / 13 - phase)


def as_dtype(values, dtype):
    if dtype == "float32":
        return values.astype(np.float32)
    return np.clip(np.round(values * RANGES[dtype]), 0, RANGES[dtype]).astype(dtype)


def noisy_pair(shape, dtype, *, sigma=20.0, seed=0):
    clean = scene(shape, seed=seed)
    noise = np.random.default_rng(seed + 1).normal(0, sigma / 255, shape)
    return as_dtype(clean + noise, dtype), as_dtype(clean, dtype)


def random_image(seed, shape, dtype):
    return as_dtype(np.random.default_rng(seed).uniform(0, 1, shape), dtype)


def skimage_ssim(a, b, data_range):
    return structural_similarity(
        a.astype(np.float64),
        b.astype(np.float64),
        data_range=data_range,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )


shapes = st.tuples(st.integers(1, 80), st.integers(1, 80), st.sampled_from([1, 2, 3]))


# --- With a reference -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 53, 1), (131, 127, 3)])
def test_psnr_mse_and_ssim_equal_scikit_image(shape, dtype):
    a, b = noisy_pair(shape, dtype)
    data_range = RANGES[dtype]
    sums = error_sums(a, b, data_range=data_range)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    assert sums.psnr == pytest.approx(
        peak_signal_noise_ratio(wide_b, wide_a, data_range=data_range), abs=1e-6
    )
    assert sums.mse == pytest.approx(np.mean((wide_a - wide_b) ** 2) / data_range**2, rel=1e-6)
    assert sums.ssim == pytest.approx(skimage_ssim(a, b, data_range), abs=2e-6)


@pytest.mark.parametrize("shape", [(11, 11, 1), (11, 30, 3), (106, 107, 1), (203, 12, 2)])
def test_ssim_on_awkward_sizes(shape):
    a, b = noisy_pair(shape, "uint8", sigma=40)
    assert metrics.ssim(a, b, data_range=255) == pytest.approx(skimage_ssim(a, b, 255), abs=2e-6)


def test_ssim_keeps_its_digits_far_from_zero():
    a, b = noisy_pair((64, 64, 1), "float32")
    a, b = a.astype(np.float64) + 1000, b.astype(np.float64) + 1000
    assert metrics.ssim(a, b, data_range=1.0) == pytest.approx(skimage_ssim(a, b, 1.0), abs=1e-5)


@pytest.mark.parametrize("side", [1, 2, 10])
def test_no_ssim_where_no_window_fits(side):
    a, b = noisy_pair((side, 40, 3), "uint8")
    sums = error_sums(a, b, data_range=255)
    assert sums.ssim is None
    assert sums.ssim_count == 0
    assert math.isfinite(sums.psnr)


def test_a_constant_offset_has_a_closed_form():
    clean = np.full((12, 12, 3), 100, np.uint8)
    sums = error_sums(clean + np.uint8(5), clean, data_range=255)
    c1 = (0.01 * 255) ** 2
    assert sums.mse == pytest.approx(25 / 255**2)
    assert sums.psnr == pytest.approx(20 * math.log10(255 / 5))
    assert sums.ssim == pytest.approx((2 * 105 * 100 + c1) / (105**2 + 100**2 + c1), abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_images(dtype):
    a, _ = noisy_pair((20, 20, 3), dtype)
    sums = error_sums(a, a.copy(), data_range=RANGES[dtype])
    assert (sums.mse, sums.psnr) == (0.0, math.inf)
    assert sums.ssim == pytest.approx(1.0, abs=1e-6)


def test_unsigned_differences_do_not_wrap_around():
    low, high = np.zeros((1, 1, 1), np.uint8), np.full((1, 1, 1), 255, np.uint8)
    assert metrics.mse(low, high, data_range=255) == 1.0
    assert metrics.psnr(high, low, data_range=255) == 0.0


@settings(max_examples=40)
@given(shape=shapes, cut=st.integers(0, 80), dtype=st.sampled_from(["uint8", "uint16"]))
def test_error_sums_of_parts_are_the_whole_exactly(shape, cut, dtype):
    a, b = random_image(1, shape, dtype), random_image(2, shape, dtype)
    cut = min(max(cut, 1), shape[0] - 1)
    pieces = [slice(0, cut), slice(cut, None)] if cut else [slice(None)]
    whole = error_sums(a, b, data_range=RANGES[dtype])
    parts = reduce(add, [error_sums(a[p], b[p], data_range=RANGES[dtype]) for p in pieces])
    assert (parts.squared, parts.count) == (whole.squared, whole.count)
    assert parts.mse == whole.mse


def test_ssim_sums_of_overlapping_parts_are_the_whole():
    a, b = noisy_pair((60, 50, 3), "uint8")
    whole = error_sums(a, b, data_range=255)
    parts = [error_sums(a[s], b[s], data_range=255) for s in (slice(0, 35), slice(25, 60))]
    assert sum(p.ssim_count for p in parts) == whole.ssim_count
    assert reduce(add, parts).ssim == pytest.approx(whole.ssim, abs=1e-6)


def test_an_error_that_is_no_number_is_no_perfect_image() -> None:
    image = np.full((9, 9, 1), math.nan, "float32")
    assert math.isnan(metrics.psnr(image, np.zeros_like(image), data_range=1))


@pytest.mark.parametrize("data_range", [0, -1, math.nan, math.inf])
def test_error_sums_refuse_a_range_that_is_none(data_range):
    a = np.zeros((2, 2, 1), np.uint8)
    with pytest.raises(UsageError, match="data range"):
        error_sums(a, a, data_range=data_range)


def test_sums_of_different_ranges_or_channels_do_not_merge():
    a, b = np.zeros((2, 2, 1), np.uint8), np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(UsageError, match="data ranges 255 and 1"):
        error_sums(a, a, data_range=255) + error_sums(a, a, data_range=1)
    with pytest.raises(UsageError, match="1 and 3 channels"):
        residual_sums(a, a, lo=0, hi=1) + residual_sums(b, b, lo=0, hi=1)


@pytest.mark.parametrize("shape", [(2, 3, 1), (3, 2, 3), (2, 2), (0, 2, 1)])
def test_shapes_must_fit(shape):
    image, other = np.zeros((3, 2, 1), np.uint8), np.zeros(shape, np.uint8)
    with pytest.raises(UnsupportedImage, match="shape"):
        error_sums(image, other, data_range=255)
    with pytest.raises(UnsupportedImage, match="shape"):
        residual_sums(other, image, lo=0, hi=255)


# --- Noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 8, 1), (33, 50, 3), (301, 211, 1)])
def test_sigma_equals_scikit_image(shape, dtype):
    image, _ = noisy_pair(shape, dtype)
    expected = skimage_sigma(image.astype(np.float64), channel_axis=-1, average_sigmas=True)
    sigma = estimate_sigma(image, data_range=RANGES[dtype])
    assert sigma == pytest.approx(expected * 255 / RANGES[dtype], rel=1e-4)


@pytest.mark.parametrize("sigma", [5, 15, 50])
def test_sigma_finds_the_noise(sigma):
    image, _ = noisy_pair((256, 256, 3), "float32", sigma=sigma)
    assert estimate_sigma(image, data_range=1.0) == pytest.approx(sigma, rel=0.03)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
@pytest.mark.parametrize("sigma", [1, 2, 5, 15])
def test_white_sigma_finds_the_noise_whatever_the_texture(name, sigma):
    clean = getattr(skimage.data, name)()[:256, 128:384]
    grain = white_sigma(clean, data_range=255)
    assert grain < 1.5
    noise = np.random.default_rng(0).normal(0, sigma, clean.shape)
    expected = pytest.approx(math.hypot(sigma, grain), rel=0.15)
    assert white_sigma(clean + noise, data_range=255) == expected
    assert white_sigma((clean + noise) / 255 * 1000, data_range=1000) == expected


def test_white_sigma_leaves_out_what_is_flat():
    image = np.zeros((256, 256, 3))
    image[:150, :150] = 0.5 + np.random.default_rng(0).normal(0, 10 / 255, (150, 150, 3))
    assert white_sigma(image, data_range=1.0) == pytest.approx(10, rel=0.15)


@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 900, 3), (60, 60, 3), (200, 200, 1)])
def test_white_sigma_is_the_other_estimate_for_few_patches_and_grey(shape):
    image = random_image(0, shape, "uint8")
    expected = estimate_sigma(image, data_range=255)
    assert white_sigma(image, data_range=255) == expected


# Mirrored borders weigh on images of 9 or 10 rows, in scikit-image's estimate as in ours.
@pytest.mark.parametrize(
    ("shape", "tolerance"),
    [((1300, 1100, 1), 0.02), ((10, 200_000, 1), 0.25), ((150_000, 9, 3), 0.25)],
)
def test_sigma_of_large_images_comes_from_a_bounded_sample(shape, tolerance):
    image = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
    seen = sum(w.shape[0] * w.shape[1] for w in metrics._spread_windows(image))
    assert seen > 0.8 * metrics.SIGMA_PIXELS
    assert seen <= metrics.SIGMA_PIXELS
    assert estimate_sigma(image, data_range=1.0) == pytest.approx(25.5, rel=tolerance)


def test_sigma_windows_reach_all_corners():
    image = np.zeros((2048, 4096, 1), np.uint8)
    image[:5, :5] = image[:5, -5:] = image[-5:, :5] = image[-5:, -5:] = 1
    assert sum(int(window.sum()) for window in metrics._spread_windows(image)) == 100


@pytest.mark.parametrize("value", [0, 1, 77, 255])
@pytest.mark.parametrize("dtype", DTYPES)
def test_flat_images_have_no_noise(dtype, value):
    flat = np.full((64, 48, 3), value / 255 * RANGES[dtype]).astype(dtype)
    assert estimate_sigma(flat, data_range=RANGES[dtype]) == pytest.approx(0, abs=1e-4)
    assert estimate_sigma(flat, data_range=0) == 0.0


@pytest.mark.parametrize(("height", "width"), itertools.product([1, 2, 7, 8], [1, 7, 40]))
def test_sigma_of_tiny_images(height, width):
    sigma = estimate_sigma(random_image(0, (height, width, 3), "uint8"), data_range=255)
    assert math.isfinite(sigma)
    assert (sigma > 0) == (min(height, width) >= 8)


@pytest.mark.parametrize("data_range", [-1, math.nan, math.inf])
def test_sigma_refuses_a_range_that_is_none(data_range):
    with pytest.raises(UsageError, match="data range"):
        estimate_sigma(np.zeros((9, 9, 1)), data_range=data_range)


# --- Without a reference ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_shift_is_in_levels_and_signed(dtype):
    noisy = as_dtype(scene((40, 30, 3)), dtype)
    shift = np.array([2, 0, -3]) * RANGES[dtype] / 255
    denoised = (noisy + shift).astype(dtype)
    stats = residual_sums(noisy, denoised, lo=0, hi=RANGES[dtype]).stats()
    assert stats.mean_shift == pytest.approx((2, 0, -3), abs=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clipped_fraction_counts_new_values_at_the_ends_only(dtype):
    top = RANGES[dtype]
    noisy = np.array([0, 0, 0.5, 0.5, 0.5, 1, 1, 0.2]).reshape(2, 4, 1) * top
    denoised = np.array([0, 0.1, 0, 1, 0.5, 1, 0.9, 0]).reshape(2, 4, 1) * top
    stats = residual_sums(noisy.astype(dtype), denoised.astype(dtype), lo=0, hi=top).stats()
    assert stats.clipped_fraction == 3 / 8


def correlated(shape, blur):
    noise = np.random.default_rng(0).normal(0, 10, shape)
    return noise + np.roll(noise, 1, axis=0) + np.roll(noise, 1, axis=1) if blur else noise


@pytest.mark.parametrize("blur", [False, True])
def test_autocorrelation_equals_pearsons(blur):
    residual = correlated((300, 200, 1), blur)
    r = residual[..., 0]
    expected = (
        np.corrcoef(r[:, 1:].ravel(), r[:, :-1].ravel())[0, 1]
        + np.corrcoef(r[1:].ravel(), r[:-1].ravel())[0, 1]
    ) / 2
    base = np.full_like(residual, 50.0)
    stats = residual_sums(base + residual, base, lo=0, hi=255).stats()
    assert stats.residual_autocorrelation == pytest.approx(expected, abs=2e-3)
    assert (stats.residual_autocorrelation > 0.3) == blur


def test_autocorrelation_does_not_see_a_shift():
    residual = correlated((100, 90, 3), blur=True)
    plain, shifted = (
        residual_sums(residual + offset, np.zeros_like(residual), lo=0, hi=255).stats()
        for offset in (0.0, np.array([5.0, -4.0, 30.0]))
    )
    assert shifted.residual_autocorrelation == pytest.approx(
        plain.residual_autocorrelation, abs=1e-3
    )


def seamed(shape, *, cuts_y, cuts_x, step):
    """White residual with another offset in every patch core."""
    rows = np.searchsorted(cuts_y, np.arange(shape[0]), side="right")
    columns = np.searchsorted(cuts_x, np.arange(shape[1]), side="right")
    offsets = step * ((rows[:, None] + columns[None]) % 2)
    return np.random.default_rng(0).normal(0, 1, shape) + offsets[..., None]


def test_seam_ratio_is_one_without_seams_and_larger_with_them():
    shape, cuts = (130, 140, 3), {"cuts_y": (32, 64, 128), "cuts_x": (64,)}
    ratios = []
    for step in (0, 1, 5):
        residual = seamed(shape, **cuts, step=step)
        sums = residual_sums(residual, np.zeros(shape), lo=0, hi=255, **cuts)
        ratios.append(sums.stats().seam_ratio)
    assert ratios[0] == pytest.approx(1, abs=0.05)
    assert 1.1 < ratios[1] < ratios[2]
    assert ratios[2] == pytest.approx(5 * math.sqrt(math.pi) / 2, rel=0.05)  # 5 / E|N(0, 2)|


def test_seam_sums_equal_a_plain_loop():
    noisy, denoised = random_image(1, (70, 41, 2), "uint8"), random_image(2, (70, 41, 2), "uint8")
    sums = residual_sums(noisy, denoised, lo=0, hi=255, cuts_y=(32, 33, 64), cuts_x=(1, 40))
    r = noisy.astype(float) - denoised
    seams = [np.abs(r[y] - r[y - 1]).ravel() for y in (32, 33, 64)]
    seams += [np.abs(r[:, x] - r[:, x - 1]).ravel() for x in (1, 40)]
    total = np.abs(np.diff(r, axis=0)).sum() + np.abs(np.diff(r, axis=1)).sum()
    assert sums.seam == pytest.approx(np.concatenate(seams).sum())
    assert sums.seam_count == sum(map(len, seams))
    assert sums.elsewhere == pytest.approx(total - sums.seam)
    assert sums.elsewhere_count == 69 * 41 * 2 + 70 * 40 * 2 - sums.seam_count


def test_seam_ratio_is_none_for_one_patch_and_finite_on_flat_patches():
    noisy = np.full((20, 20, 1), 9, np.uint8)
    step = noisy.copy()
    step[10:] += 1
    one_patch = residual_sums(noisy, step, lo=0, hi=255, cuts_y=(0, 20), cuts_x=(-3, 25)).stats()
    assert one_patch.seam_ratio is None
    two_patches = residual_sums(noisy, step, lo=0, hi=255, cuts_y=(10,)).stats()
    assert two_patches.seam_ratio == pytest.approx(1 / metrics.SEAM_FLOOR)


@settings(max_examples=40)
@given(shape=shapes, dtype=st.sampled_from(DTYPES))
def test_residual_stats_are_finite_on_any_size(shape, dtype):
    noisy, denoised = random_image(1, shape, dtype), random_image(2, shape, dtype)
    stats = residual_sums(noisy, denoised, lo=0, hi=RANGES[dtype], cuts_y=(32,)).stats()
    assert len(stats.mean_shift) == shape[2]
    assert np.isfinite(stats.mean_shift).all()
    correlation = stats.residual_autocorrelation
    assert correlation is None or -1 <= correlation <= 1
    assert (stats.seam_ratio is not None) == (shape[0] > 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 70, 3)])
def test_flat_residuals_have_no_correlation_and_no_seam(shape, dtype):
    noisy = np.full(shape, RANGES[dtype] / 3).astype(dtype)
    for denoised in (noisy, np.full(shape, RANGES[dtype] / 2).astype(dtype)):
        stats = residual_sums(noisy, denoised, lo=0, hi=RANGES[dtype], cuts_x=(32,)).stats()
        assert stats.residual_autocorrelation is None
        assert stats.seam_ratio is None
        assert stats.clipped_fraction == 0


def test_a_flat_image_whose_range_is_empty():
    flat = np.full((9, 9, 1), 5.0, np.float32)
    stats = residual_sums(flat, flat, lo=5.0, hi=5.0).stats()
    assert stats == metrics.ResidualStats((0.0,), 0.0, None, None)


@settings(max_examples=40)
@given(shape=shapes, cut=st.integers(1, 79), dtype=st.sampled_from(DTYPES))
def test_residual_sums_of_parts_are_the_whole_but_for_pairs_across(shape, cut, dtype):
    noisy, denoised = random_image(1, shape, dtype), random_image(2, shape, dtype)
    top = RANGES[dtype]
    whole = residual_sums(noisy, denoised, lo=0, hi=top)
    if cut >= shape[0]:
        return
    pieces = (slice(0, cut), slice(cut, None))
    parts = reduce(add, [residual_sums(noisy[p], denoised[p], lo=0, hi=top) for p in pieces])
    assert parts.stats().mean_shift == pytest.approx(whole.stats().mean_shift, abs=1e-6)
    assert (parts.pixels, parts.clipped) == (whole.pixels, whole.clipped)
    assert parts.squared == pytest.approx(whole.squared)
    assert parts.horizontal == pytest.approx(whole.horizontal)
    r = (noisy.astype(np.float64) - denoised) * 255 / top
    across = float((r[cut - 1] * r[cut]).sum())
    assert parts.vertical + across == pytest.approx(whole.vertical, rel=1e-6, abs=1e-2)
    assert parts.vertical_pairs + shape[1] == whole.vertical_pairs


def test_strips_of_work_do_not_show(monkeypatch):
    noisy, denoised = noisy_pair((97, 61, 3), "uint8")
    cuts = {"cuts_y": (32, 64), "cuts_x": (32,)}
    strips = residual_sums(noisy, denoised, lo=0, hi=255, **cuts)
    monkeypatch.setattr(metrics, "_STRIP", 1000)
    at_once = residual_sums(noisy, denoised, lo=0, hi=255, **cuts)
    for name in strips.__dataclass_fields__:
        assert getattr(strips, name) == pytest.approx(getattr(at_once, name)), name
