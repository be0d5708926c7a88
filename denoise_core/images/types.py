"""What an image is between its bytes and the model: header, metadata, pixels; and the size limit.

Nothing here imports a codec, so that the work list and the tests start fast.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denoise_core.errors import ImageTooLarge, NonFiniteValues, UnsupportedImage

Array = NDArray[Any]

MAX_PIXELS = 400_000_000
"""Most pixels of an image that is decoded whole: 400 Mpx of 8-bit RGB are 1.2 GB."""

MAX_WINDOWED_PIXELS = 100_000_000_000
"""Most pixels of what is read in windows; above it the header is taken for a bomb."""

SAME_DPI = 1e-3
"""Part of a resolution by which rounding may change it without a word: 118 dots/cm are 300 dpi."""

CODEC_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)
"""What Pillow, tifffile, zarr-python and their codecs raise on damaged files: nearly anything."""

SUPPORTED_DTYPES = frozenset(
    ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64")
)


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the first bytes of an image tell, without its pixels.

    `channels` is without alpha. `axes` are tifffile's letters ("YXS", "TCZYX"); every axis but
    Y and X is flattened into the channels. `bits` is the number of used bits of an integer sample
    (12 for 12-bit data in uint16), 0 for floats. `windowed`: the segments of the TIFF, the chunks
    of the Zarr can be read one by one with `read_window`. `tile` is their (height, width). `nodata`
    is the value, perhaps NaN, that stands for no picture.
    """

    format: str
    height: int
    width: int
    channels: int
    dtype: str
    has_alpha: bool = False
    windowed: bool = False
    axes: str = "YXS"
    bits: int = 0
    tile: tuple[int, int] | None = None
    nodata: float | None = None

    @property
    def samples(self) -> int:
        """Channels and alpha."""
        return self.channels + int(self.has_alpha)


@dataclass(slots=True)
class ImageMetadata:
    """Everything about an image that is not a pixel, enough to write it back as it came.

    `icc`, `xmp` and `exif` are raw blocks (`exif` begins with the TIFF byte order mark and keeps
    the orientation; pixels are never rotated). `dpi` is (x, y) in dots per inch. `native` holds
    what only the source's own format can carry; it is plain JSON data and bytes. `lost` names
    what was already given up when the image was read.
    """

    format: str
    dtype: str
    channels: int
    has_alpha: bool = False
    bits: int = 0
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    native: dict[str, Any] = field(default_factory=dict)
    lost: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """JSON with base64 for bytes; safe to read back from anyone, unlike a pickle."""
        return json.dumps(_pack(asdict(self))).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> ImageMetadata:
        """The inverse of `to_bytes`."""
        values = _unpack(json.loads(data))
        values["lost"] = tuple(values["lost"])
        values["dpi"] = None if values["dpi"] is None else tuple(values["dpi"])
        return cls(**values)


@dataclass(slots=True)
class DecodedImage:
    """Pixels (H, W, C), C-contiguous in native byte order, and alpha (H, W) of the same dtype."""

    pixels: Array
    alpha: Array | None
    header: ImageHeader
    metadata: ImageMetadata


def _pack(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode("ascii")}
    if isinstance(value, dict):
        return {key: _pack(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(item) for item in value]
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"base64"}:
            return base64.b64decode(value["base64"])
        return {key: _unpack(item) for key, item in value.items()}
    return [_unpack(item) for item in value] if isinstance(value, list) else value


