"""Stages without Ray: regions and how large they are, what is staged, an actor's model."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import tifffile
from helpers import as_dtype, files_below, picture

from denoise_core.checkpoints import load_checkpoint
from denoise_core.config import DenoiseConfig
from denoise_core.denoiser import Geometry
from denoise_core.errors import CheckpointError, ImageError
from denoise_core.images import ImageHeader, ImageMetadata, decode
from denoise_core.pipelines import cluster, evaluate
from denoise_core.pipelines.cluster import MOST_ITEMS, _ReadAhead, set_data_context
from denoise_core.pipelines.denoise import _Run
from denoise_core.pipelines.job import Facts, Job, Model, merge_reference
from denoise_core.pipelines.stages import (
    Denoise,
    Expand,
    Guard,
    Item,
    Read,
    Write,
    measures,
    publish_image,
    regions_of,
    to_items,
    to_table,
)
from denoise_core.pipelines.stages.items import is_converted
from denoise_core.storage import LocalStorage, StorageOptions, local

MEASURES = (
    "sigma_out", "mean_shift", "clipped_fraction", "residual_autocorrelation", "seam_ratio",
)  # fmt: skip


class FreeGuard(Guard):
    """Counts no attempts: there is no Ray."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, "denoise", None)

    def sort(self, items):
        return items, []

    @contextmanager
    def attempt(self, items):
        yield items


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


def job_of(
    out: Path, *, run_id: str = "run", models: tuple[Model, ...] = (), **settings: Any
) -> Job:
    config = DenoiseConfig(inputs=("x",), output=str(out), region=256, **settings)
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


def test_a_region_has_its_figures_against_the_reference_of_this_run(tmp_path: Path) -> None:
    pixels = as_dtype(picture(300, 500, 3), "uint8")
    for folder in (".", "one", "other"):
        (tmp_path / folder).mkdir(exist_ok=True)
        tifffile.imwrite(tmp_path / folder / "a.tif", pixels, tile=(128, 128), photometric="rgb")
    facts = {
        "image_id": "id", "source_fingerprint": "print", "source_uri": str(tmp_path / "a.tif"),
        "path": "a.tif", "size": [300, 500], "region_size": 256, "region": 0, "regions": 4,
        "in_regions": True, "data_range": [0, 255],
    }  # fmt: skip

    def read(run_id: str, folder: str | None) -> tuple[Job, Item]:
        reference = folder and str(tmp_path / folder)
        job = job_of(tmp_path / "out", run_id=run_id, reference=reference)
        item = Item(dict(facts))
        Read(job, None)._read_region(item, LocalStorage())
        return job, item

    for first in ("one", "missing"):
        job, item = read(f"killed, {first}", first)
        item.denoised = np.ascontiguousarray(item.array("pixels")[:256, :256])
        item.facts["core_shape"] = list(item.denoised.shape)
        Write(job, None)._stage_region(item)
        for folder in ("one", "missing", "other", None):
            _, again = read("next", folder)
            assert again.facts.get("staged", False) == (folder in (first, None)), (first, folder)
            told = {"after", "before", "reference_uri", "reference_problem"} & again.facts.keys()
            assert bool(told) == (folder == first), (first, folder)


def stage_tiff(folder: Path, **settings: Any) -> tuple[Job, Facts]:
    """A tiled TIFF whose regions an actor has left as they are; the job, the facts of the image."""
    pixels = as_dtype(picture(300, 500, 3), "uint8")
    tifffile.imwrite(folder / "a.tif", pixels, tile=(128, 128), photometric="rgb")
    job = job_of(folder / "out", **settings)
    facts = {
        "image_id": "id", "source_fingerprint": "print", "source_uri": str(folder / "a.tif"),
        "path": "a.tif", "output_uri": str(folder / "out/images/a.tif"), "size": [300, 500],
        "region_size": 256, "regions": 4,
    }  # fmt: skip
    for index, region in enumerate(regions_of(job, {**facts, "in_regions": True})):
        y0, y1, x0, x1 = region.core
        path = Path(job.staging(facts, f"{index:06d}.npy"))
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, pixels[y0:y1, x0:x1])
    return job, facts


