"""TIFF of any axes through tifffile: whole, or in windows; every tag carried over.

The raw tags of each page are written back as they were (ImageJ, OME-XML, GeoTIFF, resolution,
ICC and private ones), in the source's byte order, so that no kind of TIFF needs code of its own.
Axes other than Y and X are flattened into channels and restored on writing.
"""

from __future__ import annotations

import io
import logging
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np

from denoise_core.errors import CorruptImage, ImageTooLarge, UnsupportedImage
from denoise_core.images import exif as exif_block
from denoise_core.images.nodata import parse_nodata
from denoise_core.images.types import (
    CODEC_ERRORS,
    Array,
    ImageHeader,
    ImageMetadata,
    check_dtype,
)

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_SEGMENT_BYTES = 1 << 26
"""Decoded size of one tile or strip up to which windows are worth it."""
MAX_TAG_BYTES = 1 << 28
"""Most bytes of all carried tags of all pages: tags that point to one place cost a file nothing."""

MINISWHITE, MINISBLACK, RGB, YCBCR = 0, 1, 2, 6
ASSOCIATED_ALPHA = 1
PHOTOMETRICS = (MINISWHITE, MINISBLACK, RGB)
NONE, LZW, ADOBE_DEFLATE = 1, 5, 8
# Compressions that lose nothing and that imagecodecs can write; values are the level that is used.
LOSSLESS: dict[int, dict[str, int]] = {
    NONE: {},
    LZW: {},
    ADOBE_DEFLATE: {"level": 4},
    32946: {"level": 4},  # the old code of deflate
    32773: {},  # PackBits
    34925: {},  # LZMA
    50000: {"level": 3},  # Zstandard
}
COMPRESSIONS = {"none": NONE, "lzw": LZW, "deflate": ADOBE_DEFLATE, "zstd": 50000, "lzma": 34925}
JPEGS = (6, 7, 33007, 34892)
# Tags that describe how pixels are stored: the writer makes them anew.
# fmt: off
STRUCTURE_TAGS = frozenset((
    254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 288, 289, 317, 320, 322, 323,
    324, 325, 330, 338, 339, 340, 341, 347, 400, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529,
    530, 531, 532, 32997, 32998, 34665, 34853, 40965,
))
# fmt: on
RESOLUTION_TAGS = (282, 283, 296)
RATIONALS = {5: "I", 10: "i"}
# By tifffile's kind of file: the tags that tell its axes and where in the old file which page lies.
# Beside pages that lie elsewhere they would mislead their readers.
FOREIGN_TAGS: dict[str, tuple[int, ...]] = {
    "lsm": (34412,),
    "mmstack": (),
    "ndpi": tuple(range(65420, 65459)),
    "scanimage": (),
    "sis": (33560,),
    "stk": (33628, 33629, 33630, 33631),
}
# The same outside of all directories.
FOREIGN_BLOCKS = {"mmstack": "Micro-Manager index map", "scanimage": "ScanImage header"}
PLAIN_AXES = ("YX", "YXS", "SYX")
ICC_TAG, XMP_TAG, PHOTOSHOP_LAYERS, MAX_SAMPLE_VALUE = 34675, 700, 37724, 281
GDAL_NODATA = 42113
CAMERA_MAXIMA = frozenset(2**bits - 1 for bits in range(9, 16))


@contextmanager
def _open(file: BinaryIO, *, name: str) -> Iterator[Any]:
    """A TiffFile whose errors come out as CorruptImage; tifffile may raise nearly anything."""
    import tifffile

    # Damage comes out as an error with a sentence; tifffile would log it as well.
    tifffile.logger().setLevel(logging.CRITICAL)
    file.seek(0)
    try:
        with tifffile.TiffFile(file, name=name) as tif:
            yield tif
    except MemoryError as error:
        raise ImageTooLarge(
            f"{name}: there is not enough memory to decode it; convert it to a tiled TIFF"
        ) from error
    except CODEC_ERRORS as error:
        raise CorruptImage(
            f"{name}: the TIFF is damaged or cut short ({error}); copy or download it again"
        ) from error


