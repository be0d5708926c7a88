"""The report: numbers of the summary, crops of the examples, and the page in a real browser."""

from __future__ import annotations

import io
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from browsing import browser_test, resize, visit
from click.testing import CliRunner
from PIL import Image

from denoise_core import metrics
from denoise_core.errors import ObjectNotFound, RunFailed
from denoise_core.report import build_report, page
from denoise_core.report.charts import WIDTH, draw_charts
from denoise_core.report.examples import CROP, _most_different, _tone_map, rank, read_example
from denoise_core.report.rows import Table, survey_rows
from denoise_core.report.text import duration, number, visible
from denoise_core.results import SCHEMA, Journal
from denoise_core.storage import LocalStorage
from jobs.report import main

START = datetime(2025, 11, 21, 2, 0, tzinfo=UTC)
HOSTILE = [
    "<img src=x onerror=alert(1)>.png",
    "\"'><script>document.title='hit'</script>.png",
    "two\nlines\u202egnp.png",
    "{{ 7 * 7 }} ünï 図.png",
    "javascript:alert(1)&amp;.png",
]


def row(name: str, **values: Any) -> dict[str, Any]:
    return {
        **dict.fromkeys(SCHEMA.names),
        "schema_version": 1,
        "run_id": "run-1",
        "image_id": name,
        "source_uri": f"/in/{name}",
        "output_uri": f"/out/images/{name}",
        "status": "ok",
        "width": 1000,
        "height": 1000,
        "channels": 3,
        "dtype": "uint8",
        "has_alpha": False,
        "attempts": 1,
        "sigma_in": 25.0,
        "sigma_out": 2.5,
        "residual_autocorrelation": 0.01,
        "data_range": [0.0, 255.0],
        "read_ms": 100.0,
        "denoise_ms": 300.0,
        "write_ms": 100.0,
        "started_at": START,
        "finished_at": START + timedelta(seconds=10),
        **values,
    }


UNTIMED = dict.fromkeys(["read_ms", "denoise_ms", "write_ms"])


def failed(name: str, **values: Any) -> dict[str, Any]:
    unknown = dict.fromkeys(["width", "height", "sigma_in", "sigma_out", "output_uri"])
    error = {"error_stage": "read", "error_type": "CorruptImage", "error_message": "cut short"}
    return row(name, **{"status": "failed", **unknown, **error, **values})


def gained(name: str, gain: float, **values: Any) -> dict[str, Any]:
    scores = {"psnr_noisy": 20.0, "psnr": 20.0 + gain, "ssim_noisy": 0.5, "ssim": 0.9}
    return row(name, **{**scores, **values})


def write(out: Path, rows: list[dict[str, Any]], *, part: int = 0) -> str:
    folder = out / "reports" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, folder / f"part-{part:05}.parquet", row_group_size=50)
    return str(out)


def picture(path: Path, pixels: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())
    return str(path)


def noise_pair(folder: Path, name: str, shape: tuple[int, ...]) -> dict[str, str]:
    rng = np.random.default_rng(len(name))
    clean = np.full(shape, 120, np.uint8)
    noisy = np.clip(clean + rng.normal(0, 25, shape), 0, 255).astype(np.uint8)
    return {
        "source_uri": picture(folder / "in" / name, noisy),
        "output_uri": picture(folder / "out" / "images" / name, clean),
    }


# --- summary ------------------------------------------------------------------------------------


