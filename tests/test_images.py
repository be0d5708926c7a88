"""Fidelity matrix, bad inputs, windows and rounding of denoise_core.images."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zlib
from dataclasses import replace

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageCms, TiffImagePlugin

from denoise_core.errors import (
    CorruptImage,
    ImageError,
    ImageTooLarge,
    NonFiniteValues,
    NotAnImage,
    UnsupportedImage,
    UsageError,
)
from denoise_core.images import (
    ImageMetadata,
    data_range,
    decode,
    encode,
    output_name,
    read_header,
    read_metadata,
    read_window,
    rescale,
    to_dtype,
)
from denoise_core.images import png as png_module

HEIGHT, WIDTH = 37, 53
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def random_array(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    rng = np.random.default_rng(7)
    if np.dtype(dtype).kind == "f":
        return rng.random(shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, int(info.max) + 1, shape).astype(dtype)


def smooth(channels: int) -> np.ndarray:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    planes = [120 + 80 * np.sin((x + y * (c + 1)) / 17) for c in range(channels)]
    return np.stack(planes, -1).astype("uint8")


def exif_block(orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[271] = "Maker"
    exif[274] = orientation
    exif.get_ifd(34665).update({33434: 0.25, 36867: "2024:01:02 03:04:05"})
    return exif.tobytes()


def save(array: np.ndarray, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind, **options)
    return out.getvalue()


def save_tiff(array: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    return data[:33] + b"".join(chunk(*item) for item in chunks) + data[33:]


def again(data: bytes, **options: str) -> tuple[bytes, tuple[str, ...]]:
    """Decode and encode, with the metadata sent through its byte form."""
    image = decode(data, name="x")
    metadata = ImageMetadata.from_bytes(image.metadata.to_bytes())
    assert metadata == image.metadata
    return encode(image.pixels, image.alpha, metadata, **options)


def assert_same_image(first: bytes, second: bytes) -> None:
    one, two = decode(first, name="one"), decode(second, name="two")
    assert one.header.dtype == two.header.dtype
    assert one.header.has_alpha == two.header.has_alpha
    assert one.header.axes == two.header.axes
    assert one.header.bits == two.header.bits
    np.testing.assert_array_equal(one.pixels, two.pixels)
    if one.alpha is not None:
        np.testing.assert_array_equal(one.alpha, two.alpha)


# --- PNG ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("samples", [1, 2, 3, 4])
def test_png_comes_out_as_it_went_in(dtype: str, samples: int) -> None:
    array = random_array((HEIGHT, WIDTH, samples), dtype)
    data = imagecodecs.png_encode(array.squeeze())
    image = decode(data, name="a.png")
    assert image.pixels.shape == (HEIGHT, WIDTH, samples - (samples % 2 == 0))
    assert image.pixels.dtype == dtype
    assert image.pixels.flags.c_contiguous
    out, lost = again(data)
    assert lost == ()
    np.testing.assert_array_equal(imagecodecs.png_decode(out), array.squeeze())


def test_a_compression_is_for_the_formats_that_know_it() -> None:
    """A folder has files of several formats, the command line one --compression."""
    png = imagecodecs.png_encode(random_array((HEIGHT, WIDTH), "uint8"))
    tiff = save_tiff(random_array((HEIGHT, WIDTH), "uint8"))
    assert again(png, compression="lzw") == again(png)
    assert again(tiff, compression="6") == again(tiff)
    assert again(tiff, compression="lzw") != again(tiff)
    for data in (png, tiff):
        with pytest.raises(UsageError, match="compression 'zip' is unknown; expected none, lzw"):
            again(data, compression="zip")


def test_a_refused_depth_is_not_the_one_to_use() -> None:
    data = imagecodecs.png_encode(random_array((HEIGHT, WIDTH), "uint16"))
    with pytest.raises(UnsupportedImage, match="use --bit-depth 8, or --format tiff"):
        again(data, format="jpeg")


def test_png_chunks_come_out_as_they_went_in() -> None:
    chunks = [
        (b"iCCP", b"name\0\0" + zlib.compress(ICC)),
        (b"gAMA", struct.pack(">I", 45455)),
        (b"pHYs", struct.pack(">IIB", 11811, 5906, 1)),
        (b"tEXt", b"Title\0caf\xe9"),
        (b"eXIf", exif_block()[6:]),
        (b"sBIT", b"\x08\x08\x08"),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x/>"),
    ]
    data = with_chunks(imagecodecs.png_encode(random_array((9, 8, 3), "uint8")), *chunks)
    image = decode(data, name="a.png")
    assert image.metadata.icc == ICC
    assert image.metadata.xmp == b"<x/>"
    assert image.metadata.dpi == pytest.approx((300, 150), rel=1e-3)
    out, lost = again(data)
    assert lost == ()
    for item in chunks:
        assert chunk(*item) in out
    with Image.open(io.BytesIO(out)) as picture:
        assert picture.getexif()[274] == 6
        assert picture.info["icc_profile"] == ICC


def test_png_colour_key_becomes_alpha_and_is_named() -> None:
    out, lost = again(save(smooth(3), "png", transparency=(1, 2, 3)))
    assert lost == ("png:tRNS (colour key, written as an alpha channel)",)
    assert decode(out, name="x").header.has_alpha


def test_unsafe_unknown_png_chunk_is_named() -> None:
    data = with_chunks(imagecodecs.png_encode(smooth(1)[..., 0]), (b"abCD", b"x"), (b"abCd", b"y"))
    out, lost = again(data)
    assert lost == ("png:abCD",)
    assert b"abCd" in out


# --- TIFF ---------------------------------------------------------------------------------------

TIFF_DTYPES = [
    "uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64",
]  # fmt: skip


@pytest.mark.parametrize("dtype", TIFF_DTYPES)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((HEIGHT, WIDTH), {"photometric": "minisblack"}),
        ((HEIGHT, WIDTH), {"photometric": "miniswhite"}),
        ((HEIGHT, WIDTH, 3), {"photometric": "rgb"}),
        ((HEIGHT, WIDTH, 4), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        ((HEIGHT, WIDTH, 2), {"photometric": "minisblack", "extrasamples": ["assocalpha"]}),
        ((3, HEIGHT, WIDTH), {"photometric": "rgb", "planarconfig": "separate"}),
        ((4, HEIGHT, WIDTH), {"photometric": "minisblack"}),
        ((2, 3, HEIGHT, WIDTH), {"photometric": "minisblack", "metadata": {"axes": "TCYX"}}),
    ],
)
def test_tiff_comes_out_as_it_went_in(
    dtype: str, shape: tuple[int, ...], options: dict[str, object]
) -> None:
    array = random_array(shape, dtype)
    data = save_tiff(array, **options)
    out, lost = again(data)
    assert lost == ()
    assert_same_tiff(data, out)


def assert_same_tiff(first: bytes, second: bytes) -> None:
    """Every tag but offsets and sizes of the compressed pixels, and the pixels."""
    moving = {273, 279, 324, 325, 34665, 34853}
    with (
        tifffile.TiffFile(io.BytesIO(first)) as one,
        tifffile.TiffFile(io.BytesIO(second)) as two,
    ):
        assert one.byteorder == two.byteorder
        assert one.series[0].axes == two.series[0].axes
        np.testing.assert_array_equal(one.asarray(), two.asarray())
        assert len(one.pages) == len(two.pages)
        for before, after in zip(one.pages, two.pages, strict=True):
            tags = [
                {
                    tag.code: tag.value
                    for tag in page.aspage().tags
                    if tag.code not in moving and (tag.code, tag.value) != (254, 0)
                }
                for page in (before, after)
            ]
            assert tags[0] == tags[1]


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd", "packbits", "lzma"])
@pytest.mark.parametrize("tile", [None, (16, 32)])
def test_tiff_storage_is_kept(byteorder: str, compression: str, tile: tuple[int, int]) -> None:
    data = save_tiff(
        random_array((HEIGHT, WIDTH, 3), "uint16"),
        byteorder=byteorder,
        compression=compression,
        predictor=compression in ("zlib", "lzw", "zstd") or None,
        photometric="rgb",
        tile=tile,
        rowsperstrip=None if tile else 5,
        resolution=(300, 150),
        resolutionunit="INCH",
        iccprofile=ICC,
        description="hello",
        software="camera",
        datetime="2024:01:02 03:04:05",
        extratags=[(274, 3, 1, 6, True), (33550, 12, 3, (1.0, 2.0, 0.0), True)],
        metadata=None,
    )
    image = decode(data, name="x")
    assert image.metadata.icc == ICC
    assert image.metadata.dpi == (300, 150)
    out, lost = again(data)
    assert lost == ()
    assert_same_tiff(data, out)


def test_imagej_hyperstack_is_restored() -> None:
    array = random_array((2, 3, 2, HEIGHT, WIDTH), "uint16")
    data = save_tiff(
        array,
        imagej=True,
        resolution=(4.0, 4.0),
        metadata={"axes": "TZCYX", "spacing": 3.5, "unit": "um", "Labels": ["a"] * 12},
    )
    image = decode(data, name="x")
    assert image.pixels.shape == (HEIGHT, WIDTH, 12)
    out, lost = again(data)
    assert lost == ()
    with tifffile.TiffFile(io.BytesIO(data)) as one, tifffile.TiffFile(io.BytesIO(out)) as two:
        assert two.is_imagej
        assert two.series[0].axes == "TZCYX"
        np.testing.assert_array_equal(two.asarray(), array)
        assert two.imagej_metadata == one.imagej_metadata
        assert two.pages[0].resolution == one.pages[0].resolution


def test_ome_tiff_is_restored() -> None:
    array = random_array((3, 2, HEIGHT, WIDTH), "float32")
    meta = {"axes": "ZCYX", "PhysicalSizeX": 0.3, "Channel": {"Name": ["a", "b"]}}
    data = save_tiff(array, ome=True, metadata=meta, photometric="minisblack")
    out, lost = again(data)
    assert lost == ()
    with tifffile.TiffFile(io.BytesIO(data)) as one, tifffile.TiffFile(io.BytesIO(out)) as two:
        assert two.ome_metadata == one.ome_metadata
        assert two.series[0].axes == "ZCYX"
        np.testing.assert_array_equal(two.asarray(), array)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (0, 2, 1)])
def test_ome_tiff_of_planes_out_of_order_is_named(order: tuple[int, ...]) -> None:
    array = random_array((3, HEIGHT, WIDTH), "uint8")
    ome = tifffile.OmeXml()
    ome.addimage("uint8", (3, HEIGHT, WIDTH), (3, 1, 1, HEIGHT, WIDTH, 1), axes="CYX")
    planes = "".join(
        f'<TiffData FirstC="{channel}" IFD="{page}" PlaneCount="1"/>'
        for channel, page in enumerate(order)
    )
    xml = re.sub(r"<TiffData.*?</TiffData>|<TiffData[^>]*/>", planes, ome.tostring())
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for number, plane in enumerate(array):
            text = xml.encode() if number == 0 else None
            writer.write(plane, description=text, metadata=None, contiguous=False)
    data = file.getvalue()
    out, lost = again(data)
    with tifffile.TiffFile(io.BytesIO(data)) as one, tifffile.TiffFile(io.BytesIO(out)) as two:
        assert one.series[0].axes == "CYX"
        np.testing.assert_array_equal(one.asarray(), array[list(order)])
        np.testing.assert_array_equal(two.asarray(), array[list(order)])
        assert two.is_ome == (order == (0, 1, 2))
        assert [270 in page.aspage().tags for page in two.pages] == [two.is_ome, False, False]
    assert lost == (() if order == (0, 1, 2) else ("tiff:OME-XML", "tiff:axes CYX"))


@pytest.mark.parametrize(
    ("side", "icc", "lost"),
    [
        (9, None, ("tiff:ImageDescription", "tiff:axes QYX")),
        (99, None, ()),
        (99, ICC * 50, ("tiff:ImageDescription", "tiff:axes QYX")),
    ],
)
def test_small_pages_are_not_taken_for_one_run(
    side: int, icc: bytes | None, lost: tuple[str, ...]
) -> None:
    array = random_array((2, side, side), "uint8")
    out, named = again(save_tiff(array, photometric="minisblack", iccprofile=icc))
    assert named == lost
    np.testing.assert_array_equal(tifffile.imread(io.BytesIO(out)), array)


@pytest.mark.parametrize("big", [False, True])
def test_tiff_exif_directories_are_restored(big: bool) -> None:
    data = save(smooth(3), "tiff", exif=exif_block(), big_tiff=big)
    out, lost = again(data)
    assert lost == ()
    with Image.open(io.BytesIO(out)) as picture:
        exif = picture.getexif()
        assert exif[274] == 6
        assert exif[271] == "Maker"
        assert exif.get_ifd(34665)[36867] == "2024:01:02 03:04:05"
        assert float(exif.get_ifd(34665)[33434]) == 0.25


def test_twelve_bit_tiff_keeps_its_depth() -> None:
    array = random_array((HEIGHT, WIDTH), "uint16") >> 4
    data = save_tiff(array, bitspersample=12)
    image = decode(data, name="x")
    assert image.header.bits == 12
    assert data_range(image.pixels, bits=image.header.bits) == (0, 4095)
    out, lost = again(data)
    assert lost == ()
    assert_same_tiff(data, out)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32"])
def test_signed_integers_have_the_range_of_their_dtype(dtype: str) -> None:
    info = np.iinfo(dtype)
    array = np.array([[info.min, -1, 0, info.max]], dtype)
    npy = io.BytesIO()
    np.save(npy, array)
    for data in (save_tiff(array), npy.getvalue()):
        image = decode(data, name="x")
        low, high = data_range(image.pixels, bits=image.header.bits)
        assert (low, high) == (info.min, info.max)
        kept = to_dtype(image.pixels.astype(np.float64), dtype, low, high)
        np.testing.assert_array_equal(kept[..., 0], array)


@pytest.mark.parametrize(("most", "bits"), [(4095, 12), (1023, 10), (600, 16), (255, 16)])
def test_maximum_that_is_no_cameras_is_a_statistic(most: int, bits: int) -> None:
    array = np.full((HEIGHT, WIDTH), 200, "uint16")
    data = save_tiff(array, extratags=[(281, 3, 1, most, True)])
    assert read_header(data, name="x").bits == decode(data, name="x").header.bits == bits


def test_pixels_above_the_told_maximum_are_not_clipped() -> None:
    array = random_array((2, HEIGHT, WIDTH), "uint16") >> 4
    array[1, 0, 0] = 5000
    data = save_tiff(array, photometric="minisblack", extratags=[(281, 3, 1, 4095, True)])
    image = decode(data, name="x")
    assert read_header(data, name="x").bits == 12
    assert image.header.bits == image.metadata.bits == 16
    assert data_range(image.pixels, bits=image.header.bits) == (0, 65535)
    out, _ = encode(image.pixels, None, image.metadata, format="npy", bit_depth="8")
    assert decode(out, name="y").pixels[0, 0, 1] == round(5000 / 257)


def test_lossy_tiff_compression_is_named() -> None:
    data = save_tiff(smooth(3), compression="jpeg", photometric="rgb", tile=(32, 32))
    out, lost = again(data)
    assert lost == ("tiff:compression JPEG (written with deflate)",)
    np.testing.assert_array_equal(decode(out, name="x").pixels, decode(data, name="x").pixels)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(("behind", "named"), [(b"", 0), (bytes(9), 0), (b"\0ftypmp42" * 9, 1)])
def test_data_behind_a_jpeg_is_named(progressive: bool, behind: bytes, named: int) -> None:
    data = save(smooth(3), "jpeg", progressive=progressive, exif=exif_block(), quality=100)
    _, lost = again(data + behind)
    assert lost == ("jpeg:data behind the picture (a phone's video, say)",) * named


def test_further_arrays_are_named() -> None:
    out = io.BytesIO()
    np.save(out, smooth(3))
    assert again(out.getvalue())[1] == ()
    np.save(out, smooth(1))
    assert again(out.getvalue())[1] == ("npy:data behind the first array",)


def test_bigtiff_stays_bigtiff() -> None:
    out, _ = again(save_tiff(smooth(1)[..., 0], bigtiff=True))
    with tifffile.TiffFile(io.BytesIO(out)) as tif:
        assert tif.is_bigtiff


def test_thumbnail_and_pyramid_are_named() -> None:
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        writer.write(smooth(3), photometric="rgb", metadata=None)
        writer.write(smooth(3)[::4, ::4], photometric="rgb", subfiletype=1, metadata=None)
    _, lost = again(out.getvalue())
    assert any("thumbnail" in name or "pyramid" in name for name in lost)


# --- JPEG, WebP, BMP, npy ------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("quality", [30, 75, 97])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_keeps_tables_and_metadata(
    samples: int, quality: int, subsampling: int, progressive: bool
) -> None:
    data = save(
        smooth(samples).squeeze(),
        "jpeg",
        quality=quality,
        subsampling=subsampling,
        progressive=progressive,
        dpi=(300, 300),
        icc_profile=ICC * 1,
        exif=exif_block(),
        comment="hello",
    )
    out, lost = again(data)
    assert lost == ()
    with Image.open(io.BytesIO(data)) as one, Image.open(io.BytesIO(out)) as two:
        assert one.quantization == two.quantization
        assert samples == 1 or one.layer == two.layer  # one component has no subsampling
        assert one.info == two.info
        assert two.getexif()[274] == 6
        close = np.abs(np.asarray(one).astype(int) - np.asarray(two))
    assert close.mean() < 1


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
@pytest.mark.parametrize("renamed", [False, True])
def test_jpeg_tables_are_those_of_their_components(order: slice, renamed: bool) -> None:
    """Whatever lies first in the file, and whatever the tables' numbers are."""
    data = save(smooth(3), "jpeg", quality=75)
    first, size = data.index(b"\xff\xdb"), 69
    tables = [data[first + i * size :][:size] for i in range(2)]
    head, rest = data[:first], data[first + 2 * size :]
    if renamed:
        tables = [table[:4] + bytes([1 - table[4]]) + table[5:] for table in tables]
        for component, table in ((1, 0), (2, 1), (3, 1)):
            at = rest.index(b"\xff\xc0") + 10 + 3 * (component - 1)
            assert (rest[at], rest[at + 2]) == (component, table)
            rest = rest[: at + 2] + bytes([1 - table]) + rest[at + 3 :]
    moved = head + b"".join(tables[order]) + rest
    assert again(moved) == again(data)