def read_header(file: BinaryIO, *, name: str) -> ImageHeader:
    """The header from the image directories; no pixels are read."""
    with _open(file, name=name) as tif:
        return _header(tif, name=name)


def _header(tif: Any, *, name: str) -> ImageHeader:
    if not len(tif.pages) or not tif.series:
        raise CorruptImage(f"{name}: the TIFF holds no image; copy or download it again")
    series, page = tif.series[0], tif.series[0].keyframe
    _check_kind(tif, page, name=name)
    axes, shape = series.axes, series.shape
    y, x = axes.rfind("Y"), axes.rfind("X")
    if y < 0 or x < 0 or 0 in shape:
        raise UnsupportedImage(
            f"{name}: a TIFF of axes {axes} and shape {shape}; expected Y and X among the axes"
        )
    samples = math.prod(shape) // (shape[y] * shape[x])
    alpha = _has_alpha(page, axes, samples, name=name)
    segment = _segment(page)
    return ImageHeader(
        format="tiff",
        height=shape[y],
        width=shape[x],
        channels=samples - int(alpha),
        dtype=page.dtype.newbyteorder("=").name,
        has_alpha=alpha,
        windowed=_windowed(tif, series, page, segment),
        axes=axes,
        bits=_bits(page),
        tile=segment if page.is_tiled else None,
        nodata=_nodata(page),
    )


def _nodata(page: Any) -> float | None:
    tag = page.tags.get(GDAL_NODATA)
    return None if tag is None else parse_nodata(str(tag.value), page.dtype)


def _check_kind(tif: Any, page: Any, *, name: str) -> None:
    """Refuse by name what is no intensity image, and what is cut short."""
    import tifffile

    photometric = getattr(page.photometric, "name", str(page.photometric))
    names = {"PALETTE": "palette", "SEPARATED": "CMYK", "MASK": "transparency mask"}
    kind = names.get(photometric, photometric)
    decodes_to_rgb = page.photometric == YCBCR and page.compression in JPEGS
    if page.photometric not in PHOTOMETRICS and not decodes_to_rgb:
        raise UnsupportedImage(f"{name}: a {kind} TIFF; convert it to grey or RGB first")
    if page.bitspersample == 1 or page.dtype is None:
        kind = "bilevel (1-bit)" if page.bitspersample == 1 else f"{page.bitspersample}-bit"
        raise UnsupportedImage(f"{name}: a {kind} TIFF; convert it to 8-bit grey first")
    check_dtype(page.dtype, name=name)
    if page.compression not in tifffile.TIFF.DECOMPRESSORS and page.compression != NONE:
        raise UnsupportedImage(
            f"{name}: TIFF compression {page.compression!r} has no decoder here; save it as deflate"
        )
    if page.imagedepth > 1:
        raise UnsupportedImage(f"{name}: a volumetric TIFF; save its planes as pages")
    if page.photometric == RGB and page.samplesperpixel < 3:
        raise CorruptImage(f"{name}: an RGB TIFF of {page.samplesperpixel} samples; replace it")
    _check_segment(page, name=name)
    _check_series(tif, name=name)
    _check_complete(tif, name=name)


def _check_segment(page: Any, *, name: str) -> None:
    """A tile much larger than its image would take memory that the image's size does not tell."""
    height, width = _segment(page)
    size = height * width * page.samplesperpixel * page.dtype.itemsize
    if size > max(MAX_SEGMENT_BYTES, 2 * page.nbytes):
        raise ImageTooLarge(
            f"{name}: its segments are {width}x{height} for an image of "
            f"{page.imagewidth}x{page.imagelength}; write it again with tiles of 256x256"
        )


def _check_series(tif: Any, *, name: str) -> None:
    others = [series for series in tif.series[1:] if not _is_reduced(series)]
    if others:
        sizes = ", ".join("x".join(map(str, series.shape)) for series in tif.series[:4])
        raise UnsupportedImage(
            f"{name}: a TIFF of {len(tif.series)} images of different kinds ({sizes}); "
            "split it into one file each"
        )


def _is_reduced(series: Any) -> bool:
    return bool(series.keyframe.subfiletype & 1)


