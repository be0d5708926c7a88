"""JPEG, WebP and BMP through Pillow.

Pillow and not imagecodecs, because Pillow reports files that are cut short, gives the
quantisation tables of a JPEG and writes with them. LOAD_TRUNCATED_IMAGES stays off.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from denoise_core.errors import CorruptImage, UnsupportedImage
from denoise_core.images.exif import dpi_of
from denoise_core.images.types import (
    Array,
    ImageHeader,
    ImageMetadata,
    grey_or_samples,
    refuse_false_alpha,
    refuse_samples,
    whole_dpi,
)

EXIF_PREFIX = b"Exif\0\0"
XMP_PREFIX = b"http://ns.adobe.com/xap/1.0/\0"
ICC_PREFIX = b"ICC_PROFILE\0"
JPEG_QUALITY = 95
"""Quality of images that were no JPEG before."""
WEBP_QUALITY = 95
BMP_PER_METRE = 39.3701
"""Inches in a metre, as Pillow has them."""
WEBP_MAX_SIDE = 16383
JPEG_MAX_SIDE = 65535
SEGMENT_BYTES = 65533
"""Most bytes of one JPEG segment."""
# Most bytes that a JPEG holds of a block, by its name for Pillow, and its name among the losses.
JPEG_LIMITS = {
    "icc_profile": (255 * (SEGMENT_BYTES - len(ICC_PREFIX) - 2), "ICC profile"),
    "exif": (SEGMENT_BYTES, "EXIF"),
    "xmp": (SEGMENT_BYTES - len(XMP_PREFIX), "XMP"),
}


def _image_module() -> Any:
    from PIL import Image

    # Our own limit has been checked on the header; Pillow's would refuse above 179 Mpx.
    Image.MAX_IMAGE_PIXELS = None
    return Image


def _open(file: BinaryIO, kind: str, *, name: str) -> Any:
    try:
        return _image_module().open(file, formats=[kind.upper()])
    except (OSError, ValueError, SyntaxError, struct.error, KeyError, IndexError) as error:
        raise _corrupt(kind, name, error) from error


def _corrupt(kind: str, name: str, error: Exception) -> CorruptImage:
    return CorruptImage(
        f"{name}: the {kind.upper()} is damaged or cut short ({error}); copy or download it again"
    )


def _load(data: bytes, header: ImageHeader, *, name: str) -> tuple[Any, Array]:
    kind = header.format
    image = _open(io.BytesIO(data), kind, name=name)
    # The limit on pixels was held against the header.
    if image.size != (header.width, header.height):
        told = f"{header.width}x{header.height} pixels in its header"
        error = ValueError(f"{told}, {image.width}x{image.height} in its picture")
        raise _corrupt(kind, name, error)
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, struct.error, IndexError) as error:
        raise _corrupt(kind, name, error) from error
    samples = np.asarray(image)
    return image, samples[..., None] if samples.ndim == 2 else samples


def _header(kind: str, mode: str, size: tuple[int, int]) -> ImageHeader:
    alpha = mode == "RGBA"
    return ImageHeader(
        format=kind,
        height=size[1],
        width=size[0],
        channels=1 if mode == "L" else 3,
        dtype="uint8",
        has_alpha=alpha,
        axes="YX" if mode == "L" else "YXS",
        bits=8,
    )


def _dpi(info: dict[str, Any]) -> tuple[float, float] | None:
    """Pillow gives whatever the header holds."""
    values = tuple(float(value) for value in info.get("dpi", ()))
    return values if len(values) == 2 and all(0 < value < 1e9 for value in values) else None


# --- JPEG ---------------------------------------------------------------------------------------

SOI, EOI, SOS, APP0, APP2, APP14, COM = 0xD8, 0xD9, 0xDA, 0xE0, 0xE2, 0xEE, 0xFE
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Without a length: TEM and the restarts, of which none belongs before a scan.
BARE_MARKERS = frozenset((0x01, *range(0xD0, 0xD8)))
# In the pixels FF is followed by 0, or a restart.
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
LOSSLESS_FRAMES = frozenset((0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF))


def read_jpeg_header(file: BinaryIO, *, name: str) -> ImageHeader:
    """The header from the frame segment (SOF)."""
    for marker, body in _segments(file, name=name):
        if marker in FRAME_MARKERS:
            return _parse_frame(marker, body, name=name)
    raise CorruptImage(f"{name}: the JPEG ends before its pixels; copy or download it again")


def _segments(file: BinaryIO, *, name: str) -> Iterator[tuple[int, bytes]]:
    """The segments before the first scan."""
    file.seek(2)
    while True:
        lead = file.read(1)
        marker = file.read(1)
        while marker == b"\xff":  # fill bytes
            marker = file.read(1)
        if lead != b"\xff" or not marker:
            raise CorruptImage(f"{name}: the JPEG has a damaged header; copy or download it again")
        if marker[0] in (SOS, EOI):
            return
        if marker[0] in BARE_MARKERS:
            continue
        size = file.read(2)
        length = struct.unpack(">H", size)[0] if len(size) == 2 else 0
        body = file.read(length - 2) if length >= 2 else b""
        if length < 2 or len(body) != length - 2:
            raise CorruptImage(f"{name}: the JPEG header is cut short; copy or download it again")
        yield marker[0], body


def _parse_frame(marker: int, body: bytes, *, name: str) -> ImageHeader:
    if len(body) < 6:
        raise CorruptImage(f"{name}: the JPEG frame is damaged; copy or download it again")
    bits, height, width, components = struct.unpack(">BHHB", body[:6])
    if marker in LOSSLESS_FRAMES or bits != 8:
        raise UnsupportedImage(
            f"{name}: a {bits}-bit JPEG of process {marker - 0xC0}; expected an 8-bit baseline or "
            "progressive one: convert it to PNG or TIFF"
        )
    if components not in (1, 3):
        kind = "CMYK" if components == 4 else f"{components}-component"
        raise UnsupportedImage(f"{name}: a {kind} JPEG; convert it to RGB with its profile first")
    if not height or not width:
        raise CorruptImage(f"{name}: the JPEG tells {width}x{height} pixels; replace the file")
    return _header("jpeg", "L" if components == 1 else "RGB", (width, height))


def decode_jpeg(data: bytes, header: ImageHeader, *, name: str) -> tuple[Array, ImageMetadata]:
    """Samples (H, W, 1 or 3) and metadata: tables, subsampling and the APPn and COM segments."""
    from PIL.JpegImagePlugin import get_sampling

    image, samples = _load(data, header, name=name)
    segments, lost = _carried_segments(data, name=name)
    native = {
        "segments": [[marker, body] for marker, body in segments],
        "qtables": _tables_by_component(image),
        "subsampling": get_sampling(image) if header.channels == 3 else -1,
        "progressive": bool(image.info.get("progressive")),
    }
    exif = _strip_exif(image.info.get("exif"))
    # Pillow makes up 72 dpi for an EXIF block without a resolution.
    told = image.info.get("jfif_unit") in (1, 2)
    metadata = ImageMetadata(
        format="jpeg",
        dtype="uint8",
        channels=header.channels,
        bits=8,
        icc=image.info.get("icc_profile"),
        exif=exif,
        xmp=image.info.get("xmp"),
        dpi=_dpi(image.info) if told else dpi_of(exif),
        native=native,
        lost=tuple(lost),
    )
    return samples, metadata


def _tables_by_component(image: Any) -> list[list[int]]:
    """The quantisation tables of the components in turn; the last is that of all that follow."""
    # A table may come later, between two scans: its components get the one before.
    numbers = [table for *_, table in image.layer if table in image.quantization]
    while numbers[-2:-1] == numbers[-1:]:
        numbers.pop()
    return [list(map(int, image.quantization[number])) for number in numbers]


def _strip_exif(block: bytes | None) -> bytes | None:
    return block[len(EXIF_PREFIX) :] if block and block.startswith(EXIF_PREFIX) else block or None


def _carried_segments(data: bytes, *, name: str) -> tuple[list[tuple[int, bytes]], list[str]]:
    kept: list[tuple[int, bytes]] = []
    lost: list[str] = []
    file = io.BytesIO(data)
    for marker, body in _segments(file, name=name):
        if marker == APP2 and body.startswith(b"MPF\0"):
            lost.append("jpeg:MPF (further pictures behind the first)")
        elif marker == COM or (APP0 <= marker <= 0xEF and marker != APP14):
            kept.append((marker, body))
    if not lost and _behind(data, file.tell()).strip(b"\0\xff"):
        lost.append("jpeg:data behind the picture (a phone's video, say)")
    return kept, lost


def _behind(data: bytes, at: int) -> bytes:
    """What lies behind the end of a picture whose first scan begins at `at`."""
    while found := MARKER.search(data, at):
        if found[0][1] == EOI:
            return data[found.end() :]
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return b""


def jpeg_left_behind(metadata: ImageMetadata) -> list[str]:
    """Names of the segments that no other format keeps, and of those that nobody could read."""
    blocks = ((EXIF_PREFIX, metadata.exif), (XMP_PREFIX, metadata.xmp), (ICC_PREFIX, metadata.icc))
    carried = (b"JFIF\0", *(prefix for prefix, block in blocks if block))
    lost = []
    for marker, body in metadata.native["segments"]:
        # version, unit, density: without a unit a ratio
        if body.startswith(b"JFIF\0") and body[7:8] == b"\0" and body[8:10] != body[10:12]:
            lost.append("jpeg:JFIF aspect ratio")
        elif not body.startswith(carried):
            lost.append("jpeg:comment" if marker == COM else f"jpeg:APP{marker - APP0}")
    return lost


def encode_jpeg(samples: Array, metadata: ImageMetadata) -> tuple[bytes, list[str]]:
    """Samples (H, W, 1 or 3) of uint8 -> JPEG with the source's own tables where it has them."""
    refuse_samples(samples, target="JPEG", allowed=(1, 3), dtypes="uint8")
    _refuse_side(samples, JPEG_MAX_SIDE, "JPEG")
    image = _image_module().fromarray(np.ascontiguousarray(grey_or_samples(samples)))
    out = io.BytesIO()
    if metadata.format != "jpeg":
        info, lost = _jpeg_info(metadata)
        image.save(out, format="JPEG", quality=JPEG_QUALITY, subsampling=0, **info)
        return out.getvalue(), lost
    native = metadata.native
    # -1 is a subsampling that Pillow cannot write (4:4:0, 4:1:1): none is the better one.
    image.save(
        out,
        format="JPEG",
        qtables=native["qtables"],
        subsampling=max(native["subsampling"], 0),
        progressive=native["progressive"],
    )
    return _with_segments(out.getvalue(), native["segments"]), []