@pytest.mark.parametrize("samples", [3, 4])
@pytest.mark.parametrize("lossless", [True, False])
def test_webp(samples: int, lossless: bool) -> None:
    array = smooth(samples)
    data = save(array, "webp", lossless=lossless, exact=True, icc_profile=ICC, exif=exif_block())
    image = decode(data, name="x")
    assert image.metadata.icc == ICC
    out, lost = again(data)
    assert lost == ()
    back = decode(out, name="x")
    assert back.metadata.native == {"lossless": lossless}
    assert (back.metadata.icc, back.metadata.exif) == (image.metadata.icc, image.metadata.exif)
    if lossless:
        np.testing.assert_array_equal(back.pixels, image.pixels)
    if samples == 4:
        np.testing.assert_array_equal(back.alpha, image.alpha)


def test_opaque_webp_alpha_is_named() -> None:
    image = decode(save(smooth(4), "webp", lossless=True), name="x")
    _, lost = encode(image.pixels, np.full_like(image.alpha, 255), image.metadata)
    assert lost == ("webp:alpha (opaque everywhere, WebP does not store it)",)


@pytest.mark.parametrize("samples", [1, 3, 4])
def test_bmp(samples: int) -> None:
    array = random_array((HEIGHT, WIDTH, samples), "uint8")
    png = imagecodecs.png_encode(array.squeeze())
    data, _ = again(png, format="bmp")
    with Image.open(io.BytesIO(data)) as picture:
        np.testing.assert_array_equal(np.asarray(picture), array.squeeze())
    out, lost = again(data)
    assert lost == ()
    assert_same_image(data, out)


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "int16", "<f4", ">f4", "float64", "float16"])
@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (HEIGHT, WIDTH, 1), (HEIGHT, WIDTH, 5)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_is_byte_identical(dtype: str, shape: tuple[int, ...], order: str) -> None:
    out = io.BytesIO()
    np.save(out, np.asarray(random_array(shape, dtype), order=order))
    data, lost = again(out.getvalue())
    assert lost == ()
    assert data == out.getvalue()


