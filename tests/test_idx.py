"""IDX files: round trips of every type, and files that are damaged, cut short or lie."""

from __future__ import annotations

import gzip
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from denoise_core.errors import (
    CorruptImage,
    ImageError,
    ImageTooLarge,
    NotAnImage,
    UnsupportedImage,
)
from denoise_core.idx import is_idx, labels_name, read_idx

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def header(kind, shape):
    return bytes([0, 0, CODES[kind], len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


def idx(array):
    kind = array.dtype.str[1:]
    return header(kind, array.shape) + array.astype(f">{kind}").tobytes()


DIGITS = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)


@given(
    st.sampled_from(sorted(CODES)).flatmap(
        lambda kind: arrays.arrays(
            np.dtype(kind), arrays.array_shapes(max_dims=4, max_side=5, min_side=0)
        )
    ),
    st.booleans(),
)
def test_every_type_and_shape_comes_back(array, zipped):
    data = idx(array)
    back = read_idx(gzip.compress(data) if zipped else data)
    assert back.dtype == array.dtype
    assert back.dtype.isnative
    np.testing.assert_array_equal(back, array)


def test_the_array_is_a_copy_of_its_own():
    back = read_idx(idx(DIGITS))
    back[0] = 0
    assert back.flags.owndata
    assert back.flags.c_contiguous


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 3, 4, 9, 15, 16, 100, -1])
def test_a_file_cut_short_is_an_image_error(zipped, cut):
    data = gzip.compress(idx(DIGITS)) if zipped else idx(DIGITS)
    with pytest.raises(ImageError, match="digits"):
        read_idx(data[:cut], name="digits")


def test_trailing_bytes_are_an_error():
    with pytest.raises(CorruptImage, match=r"5x28x28 values of 1 byte.*3,936 bytes.*3,937"):
        read_idx(idx(DIGITS) + b"x")
    with pytest.raises(CorruptImage):
        read_idx(gzip.compress(idx(DIGITS)) + b"x")


def test_two_gzips_in_one_file_are_an_error():
    half = gzip.compress(idx(DIGITS))
    with pytest.raises(CorruptImage, match="goes on"):
        read_idx(half + half)


def test_a_flipped_bit_of_a_gzip_is_found_by_its_checksum():
    data = bytearray(gzip.compress(idx(DIGITS), compresslevel=0))
    data[len(data) // 2] ^= 1
    with pytest.raises(CorruptImage, match="gzip is damaged"):
        read_idx(bytes(data))


@pytest.mark.parametrize("zipped", [False, True])
def test_sizes_beyond_the_data_take_no_memory(zipped):
    lie = header("f8", (60_000, 60_000, 100)) + bytes(1000)
    tracemalloc.start()
    with pytest.raises(CorruptImage, match="60000x60000x100 values of 8"):
        read_idx(gzip.compress(lie) if zipped else lie)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_gzip_bomb_takes_no_memory():
    """A small header, and much more behind it than it tells."""
    bomb = gzip.compress(header("u1", (4, 28, 28)) + bytes(50_000_000))
    assert len(bomb) < 100_000
    tracemalloc.start()
    with pytest.raises(CorruptImage):
        read_idx(bomb)
    # One whose last bytes lie too.
    with pytest.raises(CorruptImage):
        read_idx(bomb[:-4] + struct.pack("<I", 16 + 4 * 28 * 28))
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_header_that_a_wrapped_length_would_confirm_is_refused():
    """2^32 values more than there are: the gzip's length is told modulo 2^32."""
    data = bytearray(gzip.compress(header("u1", (2**16, 2**16)) + b""))
    data[-4:] = struct.pack("<I", 12)
    with pytest.raises(CorruptImage, match="gzip"):
        read_idx(bytes(data))


def test_more_than_may_be_read_at_once_is_refused():
    with pytest.raises(ImageTooLarge, match=r"3,936 bytes, more than the 1,000"):
        read_idx(idx(DIGITS), max_bytes=1000)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", NotAnImage, "empty"),
        (b"\x89PNG\r\n\x1a\n", NotAnImage, "89 50 4e 47"),
        (b"\0\0\x07\x01\0\0\0\0", NotAnImage, "type"),
        (b"\0\0\x08\0", UnsupportedImage, "0 dimensions"),
        (b"\0\0\x08\xff", UnsupportedImage, "255 dimensions"),
        (b"\0\0\x08\x03\0\0", CorruptImage, "after 6 of 16 bytes"),
        (b"\x1f\x8bnonsense", CorruptImage, "gzip is damaged"),
    ],
)
def test_errors_say_what_was_found(data, error, words):
    with pytest.raises(error, match=words):
        read_idx(data)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train-images-idx3-ubyte.gz", True),
        ("mnist/t10k-labels-idx1-ubyte", True),
        ("train-images.idx3-ubyte", True),
        ("C:\\data\\digits.idx", True),
        ("digits.IDX.GZ", True),
        ("depth-idx2-float.gz", True),
        ("photo.png", False),
        ("idx/photo.png", False),
        ("index.html", False),
        ("archive.gz", False),
        ("some-idx3-ubyte/photo.jpg", False),
    ],
)
def test_idx_files_are_known_by_name(name, expected):
    assert is_idx(name) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/train-images-idx3-ubyte.gz", "a/train-labels-idx1-ubyte.gz"),
        ("t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte"),
        ("images/t10k-images-idx3-ubyte", "images/t10k-labels-idx1-ubyte"),
        ("images.idx", "labels.idx"),
        ("train-labels-idx1-ubyte.gz", None),
        ("images/photo.png", None),
        ("images.png", None),
    ],
)
def test_labels_lie_beside_their_images(name, expected):
    assert labels_name(name) == expected
