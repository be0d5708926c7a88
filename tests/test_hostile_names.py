"""Keys of a hostile S3 bucket: nothing is written outside OUT, nothing of them runs in the page.

A real server keeps objects as files and so cannot have such keys; the one here lists what it is
told to. Every key is refused while the run is planned, so no Ray is started.
"""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from helpers import denoise, files_below, rows_of

HOSTILE = [
    "../escaped.png",
    "a/../../../escaped.png",
    "/escaped.png",
    "a//escaped.png",
    "./escaped.png",
    "..",
    "line\nbreak.png",
    "null\x00byte.png",
    "escape\x1b[2J.png",
    "../<script>document.title='hit'</script>.png",
    "../\"'><img src=x onerror=alert(1)>.png",
]


class Bucket(http.server.BaseHTTPRequestHandler):
    """Answers everything with a listing of the hostile keys."""

    def do_GET(self) -> None:
        keys = "".join(
            f"<Contents><Key>{quote('in/' + key, safe='')}</Key><Size>5</Size><ETag>e{index}</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for index, key in enumerate(HOSTILE)
        )
        body = (
            '<?xml version="1.0"?><ListBucketResult><EncodingType>url</EncodingType>'
            f"<IsTruncated>false</IsTruncated>{keys}</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_hostile_keys_write_nothing_and_run_nowhere(
    endpoint: str, tmp_path: Path, checkpoint: str
) -> None:
    out = tmp_path / "deep" / "deeper" / "out"
    outcome = denoise("s3://bucket/in", out, checkpoint, s3_endpoint=endpoint)
    assert outcome.totals.failed == len(HOSTILE)
    assert not outcome.within_budget
    outside = [name for name in files_below(tmp_path) if not name.startswith("deep/deeper/out/")]
    assert outside == []
    assert not list(out.rglob("*.png"))
    rows = rows_of(out)
    assert len(rows) == len(HOSTILE)
    assert {row["status"] for row in rows} == {"failed"}
    assert {row["error_stage"] for row in rows} == {"plan"}
    assert {row["output_uri"] for row in rows} == {None}
    # Nothing that moves a terminal's cursor gets into a row.
    assert not any(
        re.search(r"[\x00-\x1f]", f"{r['source_uri']}{r['error_message']}") for r in rows
    )
    page = (out / "report.html").read_text()
    assert "<script>document" not in page
    assert "<img src=x" not in page
    assert page.count("<script>") == 1
