"""No-data values: what a tag names, what is left out of a range, what comes back."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import tifffile
from helpers import as_dtype, picture

from denoise_core.config import DenoiseConfig
from denoise_core.denoiser import Geometry
from denoise_core.errors import NonFiniteValues
from denoise_core.evaluation.sources import Shot, read_shot
from denoise_core.images import data_range, decode, filled, read_header, read_window, restore, valid
from denoise_core.images.nodata import parse_nodata
from denoise_core.pipelines.job import Job, Model, merge_reference
from denoise_core.pipelines.stages import Expand, Item, Read, Write
from denoise_core.storage import StorageOptions

NAN = math.nan
LOWEST = float(np.finfo("float32").min)


@pytest.mark.parametrize(
    ("text", "dtype", "expected"),
    [
        ("-9999", "int16", -9999.0),
        ("-9999", "uint16", None),
        ("255.0", "uint8", 255.0),
        ("0.5", "uint8", None),
        ("nan", "uint8", None),
        ("nan\0", "float32", NAN),
        ("-3.4028234663852886e+38 ", "float32", LOWEST),
        ("-3.40282346600000016e+38", "float32", LOWEST),
        ("-1.7e308", "float32", LOWEST),
        ("-1,5", "float64", -1.5),
        ("none", "float32", None),
    ],
)
def test_what_a_tag_names(text: str, dtype: str, expected: float | None) -> None:
    assert repr(parse_nodata(text, np.dtype(dtype))) == repr(expected)


@pytest.mark.parametrize("nodata", [-9999.0, LOWEST, NAN])
def test_floats_have_the_range_of_their_data(nodata: float) -> None:
    values = np.array([[280, nodata, 300.5], [nodata, 290, 281]], "float32")
    assert data_range(valid(values, nodata)) == (280, 300.5)
    seen = filled(values, nodata, low=280, high=300.5)
    assert seen.tolist() == [[280, 280, 300.5], [280, 290, 281]]


def test_nothing_is_copied_where_all_is_data() -> None:
    values = picture(8, 8, 1)
    assert filled(values, -9999.0, low=0, high=1) is values
    assert filled(values, None, low=0, high=1) is values
    assert valid(values, -9999.0) is values


def test_a_raster_without_any_data_has_a_range() -> None:
    assert data_range(valid(np.full((4, 4), -9999, "float32"), -9999.0)) == (0, 1)


@pytest.mark.parametrize(
    ("dtype", "nodata", "neighbour"),
    [("uint8", 0, 1), ("uint8", 255, 254), ("int16", -32768, -32767), ("int16", 7, 8)],
)
def test_data_never_becomes_no_data(dtype: str, nodata: int, neighbour: int) -> None:
    noisy = np.array([nodata, 100, 100], dtype)
    denoised = np.array([50, nodata, 99], dtype)
    restore(denoised, noisy, nodata)
    assert denoised.tolist() == [nodata, neighbour, 99]


@pytest.mark.parametrize("nodata", [0.0, -9999.0])
def test_floats_never_become_no_data(nodata: float) -> None:
    noisy = np.array([nodata, 0.5], "float32")
    denoised = np.array([0.25, nodata], "float32")
    restore(denoised, noisy, nodata)
    assert denoised[0] == nodata
    assert 0 < abs(denoised[1] - nodata) < 0.001


def raster(array: np.ndarray, nodata: str, **options: object) -> bytes:
    out = io.BytesIO()
    tag = (42113, 2, None, nodata, True)
    tifffile.imwrite(out, array, extratags=[tag], photometric="minisblack", **options)
    return out.getvalue()


def save(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, photometric="minisblack")
    return out.getvalue()


def test_nan_is_refused_unless_it_is_named_and_wanted() -> None:
    array = picture(40, 50, 1)[..., 0].copy()
    array[:9, :9] = np.nan
    named, other = raster(array, "nan", tile=(16, 16)), raster(array, "-9999")
    image = decode(named, name="x", keep_nodata=True)
    np.testing.assert_array_equal(image.pixels[..., 0], array)
    window, _ = read_window(io.BytesIO(named), y=slice(4, 20), x=slice(0, 9), keep_nodata=True)
    np.testing.assert_array_equal(window[..., 0], array[4:20, :9])
    for data, keep in ((named, False), (other, True)):
        with pytest.raises(NonFiniteValues, match="GDAL_NODATA"):
            decode(data, name="x", keep_nodata=keep)


def test_no_data_brighter_than_the_told_bits_is_no_pixel() -> None:
    array = as_dtype(picture(40, 50, 1), "uint16")[..., 0] >> 4
    array[0, 0] = 65535
    out = io.BytesIO()
    tags = [(281, 3, 1, 4095, True), (42113, 2, None, "65535", True)]
    tifffile.imwrite(out, array, extratags=tags)
    assert decode(out.getvalue(), name="x").header.bits == 12


def job_of(out: Path, **settings: str) -> Job:
    config = DenoiseConfig(inputs=("x",), output=str(out), **settings)
    models = (Model("m", "m", "0", 2.0),)
    return Job(config, "run", StorageOptions(), Geometry(64, 16, 2), models, "hash")


def item_of(root: Path) -> Item:
    return Item({"path": "a.tif", "source_uri": str(root / "a.tif"),
                 "output_uri": str(root / "out/images/a.tif")})  # fmt: skip


@pytest.mark.parametrize("nodata", ["-9999", "-3.4028234663852886e+38", "nan"])
def test_a_noisy_raster_is_not_taken_for_a_quiet_one(tmp_path: Path, nodata: str) -> None:
    array = picture(200, 200, 1)[..., 0].copy()
    array[:60] = float(nodata)
    (tmp_path / "a.tif").write_bytes(raster(array, nodata))
    item = item_of(tmp_path)
    Read(job_of(tmp_path / "out"), None)._read(item)
    assert "copied" not in item.facts
    assert item.facts["data_range"] == [0, 1]
    assert 15 < item.facts["sigma_in"] < 25


@pytest.mark.parametrize("nodata", ["-9999", "nan"])
def test_another_depth_has_no_such_value(tmp_path: Path, nodata: str) -> None:
    array = np.full((40, 50), 0.5, "float32")
    array[:9] = float(nodata)
    (tmp_path / "a.tif").write_bytes(raster(array, nodata))
    item, job = item_of(tmp_path), job_of(tmp_path / "out", bit_depth="8")
    Read(job, None)._read(item)
    item.metadata = bytes(item.metadata)
    Write(job, None)._write(item)
    assert item.facts["metadata_lost"] == ["tiff:GDAL_NODATA"]
    made = decode((tmp_path / "out/images/a.tif").read_bytes(), name="x")
    assert made.header.nodata is None
    assert (made.pixels[0, 0, 0], made.pixels[9, 0, 0]) == (0, 128)


@pytest.mark.parametrize("in_regions", [False, True])
@pytest.mark.parametrize(
    ("dtype", "nodata"), [("float32", "nan"), ("float32", "-9999"), ("uint8", "0")]
)
def test_a_reference_is_held_against_what_is_data_in_both(
    tmp_path: Path, dtype: str, nodata: str, in_regions: bool
) -> None:
    one = 255 if dtype == "uint8" else 1
    clean = np.full((90, 90), 0.4 * one, dtype)
    noisy = np.full((90, 90), 0.6 * one, dtype)
    plain = save(noisy)
    noisy[:20], clean[-30:] = float(nodata), float(nodata)
    (tmp_path / "a.tif").write_bytes(raster(clean, nodata, tile=(64, 64)))
    write = Write(job_of(tmp_path / "out", reference=str(tmp_path)), None)
    for data in (plain, raster(noisy, nodata)):
        image = decode(data, name="x", keep_nodata=True)
        facts = {"path": "a.tif", "size": [90, 90], "data_range": [0, one]}
        facts |= {"nodata": image.header.nodata}
        if in_regions:
            place = slice(0, 90), slice(0, 90)
            sums = write._region_against_reference(facts, place, image.pixels, image.pixels)
            found = merge_reference([sums])
        else:
            found = write._against_reference(facts, image.metadata, image.pixels, image.pixels)
        assert found["mse"] == pytest.approx(0.04)
        assert found["psnr"] == pytest.approx(-10 * math.log10(0.04))
        assert 0 < found["ssim"] < 1


def test_a_reference_without_any_data_gives_no_figures(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(raster(np.full((40, 50), -9999, "float32"), "-9999"))
    image = decode(save(picture(40, 50, 1)[..., 0]), name="x")
    facts = {"path": "a.tif", "size": [40, 50], "data_range": [0, 1]}
    write = Write(job_of(tmp_path / "out", reference=str(tmp_path)), None)
    found = write._against_reference(facts, image.metadata, image.pixels, image.pixels)
    assert found["reference_problem"].startswith("no pixel is data")
    assert "psnr" not in found


@pytest.mark.parametrize(("brightest", "high"), [(4000, 4095), (5000, 65535)])
def test_a_large_image_has_the_range_that_it_has_as_a_whole(
    tmp_path: Path, brightest: int, high: int
) -> None:
    array = np.full((600, 600), 100, "uint16")
    array[500, 500], array[0, 0] = brightest, 65535
    path = tmp_path / "a.tif"
    tags = [(281, 3, 1, 4095, True), (42113, 2, None, "65535", True)]
    tifffile.imwrite(path, array, extratags=tags, tile=(128, 128))
    whole = decode(path.read_bytes(), name="x").header
    assert data_range("uint16", bits=whole.bits) == (0, high)
    with path.open("rb") as file:
        header = read_header(file, name="x")
        regions = Geometry(64, 16, 2).regions(600, 600, region=256)
        assert Expand._range(file, header, regions, name="x") == (0, high)


def test_an_evaluation_sees_the_picture_alone(tmp_path: Path) -> None:
    array = picture(40, 50, 1)[..., 0].copy()
    array[:9] = np.nan
    (tmp_path / "a.tif").write_bytes(raster(array, "nan"))
    shot = Shot(name="a", uri=str(tmp_path / "a.tif"))
    found = read_shot(shot, StorageOptions())
    assert (found.scale.low, found.scale.high) == (0, 1)
    assert found.clean[:9].max() == 0
    np.testing.assert_array_equal(found.clean[9:, :, 0], array[9:])
