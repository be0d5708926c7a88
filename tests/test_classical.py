"""classical.py: one contract for every method, on any size and number of channels."""

import sys

import numpy as np
import pytest

from denoise_core.errors import UsageError
from denoise_core.metrics import psnr
from denoise_core.models import classical
from denoise_core.models.classical import CLASSICAL

PACKAGES = {"bilateral": "cv2", "nlm-opencv": "cv2", "bm3d": "bm3d"}
QUICK = [name for name in CLASSICAL if name != "bm3d"]  # BM3D takes a second for 32x32


def method(name):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason="needs the extra 'benchmark'")
    return CLASSICAL[name]


def scene(height, width, channels):
    """Smooth shades with edges, in [0.2, 0.8], float32."""
    y, x = np.mgrid[:height, :width][..., None]
    phase = np.arange(channels)
    values = 0.5 + 0.2 * np.sin(y / 11 + phase) + 0.1 * np.sign(np.sin(x / 9 - phase))
    return values.astype(np.float32)


def noisy(clean, sigma):
    noise = np.random.default_rng(0).normal(0, sigma / 255, clean.shape)
    return clean + noise.astype(np.float32)


@pytest.mark.parametrize("name", [name for name in CLASSICAL if name != "identity"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_method_removes_noise(name, channels):
    side = 32 if name == "bm3d" else 64
    clean = scene(side, side, channels)
    image = noisy(clean, 25.0)
    before = image.copy()
    denoised = method(name)(image, 25.0)
    gain = psnr(denoised, clean, data_range=1.0) - psnr(image, clean, data_range=1.0)
    assert gain > 3
    assert np.array_equal(image, before)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 3), (31, 2, 4), (33, 37, 2)])
def test_shape_and_dtype_come_out_as_they_went_in(name, shape):
    image = noisy(scene(*shape), 25.0)
    denoised = method(name)(image, 25.0)
    assert denoised.shape == shape
    assert denoised.dtype == np.float32
    assert denoised.flags.c_contiguous
    assert np.isfinite(denoised).all()
    assert not np.shares_memory(denoised, image)


def test_bm3d_takes_images_smaller_than_its_blocks():
    denoised = method("bm3d")(noisy(scene(3, 5, 1), 25.0), 25.0)
    assert denoised.shape == (3, 5, 1)
    assert np.isfinite(denoised).all()


@pytest.mark.parametrize("name", CLASSICAL)
def test_without_noise_nothing_changes(name):
    image = scene(20, 30, 3)
    denoised = method(name)(image, 0.0)
    assert np.array_equal(denoised, image)
    assert not np.shares_memory(denoised, image)


@pytest.mark.parametrize("name", QUICK)
def test_channels_other_than_three_do_not_mix(name):
    image = noisy(scene(40, 40, 2), 25.0)
    together = method(name)(image, 25.0)
    for c in range(2):
        assert np.array_equal(together[..., c : c + 1], method(name)(image[..., c : c + 1], 25.0))


@pytest.mark.parametrize("name", QUICK)
def test_colours_keep_their_places(name):
    image = np.zeros((40, 40, 3), np.float32) + np.float32([0.8, 0.5, 0.2])
    denoised = method(name)(image, 10.0)
    assert np.allclose(denoised.mean(axis=(0, 1)), [0.8, 0.5, 0.2], atol=0.03)


def test_constants_are_met_between_and_kept_outside():
    table = (1.0, 2.0, 4.0)
    values = [classical._at(sigma, table) for sigma in (1, 15, 20, 25, 50, 80)]
    assert values == pytest.approx([1, 1, 1.5, 2, 4, 4])
    assert classical._at(20.0, table, relative=True) == pytest.approx(30)


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_an_absent_package_is_named_with_its_extra(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"{name}.*{package}.*\.\[benchmark\]"):
        CLASSICAL[name](scene(8, 8, 1), 25.0)