# --- conversions --------------------------------------------------------------------------------


def test_sixteen_bits_to_eight_rounds() -> None:
    array = np.arange(65536, dtype="uint16").reshape(256, 256)
    out, lost = again(imagecodecs.png_encode(array), bit_depth="8")
    assert lost == ()
    np.testing.assert_array_equal(
        decode(out, name="x").pixels[..., 0], np.rint(array / 257.0).astype("uint8")
    )


def test_eight_bits_to_sixteen_and_back() -> None:
    data = imagecodecs.png_encode(random_array((9, 8, 4), "uint8"))
    wide, _ = again(data, bit_depth="16")
    narrow, _ = again(wide, bit_depth="8")
    assert decode(wide, name="x").pixels.dtype == "uint16"
    assert_same_image(data, narrow)


def test_float_pixels_are_rounded_and_clipped() -> None:
    image = decode(imagecodecs.png_encode(np.zeros((1, 4), "uint8")), name="x")
    values = np.array([-3.0, 0.51, 254.6, 300.0], "float32").reshape(1, 4, 1)
    out, _ = encode(values, None, image.metadata)
    assert decode(out, name="x").pixels.ravel().tolist() == [0, 1, 255, 255]


@pytest.mark.parametrize("target", ["png", "tiff", "jpeg", "webp", "bmp", "npy"])
def test_conversion_carries_or_names_metadata(target: str) -> None:
    data = save(smooth(3), "jpeg", icc_profile=ICC, exif=exif_block(), dpi=(300, 300), comment="c")
    out, lost = again(data, format=target)
    back = decode(out, name="x")
    assert back.header.format == target
    assert "jpeg:comment" in lost or target == "jpeg"
    for field, name in (("icc", "ICC profile"), ("exif", "EXIF"), ("dpi", "DPI")):
        assert getattr(back.metadata, field) or name in lost
    if back.metadata.exif:
        exif = Image.Exif()
        exif.load(back.metadata.exif)
        assert exif[274] == 6
        assert exif.get_ifd(34665)[33434] == 0.25


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize(
    ("block", "name"),
    [
        (b"no directory at all", "EXIF (damaged)"),  # SyntaxError of Pillow
        (b"II*\0\x08", "EXIF (damaged)"),  # struct.error of Pillow
        (b"II*\0" + struct.pack("<IHHHIII", 8, 1, 274, 4, 1, 70_000, 0), "EXIF (damaged)"),  # ours
        (b"II*\0" + struct.pack("<IHHHIII", 8, 1, 271, 2, 99, 900, 0), "EXIF (damaged tags)"),
    ],
    ids=["no mark", "cut", "too large", "outside"],
)
def test_damaged_exif_does_not_keep_an_image_out_of_a_tiff(
    kind: str, block: bytes, name: str
) -> None:
    data = save(smooth(3), kind, exif=b"Exif\0\0" + block, lossless=True)
    out, lost = again(data, format="tiff")
    assert lost == (name,)
    np.testing.assert_array_equal(decode(out, name="y").pixels, decode(data, name="x").pixels)


