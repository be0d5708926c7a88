"""The denoising job through real Ray on one mixed folder: what comes out, and what a rerun does.

One run feeds most tests; the tests that change the folder come last and in order.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
import time
import zlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from helpers import (
    Notes,
    as_dtype,
    by_name,
    denoise,
    files_below,
    make_checkpoint,
    picture,
    rows_of,
)
from PIL import Image

from denoise_core.checkpoints import load_checkpoint
from denoise_core.choice import residual_rms
from denoise_core.errors import AccessDenied, RunFailed, UsageError
from denoise_core.images import DecodedImage, decode
from denoise_core.images.nodata import is_nodata
from denoise_core.metrics import error_sums
from denoise_core.results import SCHEMA

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

SIZE = (61, 83)
HOSTILE = "a b & <script>alert('x')<\u2044script> ünï 画像.png"


def png_bytes(array: np.ndarray) -> bytes:
    return bytes(imagecodecs.png_encode(array if array.shape[-1] > 1 else array[..., 0]))


def with_alpha(pixels: np.ndarray) -> np.ndarray:
    alpha = np.random.default_rng(5).integers(0, np.iinfo(pixels.dtype).max + 1, pixels.shape[:2])
    return np.dstack([pixels, alpha.astype(pixels.dtype)])


def write_good(root: Path) -> None:
    """The fidelity matrix, a small sub-folder, a large tiled TIFF and a noiseless picture."""
    root.mkdir()
    for bits in (8, 16):
        grey = as_dtype(picture(*SIZE, 1, seed=bits), f"uint{bits}")
        colour = as_dtype(picture(*SIZE, 3, seed=bits + 1), f"uint{bits}")
        for kind, pixels in (("grey", grey), ("rgb", colour), ("rgba", with_alpha(colour))):
            (root / f"{kind}{bits}.png").write_bytes(png_bytes(pixels))
            options: dict[str, Any] = {"photometric": "minisblack" if kind == "grey" else "rgb"}
            if kind == "rgba":
                options["extrasamples"] = ["unassalpha"]
            plane = pixels[..., 0] if kind == "grey" else pixels
            tifffile.imwrite(
                root / f"{kind}{bits}.tif", plane, resolution=(300, 300), resolutionunit=2,
                **options,
            )  # fmt: skip
    tifffile.imwrite(root / "float.tif", picture(*SIZE, 1)[..., 0])
    tifffile.imwrite(
        root / "five.tif",
        np.moveaxis(as_dtype(picture(*SIZE, 5), "uint16"), -1, 0),
        photometric="minisblack",
        metadata={"axes": "CYX"},
    )
    np.save(root / "array.npy", picture(*SIZE, 3, seed=9))
    colour = Image.fromarray(as_dtype(picture(*SIZE, 3, seed=3), "uint8"))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    icc = tiny_icc()
    more = {"exif": exif.tobytes(), "icc_profile": icc}
    colour.save(root / "photo.jpg", quality=95, dpi=(240, 240), **more)
    colour.save(root / "photo.webp", lossless=True, **more)
    colour.save(root / "photo.png", dpi=(240, 240), **more)
    colour.save(root / "photo.bmp")
    colour.save(root / HOSTILE)
    (root / "sub").mkdir()
    colour.save(root / "sub" / "photo.png")
    (root / "one.png").write_bytes(png_bytes(np.full((1, 1, 3), 9, np.uint8)))
    smooth = np.full((64, 64, 3), 120, np.uint8)
    (root / "clean.png").write_bytes(png_bytes(smooth))
    tifffile.imwrite(
        root / "big.tif", as_dtype(picture(1100, 900, 3, seed=2), "uint8"), tile=(128, 128),
        photometric="rgb", compression="zlib",
    )  # fmt: skip
    write_raster(root / "raster.tif", as_dtype(picture(*SIZE, 1, seed=4), "uint16"), 0)
    write_raster(root / "raster-float.tif", picture(*SIZE, 1, seed=4), -9999)
    write_raster(root / "raster-large.tif", picture(720, 720, 1, seed=4), math.nan, tile=(128, 128))


def write_raster(path: Path, pixels: np.ndarray, nodata: float, **options: Any) -> None:
    """A band of which a slanting quarter is no data, as GDAL writes it."""
    band = pixels[..., 0].copy()
    y, x = np.indices(band.shape)
    band[2 * x + y < band.shape[1]] = nodata
    tag = (42113, 2, None, f"{nodata:g}", True)
    tifffile.imwrite(path, band, photometric="minisblack", extratags=[tag], **options)


def decoded(path: Path) -> DecodedImage:
    return decode(path.read_bytes(), name=path.name, keep_nodata=True)


@lru_cache  # the profile holds the time of its making
def tiny_icc() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


BAD = {
    "truncated.png": "CorruptImage",
    "truncated.jpg": "CorruptImage",
    "truncated.tif": "CorruptImage",
    "empty.png": "NotAnImage",
    "text.png": "NotAnImage",
    "nan.tif": "NonFiniteValues",
    "infinite.npy": "NonFiniteValues",
    "bomb.png": "ImageTooLarge",
    "palette.png": "UnsupportedImage",
    "cmyk.jpg": "UnsupportedImage",
    "animated.webp": "UnsupportedImage",
    "bilevel.png": "UnsupportedImage",
    "link.png": "ObjectNotFound",
}


def write_bad(root: Path) -> None:
    colour = as_dtype(picture(*SIZE, 3), "uint8")
    whole = png_bytes(colour)
    (root / "truncated.png").write_bytes(whole[: len(whole) // 2])
    jpeg = bytes(imagecodecs.jpeg_encode(colour))
    (root / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, colour)
    (root / "truncated.tif").write_bytes(buffer.getvalue()[:5000])
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_text("no picture at all, just words\n")
    values = picture(*SIZE, 1)[..., 0].copy()
    values[3, 4] = np.nan
    tifffile.imwrite(root / "nan.tif", values)
    np.save(root / "infinite.npy", np.full((8, 8), np.inf, np.float32))
    (root / "bomb.png").write_bytes(bomb())
    Image.fromarray(colour).quantize(16).save(root / "palette.png")
    Image.fromarray(colour).convert("CMYK").save(root / "cmyk.jpg")
    frames = [Image.fromarray(colour), Image.fromarray(255 - colour)]
    frames[0].save(root / "animated.webp", save_all=True, append_images=frames[1:])
    Image.fromarray(colour).convert("1").save(root / "bilevel.png")
    (root / "link.png").symlink_to(root / "nowhere.png")


def bomb() -> bytes:
    """A PNG whose header tells 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in parts)


