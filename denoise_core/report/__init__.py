"""The report of a run: rows -> `OUT/reports/summary.json` and one HTML page, `OUT/report.html`.

`build_report(OUT)` is all there is to call; `python -m jobs.report OUT` calls it. The numbers of
all rows are read as columns, and only the few rows that the page shows become Python objects: a
million rows took 710 MB at most. The page needs no network: style, script, charts and crops are
in it.
"""

from __future__ import annotations

import json
from typing import Any

from denoise_core.errors import ObjectNotFound
from denoise_core.report.page import render
from denoise_core.report.rows import Table, read_run, survey_rows
from denoise_core.report.summary import summarise
from denoise_core.storage import StorageOptions, join, storage_for

__all__ = ["build_report"]


def build_report(
    out: str,
    options: StorageOptions | None = None,
    *,
    examples: int = 6,
    run: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `OUT/reports/summary.json` and then `OUT/report.html`; return the summary.

    `out` is a local folder or an `s3://bucket/prefix` with `reports/images/part-*.parquet` in it;
    rows that lie in the journal of a run at work or a killed one count too. `run` is what run.json
    is yet to hold, by default what it holds.
    `examples` is the number of images shown before and after, one half the best, one the worst.
    An example whose files are gone, damaged or too large becomes a note on the page; so does one
    whose output is no file below OUT/images, as in a moved OUT.

    Keys of the summary (sigmas in 1/255 of the data range, PSNR in dB, `null` where unknown):
    `schema_version, program_version, generated_at, out, finished, images {total, ok, copied,
    failed}, megapixels, source_bytes, wall_s, mpx_per_s, runs, retried, started_at, finished_at,
    stage_s {read, denoise, write}, models [{model_id, model_hash, images}],
    quantiles {<measure>: {count, mean, min, p05, p25, p50, p75, p95, max}},
    failures {total, by_stage, by_type}, metadata_lost {<name>: images}`.
    `finished` is whether the last run came to its end; `wall_s` is the time from the first image's
    start to the last one's end, summed over runs.

    Raises ObjectNotFound where OUT has neither rows nor a run.json, RunFailed where the rows are
    of a newer schema or damaged, StorageError where OUT cannot be read or written.
    """
    storage = storage_for(out, options)
    table = Table(out, options)
    run = run or read_run(out, options)
    if not table.shards and run is None:
        raise ObjectNotFound(
            f"{out} holds neither reports/images/part-*.parquet nor run.json. "
            "Give the --output of a jobs.denoise run."
        )
    survey = survey_rows(table)
    summary = summarise(survey, out, finished=(run or {}).get("finished"))
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    page = render(table, survey, summary=summary, run=run or {}, options=options, examples=examples)
    storage.write(join(out, "reports", "summary.json"), text.encode("utf-8", "backslashreplace"))
    storage.write(join(out, "report.html"), page.encode("utf-8", "backslashreplace"))
    return summary