NAME = "J\u00fcrgen".encode() + b"\0"


def tag(order: str, code: int, kind: int, *values: float, text: bytes = b"") -> tuple:
    """(code, type, count, bytes) of an EXIF directory."""
    layout = {3: "H", 4: "I", 5: "I", 9: "i", 10: "i", 12: "d"}.get(kind, "B")
    data = text or struct.pack(f"{order}{len(values)}{layout}", *values)
    count = len(data) if text else len(values) // (2 if kind in (5, 10) else 1)
    return code, kind, count, data


def directory(order: str, at: int, *tags: tuple) -> bytes:
    behind, body, tail = at + 6 + 12 * len(tags), struct.pack(order + "H", len(tags)), b""
    for code, kind, count, data in tags:
        body += struct.pack(order + "HHI", code, kind, count)
        if len(data) > 4:
            body += struct.pack(order + "I", behind + len(tail))
            tail += data + b"\0" * (len(data) % 2)
        else:
            body += data.ljust(4, b"\0")
    return body + bytes(4) + tail


def rich_exif(order: str, *first: tuple) -> bytes:
    """A block with directories at 8, 512, 1024 and 1536, of every kind of value."""
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    found = head + directory(
        order,
        8,
        *first,
        tag(order, 315, 2, text=NAME),
        tag(order, 34665, 4, 512),
        tag(order, 34853, 4, 1024),
    )
    found = found.ljust(512, b"\0") + directory(
        order,
        512,
        tag(order, 33434, 5, 1, 60),
        tag(order, 37121, 7, text=b"\1\2\3\0"),
        tag(order, 37380, 10, -1, 3),
        tag(order, 37500, 7, text=bytes(range(30))),
        tag(order, 37510, 7, text=b"ASCII\0\0\0hello"),
        tag(order, 40962, 4, 53),
        tag(order, 40965, 4, 1536),
        tag(order, 42032, 2, text=NAME),
        tag(order, 65002, 12, 1.25),
    )
    found = found.ljust(1024, b"\0") + directory(
        order, 1024, tag(order, 2, 5, 52, 1, 30, 1, 1234, 100), tag(order, 27, 7, text=b"ASCII\0")
    )
    return found.ljust(1536, b"\0") + directory(order, 1536, tag(order, 1, 2, text=b"R98\0"))


def directories_of(block: bytes) -> list[dict[int, tuple]]:
    """{tag: (type, value)} of the Exif, GPS and interoperability directories, as Pillow reads."""
    found = []
    exif = Image.Exif()
    exif.load(block)
    pointers = [exif[34665], exif[34853]]
    for at in pointers:
        values = TiffImagePlugin.ImageFileDirectory_v2(exif.head)
        exif.fp.seek(at)
        values.load(exif.fp)
        found.append({code: (values.tagtype[code], values[code]) for code in values})
        if 40965 in values:
            pointers.append(found[-1].pop(40965)[1])
    return found


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_exif_survives_every_way(order: str, byteorder: str, big: bool) -> None:
    block = rich_exif(order)
    expected = directories_of(block)
    jpeg = save(smooth(3), "jpeg", exif=b"Exif\0\0" + block)
    tiff, lost = again(jpeg, format="tiff")
    assert lost == ()
    file = io.BytesIO(save_tiff(smooth(3), photometric="rgb", byteorder=byteorder, bigtiff=big))
    image = decode(file.getvalue(), name="x")
    image.metadata.exif = block
    other, lost = encode(image.pixels, None, image.metadata)
    assert lost == ()
    for source in (tiff, other):
        for options in ({}, {"format": "jpeg"}, {"format": "png"}, {"format": "webp"}):
            out, _ = again(source, **options)
            found = decode(out, name="y").metadata.exif
            assert directories_of(found) == expected
            assert NAME in found
    with tifffile.TiffFile(io.BytesIO(tiff)) as tif:
        assert tif.pages[0].tags[315].value == NAME[:-1].decode()


def test_exif_tags_that_a_tiff_does_not_take_are_named() -> None:
    first = [
        tag("<", 270, 2, text=NAME),
        tag("<", 282, 5, 300, 1),
        tag("<", 316, 2, text=b"host\0"),
        tag("<", 18246, 3, 5),
        tag("<", 40091, 1, text=b"t\0"),
    ]
    out, lost = again(save(smooth(3), "webp", exif=rich_exif("<", *first)), format="tiff")
    assert lost == ("exif:Rating", "exif:XPTitle")
    with tifffile.TiffFile(io.BytesIO(out)) as tif:
        assert tif.pages[0].description == NAME[:-1].decode()
        assert tif.pages[0].tags[316].value == "host"


def test_exif_thumbnail_is_named() -> None:
    block = bytearray(rich_exif("<"))
    end = 8 + 2 + 3 * 12
    block[end : end + 4] = struct.pack("<I", 1536)
    _, lost = again(save(smooth(3), "webp", exif=bytes(block)), format="tiff")
    assert lost == ("exif:thumbnail",)


@pytest.mark.parametrize(("code", "name"), [(34665, "EXIF (damaged)"), (34853, "GPS (damaged)")])
def test_exif_pointer_outside_the_tiff_is_named(code: int, name: str) -> None:
    data = bytearray(save_tiff(smooth(3), photometric="rgb", extratags=[(40000, 4, 1, 0, True)]))
    with tifffile.TiffFile(io.BytesIO(data)) as tif:
        at = tif.pages[0].tags[40000].offset
    data[at : at + 12] = struct.pack("<HHII", code, 4, 1, 1 << 24)
    _, lost = again(bytes(data))
    assert lost == (name,)


def test_exif_of_further_pages_is_named() -> None:
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        for page in random_array((2, 9, 8), "uint8"):
            writer.write(page, extratags=[(40000, 4, 1, 0, True)], contiguous=False, metadata=None)
    data = bytearray(out.getvalue())
    with tifffile.TiffFile(io.BytesIO(data)) as tif:
        at = tif.pages[1].tags[40000].offset
    data[at : at + 12] = struct.pack("<HHII", 34665, 4, 1, 8)
    _, lost = again(bytes(data))
    assert lost == ("tiff:EXIF of further pages",)


