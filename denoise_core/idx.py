"""IDX files, the format of MNIST: bytes to an array, gzipped or not.

    images = read_idx(Path("train-images-idx3-ubyte.gz").read_bytes())     # uint8 (60000, 28, 28)

The format: two zero bytes, a byte for the type, a byte for the number of dimensions, their sizes as
big-endian uint32, then the values, big-endian (https://yann.lecun.org/exdb/mnist/index.html).
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from pathlib import PurePosixPath

import numpy as np

from denoise_core.errors import CorruptImage, ImageTooLarge, NotAnImage, UnsupportedImage

Array = np.ndarray

DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_DIMENSIONS = 8
MAX_BYTES = 8 * 2**30
"""Most bytes of values that are read at once. MNIST's largest file has 47 MB, EMNIST's 548 MB."""

GZIP = b"\x1f\x8b"
# The sizes of 8 dimensions and the magic number.
HEADER = 4 + 4 * MAX_DIMENSIONS
# 32: a gzip's or zlib's own header, checked.
GZIP_WINDOW = 32 + zlib.MAX_WBITS


def is_idx(name: str) -> bool:
    """Whether a file's name is that of an IDX file: `train-images-idx3-ubyte.gz`, `x.idx`."""
    base = PurePosixPath(name.replace("\\", "/")).name.lower()
    types = "ubyte|byte|short|int|float|double"
    return re.fullmatch(rf".*[.-]idx\d*(-({types}))?(\.gz)?", base) is not None


def labels_name(name: str) -> str | None:
    """Return the name, folder kept, of the labels that belong to a file of images, or None.

    `mnist/train-images-idx3-ubyte.gz` -> `mnist/train-labels-idx1-ubyte.gz`.
    """
    match = re.fullmatch(r"((?:.*[/\\])?[^/\\]*)images([.-]idx)\d*([^/\\]*)", name)
    if match is None or not is_idx(name):
        return None
    digit = "1" if re.search(r"idx\d", name) else ""
    return f"{match[1]}labels{match[2]}{digit}{match[3]}"


def read_idx(data: bytes, *, name: str = "IDX data", max_bytes: int = MAX_BYTES) -> Array:
    """Return the array of an IDX file, gzipped or not, in native byte order, its own copy.

    Memory beyond the file's own is taken only once the header's sizes agree with the length of the
    data, that of a gzip being told by its last bytes and bounded while it is inflated. `name` goes
    into messages. Raises NotAnImage, CorruptImage, ImageTooLarge above `max_bytes`, and
    UnsupportedImage, all of them ImageErrors.
    """
    if not data:
        raise NotAnImage(f"{name}: the file is empty; copy or download it again.")
    zipped = data[:2] == GZIP
    head = _inflate(data, HEADER, name=name, whole=False) if zipped else data[:HEADER]
    dtype, shape, start = _header(head, name=name)
    size = start + math.prod(shape) * dtype.itemsize
    # The last four bytes of a gzip: the length of what it holds, modulo 2^32.
    length = struct.unpack("<I", data[-4:])[0] if zipped else len(data)
    if length != (size % 2**32 if zipped else size):
        raise CorruptImage(
            f"{name}: the header tells {_text(shape)} values of {dtype.itemsize} byte(s), "
            f"{size:,} bytes with itself, but there are {length:,}; the file is cut short or "
            "damaged: copy or download it again."
        )
    if size > max_bytes:
        raise ImageTooLarge(
            f"{name}: {_text(shape)} values take {size:,} bytes, more than the {max_bytes:,} that "
            "are read at once; split the file."
        )
    body = _inflate(data, size, name=name, whole=True) if zipped else data
    return _values(body, dtype, shape, start)


def _values(body: bytes, dtype: np.dtype, shape: tuple[int, ...], start: int) -> Array:
    values = np.frombuffer(body, dtype, offset=start).reshape(shape)
    return values.astype(dtype.newbyteorder("="))


def _header(head: bytes, *, name: str) -> tuple[np.dtype, tuple[int, ...], int]:
    """Return (dtype, shape, offset of the first value)."""
    if head[:2] != b"\0\0" or len(head) < 4 or head[2] not in DTYPES:
        raise NotAnImage(
            f"{name}: not an IDX file: it begins with {head[:4].hex(' ') or 'nothing'}, expected "
            "00 00, a type of 08, 09 or 0b to 0e, and the number of dimensions."
        )
    count = head[3]
    if not 1 <= count <= MAX_DIMENSIONS:
        raise UnsupportedImage(
            f"{name}: {count} dimensions; expected 1 to {MAX_DIMENSIONS}: check whether the file "
            "is damaged, or write it again with fewer."
        )
    start = 4 + 4 * count
    if len(head) < start:
        raise CorruptImage(
            f"{name}: the file ends in its header, after {len(head)} of {start} bytes; copy or "
            "download it again."
        )
    return np.dtype(DTYPES[head[2]]), struct.unpack(f">{count}I", head[4:start]), start


def _inflate(data: bytes, size: int, *, name: str, whole: bool) -> bytes:
    """Return the first `size` bytes of a gzip; `whole`: there must be just as many."""
    stream = zlib.decompressobj(GZIP_WINDOW)
    try:
        found = stream.decompress(data, size)
        # The gzip's checksum is read, and checked, only when all the rest was.
        extra = stream.decompress(stream.unconsumed_tail, 1) if whole else b""
    except zlib.error as error:
        raise CorruptImage(
            f"{name}: the gzip is damaged ({error}); copy or download it again."
        ) from error
    if whole and (len(found) != size or extra or not stream.eof or stream.unused_data):
        raise CorruptImage(
            f"{name}: the gzip does not hold the {size:,} bytes that the header tells, or goes on "
            "after them; copy or download it again."
        )
    return found


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in shape)
