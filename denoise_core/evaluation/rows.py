"""The rows of an evaluation: one for each image, method and noise, as Parquet.

An image that could not be used has one row, with status 'failed' and neither method nor noise,
beside those of the filters where it could not be read again for the models; a noise that does not
suit it has one failed row without a method, and a method that failed on it one of its own.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from denoise_core.errors import ObjectNotFound
from denoise_core.storage import Storage, join

SCHEMA_VERSION = 1

SCHEMA = pa.schema(
    [
        ("schema_version", pa.int32()),
        ("run_id", pa.string()),
        ("image", pa.string()),
        ("source_uri", pa.string()),
        ("noisy_uri", pa.string()),
        ("index", pa.int64()),
        ("label", pa.int64()),
        ("status", pa.string()),
        ("method", pa.string()),
        ("kind", pa.string()),
        ("model_hash", pa.string()),
        ("noise", pa.string()),
        ("protocol", pa.string()),
        ("sigma", pa.float64()),
        ("sigma_source", pa.string()),
        ("height", pa.int64()),
        ("width", pa.int64()),
        ("channels", pa.int64()),
        ("dtype", pa.string()),
        ("mse", pa.float64()),
        ("psnr", pa.float64()),
        ("ssim", pa.float64()),
        ("milliseconds", pa.float64()),
        ("error_type", pa.string()),
        ("error_message", pa.string()),
    ]
)
"""`status` is ok or failed, `kind` model or filter, `sigma` (of 255) what filters were told and
`sigma_source` given or estimated; mse in squared data ranges, psnr in dB (inf for equal images),
ssim null for images under 11 pixels a side."""


def parts_root(out: str) -> str:
    """Folder of the table."""
    return join(out, "reports", "evaluation")


def to_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return rows as a table of SCHEMA; what a row lacks is null."""
    return pa.Table.from_pylist(
        [{"schema_version": SCHEMA_VERSION, **row} for row in rows], schema=SCHEMA
    )


def write_table(storage: Storage, out: str, table: pa.Table, *, run_id: str) -> str:
    """Write the table and then delete that of an earlier run; return its URI."""
    root = parts_root(out)
    try:
        earlier = [entry.uri for entry in storage.list(root) if entry.uri.endswith(".parquet")]
    except ObjectNotFound:
        earlier = []
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    uri = join(root, f"part-{run_id}-00000.parquet")
    storage.write(uri, memoryview(sink.getvalue()))
    for old in earlier:
        if old != uri:
            storage.delete(old)
    return uri