def _jpeg_info(metadata: ImageMetadata) -> tuple[dict[str, Any], list[str]]:
    """What Pillow writes beside the pixels, and the names of what does not fit into a JPEG."""
    info, lost = _save_info(metadata), []
    for key, (most, name) in JPEG_LIMITS.items():
        if len(info.get(key, b"")) > most:
            del info[key]
            lost.append(name)
    told = dpi_of(metadata.exif) if "exif" in info else None
    info["dpi"], no_dpi = whole_dpi(metadata, unit=1, most=65535, told=told)
    return info, lost + no_dpi


def _refuse_side(samples: Array, side: int, target: str) -> None:
    if max(samples.shape[:2]) > side:
        raise UnsupportedImage(
            f"{target} cannot hold {samples.shape[1]}x{samples.shape[0]} pixels, only sides up to "
            f"{side}; use --format tiff or png"
        )


def _save_info(metadata: ImageMetadata) -> dict[str, Any]:
    info = {
        "icc_profile": metadata.icc,
        "exif": EXIF_PREFIX + metadata.exif if metadata.exif else None,
        "dpi": metadata.dpi,
        "xmp": metadata.xmp,
    }
    return {key: value for key, value in info.items() if value}


def _with_segments(data: bytes, segments: list[list[Any]]) -> bytes:
    """The encoder's JFIF segment is replaced by the segments of the source."""
    start = 2
    if data[2:4] == b"\xff\xe0":
        start = 4 + struct.unpack(">H", data[4:6])[0]
    packed = (struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments)
    return b"".join((data[:2], *packed, data[start:]))