def test_summary_counts_sums_and_quantiles(tmp_path: Path) -> None:
    out = write(
        tmp_path,
        [
            gained("a.png", 8.0, metadata_lost=["exif"]),
            gained("b.png", 10.0, attempts=2, finished_at=START + timedelta(seconds=20)),
            row("c.png", status="copied", sigma_in=1.0, sigma_out=1.0),
            failed("no.png", error_stage="plan", started_at=START - timedelta(hours=1), **UNTIMED),
            failed("d.png"),
        ],
    )
    next_day = START + timedelta(days=1)
    later = {"run_id": "run-2", "started_at": next_day, "finished_at": next_day}
    write(tmp_path, [failed("e.png", error_stage="write", **later)], part=1)
    summary = build_report(out)

    assert summary["images"] == {"total": 6, "ok": 2, "copied": 1, "failed": 3}
    assert summary["megapixels"] == 3.0
    assert summary["wall_s"] == 20.0, "idle days between two runs do not count"
    assert summary["mpx_per_s"] == 0.15
    assert summary["runs"] == 2
    assert summary["retried"] == 1
    assert summary["stage_s"]["denoise"] == 1.5
    assert summary["metadata_lost"] == {"exif": 1}
    assert summary["failures"] == {
        "total": 3,
        "by_stage": {"read": 1, "write": 1, "plan": 1},
        "by_type": {"CorruptImage": 3},
    }
    gain = summary["quantiles"]["psnr_gain"]
    assert (gain["count"], gain["min"], gain["p50"], gain["max"]) == (2, 8.0, 9.0, 10.0)
    assert summary["quantiles"]["sigma_in"]["count"] == 3
    assert summary["quantiles"]["sigma_out"]["count"] == 3
    assert summary["quantiles"]["seam_ratio"]["p50"] is None
    assert summary["quantiles"]["mpx_per_s"]["p50"] == 2.0
    assert json.loads((tmp_path / "reports" / "summary.json").read_text()) == summary


def test_summary_is_strict_json_with_infinite_and_missing_values(tmp_path: Path) -> None:
    rows = [
        gained("same.png", np.inf),
        row("null.png", sigma_in=None, sigma_out=np.nan, read_ms=None, width=None),
        row("odd.png", status=None, source_uri=None, started_at=None, run_id=None),
    ]
    build_report(write(tmp_path, rows))
    text = (tmp_path / "reports" / "summary.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["quantiles"]["psnr_gain"]["count"] == 0


def test_no_rows_but_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"run_id": "r"}')
    assert build_report(str(tmp_path))["images"]["total"] == 0
    assert "No rows." in (tmp_path / "report.html").read_text()


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match=r"jobs\.denoise run"):
        build_report(str(tmp_path / "nothing"))


