"""TIFFs of microscopes and scanners: tags of every type, layouts told by private ones."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
import tifffile

from denoise_core.images import ImageMetadata, decode, encode

HEIGHT, WIDTH = 24, 32
VALUES: dict[int, Any] = {
    1: (1, 2, 3),
    2: "text",
    3: (1, 2, 65535),
    4: (1, 2**32 - 1),
    5: (3127, 10000, 3290, 10000),
    6: (-1, 2, 3),
    7: b"any bytes",
    8: (-1, 300),
    9: (-1, 2**31 - 1),
    10: (-7, 2, 5, 3, 1, 9),
    11: (0.5, 0.25),
    12: (0.1, -2.0),
}
"""Values by the TIFF type of their tag; rationals are pairs."""


def stack(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 4096, (*shape, HEIGHT, WIDTH)).astype("uint16")


def again(data: bytes, **options: str) -> tuple[bytes, tuple[str, ...]]:
    image = decode(data, name="x")
    metadata = ImageMetadata.from_bytes(image.metadata.to_bytes())
    return encode(image.pixels, image.alpha, metadata, **options)


def opened(data: bytes) -> tifffile.TiffFile:
    return tifffile.TiffFile(io.BytesIO(data))


def read(data: bytes) -> np.ndarray:
    with opened(data) as tif:
        return tif.series[0].asarray()


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_tags_of_every_type_come_out_as_they_were(byteorder: str, big: bool) -> None:
    out = io.BytesIO()
    tags = [
        (65000 + kind, kind, len(value) // (2 if kind in (5, 10) else 1), value, True)
        for kind, value in VALUES.items()
    ]
    tifffile.imwrite(out, stack(), byteorder=byteorder, bigtiff=big, extratags=tags, metadata=None)
    data, lost = again(out.getvalue())
    assert lost == ()
    with (
        opened(out.getvalue()) as before,
        opened(data) as after,
    ):
        for kind in VALUES:
            one, two = (tif.pages[0].tags[65000 + kind] for tif in (before, after))
            assert (one.dtype, one.count, one.value) == (two.dtype, two.count, two.value)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    ("byteorder", "named"), [("<", ()), (">", ("tiff:12 bits a sample (written with 16)",))]
)
def test_packed_bits_keep_their_values(
    byteorder: str, samples: int, named: tuple[str, ...]
) -> None:
    array = stack() if samples == 1 else np.moveaxis(stack(3), 0, -1)
    data = packed(array, byteorder)
    np.testing.assert_array_equal(read(data), array)
    out, lost = again(data)
    assert lost == named
    np.testing.assert_array_equal(read(out), array)


def packed(array: np.ndarray, byteorder: str) -> bytes:
    """Twelve bits a sample; they are packed alike in both byte orders."""
    kind = "rgb" if array.ndim == 3 else "minisblack"
    little, other = io.BytesIO(), io.BytesIO()
    tifffile.imwrite(little, array, bitspersample=12, photometric=kind, metadata=None)
    tifffile.imwrite(
        other, array, bitspersample=12, photometric=kind, metadata=None, byteorder=byteorder
    )
    with opened(little.getvalue()) as one, opened(other.getvalue()) as two:
        (size,), (source,), (target,) = (
            one.pages[0].databytecounts,
            one.pages[0].dataoffsets,
            two.pages[0].dataoffsets,
        )
    pixels = little.getvalue()[source : source + size]
    data = bytearray(other.getvalue())
    data[target : target + size] = pixels
    return bytes(data)


@pytest.mark.parametrize(("file_tag", "scale"), [(2, (1, 21025)), (128, (1, 1000))])
def test_md_gel_keeps_its_stored_values(file_tag: int, scale: tuple[int, int]) -> None:
    array = stack() * 13
    out = io.BytesIO()
    tags = [(33445, 4, 1, file_tag, True), (33446, 5, 1, scale, True)]
    tifffile.imwrite(out, array, extratags=tags, metadata=None)
    assert read(out.getvalue()).dtype == np.float32  # tifffile's scaled values
    image = decode(out.getvalue(), name="x")
    np.testing.assert_array_equal(image.pixels[..., 0], array)
    data, lost = again(out.getvalue())
    assert lost == ()
    np.testing.assert_array_equal(read(data), read(out.getvalue()))


@pytest.mark.parametrize("planes", [1, 3])
def test_lsm_is_written_without_its_own_layout(planes: int) -> None:
    array, out = stack(planes), io.BytesIO()
    info = np.zeros(1, tifffile.TIFF.CZ_LSMINFO)
    for name, value in {
        "MagicNumber": 67127628,
        "StructureSize": info.nbytes,
        "DimensionX": WIDTH,
        "DimensionY": HEIGHT,
        "DimensionZ": planes,
        "DimensionChannels": 1,
        "DimensionTime": 1,
    }.items():
        info[name] = value
    with tifffile.TiffWriter(out) as writer:
        for number, plane in enumerate(array):
            tags = [(34412, 1, info.nbytes, info.tobytes(), True)] if number == 0 else []
            writer.write(plane, extratags=tags, metadata=None, software=False)
            writer.write(plane[::4, ::4] >> 4, subfiletype=1, metadata=None, software=False)
    with opened(out.getvalue()) as tif:
        assert tif.series[0].kind == "lsm"
        axes = tif.series[0].axes
    data, lost = again(out.getvalue())
    assert "tiff:CZ_LSMINFO" in lost
    assert (f"tiff:axes {axes}" in lost) == (planes > 1)
    np.testing.assert_array_equal(read(data).reshape(array.shape), array)


def test_stk_is_written_without_its_own_layout() -> None:
    array, out = stack(3), io.BytesIO()
    moments = b"".join(struct.pack("<6I", z + 1, 1, 2458849, z, 2458849, z) for z in range(3))
    tags = [
        (33628, 4, 2, (0, 0), True),
        (33629, 5, 9, struct.unpack("<18I", moments), True),
    ]
    tifffile.imwrite(out, array[0], extratags=tags, metadata=None)
    with opened(out.getvalue()) as tif:
        tag = tif.pages[0].tags[33629]
    # Readers take three planes of six numbers each, though a rational is two.
    data = bytearray(out.getvalue() + array[1:].tobytes())
    data[tag.offset + 4 : tag.offset + 8] = struct.pack("<I", 3)
    np.testing.assert_array_equal(read(bytes(data)), array)
    written, lost = again(bytes(data))
    assert lost == ("tiff:UIC1tag", "tiff:UIC2tag", "tiff:axes ZYX")
    np.testing.assert_array_equal(read(written), array)


def test_scanimage_header_and_axes_are_named() -> None:
    array, out = stack(2, 2), io.BytesIO()
    told = b"SI.hChannels.channelSave = [1;2]\nSI.hStackManager.framesPerSlice = 2\n\0"
    with tifffile.TiffWriter(out, bigtiff=True) as writer:
        # Between the file's header and its first directory.
        out.seek(16)
        out.write(struct.pack("<IIII", 0x07030301, 4, len(told), 1) + told + bytes(64))
        for plane in array.reshape(4, HEIGHT, WIDTH):
            writer.write(plane, software="SI.LINE = 1", metadata=None)
    with opened(out.getvalue()) as tif:
        assert tif.series[0].axes == "TCYX"
    data, lost = again(out.getvalue())
    assert lost == ("tiff:ScanImage header", "tiff:axes TCYX")
    np.testing.assert_array_equal(read(data).reshape(array.shape), array)
