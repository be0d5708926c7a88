"""Write the summary and the report page of a finished or broken-off run again.

    python -m jobs.report OUT [--s3-endpoint URL] [--examples N]

Reads OUT/reports/images/part-*.parquet, the rows of a killed run that are not there yet, and
OUT/run.json; writes OUT/reports/summary.json and OUT/report.html. Exit code: 0 written, 1 failed,
2 wrong usage or no such OUT.
"""

from __future__ import annotations

import sys

import click

from jobs._cli import guarded


@click.command(help="Write OUT/reports/summary.json and OUT/report.html from the rows of a run.")
@click.argument("out")
@click.option("--s3-endpoint", metavar="URL", help="Endpoint of an S3-compatible store.")
@click.option(
    "--examples",
    type=click.IntRange(0, 60),
    default=6,
    show_default=True,
    help="Images shown before and after: one half the best, one half the worst.",
)
def main(out: str, s3_endpoint: str | None, examples: int) -> None:
    """Parse, build, print where to look."""
    sys.exit(
        guarded(
            lambda: run(out, s3_endpoint, examples), interrupted="The same command writes both."
        )
    )


def run(out: str, s3_endpoint: str | None, examples: int) -> int:
    """Write summary and page of OUT, print where to look. Returns the exit code."""
    from denoise_core.errors import ObjectNotFound, UsageError
    from denoise_core.report import build_report
    from denoise_core.storage import StorageOptions, join

    options = StorageOptions(s3_endpoint=s3_endpoint)
    try:
        summary = build_report(out, options, examples=examples)
    except ObjectNotFound as error:
        raise UsageError(str(error)) from error
    images = summary["images"]
    click.echo(
        f"{images['total']:,} images: {images['ok']:,} denoised, {images['copied']:,} copied, "
        f"{images['failed']:,} failed; {summary['megapixels']:,.1f} Mpx"
        + ("; the run is not finished" if summary["finished"] is False else "")
    )
    click.echo(join(out, "reports", "summary.json"))
    click.echo(join(out, "report.html"))
    return 0


if __name__ == "__main__":
    main()