def test_a_level_for_pngs_leaves_a_large_tiff_as_it_would_be_without(tmp_path: Path) -> None:
    made = []
    for compression in (None, "6"):
        publish_image(*stage_tiff(tmp_path, compression=compression))
        made.append((tmp_path / "out/images/a.tif").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize("kept", [0, 8, 90, 5_000])
def test_a_damaged_region_fails_its_image_alone(tmp_path: Path, kept: int) -> None:
    job, facts = stage_tiff(tmp_path)
    path = Path(job.staging(facts, "000001.npy"))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ImageError, match=r"region at y=0, x=256 .* --retry-failed"):
        publish_image(job, facts)
    assert not Path(facts["output_uri"]).exists()


def test_an_actor_refuses_other_weights_than_the_runs(checkpoint: str, tmp_path: Path) -> None:
    actor = Denoise.__new__(Denoise)
    actor.job = job_of(tmp_path, models=(Model(checkpoint, "tiny", "0" * 64, 0.0),))
    actor.denoisers = {}
    with pytest.raises(CheckpointError, match="its weights are not those that this run began with"):
        actor._denoiser(checkpoint)


def test_regions_that_an_older_version_marked_are_merged() -> None:
    sums = {"squared": 8.0, "count": 2, "ssim_sum": 0.0, "ssim_count": 0, "data_range": 2.0}
    marked = [{"after": each, "before": each} for each in (sums, {**sums, "absolute": 4.0})]
    assert merge_reference(marked)["mse"] == 1.0


def figures_of(
    root: Path, noisy: np.ndarray, clean: np.ndarray, *, kind: str = "minisblack", **settings: Any
) -> Facts:
    """The figures of an image that stays as it is; `settings` are the job's."""
    for folder in ("in", "clean"):
        (root / folder).mkdir()
    tifffile.imwrite(root / "in/a.tif", noisy, photometric=kind)
    tifffile.imwrite(root / "clean/a.tif", clean, photometric="minisblack")
    models = (Model("m", "m", "0", 0.0),)
    job = job_of(root / "out", models=models, reference=str(root / "clean"), **settings)
    item = Item({"path": "a.tif", "source_uri": str(root / "in/a.tif")})
    Read(job, None)._read(item)
    pixels = item.array("pixels")
    metadata = ImageMetadata.from_bytes(bytes(item.metadata))
    return Write(job, None)._against_reference(item.facts, metadata, pixels, pixels)


def test_a_reference_of_the_other_polarity_is_turned(tmp_path: Path) -> None:
    clean = as_dtype(picture(40, 50, 1), "uint8")[..., 0]
    assert figures_of(tmp_path, 255 - clean, clean, kind="miniswhite")["mse"] == 0


@pytest.mark.parametrize(
    ("dtype", "clean_dtype", "settings", "expected"),
    [
        # The range of such floats is an estimate: it is not known what their white is.
        ("float32", "uint8", {}, "a.tif: uint8.* float32 .* --data-range"),
        ("float32", "uint8", {"data_range": "0:255"}, None),
        ("uint8", "float32", {}, "a.tif: float32 .* uint8"),
        ("float32", "float64", {}, None),
        ("float64", "float32", {"data_range": "0:255"}, None),
    ],
)
def test_a_reference_of_another_dtype_is_in_known_units_or_none(
    tmp_path: Path, dtype: str, clean_dtype: str, settings: dict[str, str], expected: str | None
) -> None:
    levels = as_dtype(picture(40, 50, 1) / 2 + 0.25, "uint8")[..., 0]
    noisy = levels.astype(dtype)
    noisy[0, 0] = 255
    found = figures_of(tmp_path, noisy, levels.astype(clean_dtype), **settings)
    if expected is None:
        assert found["mse"] < 1 / levels.size
    else:
        assert re.search(expected, found["reference_problem"])