def _check_complete(tif: Any, *, name: str) -> None:
    """A TIFF that is cut short is often opened without complaint, its last pages missing."""
    size = tif.filehandle.size
    series = tif.series[0]
    for page in series.pages:
        if page is not None and page.dataoffsets:
            ends = np.add(page.dataoffsets, page.databytecounts, dtype=np.float64)
            if ends.max() > size:
                raise CorruptImage(
                    f"{name}: the TIFF is cut short: its pixels end at byte {ends.max():.0f}, the "
                    f"file at {size}; copy or download it again"
                )
    tif.filehandle.seek(tif.pages.next_page_offset)
    pointer = tif.filehandle.read(tif.tiff.offsetsize)
    if len(pointer) != tif.tiff.offsetsize or any(pointer):
        raise CorruptImage(
            f"{name}: the TIFF is cut short: page {len(tif.pages) + 1} lies outside the file; "
            "copy or download it again"
        )
    if series.dataoffset is None and any(page is None for page in series.pages):
        raise UnsupportedImage(f"{name}: a TIFF whose pages lie in other files; merge them first")


def _has_alpha(page: Any, axes: str, samples: int, *, name: str) -> bool:
    """One extra sample that is declared associated (1) or unassociated (2) alpha."""
    declared = [int(kind) for kind in page.extrasamples]
    if not any(kind in (1, 2) for kind in declared):
        return False
    if len(declared) != 1 or samples != page.samplesperpixel or "S" not in axes:
        raise UnsupportedImage(
            f"{name}: a TIFF of several pages or extra samples with alpha ({axes}); split it into "
            "one image each"
        )
    return True


def _bits(page: Any) -> int:
    if page.dtype.kind not in "ui":
        return 0
    full = page.dtype.itemsize * 8
    if page.dtype.kind == "i" or page.bitspersample != full:
        return int(page.bitspersample)
    tag = page.tags.get(MAX_SAMPLE_VALUE)
    most = int(np.max(tag.value)) if tag is not None else 0
    # 12-bit cameras: MaxSampleValue 4095 in 16 bits. Others are statistics of the picture.
    return most.bit_length() if full == 16 and most in CAMERA_MAXIMA else full


def _segment(page: Any) -> tuple[int, int]:
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return min(page.rowsperstrip or page.imagelength, page.imagelength), page.imagewidth


def _windowed(tif: Any, series: Any, page: Any, segment: tuple[int, int]) -> bool:
    if _row_addressable(tif, series, page):
        return True
    contiguous = page.samplesperpixel if page.planarconfig == 1 else 1
    size = segment[0] * segment[1] * contiguous * page.dtype.itemsize
    return segment[0] < page.imagelength and size <= MAX_SEGMENT_BYTES


def _row_addressable(tif: Any, series: Any, page: Any) -> bool:
    """Uncompressed pixels in one run: a window is a range of bytes."""
    return (
        series.dataoffset is not None
        and not page.is_tiled
        and page.compression == NONE
        and page.bitspersample == page.dtype.itemsize * 8
        and page.fillorder == 1
    )


def decode(data: bytes, header: ImageHeader, *, name: str) -> tuple[Array, ImageMetadata]:
    """Samples (H, W, S) and metadata."""
    file = io.BytesIO(data)
    with _open(file, name=name) as tif:
        # As stored: the series itself would square the values of an MD Gel, which its tags tell.
        array = tif.asarray(series=tif.series[0], maxworkers=1)
        metadata = _metadata(tif, header, name=name)
    metadata.exif, lost = exif_block.from_tiff(file)
    metadata.lost += tuple(lost)
    return flatten(array, header.axes), metadata


def read_metadata(file: BinaryIO, header: ImageHeader, *, name: str) -> ImageMetadata:
    """Metadata without pixels, for an image that is read in windows."""
    with _open(file, name=name) as tif:
        metadata = _metadata(tif, header, name=name)
    metadata.exif, lost = exif_block.from_tiff(file)
    metadata.lost += tuple(lost)
    return metadata


def flatten(array: Array, axes: str) -> Array:
    """An array of `axes` -> (H, W, S)."""
    y, x = axes.rfind("Y"), axes.rfind("X")
    array = np.moveaxis(array, (y, x), (0, 1))
    return array.reshape(*array.shape[:2], -1)