@pytest.fixture(scope="module")
def job(ray_session: None, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run on everything good and bad, with OUT inside the input folder."""
    root = tmp_path_factory.mktemp("job")
    write_good(root / "in")
    write_bad(root / "in")
    # A PNG under another format's name is fine: its content decides.
    (root / "in" / "really-a-png.jpg").write_bytes((root / "in" / "rgb8.png").read_bytes())
    second = root / "second"
    (second / "rgb8").mkdir(parents=True)
    (second / "rgb8.png").write_bytes((root / "in" / "grey8.png").read_bytes())
    clean = root / "clean"
    clean.mkdir()
    reference = as_dtype(picture(*SIZE, 3, seed=9, sigma=0), "uint8")
    (clean / "rgb8.png").write_bytes(png_bytes(reference))
    (clean / "rgb16.png").write_bytes(png_bytes(as_dtype(np.zeros((3, 3, 3)), "uint8")))
    out = root / "in" / "out"
    started = time.monotonic()
    outcome = denoise(
        [root / "in", second, root / "in" / "rgb8.png"],
        out,
        checkpoint,
        reference=str(clean),
        copy_below="1.5",
        compression=None,
    )
    seconds = time.monotonic() - started
    return SimpleNamespace(
        root=root, source=root / "in", second=second, clean=clean, out=out, outcome=outcome,
        rows=by_name_of(out, root / "in"), seconds=seconds,
    )  # fmt: skip


def by_name_of(out: Path, root: Path) -> dict[str, dict[str, Any]]:
    """Rows by path below `root`, or whole where they lie elsewhere."""
    rows = rows_of(out)
    assert len({row["image_id"] for row in rows}) == len(rows)
    return {row["source_uri"].removeprefix(f"{root}/"): row for row in rows}


def good_names(job: Any) -> list[str]:
    names = [n for n in files_below(job.source) if not n.startswith("out/") and n not in BAD]
    return [name for name in names if name != "link.png"]


def test_every_input_has_exactly_one_row(job: Any) -> None:
    inputs = {name for name in files_below(job.source) if not name.startswith("out/")}
    assert set(job.rows) == inputs | {str(job.second / "rgb8.png")}
    assert len(job.rows) == job.outcome.totals.done == job.outcome.totals.to_do


def test_every_bad_input_is_a_failed_row_with_a_sentence(job: Any) -> None:
    for name, kind in BAD.items():
        row = job.rows[name]
        assert (row["status"], row["error_type"]) == ("failed", kind), row
        assert row["error_stage"] == ("plan" if name == "link.png" else "read")
        assert len(row["error_message"]) > 30
        assert "\n" not in row["error_message"]
        assert row["output_uri"] is None
        assert row["attempts"] == 1
    failed = {name for name, row in job.rows.items() if row["status"] == "failed"}
    assert failed == {*BAD, str(job.second / "rgb8.png")}
    assert not any((job.out / "images" / name).exists() for name in BAD)


def test_second_input_of_one_output_is_refused(job: Any) -> None:
    row = job.rows[str(job.second / "rgb8.png")]
    assert (row["status"], row["error_type"]) == ("failed", "OutputConflict")
    assert decode((job.out / "images/rgb8.png").read_bytes(), name="x").header.channels == 3


def test_too_many_failures_leave_no_success_marker(job: Any) -> None:
    assert not job.outcome.within_budget
    assert not (job.out / "_SUCCESS").exists()


def test_output_tree_holds_images_and_reports_alone(job: Any) -> None:
    images = [n.removeprefix("images/") for n in files_below(job.out) if n.startswith("images/")]
    assert images == sorted(good_names(job))
    rest = {n for n in files_below(job.out) if not n.startswith("images/")}
    assert {"report.html", "run.json", "reports/summary.json"} <= rest
    leftovers = rest - {"report.html", "run.json", "reports/summary.json"}
    assert all(n.startswith("reports/images/part-") for n in leftovers), leftovers


def test_every_good_image_keeps_its_form(job: Any) -> None:
    for name in good_names(job):
        source, output = (root / name for root in (job.source, job.out / "images"))
        before, after = decoded(source), decoded(output)
        # How the file is cut to strips may change.
        header = replace(after.header, windowed=before.header.windowed)
        assert repr(header) == repr(before.header), name  # NaN is not equal to itself
        assert (after.alpha is None) == (before.alpha is None), name
        if before.alpha is not None:
            assert np.array_equal(after.alpha, before.alpha), name
        if job.rows[name]["status"] == "ok" and before.pixels.size > 3:
            assert not np.array_equal(after.pixels, before.pixels), name
        for block in ("icc", "exif", "dpi"):
            assert getattr(after.metadata, block) == getattr(before.metadata, block), (name, block)
        assert job.rows[name]["metadata_lost"] == [], name


@pytest.mark.parametrize(
    ("name", "bounds"),
    [("raster.tif", (0, 65535)), ("raster-float.tif", (0, 1)), ("raster-large.tif", (0, 1))],
)
def test_no_data_stays_and_is_no_part_of_the_picture(
    job: Any, name: str, bounds: tuple[float, float]
) -> None:
    before, after = (decoded(root / name) for root in (job.source, job.out / "images"))
    nodata = before.header.nodata
    assert nodata is not None
    none = is_nodata(before.pixels, nodata)
    np.testing.assert_array_equal(is_nodata(after.pixels, nodata), none)
    row = job.rows[name]
    assert (row["status"], tuple(row["data_range"])) == ("ok", bounds)
    # The noise is what it is elsewhere, and no border bleeds into the picture.
    assert 10 < row["sigma_in"] < 40
    assert row["sigma_out"] < row["sigma_in"]
    change = np.abs(after.pixels[~none].astype(float) - before.pixels[~none])
    assert 0 < change.max() < 0.6 * bounds[1]
    assert all(abs(shift) < 20 for shift in row["mean_shift"])


def test_other_readers_agree_on_the_metadata(job: Any) -> None:
    for name in ("photo.jpg", "photo.png", "photo.webp"):
        with Image.open(job.out / "images" / name) as image:
            assert image.getexif()[0x0112] == 6
            assert image.info["icc_profile"] == tiny_icc()
            if name != "photo.webp":
                assert tuple(map(round, image.info["dpi"])) == (240, 240)
    with tifffile.TiffFile(job.out / "images/five.tif") as file:
        assert (file.series[0].axes, file.series[0].shape) == ("CYX", (5, *SIZE))
    with tifffile.TiffFile(job.out / "images/rgba16.tif") as file:
        assert file.pages[0].tags["XResolution"].value == (300, 1)
        assert file.pages[0].tags["ExtraSamples"].value == (2,)


def test_every_column_of_a_good_row_is_filled(job: Any) -> None:
    only_with_reference = {"psnr", "ssim", "mse", "psnr_noisy", "ssim_noisy", "mse_noisy",
                           "reference_uri"}  # fmt: skip
    may_be_null = {"error_stage", "error_type", "error_message", "seam_ratio",
                   "residual_autocorrelation"}  # fmt: skip
    row = job.rows["rgb16.png"]
    assert set(row) == set(SCHEMA.names)
    missing = {name for name, value in row.items() if value is None}
    assert missing <= only_with_reference | may_be_null, missing
    assert (row["width"], row["height"], row["channels"]) == (SIZE[1], SIZE[0], 3)
    assert (row["dtype"], row["has_alpha"], row["data_range"]) == ("uint16", False, [0, 65535])
    assert (row["patch"], row["halo"], row["regions"], row["patches"]) == (256, 16, 1, 1)
    assert row["output_uri"] == str(job.out / "images/rgb16.png")
    assert row["source_bytes"] == (job.source / "rgb16.png").stat().st_size
    assert (row["device"], row["attempts"], row["strength"]) == ("cpu", 1, 1.0)
    assert 10 < row["sigma_in"] < 40
    assert len(row["mean_shift"]) == 3
    assert row["started_at"] < row["finished_at"]
    assert min(row["read_ms"], row["denoise_ms"], row["write_ms"]) > 0
    assert row["model_id"] == "tiny-0"
    assert job.rows["five.tif"]["channels"] == 5
    assert len(job.rows["five.tif"]["mean_shift"]) == 5
    assert job.rows["rgba8.png"]["has_alpha"] is True


@pytest.mark.parametrize(
    ("reference", "words"), [("gone", "no such"), ("empty", "no files"), ("a.png", "is a file")]
)
def test_a_reference_with_nothing_in_it_is_refused_at_once(
    checkpoint: str, tmp_path: Path, reference: str, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").write_bytes(png_bytes(np.zeros((9, 9, 3), np.uint8)))
    with pytest.raises(UsageError, match=f"--reference .*{reference}.*{words}"):
        denoise(
            tmp_path / "a.png", tmp_path / "out", checkpoint,
            reference=str(tmp_path / reference), dry_run=True,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_reference_named_from_here_is_checked_and_may_hold_what_cannot_be_listed(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(png_bytes(np.zeros((9, 9, 3), np.uint8)))
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean/a.png").symlink_to(tmp_path / "gone.png")
    monkeypatch.chdir(tmp_path)
    settings = {"dry_run": True}
    with pytest.raises(UsageError, match=r"a\.png: is a file"):
        denoise("a.png", "out", checkpoint, reference="a.png", **settings)
    denoise("a.png", "out", checkpoint, reference="clean", **settings)


def test_reference_gives_psnr_ssim_and_mse(job: Any) -> None:
    row = job.rows["rgb8.png"]
    clean, noisy, denoised = (
        decode(path.read_bytes(), name="x").pixels
        for path in (job.clean / "rgb8.png", job.source / "rgb8.png", job.out / "images/rgb8.png")
    )
    after = error_sums(denoised, clean, data_range=255)
    before = error_sums(noisy, clean, data_range=255)
    assert row["reference_uri"] == str(job.clean / "rgb8.png")
    for name, sums in (("", after), ("_noisy", before)):
        assert row[f"psnr{name}"] == pytest.approx(sums.psnr)
        assert row[f"ssim{name}"] == pytest.approx(sums.ssim)
        assert row[f"mse{name}"] == pytest.approx(sums.mse)
    # A reference of another shape, and none at all, are told of in the totals.
    assert job.rows["rgb16.png"]["psnr"] is None
    assert job.outcome.unreferenced == job.outcome.totals.ok + job.outcome.totals.copied - 1


def test_noiseless_image_is_copied_bit_for_bit(job: Any) -> None:
    assert job.rows["clean.png"]["status"] == "copied"
    assert job.rows["clean.png"]["device"] is None
    copy, source = (root / "clean.png" for root in (job.out / "images", job.source))
    assert copy.read_bytes() == source.read_bytes()


def test_run_json_and_report_tell_of_the_run(job: Any) -> None:
    run = json.loads((job.out / "run.json").read_text())
    assert run["finished"] is True
    assert run["config"]["model"].startswith("/")
    assert run["counts"]["failed"] == len(BAD) + 1
    page = (job.out / "report.html").read_text()
    assert "<script>alert('x')" not in page
    json.loads((job.out / "reports/summary.json").read_text(), parse_constant=pytest.fail)


def test_model_sees_the_image(job: Any, checkpoint: str) -> None:
    """The pipeline's pixels are those of the bare denoiser."""
    from denoise_core.denoiser import Denoiser

    bare = Denoiser(load_checkpoint(checkpoint), precision="float32")
    values = np.load(job.source / "array.npy")
    (expected,) = bare.denoise([values])
    got = np.load(job.out / "images/array.npy")
    assert np.abs(got - expected).max() < 1e-5


def test_unchanged_rerun_does_nothing_and_starts_no_ray(job: Any, checkpoint: str) -> None:
    from denoise_core.config import DenoiseConfig
    from denoise_core.pipelines.denoise import run_denoising

    before = snapshot(job.out)
    config = DenoiseConfig(
        inputs=(str(job.source), str(job.second)), output=str(job.out), model=checkpoint,
        precision="float32", actors="1", reference=str(job.clean), copy_below="1.5",
        max_error_rate=0.9,
    )  # fmt: skip
    notes = Notes()
    outcome = run_denoising(config, watcher=notes, start_ray=lambda: pytest.fail("Ray"))
    assert notes == []
    assert outcome.totals.done == outcome.totals.to_do == 0
    assert outcome.totals.earlier_failures == len(BAD) + 1
    assert outcome.within_budget
    after = snapshot(job.out)
    assert after.pop("_SUCCESS") is not None
    assert after == before
    config = replace(config, reference=str(job.source))
    run_denoising(config, watcher=notes, start_ray=lambda: pytest.fail("Ray"))
    assert [note.partition(":")[0] for note in notes] == ["--reference is another than before"]


def snapshot(root: Path) -> dict[str, int]:
    return {name: (root / name).stat().st_mtime_ns for name in files_below(root)}


def test_dry_run_lists_and_writes_nothing(job: Any, checkpoint: str, tmp_path: Path) -> None:
    outcome = denoise(
        job.source, tmp_path / "dry", checkpoint, dry_run=True, include=("*.png",),
        exclude=("rgb*", "out/*"), recursive=False,
    )  # fmt: skip
    names = {Path(uri).name for uri in outcome.listed}
    assert {"grey8.png", "photo.png", "empty.png", "link.png"} <= names
    assert not any(name.startswith("rgb") or not name.endswith(".png") for name in names)
    assert not any("/sub/" in uri for uri in outcome.listed)
    assert len(denoise(job.source, tmp_path / "d", checkpoint, dry_run=True, limit=4).listed) == 4
    assert files_below(tmp_path) == []


def test_result_depends_on_no_actor_neighbour_or_order(
    job: Any, checkpoint: str, tmp_path: Path
) -> None:
    """Two actors, single patches, other names in another order, and a region of another size."""
    folder = tmp_path / "in"
    folder.mkdir()
    names = [n for n in good_names(job) if job.rows[n]["status"] == "ok" and "/" not in n]
    for place, name in enumerate(reversed(names)):
        os.link(job.source / name, folder / f"{place:02d}-{name}")
    out = tmp_path / "out"
    outcome = denoise(folder, out, checkpoint, actors="2", batch_size="1", region=512)
    assert outcome.totals.ok == len(names)
    rows = by_name(out)
    for place, name in enumerate(reversed(names)):
        output = out / "images" / f"{place:02d}-{name}"
        before, after = decoded(job.out / "images" / name), decoded(output)
        np.testing.assert_array_equal(after.pixels, before.pixels, err_msg=name)
        regions = rows[output.name]["regions"]
        assert regions == {"big.tif": 6, "raster-large.tif": 4}.get(name, 1), name
    row = rows[next(name for name in rows if name.endswith("big.tif"))]
    assert row["patches"] == 20
    assert 10 < row["sigma_in"] < 40
    assert not (out / ".denoise/regions").exists() or not files_below(out / ".denoise/regions")


def test_large_images_have_figures_or_are_copied(
    ray_session: None, stand_in: str, tmp_path: Path
) -> None:
    """In regions: errors against a reference are those of the whole; a quiet image is copied."""
    noisy, clean = (as_dtype(picture(700, 1100, 3, sigma=s), "uint8") for s in (20.0, 0.0))
    pairs = {"noisy.tif": noisy, "quiet.tif": clean, "alone.tif": noisy, "other.tif": noisy}
    for folder in ("in", "clean"):
        (tmp_path / folder).mkdir()
    for name, pixels in pairs.items():
        tifffile.imwrite(tmp_path / "in" / name, pixels, tile=(256, 256), photometric="rgb")
    for name in ("noisy.tif", "quiet.tif"):
        tifffile.imwrite(tmp_path / "clean" / name, clean, tile=(128, 128), photometric="rgb")
    tifffile.imwrite(tmp_path / "clean" / "other.tif", clean[:-1], photometric="rgb")
    outcome = denoise(
        tmp_path / "in", tmp_path / "out", stand_in, region=512, copy_below="1.5",
        reference=str(tmp_path / "clean"),
    )  # fmt: skip
    rows = by_name(tmp_path / "out")
    assert {name: row["status"] for name, row in rows.items()} == {
        "noisy.tif": "ok", "quiet.tif": "copied", "alone.tif": "ok", "other.tif": "ok",
    }  # fmt: skip
    assert {row["regions"] for row in rows.values()} == {6}
    assert outcome.unreferenced == 2
    assert rows["alone.tif"]["psnr"] is rows["other.tif"]["psnr"] is None
    made = decode((tmp_path / "out/images/noisy.tif").read_bytes(), name="x").pixels
    row = rows["noisy.tif"]
    for image, end in ((made, ""), (noisy, "_noisy")):
        whole = error_sums(image, clean, data_range=255)
        assert row[f"mse{end}"] == pytest.approx(whole.mse, rel=1e-9)
        # Without the windows that cross a region's border.
        assert row[f"ssim{end}"] == pytest.approx(whole.ssim, abs=2e-3)
    row = rows["quiet.tif"]
    assert row["psnr"] == row["psnr_noisy"] == math.inf
    assert row["sigma_in"] == row["sigma_out"] < 1.5
    copy = tmp_path / "out/images/quiet.tif"
    assert copy.read_bytes() == (tmp_path / "in/quiet.tif").read_bytes()
    assert files_below(tmp_path / "out/.denoise/regions") == []


def test_an_image_that_the_model_would_hardly_change_is_copied(
    ray_session: None, checkpoint: str, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for seed in range(4):
        pixels = as_dtype(picture(90, 120, 3, seed=seed) * (seed + 1) / 4, "uint8")
        (source / f"{seed}.png").write_bytes(png_bytes(pixels))

    def pixels_of(path: Path) -> np.ndarray:
        return decode(path.read_bytes(), name="x").pixels

    denoise(source, tmp_path / "all", checkpoint)
    taken = {
        path.name: residual_rms(
            pixels_of(path), pixels_of(tmp_path / "all/images" / path.name), spread=255
        )
        for path in source.iterdir()
    }
    limit = float(np.median(list(taken.values())))
    careful = make_checkpoint(tmp_path / "careful", break_even_residual=limit)
    # 12 bits in 16: noisy to the eye, and next to nothing of the range.
    dim = (picture(60, 50, 1, sigma=20) * 2000 + 1000).astype(np.uint16)
    (source / "dim.png").write_bytes(png_bytes(dim))
    outcome = denoise(source, tmp_path / "out", careful)
    assert (outcome.totals.ok, outcome.totals.copied) == (2, 3)
    assert (outcome.dim, outcome.dim_ends) == (1, (0, int(dim.max())))
    rows = by_name(tmp_path / "out")
    assert rows.pop("dim.png")["status"] == "copied"
    for name, row in rows.items():
        copied = taken[name] < limit
        assert row["status"] == ("copied" if copied else "ok")
        same = source if copied else tmp_path / "all/images"
        assert (tmp_path / "out/images" / name).read_bytes() == (same / name).read_bytes()
        assert (row["sigma_out"] == row["sigma_in"]) == copied


def test_auto_chooses_a_model_for_each_image(ray_session: None, tmp_path: Path) -> None:
    """By what the file shows: a JPEG of 8 bits comes from a camera, a PNG or 16 bits do not."""
    source = tmp_path / "in"
    source.mkdir()
    pixels = as_dtype(picture(90, 120, 3, sigma=25), "uint8")
    (source / "scan.png").write_bytes(png_bytes(pixels))
    (source / "photo.jpg").write_bytes(bytes(imagecodecs.jpeg_encode(pixels, 80)))
    tifffile.imwrite(source / "deep.tif", pixels.astype(np.uint16) * 257, photometric="rgb")
    denoise(source, tmp_path / "out", "auto")
    rows = by_name(tmp_path / "out")
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(rows, "ok")
    assert {name: (row["model_id"], row["model_hash"]) for name, row in rows.items()} == {
        name: (model, load_checkpoint(model).hash)
        for name, model in {
            "scan.png": "unet-s", "photo.jpg": "unet-s-photo", "deep.tif": "unet-s"
        }.items()
    }  # fmt: skip


def test_format_depth_and_strength_zero(job: Any, checkpoint: str, tmp_path: Path) -> None:
    """Strength 0 gives the input's values back, here in 16-bit TIFFs of all formats."""
    outcome = denoise(
        job.source, tmp_path, checkpoint, strength=0.0, format="tiff", bit_depth="16", region=512,
        recursive=False, include=("*8.png", "photo.*", "big.tif"), exclude=("out/*", "grey8.png"),
    )  # fmt: skip
    assert outcome.totals.failed == 0
    names = files_below(tmp_path / "images")
    assert "photo.jpg.tiff" in names
    assert "big.tif" in names
    assert "grey8.png.tiff" not in names
    for name in names:
        source = job.source / (name if name == "big.tif" else name.removesuffix(".tiff"))
        before = decode(source.read_bytes(), name=name)
        after = decode((tmp_path / "images" / name).read_bytes(), name=name)
        assert (after.header.format, after.header.dtype) == ("tiff", "uint16")
        assert np.array_equal(after.pixels, before.pixels.astype(np.uint16) * 257), name
        if before.alpha is not None:
            assert np.array_equal(after.alpha, before.alpha.astype(np.uint16) * 257), name


def test_retry_failed_touches_only_the_failed(job: Any, checkpoint: str) -> None:
    (job.source / "empty.png").write_bytes((job.source / "rgb8.png").read_bytes())
    (job.source / "fresh.png").write_bytes((job.source / "rgb8.png").read_bytes())
    before = snapshot(job.out / "images")
    outcome = denoise(
        [job.source, job.second], job.out, checkpoint, retry_failed=True, max_error_rate=0.9,
        copy_below="1.5",
    )  # fmt: skip
    assert (outcome.totals.ok, outcome.totals.failed) == (1, len(BAD))
    after = snapshot(job.out / "images")
    assert after.pop("empty.png")
    assert after == before
    assert outcome.totals.left_out == 1
    assert not (job.out / "_SUCCESS").exists(), "a new image was left out"
    rows = by_name_of(job.out, job.source)
    assert rows["empty.png"]["status"] == "ok"
    assert "fresh.png" not in rows
    (job.source / "fresh.png").unlink()


def test_changed_input_and_missing_output_are_redone_alone(job: Any, checkpoint: str) -> None:
    (job.source / "grey8.png").write_bytes((job.source / "rgb8.png").read_bytes())
    (job.out / "images/photo.bmp").unlink()
    before = snapshot(job.out / "images")
    outcome = denoise(
        [job.second, job.source], job.out, checkpoint, max_error_rate=0.9, copy_below="1.5"
    )
    assert (outcome.totals.ok, outcome.totals.failed) == (2, 0)
    after = snapshot(job.out / "images")
    assert after.pop("photo.bmp")
    assert after.pop("grey8.png") != before.pop("grey8.png")
    assert after == before
    assert by_name_of(job.out, job.source)["grey8.png"]["channels"] == 3


def test_changed_model_or_settings_redo_and_existing_rules(
    job: Any, stand_in: str, tmp_path: Path
) -> None:
    folder, out = job.source / "sub", tmp_path / "out"
    dry = {"dry_run": True}
    assert denoise(folder, out, stand_in).totals.ok == 1
    assert denoise(folder, out, stand_in, **dry).totals.to_do == 0
    assert denoise(folder, out, stand_in, strength=0.5, **dry).totals.to_do == 1
    assert denoise(folder, out, stand_in, region=512, actors="2", **dry).totals.to_do == 0
    other = make_checkpoint(tmp_path / "other", seed=1)
    assert denoise(folder, out, other, **dry).totals.to_do == 1
    assert denoise(folder, out, stand_in, existing="overwrite", **dry).totals.to_do == 1
    with pytest.raises(UsageError, match="--existing fail"):
        denoise(folder, out, stand_in, existing="fail")
    with pytest.raises(UsageError, match="is a file; name a folder"):
        denoise(folder, out / "run.json", stand_in)
    first = snapshot(out / "images")
    assert denoise(folder, out, other).totals.ok == 1
    assert snapshot(out / "images") != first
    (row,) = rows_of(out)
    assert row["model_id"] == "tiny-1"


def test_what_lies_under_images_is_what_the_rows_name(
    ray_session: None, stand_in: str, tmp_path: Path
) -> None:
    """A sub-folder first, then its parent; one image fails; others get another name."""
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    for seed, name in enumerate(("a", "sub/a", "sub/b")):
        pixels = as_dtype(picture(40, 50, 1, seed=seed), "uint8")
        (source / f"{name}.png").write_bytes(png_bytes(pixels))

    def run(*inputs: Path, **settings: Any) -> list[str]:
        denoise(inputs, out, stand_in, max_error_rate=1.0, **settings)
        named = [row["output_uri"] for row in rows_of(out) if row["output_uri"]]
        there = files_below(out / "images")
        assert sorted(named) == [str(out / "images" / name) for name in there]
        return there

    assert run(source / "sub") == ["a.png", "b.png"]
    assert run(source) == ["a.png", "sub/a.png", "sub/b.png"]
    (source / "sub/a.png").write_bytes(b"no picture any more")
    assert run(source) == ["a.png", "sub/b.png"]
    assert run(source, format="tiff") == ["a.png.tiff", "sub/b.png.tiff"]


def test_a_run_that_lost_an_image_or_its_row_is_no_success(
    ray_session: None, stand_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever took it: no row, no success. The rerun does it, and makes the reports anew."""
    from denoise_core import results
    from denoise_core.pipelines.flow import Flow

    for name in "abc":
        (tmp_path / "in").mkdir(exist_ok=True)
        pixels = as_dtype(picture(40, 50, 1), "uint8")
        (tmp_path / "in" / f"{name}.png").write_bytes(png_bytes(pixels))
    really = Flow.__iter__

    def forgetful(flow: Flow) -> Any:
        return (each for each in really(flow) if each is None or each["path"] != "b.png")

    monkeypatch.setattr(Flow, "__iter__", forgetful)
    with pytest.raises(RunFailed, match="1 of 3 images came to no end"):
        denoise(tmp_path / "in", tmp_path / "out", stand_in)
    assert not (tmp_path / "out/_SUCCESS").exists()
    monkeypatch.undo()

    def refused(journal: results.Journal) -> None:
        raise AccessDenied("OUT: the file system is read-only; choose another output")

    monkeypatch.setattr(results.Journal, "flush", refused)
    with pytest.raises(RunFailed, match=r"^the work stopped: OUT: .* another output\. Finished "):
        denoise(tmp_path / "in", tmp_path / "out", stand_in)
    assert not (tmp_path / "out/_SUCCESS").exists()
    monkeypatch.undo()
    outcome = denoise(tmp_path / "in", tmp_path / "out", stand_in)
    assert (outcome.totals.ok, outcome.totals.skipped) == (1, 2)
    assert (tmp_path / "out/_SUCCESS").exists()
    # One that was killed after its last row is ended by the next.
    written = json.loads((tmp_path / "out/run.json").read_text())
    (tmp_path / "out/run.json").write_text(json.dumps({**written, "finished": False}))
    (tmp_path / "out/report.html").unlink()
    assert denoise(tmp_path / "in", tmp_path / "out", stand_in).totals.skipped == 3
    assert json.loads((tmp_path / "out/run.json").read_text())["finished"]
    assert (tmp_path / "out/report.html").exists()


def test_patch_of_auto_is_kept_on_another_machine(
    ray_session: None, stand_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the cores, or another head: what 'auto' comes to there would do all images again."""
    from denoise_core.config import DenoiseConfig
    from denoise_core.pipelines import denoise as pipeline

    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(png_bytes(as_dtype(picture(40, 50, 1), "uint8")))
    monkeypatch.setattr(pipeline, "device_memory", lambda: 1 << 40)
    denoise(tmp_path / "in", tmp_path / "out", stand_in, patch="auto")
    large = json.loads((tmp_path / "out/run.json").read_text())["patch"]
    monkeypatch.setattr(pipeline, "device_memory", lambda: 1)
    config = DenoiseConfig(
        inputs=(str(tmp_path / "in"),), output=str(tmp_path / "out"), model=stand_in,
        precision="float32", patch="auto", dry_run=True,
    )  # fmt: skip
    notes = Notes()
    assert pipeline.run_denoising(config, watcher=notes).totals.to_do == 0
    assert notes == [f"--patch auto: {large}, as in the run before on this output."]
    # With other settings it is chosen anew.
    changed = replace(config, strength=0.5)
    assert pipeline.run_denoising(changed, watcher=notes).totals.to_do == 1
    assert len(notes) == 1
    checkpoint = load_checkpoint(stand_in)
    assert int(pipeline.resolve(changed, checkpoint)[0].patch) < large


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_a_run_that_died_at_its_page_is_ended_by_the_next(
    ray_session: None, stand_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from denoise_core.config import DenoiseConfig
    from denoise_core.pipelines import denoise as pipeline

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "a.png").write_bytes(png_bytes(as_dtype(picture(40, 50, 1), "uint8")))
    monkeypatch.setattr(pipeline, "build_report", kill)
    with pytest.raises(Killed):
        denoise(source, out, stand_in)
    monkeypatch.undo()
    images = snapshot(out / "images")
    assert list(images) == ["a.png"]
    config = DenoiseConfig(
        inputs=(str(source),), output=str(out), model=stand_in, precision="float32", actors="1"
    )

    def again() -> None:
        outcome = pipeline.run_denoising(
            config, watcher=Notes(), start_ray=lambda: pytest.fail("Ray")
        )
        assert (outcome.totals.to_do, outcome.totals.skipped) == (0, 1)
        assert snapshot(out / "images") == images
        assert json.loads((out / "run.json").read_text())["finished"] is True
        assert json.loads((out / "reports/summary.json").read_text())["images"]["ok"] == 1
        assert "<span>finished " in (out / "report.html").read_text()
        assert (out / "_SUCCESS").exists()

    assert not (out / "report.html").exists()
    assert json.loads((out / "run.json").read_text())["finished"] is False
    again()
    # As an older version left it, which wrote run.json before the page.
    (out / "report.html").unlink()
    (out / "_SUCCESS").unlink()
    again()


def test_a_data_range_that_some_images_cannot_have_fails_those_alone(
    ray_session: None, checkpoint: str, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for seed, dtype in enumerate(("uint8", "uint16", "uint16", "uint8")):
        pixels = as_dtype(picture(40, 50, 1, seed=seed), dtype)
        (tmp_path / f"in/{seed}.png").write_bytes(png_bytes(pixels))
    outcome = denoise(
        tmp_path / "in", tmp_path / "out", checkpoint, data_range="300:4095", copy_below="0"
    )
    assert (outcome.totals.ok, outcome.totals.failed) == (2, 2)
    assert "holds no uint8 value" in by_name(tmp_path / "out")["0.png"]["error_message"]
