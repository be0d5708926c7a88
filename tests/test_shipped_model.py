"""The model that ships with the package: its card, its halo and that it denoises."""

from __future__ import annotations

import numpy as np
import pytest
from skimage import data

from denoise_core.checkpoints import SHIPPED, load_checkpoint
from denoise_core.choice import AUTO_MODELS
from denoise_core.denoiser import Denoiser, resolve_geometry
from denoise_core.metrics import psnr
from denoise_core.noise import parse_noise

pytestmark = pytest.mark.skipif(
    not (SHIPPED / "unet-s.json").exists(), reason="no weights of unet-s in this checkout"
)


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint("unet-s")


def noisy_version(clean, sigma):
    noise = np.random.default_rng(0).normal(0.0, sigma, clean.shape)
    return np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)


def test_the_card_says_what_a_user_must_know(checkpoint):
    card = checkpoint.card
    assert card["mflop_per_pixel"] <= 0.25
    assert checkpoint.weights_path.stat().st_size <= 6_000_000
    assert card["noise"] == "gaussian:0-55"
    assert {"training", "figures", "data_sources", "weights_licence"} <= set(card)
    assert 0 < card["break_even_sigma"] < 10


def test_patches_with_the_default_halo_equal_the_whole_image_to_the_eye(checkpoint):
    """At most 3 of 255 levels apart anywhere, at most 0.001 % of the values more than one."""
    patched = Denoiser(checkpoint, precision="float32")
    whole = Denoiser(
        checkpoint,
        precision="float32",
        geometry=resolve_geometry(checkpoint.card, patch="4096", halo="auto"),
    )
    clean = data.retina()[300:980, 200:920]
    assert len(patched.geometry.regions(*clean.shape[:2])[0].patches) > 4
    apart = []
    for sigma in (10, 25, 50):
        noisy = noisy_version(clean, sigma)
        difference = np.abs(patched.denoise([noisy])[0] - whole.denoise([noisy])[0])
        assert difference.max() <= 3.0
        apart.append((difference > 1.0).mean())
    assert np.mean(apart) <= 1e-5


def test_the_models_to_choose_from_cut_images_alike():
    """One run has one geometry, whichever model an image is given to."""
    cards = [load_checkpoint(name).card for name in AUTO_MODELS]
    for halo in ("auto", "exact"):
        assert len({resolve_geometry(card, patch="256", halo=halo) for card in cards}) == 1


def test_camera_noise_goes_by_the_model_for_it():
    clean = data.chelsea()[:256, :256]
    noise = parse_noise("sensor:0.01+jpeg:95")
    noisy = noise.apply(clean / np.float32(255), np.random.default_rng(0))
    gains = {}
    for name in AUTO_MODELS:
        denoised = Denoiser(load_checkpoint(name)).denoise([noisy], ranges=[(0.0, 1.0)])[0]
        gains[name] = psnr(np.clip(denoised, 0, 1), clean / 255, data_range=1) - psnr(
            noisy, clean / 255, data_range=1
        )
    assert gains["unet-s-photo"] > max(3.0, gains["unet-s"])


@pytest.mark.parametrize("name", ["astronaut", "camera"])
def test_noise_goes_and_the_picture_stays(checkpoint, name):
    clean = np.atleast_3d(getattr(data, name)())[100:356, 100:356]
    noisy = noisy_version(clean, 25)
    denoised = np.clip(Denoiser(checkpoint).denoise([noisy])[0], 0, 255)
    gain = psnr(denoised, clean.astype(np.float32), data_range=255) - psnr(
        noisy, clean, data_range=255
    )
    assert gain > 7.0
