"""Seeded noise models and degradations: clean pixels in, noisy pixels out.

    parse_noise("gaussian:0-55").apply(clean, np.random.default_rng(0))

A noise is written as text. `NAME:LEVEL` has one level, `NAME:LOW-HIGH` draws it uniformly, once for
each image or crop; a second level follows a second colon. Sigmas are in 1/255 of the data
range. A blur is at most an eighth of the shorter side of the image or crop.

    gaussian:25  gaussian:0-55   white, neither clipped nor quantised
    uniform:40                   white, between -40/255 and 40/255
    poisson:30-1000              photon noise, that many photons at white
    shot-read  shot-read:0.01    variance a x + b, a is the level
    speckle:20                   multiplicative: x N(0, 20/255)
    correlated:25:0.4-1.2        Gaussian of that sigma after a blur of 0.4-1.2 px
    chroma:10:1-4                colour blobs of 1-4 px; the luma stays
    salt-pepper:0.01-0.1         that share of the pixels turns black or white
    factor:0.5                   the classic "noise factor 0.5": N(0, 0.5), clipped
    jpeg:30-98                   8 bits, through a JPEG of that quality
    sensor  sensor:0.01          shot-read in linear light, as a camera's picture shows it
    camera                       sensor, colour blobs, defects and JPEG, mixed as photographs are
    clean  clip  quantize        nothing; to [0, 1]; to 8 bits

`A+B` is A, then B on its result. `A|B`, or a list, is one of them for each image, and
`0.1*clean|0.9*gaussian:0-55` weighs them. `str(noise)` is the text that makes it again.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from denoise_core.config import nearest, require
from denoise_core.errors import UnsupportedImage, UsageError

Array = np.ndarray

# No sign in the exponent but minus: plus joins noises.
NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"


def _pairs(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _number_text(value: float) -> str:
    return repr(float(value)).removesuffix(".0").replace("e+", "e")


def _range_text(low: float, high: float) -> str:
    return _number_text(low) if low == high else f"{_number_text(low)}-{_number_text(high)}"


class Noise(ABC):
    """A noise with its levels. `form` is how to write it, in a sentence of an error."""

    __slots__ = ()
    name: ClassVar[str]
    form: ClassVar[str]

    @abstractmethod
    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return noisy float32 of the shape of `clean`, which is left alone.

        `clean` is float32 (H, W, 1) or (H, W, 3) in [0, 1]; the result may leave that range. The
        result is a function of `clean` and the state of `rng`.
        """

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Clean(Noise):
    """No noise."""

    name: ClassVar[str] = "clean"
    form: ClassVar[str] = "clean, without a level"

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return a copy."""
        return np.array(clean, np.float32)


@dataclass(frozen=True, slots=True)
class Clip(Noise):
    """Values below 0 and above 1 become 0 and 1."""

    name: ClassVar[str] = "clip"
    form: ClassVar[str] = "clip, without a level"

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return the clipped values."""
        return np.clip(clean, np.float32(0.0), np.float32(1.0))


