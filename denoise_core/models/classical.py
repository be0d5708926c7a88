"""Denoisers from before neural networks, one contract for all: what the benchmark compares with.

    denoised = CLASSICAL["nlm"](image, 25.0)

`image` is (H, W, C) float32 with a data range of [0, 1] (values outside are noise and allowed),
`sigma` the standard deviation of its noise in 1/255; the result is a new (H, W, C) float32 array,
not clipped to [0, 1]. Three channels are denoised as RGB, any other number one by one. Sigma 0
returns a copy. The filters are those of scikit-image, OpenCV and the authors' BM3D; only
their parameters are ours. Methods of an absent package raise UsageError, which names the extra.

Calibrated for PSNR on six 160x160 crops of bsds432 under protocol A (noise neither clipped nor
quantised; output rounded to 8 bits) at sigma 15, 25 and 50; never on the test sets. Mean PSNR in
dB that they reached there:

    method       colour              grey
    identity     24.87/20.62/15.13   24.77/20.51/15.04
    median       27.90/25.83/23.76   27.91/25.85/23.82
    gaussian     29.28/27.15/24.91   29.33/27.23/25.01
    bilateral    31.84/28.82/25.21   30.37/27.73/24.69
    tv           30.75/28.44/25.72   30.86/28.53/25.79
    wavelet      31.05/28.32/25.23   29.42/26.96/24.45
    nlm          31.99/29.69/26.38   31.43/28.85/25.43
    nlm-opencv   30.58/28.03/24.41   31.03/28.39/24.62

BM3D has no constants of ours (30.19 on one of the colour crops at sigma 25) and is by far the
slowest: 4.6 s of CPU for 160x160 RGB. It and OpenCV use all cores unless told otherwise.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from denoise_core.errors import UsageError

FloatArray = npt.NDArray[np.float32]
Filter = Callable[[Any], Any]

CALIBRATED_SIGMAS = (15.0, 25.0, 50.0)
"""The sigmas that every table of three constants below belongs to."""

MEDIAN_SIDES = (3.0, 5.0, 7.0)  # pixels; rounded to the nearest odd side
GAUSSIAN_WIDTHS = (0.7, 1.0, 1.8)  # pixels
TV_WEIGHTS = (0.7, 0.8, 0.9)  # times sigma
BILATERAL_COLOR = {"colour": (4.0, 4.0, 6.0), "grey": (2.5, 3.0, 4.0)}  # times sigma
BILATERAL_WIDTHS = {"colour": 2.5, "grey": 2.0}  # pixels, the largest tried for colour
# Haar: db2 was 0.1, 0.4, 1.4 dB worse in colour (0.2 better in grey at 15), sym4 and bior4.4 more.
# Sigma as given: 0.9 and 1.1 times sigma were worse.
WAVELET = "db1"
NLM_H = {"colour": (0.6, 0.5, 0.5), "grey": (0.7, 0.6, 0.7)}  # times sigma
NLM_WINDOWS = {"patch_size": 5, "patch_distance": 6}  # 3 and 7 were worse in colour
OPENCV_H = {"colour": (0.7, 0.7, 0.6), "grey": (1.0, 0.9, 0.8)}  # times sigma, in 8-bit levels
OPENCV_H_COLOR = (0.9, 0.9, 0.6)  # times sigma: for the a and b of CIELAB
OPENCV_TEMPLATE = {"colour": 3, "grey": 5}  # pixels; OpenCV's default of 7 was worse
OPENCV_SEARCH = 21  # pixels, OpenCV's default

MIN_SIDE = 32  # smaller images are mirrored to it: four BM3D blocks of 8, five wavelet levels


def identity(image: FloatArray, sigma: float) -> FloatArray:
    """Return a copy: the PSNR of the noisy image itself."""
    return image.astype(np.float32)


def median(image: FloatArray, sigma: float) -> FloatArray:
    """Median of a square window of 3, 5 or 7 pixels, each channel by itself (scikit-image)."""
    from skimage import filters

    side = 2 * round((_at(sigma, MEDIAN_SIDES) - 1) / 2) + 1
    window = np.ones((side, side), bool)
    return _denoise(image, sigma, plane=lambda x: filters.median(x, window, mode="reflect"))


def gaussian(image: FloatArray, sigma: float) -> FloatArray:
    """Gaussian blur, each channel by itself (scikit-image)."""
    from skimage import filters

    width = _at(sigma, GAUSSIAN_WIDTHS)
    return _denoise(image, sigma, plane=lambda x: filters.gaussian(x, width, mode="reflect"))


def bilateral(image: FloatArray, sigma: float) -> FloatArray:
    """Bilateral filter, Tomasi and Manduchi 1998 (OpenCV, in float32).

    Not scikit-image's: in its 0.26 the spatial window is off by a pixel. With a colour sigma of 5
    it should equal a Gaussian blur (29.0 dB on a crop at sigma 15), and gave 23.9.
    """
    cv2 = _optional("cv2", method="bilateral")

    def run(kind: str) -> Filter:
        color = _at(sigma, BILATERAL_COLOR[kind], relative=True) / 255
        return lambda x: cv2.bilateralFilter(x, 0, color, BILATERAL_WIDTHS[kind])

    return _denoise(image, sigma, plane=run("grey"), rgb=run("colour"))


def total_variation(image: FloatArray, sigma: float) -> FloatArray:
    """Total variation by Chambolle's projection, 2004 (scikit-image)."""
    from skimage.restoration import denoise_tv_chambolle

    weight = _at(sigma, TV_WEIGHTS, relative=True) / 255
    return _denoise(
        image,
        sigma,
        plane=lambda x: denoise_tv_chambolle(x, weight=weight),
        rgb=lambda x: denoise_tv_chambolle(x, weight=weight, channel_axis=-1),
    )


