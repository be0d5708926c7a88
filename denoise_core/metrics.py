"""Image quality figures as sums that merge: MSE, PSNR, SSIM, and measures that need no reference.

Images are arrays (H, W, C) of any real dtype, C >= 1, as they come from a file: no scaling before.
Figures are in units of the data range, so that 8-bit, 16-bit and float images can be compared:
MSE in squared ranges, sigma and mean shift in 1/255 of the range ("levels").

    sums = error_sums(denoised, clean, data_range=255)           # with a reference
    sums.psnr, sums.ssim
    stats = residual_sums(noisy, denoised, lo=0, hi=255, cuts_y=(256,), cuts_x=(256, 512)).stats()
    estimate_sigma(noisy, data_range=255)                        # levels
    white_sigma(noisy, data_range=255)                           # the same, whatever the texture

Parts of one image are added first and divided once: `(sums_a + sums_b).mse`. What crosses a
part's border (SSIM windows, neighbouring pixels) is not counted.

Costs for 1 Mpx of 8-bit RGB on one core of a Zen 5: estimate_sigma 20 ms, residual_sums 15 ms;
error_sums, on one that a training run shared, 145 ms (with ssim=False 4 ms; scikit-image's
structural_similarity alone 290 ms).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt

from denoise_core.errors import UnsupportedImage, UsageError

Array = npt.NDArray[Any]

LEVELS = 255.0
"""Sigma and mean shift are in 1/255 of the data range, whatever the dtype."""

SIGMA_PIXELS = 1 << 20
"""estimate_sigma looks at no more pixels than this: its cost does not grow with the image."""

SIGMA_WINDOW = 256
SIGMA_MIN_SIDE = 8  # below, mirrored borders outnumber the image in the wavelet coefficients
WHITE_PATCH = 8
WHITE_PATCHES = 30_000  # white_sigma takes about so many where the image has them
MAD_TO_SIGMA = 0.6744897501960817  # normal quantile at 0.75

SSIM_RADIUS = 5  # an 11x11 window: scikit-image's truncate=3.5 at sigma 1.5
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03

SEAM_FLOOR = 1e-3
"""Levels. A residual flatter than this has no texture that a seam could be compared with."""

_STRIP = 32  # rows worked on at a time: float64 copies stay in the cache and memory stays flat
_SSIM_TILE = 96  # fastest of 32, 48, 64 and 96 here: 310, 180, 155, 130 ms for 1 Mpx RGB


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """Sums over the values of an image, or of many, against a reference.

    `squared` is in the images' own units, so that the sums of 8-bit images are integers and merge
    exactly; the properties divide by `data_range`. `ssim_sum` adds the SSIM of
    `ssim_count` windows, counted once for every channel.
    """

    squared: float
    count: int
    ssim_sum: float
    ssim_count: int
    data_range: float

    def __add__(self, other: ErrorSums) -> ErrorSums:
        if self.data_range != other.data_range:
            raise UsageError(
                f"got error sums of data ranges {self.data_range:g} and {other.data_range:g}, "
                "expected one data range; average the figures of each image instead"
            )
        return ErrorSums(
            squared=self.squared + other.squared,
            count=self.count + other.count,
            ssim_sum=self.ssim_sum + other.ssim_sum,
            ssim_count=self.ssim_count + other.ssim_count,
            data_range=self.data_range,
        )

    @property
    def mse(self) -> float:
        """Mean squared error in squared data ranges, at most 1 for values inside the range."""
        return self.squared / self.count / self.data_range**2

    @property
    def psnr(self) -> float:
        """10 log10(range^2 / MSE) in dB over all values of all channels; inf for equal images."""
        return -10.0 * math.log10(self.mse) if self.mse != 0 else math.inf

    @property
    def ssim(self) -> float | None:
        """Mean SSIM over windows and channels, or None where no window fits into the image."""
        return self.ssim_sum / self.ssim_count if self.ssim_count else None


def error_sums(
    image: Array, reference: Array, *, data_range: float, ssim: bool = True
) -> ErrorSums:
    """Compare two images (H, W, C) of equal shape; dtypes may differ, values share one scale.

    `data_range` is the span of the values (255 for 8 bits), in their units. SSIM is that of Wang
    et al. 2004 (https://doi.org/10.1109/TIP.2003.819861): Gaussian window of sigma 1.5, 11x11,
    K1 0.01, K2 0.03, population covariance, on windows wholly inside the image, mean over
    channels. It equals scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, channel_axis=-1)`. `ssim=False` leaves it out (`.ssim` is None).

    Raises UsageError for a data range that is not positive, UnsupportedImage for shapes that
    differ or hold no values.
    """
    _check_pair(image, reference)
    if not (math.isfinite(data_range) and data_range > 0):
        raise UsageError(f"got a data range of {data_range}, expected a positive number")
    squared = 0.0
    for rows in _strips(image.shape[0]):
        diff = _difference(image[rows], reference[rows]).astype(np.float64).ravel()
        squared += float(diff @ diff)
    ssim_sum, ssim_count = _ssim_sums(image, reference, data_range) if ssim else (0.0, 0)
    return ErrorSums(squared, image.size, ssim_sum, ssim_count, float(data_range))


def mse(image: Array, reference: Array, *, data_range: float) -> float:
    """Mean squared error in squared data ranges; see error_sums."""
    return error_sums(image, reference, data_range=data_range, ssim=False).mse


def psnr(image: Array, reference: Array, *, data_range: float) -> float:
    """PSNR in dB over all values, inf for equal images; see error_sums."""
    return error_sums(image, reference, data_range=data_range, ssim=False).psnr


def ssim(image: Array, reference: Array, *, data_range: float) -> float | None:
    """Mean SSIM, or None for images under 11 pixels a side; see error_sums."""
    return error_sums(image, reference, data_range=data_range).ssim


def estimate_sigma(pixels: Array, *, data_range: float) -> float:
    """Standard deviation of the noise of an image (H, W, C), in levels (1/255 of the data range).

    The median absolute deviation of the finest diagonal wavelet coefficients (db2), mean over
    channels: Donoho and Johnstone 1994 (https://doi.org/10.1093/biomet/81.3.425), and the same
    number as scikit-image's `estimate_sigma`, which like this drops coefficients that are zero.
    Images of more than SIGMA_PIXELS are sampled in evenly spread windows of 256x256.
    Returns 0.0 for flat images and for those with a side under 8 pixels.
    Raises UsageError for a negative data range; 0 belongs to a flat image and gives 0.0.
    """
    _check_image(pixels)
    scale = _levels_per_unit(data_range)
    if min(pixels.shape[:2]) < SIGMA_MIN_SIDE or scale == 0.0:
        return 0.0
    details = _diagonal_details(_spread_windows(pixels))
    return scale * float(np.mean([_mad_sigma(channel) for channel in details]))


def white_sigma(pixels: Array, *, data_range: float) -> float:
    """Standard deviation of the white noise of a colour image (H, W, 3), in levels.

    Of the 192 directions that 8x8 patches of three channels span, texture leaves many empty, for
    the channels vary together; white noise fills all alike. The mean of the smallest tenth of the
    eigenvalues of their covariance is the noise's variance: after Pyatykh, Hesser and Zheng, IEEE
    TIP 22(2), 2013 (https://doi.org/10.1109/TIP.2012.2221728). On 432 clean photographs of BSDS500
    it reads 0.1 to 1.1 where `estimate_sigma` reads up to 14.5, on noisy ones up to a tenth too
    low. Noise that is not white, as after JPEG or resampling, it misses. Flat patches, such as a
    clipped background, do not count. Returns `estimate_sigma` for other channels and for images of
    too few patches. Raises UsageError for a negative data range.
    """
    _check_image(pixels)
    size = 3 * WHITE_PATCH**2
    step = max(1, round(math.sqrt(min(pixels[..., 0].size, SIGMA_PIXELS) / WHITE_PATCHES)))
    total, mean, count = np.zeros((size, size)), np.zeros(size), 0
    # Single precision suffices for values around zero.
    middle = np.float32(pixels.mean())
    for window in _spread_windows(pixels) if pixels.shape[2] == 3 else ():
        if min(window.shape[:2]) < WHITE_PATCH:
            continue
        views = np.lib.stride_tricks.sliding_window_view(
            window, (WHITE_PATCH, WHITE_PATCH), axis=(0, 1)
        )
        patches = views[::step, ::step].reshape(-1, size).astype(np.float32)
        patches = patches[np.ptp(patches, axis=1) > 0] - middle
        total += patches.T @ patches
        mean += patches.sum(axis=0)
        count += len(patches)
    # Of fewer the smallest eigenvalues are far below the variance (Marchenko and Pastur, 1967).
    if count < 20 * size:
        return estimate_sigma(pixels, data_range=data_range)
    values = np.linalg.eigvalsh(total / count - np.outer(mean, mean) / count**2)
    smallest = float(np.mean(values[: size // 10]))
    return _levels_per_unit(data_range) * math.sqrt(max(smallest, 0.0))


@dataclass(frozen=True, slots=True)
class ResidualStats:
    """What can be said of a denoised image without a reference. None: there is nothing to measure.

    mean_shift              mean of denoised - noisy of each channel, in levels
    clipped_fraction        share of output values at an end of the range that were inside it before
    residual_autocorrelation  mean of the horizontal and vertical lag-1 correlation of the
                            residual noisy - denoised, in [-1, 1]; near 0 for white noise, higher
                            where structure of the image went with it. None for a flat residual
    seam_ratio              mean |step| of the residual across the borders of patch cores over that
                            elsewhere; about 1 without seams. None where there is one patch only
    """

    mean_shift: tuple[float, ...]
    clipped_fraction: float
    residual_autocorrelation: float | None
    seam_ratio: float | None


@dataclass(frozen=True, slots=True)
class ResidualSums:
    """Sums over the residual of one image or region, in levels; `+` merges regions of an image.

    `shift` holds one sum of denoised - noisy for each channel. `horizontal` and `vertical` add the
    products of neighbouring residuals over all channels, `*_pairs` count the pixel pairs of one
    channel. `seam` and `elsewhere` add |steps| between neighbours.
    """

    shift: tuple[float, ...]
    pixels: int
    squared: float
    horizontal: float
    horizontal_pairs: int
    vertical: float
    vertical_pairs: int
    clipped: int
    seam: float
    seam_count: int
    elsewhere: float
    elsewhere_count: int

    def __add__(self, other: ResidualSums) -> ResidualSums:
        if len(self.shift) != len(other.shift):
            raise UsageError(
                f"got residual sums of {len(self.shift)} and {len(other.shift)} channels, "
                "expected parts of one image"
            )
        return ResidualSums(
            shift=tuple(map(add, self.shift, other.shift)),
            pixels=self.pixels + other.pixels,
            squared=self.squared + other.squared,
            horizontal=self.horizontal + other.horizontal,
            horizontal_pairs=self.horizontal_pairs + other.horizontal_pairs,
            vertical=self.vertical + other.vertical,
            vertical_pairs=self.vertical_pairs + other.vertical_pairs,
            clipped=self.clipped + other.clipped,
            seam=self.seam + other.seam,
            seam_count=self.seam_count + other.seam_count,
            elsewhere=self.elsewhere + other.elsewhere,
            elsewhere_count=self.elsewhere_count + other.elsewhere_count,
        )

    def stats(self) -> ResidualStats:
        """Divide once."""
        return ResidualStats(
            mean_shift=tuple(total / self.pixels for total in self.shift),
            clipped_fraction=self.clipped / (self.pixels * len(self.shift)),
            residual_autocorrelation=self._autocorrelation(),
            seam_ratio=self._seam_ratio(),
        )

    def _autocorrelation(self) -> float | None:
        """Mean over the two directions of (covariance / variance), pooled over channels."""
        mean_square = self.squared / self.pixels
        square_of_means = sum((total / self.pixels) ** 2 for total in self.shift)
        variance = mean_square - square_of_means
        if variance <= 1e-9 * mean_square:  # flat: what is left is rounding of float64 sums
            return None
        sums = ((self.horizontal, self.horizontal_pairs), (self.vertical, self.vertical_pairs))
        lags = [(total / pairs - square_of_means) / variance for total, pairs in sums if pairs]
        # Pairs miss an edge of the image, so on tiny images the quotient can pass 1.
        return float(np.clip(np.mean(lags), -1.0, 1.0)) if lags else None

    def _seam_ratio(self) -> float | None:
        if not (self.seam_count and self.elsewhere_count):
            return None
        seam, elsewhere = self.seam / self.seam_count, self.elsewhere / self.elsewhere_count
        if max(seam, elsewhere) <= SEAM_FLOOR:
            return None
        return seam / max(elsewhere, SEAM_FLOOR)


def residual_sums(
    noisy: Array,
    denoised: Array,
    *,
    lo: float,
    hi: float,
    cuts_y: Sequence[int] = (),
    cuts_x: Sequence[int] = (),
) -> ResidualSums:
    """Sums over two images (H, W, C) of one shape and scale, whose data range is [lo, hi].

    A cut at y lies between rows y - 1 and y: `cuts_y=(256, 512)` for patch cores of 256 rows.
    Cuts at or outside the image's edges are ignored.
    Raises UnsupportedImage for shapes that differ or hold no values, UsageError for hi < lo;
    hi == lo belongs to a flat image and gives zeros.
    """
    _check_pair(noisy, denoised)
    levels = _levels_per_unit(hi - lo)
    lo, hi = _comparable(noisy.dtype, lo), _comparable(noisy.dtype, hi)
    height, width = noisy.shape[:2]
    seams_y, seams_x = _cut_mask(cuts_y, height), _cut_mask(cuts_x, width)
    parts = []
    for rows in _strips(height):
        above = max(rows.start - 1, 0)  # one row of the strip before, for the pairs across
        residual = _difference(noisy[above : rows.stop], denoised[above : rows.stop])
        parts.append(
            _strip_sums(
                residual.astype(np.float64) * levels,
                own=rows.start - above,
                clipped=_newly_clipped(noisy[rows], denoised[rows], lo=lo, hi=hi),
                seams_y=seams_y[above : rows.stop - 1],
                seams_x=seams_x,
            )
        )
    return reduce(add, parts)


def _strip_sums(
    residual: Array, *, own: int, clipped: int, seams_y: Array, seams_x: Array
) -> ResidualSums:
    """Sums of a strip whose rows before `own` (none or one) serve the vertical pairs only."""
    flat, all_rows = (part.reshape(len(part), -1) for part in (residual[own:], residual))
    channels = residual.shape[2]
    left, right = flat[:, :-channels], flat[:, channels:]
    above, below = all_rows[:-1], all_rows[1:]
    steps_x = np.abs(right - left).sum(axis=0).reshape(-1, channels).sum(axis=1)
    steps_y = np.abs(below - above).sum(axis=1)
    seam_count = seams_y.sum() * flat.shape[1] + seams_x.sum() * len(flat) * channels
    return ResidualSums(
        shift=tuple((-flat.sum(axis=0).reshape(-1, channels).sum(axis=0)).tolist()),
        pixels=flat.size // channels,
        squared=_dot(flat, flat),
        horizontal=_dot(left, right),
        horizontal_pairs=left.size // channels,
        vertical=_dot(above, below),
        vertical_pairs=above.size // channels,
        clipped=clipped,
        seam=float(steps_y[seams_y].sum() + steps_x[seams_x].sum()),
        seam_count=int(seam_count),
        elsewhere=float(steps_y[~seams_y].sum() + steps_x[~seams_x].sum()),
        elsewhere_count=int(left.size + above.size - seam_count),
    )


def _dot(a: Array, b: Array) -> float:
    return float(np.einsum("ij,ij->", a, b))


def _newly_clipped(noisy: Array, denoised: Array, *, lo: float, hi: float) -> int:
    low = (denoised <= lo) & (noisy > lo)
    return int(np.count_nonzero(low | ((denoised >= hi) & (noisy < hi))))


def _comparable(dtype: np.dtype[Any], bound: float) -> float:
    """An int for integer images: comparing them with a float would copy them to float64."""
    return int(bound) if dtype.kind in "iu" and float(bound).is_integer() else bound


def _cut_mask(cuts: Sequence[int], length: int) -> Array:
    """Booleans of the length - 1 steps along an axis: True where the step crosses a cut."""
    mask = np.zeros(length - 1, bool)
    mask[[cut - 1 for cut in cuts if 0 < cut < length]] = True
    return mask


def _strips(height: int) -> Iterator[slice]:
    for start in range(0, height, _STRIP):
        yield slice(start, min(start + _STRIP, height))


def _difference(a: Array, b: Array | float) -> Array:
    """a - b without wrap-around: exact in float32 up to 16 bits, in float64 above."""
    return np.subtract(a, b, dtype=np.result_type(a, b, np.float32))


def _levels_per_unit(data_range: float) -> float:
    """Levels per pixel unit; 0 for the empty range of a flat image."""
    if not (math.isfinite(data_range) and data_range >= 0):
        raise UsageError(f"got a data range of {data_range}, expected a number of at least 0")
    return LEVELS / data_range if data_range else 0.0


def _check_image(pixels: Array) -> None:
    if pixels.ndim != 3 or pixels.size == 0:
        raise UnsupportedImage(
            f"got an array of shape {pixels.shape}, expected (height, width, channels), none of 0"
        )


def _check_pair(a: Array, b: Array) -> None:
    _check_image(a)
    if a.shape != b.shape:
        raise UnsupportedImage(
            f"got images of shapes {a.shape} and {b.shape}, expected equal ones (height, width, "
            "channels); give a reference of the image's own size and channels"
        )


# --- Noise ------------------------------------------------------------------------------------


def _spread_windows(pixels: Array) -> list[Array]:
    """The image itself, or at most SIGMA_PIXELS of it in windows of equal size."""
    height, width = pixels.shape[:2]
    if height * width <= SIGMA_PIXELS:
        return [pixels]
    side_y, side_x = min(SIGMA_WINDOW, height), min(SIGMA_WINDOW, width)
    count = SIGMA_PIXELS // (side_y * side_x)
    rows = min(max(round(math.sqrt(count * height / width)), 1), count, height // side_y)
    columns = min(count // rows, width // side_x)
    return [
        pixels[y : y + side_y, x : x + side_x]
        for y in _starts(height - side_y, rows)
        for x in _starts(width - side_x, columns)
    ]


def _starts(last: int, count: int) -> list[int]:
    """`count` offsets spread over 0..last; a single one in the middle."""
    return [last // 2] if count == 1 else [last * i // (count - 1) for i in range(count)]


def _diagonal_details(windows: list[Array]) -> list[Array]:
    """The finest diagonal db2 coefficients of all windows, one array for each channel."""
    planes = [np.ascontiguousarray(window.transpose(2, 0, 1)) for window in windows]
    return [
        np.concatenate([_details_down(_details_down(plane).T).ravel() for plane in channel])
        for channel in zip(*planes, strict=True)
    ]


def _details_down(plane: Array) -> Array:
    """The finest db2 details along the first axis: `pywt.dwt(plane, "db2", axis=0)[1]`.

    That would work out the approximation too, and strides through memory: two to seven times the
    time.
    """
    import pywt

    height = len(plane)
    count = (height + 3) // 2
    plane = np.pad(plane, ((2, 2 + height % 2), (0, 0)), "symmetric")
    plane = plane.astype(np.result_type(plane, np.float32), copy=False)
    taps = np.asarray(pywt.Wavelet("db2").dec_hi[::-1], plane.dtype)
    starts = range(len(taps))
    return reduce(add, (taps[i] * plane[i : i + 2 * count - 1 : 2] for i in starts))


def _mad_sigma(details: Array) -> float:
    details = details[details != 0]
    return float(np.median(np.abs(details))) / MAD_TO_SIGMA if details.size else 0.0


# --- SSIM -------------------------------------------------------------------------------------


def _ssim_sums(a: Array, b: Array, data_range: float) -> tuple[float, int]:
    """Sum of SSIM over all whole windows and channels, and their number."""
    height, width = (side - 2 * SSIM_RADIUS for side in a.shape[:2])
    if height < 1 or width < 1:
        return 0.0, 0
    total = 0.0
    for y in range(0, height, _SSIM_TILE):
        rows = slice(y, min(y + _SSIM_TILE, height) + 2 * SSIM_RADIUS)
        for x in range(0, width, _SSIM_TILE):
            columns = slice(x, min(x + _SSIM_TILE, width) + 2 * SSIM_RADIUS)
            for c in range(a.shape[2]):
                tile = (rows, columns, c)
                total += _ssim_tile(a[tile], b[tile], 1 / data_range)
    return total, height * width * a.shape[2]


def _ssim_tile(a: Array, b: Array, per_unit: float) -> float:
    """Sum of the SSIM map of two arrays (h, w).

    Variances do not depend on an offset, so one is taken away before squaring: float32 then
    keeps six digits of them also where the values are far from zero.
    """
    offset = float(a.mean())
    maps = np.empty((a.shape[0], 4, a.shape[1]), np.float32)
    u, v, squares, product = maps.transpose(1, 0, 2)
    np.multiply(_difference(a, offset), per_unit, out=u, casting="same_kind")
    np.multiply(_difference(b, offset), per_unit, out=v, casting="same_kind")
    np.multiply(u, v, out=product)
    np.add(u * u, v * v, out=squares)
    return _ssim_of_means(*_window_means(maps), offset=offset * per_unit)


def _ssim_of_means(
    mean_u: Array, mean_v: Array, squares: Array, product: Array, *, offset: float
) -> float:
    """Sum of SSIM from the window means of u, v, u^2 + v^2 and u v, of u and v less an offset."""
    cross = mean_u * mean_v
    both = mean_u * mean_u
    both += mean_v * mean_v
    structure = (2 * (product - cross) + SSIM_K2**2) / (squares - both + SSIM_K2**2)
    shift = offset * (mean_u + mean_v + offset)  # (u + o)(v + o) = u v + o (u + v + o)
    cross += shift
    both += 2 * shift
    luminance = (2 * cross + SSIM_K1**2) / (both + SSIM_K1**2)
    return float(np.vdot(luminance, structure))


def _window_means(maps: Array) -> Array:
    """Gaussian means of whole windows: (h, n, w) float32 -> (n, h - 10, w - 10).

    Two products with a banded matrix: half the time of scipy.ndimage on tiles of this size.
    """
    height, count, width = maps.shape
    down = _band(height - 2 * SSIM_RADIUS) @ maps.reshape(height, count * width)
    across = down.reshape(-1, width) @ _band(width - 2 * SSIM_RADIUS).T
    return across.reshape(-1, count, across.shape[1]).transpose(1, 0, 2)


@cache
def _band(size: int) -> Array:
    """(size, size + 10) float32: row i holds the Gaussian window from column i on."""
    offsets = np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    window = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    band = np.zeros((size, size + 2 * SSIM_RADIUS), np.float32)
    for row in range(size):
        band[row, row : row + len(window)] = window / window.sum()
    return band