def jfif_with(unit: int, x: int, y: int) -> bytes:
    data = save(smooth(3), "jpeg")
    return data[:13] + struct.pack(">BHH", unit, x, y) + data[18:]


def png_with(kind: bytes, body: bytes) -> bytes:
    return with_chunks(imagecodecs.png_encode(smooth(3)), (kind, body))


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (png_with(b"pHYs", struct.pack(">IIB", 2, 1, 0)), ("png:pHYs",)),
        (png_with(b"pHYs", struct.pack(">IIB", 2835, 2835, 1)), ()),
        (png_with(b"iCCP", b"name\0\0no profile"), ("png:iCCP",)),
        (png_with(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0damaged"), ("png:iTXt",)),
        (jfif_with(0, 2, 1), ("jpeg:JFIF aspect ratio",)),
        (jfif_with(0, 1, 1), ()),
        (jfif_with(1, 300, 150), ()),
    ],
    ids=["ratio", "dpi", "icc", "xmp", "jfif ratio", "jfif square", "jfif dpi"],
)
def test_what_a_conversion_cannot_carry_is_named(data: bytes, names: tuple[str, ...]) -> None:
    assert again(data)[1] == ()
    assert again(data, format="tiff")[1] == names


@pytest.mark.parametrize("target", ["png", "tiff", "jpeg", "webp"])
def test_compressed_xmp_is_carried(target: str) -> None:
    head = b"XML:com.adobe.xmp\0\1\0en\0key\0"
    data = png_with(b"iTXt", head + zlib.compress(b"<x/>" * 99))
    out, lost = again(data, format=target)
    assert lost == ()
    assert decode(out, name="y").metadata.xmp == b"<x/>" * 99


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("told", [True, False])
def test_resolution_of_exif_alone(kind: str, told: bool) -> None:
    resolution = [tag("<", 282, 5, 600, 2), tag("<", 283, 5, 150, 1)] if told else []
    data = save(smooth(3), kind, exif=b"Exif\0\0" + rich_exif("<", *resolution))
    assert again(data)[1] == ()
    assert decode(data, name="x").metadata.dpi == ((300, 150) if told else None)
    out, lost = again(data, format="tiff")
    assert lost == ()
    assert decode(out, name="y").metadata.dpi == ((300, 150) if told else None)


def test_resolution_of_further_pages_is_named() -> None:
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        for dpi in (300, 72):
            writer.write(smooth(1)[..., 0], resolution=(dpi, dpi), resolutionunit=2, metadata=None)
    _, lost = again(out.getvalue())
    assert lost == ("tiff:DPI of further pages",)


def test_tiff_to_png_names_tags_and_keeps_resolution() -> None:
    data = save_tiff(
        random_array((HEIGHT, WIDTH, 4), "uint16"),
        photometric="rgb",
        extrasamples=["unassalpha"],
        resolution=(300, 300),
        resolutionunit="INCH",
        iccprofile=ICC,
        extratags=[(33550, 12, 3, (1.0, 2.0, 0.0), True), (274, 3, 1, 8, True)],
        metadata=None,
    )
    out, lost = again(data, format="png")
    assert lost == ("tiff:ModelPixelScaleTag",)
    back = decode(out, name="x").metadata
    assert back.icc == ICC
    assert back.dpi == pytest.approx((300, 300), rel=1e-3)
    exif = Image.Exif()
    exif.load(back.exif)
    assert exif[274] == 8