def test_rows_of_a_killed_run_are_there_once_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of its rows lie in the table of an earlier run, some of them done again since."""
    monkeypatch.setattr("denoise_core.report.rows.BATCH_ROWS", 7)
    out = write(tmp_path, [failed(f"{i:03}.png") for i in range(80)])
    journal = Journal(LocalStorage(), out, run_id="run-2")
    for i in range(60, 180):
        journal.append(row(f"{i:03}.png", run_id="run-2", width=i))
        if i % 50 == 0:
            journal.flush()
    journal.flush()
    (tmp_path / "run.json").write_text('{"finished": false}')
    table = Table(out, None)
    taken = table.take(np.array([179, 59, 60, 0, 100]))
    assert [(r["image_id"], r["run_id"]) for r in taken] == [
        ("179.png", "run-2"),
        ("059.png", "run-1"),
        ("060.png", "run-2"),
        ("000.png", "run-1"),
        ("100.png", "run-2"),
    ]
    widths = survey_rows(table).numbers["width"]
    assert widths[60:].tolist() == list(range(60, 180))
    done = CliRunner().invoke(main, [out, "--examples", "2"])
    assert "180 images: 120 denoised, 0 copied, 60 failed" in done.output
    assert "the run is not finished" in done.output
    assert "<span>not finished; last image " in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "reports/summary.json").read_text())["finished"] is False
    (tmp_path / "run.json").write_text('{"finished": true}')
    assert "not finished" not in CliRunner().invoke(main, [out]).output
    assert "<span>finished " in (tmp_path / "report.html").read_text()


def test_damaged_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / ".denoise/journal").mkdir(parents=True)
    (tmp_path / ".denoise/journal/000001-run-000000.parquet").write_bytes(b"PAR1 not quite")
    with pytest.raises(RunFailed, match=r"000001-run-000000\.parquet is not .* Move it away"):
        build_report(str(tmp_path))


def test_newer_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="version 99"):
        build_report(write(tmp_path, [row("a.png", schema_version=99)]))


def test_damaged_part_is_named(tmp_path: Path) -> None:
    write(tmp_path, [row("a.png")])
    (tmp_path / "reports" / "images" / "part-00001.parquet").write_bytes(b"PAR1 not quite")
    with pytest.raises(RunFailed, match=r"part-00001\.parquet"):
        build_report(str(tmp_path))


def test_rows_are_taken_by_number_across_parts_groups_and_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("denoise_core.report.rows.BATCH_ROWS", 7)
    write(tmp_path, [row(f"a{i}.png") for i in range(120)])
    write(tmp_path, [row(f"b{i}.png") for i in range(60)], part=1)
    table = Table(str(tmp_path), None)
    taken = table.take(np.array([179, 0, 120, 55]))
    assert [r["image_id"] for r in taken] == ["b59.png", "a0.png", "b0.png", "a55.png"]
    assert survey_rows(table).prefix == "/in/"


def test_tables_are_cut_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("denoise_core.report.rows.SHOWN_IMAGES", 10)
    monkeypatch.setattr(page, "SHOWN_FAILURES", 5)
    names = [f"{i}.png" for i in range(200)]
    rows = [failed(n) if i % 2 else row(n) for i, n in enumerate(reversed(names))]
    build_report(write(tmp_path, rows), examples=0)
    html = (tmp_path / "report.html").read_text()
    assert "The first 10 of 200 images by name" in html
    assert "The first 5 of 100 failures" in html
    shown = re.findall(r'<th scope="row" class="name" title="/in/([^"]*)"', html)
    # The first ten in byte order, shown in natural order.
    assert shown == [f"{i}.png" for i in (0, 1, 10, 100, 101, 102, 103, 104, 105, 106)]


def test_page_states_what_its_psnr_and_ssim_are(tmp_path: Path) -> None:
    side = 2 * metrics.SSIM_RADIUS + 1
    window = f"Gaussian windows of {side} × {side} pixels, sigma {metrics.SSIM_SIGMA}"
    for name, only, stated in (("with", gained("a", 5.0), True), ("without", row("a"), False)):
        build_report(write(tmp_path / name, [only]))
        html = (tmp_path / name / "report.html").read_text()
        assert (window in html) == ("data range of the image" in html) == stated


# --- examples -----------------------------------------------------------------------------------


def test_ranked_by_gain_where_references_exist(tmp_path: Path) -> None:
    gains = [3.0, 9.0, -1.0, 5.0, 7.0]
    rows = [gained(f"{i}.png", g) for i, g in enumerate(gains)]
    rows += [gained("copied.png", 50.0, status="copied"), row("none.png")]
    survey = survey_rows(Table(write(tmp_path, rows), None))
    (_, by, best), (_, _, worst) = rank(survey, 4)
    assert (by, best.tolist(), worst.tolist()) == ("PSNR gain", [1, 4], [2, 0])
    (_, _, best), (_, _, worst) = rank(survey, 60)
    assert sorted([*best, *worst]) == [0, 1, 2, 3, 4], "no image twice"


def test_ranked_by_residual_without_references(tmp_path: Path) -> None:
    drops = [(30.0, 0.3), (20.0, 0.0), (10.0, 0.9), (5.0, 0.1)]
    rows = [
        row(f"{i}.png", sigma_in=d, sigma_out=0.0, residual_autocorrelation=r)
        for i, (d, r) in enumerate(drops)
    ]
    best, worst = rank(survey_rows(Table(write(tmp_path, rows), None)), 2)
    assert (*best[:2], best[2].tolist()) == ("Best", "noise removed", [0])
    assert (*worst[:2], worst[2].tolist()) == ("Worst", "residual autocorrelation", [2])


LEVELS = [(0.0, 255.0)] * 2


def test_crop_lies_where_the_difference_is_in_another_depth_too() -> None:
    before = np.full((1000, 1500, 1), 257 * 100, np.uint16)
    before[:300, :300] = 257 * 200
    after = (before // 257).astype(np.uint8)
    after[900:, 1400:] += 20
    y, x = _most_different(before, after, [(0.0, 65535.0), (0.0, 255.0)])
    assert (y, x) == (1000 - CROP, 1500 - CROP)


def test_crop_lies_where_the_difference_is() -> None:
    before = np.zeros((1000, 1500, 1), np.uint8)
    after = before.copy()
    after[900:960, 1300:1400] = 200
    y, x = _most_different(before, after, LEVELS)
    assert y <= 900
    assert y + CROP >= 960
    assert x <= 1300
    assert x + CROP >= 1400
    assert y + CROP <= 1000
    assert x + CROP <= 1500
    assert _most_different(before, before, LEVELS) == ((1000 - CROP) // 2, (1500 - CROP) // 2)
    assert _most_different(before[:1, :1], after[:1, :1], LEVELS) == (0, 0)


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
def test_tone_map_scales_by_the_data_range(dtype: type, top: float) -> None:
    ramp = np.linspace(0, top, 256).astype(dtype).reshape(16, 16, 1)
    before, after, remark = _tone_map(ramp, ramp, [0.0, float(top)])
    assert remark == ""
    assert before.dtype == np.uint8
    assert before.shape == (16, 16)
    assert np.array_equal(after.ravel(), np.arange(256))


def test_tone_map_stretches_dark_16_bit_and_picks_a_channel() -> None:
    rng = np.random.default_rng(0)
    dark = rng.integers(1000, 2000, (64, 64, 5)).astype(np.uint16)
    before, _, remark = _tone_map(dark, dark, None)
    assert remark == ", channel 1 of 5, contrast stretched"
    assert before.min() == 0
    assert before.max() == 255


def test_example_shows_both_images(tmp_path: Path) -> None:
    pair = noise_pair(tmp_path, "a.png", (600, 500, 3))
    shown = read_example(row("a.png", **pair), None, out=str(tmp_path / "out"))
    assert shown.note == ""
    assert shown.before.startswith("data:image/jpeg;base64,"), "noise is large as PNG"
    assert shown.after.startswith("data:image/png;base64,"), "flat is small as PNG"
    assert shown.crop.startswith("384 × 384 at ")


@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_example_shows_a_raster_without_its_no_data(
    tmp_path: Path, tile: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tile:
        monkeypatch.setattr("denoise_core.report.examples.WHOLE_PIXELS", 10)
    uris, images = {}, tmp_path / "out/images"
    images.mkdir(parents=True)
    for kind, noise in (("source_uri", 0.1), ("output_uri", 0.0)):
        band = np.full((200, 200), 0.5, np.float32)
        band += np.random.default_rng(0).normal(0, noise, band.shape).astype(np.float32)
        band[:90] = np.nan
        uris[kind] = str(images / f"{kind}.tif")
        tifffile.imwrite(uris[kind], band, tile=tile, extratags=[(42113, 2, None, "nan", True)])
    made = row("a.tif", width=200, height=200, channels=1, data_range=[0.0, 1.0], **uris)
    example = read_example(made, None, out=str(tmp_path / "out"))
    assert (example.note, bool(example.before), bool(example.after)) == ("", True, True)


def test_example_is_a_note_where_there_is_no_picture(tmp_path: Path) -> None:
    pair = noise_pair(tmp_path, "a.png", (40, 50))

    def note(**values: Any) -> str:
        return read_example(
            row("a.png", **{**pair, **values}), None, out=str(tmp_path / "out")
        ).note

    assert "no longer there" in note(source_uri=str(tmp_path / "gone.png"))
    assert "1,600 Mpx" in note(width=40_000, height=40_000)
    picture(Path(pair["source_uri"]), np.zeros((10, 10), np.uint8))
    assert "has changed since the run" in note()
    Path(pair["source_uri"]).write_bytes(b"")
    assert note().startswith("No preview: ")


def test_a_row_is_not_trusted_to_name_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = noise_pair(tmp_path, "a.png", (40, 50))
    private = picture(tmp_path / "home/private.png", np.zeros((40, 50), np.uint8))
    images = tmp_path / "out/images"
    (images / "link.png").symlink_to(private)

    def note(output: str, *, out: str = str(tmp_path / "out"), source: str = "") -> str:
        uris = {"source_uri": source or pair["source_uri"], "output_uri": output}
        return read_example(row("a.png", **uris), None, out=out).note

    outside = "No preview: the row names a file outside this output."
    up = images / "../../home/private.png"
    for uri in (private, f"file://{private}", str(up), str(images / "link.png"), "s3://b/a.png"):
        assert note(uri) == outside
    # OUT by another of its names, and a relative one.
    (tmp_path / "alias").symlink_to("out")
    monkeypatch.chdir(tmp_path)
    for out in ("out", "alias", "out/", (tmp_path / "alias").as_uri()):
        assert note(pair["output_uri"], out=out) == ""
    # Nothing of S3 is read for a row that names this machine's files.
    for uri in (pair["output_uri"], "s3://b/out/images/../../a.png", "s3://b/out/images-2/a.png"):
        assert note(uri, out="s3://b/out", source="s3://b/a.png") == outside


def test_huge_tiled_tiff_is_read_in_a_window(tmp_path: Path) -> None:
    uris, images = {}, tmp_path / "out/images"
    images.mkdir(parents=True)
    for key, value in (("source_uri", 90), ("output_uri", 100)):
        uris[key] = str(images / f"{key}.tif")
        pixels = np.full((1024, 1280, 3), value, np.uint8)
        tifffile.imwrite(uris[key], pixels, tile=(256, 256), photometric="rgb")
    claimed = {"width": 12_000, "height": 12_000}
    shown = read_example(row("a.tif", **uris, **claimed), None, out=str(tmp_path / "out"))
    assert shown.note == ""
    assert shown.crop == f"384 × 384 at {(1280 - CROP) // 2}, {(1024 - CROP) // 2}"


# --- charts, words and numbers --------------------------------------------------------------------


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [-3.0, 4.0], [1e-9, 2e-9], [1e6] * 3])
def test_charts_take_any_values(tmp_path: Path, values: list[float]) -> None:
    rows = [gained(f"{i}.png", v, sigma_in=v) for i, v in enumerate(values)]
    for chart in draw_charts(survey_rows(Table(write(tmp_path, rows), None))):
        assert len(chart.bars) >= 1
        assert all(0 <= bar.x <= bar.x + bar.width <= WIDTH + 0.1 for bar in chart.bars)
        assert 1 <= len(chart.ticks) <= 8
        assert chart.beyond == 0


def test_bars_hold_every_value(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [gained(f"{i}.png", g) for i, g in enumerate(rng.standard_cauchy(500))]
    charts = draw_charts(survey_rows(Table(write(tmp_path, rows), None)))
    gain = next(chart for chart in charts if chart.title == "PSNR gain")
    counts = [int(re.search(r": ([\d,]+)", bar.title)[1].replace(",", "")) for bar in gain.bars]
    assert sum(counts) == 500
    assert 0 < gain.beyond <= 6


def test_words_and_numbers() -> None:
    assert number(-1234.567, 1) == "−1,234.6"
    assert number(-0.001, 2, sign=True) == "0.00"
    assert number(2, 1, sign=True) == "+2.0"
    assert (number(None), number(np.inf)) == ("–", "∞")
    assert [duration(s) for s in (3.21, 125, 7300)] == ["3.2 s", "2 min 5 s", "2 h 2 min"]
    assert visible("/in/a\n\u202eb.png", "/in/") == "a\\u000a\\u202eb.png"


# --- page ---------------------------------------------------------------------------------------


def test_page_asks_for_nothing_and_hides_secrets(tmp_path: Path) -> None:
    run = {
        "run_id": "r",
        "settings": {"s3_endpoint": "https://user:hunter2@s3.local", "secret_key": "hunter2"},
        "versions": {"ray": "2.60"},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    build_report(write(tmp_path, [row("a.png")]))
    html = (tmp_path / "report.html").read_text()
    assert "hunter2" not in html
    assert "https://s3.local" in html
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html
    targets = re.findall(r"""<[^>]*?\s(?:src|href|action)=["']?([^"'\s>]*)""", html)
    assert all(t.startswith(("data:", "#")) for t in targets)
    assert not re.search(r"@import|url\(", html)


def test_names_are_escaped(tmp_path: Path) -> None:
    build_report(write(tmp_path, [row(n) for n in HOSTILE] + [failed("x/" + n) for n in HOSTILE]))
    html = (tmp_path / "report.html").read_text()
    assert "<img src=x" not in html
    assert html.count("<script>") == 1
    assert "two\\u000alines\\u202egnp.png" in html
    assert "{{ 7 * 7 }}" in html


# --- command ------------------------------------------------------------------------------------


def test_command_exit_codes(tmp_path: Path) -> None:
    out = write(tmp_path / "out", [row("a.png"), failed("b.png")])
    done = CliRunner().invoke(main, [out, "--examples", "0"])
    assert done.exit_code == 0, done.output
    assert "2 images: 1 denoised, 0 copied, 1 failed" in done.output
    assert str(tmp_path / "out" / "report.html") in done.output
    missing = CliRunner().invoke(main, [str(tmp_path / "none")])
    assert missing.exit_code == 2
    assert "Error: " in missing.output
    assert CliRunner().invoke(main, [out, "--examples", "x"]).exit_code == 2
    (tmp_path / "out" / "reports" / "images" / "part-9.parquet").write_bytes(b"")
    assert CliRunner().invoke(main, [out]).exit_code == 1


# --- in Chromium ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    rows = [
        gained(name, 9.0 + i, **noise_pair(folder, name.replace("/", "_"), (420, 400, 3)))
        for i, name in enumerate([*HOSTILE[:2], "tiny.png"])
    ]
    rows += [
        row(f"img {i}.png", sigma_in=float(s), width=10 * (i + 1))
        for i, s in enumerate([9, 100, 25.5, 3])
    ]
    rows += [row("unknown.png", sigma_in=None), row("long" * 60 + ".png")]
    rows += [failed(f"{'deep/' * 30}{n}", error_message=f"<b>{n}</b> " * 20) for n in HOSTILE]
    run = {"run_id": "r" * 200, "settings": {"inputs": HOSTILE, "long_name" * 9: "v" * 400}}
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / "run.json").write_text(json.dumps(run))
    out = write(folder / "out", rows)
    build_report(out)
    return (Path(out) / "report.html").as_uri()


