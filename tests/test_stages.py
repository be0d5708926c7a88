"""Stages without Ray: regions and how large they are, what is staged, an actor's model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from helpers import as_dtype, picture

from denoise_core.config import DenoiseConfig
from denoise_core.denoiser import Geometry
from denoise_core.errors import RunFailed
from denoise_core.images import ImageHeader, ImageMetadata
from denoise_core.pipelines.job import Job, Model
from denoise_core.pipelines.stages import Denoise, Expand, Item, Read, Write
from denoise_core.storage import LocalStorage, StorageOptions


@pytest.mark.parametrize(
    ("kind", "side", "channels", "windowed", "expected"),
    [
        ("tiff", 5_000, 3, True, None),
        ("tiff", 6_000, 3, True, 2048),
        ("tiff", 6_000, 3, False, None),
        # A stack counts as many pixels as it has groups of four samples, and its regions are
        # smaller by as much.
        ("tiff", 2_000, 36, True, 512),
        ("tiff", 2_000, 32, True, None),
        ("zarr", 100, 1, True, 2048),
        ("zarr", 100, 5, True, 1024),
        ("zarr", 100, 10_000, True, 256),
    ],
)
def test_regions_hold_so_many_samples(kind, side, channels, windowed, expected) -> None:
    header = ImageHeader(kind, side, side, channels, "uint8", windowed=windowed)
    expand = Expand(SimpleNamespace(config=SimpleNamespace(region=2048)), None)
    assert expand._region_size(header) == expected


def job_of(out: Path, *, run_id: str = "run", models: tuple[Model, ...] = ()) -> Job:
    config = DenoiseConfig(inputs=("x",), output=str(out), region=256)
    geometry = Geometry(patch=64, halo=16, stride=2)
    return Job(config, run_id, StorageOptions(), geometry, models, "hash")


def test_only_regions_of_earlier_runs_are_taken_as_they_are(tmp_path: Path) -> None:
    """Ray takes a repeated task's blocks by their number: they must be as large as before."""
    pixels = as_dtype(picture(300, 500, 3), "uint8")
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(128, 128), photometric="rgb")
    facts = {
        "image_id": "id", "source_fingerprint": "print", "source_uri": str(tmp_path / "a.tif"),
        "path": "a.tif", "output_uri": str(tmp_path / "out/images/a.tif"), "size": [300, 500],
        "region_size": 256, "region": 1, "regions": 4, "in_regions": True, "data_range": [0, 255],
    }  # fmt: skip

    def read(run_id: str) -> Item:
        item = Item(dict(facts))
        Read(job_of(tmp_path / "out", run_id=run_id), None)._read_region(item, LocalStorage())
        return item

    first = read("first")
    first.denoised = np.ascontiguousarray(first.array("pixels")[:256, 16:])
    first.facts["core_shape"] = list(first.denoised.shape)
    Write(job_of(tmp_path / "out", run_id="first"), None)._stage_region(first)
    again, resumed = read("first"), read("second")
    assert "staged" not in again.facts
    np.testing.assert_array_equal(again.array("pixels"), first.array("pixels"))
    assert resumed.facts["staged"]
    assert resumed.pixels is None
    assert resumed.facts["sigma_out"] == first.facts["sigma_out"]


def test_an_actor_refuses_other_weights_than_the_runs(checkpoint: str, tmp_path: Path) -> None:
    actor = Denoise.__new__(Denoise)
    actor.job = job_of(tmp_path, models=(Model(checkpoint, "tiny", "0" * 64, 0.0),))
    actor.denoisers = {}
    with pytest.raises(RunFailed, match="its weights are not those that this run began with"):
        actor._denoiser(checkpoint)


def test_a_reference_of_the_other_polarity_is_turned(tmp_path: Path) -> None:
    clean = as_dtype(picture(40, 50, 1), "uint8")[..., 0]
    (tmp_path / "in").mkdir()
    (tmp_path / "clean").mkdir()
    tifffile.imwrite(tmp_path / "in/a.tif", 255 - clean, photometric="miniswhite")
    tifffile.imwrite(tmp_path / "clean/a.tif", clean, photometric="minisblack")
    config = DenoiseConfig(
        inputs=("x",), output=str(tmp_path / "out"), reference=str(tmp_path / "clean")
    )
    job = Job(
        config, "run", StorageOptions(), Geometry(64, 16, 2), (Model("m", "m", "0", 0.0),), "hash"
    )
    item = Item({"path": "a.tif", "source_uri": str(tmp_path / "in/a.tif")})
    Read(job, None)._read(item)
    pixels = item.array("pixels")
    metadata = ImageMetadata.from_bytes(bytes(item.metadata))
    found = Write(job, None)._against_reference(item.facts, metadata, pixels, pixels)
    assert found["mse"] == 0