@pytest.mark.parametrize(
    ("array", "target", "words"),
    [
        (random_array((9, 8), "float32"), "png", "--bit-depth"),
        (random_array((9, 8, 5), "uint8"), "png", "5 samples"),
        (random_array((9, 8), "uint16"), "jpeg", "uint16"),
        (random_array((9, 8, 5), "uint8"), "webp", "5 samples"),
        (random_array((9, 8), "int16"), "bmp", "int16"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(array: np.ndarray, target: str, words: str) -> None:
    out = io.BytesIO()
    np.save(out, array)
    with pytest.raises(UnsupportedImage, match=words):
        again(out.getvalue(), format=target)


EXTRA_CHANNEL = {
    "unspecified": lambda: save_tiff(smooth(4), photometric="rgb", extrasamples=["unspecified"]),
    "npy of 4": lambda: npy_bytes(smooth(4)),
    "npy of 2": lambda: npy_bytes(smooth(2)),
    "2 pages": lambda: save_tiff(
        random_array((2, HEIGHT, WIDTH), "uint8"), photometric="minisblack"
    ),
    "4 pages": lambda: save_tiff(
        random_array((4, HEIGHT, WIDTH), "uint8"), photometric="minisblack"
    ),
}


@pytest.mark.parametrize("kind", sorted(EXTRA_CHANNEL))
@pytest.mark.parametrize("target", ["png", "webp", "bmp"])
def test_a_channel_never_becomes_alpha(kind: str, target: str) -> None:
    data = EXTRA_CHANNEL[kind]()
    with pytest.raises(UnsupportedImage, match="--format tiff"):
        again(data, format=target)
    for other in ("tiff", "npy"):
        out, _ = again(data, format=other)
        back = decode(out, name="y")
        assert back.alpha is None
        np.testing.assert_array_equal(back.pixels, decode(data, name="x").pixels)


@pytest.mark.parametrize("target", ["png", "webp", "bmp", "npy"])
@pytest.mark.parametrize("kind", ["assocalpha", "unassalpha"])
def test_associated_alpha_is_named(target: str, kind: str) -> None:
    data = save_tiff(smooth(4), photometric="rgb", extrasamples=[kind], metadata=None)
    assert again(data)[1] == ()
    lost = again(data, format=target)[1]
    assert ("tiff:associated alpha (colours stay multiplied by it)" in lost) == (
        kind == "assocalpha"
    )


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_a_fourth_channel_that_no_tag_explains_becomes_no_alpha(planar: str) -> None:
    array = random_array((HEIGHT, WIDTH, 4), "uint16")
    array = np.moveaxis(array, 2, 0) if planar == "separate" else array
    data = save_tiff(array, photometric="rgb", planarconfig=planar, extrasamples=[0], metadata=None)
    # The tag ExtraSamples becomes another one.
    data = data.replace(struct.pack("<HHI", 338, 3, 1), struct.pack("<HHI", 337, 3, 1))
    out, lost = again(data)
    assert_same_image(data, out)
    assert decode(out, name="x").alpha is None
    assert lost == ()


@pytest.mark.parametrize(
    ("bits", "dtype", "depth", "expected"),
    [
        (4, "uint8", "preserve", ("tiff:4 bits a sample (written with 8)",)),
        (12, "uint16", "preserve", ("tiff:12 bits a sample (written with 16)",)),
        # Here the values are moved to the new depth.
        (12, "uint16", "8", ()),
        (8, "uint8", "preserve", ()),
    ],
)
@pytest.mark.parametrize("target", ["png", "npy"])
def test_bits_that_another_format_cannot_tell_are_named(
    target: str, bits: int, dtype: str, depth: str, expected: tuple[str, ...]
) -> None:
    array = random_array((HEIGHT, WIDTH), dtype) >> (np.dtype(dtype).itemsize * 8 - bits)
    data = save_tiff(
        array, bitspersample=bits, photometric="minisblack", metadata=None, software=False
    )
    out, lost = again(data, format=target, bit_depth=depth)
    assert lost == expected
    if depth == "preserve":
        np.testing.assert_array_equal(decode(out, name="x").pixels[..., 0], array)


def test_float_to_sixteen_bit_png() -> None:
    array = np.linspace(0, 1, 12, dtype="float32").reshape(3, 4)
    out, _ = again(save_tiff(array), format="png", bit_depth="16")
    expected = np.rint(array.astype("float64") * 65535)
    np.testing.assert_array_equal(decode(out, name="x").pixels[..., 0], expected)


@pytest.mark.parametrize(
    ("field", "size", "target", "name"),
    [
        ("xmp", 65_504, "jpeg", None),
        ("xmp", 65_505, "jpeg", "XMP"),
        ("exif", 65_527, "jpeg", None),
        ("exif", 65_528, "jpeg", "EXIF"),
        ("icc", 255 * 65_519, "jpeg", None),
        ("icc", 255 * 65_519 + 1, "jpeg", "ICC profile"),
        ("dpi", 65_535, "jpeg", None),
        ("dpi", 65_536, "jpeg", "DPI"),
        ("dpi", 0.25, "jpeg", "DPI"),
        ("dpi", 4_294_967_295, "png", "DPI"),
        ("dpi", 4_294_967_295, "bmp", "DPI"),
        ("dpi", 4_294_967_295, "tiff", "DPI"),
        ("dpi", 300, "bmp", None),
        ("dpi", None, "bmp", None),
    ],
)
@pytest.mark.parametrize("samples", [3, 4])
def test_what_does_not_fit_into_a_format_is_named(
    field: str, size: float | None, target: str, name: str | None, samples: int
) -> None:
    if samples == 4 and target == "jpeg":
        samples = 1
    image = decode(imagecodecs.png_encode(smooth(samples).squeeze()), name="x")
    value = (size, size) if field == "dpi" else b"II*\0".ljust(int(size or 0), b"\0")
    metadata = replace(image.metadata, **{field: value if size else None}, format="webp")
    out, lost = encode(image.pixels, image.alpha, metadata, format=target)
    assert lost == ((name,) if name else ())
    back = getattr(decode(out, name="y").metadata, field)
    if name or not size:
        assert back is None
    else:
        assert back == (pytest.approx(value, rel=1e-3) if field == "dpi" else value)


@pytest.mark.parametrize(
    ("dpi", "target", "in_exif", "named"),
    [
        (300.5, "jpeg", False, True),
        (300.5, "jpeg", True, False),
        (300.5, "png", False, False),
        (0.6, "png", False, True),
        # What the metres of a PNG make of 300, and centimetres of 118.
        (299.9994, "jpeg", False, False),
        (118 * 2.54, "jpeg", False, False),
    ],
)
def test_a_rounded_resolution_is_named(dpi: float, target: str, in_exif: bool, named: bool) -> None:
    exif = Image.Exif()
    exif[282] = exif[283] = dpi
    exif[296] = 2
    image = decode(save(smooth(3), "webp", exif=exif.tobytes()), name="x")
    metadata = image.metadata if in_exif else replace(image.metadata, exif=None)
    assert metadata.dpi == pytest.approx((dpi, dpi))
    _, lost = encode(image.pixels, None, metadata, format=target)
    assert lost == (("DPI (rounded)",) if named else ())


def test_what_an_encoder_refuses_is_an_error_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def encoder(*_: object, **__: object) -> None:
        raise struct.error("argument out of range")

    monkeypatch.setattr(png_module, "encode", encoder)
    with pytest.raises(UnsupportedImage, match="as png"):
        again(imagecodecs.png_encode(smooth(3)))


@pytest.mark.parametrize("target", ["png", "jpeg", "webp", "bmp", "npy"])
@pytest.mark.parametrize("alpha", [False, True])
def test_a_negative_tiff_becomes_a_positive(target: str, alpha: bool) -> None:
    array = smooth(2) if alpha else smooth(1)[..., 0]
    extra = {"extrasamples": ["unassalpha"]} if alpha else {}
    image = decode(save_tiff(array, photometric="miniswhite", **extra), name="x")
    if alpha and target != "png":
        image.metadata.has_alpha, image.alpha = False, None
    out, _ = encode(image.pixels, image.alpha, image.metadata, format=target)
    back = decode(out, name="y")
    assert np.abs(back.pixels[..., 0] - (255.0 - image.pixels[..., 0])).max() <= 3 * (
        target == "jpeg"
    )
    if back.alpha is not None:
        np.testing.assert_array_equal(back.alpha, image.alpha)


@pytest.mark.parametrize("dtype", TIFF_DTYPES)
def test_a_negative_is_inverted_within_its_range(dtype: str) -> None:
    array = random_array((9, 8), dtype)
    data = save_tiff(array, photometric="miniswhite")
    low, high = data_range(array)
    out, _ = again(data, format="npy")
    expected = (low + high - array.astype("float64")).astype(dtype)
    np.testing.assert_array_equal(decode(out, name="y").pixels[..., 0], expected)
    wide, _ = again(data, format="npy", bit_depth="32f")
    unit = decode(wide, name="y").pixels[..., 0]
    np.testing.assert_allclose(unit, (high - array.astype("float64")) / (high - low), atol=1e-3)


def test_a_negative_keeps_to_the_range_it_is_given() -> None:
    array = np.array([[-5, 0, 10, 4095, 5000]], "int16")
    image = decode(save_tiff(array, photometric="miniswhite"), name="x")
    for options, expected in (
        ({}, [4095, 4095, 4085, 0, 0]),
        ({"bit_depth": "8"}, [255, 255, 254, 0, 0]),
        ({"value_range": (0, 1e6)}, [32767, 32767, 32757, 28672, 27767]),
    ):
        options = {"value_range": (0, 4095), **options}
        out, _ = encode(image.pixels, None, image.metadata, format="npy", **options)
        assert decode(out, name="y").pixels.ravel().tolist() == expected


@pytest.mark.parametrize("options", [{"format": "gif"}, {"bit_depth": "12"}, {"compression": "x"}])
def test_wrong_options(options: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        again(imagecodecs.png_encode(smooth(1)[..., 0]), **options)


# --- bad inputs ---------------------------------------------------------------------------------


def sample_files() -> dict[str, bytes]:
    npy = io.BytesIO()
    np.save(npy, smooth(3))
    return {
        "png": imagecodecs.png_encode(smooth(3)),
        "png16": imagecodecs.png_encode(random_array((HEIGHT, WIDTH, 4), "uint16")),
        "tiff": save_tiff(smooth(3), photometric="rgb"),
        "tiff_tiled": save_tiff(smooth(3), photometric="rgb", tile=(16, 16), compression="zlib"),
        "tiff_pages": save_tiff(random_array((9, HEIGHT, WIDTH), "uint8"), compression="lzw"),
        "jpeg": save(smooth(3), "jpeg"),
        "webp": save(smooth(3), "webp"),
        "webp_lossless": save(smooth(3), "webp", lossless=True),
        "bmp": save(smooth(3), "bmp"),
        "npy": npy.getvalue(),
    }


@pytest.mark.parametrize("kind", sorted(sample_files()))
def test_no_cut_passes_unnoticed(kind: str) -> None:
    data = sample_files()[kind]
    whole = decode(data, name="x")
    cuts = {1, 3, 7, 8, 20, 26, 40, len(data) // 3, len(data) // 2, len(data) * 9 // 10}
    for cut in sorted(cuts | {len(data) - n for n in (1, 2, 4, 12, 30)}):
        try:
            part = decode(data[:cut], name="x")
        except ImageError:
            continue
        # Only what lies behind the pixels may be missing without an error.
        np.testing.assert_array_equal(part.pixels, whole.pixels)
        assert len(data) - cut <= 2


@pytest.mark.parametrize("kind", sorted(sample_files()))
def test_random_damage_gives_project_errors_only(kind: str) -> None:
    data = sample_files()[kind]
    rng = np.random.default_rng(3)
    for _ in range(40):
        broken = bytearray(data)
        for position in rng.integers(0, min(len(data), 400), 4):
            broken[position] = rng.integers(256)
        try:
            decode(bytes(broken), name="x", max_pixels=10_000_000)
        except ImageError:
            continue


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", NotAnImage, "empty"),
        (b"just some text\n", NotAnImage, "just some te"),
        (b"<html>", NotAnImage, "known image"),
        (b"BM is how this text begins, and on it goes", NotAnImage, "known image"),
        (b"GIF89a......", UnsupportedImage, "GIF"),
        (b"\x76\x2f\x31\x01....", UnsupportedImage, "OpenEXR"),
        (bytes(128) + b"DICM", UnsupportedImage, "DICOM"),
    ],
)
def test_what_is_no_image(data: bytes, error: type[ImageError], words: str) -> None:
    with pytest.raises(error, match=words):
        decode(data, name="x.png")


def animated(kind: str) -> bytes:
    frames = [Image.fromarray(smooth(3)), Image.fromarray(255 - smooth(3))]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=50)
    return out.getvalue()


def converted(kind: str, mode: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(smooth(3)).convert(mode).save(out, kind, **options)
    return out.getvalue()


REFUSED = {
    "animated PNG": lambda: animated("png"),
    "animated WebP": lambda: animated("webp"),
    "GIF": lambda: animated("gif"),
    "CMYK JPEG": lambda: converted("jpeg", "CMYK"),
    "CMYK TIFF": lambda: converted("tiff", "CMYK"),
    "palette PNG": lambda: converted("png", "P"),
    "palette TIFF": lambda: converted("tiff", "P"),
    "palette BMP": lambda: converted("bmp", "P"),
    r"bilevel \(1-bit\) PNG": lambda: converted("png", "1"),
    r"bilevel \(1-bit\) TIFF": lambda: converted("tiff", "1"),
    r"bilevel \(1-bit\) BMP": lambda: converted("bmp", "1"),
    "CIELAB TIFF": lambda: converted("tiff", "LAB"),
    "alpha": lambda: save_tiff(
        random_array((3, 9, 8, 4), "uint8"), photometric="rgb", extrasamples=["unassalpha"]
    ),
    "complex64": lambda: save_tiff(np.zeros((9, 8), "complex64")),
    "different kinds": lambda: two_sizes(),
    "bool": lambda: npy_bytes(np.zeros((9, 8), bool)),
    "int64": lambda: npy_bytes(np.zeros((9, 8), "int64")),
    r"shape \(9,\)": lambda: npy_bytes(np.zeros(9)),
}


def npy_bytes(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def two_sizes() -> bytes:
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        writer.write(smooth(1)[..., 0])
        writer.write(smooth(1)[::2, ::2, 0])
    return out.getvalue()


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedImage, match=kind.replace("bool", "bilevel")):
        read_header(REFUSED[kind](), name="x")


def test_pickled_npy_is_never_loaded() -> None:
    out = io.BytesIO()
    np.save(out, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UnsupportedImage):
        decode(out.getvalue(), name="x.npy")


@pytest.mark.parametrize("text", ["+".join("1" * 4500), "-" * 9000 + "1", "a" + "[0]" * 2900])
def test_a_deeply_nested_npy_header_is_damage(text: str) -> None:
    header = text.encode() + b"\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    for call in (read_header, decode):
        with pytest.raises(CorruptImage, match="header is damaged"):
            call(data, name="x.npy")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_non_finite_values(value: float, dtype: str) -> None:
    array = random_array((9, 8), dtype)
    array[3, 4] = value
    for data in (npy_bytes(array), save_tiff(array)):
        with pytest.raises(NonFiniteValues, match="1 of 72"):
            decode(data, name="x")


def bomb_png() -> bytes:
    ihdr = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        png_module.SIGNATURE
        + chunk(b"IHDR", ihdr)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def bomb_tiff() -> bytes:
    entries = [
        (256, 4, 1, 100_000), (257, 4, 1, 100_000), (258, 3, 1, 8), (259, 3, 1, 8),
        (262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, 100_000), (279, 4, 1, 50),
    ]  # fmt: skip
    ifd = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)
    return struct.pack("<2sHI", b"II", 42, 64) + bytes(56) + ifd + bytes(4)


def bomb_npy() -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"shape": (100_000, 100_000), "fortran_order": False, "descr": "<f4"}
    )
    return out.getvalue()