def wavelet(image: FloatArray, sigma: float) -> FloatArray:
    """BayesShrink on Haar wavelets, Chang et al. 2000, in YCbCr for RGB (scikit-image)."""
    from skimage.restoration import denoise_wavelet

    settings = {"sigma": sigma / 255, "wavelet": WAVELET, "method": "BayesShrink"}
    return _denoise(
        image,
        sigma,
        plane=lambda x: denoise_wavelet(x, **settings),
        rgb=lambda x: denoise_wavelet(x, **settings, convert2ycbcr=True, channel_axis=-1),
    )


def nlm(image: FloatArray, sigma: float) -> FloatArray:
    """Non-local means, Buades et al. 2005, by integral images (scikit-image's fast mode)."""
    from skimage.restoration import denoise_nl_means

    def run(kind: str, **axes: int) -> Filter:
        h = _at(sigma, NLM_H[kind], relative=True) / 255
        return lambda x: denoise_nl_means(x, h=h, sigma=sigma / 255, **NLM_WINDOWS, **axes)

    # Grey goes in as (H, W): as (H, W, 1) scikit-image 0.26 returns 14 dB.
    return _denoise(image, sigma, plane=run("grey"), rgb=run("colour", channel_axis=-1))


def nlm_opencv(image: FloatArray, sigma: float) -> FloatArray:
    """Non-local means in 8 bits, for RGB in CIELAB (OpenCV); clips and rounds its input."""
    cv2 = _optional("cv2", method="nlm-opencv")
    h = {kind: _at(sigma, table, relative=True) for kind, table in OPENCV_H.items()}
    h_color = _at(sigma, OPENCV_H_COLOR, relative=True)
    side = OPENCV_TEMPLATE

    def plane(x: Any) -> Any:
        return cv2.fastNlMeansDenoising(_to_bytes(x), None, h["grey"], side["grey"], OPENCV_SEARCH)

    def rgb(x: Any) -> Any:
        # OpenCV calls the first channel blue; here it is red.
        bgr = np.ascontiguousarray(_to_bytes(x)[..., ::-1])
        return cv2.fastNlMeansDenoisingColored(
            bgr, None, h["colour"], h_color, side["colour"], OPENCV_SEARCH
        )[..., ::-1]

    return _denoise(image, sigma, plane=lambda x: plane(x) / 255.0, rgb=lambda x: rgb(x) / 255.0)


def bm3d(image: FloatArray, sigma: float) -> FloatArray:
    """BM3D, Dabov et al. 2007, opponent colours for RGB (PyPI bm3d, the authors' own, `np`)."""
    package = _optional("bm3d", method="bm3d")
    return _denoise(
        image,
        sigma,
        plane=lambda x: package.bm3d(x, sigma / 255),
        rgb=lambda x: package.bm3d_rgb(x, sigma / 255),
    )


CLASSICAL: dict[str, Callable[[FloatArray, float], FloatArray]] = {
    "identity": identity,
    "median": median,
    "gaussian": gaussian,
    "bilateral": bilateral,
    "tv": total_variation,
    "wavelet": wavelet,
    "nlm": nlm,
    "nlm-opencv": nlm_opencv,
    "bm3d": bm3d,
}
"""Name -> denoise(image (H, W, C) float32, sigma in 1/255) -> (H, W, C) float32."""


def _denoise(
    image: FloatArray, sigma: float, *, plane: Filter, rgb: Filter | None = None
) -> FloatArray:
    """Run `rgb` on (H, W, 3) or `plane` on each (H, W), mirrored to MIN_SIDE where smaller."""
    if not sigma > 0:
        return identity(image, sigma)
    height, width, channels = image.shape
    missing = (max(MIN_SIDE - height, 0), max(MIN_SIDE - width, 0))
    padded = np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")
    if rgb is not None and channels == 3:
        result = rgb(padded)
    else:
        planes = (np.ascontiguousarray(padded[..., c]) for c in range(channels))
        result = np.stack([plane(x) for x in planes], axis=-1)
    return np.ascontiguousarray(result[:height, :width], dtype=np.float32)


def _at(sigma: float, table: tuple[float, ...], *, relative: bool = False) -> float:
    """The constant for this sigma: linear between the calibrated ones, the nearest one outside.

    `relative` tables are factors of sigma, and the result is in its unit.
    """
    value = float(np.interp(sigma, CALIBRATED_SIGMAS, table))
    return value * sigma if relative else value


def _to_bytes(values: Any) -> npt.NDArray[np.uint8]:
    return np.clip(np.round(values * 255), 0, 255).astype(np.uint8)


def _optional(module: str, *, method: str) -> Any:
    """Import a package that only the benchmark needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"The method {method!r} needs the package {module!r}, which is not installed. "
            "Install the extra 'benchmark' (uv pip install '.[benchmark]')."
        ) from error