def test_floats_of_zero_to_one_are_held_against_bytes(tmp_path: Path) -> None:
    levels = as_dtype(picture(40, 50, 1), "uint8")[..., 0]
    assert figures_of(tmp_path, levels / np.float32(255), levels)["mse"] < 1e-9


def test_the_actor_measures_what_the_write_stage_would(checkpoint: str, tmp_path: Path) -> None:
    """On a CPU the noisy pixels stay behind, with the same figures; with a reference they go on."""
    card = load_checkpoint(checkpoint)
    pixels = as_dtype(picture(90, 130, 3), "uint8")
    values = np.roll(pixels, 1, axis=0)

    def facts_of(*, use_gpu: bool, reference: str | None) -> tuple[Item, Facts]:
        config = DenoiseConfig(inputs=("x",), output=str(tmp_path), reference=reference)
        models = (Model(checkpoint, "tiny", card.hash, 0.0),)
        job = Job(config, "run", StorageOptions(), Geometry(64, 16, 2), models, "hash")
        facts = {"size": [90, 130], "shape": [90, 130, 3], "dtype": "uint8", "coarse": False,
                 "data_range": [0, 255], "sigma_in": 5.0, "path": "a", "image_id": "a",
                 "region": 0}  # fmt: skip
        actor = Denoise.__new__(Denoise)
        actor.job, actor.use_gpu, actor.guard = job, use_gpu, FreeGuard(job)
        fixed = SimpleNamespace(denoise_parts=lambda parts: [values], device="cpu", precision="f")
        actor.denoisers = {checkpoint: fixed}
        (item,) = to_items(next(actor(to_table(Item(facts, pixels=pixels, metadata=b"")))))
        carried = item.pixels is not None
        if carried and "sigma_out" not in item.facts:
            item.facts |= measures(job, item.facts, item.array("pixels"), item.array("denoised"))
        return item, {name: item.facts[name] for name in MEASURES}

    on_gpu, by_write = facts_of(use_gpu=True, reference=None)
    on_cpu, by_actor = facts_of(use_gpu=False, reference=None)
    compared, _ = facts_of(use_gpu=False, reference="clean")
    assert by_actor == by_write
    assert by_actor["seam_ratio"] is not None
    assert (on_gpu.pixels is None, on_cpu.pixels is None) == (False, True)
    assert compared.pixels is not None


