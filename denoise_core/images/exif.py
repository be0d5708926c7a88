"""EXIF blocks in and out of TIFF, where they are not a block but directories of the file itself.

Values are carried as the bytes that they are, so that types and text of any encoding survive.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from denoise_core.images.types import CODEC_ERRORS

FIRST, EXIF, GPS, INTEROP = 0, 34665, 34853, 40965
NAMES = {EXIF: "EXIF", GPS: "GPS", INTEROP: "EXIF interoperability"}
SUB_IFDS = {EXIF: 34664, GPS: 34852}
"""Exif and GPS pointers, and the tag before each: tifffile refuses to write the pointers, so a
placeholder of the neighbouring number is written, and renamed when its directory is appended."""
CHILDREN = {FIRST: (EXIF, GPS), EXIF: (INTEROP,)}

# Tags of the first directory that a JPEG or PNG keeps in its EXIF block.
DESCRIPTION, MAKE, MODEL, ORIENTATION = 270, 271, 272, 274
CAMERA_TAGS = (MAKE, MODEL, ORIENTATION, 305, 306, 315, 316, 33432)
# Tags of an EXIF block that tell how its own picture is stored, and its DPI.
STORAGE_TAGS = frozenset((256, 257, 258, 259, 262, 277, 282, 283, 284, 296, 530, 531, 532))
ASCII, SHORT, LONG, LONG8, UTF8 = 2, 3, 4, 16, 129
SIZES = {
    1: 1, ASCII: 1, SHORT: 2, LONG: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
    LONG8: 8, 17: 8, 18: 8, UTF8: 1,
}  # fmt: skip
NUMBERS = {1: "B", SHORT: "H", LONG: "I", 13: "I", LONG8: "Q", 18: "Q"}
MAX_BYTES = 1 << 26
"""Most bytes of all values; above it the directories are taken for damaged."""

Tag = tuple[int, int, bytes]
"""Type, count and bytes."""


@dataclass(slots=True)
class _Block:
    """Directories by the tag that points to them, in byte order `order` ("<" or ">")."""

    order: str
    directories: dict[int, dict[int, Tag]] = field(default_factory=dict)
    thumbnail: bool = False
    lost: list[str] = field(default_factory=list)


class _Reader:
    """Reads a TIFF, a BigTIFF or an EXIF block; damage that can be left out is named in `lost`."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.room = file, MAX_BYTES
        self.size = file.seek(0, io.SEEK_END)
        head = self._bytes(0, min(16, self.size))
        self.block = _Block({b"II": "<", b"MM": ">"}[head[:2]])
        version = self._number("H", head[2:4])
        if version not in (42, 43):
            raise ValueError(f"version {version}, expected 42 or 43")
        self.big = version == 43
        self.first = self._number("Q", head[8:]) if self.big else self._number("I", head[4:8])

    def _bytes(self, at: int, size: int) -> bytes:
        if at + size > self.size:
            return b""
        self.file.seek(at)
        return self.file.read(size)

    def _number(self, layout: str, data: bytes) -> int:
        return int(struct.unpack(self.block.order + layout, data)[0])

    def read(self, only: tuple[int, ...] | None = None) -> _Block:
        """All directories; of the first one `only` these tags."""
        self._directory(FIRST, self.first, only)
        for code in (EXIF, GPS, INTEROP):
            parent = self.block.directories.get(EXIF if code == INTEROP else FIRST, {})
            if code in parent:
                kind, _, data = parent.pop(code)
                try:
                    self._directory(code, self._number(NUMBERS[kind], data))
                except CODEC_ERRORS:
                    self.block.lost.append(f"{NAMES[code]} (damaged)")
        return self.block

    def _directory(self, code: int, at: int, only: tuple[int, ...] | None = None) -> None:
        width, layout, offset = (8, "HHQ8s", "Q") if self.big else (4, "HHI4s", "I")
        start = at + (8 if self.big else 2)
        count = self._number("Q" if self.big else "H", self._bytes(at, start - at))
        length = struct.calcsize("=" + layout)
        whole = min(count, 65535, max(0, self.size - start) // length)
        if whole < count:
            self._note_damage()
        tags: dict[int, Tag] = {}
        entries = self._bytes(start, whole * length)
        for tag, kind, values, data in struct.iter_unpack(self.block.order + layout, entries):
            size = SIZES.get(kind, 0) * values
            if tag in tags or (only is not None and tag not in only):
                continue
            if size > width:
                self.room -= size
                place = self._number(offset, data)
                data = self._bytes(place, size) if self.room >= 0 else b""
            if kind in SIZES and len(data) >= size:
                tags[tag] = kind, values, data[:size]
            else:
                self._note_damage()
        if tags:
            self.block.directories[code] = tags
        if code == FIRST:
            self.block.thumbnail = any(self._bytes(start + count * length, width))

    def _note_damage(self) -> None:
        if "EXIF (damaged tags)" not in self.block.lost:
            self.block.lost.append("EXIF (damaged tags)")


def _parse(block: bytes) -> _Block:
    return _Reader(io.BytesIO(block.removeprefix(b"Exif\0\0"))).read()


def camera_of(block: bytes | None) -> str | None:
    """The camera's maker and model as an EXIF block names them, None where it names neither."""
    if not block:
        return None
    try:
        first = _parse(block).directories.get(FIRST, {})
    except CODEC_ERRORS:
        return None
    texts = [first[code][2].decode("utf-8", "replace") for code in (MAKE, MODEL) if code in first]
    return " ".join(filter(None, (text.strip("\0 ") for text in texts))) or None


def dpi_of(block: bytes | None) -> tuple[float, float] | None:
    """The resolution that an EXIF block tells, in dots per inch."""
    try:
        parsed = _parse(block or b"")
        first = parsed.directories[FIRST]
        x, y = (struct.unpack(parsed.order + "II", first[code][2]) for code in (282, 283))
        unit = struct.unpack(parsed.order + "H", first[296][2])[0] if 296 in first else 2
        factor = {2: 1.0, 3: 2.54}[unit]
        dpi = x[0] / x[1] * factor, y[0] / y[1] * factor
    except CODEC_ERRORS:
        return None
    return dpi if min(dpi) > 0 else None


def from_tiff(file: BinaryIO) -> tuple[bytes | None, list[str]]:
    """The EXIF block (from the byte order mark on) that a TIFF would have as a JPEG, if any.

    Beside it the names of what its damage keeps out.
    """
    try:
        block = _Reader(file).read((*CAMERA_TAGS, *SUB_IFDS))
        if not any(block.directories.values()):
            return None, block.lost
        mark = b"II" if block.order == "<" else b"MM"
        head = mark + struct.pack(block.order + "HI", 42, 8)
        return head + _pack(block, FIRST, order=block.order, big=False, offset=8), block.lost
    except CODEC_ERRORS:
        return None, ["EXIF (damaged)"]


def for_tiff(block: bytes | None) -> tuple[bytes | None, list[str]]:
    """The block, None where its damage keeps it out of a TIFF; and the names of what is lost."""
    if not block:
        return None, []
    import tifffile

    try:
        parsed = _parse(block)
        kept = {code for code, *_ in tiff_tags(block)}
    except CODEC_ERRORS:
        return None, ["EXIF (damaged)"]
    left = sorted(parsed.directories.get(FIRST, {}).keys() - kept - STORAGE_TAGS)
    lost = [f"exif:{tifffile.TIFF.TAGS.get(code, code)}" for code in left]
    return block, parsed.lost + lost + ["exif:thumbnail"] * parsed.thumbnail


def tiff_tags(block: bytes) -> list[list[Any]]:
    """Little-endian tags (code, type, count, bytes) of the first directory of an EXIF block."""
    parsed = _parse(block)
    tags: list[list[Any]] = []
    for code, (kind, count, data) in parsed.directories.get(FIRST, {}).items():
        if code == ORIENTATION and count == 1 and kind in NUMBERS:
            (value,) = struct.unpack(parsed.order + NUMBERS[kind], data)
            tags.append([code, SHORT, 1, struct.pack("<H", value)])
        elif code in (DESCRIPTION, *CAMERA_TAGS) and kind in (ASCII, UTF8):
            tags.append([code, ASCII, count, data])
    return tags


def placeholders(block: bytes) -> list[list[Any]]:
    """Tags that reserve room for the pointers to the sub-directories of `block`."""
    found = _parse(block).directories
    return [[neighbour, LONG, 1, bytes(4)] for code, neighbour in SUB_IFDS.items() if code in found]


def append_to_tiff(file: BinaryIO, block: bytes) -> None:
    """Write the Exif and GPS directories of `block` behind a TIFF that has `placeholders`."""
    import tifffile

    parsed = _parse(block)
    file.seek(0)
    with tifffile.TiffFile(file) as tif:
        order, big = tif.byteorder, tif.is_bigtiff
        places = {tag.code: tag.offset for tag in tif.pages[0].tags}
    for code, neighbour in SUB_IFDS.items():
        if code not in parsed.directories:
            continue
        at = file.seek(0, io.SEEK_END)
        at += file.write(b"\0" * (at % 2))  # directories begin on even offsets
        file.write(_pack(parsed, code, order=order, big=big, offset=at))
        file.seek(places[neighbour])
        entry = (code, LONG8, 1, at) if big else (code, LONG, 1, at)
        file.write(struct.pack(order + ("HHQQ" if big else "HHII"), *entry))


def _pack(block: _Block, code: int, *, order: str, big: bool, offset: int) -> bytes:
    """A directory as it lies at `offset`; its values and the directories below it behind it."""
    width, counts, entries, place = (8, "Q", "HHQ", "Q") if big else (4, "H", "HHI", "I")
    below = [child for child in CHILDREN.get(code, ()) if child in block.directories]
    tags = block.directories.get(code, {}) | dict.fromkeys(below, (LONG, 1, b""))
    body = struct.pack(order + counts, len(tags))
    behind = offset + len(body) + len(tags) * (4 + 2 * width) + width
    tail = b""
    for tag, (kind, count, values) in sorted(tags.items()):
        data = _reordered(values, kind, block.order, order)
        at = struct.pack(order + place, behind + len(tail))
        if tag in below:
            kind = LONG8 if big else LONG
            tail += _pack(block, tag, order=order, big=big, offset=behind + len(tail))
            data = at
        elif len(data) > width:
            tail += data + b"\0" * (len(data) % 2)
            data = at
        body += struct.pack(order + entries, tag, kind, count) + data.ljust(width, b"\0")
    return body + bytes(width) + tail


def _reordered(data: bytes, kind: int, source: str, target: str) -> bytes:
    """Numbers in another byte order; a rational is two of them."""
    size = 4 if kind in (5, 10) else SIZES[kind]
    if size == 1 or source == target:
        return data
    return np.frombuffer(data, f"u{size}").byteswap().tobytes()