def unflatten(samples: Array, axes: str, shape: tuple[int, ...]) -> Array:
    """The inverse of `flatten`."""
    y, x = axes.rfind("Y"), axes.rfind("X")
    others = [size for axis, size in enumerate(shape) if axis not in (y, x)]
    return np.moveaxis(samples.reshape(*samples.shape[:2], *others), (0, 1), (y, x))


def read_window(
    file: BinaryIO, *, y: slice, x: slice, name: str = "image"
) -> tuple[Array, ImageHeader]:
    """Samples (h, w, S) of rows `y` and columns `x`, reading only the segments they touch."""
    with _open(file, name=name) as tif:
        header = _header(tif, name=name)
        series, page = tif.series[0], tif.series[0].keyframe
        if _row_addressable(tif, series, page):
            return _read_rows(tif, series, page, y=y, x=x), header
        return _read_segments(tif, series, y=y, x=x), header


def _read_segments(tif: Any, series: Any, *, y: slice, x: slice) -> Array:
    """The tiles or strips that the window touches, of every page and plane.

    Direct calls of tifffile's decoder: its Zarr store does the same, but costs 0.4 s of imports.
    """
    key = series.keyframe
    separate, _, height, width, together = key.shaped
    (y0, y1, _), (x0, x1, _) = y.indices(height), x.indices(width)
    shape = (len(series.pages), separate, y1 - y0, x1 - x0, together)
    out = np.full(shape, key.nodata, key.dtype.newbyteorder("="))
    for page, target in zip(series.pages, out, strict=True):
        for index in _touched(key, y=(y0, y1), x=(x0, x1)):
            segment, (plane, _, top, left, _), _ = _decode_segment(tif, page, index)
            if segment is not None:
                _paste(target[plane], segment[0], top=top - y0, left=left - x0)
    # (page, plane, y, x, sample) -> (y, x, page and plane and sample), the order of `flatten`
    return np.moveaxis(out, (2, 3), (0, 1)).reshape(y1 - y0, x1 - x0, -1)


