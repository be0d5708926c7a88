"""Which codec reads and writes what: the content decides the format, never the file name."""

from __future__ import annotations

import io
import math
import posixpath
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import BinaryIO

import numpy as np

from denoise_core.errors import CorruptImage, NotAnImage, UnsupportedImage, UsageError
from denoise_core.images import npy, pillow, png, tiff, zarr
from denoise_core.images.nodata import valid
from denoise_core.images.types import (
    MAX_PIXELS,
    MAX_WINDOWED_PIXELS,
    Array,
    DecodedImage,
    ImageHeader,
    ImageMetadata,
    check_finite,
    check_size,
    join_alpha,
    split_alpha,
)
from denoise_core.images.values import BIT_DEPTHS, data_range, inverted, rescale, to_dtype
from denoise_core.images.zarr import ZarrSource
from denoise_core.storage import Storage, is_bundle

PNG_LEVELS = tuple("0123456789")
FORMATS = ("png", "tiff", "jpeg", "webp", "bmp", "npy")

SUFFIXES = {
    "png": (".png",),
    "tiff": (".tiff", ".tif"),
    "jpeg": (".jpg", ".jpeg"),
    "webp": (".webp",),
    "bmp": (".bmp", ".dib"),
    "npy": (".npy",),
}
# Formats that people have in such folders, and that are refused by name.
FOREIGN = (
    (0, b"GIF8", "GIF (palette, perhaps animated)"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"SIMPLE  =", "FITS"),
    (128, b"DICM", "DICOM"),
    (0, b"%PDF", "PDF"),
    (0, b"\x89HDF", "HDF5"),
    (0, b"PK\x03\x04", "ZIP"),
)
SNIFF_BYTES = 132


Source = BinaryIO | ZarrSource
"""What can be read in windows: a seekable file, or a Zarr folder."""


@contextmanager
def open_image(storage: Storage, uri: str) -> Iterator[Source]:
    """Open what lies at a URI, a folder where its name ends in '.zarr'."""
    if is_bundle(uri):
        yield ZarrSource(storage, uri)
        return
    with storage.open(uri) as file:
        yield file


def fetch(storage: Storage, uri: str) -> bytes | ZarrSource:
    """What `decode` takes: a file's bytes, or a Zarr folder."""
    return ZarrSource(storage, uri) if is_bundle(uri) else storage.read(uri)


def _sniff(head: bytes, *, name: str) -> str:
    if head.startswith(png.SIGNATURE):
        return "png"
    if head.startswith(tiff.SIGNATURES):
        return "tiff"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith(npy.SIGNATURE):
        return "npy"
    if head.startswith(b"BM") and len(head) >= 26 and head[14:18] in _BMP_HEADER_SIZES:
        return "bmp"
    raise _foreign(head, name=name)


_BMP_HEADER_SIZES = tuple(size.to_bytes(4, "little") for size in (12, 16, 40, 52, 56, 64, 108, 124))


def _foreign(head: bytes, *, name: str) -> NotAnImage | UnsupportedImage:
    expected = "expected PNG, TIFF, JPEG, WebP, BMP, .npy or a .zarr folder"
    if not head:
        return NotAnImage(f"{name}: the file is empty; {expected}: copy or download it again")
    for offset, magic, kind in FOREIGN:
        if head[offset : offset + len(magic)] == magic:
            return UnsupportedImage(f"{name}: a {kind} file; {expected}: convert it first")
    return NotAnImage(
        f"{name}: begins with {head[:12]!r}, which no known image does; {expected}: leave it out "
        "or replace it"
    )