@dataclass(frozen=True, slots=True)
class Quantize(Noise):
    """Values become the nearest of the 256 that 8 bits hold, so they are clipped too."""

    name: ClassVar[str] = "quantize"
    form: ClassVar[str] = "quantize, without a level"

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return multiples of 1/255 in [0, 1]."""
        return _from_8_bits(_to_8_bits(clean))


@dataclass(frozen=True, slots=True)
class Level(Noise):
    """A noise with one level, drawn uniformly between `low` and `high` for each image."""

    low: float
    high: float
    least: ClassVar[float] = 0.0
    most: ClassVar[float] = math.inf

    def __post_init__(self) -> None:
        ordered = all(0 <= a <= b < math.inf for a, b in _pairs(dataclasses.astuple(self)))
        require(
            ordered and self.least <= self.low and self.high <= self.most,
            f"the level of {self.name} cannot be {_range_text(self.low, self.high)}: "
            f"expected {self.form}.",
        )

    def __str__(self) -> str:
        values, default = dataclasses.astuple(self), [f.default for f in dataclasses.fields(self)]
        texts = [_range_text(*pair) for pair in _pairs(values)]
        while texts and _pairs(values)[len(texts) - 1] == _pairs(default)[len(texts) - 1]:
            texts.pop()
        return ":".join([self.name, *texts])

    def level(self, rng: np.random.Generator) -> float:
        """Draw the level of one image."""
        return rng.uniform(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Gaussian(Level):
    """Additive white Gaussian noise, y = x + N(0, sigma / 255), neither clipped nor quantised."""

    name: ClassVar[str] = "gaussian"
    form: ClassVar[str] = "gaussian:SIGMA or gaussian:LOW-HIGH, sigma in 1/255, such as 25 or 0-55"

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return noisy float32 of the shape of `clean`."""
        # Level first, then the field: runs that are resumed depend on this order.
        sigma = np.float32(self.level(rng) / 255.0)
        noise = rng.standard_normal(clean.shape, dtype=np.float32)
        noise *= sigma
        noise += clean
        return noise


@dataclass(frozen=True, slots=True)
class Uniform(Level):
    """Additive white noise between -width / 255 and width / 255."""

    name: ClassVar[str] = "uniform"
    form: ClassVar[str] = "uniform:WIDTH or uniform:LOW-HIGH, half its spread in 1/255, such as 40"

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return noisy float32 of the shape of `clean`; its sigma is width / 255 / sqrt(3)."""
        width = np.float32(self.level(rng) / 255.0)
        return clean + width * (2 * rng.random(clean.shape, dtype=np.float32) - 1)


@dataclass(frozen=True, slots=True)
class Poisson(Level):
    """Photon noise, y = Poisson(x peak) / peak: variance x / peak. Negative x counts as 0."""

    name: ClassVar[str] = "poisson"
    form: ClassVar[str] = "poisson:PEAK or poisson:LOW-HIGH, photons at white, such as 30-1000"
    least: ClassVar[float] = 1e-3
    most: ClassVar[float] = 1e9

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return noisy float32 of the shape of `clean`."""
        peak = self.level(rng)
        photons = rng.poisson(np.maximum(clean, 0.0) * peak)
        return (photons / peak).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Speckle(Level):
    """Multiplicative noise, y = x + x N(0, sigma / 255)."""

    name: ClassVar[str] = "speckle"
    form: ClassVar[str] = "speckle:SIGMA or speckle:LOW-HIGH, sigma at white in 1/255, such as 20"

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return noisy float32 of the shape of `clean`."""
        sigma = np.float32(self.level(rng) / 255.0)
        return clean + clean * (sigma * rng.standard_normal(clean.shape, dtype=np.float32))


@dataclass(frozen=True, slots=True)
class SaltPepper(Level):
    """A share of the pixels, whole with all channels, turns black (half of them) or white."""

    name: ClassVar[str] = "salt-pepper"
    form: ClassVar[str] = (
        "salt-pepper:SHARE or salt-pepper:LOW-HIGH, a share of the pixels from 0 to 1, such as 0.05"
    )
    most: ClassVar[float] = 1.0

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return noisy float32 of the shape of `clean`."""
        share = self.level(rng)
        dice = rng.random((*clean.shape[:2], 1))
        noisy = np.where(dice < share, np.float32(0.0), clean)
        return np.where(dice < share / 2, np.float32(1.0), noisy)