def check_size(header: ImageHeader, *, name: str, max_pixels: int) -> ImageHeader:
    """The header itself, when the image fits in memory.

    Raises ImageTooLarge above `max_pixels` pixels; of an image of more than four samples every
    four count as one pixel.
    """
    groups = -(-header.samples // 4)
    pixels = header.height * header.width * groups
    if pixels > max_pixels:
        stack = f" of {header.samples} samples" if groups > 1 else ""
        # What is tiled and comes here is too small for windows, or becomes another format.
        tiled = "" if header.windowed else "convert it to a tiled TIFF, which is read in windows, "
        raise ImageTooLarge(
            f"{name}: the header tells {header.width}x{header.height} pixels{stack}, more than "
            f"the {max_pixels:,} that are decoded at once; {tiled}raise --max-pixels, or check "
            "whether the file is damaged"
        )
    return header


def check_dtype(dtype: np.dtype[Any], *, name: str) -> None:
    """Raise UnsupportedImage for dtypes that have no meaning as intensities."""
    if dtype.newbyteorder("=").name not in SUPPORTED_DTYPES:
        kind = "bilevel (1-bit)" if dtype.kind == "b" else dtype.name
        raise UnsupportedImage(
            f"{name}: {kind} samples are not denoised; expected 8-, 16- or 32-bit integers or "
            "floats; convert the image first"
        )


def check_finite(pixels: Array, *, name: str, nan: bool = False) -> None:
    """Raise NonFiniteValues where a float image holds infinity or, unless `nan`, NaN."""
    if pixels.dtype.kind != "f":
        return
    finite = np.isfinite(pixels)
    if nan:
        finite |= np.isnan(pixels)
    if not finite.all():
        count = int(finite.size - np.count_nonzero(finite))
        raise NonFiniteValues(
            f"{name}: {count} of {finite.size} values are NaN or infinite; the model needs "
            "finite values: replace them (by interpolation or 0), or name them as no data by the "
            "tag GDAL_NODATA of a TIFF, and run again"
        )


def split_alpha(samples: Array, has_alpha: bool) -> tuple[Array, Array | None]:
    """(H, W, S) -> contiguous pixels (H, W, C) and alpha (H, W), in native byte order."""
    samples = samples.astype(samples.dtype.newbyteorder("="), copy=False)
    if not has_alpha:
        return np.ascontiguousarray(samples), None
    return np.ascontiguousarray(samples[..., :-1]), np.ascontiguousarray(samples[..., -1])


def join_alpha(pixels: Array, alpha: Array | None) -> Array:
    """The inverse of `split_alpha`."""
    return pixels if alpha is None else np.concatenate((pixels, alpha[..., None]), axis=-1)


def grey_or_samples(samples: Array) -> Array:
    """(H, W, 1) -> (H, W), the shape that codecs want for grey; others unchanged."""
    return samples[..., 0] if samples.shape[-1] == 1 else samples


def whole_dpi(
    metadata: ImageMetadata,
    *,
    unit: float,
    most: int,
    told: tuple[float, float] | None = None,
) -> tuple[list[int], list[str]]:
    """[x, y] in whole dots per `unit` inches, [0, 0] where there are none or they do not fit.

    The list beside it names the loss, also that by rounding, unless the file's EXIF has `told` it.
    """
    if not metadata.dpi:
        return [0, 0], []
    exact = [value * unit for value in metadata.dpi]
    dots = [round(value) for value in exact]
    if min(dots) < 1 or max(dots) > most:
        return [0, 0], ["DPI"]
    rounded = any(abs(a - b) > SAME_DPI * b for a, b in zip(dots, exact, strict=True))
    return dots, ["DPI (rounded)"] if rounded and told != metadata.dpi else []


def refuse_false_alpha(samples: Array, metadata: ImageMetadata, *, target: str) -> None:
    """Raise UnsupportedImage when a format would take a channel for alpha."""
    if samples.shape[-1] in (2, 4) and not metadata.has_alpha:
        raise UnsupportedImage(
            f"{target} would take the last of these {samples.shape[-1]} channels for alpha, which "
            "it is not; use --format tiff or npy"
        )


def refuse_samples(samples: Array, *, target: str, allowed: Sequence[int], dtypes: str) -> None:
    """Raise UnsupportedImage when a format cannot hold these samples."""
    if samples.dtype.name not in dtypes.split():
        depths = {"uint8": "8", "uint16": "16", "float32": "32f"}
        fitting = " or ".join(depths[name] for name in dtypes.split() if name in depths)
        raise UnsupportedImage(
            f"{target} cannot hold {samples.dtype.name} samples, only {dtypes.replace(' ', ', ')}; "
            f"use --bit-depth {fitting}, or --format tiff"
        )
    if samples.shape[-1] not in allowed:
        raise UnsupportedImage(
            f"{target} cannot hold {samples.shape[-1]} samples a pixel (alpha counted), only "
            f"{', '.join(map(str, allowed))}; use --format tiff"
        )
