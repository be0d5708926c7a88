"""What an image shows, and what becomes of it: copied or denoised, and by which model."""

from __future__ import annotations

import io
import math

import imagecodecs
import numpy as np
import pytest
import skimage.data
from PIL import Image

from denoise_core.choice import (
    AUTO_MODELS,
    choose,
    is_coarse,
    is_dim,
    is_quiet,
    noise_sigma,
    residual_rms,
)
from denoise_core.images import decode
from denoise_core.metrics import estimate_sigma, white_sigma


def file_of(pixels: np.ndarray, form: str, *, maker: str | None = None) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    if maker is not None:
        exif[271] = maker
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, form, quality=90, exif=exif)
    return buffer.getvalue()


def test_residual_is_in_levels_and_leaves_blank_squares_out() -> None:
    rng = np.random.default_rng(0)
    noisy = rng.integers(0, 65536, (30, 45, 3)).astype(np.uint16)
    noisy[:, :24] = (10, 20, 30)
    denoised = noisy + np.float32(514.0)
    assert residual_rms(noisy, denoised, spread=65535) == pytest.approx(2.0, rel=1e-6)
    # What is left over at the edges, and what is blank, may change as it likes.
    denoised[24:] += 1e4
    denoised[:, 40:] += 1e4
    denoised[:, :24] -= 1e4
    assert residual_rms(noisy, denoised, spread=65535) == pytest.approx(2.0, rel=1e-6)
    assert residual_rms(noisy[:, :24], denoised[:, :24], spread=65535) == 0.0
    assert residual_rms(noisy[:5, 30:33], denoised[:5, 30:33], spread=65535) == pytest.approx(2.0)


def test_residual_of_a_large_image_is_that_of_its_windows() -> None:
    noisy = np.random.default_rng(0).integers(0, 256, (1500, 1100, 3)).astype(np.uint8)
    denoised = noisy.astype(np.float32)
    denoised[:, ::2] += 4.0
    assert residual_rms(noisy, denoised, spread=255) == pytest.approx(math.sqrt(8.0), rel=1e-6)


def test_a_coarse_file_is_told_by_its_tables() -> None:
    pixels = skimage.data.chelsea()

    def coarse(form: str, **options: object) -> bool:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, form, **options)
        return is_coarse(decode(buffer.getvalue(), name="photo").metadata)

    assert [coarse("jpeg", quality=q) for q in (50, 85, 90, 95, 100)] == [True] * 3 + [False] * 2
    assert coarse("webp", quality=95)
    assert not coarse("webp", lossless=True)
    assert not coarse("png")


def test_windows_of_a_large_image_stand_for_it() -> None:
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 2, (1500, 1400, 1)).repeat(4, axis=0).repeat(3, axis=2) * 80.0
    for sigma, quiet in ((0.5, True), (4.0, False)):
        pixels = texture + rng.normal(0, sigma, texture.shape)
        pixels = np.clip(np.rint(pixels + 60), 0, 255).astype(np.uint8)
        # What the wavelets take for noise is texture that all channels share.
        estimate = noise_sigma([pixels], spread=255)
        assert estimate < 20
        told = is_quiet([pixels], codec="png", sigma=estimate, below=1.75, spread=255)
        assert told == quiet


def test_twelve_bits_in_sixteen_are_dim() -> None:
    pixels = np.array([[[100], [4095]]], np.uint16)
    assert is_dim(pixels, 0, 65535)
    assert not is_dim(pixels, 0, 4095)
    scan = np.array([[[-1000], [3000]]], np.int16)
    assert is_dim(scan, -32768, 32767)
    assert not is_dim(scan, -4096, 4095)
    assert not is_dim(-9 * scan[:, :1] - 30_000, -32768, 32767)
    assert not is_dim(pixels.astype(np.float32), 0, 65535)
    assert not is_dim(np.full((2, 2, 1), 9, np.uint8), 0, 255)


def test_texture_is_not_taken_for_noise() -> None:
    clean = skimage.data.chelsea()
    noisy = clean + np.random.default_rng(0).normal(0, 3, clean.shape)
    noisy = np.clip(noisy, 0, 255)
    clean_file, noisy_file = file_of(clean, "png"), file_of(noisy, "png")
    noisy_jpeg = file_of(noisy, "jpeg")

    def quiet(file: bytes, *, below: float) -> bool:
        image = decode(file, name="photo")
        sigma = noise_sigma([image.pixels], spread=255)
        return is_quiet(
            [image.pixels], codec=image.header.format, sigma=sigma, below=below, spread=255
        )

    assert estimate_sigma(clean, data_range=255) > 1.0
    assert quiet(clean_file, below=1.0)
    assert not quiet(noisy_file, below=1.0)
    assert quiet(noisy_file, below=10)
    # After a lossy codec noise is white no more, and what looks like texture may be noise.
    assert white_sigma(decode(noisy_jpeg, name="photo").pixels, data_range=255) < 0.7
    assert not quiet(noisy_jpeg, below=0.7)


@pytest.mark.parametrize(
    ("form", "maker", "model"),
    [
        ("jpeg", None, "unet-s-photo"),
        ("webp", None, "unet-s-photo"),
        ("png", "Maker", "unet-s-photo"),
        ("tiff", "Maker", "unet-s-photo"),
        ("png", None, "unet-s"),
        ("png", "  ", "unet-s"),
        ("bmp", None, "unet-s"),
    ],
)
def test_pictures_of_cameras_go_to_the_model_for_them(
    form: str, maker: str | None, model: str
) -> None:
    image = decode(file_of(skimage.data.chelsea(), form, maker=maker), name="picture")
    assert AUTO_MODELS[choose(image.header, image.metadata)] == model


def test_more_than_8_bits_are_no_camera_picture() -> None:
    pixels = skimage.data.chelsea().astype(np.uint16) * 257
    image = decode(bytes(imagecodecs.png_encode(pixels)), name="scan.png")
    image.metadata.exif = decode(
        file_of(skimage.data.chelsea(), "png", maker="Maker"), name="photo.png"
    ).metadata.exif
    assert AUTO_MODELS[choose(image.header, image.metadata)] == "unet-s"
