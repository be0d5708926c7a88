"""EXIF blocks in and out of TIFF, where they are not a block but directories of the file itself.

Pillow parses and builds the directories.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any, BinaryIO

from denoise_core.images.types import CODEC_ERRORS

SUB_IFDS = {34665: 34664, 34853: 34852}
"""Exif and GPS pointers, and the tag before each: tifffile refuses to write the pointers, so a
placeholder of the neighbouring number is written, and renamed when its directory is appended."""

# Tags of the first directory that a JPEG or PNG keeps in its EXIF block.
MAKE, MODEL = 271, 272
CAMERA_TAGS = (MAKE, MODEL, 274, 305, 306, 315, 33432)
ASCII, SHORT, LONG, LONG8 = 2, 3, 4, 16


def _load(block: bytes) -> Any:
    from PIL import Image

    exif = Image.Exif()
    exif.load(block)
    return exif


def camera_of(block: bytes | None) -> str | None:
    """The camera's maker and model as an EXIF block names them, None where it names neither."""
    if not block:
        return None
    try:
        exif = _load(block)
        names = [str(exif[code]).strip("\0 ") for code in (MAKE, MODEL) if code in exif]
    except CODEC_ERRORS:
        return None
    return " ".join(filter(None, names)) or None


def from_tiff(file: BinaryIO) -> bytes | None:
    """The EXIF block (from the byte order mark on) that a TIFF would have as a JPEG, if any."""
    from PIL import Image

    exif = Image.Exif()
    try:
        with warnings.catch_warnings():  # of damaged tags, which are left out
            warnings.simplefilter("ignore")
            first, directories = _read_directories(file)
        exif.update({code: first[code] for code in CAMERA_TAGS if code in first})
        for code, directory in directories.items():
            exif.get_ifd(code).update(directory)
            exif[code] = directory
        return exif.tobytes()[6:] if len(exif) else None
    except CODEC_ERRORS:
        return None


def _read_directories(file: BinaryIO) -> tuple[Any, dict[int, dict[int, Any]]]:
    """The first directory of a TIFF or BigTIFF, and its Exif and GPS directories."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    file.seek(0)
    head = file.read(8)
    if b"+" in head[2:4]:
        head += file.read(8)
    first = ImageFileDirectory_v2(head)
    file.seek(first.next)
    first.load(file)
    found = {}
    for code in SUB_IFDS:
        if code in first:
            directory = ImageFileDirectory_v2(head, group=code)
            file.seek(first[code])
            directory.load(file)
            found[code] = dict(directory)
    return first, found


def for_tiff(block: bytes | None) -> tuple[bytes | None, list[str]]:
    """The block, None where its damage keeps it out of a TIFF; and the names of what is lost."""
    if not block:
        return None, []
    with warnings.catch_warnings(record=True) as damaged_tags:
        warnings.simplefilter("always")
        try:
            tiff_tags(block)
            exif = _load(block)
            for code in SUB_IFDS:
                _directory_bytes(exif.get_ifd(code), order="<", big=False, offset=0)
        except CODEC_ERRORS:
            return None, ["EXIF (damaged)"]
    return block, ["EXIF (damaged tags)"] if damaged_tags else []


def tiff_tags(block: bytes) -> list[list[Any]]:
    """Little-endian tags (code, type, count, bytes) of the first directory of an EXIF block."""
    tags: list[list[Any]] = []
    exif = _load(block)
    for code in CAMERA_TAGS:
        value = exif.get(code)
        if isinstance(value, int):
            tags.append([code, SHORT, 1, struct.pack("<H", value)])
        elif isinstance(value, str):
            text = value.encode() + b"\0"
            tags.append([code, ASCII, len(text), text])
    return tags


def placeholders(block: bytes) -> list[list[Any]]:
    """Tags that reserve room for the pointers to the sub-directories of `block`."""
    exif = _load(block)
    return [
        [neighbour, LONG, 1, bytes(4)] for code, neighbour in SUB_IFDS.items() if exif.get_ifd(code)
    ]


def append_to_tiff(file: BinaryIO, block: bytes) -> None:
    """Write the Exif and GPS directories of `block` behind a TIFF that has `placeholders`."""
    import tifffile

    exif = _load(block)
    file.seek(0)
    with tifffile.TiffFile(file) as tif:
        order, big = tif.byteorder, tif.is_bigtiff
        places = {tag.code: tag.offset for tag in tif.pages[0].tags}
    for code, neighbour in SUB_IFDS.items():
        if not (values := exif.get_ifd(code)):
            continue
        at = file.seek(0, io.SEEK_END)
        at += file.write(b"\0" * (at % 2))  # directories begin on even offsets
        file.write(_directory_bytes(values, order=order, big=big, offset=at))
        file.seek(places[neighbour])
        entry = (code, LONG8, 1, at) if big else (code, LONG, 1, at)
        file.write(struct.pack(order + ("HHQQ" if big else "HHII"), *entry))


def _directory_bytes(values: dict[int, Any], *, order: str, big: bool, offset: int) -> bytes:
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(order + "HHHQ", 43, 8, 0, 0)
    directory = ImageFileDirectory_v2(head if big else mark + struct.pack(order + "HI", 42, 0))
    for code, value in values.items():
        directory[code] = value
    return bytes(directory.tobytes(offset))