def _touched(page: Any, *, y: tuple[int, int], x: tuple[int, int]) -> Iterator[int]:
    """Numbers of the segments of a page that rows `y` and columns `x` touch."""
    segment_height, segment_width = _segment(page)
    down = -(-page.imagelength // segment_height)
    across = -(-page.imagewidth // segment_width)
    planes = page.shaped[0]
    for plane in range(planes if y[0] < y[1] and x[0] < x[1] else 0):
        for row in range(y[0] // segment_height, (y[1] - 1) // segment_height + 1):
            for column in range(x[0] // segment_width, (x[1] - 1) // segment_width + 1):
                yield (plane * down + row) * across + column


def _decode_segment(tif: Any, page: Any, index: int) -> tuple[Any, Any, Any]:
    data = None
    if page.databytecounts[index]:
        tif.filehandle.seek(page.dataoffsets[index])
        data = tif.filehandle.read(page.databytecounts[index])
    return page.keyframe.decode(
        data, index, jpegtables=page.jpegtables, jpegheader=page.keyframe.jpegheader
    )


def _paste(target: Array, segment: Array, *, top: int, left: int) -> None:
    """Copy the part of `segment` that lies within `target`; (top, left) may be negative."""
    height, width = target.shape[:2]
    rows = slice(max(top, 0), min(top + segment.shape[0], height))
    columns = slice(max(left, 0), min(left + segment.shape[1], width))
    target[rows, columns] = segment[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]


def _read_rows(tif: Any, series: Any, page: Any, *, y: slice, x: slice) -> Array:
    """Whole rows of every plane, then the columns."""
    planes_shape, row = _plane_layout(series)
    height, width = page.imagelength, page.imagewidth
    y0, y1, _ = y.indices(height)
    x0, x1, _ = x.indices(width)
    dtype = page.dtype.newbyteorder(tif.byteorder)
    planes = []
    for plane in range(math.prod(planes_shape)):
        tif.filehandle.seek(series.dataoffset + (plane * height + y0) * row)
        rows = np.frombuffer(tif.filehandle.read((y1 - y0) * row), dtype)
        planes.append(rows.reshape(y1 - y0, width, -1)[:, x0:x1])
    return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=-1)


def _plane_layout(series: Any) -> tuple[tuple[int, ...], int]:
    """The axes before Y, and the bytes of one row (X and the samples behind it)."""
    y = series.axes.rfind("Y")
    row = math.prod(series.shape[y + 1 :]) * series.keyframe.dtype.itemsize
    return series.shape[:y], row


# --- metadata -----------------------------------------------------------------------------------


def _metadata(tif: Any, header: ImageHeader, *, name: str) -> ImageMetadata:
    series, page = tif.series[0], tif.series[0].keyframe
    tag_sets, lost = _tag_sets(tif, series, name=name)
    if len(series.levels) > 1 or page.subifds:
        lost.append("tiff:pyramid levels and sub-images")
    if len(tif.series) > 1:
        lost.append("tiff:thumbnail")
    return ImageMetadata(
        format="tiff",
        dtype=header.dtype,
        channels=header.channels,
        has_alpha=header.has_alpha,
        bits=header.bits,
        icc=_raw(tif, page, ICC_TAG),
        xmp=_raw(tif, page, XMP_TAG),
        dpi=_dpi(page),
        native=_layout(tif, series, page) | {"tags": tag_sets},
        lost=tuple(lost),
    )


def _layout(tif: Any, series: Any, page: Any) -> dict[str, Any]:
    return {
        "axes": series.axes,
        "shape": list(series.shape),
        "pages": math.prod(series.shape) // math.prod(page.shaped),
        "page_shape": list(page.shaped),
        "byteorder": tif.byteorder,
        "bigtiff": bool(tif.is_bigtiff),
        "photometric": int(page.photometric),
        "planarconfig": int(page.planarconfig or 1),
        "extrasamples": [int(kind) for kind in page.extrasamples],
        "tile": [page.tilelength, page.tilewidth] if page.is_tiled else None,
        "rowsperstrip": int(page.rowsperstrip or 0),
        "compression": int(page.compression),
        "predictor": int(page.predictor),
        "bitspersample": int(page.bitspersample),
        "subfiletype": int(page.subfiletype),
        "resolution": _resolution(page),
    }


def _tag_sets(tif: Any, series: Any, *, name: str) -> tuple[list[list[list[Any]]], list[str]]:
    """Raw (code, type, count, bytes) of the tags of every page that has a directory."""
    sets: list[list[list[Any]]] = []
    # Pages are written in the order of the series, which OME-XML may tell by their old numbers.
    pages = [page.index for page in series.pages if page is not None]
    moved = tif.is_ome and pages != list(range(len(pages)))
    lost = ["tiff:OME-XML", f"tiff:axes {series.axes}"] if moved else _foreign(series)
    left_out = {*STRUCTURE_TAGS, *RESOLUTION_TAGS, *FOREIGN_TAGS.get(series.kind, ())}
    resolutions: list[dict[int, Any]] = []
    room = MAX_TAG_BYTES
    for page in series.pages:
        tags = []
        found = page.aspage().tags if page is not None else None
        for tag in found if found is not None else ():
            if sets and tag.code in exif_block.SUB_IFDS:
                lost.append("tiff:EXIF of further pages")
            elif tag.code == PHOTOSHOP_LAYERS:
                lost.append("tiff:ImageSourceData (Photoshop layers)")
            elif moved and tag.code == exif_block.DESCRIPTION:
                continue
            elif tag.code not in left_out:
                room -= tag.valuebytecount
                if room < 0:
                    raise UnsupportedImage(
                        f"{name}: its tags hold more than {MAX_TAG_BYTES >> 20} MiB beside the "
                        "picture; expected less: save it without them"
                    )
                tags.append([tag.code, int(tag.dtype), tag.count, _tag_bytes(tif, tag)])
        sets.append(tags)
        if found is not None:
            resolutions.append({code: found.valueof(code) for code in RESOLUTION_TAGS})
    if any(resolution != resolutions[0] for resolution in resolutions):
        lost.append("tiff:DPI of further pages")
    if _taken_for_one_run(series, sets[0]):
        sets[0] = [tag for tag in sets[0] if tag[0] != exif_block.DESCRIPTION]
        lost += ["tiff:ImageDescription", f"tiff:axes {series.axes}"]
    return sets, lost


def _foreign(series: Any) -> list[str]:
    """Names of what a file of this kind says of its own layout, and that is left behind."""
    import tifffile

    if series.kind not in FOREIGN_TAGS:
        return []
    found = series.keyframe.tags
    lost = [f"tiff:{FOREIGN_BLOCKS[series.kind]}"] if series.kind in FOREIGN_BLOCKS else []
    codes = [code for code in FOREIGN_TAGS[series.kind] if code in found]
    lost += [f"tiff:{tifffile.TIFF.TAGS.get(code, code)}" for code in codes]
    return lost if series.axes in PLAIN_AXES else [*lost, f"tiff:axes {series.axes}"]


def _taken_for_one_run(series: Any, tags: list[list[Any]]) -> bool:
    """Whether readers would take pages that are written one by one for one run of pixels.

    tifffile does so behind its own description where the second directory lies further from the
    first one than all pixels are long: where they are few beside the tags.
    """
    page = series.keyframe
    others = (math.prod(series.shape) // math.prod(page.shaped) - 1) * page.nbytes
    between = 1024 + 16 * len(page.dataoffsets) + sum(len(tag[3]) for tag in tags)
    return bool(series.kind == "shaped" and page.compression == NONE and 0 < others < between)


def _tag_bytes(tif: Any, tag: Any) -> bytes:
    tif.filehandle.seek(tag.valueoffset)
    return bytes(tif.filehandle.read(tag.valuebytecount))


def _raw(tif: Any, page: Any, code: int) -> bytes | None:
    tag = page.tags.get(code)
    return None if tag is None else _tag_bytes(tif, tag)


def _resolution(page: Any) -> list[Any] | None:
    tags = [page.tags.get(code) for code in RESOLUTION_TAGS]
    if tags[0] is None or tags[1] is None:
        return None
    unit = 2 if tags[2] is None else int(tags[2].value)
    x, y = list(tags[0].value), list(tags[1].value)
    valid = len(x) == len(y) == 2 and x[1] > 0 and y[1] > 0 and unit in (1, 2, 3)
    return [x, y, unit] if valid else None


def _dpi(page: Any) -> tuple[float, float] | None:
    resolution = _resolution(page)
    if resolution is None or resolution[2] not in (2, 3) or 0 in (*resolution[0], *resolution[1]):
        return None
    factor = 1.0 if resolution[2] == 2 else 2.54
    (xn, xd), (yn, yd), _ = resolution
    return xn / xd * factor, yn / yd * factor


def is_negative(metadata: ImageMetadata) -> bool:
    """Whether low values are bright, as in a TIFF that is MinIsWhite; others do not know that."""
    return metadata.format == "tiff" and bool(metadata.native["photometric"] == MINISWHITE)


def tags_left_behind(metadata: ImageMetadata) -> list[str]:
    """Names of the tags and axes of a TIFF that no other format keeps."""
    import tifffile

    carried = (ICC_TAG, XMP_TAG, *exif_block.CAMERA_TAGS)
    codes = {code for tags in metadata.native["tags"] for code, *_ in tags if code not in carried}
    lost = [f"tiff:{tifffile.TIFF.TAGS.get(code, code)}" for code in sorted(codes)]
    if metadata.has_alpha and metadata.native["extrasamples"] == [ASSOCIATED_ALPHA]:
        lost.append("tiff:associated alpha (colours stay multiplied by it)")
    axes = metadata.native["axes"]
    return lost if axes in PLAIN_AXES else [f"tiff:axes {axes}", *lost]


def other_bits(bits: int, dtype: np.dtype[Any]) -> list[str]:
    """The name of a depth of so many bits a sample, where `dtype` has another.

    A PNG's sBIT would tell another thing: that so many of the upper bits are used.
    """
    full = dtype.itemsize * 8
    return [f"tiff:{bits} bits a sample (written with {full})"] if bits != full else []


# --- writing ------------------------------------------------------------------------------------


def encode(
    samples: Array, metadata: ImageMetadata, *, compression: str | None
) -> tuple[bytes, list[str]]:
    """Samples (H, W, S) -> TIFF of the source's layout, or a plain one for other sources."""
    import tifffile

    exif, damaged = exif_block.for_tiff(metadata.exif)
    metadata = replace(metadata, exif=exif)
    layout, tag_sets, left = layout_to_write(samples.shape, samples.dtype, metadata)
    options, lost = page_options(layout, samples.dtype, compression=compression)
    array = unflatten(samples, layout["axes"], tuple(layout["shape"]))
    pages = array.reshape(layout["pages"], *layout["page_shape"])
    big = layout["bigtiff"] or array.nbytes > 2**32 - 2**25
    out = io.BytesIO()
    with (
        refused_writes(),
        tifffile.TiffWriter(out, bigtiff=big, byteorder=layout["byteorder"]) as writer,
    ):
        for number, page in enumerate(pages):
            tags = extra_tags(tag_sets, metadata, page=number)
            writer.write(_page_array(page, layout), extratags=tags, **options)
    if metadata.exif:
        exif_block.append_to_tiff(out, metadata.exif)
    return out.getvalue(), damaged + left + lost


@contextmanager
def refused_writes() -> Iterator[None]:
    """What tifffile refuses to write is a property of the image, not a bug that ends the run."""
    try:
        yield
    except (ArithmeticError, LookupError, TypeError, ValueError, struct.error) as error:
        raise UnsupportedImage(
            f"this TIFF layout or its tags cannot be written ({error}); use --format png or npy, "
            "or write the source again without its private tags"
        ) from error


def extra_tags(
    tag_sets: list[list[list[Any]]], metadata: ImageMetadata, *, page: int
) -> list[tuple[Any, ...]]:
    """Tags of one page as TiffWriter.write wants them; pages without a directory have none."""
    tags = tag_sets[page] if page < len(tag_sets) else []
    if page == 0 and metadata.exif:
        tags = tags + exif_block.placeholders(metadata.exif)
    order = metadata.native["byteorder"] if metadata.format == "tiff" else "<"
    return [(*each[:3], _tag_value(each, order), False) for each in tags]


def _tag_value(tag: list[Any], order: str) -> Any:
    """Raw bytes, as TiffWriter takes them; but of rationals it takes each half for a whole one."""
    _, kind, count, data = tag
    if kind not in RATIONALS:
        return data
    return struct.unpack(f"{order}{2 * count}{RATIONALS[kind]}", data)


def _page_array(page: Array, layout: dict[str, Any]) -> Array:
    """(samples, 1, H, W, samples) -> what tifffile takes: (H, W), (H, W, S) or (S, H, W)."""
    separate, _, height, width, together = page.shape
    if separate > 1:
        return page.reshape(separate, height, width)
    return page.reshape((height, width, together) if together > 1 else (height, width))


def layout_to_write(
    shape: tuple[int, ...], dtype: np.dtype[Any], metadata: ImageMetadata
) -> tuple[dict[str, Any], list[list[list[Any]]], list[str]]:
    """Layout and tags of each page for samples of `shape` (H, W, S), and what is left behind."""
    if metadata.format == "tiff":
        layout = dict(metadata.native)
        tag_sets, lost = layout.pop("tags"), []
        if dtype.name != metadata.dtype:
            # No value of another depth stands for no data.
            if any(tag[0] == GDAL_NODATA for tags in tag_sets for tag in tags):
                lost = ["tiff:GDAL_NODATA"]
                tag_sets = [[tag for tag in tags if tag[0] != GDAL_NODATA] for tags in tag_sets]
            layout |= {"predictor": 2 if layout["predictor"] > 1 else 1, "bitspersample": 0}
            if dtype.kind == "f" and layout["predictor"] > 1:
                layout["predictor"] = 3
        return layout, tag_sets, lost
    return _plain_layout(shape, dtype, metadata), [_plain_tags(metadata)], []


def _plain_layout(
    shape: tuple[int, ...], dtype: np.dtype[Any], metadata: ImageMetadata
) -> dict[str, Any]:
    height, width, samples = shape
    colour = metadata.channels == 3
    alpha = [2] if metadata.has_alpha else []
    extra = alpha if colour or metadata.channels == 1 else [0] * (samples - 1 - len(alpha)) + alpha
    resolution = None
    if metadata.dpi:
        resolution = [[round(value * 1000), 1000] for value in metadata.dpi] + [2]
    return {
        "axes": "YXS" if samples > 1 else "YX",
        "shape": [height, width, samples] if samples > 1 else [height, width],
        "pages": 1,
        "page_shape": [1, 1, height, width, samples],
        "byteorder": "<",
        "bigtiff": False,
        "photometric": RGB if colour else MINISBLACK,
        "planarconfig": 1,
        "extrasamples": extra,
        "tile": None,
        "rowsperstrip": 0,
        "compression": ADOBE_DEFLATE,
        "predictor": 3 if dtype.kind == "f" else 2,
        "bitspersample": 0,
        "subfiletype": 0,
        "resolution": resolution,
    }


def _plain_tags(metadata: ImageMetadata) -> list[list[Any]]:
    tags: list[list[Any]] = []
    if metadata.icc:
        tags.append([ICC_TAG, 7, len(metadata.icc), metadata.icc])
    if metadata.xmp:
        tags.append([XMP_TAG, 1, len(metadata.xmp), metadata.xmp])
    if metadata.exif:
        tags += exif_block.tiff_tags(metadata.exif)
    return tags


def page_options(
    layout: dict[str, Any], dtype: np.dtype[Any], *, compression: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Arguments of TiffWriter.write for one page, and what the layout cannot keep."""
    code, predictor, lost = _compression(layout, dtype, compression)
    bits = layout["bitspersample"]
    bits = 0 if bits == dtype.itemsize * 8 else bits
    # tifffile packs the swapped bytes of a big-endian file, which makes noise of the picture.
    if bits and (code != NONE or layout["byteorder"] == ">"):
        lost += other_bits(bits, dtype)
        bits = 0
    tile = layout["tile"]
    if tile and any(size % 16 for size in tile):
        lost.append(f"tiff:tile of {tile[0]}x{tile[1]} (written as a multiple of 16)")
        tile = [-(-size // 16) * 16 for size in tile]
    samples = math.prod(layout["page_shape"][slice(0, 5, 4)])
    photometric = RGB if layout["photometric"] == YCBCR else layout["photometric"]
    # Of a fourth sample that nothing explains tifffile would make alpha.
    unexplained = [0] * (samples - 3) if photometric == RGB else []
    options = {
        "photometric": photometric,
        "planarconfig": layout["planarconfig"] if samples > 1 else None,
        "extrasamples": layout["extrasamples"] or unexplained or None,
        "tile": tuple(tile) if tile else None,
        "rowsperstrip": None if tile else layout["rowsperstrip"] or None,
        "compression": code if code != NONE else None,
        "compressionargs": LOSSLESS[code],
        "predictor": predictor if predictor > 1 else None,
        "bitspersample": bits or None,
        "subfiletype": layout["subfiletype"] or None,
        "software": False,
        "metadata": None,
        "maxworkers": 1,
    }
    resolution = layout["resolution"]
    if resolution and max(*resolution[0], *resolution[1]) >= 2**32:
        lost.append("DPI")
        resolution = None
    if resolution:
        x, y, unit = resolution
        options |= {"resolution": (tuple(x), tuple(y)), "resolutionunit": unit}
    else:
        options["resolutionunit"] = 1
    return options, lost


def _compression(
    layout: dict[str, Any], dtype: np.dtype[Any], wanted: str | None
) -> tuple[int, int, list[str]]:
    """(code, predictor, losses)."""
    best = 3 if dtype.kind == "f" else 2
    if wanted:
        if wanted not in COMPRESSIONS:
            raise UnsupportedImage(
                f"TIFF compression {wanted!r} is unknown; expected one of {', '.join(COMPRESSIONS)}"
            )
        code = COMPRESSIONS[wanted]
        return code, 1 if code == NONE else best, []
    code = layout["compression"]
    if code in LOSSLESS:
        return code, layout["predictor"] if code != NONE else 1, []
    import tifffile

    name = tifffile.COMPRESSION(code).name
    return ADOBE_DEFLATE, best, [f"tiff:compression {name} (written with deflate)"]
