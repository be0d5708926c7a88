"""Planning: what is done, what is to do, who owns an output. Starts no Ray."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from helpers import picture

from denoise_core.config import DenoiseConfig
from denoise_core.denoiser import Geometry
from denoise_core.images import data_range, read_header, valid
from denoise_core.pipelines.stages import float_range
from denoise_core.results import Done
from denoise_core.storage import LocalStorage, expand
from denoise_core.worklist import Own, Planner, Refusal, WorkItem, image_id, outputs_present


def plan(
    inputs: list[Path],
    out: Path,
    done: Done | None = None,
    *,
    present: bool = False,
    **settings: Any,
) -> tuple[Planner, list[Any]]:
    names = tuple(map(str, inputs))
    config = DenoiseConfig(inputs=names, output=str(out), **settings)
    there = outputs_present(LocalStorage(), str(out)) if present else None
    planner = Planner(config, "hash", done or Done(), there)
    return planner, list(planner.plan(expand(names)))


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def finished(path: Path, out: Path, *, name: str = "", failed: bool = False) -> Done:
    info = path.stat()
    done = Done()
    identity = image_id(str(path))
    done.images[identity] = (f"{info.st_size}-{info.st_mtime_ns}", "hash", failed)
    if not failed:
        done.owners[hash(f"{out}/images/{name or path.name}")] = identity
    return done


def test_overlapping_inputs_give_one_item_each(tmp_path: Path) -> None:
    first = touch(tmp_path / "in/a.png")
    touch(tmp_path / "in/sub/b.png")
    planner, items = plan([tmp_path / "in", tmp_path / "in/sub", first], tmp_path / "out")
    assert sorted(item.path for item in items) == ["a.png", "sub/b.png"]
    assert planner.counts.listed == planner.counts.to_do == 2


def test_output_of_an_earlier_run_is_not_given_to_another_input(tmp_path: Path) -> None:
    done = finished(touch(tmp_path / "one/a.png"), tmp_path / "out")
    touch(tmp_path / "two/a.png")
    for inputs in (["two"], ["two", "one"], ["one", "two"]):
        for settings in ({}, {"existing": "overwrite"}):
            folders = [tmp_path / name for name in inputs]
            _, items = plan(folders, tmp_path / "out", done, **settings)
            refused = [each for each in items if isinstance(each, Refusal)]
            assert [Path(r.item.source_uri).parent.name for r in refused] == ["two"]


def test_output_whose_owner_has_moved_is_free(tmp_path: Path) -> None:
    """A folder, then its parent, in whatever order. Seen: a conflict with nobody."""
    top, below, out = touch(tmp_path / "in/a.png"), touch(tmp_path / "in/s/a.png"), tmp_path / "out"
    touch(out / "images/a.png")
    done = finished(below, out)
    for inputs in ([top.parent], [top, top.parent]):
        planner, items = plan(inputs, out, done, present=True)
        assert {(item.source_uri, item.output_uri) for item in items} == {
            (str(top), f"{out}/images/a.png"),
            (str(below), f"{out}/images/s/a.png"),
        }
        assert (planner.counts.to_do, planner.counts.refused) == (2, 0)
    # Left where it is, it keeps its output.
    done.images[image_id(str(top))] = ("", "", True)
    for settings in ({"retry_failed": True}, {"limit": 1}):
        _, items = plan([top, top.parent], out, done, present=True, **settings)
        assert [type(item) for item in items] == [Refusal]


def test_retry_counts_what_it_leaves_out(tmp_path: Path) -> None:
    done = finished(touch(tmp_path / "in/same.png"), tmp_path / "out")
    for name in ("failed", "changed"):
        touch(tmp_path / f"in/{name}.png")
        more = finished(tmp_path / f"in/{name}.png", tmp_path / "out", failed=name == "failed")
        done.images.update(more.images)
    (tmp_path / "in/changed.png").write_bytes(b"longer than before")
    touch(tmp_path / "in/new.png")
    planner, items = plan([tmp_path / "in"], tmp_path / "out", done, retry_failed=True)
    assert [item.path for item in items] == ["failed.png"]
    assert (planner.counts.skipped, planner.counts.left_out) == (1, 2)


def test_retry_of_a_conflict_does_not_take_the_others_output(tmp_path: Path) -> None:
    done = finished(touch(tmp_path / "one/a.png"), tmp_path / "out")
    loser = finished(touch(tmp_path / "two/a.png"), tmp_path / "out", failed=True)
    done.images.update(loser.images)
    _, items = plan([tmp_path / "two", tmp_path / "one"], tmp_path / "out", done, retry_failed=True)
    assert [type(item) for item in items] == [Refusal]


@pytest.mark.parametrize("format", ["preserve", "tiff"])
def test_hidden_file_that_was_named_is_not_done_again(tmp_path: Path, format: str) -> None:
    source, name = touch(tmp_path / "in/.a.png"), ".a.png" + ".tiff" * (format == "tiff")
    done = finished(source, tmp_path / "out", name=name)
    settings: dict[str, Any] = {"done": done, "present": True, "format": format}
    assert len(plan([source], tmp_path / "out", **settings)[1]) == 1
    touch(tmp_path / "out/images" / name)
    assert plan([source], tmp_path / "out", **settings)[1] == []


def test_output_is_known_by_whatever_link(tmp_path: Path) -> None:
    touch(tmp_path / "in/a.png")
    touch(tmp_path / "in/out/images/a.png")
    os.symlink(tmp_path / "in", tmp_path / "link")
    _, items = plan([tmp_path / "link"], tmp_path / "in/out")
    assert [item.path for item in items if isinstance(item, WorkItem)] == ["a.png"]
    assert Own("s3://b/in/out").holds("s3://b/in/out/images/x.png")
    assert not Own("s3://b/in/out").holds("s3://b/in/out/other/x.png")
    assert not Own(str(tmp_path / "o")).holds(str(tmp_path / "o/images2/x.png"))


@pytest.mark.parametrize("scale", [1.0, 4095.0])
@pytest.mark.parametrize("nodata", [None, -9999.0, math.nan])
def test_range_of_a_float_image_read_in_regions_is_that_of_the_whole(
    tmp_path: Path, scale: float, nodata: float | None
) -> None:
    values = (picture(700, 800, 1) * scale).astype(np.float32)
    tags = []
    if nodata is not None:
        # One region has nothing else.
        values[:300, :300] = nodata
        tags = [(42113, 2, None, f"{nodata:g}", True)]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values[..., 0], tile=(128, 128), extratags=tags)
    regions = Geometry(patch=256, halo=16, stride=2).regions(700, 800, region=256)
    with path.open("rb") as file:
        got = float_range(file, read_header(file, name="x"), regions, name="x")
    assert got == data_range(valid(values, nodata))