@dataclass(frozen=True, slots=True)
class Factor(Level):
    """The "noise factor" of autoencoder tutorials: clip(x + N(0, factor)), of the data range."""

    name: ClassVar[str] = "factor"
    form: ClassVar[str] = "factor:F or factor:LOW-HIGH, a share of the data range, such as 0.5"

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return noisy float32 of the shape of `clean`, in [0, 1]."""
        factor = np.float32(self.level(rng))
        noise = factor * rng.standard_normal(clean.shape, dtype=np.float32)
        return np.clip(clean + noise, np.float32(0.0), np.float32(1.0))


@dataclass(frozen=True, slots=True)
class Correlated(Level):
    """Additive Gaussian noise, blurred by a Gaussian of `blur_low`-`blur_high` px.

    It is scaled up again after the blur, so that sigma is that of the result. Demosaicing leaves
    such noise in photographs.
    """

    blur_low: float = 0.4
    blur_high: float = 1.2
    name: ClassVar[str] = "correlated"
    form: ClassVar[str] = (
        "correlated:SIGMA or correlated:LOW-HIGH, sigma in 1/255, and perhaps the blur in pixels, "
        "such as correlated:5-25:0.4-1.2"
    )

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return noisy float32 of the shape of `clean`."""
        sigma = np.float32(self.level(rng) / 255.0)
        blur = rng.uniform(self.blur_low, self.blur_high)
        return clean + sigma * blurred_noise(clean.shape, blur=blur, rng=rng)