def read_header(source: bytes | Source, *, name: str, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """The header of an image, from its first bytes (TIFF: its directories) alone.

    `source` is the whole file, a seekable file or a Zarr folder. A TIFF that can be read in
    windows and a Zarr may have more than `max_pixels`. Raises NotAnImage, CorruptImage,
    UnsupportedImage, ImageTooLarge.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        source = io.BytesIO(source)
    if isinstance(source, ZarrSource):
        header = zarr.read_header(source, name=name)
    else:
        header = _read_header(source, name=name)
    limit = max(max_pixels, MAX_WINDOWED_PIXELS) if header.windowed else max_pixels
    return check_size(header, name=name, max_pixels=limit)


def _read_header(file: BinaryIO, *, name: str) -> ImageHeader:
    file.seek(0)
    kind = _sniff(file.read(SNIFF_BYTES), name=name)
    if kind == "png":
        return png.read_header(file, name=name)
    if kind == "tiff":
        return tiff.read_header(file, name=name)
    if kind == "jpeg":
        return pillow.read_jpeg_header(file, name=name)
    if kind == "webp":
        return pillow.read_webp_header(file, name=name)
    if kind == "bmp":
        return pillow.read_bmp_header(file, name=name)
    return npy.read_header(file, name=name)


def decode(
    data: bytes | ZarrSource,
    *,
    name: str,
    max_pixels: int = MAX_PIXELS,
    keep_nodata: bool = False,
) -> DecodedImage:
    """Pixels, alpha, header and metadata of a whole file or Zarr folder.

    Pixels are (H, W, C), C-contiguous, in native byte order and not rotated, whatever the EXIF
    orientation says. `bits` are all of the dtype's where pixels are brighter than the header tells.
    Raises what `read_header` raises, and NonFiniteValues; with `keep_nodata` not for NaN that the
    header names as no data.
    """
    header = read_header(data, name=name, max_pixels=max_pixels)
    check_size(header, name=name, max_pixels=max_pixels)
    samples, metadata = _decode_samples(data, header, name=name)
    if samples.shape != (header.height, header.width, header.samples):
        raise CorruptImage(
            f"{name}: the header tells {header.height}x{header.width}x{header.samples} samples, "
            f"the pixels are {samples.shape}; copy or download the file again"
        )
    check_finite(samples, name=name, nan=keep_nodata and _is_nan(header.nodata))
    pixels, alpha = split_alpha(samples, header.has_alpha)
    full = pixels.itemsize * 8
    if header.bits < full and uses_more_bits(pixels, header):
        header, metadata = replace(header, bits=full), replace(metadata, bits=full)
    return DecodedImage(pixels=pixels, alpha=alpha, header=header, metadata=metadata)


def uses_more_bits(pixels: Array, header: ImageHeader) -> bool:
    """Whether unsigned pixels are brighter than the bits that their header tells of."""
    if pixels.dtype.kind != "u":
        return False
    return int(valid(pixels, header.nodata).max(initial=0)) >= 1 << header.bits


def _is_nan(nodata: float | None) -> bool:
    return nodata is not None and math.isnan(nodata)


def _decode_samples(
    data: bytes | ZarrSource, header: ImageHeader, *, name: str
) -> tuple[Array, ImageMetadata]:
    if isinstance(data, ZarrSource):
        return zarr.decode(data, name=name)
    if header.format == "png":
        return png.decode(data, header, name=name)
    if header.format == "tiff":
        return tiff.decode(data, header, name=name)
    if header.format == "jpeg":
        return pillow.decode_jpeg(data, header, name=name)
    if header.format == "webp":
        return pillow.decode_webp(data, header, name=name)
    if header.format == "bmp":
        return pillow.decode_bmp(data, header, name=name)
    return npy.decode(data, header, name=name)


def read_metadata(file: Source, *, name: str) -> ImageMetadata:
    """Metadata of a windowed TIFF or a Zarr without its pixels, for `assemble`."""
    if isinstance(file, ZarrSource):
        return zarr.read_metadata(file, name=name)
    return tiff.read_metadata(file, tiff.read_header(file, name=name), name=name)


def read_window(
    file: Source, *, y: slice, x: slice, name: str = "image", keep_nodata: bool = False
) -> tuple[Array, Array | None]:
    """Pixels (h, w, C) and alpha (h, w) of rows `y` and columns `x` of a windowed TIFF or a Zarr.

    Reads only the tiles, strips, rows or chunks that the window touches. The same as a slice of
    `decode`, with the same option and errors.
    """
    if isinstance(file, ZarrSource):
        samples, header = zarr.read_window(file, y=y, x=x, name=name)
    else:
        samples, header = tiff.read_window(file, y=y, x=x, name=name)
    check_finite(samples, name=name, nan=keep_nodata and _is_nan(header.nodata))
    return split_alpha(samples, header.has_alpha)


def encode(
    pixels: Array,
    alpha: Array | None,
    metadata: ImageMetadata,
    *,
    format: str = "preserve",
    bit_depth: str = "preserve",
    compression: str | None = None,
    value_range: tuple[float, float] | None = None,
) -> tuple[bytes, tuple[str, ...]]:
    """The file, and the names of everything of the source that it does not hold.

    A Zarr is not encoded but assembled (`assemble.zarr_files`), or becomes another format here.
    `pixels` (H, W, C) are in the source's units and of its dtype, as it is, or floats that are
    rounded and clipped to it. `format` is one of FORMATS or "preserve". `bit_depth` "8", "16" or
    "32f" moves `value_range` (default: `data_range` of the source) to the range of that depth.
    `compression`: TIFF none, deflate, lzw, zstd or lzma; PNG a level of 0 to 9; one of another
    format than the file's leaves it as it would be without.
    Raises UnsupportedImage when the format cannot hold the image.
    """
    target = metadata.format if format == "preserve" else format
    _check_options(target, bit_depth, compression)
    source = np.dtype(metadata.dtype)
    dtype = source if bit_depth == "preserve" else np.dtype(BIT_DEPTHS[bit_depth])
    if dtype == source:
        lo, hi = value_range or (None, None)
        values = pixels if pixels.dtype == source else to_dtype(pixels, source, lo, hi)
        bounds = value_range or _range_of(values, metadata)
    else:
        values, alpha = _change_depth(pixels, alpha, dtype, metadata, value_range)
        bounds = data_range(dtype)
    if target != "tiff" and tiff.is_negative(metadata):
        values = inverted(values, bounds)
    data, lost = _encode_samples(join_alpha(values, alpha), metadata, target, compression)
    left = left_behind(metadata, target)
    if metadata.format == "tiff" and target != "tiff" and dtype == source:
        left += tiff.other_bits(metadata.native["bitspersample"], dtype)
    return data, tuple(dict.fromkeys((*metadata.lost, *left, *lost)))


def _check_options(target: str, bit_depth: str, compression: str | None) -> None:
    if target not in FORMATS:
        raise UsageError(f"format {target!r} is unknown; expected one of {', '.join(FORMATS)}")
    if bit_depth != "preserve" and bit_depth not in BIT_DEPTHS:
        raise UsageError(
            f"bit depth {bit_depth!r} is unknown; expected preserve, {', '.join(BIT_DEPTHS)}"
        )
    if compression is not None and compression not in {*PNG_LEVELS, *tiff.COMPRESSIONS}:
        known = ", ".join(tiff.COMPRESSIONS)
        raise UsageError(
            f"compression {compression!r} is unknown; expected {known} or a PNG level of 0 to 9"
        )


def _change_depth(
    pixels: Array,
    alpha: Array | None,
    dtype: np.dtype[np.generic],
    metadata: ImageMetadata,
    value_range: tuple[float, float] | None,
) -> tuple[Array, Array | None]:
    moved = rescale(pixels, dtype, source=value_range or _range_of(pixels, metadata))
    if alpha is None:
        return moved, None
    return moved, rescale(alpha, dtype, source=data_range(metadata.dtype))


def _range_of(pixels: Array, metadata: ImageMetadata) -> tuple[float, float]:
    source = np.dtype(metadata.dtype)
    return data_range(pixels if source.kind == "f" else source, bits=metadata.bits)


def _encode_samples(
    samples: Array, metadata: ImageMetadata, target: str, compression: str | None
) -> tuple[bytes, list[str]]:
    """What an encoder cannot write is a property of the image, not a bug that ends the run."""
    try:
        return _call_encoder(samples, metadata, target, compression)
    except (ArithmeticError, OSError, RuntimeError, ValueError, struct.error) as error:
        raise UnsupportedImage(
            f"this image or its metadata cannot be written as {target} ({error}); use another "
            "--format, tiff or png, or write the source again without its metadata"
        ) from error


def _call_encoder(
    samples: Array, metadata: ImageMetadata, target: str, compression: str | None
) -> tuple[bytes, list[str]]:
    fitting = fitting_compression(compression, target)
    if target == "png":
        return png.encode(samples, metadata, compression=fitting)
    if target == "tiff":
        return tiff.encode(samples, metadata, compression=fitting)
    if target == "jpeg":
        return pillow.encode_jpeg(samples, metadata)
    if target == "webp":
        return pillow.encode_webp(samples, metadata)
    if target == "bmp":
        return pillow.encode_bmp(samples, metadata)
    return npy.encode(samples, metadata)


def fitting_compression(compression: str | None, target: str) -> str | None:
    """`compression` where it is one of the format `target`, else None: that of the source."""
    known = {"png": PNG_LEVELS, "tiff": tuple(tiff.COMPRESSIONS)}
    return compression if compression in known.get(target, ()) else None


def left_behind(metadata: ImageMetadata, target: str) -> list[str]:
    """Names of the native metadata that another format has no place for."""
    if metadata.format == target:
        return []
    if metadata.format == "png":
        return png.left_behind(metadata)
    if metadata.format == "jpeg":
        return pillow.jpeg_left_behind(metadata)
    if metadata.format == "tiff":
        return tiff.tags_left_behind(metadata)
    if metadata.format == "zarr":
        return zarr.left_behind(metadata)
    return []


def output_name(path: str, format: str) -> str:
    """The output's relative path: the input's, with the new suffix behind it where it changes.

    "a/b.png" stays under "preserve" and "png"; under "tiff" it becomes "a/b.png.tiff", so that
    a.png and a.jpg never meet. The suffix names no content: a PNG called x.jpg stays x.jpg.
    """
    if format == "preserve":
        return path
    if format not in SUFFIXES:
        raise UsageError(f"format {format!r} is unknown; expected one of {', '.join(FORMATS)}")
    suffix = posixpath.splitext(path)[1].lower()
    return path if suffix in SUFFIXES[format] else path + SUFFIXES[format][0]