def bomb_bmp() -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 0, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 100_000, 100_000, 1, 24, 0, 0, 0, 0, 0, 0)
    )


def bomb_jpeg() -> bytes:
    data = save(smooth(3), "jpeg")
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", 65_535, 65_535) + data[at + 9 :]


@pytest.mark.parametrize("make", [bomb_png, bomb_tiff, bomb_npy, bomb_bmp, bomb_jpeg])
def test_bombs_are_refused_by_their_header(make: object) -> None:
    data = make()
    for call in (read_header, decode):
        with pytest.raises(ImageTooLarge, match="read in windows"):
            call(data, name="bomb")


def test_nobody_is_told_to_tile_a_tiled_tiff() -> None:
    data = save_tiff(random_array((64, 64), "uint8"), tile=(16, 16))
    with pytest.raises(ImageTooLarge, match="raise --max-pixels") as error:
        decode(data, name="x", max_pixels=1000)
    assert "tiled TIFF" not in str(error.value)


def second_frame(width: int, height: int) -> bytes:
    """The frame segment of a colour JPEG of this size."""
    data = save(smooth(3), "jpeg")
    at = data.index(b"\xff\xc0")
    return data[at : at + 5] + struct.pack(">HH", height, width) + data[at + 9 : at + 19]


@pytest.mark.parametrize("marker", [b"\xff\x01", b"\xff\xd0", b"\xff\xd7"])
def test_no_frame_hides_behind_a_marker_without_a_length(marker: bytes) -> None:
    data, hidden = save(smooth(3), "jpeg"), second_frame(60_000, 60_000)
    before = marker + struct.pack(">H", len(hidden) + 2) + hidden
    with pytest.raises(CorruptImage, match="damaged header"):
        read_header(data[:2] + before + data[2:], name="x")


def test_a_picture_larger_than_its_header_is_not_unpacked() -> None:
    data = save(smooth(3), "jpeg")
    at = data.index(b"\xff\xda")
    size = f"{smooth(3).shape[1]}x{smooth(3).shape[0]}"
    with pytest.raises(CorruptImage, match=f"{size} pixels in its header, 16x90 in its picture"):
        decode(data[:at] + second_frame(16, 90) + data[at:], name="x")