@pytest.fixture
def opened(browser: Any, report_page: str) -> Any:
    resize(browser, 1280)
    visit(browser, report_page)
    return browser


def css(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


class TestInChromium:
    pytestmark = browser_test

    def test_console_is_silent_and_no_hostile_name_runs(self, opened: Any) -> None:
        assert opened.get_log("browser") == []
        assert opened.title == "out – denoising report"
        asked = "return performance.getEntriesByType('resource').map(e => e.name)"
        assert all(name.startswith("data:") for name in opened.execute_script(asked))
        natural = "return [...document.images].map(i => i.naturalWidth)"
        assert all(width > 0 for width in opened.execute_script(natural))

    def test_policy_stops_a_script_that_slipped_in(self, opened: Any) -> None:
        opened.execute_script(
            "const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
            "document.body.append(s);"
            "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"ran = 2\">')"
        )
        assert opened.execute_script("return window.ran") is None

    def test_slider_moves_by_keys(self, opened: Any) -> None:
        box, slider = css(opened, ".compare"), css(opened, ".compare input")
        before = css(opened, ".compare .before")
        slider.send_keys("\ue012" * 10)  # arrow left
        assert slider.get_property("value") == "40"
        assert "60%" in before.value_of_css_property("clip-path")
        slider.send_keys("\ue010")  # end
        assert slider.get_property("value") == "100"
        handle = css(opened, ".compare .handle").rect
        assert abs(handle["x"] - box.rect["x"] - box.rect["width"]) < 3

    def test_slider_follows_mouse_and_finger(self, opened: Any) -> None:
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        box, slider = css(opened, ".compare"), css(opened, ".compare input")
        opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
        quarter = int(box.rect["width"] / 4)
        for kind, direction, expected in (("mouse", -1, 25), ("touch", 1, 75)):
            chain = ActionChains(opened, devices=[PointerInput(kind, kind)], duration=20)
            chain.w3c_actions.pointer_action.move_to(box)
            chain.w3c_actions.pointer_action.pointer_down()
            chain.w3c_actions.pointer_action.move_to(box, direction * quarter)
            chain.w3c_actions.pointer_action.pointer_up()
            chain.perform()
            assert abs(int(slider.get_property("value")) - expected) <= 1, kind

    def test_table_sorts_numbers_as_numbers(self, opened: Any) -> None:
        def cells(column: int) -> list[str]:
            script = "return [...document.querySelectorAll(arguments[0])].map(c => c.textContent)"
            return opened.execute_script(script, f"#images-table tbody tr > :nth-child({column})")

        head = css(opened, "#images-table th:nth-child(5)")
        head.find_element("css selector", "button").click()
        assert head.get_attribute("aria-sort") == "ascending"
        ascending = cells(5)
        numbers = [float(c) for c in ascending if c != "–"]
        assert numbers == sorted(numbers)
        assert numbers[0] == 3
        assert numbers[-1] == 100
        assert set(ascending[len(numbers) :]) == {"–"}, "unknown values come last"
        head.find_element("css selector", "button").send_keys("\ue007")  # enter
        assert head.get_attribute("aria-sort") == "descending"
        assert [float(c) for c in cells(5)[: len(numbers)]] == numbers[::-1]
        assert cells(5)[-1] == "–"
        css(opened, "#images-table th:nth-child(1) button").click()
        assert head.get_attribute("aria-sort") == "none"
        images = [c for c in cells(1) if "img " in c and "<" not in c]
        assert [c[-5] for c in images] == ["0", "1", "2", "3"]

    def test_filter_hides_rows(self, opened: Any) -> None:
        count = "return document.querySelectorAll('#images-table tbody tr:not([hidden])').length"
        css(opened, "#filter").send_keys("FAILED")
        assert opened.execute_script(count) == len(HOSTILE)

    @pytest.mark.parametrize("width", [360, 768, 1280])
    def test_page_never_scrolls_sideways(self, opened: Any, width: int) -> None:
        resize(opened, width)
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
        scrolls = "const s = document.querySelector('.tall'); return s.scrollWidth > s.clientWidth"
        assert width > 360 or opened.execute_script(scrolls), "the table scrolls in its own box"

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_text_is_legible_in_both_schemes(self, opened: Any, scheme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        paper = luminance(css(opened, "body").value_of_css_property("background-color"))
        assert (paper > 0.5) == (scheme == "light")
        for selector in ("body", ".intro", ".statuses .some a", ".facts b", ".crop"):
            ink = luminance(css(opened, selector).value_of_css_property("color"))
            contrast = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
            assert contrast >= 4.5, f"{selector} has contrast {contrast:.1f} (WCAG AA asks 4.5)"


def luminance(color: str) -> float:
    """Relative luminance by WCAG 2.2 of `rgb(...)` or `rgba(...)`."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(v) / 255 for v in re.findall(r"\d+", color)[:3])
    ]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
