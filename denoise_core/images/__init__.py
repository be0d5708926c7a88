"""Image bytes <-> arrays: read headers, decode, encode, read windows of large TIFFs and of Zarrs.

    image = decode(data, name="a.png")                   # pixels (H, W, C), alpha (H, W) or None
    data, lost = encode(image.pixels, image.alpha, image.metadata)

What comes in goes out: size, channels, dtype, bit depth, alpha, ICC, EXIF, DPI, TIFF axes and
tags; whatever a file cannot keep is named in `lost`. Codecs are imported on first use, so that
importing this package costs NumPy and nothing else.
"""

from denoise_core.images.codecs import (
    FORMATS,
    Source,
    decode,
    encode,
    fetch,
    fitting_compression,
    left_behind,
    open_image,
    output_name,
    read_header,
    read_metadata,
    read_window,
    uses_more_bits,
)
from denoise_core.images.exif import camera_of
from denoise_core.images.nodata import filled, is_nodata, picture_of, restore, valid
from denoise_core.images.tiff import is_negative
from denoise_core.images.types import (
    MAX_PIXELS,
    DecodedImage,
    ImageHeader,
    ImageMetadata,
)
from denoise_core.images.values import data_range, inverted, rescale, to_dtype

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "DecodedImage",
    "ImageHeader",
    "ImageMetadata",
    "Source",
    "camera_of",
    "data_range",
    "decode",
    "encode",
    "fetch",
    "filled",
    "fitting_compression",
    "inverted",
    "is_negative",
    "is_nodata",
    "left_behind",
    "open_image",
    "output_name",
    "picture_of",
    "read_header",
    "read_metadata",
    "read_window",
    "rescale",
    "restore",
    "to_dtype",
    "uses_more_bits",
    "valid",
]