@pytest.mark.parametrize("depth", ["preserve", "16"])
def test_copied_images_go_on_without_their_pixels(tmp_path: Path, depth: str) -> None:
    dim = np.full((40, 50), 30, np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", dim)
    config = DenoiseConfig(inputs=("x",), output=str(tmp_path / "out"), bit_depth=depth)
    models = (Model("m", "m", "0", 1.0),)
    job = Job(config, "run", StorageOptions(), Geometry(64, 16, 2), models, "hash")
    item = Item({"path": "a.tif", "source_uri": str(tmp_path / "a.tif"),
                 "output_uri": str(tmp_path / "out/images/a.tif")})  # fmt: skip
    Read(job, None)._read(item)
    assert item.facts["copied"]
    assert item.pixels is None
    item.metadata = bytes(item.metadata)
    Write(job, None)._write(item)
    assert item.facts["dim"] == [30, 30]
    assert item.facts["sigma_out"] == item.facts["sigma_in"]
    assert (item.facts["mean_shift"], item.facts["clipped_fraction"]) == ([0.0], 0.0)
    assert (tmp_path / "out/images/a.tif").read_bytes() == (tmp_path / "a.tif").read_bytes()


@pytest.mark.parametrize(
    ("settings", "format", "expected"),
    [
        ({}, "png", False),
        ({"compression": "zstd"}, "png", False),
        ({"compression": "zstd"}, "tiff", True),
        ({"compression": "9"}, "png", True),
        ({"compression": "9"}, "tiff", False),
        ({"format": "tiff"}, "tiff", False),
        ({"format": "tiff"}, "png", True),
        ({"bit_depth": "8"}, "tiff", False),
        ({"bit_depth": "16"}, "tiff", True),
    ],
)
def test_what_is_written_anew(settings: dict[str, str], format: str, expected: bool) -> None:
    config = DenoiseConfig(inputs=("x",), output="y", **settings)
    assert is_converted(config, ImageHeader(format, 4, 4, 1, "uint8")) == expected


def test_copied_images_keep_their_pixels_in_another_format(tmp_path: Path) -> None:
    pixels = np.dstack([np.full((40, 50), 30, np.uint8), np.arange(2000).reshape(40, 50) % 256])
    tifffile.imwrite(tmp_path / "a.tif", pixels.astype(np.uint8), extrasamples=["unassalpha"])
    config = DenoiseConfig(inputs=("x",), output=str(tmp_path / "out"), format="png")
    job = Job(
        config, "run", StorageOptions(), Geometry(64, 16, 2), (Model("m", "m", "0", 1.0),), "hash"
    )
    target = tmp_path / "out/images/a.tif.png"
    item = Item({"path": "a.tif", "source_uri": str(tmp_path / "a.tif"),
                 "output_uri": str(target)})  # fmt: skip
    Read(job, None)._read(item)
    assert item.facts["copied"]
    item.metadata = bytes(item.metadata)
    Write(job, None)._write(item)
    assert (item.facts["sigma_out"], item.facts["mean_shift"]) == (item.facts["sigma_in"], [0.0])
    made = decode(target.read_bytes(), name="a.png")
    assert made.header.format == "png"
    np.testing.assert_array_equal(np.dstack([made.pixels, made.alpha]), pixels)


def test_what_goes_while_it_is_swept_keeps_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ".denoise/regions/image"
    folder.mkdir(parents=True)
    for index in range(5):
        (folder / f"{index}.npy").write_bytes(b"pixels")
    (folder / ".tmp-of-a-killed-write").write_bytes(b"pixels")
    remove, seen = os.unlink, []

    def remove_too_late(path, **options):
        seen.append(path)
        remove(path, **options)
        if len(seen) == 2:
            remove(path, **options)

    monkeypatch.setattr(local.shutil.os, "unlink", remove_too_late)
    run = _Run.__new__(_Run)
    run.storage, run.out = LocalStorage(), str(tmp_path)
    run._sweep("regions")
    run._sweep("of which there is none")
    assert len(seen) == 6
    assert files_below(tmp_path) == []


def sweep_denoising(out: Path) -> None:
    run = _Run.__new__(_Run)
    run.storage, run.out = LocalStorage(), str(out)
    run._sweep("work")


def sweep_evaluation(out: Path) -> None:
    evaluate._sweep(SimpleNamespace(config=SimpleNamespace(output=str(out)), options=None))


@pytest.mark.parametrize(
    ("sweep", "folder"), [(sweep_denoising, ".denoise/work"), (sweep_evaluation, ".evaluate")]
)
def test_a_sweep_enters_no_link(tmp_path: Path, sweep, folder: str) -> None:
    home, swept = tmp_path / "home/.ssh", tmp_path / "out" / folder
    home.mkdir(parents=True)
    swept.mkdir(parents=True)
    (home / "key").write_bytes(b"x")
    (swept / "left.npz").write_bytes(b"x")
    (swept / "planted").symlink_to(home)
    sweep(tmp_path / "out")
    assert (home / "key").exists()
    assert not swept.exists()


@pytest.mark.parametrize("error", [RecursionError("too deep"), MemoryError("too large")])
def test_what_an_image_does_to_python_itself_is_a_failed_row(
    tmp_path: Path, error: Exception
) -> None:
    item = Item({"path": "a.npy"}, pixels=b"x")
    with FreeGuard(job_of(tmp_path)).catch(item):
        raise error
    assert item.failed
    assert str(error) in item.facts["error_message"]
    assert item.facts["error_message"].startswith("a.npy: ")


@pytest.mark.parametrize(
    ("blocks", "size", "running", "actors", "expected"),
    [
        (0, 0, 0, 1, True),
        # One image may always wait for each actor, however large,
        (0, 0, 1, 1, False),
        (1, 90, 0, 2, True),
        (1, 90, 1, 2, False),
        # and of small ones as many as there is room for; those being read count.
        (5, 40, 0, 1, True),
        (5, 40, 1, 1, False),
        (5, 20, 1, 2, True),
    ],
)
def test_reading_ahead_is_bound(blocks, size, running, actors, expected) -> None:
    pool = SimpleNamespace(current_size=lambda: actors)
    writer = stage()
    taker = stage(writer, pools=[pool])
    reader = stage(taker, running=running)
    policy = policy_with(blocks, size)
    assert policy.can_add_input(reader) is expected
    assert policy.can_add_input(taker)
    assert policy.can_add_input(writer)


@pytest.mark.parametrize(
    ("blocks", "running", "expected"),
    [(0, 0, True), (MOST_ITEMS - 1, 0, True), (MOST_ITEMS, 0, False), (0, 1, False)],
)
def test_one_work_list_is_cut_at_a_time(blocks, running, expected) -> None:
    lists = stage(stage(stage(pools=["pool"])), running=running)
    assert policy_with(blocks, 0).can_add_input(lists) is expected


def stage(*following: Mock, pools=(), running: int = 0) -> Mock:
    return Mock(
        output_dependencies=list(following),
        get_autoscaling_actor_pools=lambda: list(pools),
        num_active_tasks=lambda: running,
        metrics=SimpleNamespace(average_bytes_per_output=90),
    )


def test_no_thread_fetches_metadata_of_blocks() -> None:
    """With Ray's thread for it the driver's memory grew by 12 kB for each image of 20 kB."""
    from ray.data._internal.execution.metadata_fetcher import (
        InlineMetadataFetcher,
        make_metadata_fetcher,
    )

    set_data_context()
    assert type(make_metadata_fetcher()) is InlineMetadataFetcher


@pytest.mark.usefixtures("ray_session")
def test_losing_what_knows_where_actors_are_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data's one for the cluster may live on a machine that an earlier job was given."""
    import ray.data
    from ray.data._internal.utils import cached_ray_internals

    asked = Mock(side_effect=ray.exceptions.ActorUnschedulableError("its machine is gone"))
    monkeypatch.setattr(cached_ray_internals, "get_or_create_actor_location_tracker", asked)
    set_data_context()
    dataset = ray.data.range(2, override_num_blocks=2).map_batches(
        _Same, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.5
    )
    assert dataset.count() == 2
    assert asked.called


class _Same:
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return batch


def policy_with(blocks: int, size: int) -> _ReadAhead:
    """Return one block or 60 bytes for each actor, with so much waiting before every stage."""
    waiting = SimpleNamespace(
        total_enqueued_input_blocks=lambda: blocks, total_enqueued_input_blocks_bytes=lambda: size
    )
    settings = SimpleNamespace(get_config=lambda key: (1, 60))
    return _ReadAhead(settings, defaultdict(lambda: waiting), None)


def test_work_that_fails_to_end_hides_no_other_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    class Failing:
        def shutdown(self, *, force: bool) -> None:
            ended.set()
            raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(cluster, "_executors", {Failing()})
    thread = threading.Thread(target=ended.wait)
    thread.start()
    cluster.end_execution(thread, patience_s=30.0)
    assert not thread.is_alive()


@pytest.mark.ray
def test_the_controller_of_an_interrupted_training_is_ended(ray_session: None) -> None:
    import ray

    class TrainController:
        def run(self) -> None:
            time.sleep(120)

    TrainController.__qualname__ = "TrainController"
    actor: Any = ray.remote(num_cpus=0)(TrainController)
    controller = actor.remote()

    def fit() -> None:
        with suppress(ray.exceptions.RayActorError):
            ray.get(controller.run.remote())

    thread = threading.Thread(target=fit)
    thread.start()
    cluster.end_training(thread, patience_s=60.0)
    assert not thread.is_alive()
