"""NumPy's .npy files as images: (H, W) or (H, W, C), pickles never loaded."""

from __future__ import annotations

import io
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np

from denoise_core.errors import CorruptImage, UnsupportedImage
from denoise_core.images.types import Array, ImageHeader, ImageMetadata, check_dtype

SIGNATURE = b"\x93NUMPY"
# Of a header of 9,000 brackets or signs Python's own parser raises the last two.
DAMAGE = (ValueError, EOFError, SyntaxError, TypeError, TokenError, RecursionError, MemoryError)


def read_header(file: BinaryIO, *, name: str) -> ImageHeader:
    """The header from the array's dictionary."""
    file.seek(0)
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    except DAMAGE as error:
        reason = str(error) or "nested too deeply"
        raise CorruptImage(
            f"{name}: the .npy header is damaged ({reason}); write the file again with numpy.save"
        ) from error
    return _header(shape, dtype, name=name)


def _header(shape: tuple[int, ...], dtype: np.dtype[np.generic], *, name: str) -> ImageHeader:
    if len(shape) not in (2, 3) or 0 in shape:
        raise UnsupportedImage(
            f"{name}: an array of shape {shape}; expected (height, width) or "
            "(height, width, channels), none of them 0: reshape or split it"
        )
    check_dtype(dtype, name=name)
    return ImageHeader(
        format="npy",
        height=shape[0],
        width=shape[1],
        channels=shape[2] if len(shape) == 3 else 1,
        dtype=dtype.newbyteorder("=").name,
        axes="YXS"[: len(shape)],
        bits=dtype.itemsize * 8 if dtype.kind in "ui" else 0,
    )


def decode(data: bytes, header: ImageHeader, *, name: str) -> tuple[Array, ImageMetadata]:
    """Samples (H, W, S) and metadata."""
    try:
        file = io.BytesIO(data)
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise CorruptImage(
            f"{name}: the .npy file is damaged or cut short ({error}); write it again"
        ) from error
    metadata = ImageMetadata(
        format="npy",
        dtype=header.dtype,
        channels=header.channels,
        bits=header.bits,
        native={
            "ndim": array.ndim,
            "order": "F" if np.isfortran(array) else "C",
            "byteorder": array.dtype.byteorder,
        },
        lost=("npy:data behind the first array",) if file.read(1) else (),
    )
    return array.reshape(header.height, header.width, -1), metadata


def encode(samples: Array, metadata: ImageMetadata) -> tuple[bytes, list[str]]:
    """Any samples -> file; grey is written as it came, (H, W) where it came from elsewhere."""
    native: dict[str, Any] = {"ndim": 2, "order": "C"}
    if metadata.format == "npy":
        native = metadata.native
    array = samples[..., 0] if samples.shape[-1] == 1 and native["ndim"] == 2 else samples
    dtype = array.dtype.newbyteorder(native.get("byteorder", "="))
    out = io.BytesIO()
    np.save(out, np.asarray(array, dtype=dtype, order=native["order"]), allow_pickle=False)
    lost = ["ICC profile"] if metadata.icc else []
    lost += ["EXIF"] if metadata.exif else []
    lost += ["XMP"] if metadata.xmp else []
    lost += ["DPI"] if metadata.dpi else []
    return out.getvalue(), lost