# --- WebP ---------------------------------------------------------------------------------------


def read_webp_header(file: BinaryIO, *, name: str) -> ImageHeader:
    """The header from the first chunk (VP8, VP8L or VP8X) of the RIFF container."""
    file.seek(0)
    head = file.read(30)
    if len(head) < 30:
        raise CorruptImage(f"{name}: the WebP header is cut short; copy or download it again")
    kind = head[12:16]
    if kind == b"VP8X":
        if head[20] & 0x02:
            raise UnsupportedImage(f"{name}: an animated WebP; save the frame you want alone")
        width = 1 + int.from_bytes(head[24:27], "little")
        height = 1 + int.from_bytes(head[27:30], "little")
        alpha = bool(head[20] & 0x10)
    elif kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        alpha = bool(bits >> 28 & 1)
    else:
        width, height = (value & 0x3FFF for value in struct.unpack("<HH", head[26:30]))
        alpha = False
    return _header("webp", "RGBA" if alpha else "RGB", (width, height))


def decode_webp(data: bytes, header: ImageHeader, *, name: str) -> tuple[Array, ImageMetadata]:
    """Samples (H, W, 3 or 4) and metadata."""
    image, samples = _load(data, header, name=name)
    if samples.shape[-1] == 4 and not header.has_alpha:
        samples = samples[..., :3]
    exif = _strip_exif(image.info.get("exif"))
    metadata = ImageMetadata(
        format="webp",
        dtype="uint8",
        channels=3,
        has_alpha=samples.shape[-1] == 4,
        bits=8,
        icc=image.info.get("icc_profile"),
        exif=exif,
        xmp=image.info.get("xmp"),
        dpi=dpi_of(exif),
        native={"lossless": b"VP8L" in _riff_kinds(data)},
    )
    return samples, metadata


def _riff_kinds(data: bytes) -> list[bytes]:
    kinds, position = [], 12
    while position + 8 <= len(data):
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        kinds.append(data[position : position + 4])
        position += 8 + length + (length & 1)
    return kinds