@dataclass(frozen=True, slots=True)
class Chroma(Level):
    """Colour blobs: blurred noise of `sigma` in both chroma planes of BT.601. Grey stays grey."""

    blur_low: float = 1.0
    blur_high: float = 4.0
    name: ClassVar[str] = "chroma"
    form: ClassVar[str] = (
        "chroma:SIGMA or chroma:LOW-HIGH, sigma in 1/255, and perhaps the blobs' blur in pixels, "
        "such as chroma:2-10:1-4"
    )

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return noisy float32 of the shape of `clean`, of the same luma."""
        sigma = np.float32(self.level(rng) / 255.0)
        blur = rng.uniform(self.blur_low, self.blur_high)
        if clean.shape[2] != 3:
            return np.array(clean, np.float32)
        planes = sigma * blurred_noise((*clean.shape[:2], 2), blur=blur, rng=rng)
        return clean + planes @ CHROMA_TO_RGB


# ITU-R BT.601: RGB for one unit of Cb and of Cr.
CHROMA_TO_RGB = np.array([[0.0, -0.344136, 1.772], [1.402, -0.714136, 0.0]], np.float32)


@dataclass(frozen=True, slots=True)
class Jpeg(Level):
    """Clipped, rounded to 8 bits, and through a JPEG in memory (Pillow's, 4:2:0 for colour)."""

    name: ClassVar[str] = "jpeg"
    form: ClassVar[str] = (
        "jpeg:QUALITY or jpeg:LOW-HIGH, whole numbers from 1 to 100, such as 30-98"
    )
    least: ClassVar[float] = 1
    most: ClassVar[float] = 100

    def __post_init__(self) -> None:
        Level.__post_init__(self)
        require(
            float(self.low).is_integer() and float(self.high).is_integer(),
            f"the level of jpeg cannot be {_range_text(self.low, self.high)}: "
            f"expected {self.form}.",
        )

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return float32 of the shape of `clean`, multiples of 1/255 in [0, 1].

        Raises UnsupportedImage for other than 1 or 3 channels.
        """
        from PIL import Image

        if clean.shape[2] not in (1, 3):
            raise UnsupportedImage(
                f"the noise jpeg takes images of 1 or 3 channels, not of {clean.shape[2]}; leave "
                "the image or the noise out"
            )
        quality = int(rng.integers(int(self.low), int(self.high) + 1))
        pixels, file = _to_8_bits(clean), io.BytesIO()
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        image.save(file, "JPEG", quality=quality)
        return _from_8_bits(np.asarray(Image.open(file)).reshape(clean.shape))


@dataclass(frozen=True, slots=True)
class ShotRead(Level):
    """Shot and read noise of linear values, y = x + N(0, sqrt(a x + b)), a log-uniform.

    log b = 2.18 log a + 1.20 + N(0, 0.26): Brooks et al., Unprocessing Images for Learned Raw
    Denoising, CVPR 2019 (https://arxiv.org/abs/1811.11127), fitted to the Darmstadt data set.
    """

    low: float = 1e-4
    high: float = 0.012
    name: ClassVar[str] = "shot-read"
    form: ClassVar[str] = (
        "shot-read, shot-read:SHOT or shot-read:LOW-HIGH, the variance at white from 1e-9 to 1, "
        "such as 0.0001-0.012"
    )
    least: ClassVar[float] = 1e-9
    most: ClassVar[float] = 1.0

    def level(self, rng: np.random.Generator) -> float:
        """Draw the shot noise's variance at white."""
        return math.exp(rng.uniform(math.log(self.low), math.log(self.high)))

    def variances(self, rng: np.random.Generator) -> tuple[float, float]:
        """Draw (a, b) of one image."""
        shot = self.level(rng)
        return shot, math.exp(2.18 * math.log(shot) + 1.20 + rng.normal(0.0, 0.26))

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return noisy float32 of the shape of `clean`. Negative values have read noise only."""
        shot, read = self.variances(rng)
        sigma = np.sqrt(np.float32(shot) * np.maximum(clean, np.float32(0.0)) + np.float32(read))
        return clean + sigma * rng.standard_normal(clean.shape, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Sensor(ShotRead):
    """Shot and read noise as a developed photograph shows it: made in linear light.

    Out of the picture: tone curve (smoothstep, half of the time) and gamma 2.2; there the noise of
    raw values, amplified by the white balance (red by 1.9-2.4, blue by 1.5-1.9); clipped; and back
    through the same curves. Curves, gains and levels are those of Brooks et al., CVPR 2019
    (https://arxiv.org/abs/1811.11127). Their colour matrix and their random brightening gain are
    left out; in place of mosaic and demosaic the noise is blurred by 0.4-1.2 px, 60 % of the time,
    its sigma kept. Grey pictures have no gains.
    """

    name: ClassVar[str] = "sensor"
    form: ClassVar[str] = (
        "sensor, sensor:SHOT or sensor:LOW-HIGH, the raw variance at white from 1e-9 to 1, "
        "such as 0.0001-0.012"
    )

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return noisy float32 of the shape of `clean`, in [0, 1]."""
        shot, read = self.variances(rng)
        tone = bool(rng.random() < 0.5)
        gains = [rng.uniform(1.9, 2.4), 1.0, rng.uniform(1.5, 1.9)]
        gain = np.array(gains if clean.shape[2] == 3 else [1.0], np.float32)
        blur = rng.uniform(0.4, 1.2) if rng.random() < 0.6 else 0.0
        linear = to_linear(clean, tone=tone)
        # A raw value x / gain of variance a x / gain + b, times the gain.
        noise = np.sqrt(np.float32(shot) * gain * linear + np.float32(read) * gain**2)
        noise *= blurred_noise(clean.shape, blur=blur, rng=rng)
        noise += linear
        return from_linear(noise, tone=tone)


@dataclass(frozen=True, slots=True)
class Chain(Noise):
    """Noises one after the other, each on the result of that before it."""

    parts: tuple[Noise, ...]
    form: ClassVar[str] = "A+B"

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return noisy float32 of the shape of `clean`."""
        noisy = clean
        for part in self.parts:
            noisy = part.apply(noisy, rng)
        return noisy

    def __str__(self) -> str:
        return "+".join(str(part) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Mixture(Noise):
    """One of several noises for each image, drawn in proportion to `weights`; none: all alike."""

    parts: tuple[Noise, ...]
    weights: tuple[float, ...] = ()
    form: ClassVar[str] = "A|B or 0.1*A|0.9*B"

    def __post_init__(self) -> None:
        require(
            len(self.weights) in (0, len(self.parts)),
            f"{len(self.weights)} of {len(self.parts)} noises of a mixture have a weight: give one "
            "to all, such as 0.1*clean|0.9*gaussian:25, or to none.",
        )
        require(
            not self.weights or 0 < sum(self.weights) < math.inf,
            "the weights of a mixture sum to 0: expected at least one above it.",
        )

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return noisy float32 of the shape of `clean`."""
        bounds = np.cumsum(self.weights or [1.0] * len(self.parts))
        place = int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))
        return self.parts[min(place, len(self.parts) - 1)].apply(clean, rng)

    def __str__(self) -> str:
        if not self.weights:
            return "|".join(str(part) for part in self.parts)
        pairs = zip(self.weights, self.parts, strict=True)
        return "|".join(f"{_number_text(weight)}*{part}" for weight, part in pairs)


@dataclass(frozen=True, slots=True)
class ShiftedGrid(Noise):
    """JPEG blocks that do not begin at the picture's corner, as in a photograph that was cut."""

    jpeg: Jpeg
    form: ClassVar[str] = "a part of camera"

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return float32 of the shape of `clean`, multiples of 1/255 in [0, 1]."""
        # Chroma of 4:2:0 comes in blocks of 16 px.
        top, left = (int(n) for n in rng.integers(16, size=2))
        larger = np.pad(clean, ((top, 0), (left, 0), (0, 0)), mode="symmetric")
        return self.jpeg.apply(larger, rng)[top:, left:]


def sometimes(share: float, noise: Noise) -> Mixture:
    """Return `noise` in that share of the images, nothing in the others."""
    return Mixture((noise, Clean()), (share, 1.0 - share))


CAMERA = sometimes(
    0.9,
    Chain(
        (
            sometimes(0.9, Sensor()),
            sometimes(0.3, Chroma(1.0, 8.0)),
            sometimes(0.2, Correlated(1.0, 10.0)),
            sometimes(0.1, Speckle(2.0, 20.0)),
            sometimes(0.05, SaltPepper(0.0, 0.01)),
            sometimes(0.6, ShiftedGrid(Jpeg(30, 98))),
        )
    ),
)


@dataclass(frozen=True, slots=True)
class Camera(Noise):
    """What photographs from cameras suffer, for training: `CAMERA`, then 8 bits.

    10 % clean pairs, so that clean pictures are left alone; else the noise of `Sensor` (90 %),
    colour blobs (30 %), correlated noise that does not follow the light, as raw developers leave
    it (20 %), speckle (10 %), salt and pepper (5 %), and last a JPEG of quality 30-98 whose blocks
    lie anywhere (60 %). The levels of `Sensor` are fitted to cameras; the shares are choices.
    """

    name: ClassVar[str] = "camera"
    form: ClassVar[str] = "camera, without a level"

    def apply(self, clean: Array, rng: np.random.Generator) -> Array:
        """Return float32 of the shape of `clean`, multiples of 1/255 in [0, 1]."""
        return Quantize().apply(CAMERA.apply(clean, rng), rng)


NOISE_MODELS: dict[str, type[Noise]] = {
    "gaussian": Gaussian,
    "uniform": Uniform,
    "poisson": Poisson,
    "shot-read": ShotRead,
    "speckle": Speckle,
    "correlated": Correlated,
    "chroma": Chroma,
    "salt-pepper": SaltPepper,
    "factor": Factor,
    "jpeg": Jpeg,
    "sensor": Sensor,
    "camera": Camera,
    "clean": Clean,
    "clip": Clip,
    "quantize": Quantize,
}


def parse_noise(spec: str | Sequence[str]) -> Noise:
    """Read a noise as the module's docstring writes it; a list is a mixture. Raises UsageError."""
    text = spec if isinstance(spec, str) else "|".join(spec)
    try:
        pairs = [_weighted(part) for part in text.split("|")]
        if len(pairs) == 1 and pairs[0][0] is None:
            return pairs[0][1]
        weights = tuple(weight for weight, _ in pairs if weight is not None)
        return Mixture(tuple(noise for _, noise in pairs), weights)
    except UsageError as error:
        raise UsageError(f"--noise {text!r}: {error}") from error


def _weighted(text: str) -> tuple[float | None, Noise]:
    """Read `WEIGHT*A+B` or `A+B`."""
    match = re.fullmatch(rf"\s*(?:({NUMBER})\s*\*)?(.*)", text, re.DOTALL)
    assert match is not None
    parts = tuple(_one(part.strip()) for part in match[2].split("+"))
    weight = None if match[1] is None else float(match[1])
    return weight, parts[0] if len(parts) == 1 else Chain(parts)


def _one(text: str) -> Noise:
    """Read `NAME`, `NAME:LEVEL` or `NAME:LEVEL:LEVEL`."""
    name, *levels = text.split(":")
    if name not in NOISE_MODELS:
        known = ", ".join(NOISE_MODELS)
        hint = nearest(name, NOISE_MODELS) or f" Expected one of {known}."
        raise UsageError(f"unknown noise {name!r}.{hint}")
    model = NOISE_MODELS[name]
    ranges = [re.fullmatch(rf"({NUMBER})(?:-({NUMBER}))?", level) for level in levels]
    fields = dataclasses.fields(model)  # type: ignore[arg-type]
    needed = sum(field.default is dataclasses.MISSING for field in fields)
    if None in ranges or not needed <= 2 * len(ranges) <= len(fields):
        raise UsageError(f"{text!r} cannot be read: expected {model.form}.")
    ends = [(m[1], m[2] or m[1]) for m in ranges if m is not None]
    return model(*(float(end) for pair in ends for end in pair))


def blurred_noise(shape: tuple[int, ...], *, blur: float, rng: np.random.Generator) -> Array:
    """Return float32 Gaussian noise of sigma 1, blurred by a Gaussian of `blur` px, 0 for white.

    Opposite borders are joined, so that the noise is alike everywhere. The blur is at most an
    eighth of the shorter side: a wider one would reach around and shift the image as a whole.
    """
    from scipy.ndimage import gaussian_filter, gaussian_filter1d

    noise = rng.standard_normal(shape, dtype=np.float32)
    if blur == 0.0:
        return noise
    blur = min(blur, min(shape[:2]) / 8)
    # The kernel's values are its answer to an impulse; 4 sigma is where SciPy cuts it off.
    impulse = np.zeros(2 * math.ceil(4 * blur) + 3)
    impulse[impulse.size // 2] = 1.0
    kernel = gaussian_filter1d(impulse, blur)
    noise = gaussian_filter(noise, (blur, blur, 0.0), mode="wrap")
    # Of independent values the variances add, along each of the two axes.
    return noise / np.float32(np.sum(kernel**2))


def to_linear(picture: Array, *, tone: bool) -> Array:
    """Undo a camera's curves: tone curve where `tone`, then gamma 2.2. Clips to [0, 1]."""
    return _look_up(picture, _curves(tone)[0])


def from_linear(linear: Array, *, tone: bool) -> Array:
    """Clip to [0, 1] and apply a camera's curves, the inverse of `to_linear`."""
    return _look_up(linear, _curves(tone)[1])


@functools.cache
def _curves(tone: bool) -> tuple[Array, Array]:
    """Return `to_linear` and `from_linear` as tables, float32.

    A crop of 96x96x3 takes 80 us in a table and 180 to 510 by formula (one loaded core); half a
    step of 1/65535 stays below the read noise of every level.
    """
    x = np.linspace(0.0, 1.0, 65536)
    # The inverse of 3 y^2 - 2 y^3, Brooks et al.
    bent = 0.5 - np.sin(np.arcsin(1.0 - 2.0 * x) / 3.0) if tone else x
    back = x ** (1 / 2.2)
    back = back * back * (3.0 - 2.0 * back) if tone else back
    return (np.maximum(bent, 0.0) ** 2.2).astype(np.float32), back.astype(np.float32)


def _look_up(values: Array, table: Array) -> Array:
    places = np.clip(values, np.float32(0.0), np.float32(1.0)) * np.float32(table.size - 1)
    places += np.float32(0.5)
    return table[places.astype(np.int32)]


def _to_8_bits(values: Array) -> Array:
    return np.rint(np.clip(values, 0.0, 1.0) * np.float32(255.0)).astype(np.uint8)


def _from_8_bits(pixels: Array) -> Array:
    return pixels.astype(np.float32) / np.float32(255.0)