def test_tags_that_share_their_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page's and each tag's bytes count, wherever they lie."""
    tags = [(code, 7, 1000, bytes(1000), True) for code in (65000, 65001)]
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        for _ in range(3):
            writer.write(smooth(1)[..., 0], extratags=tags, metadata=None, contiguous=False)
    monkeypatch.setattr("denoise_core.images.tiff.MAX_TAG_BYTES", 6100)
    assert decode(out.getvalue(), name="x").pixels.shape[2] == 3
    monkeypatch.setattr("denoise_core.images.tiff.MAX_TAG_BYTES", 5900)
    with pytest.raises(UnsupportedImage, match="its tags hold more than"):
        decode(out.getvalue(), name="x")


def test_a_windowed_tiff_may_be_larger_than_memory() -> None:
    data = save_tiff(random_array((64, 64), "uint8"), tile=(16, 16))
    assert read_header(data, name="x", max_pixels=100).windowed
    with pytest.raises(ImageTooLarge):
        decode(data, name="x", max_pixels=100)


def test_a_tile_much_larger_than_its_image_is_refused() -> None:
    data = bytearray(save_tiff(random_array((64, 64), "uint8"), tile=(16, 16)))
    with tifffile.TiffFile(io.BytesIO(data)) as tif:
        places = [tif.pages[0].tags[code].valueoffset for code in (322, 323)]
    for at in places:
        data[at : at + 4] = struct.pack("<I", 60_000)
    with pytest.raises(ImageTooLarge, match="60000x60000"):
        read_header(bytes(data), name="x")


def test_damaged_resolution_is_left_out() -> None:
    data = bytearray(save_tiff(smooth(1)[..., 0], resolution=(300, 300)))
    with tifffile.TiffFile(io.BytesIO(data)) as tif:
        at = tif.pages[0].tags[282].valueoffset
    data[at : at + 8] = bytes(8)
    image = decode(bytes(data), name="x")
    assert image.metadata.dpi is None
    again(bytes(data))


def test_dpi_from_exif_rationals() -> None:
    exif = Image.Exif()
    exif.update({282: 72.0, 283: 72.0, 296: 2})
    data = save(smooth(3), "jpeg", exif=exif)
    jfif = 4 + struct.unpack(">H", data[4:6])[0]
    out, _ = again(data[:2] + data[jfif:])
    assert decode(out, name="x").metadata.dpi == (72.0, 72.0)


def test_import_needs_no_codec() -> None:
    code = (
        "import sys, denoise_core.images; "
        "print([m for m in ('PIL', 'tifffile', 'imagecodecs', 'zarr') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_content_decides_the_format() -> None:
    data = imagecodecs.png_encode(smooth(3))
    image = decode(data, name="photo.jpg")
    assert image.header.format == "png"
    out, _ = encode(image.pixels, image.alpha, image.metadata)
    assert out.startswith(png_module.SIGNATURE)


def test_header_reads_little_of_a_file() -> None:
    class Counting(io.BytesIO):
        count = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.count += len(data)
            return data

    array = random_array((400, 300, 3), "uint8")
    for data in (imagecodecs.png_encode(array), save(array, "jpeg"), save(array, "webp"),
                 npy_bytes(array), save_tiff(array, photometric="rgb")):  # fmt: skip
        file = Counting(data)
        assert read_header(file, name="x").height == 400
        assert file.count < 20_000


# --- windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (16, 16), "compression": "zlib"},
        {"tile": (32, 16)},
        {"rowsperstrip": 7, "compression": "lzw", "predictor": True},
        {"rowsperstrip": 7},
        {},
        {"byteorder": ">"},
    ],
)
@pytest.mark.parametrize(
    ("shape", "more"),
    [
        ((HEIGHT, WIDTH), {"photometric": "minisblack"}),
        ((HEIGHT, WIDTH, 3), {"photometric": "rgb"}),
        ((HEIGHT, WIDTH, 4), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        ((3, HEIGHT, WIDTH), {"photometric": "rgb", "planarconfig": "separate"}),
        ((2, 3, HEIGHT, WIDTH), {"photometric": "minisblack"}),
    ],
)
def test_windows_equal_the_whole(
    shape: tuple[int, ...], more: dict[str, object], options: dict[str, object]
) -> None:
    data = save_tiff(random_array(shape, "uint16"), **options, **more)
    whole = decode(data, name="x")
    assert whole.header.windowed
    for y, x in (((0, 9), (0, 9)), ((13, 36), (5, 52)), ((30, 37), (48, 53)), ((0, 37), (0, 53))):
        pixels, alpha = read_window(io.BytesIO(data), y=slice(*y), x=slice(*x))
        np.testing.assert_array_equal(pixels, whole.pixels[slice(*y), slice(*x)])
        assert pixels.flags.c_contiguous
        assert pixels.dtype == "uint16"
        if whole.alpha is not None:
            np.testing.assert_array_equal(alpha, whole.alpha[slice(*y), slice(*x)])
    assert read_metadata(io.BytesIO(data), name="x") == whole.metadata


# --- values and names ---------------------------------------------------------------------------


@given(
    hnp.arrays("float32", 20, elements=st.floats(-1e5, 1e5, width=32)),
    st.sampled_from(["uint8", "uint16", "int16"]),
)
@settings(max_examples=60)
def test_to_dtype_rounds_and_clips(values: np.ndarray, dtype: str) -> None:
    info = np.iinfo(dtype)
    out = to_dtype(values, dtype)
    exact = np.clip(values.astype("float64"), info.min, info.max)
    assert out.dtype == dtype
    assert np.abs(out - exact).max() <= 0.5


@given(hnp.arrays("uint16", 20), st.sampled_from(["uint8", "uint16", "uint32", "float32"]))
@settings(max_examples=60)
def test_rescale_stays_within_half_a_level(values: np.ndarray, dtype: str) -> None:
    lo, hi = data_range(np.dtype(dtype))
    out = rescale(values, dtype, source=(0, 65535)).astype("float64")
    tolerance = 0.5 if np.dtype(dtype).kind == "u" else 1e-6
    assert np.abs(out - (lo + values / 65535 * (hi - lo))).max() <= tolerance * 1.0001


@given(hnp.arrays("float32", st.integers(1, 50), elements=st.floats(-1e3, 1e3, width=32)))
@settings(max_examples=60)
def test_data_range_of_floats(values: np.ndarray) -> None:
    lo, hi = data_range(values)
    assert lo < hi
    inside = np.mean((values >= 0) & (values <= 1))
    assert (lo, hi) == (0, 1) if inside >= 0.99 else lo == values.min()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("uint8", (0, 255)), ("uint16", (0, 65535)), ("int16", (-32768, 32767)), ("float32", (0, 1))],
)
def test_data_range_of_dtypes(dtype: str, expected: tuple[float, float]) -> None:
    assert data_range(np.dtype(dtype)) == expected


def test_extreme_integers_do_not_wrap() -> None:
    values = np.array([-1.0, 5e9, 4294967295.0], "float32")
    assert to_dtype(values, "uint32").tolist() == [0, 4294967295, 4294967295]


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_non_finite_values_are_never_written(dtype: str) -> None:
    with pytest.raises(NonFiniteValues, match="no-data"):
        to_dtype(np.array([np.nan], "float32"), dtype)


@pytest.mark.parametrize(
    ("path", "target", "expected"),
    [
        ("a/b.png", "preserve", "a/b.png"),
        ("a/b.png", "png", "a/b.png"),
        ("a/b.png", "tiff", "a/b.png.tiff"),
        ("a/b.TIF", "tiff", "a/b.TIF"),
        ("ä b/c", "jpeg", "ä b/c.jpg"),
    ],
)
def test_output_name(path: str, target: str, expected: str) -> None:
    assert output_name(path, target) == expected


def test_unknown_format_has_no_name() -> None:
    with pytest.raises(UsageError):
        output_name("a", "gif")