def encode_webp(samples: Array, metadata: ImageMetadata) -> tuple[bytes, list[str]]:
    """Samples (H, W, 3 or 4) of uint8 -> WebP, lossless unless the source was a lossy WebP.

    Alpha is always stored without loss. libwebp drops an alpha channel that is opaque
    everywhere; that is named.
    """
    lost = []
    if samples.shape[-1] == 1 and metadata.format != "webp":
        lost.append("webp:grey (written as RGB)")
        samples = np.repeat(samples, 3, axis=-1)
    refuse_samples(samples, target="WebP", allowed=(3, 4), dtypes="uint8")
    refuse_false_alpha(samples, metadata, target="WebP")
    _refuse_side(samples, WEBP_MAX_SIDE, "WebP")
    if samples.shape[-1] == 4 and samples[..., 3].min() == 255:
        lost.append("webp:alpha (opaque everywhere, WebP does not store it)")
    lossless = metadata.native["lossless"] if metadata.format == "webp" else True
    options = {"lossless": True, "quality": 0, "method": 1, "exact": True}
    if not lossless:
        options = {"quality": WEBP_QUALITY, "method": 4, "alpha_quality": 100, "exact": True}
    info = _save_info(metadata)
    if info.pop("dpi", None) not in (None, dpi_of(metadata.exif)):
        lost.append("DPI")
    out = io.BytesIO()
    _image_module().fromarray(np.ascontiguousarray(samples)).save(
        out, format="WEBP", **options, **info
    )
    return out.getvalue(), lost


# --- BMP ----------------------------------------------------------------------------------------


def read_bmp_header(file: BinaryIO, *, name: str) -> ImageHeader:
    """The header through Pillow, which reads no pixels on opening."""
    file.seek(0)
    image = _open(file, "bmp", name=name)
    if image.mode not in ("L", "RGB", "RGBA"):
        kind = {"1": "bilevel (1-bit)", "P": "palette"}.get(image.mode, image.mode)
        raise UnsupportedImage(f"{name}: a {kind} BMP; convert it to grey or RGB first")
    return _header("bmp", image.mode, image.size)


def decode_bmp(data: bytes, header: ImageHeader, *, name: str) -> tuple[Array, ImageMetadata]:
    """Samples (H, W, 1, 3 or 4) and metadata."""
    image, samples = _load(data, header, name=name)
    metadata = ImageMetadata(
        format="bmp",
        dtype="uint8",
        channels=header.channels,
        has_alpha=header.has_alpha,
        bits=8,
        dpi=_dpi(image.info),
        lost=_bmp_losses(data),
    )
    return samples, metadata


def _bmp_losses(data: bytes) -> tuple[str, ...]:
    size, bits = int.from_bytes(data[14:18], "little"), int.from_bytes(data[28:30], "little")
    lost = ["bmp:16 bits a pixel (written with 24)"] if size >= 40 and bits == 16 else []
    if size >= 124 and int.from_bytes(data[14 + 112 : 14 + 116], "little"):
        lost.append("ICC profile")
    return tuple(lost)


def encode_bmp(samples: Array, metadata: ImageMetadata) -> tuple[bytes, list[str]]:
    """Samples (H, W, 1, 3 or 4) of uint8 -> BMP."""
    refuse_samples(samples, target="BMP", allowed=(1, 3, 4), dtypes="uint8")
    refuse_false_alpha(samples, metadata, target="BMP")
    lost = ["ICC profile"] if metadata.icc else []
    lost += ["EXIF"] if metadata.exif else []
    lost += ["XMP"] if metadata.xmp else []
    per_metre, no_dpi = whole_dpi(metadata, unit=BMP_PER_METRE, most=2**31 - 1)
    lost += no_dpi
    if samples.shape[-1] == 4:
        return _bmp_with_alpha(samples, per_metre), lost
    image = _image_module().fromarray(np.ascontiguousarray(grey_or_samples(samples)))
    out = io.BytesIO()
    # Without one Pillow writes 96 dpi.
    image.save(out, format="BMP", dpi=[dots / BMP_PER_METRE for dots in per_metre])
    return out.getvalue(), lost


def _bmp_with_alpha(samples: Array, per_metre: list[int]) -> bytes:
    """A BITMAPV4HEADER with masks; Pillow writes one without, and then nobody reads the alpha."""
    height, width = samples.shape[:2]
    body = np.ascontiguousarray(samples[::-1, :, [2, 1, 0, 3]]).tobytes()
    start = 14 + 108
    file = struct.pack("<2sIHHI", b"BM", start + len(body), 0, 0, start)
    info = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, len(body), *per_metre, 0, 0)
    masks = struct.pack("<4I4s", 0xFF0000, 0xFF00, 0xFF, 0xFF000000, b"BGRs")
    return file + info + masks + bytes(48) + body
