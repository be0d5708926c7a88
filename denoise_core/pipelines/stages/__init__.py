"""The stages of bulk denoising. Each maps Arrow tables to tables.

    expand.py   a work list's rows to items, one for each region of an image
    read.py     fetch, decode, estimate the noise
    denoise.py  the actor
    write.py    encode, measure, write; one file of a large image's regions
    items.py    the items between them, and what guards the work on one

Between stages a row is the work item's facts as one JSON text, and the pixels as raw bytes, so
that images of any shapes and dtypes share a table. Every stage catches an image's own error and
notes it in the facts; the write stage turns it into a failed row. A bug still stops the run.
"""

from denoise_core.pipelines.stages.denoise import Denoise
from denoise_core.pipelines.stages.expand import Expand, float_range
from denoise_core.pipelines.stages.items import (
    Guard,
    Item,
    measures,
    region_of,
    regions_of,
    to_items,
    to_table,
)
from denoise_core.pipelines.stages.read import Read
from denoise_core.pipelines.stages.write import Write, drop_regions, publish_image

__all__ = [
    "Denoise",
    "Expand",
    "Guard",
    "Item",
    "Read",
    "Write",
    "drop_regions",
    "float_range",
    "measures",
    "publish_image",
    "region_of",
    "regions_of",
    "to_items",
    "to_table",
]
