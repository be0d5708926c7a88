"""The benchmark: every subcommand on tiny data, and the arithmetic behind its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner, Result
from helpers import job_environment, make_checkpoint, make_keras_file

from denoise_core.benchmarks import (
    QualityConfig,
    ScaleConfig,
    ThroughputConfig,
    pictures,
    quality,
    scale,
    simulation,
    throughput,
)
from denoise_core.benchmarks.child import call
from denoise_core.benchmarks.processes import Moment, Process, Sampler, Watched, kind_of
from denoise_core.benchmarks.tables import command_line, table
from denoise_core.errors import RunFailed, UsageError
from denoise_core.models.classical import CLASSICAL
from jobs.benchmark import AllConfig, main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def read(folder: Path, name: str) -> dict:
    content = json.loads((folder / f"{name}.json").read_text())
    assert {"cpu", "cores", "versions"} <= set(content["machine"])
    assert content["command"] in (folder / f"{name}.md").read_text()
    return content


@pytest.fixture(scope="module")
def clean_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small clean images: one of colour, one grey."""
    import imagecodecs

    folder = tmp_path_factory.mktemp("clean")
    source = pictures.photographs(None)[0]
    colour = pictures.compose(source, (72, 64), at=(100, 100))
    (folder / "a.png").write_bytes(imagecodecs.png_encode(colour))
    grey = np.ascontiguousarray(pictures.compose(source, (64, 80), at=(0, 200))[..., 1])
    (folder / "b.png").write_bytes(imagecodecs.png_encode(grey))
    return folder


# --- the subcommands --------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.timeout(2400)
def test_all_runs_every_benchmark_and_joins_the_tables(
    clean_folder: Path, checkpoint: str, tmp_path: Path
) -> None:
    command = [
        *("all", "--output", str(tmp_path), "--model", checkpoint, "--data", str(clean_folder)),
        *("--megapixels", "0.9", "--limit", "1", "--side", "300", "--photo-sizes", "0.1,0.2"),
        *("--names", "500", "--bare-seconds", "0.1", "--baselines", "identity,wavelet"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.benchmark", *command],
        env=job_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    joined = (tmp_path / "benchmark.md").read_text()
    for name in ("throughput", "quality", "harm", "precision", "memory", "listing"):
        read(tmp_path, name)
        assert (tmp_path / f"{name}.md").read_text() in joined
    methods = {row["method"] for row in read(tmp_path, "quality")["folders"][0]["figures"]}
    assert methods == {"tiny-0", "identity", "wavelet"}
    check_throughput(read(tmp_path, "throughput"))
    check_memory(read(tmp_path, "memory"))
    check_precision(read(tmp_path, "precision"))


def check_throughput(data: dict) -> None:
    job, loop = data["job"], data["plain_loop"]
    assert data["images"] == 2
    assert job["megapixels"] == loop["megapixels"] == pytest.approx((1024 * 768 + 481 * 321) / 1e6)
    assert job["run_json"]["megapixels"] == pytest.approx(job["megapixels"], abs=0.001)
    assert data["bare_model"]["mpx_per_s"] > 0
    for figures in (job, loop):
        assert 0 < figures["first_image_s"] < figures["seconds"]
        assert all(seconds > 0 for seconds in figures["work_s"].values())
    whole = data["ratios"]["job_to_loop_whole"]
    assert whole == pytest.approx(job["mpx_per_s"] / loop["mpx_per_s"])
    assert data["processes"]["denoise actor"] > 0


def check_memory(data: dict) -> None:
    for part in (data["tiff"], data["photographs"]):
        assert {"driver (jobs.denoise)", "denoise actor"} <= set(part["kinds"])
        worker = part["largest_worker"]
        assert 50e6 < worker["uss"] < worker["rss"] < 4e9
        assert part["together_pss"] > worker["uss"]
    assert data["tiff"]["megapixels"] == pytest.approx(0.09)
    assert data["photographs"]["images"] == 2


def check_precision(data: dict) -> None:
    assert data["images"] == 2
    assert data["speed_ratio"] > 0
    assert abs(data["psnr_difference"]) < 0.5
    assert 0 < data["mean_difference"] < data["worst_difference"]


def test_quality_of_baselines(clean_folder: Path, checkpoint: str, tmp_path: Path) -> None:
    done = run(
        *("quality", "--output", str(tmp_path), "--data", str(clean_folder), "--limit", "1"),
        *("--model", checkpoint, "--sigma", "25", "--baselines", "identity,tv"),
    )
    assert done.exit_code == 0, done.output
    (folder,) = read(tmp_path, "quality")["folders"]
    model, identity, tv = folder["figures"]
    assert [len(each["images"]) for each in (model, identity, tv)] == [2, 2, 1]
    # 20 log10(255 / 25), and a little more for what clipping takes away.
    assert 20.1 < identity["psnr"] < 21.0
    assert tv["psnr"] > identity["psnr"]
    assert "PSNR of" in (tmp_path / "quality.md").read_text()


def test_a_users_model_is_measured_in_its_own_range(
    clean_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = make_keras_file(tmp_path / "mine.keras", monkeypatch)
    same = ("quality", "--output", str(tmp_path), "--data", str(clean_folder), "--model", mine)
    found = []
    for words in (("--model-range", "0:255"), ()):
        done = run(*same, "--sigma", "25", "--baselines", "identity", *words)
        assert done.exit_code == 0, done.output
        model, identity = read(tmp_path, "quality")["folders"][0]["figures"]
        found.append(model["psnr"] - identity["psnr"])
    assert found[0] > -1
    assert found[1] < -5
    each = AllConfig(output="x", model_range="0:255").single().values()
    assert {config.model_range for config in each} == {"0:255"}


@pytest.mark.ray
def test_input_compares_streams_with_a_batch_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setenv("RAY_worker_niceness", "0")
    (tmp_path / "digits").mkdir()
    for number in range(4):
        Image.new("L", (28, 28), 60 * number).save(tmp_path / "digits" / f"{number}.png")
    done = run(
        *("input", "--output", str(tmp_path), "--data", str(tmp_path / "digits")),
        *("--preset", "mnist-latent16", "--steps", "3", "--warm", "2"),
    )
    assert done.exit_code == 0, done.output
    rates = read(tmp_path, "input")["steps_per_s"]
    assert set(rates) == {"memory", "ray", "thread"}
    assert min(rates.values()) > 0
    assert f"{rates['ray'] / rates['memory']:.0%}" in (tmp_path / "input.md").read_text()


def test_harm_copies_the_quiet_and_tells_of_the_rest(
    clean_folder: Path, checkpoint: str, tmp_path: Path
) -> None:
    same = ("--output", str(tmp_path), "--model", checkpoint, "--data", str(clean_folder))
    done = run("harm", *same, "--sigma", "0,20", "--copy-below", "12")
    assert done.exit_code == 0, done.output
    quiet, noisy = read(tmp_path, "harm")["levels"]
    assert (quiet["copied"], quiet["denoised"], quiet["harmed"]) == (2, 0, 0)
    assert quiet["worst_change"] is None
    assert (noisy["copied"], noisy["denoised"]) == (0, 2)
    assert noisy["worst_change"] <= noisy["mean_change"]
    assert noisy["psnr_noisy"] == pytest.approx(20 * np.log10(255 / 20), abs=0.5)
    assert noisy["psnr_after"] == pytest.approx(noisy["psnr_noisy"] + noisy["mean_change"])
    # Without a limit every image is changed, and one without noise can only lose.
    run("harm", *same, "--sigma", "0", "--copy-below", "0")
    (changed,) = read(tmp_path, "harm")["levels"]
    assert (changed["copied"], changed["harmed"]) == (0, 2)
    assert run("harm", *same, "--sigma", "loud").exit_code == 2
    careful = make_checkpoint(tmp_path / "careful", break_even_residual=255.0)
    same = (*same[:2], "--model", careful, *same[4:], "--sigma", "0")
    for level, copied in (("95", 2), ("85", 0)):
        run("harm", *same, "--jpeg", level)
        assert read(tmp_path, "harm")["levels"][0]["copied"] == copied


def test_listing_of_generated_names_and_of_a_rerun(tmp_path: Path) -> None:
    done = run("listing", "--output", str(tmp_path), "--names", "12000")
    assert done.exit_code == 0, done.output
    first, rerun = read(tmp_path, "listing")["cases"].values()
    assert (first["to_do"], first["skipped"], first["shards"]) == (12_000, 0, 2)
    assert (rerun["to_do"], rerun["skipped"], rerun["shards"]) == (0, 12_000, 0)
    assert all(each["rss_before"] <= each["peak_rss"] < 1e9 for each in (first, rerun))


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_scale_runs_the_pipeline_with_a_device_that_sleeps(checkpoint: str, tmp_path: Path) -> None:
    command = [
        *("scale", "--output", str(tmp_path), "--model", checkpoint, "--actors", "2"),
        *("--images", "60", "--patch-ms", "50", "--every", "0.2"),
        *("--speedup", "40"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.benchmark", *command],
        env=job_environment(RAY_worker_niceness="0"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    data = read(tmp_path, "scale")
    assert data["device"] == {"patch_ms": 50.0}
    config = ScaleConfig(output="x", actors="2,1", images=60, least=40)
    assert [(n, config.images_of(n)) for n in config.counts] == [(1, 40), (2, 60)]
    (simulated,) = data["runs"]
    assert (simulated["actors"], simulated["images"]) == (2, 60)
    check_simulated_run(simulated)
    assert data["projection"]["images"] == 1_000_000
    # The device as it was said to be, not as it slept.
    assert data["projection"]["device_s"] == pytest.approx(40 * simulated["device_s"], rel=0.1)


def check_simulated_run(each: dict) -> None:
    names = [name.split("[")[0] for name in each["operators"]]
    assert [name for name in names if name.startswith("MapBatches")] == [
        "MapBatches(_ReadShards)->StreamingRepartition",
        "MapBatches(Expand)->MapBatches(Read)",
        "MapBatches(Denoise)",
        "MapBatches(Write)",
    ]
    assert each["megapixels"] / each["images"] == pytest.approx(6.35, rel=0.1)
    # Each item's pixels are put into the store once when they are read, twice when denoised.
    assert 2.9 < each["store"]["bytes"] / each["carried_bytes"] < 3.3
    steady = each["steady"]
    assert 0 < steady["busy"] <= 1
    assert steady["images_per_s"] * each["device_s"] == pytest.approx(
        steady["busy"] * each["actors"], rel=0.5
    )
    cpu = steady["cpu_s_per_image"]
    assert set(cpu) == {"driver", "ledger", "tasks", "actors", "services"}
    assert 0 < cpu["driver"] < 1
    assert each["most_bytes_held"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("quality", "--baselines", "bm4d"), "Did you mean 'bm3d'?"),
        (("quality", "--sigma", "x"), "--sigma x"),
        (("quality", "--data", "/nowhere", "--baselines", "identity"), "/nowhere"),
        (("throughput", "--megapixels", "0"), "--megapixels"),
        (("throughput", "--model", "unknown"), "unknown"),
        (("memory", "--photos", ""), "--photos"),
        (("memory", "--sied", "9"), "--side"),
        (("scale", "--actors", "1,x"), "--actors 1,x"),
        (("scale", "--actors", ""), "--actors"),
        (("scale", "--speedup", "0"), "--speedup"),
    ],
)
def test_wrong_usage_is_a_sentence_and_exit_code_2(
    arguments: tuple[str, ...], words: str, checkpoint: str, tmp_path: Path
) -> None:
    model = () if "--model" in arguments else ("--model", checkpoint)
    done = run(*arguments, *model, "--output", str(tmp_path))
    assert done.exit_code == 2, done.output
    assert words in done.output
    assert "Traceback" not in done.output


# --- protocol A -------------------------------------------------------------------------------


def test_noise_of_protocol_a_is_the_same_for_every_image_and_not_clipped() -> None:
    clean = np.full((40, 50, 1), 255, np.uint8)
    noisy = quality.noisy_of(clean, 25)
    np.random.seed(0)
    expected = 1 + np.random.normal(0, 25 / 255, (40, 50, 1))
    np.testing.assert_array_equal(noisy, expected.astype(np.float32))
    np.testing.assert_array_equal(noisy, quality.noisy_of(clean, 25))
    assert noisy.max() > 1.1


def test_output_of_protocol_a_is_clipped_and_rounded() -> None:
    values = np.array([-0.1, 0.5 / 255 + 1e-4, 0.999, 1.3], np.float32)
    assert quality.to_bytes(values).tolist() == [0, 1, 255, 255]


def test_defaults_of_quality_are_known() -> None:
    config = QualityConfig(output="x")
    assert config.sigmas == [15, 25, 50]
    assert set(config.filters) | set(quality.SLOW) <= set(CLASSICAL)


# --- arithmetic -------------------------------------------------------------------------------


def test_the_plain_loop_stitches_what_a_whole_image_gives() -> None:
    """A mean over 5x5 pixels needs a halo of 2; the loop's seams must not show."""
    from scipy.ndimage import uniform_filter

    from denoise_core.denoiser import Geometry

    pixels = np.random.default_rng(0).integers(0, 256, (50, 71, 3)).astype(np.uint8)

    def smooth(batch: np.ndarray) -> np.ndarray:
        return uniform_filter(batch, (0, 5, 5, 0))

    got = throughput._plainly(pixels, smooth, geometry=Geometry(16, 4, 4))
    expected = np.rint(uniform_filter(pixels.astype(np.float32), (5, 5, 0), mode="mirror"))
    assert got.shape == pixels.shape
    np.testing.assert_allclose(got, expected, atol=1)


def test_steady_rate_leaves_the_first_and_last_tenth_out() -> None:
    assert throughput.steady_rate([(0.5 * i, 1.0) for i in range(21)]) == pytest.approx(2.0)
    # 2 Mpx/s from the third to the nineteenth of 21 images; the ends are slow.
    middle = [(0.5 * i, 1.0) for i in range(17)]
    slow = [(-50.0, 1.0), (-40.0, 9.0), *middle, (99.0, 9.0), (200.0, 1.0)]
    assert throughput.steady_rate(slow) == pytest.approx(2.0)
    assert throughput.steady_rate([(1.0, 1.0)]) is None


def test_ratios_divide_the_right_figures() -> None:
    data = {
        "job": {"steady_mpx_per_s": 6.0, "mpx_per_s": 4.0},
        "plain_loop": {
            "steady_mpx_per_s": 4.0,
            "mpx_per_s": 2.0,
            "without_startup_mpx_per_s": 8.0,
        },
        "denoiser_loop": {"steady_mpx_per_s": 5.0},
        "bare_model": {"mpx_per_s": 12.0},
    }
    assert throughput.ratios(data) == {
        "job_to_denoiser_loop_steady": 1.2,
        "job_to_loop_steady": 1.5,
        "job_to_loop_whole": 2.0,
        "job_whole_to_loop_without_startup": 0.5,
        "job_to_bare_steady": 0.5,
        "loop_to_bare_steady": pytest.approx(1 / 3),
    }


def test_simulated_images_go_from_thumbnails_to_50_mpx_whatever_their_number() -> None:
    sizes = simulation.image_sizes(2_000, seed=0)
    pixels = np.array([width * height for width, height in sizes])
    assert pixels.min() < 20_000
    assert 49.7e6 < pixels.max() < 50e6
    assert np.mean(pixels < 1e6) == pytest.approx(
        np.log(1e6 / 19_200) / np.log(50e6 / 19_200), abs=0.01
    )
    few = [width * height for width, height in simulation.image_sizes(200, seed=1)]
    assert np.mean(few) == pytest.approx(pixels.mean(), rel=0.01)
    assert sizes == simulation.image_sizes(2_000, seed=0) != simulation.image_sizes(2_000, seed=1)


def test_windows_of_an_image_are_counted_by_their_pixels() -> None:
    from denoise_core.denoiser import Geometry
    from denoise_core.pipelines.standins import full_windows, size_in

    geometry = Geometry(256, 32, 16)
    assert full_windows(geometry, 160, 320) == 0.5
    # Four cores a side: windows of 288, 320, 320 and 288 pixels.
    assert full_windows(geometry, 1024, 1024) == pytest.approx(((2 * 288 + 2 * 320) / 320) ** 2)
    (entry,) = simulation.entries(1, seed=0)
    height, width = size_in(entry.path)
    assert height * width == pytest.approx((160 * 120 * 50e6) ** 0.5, rel=0.01)


def simulated(*spans: tuple[str, float, float]) -> list[dict]:
    """Images by (actor, start, seconds of the device), each finished when the device is."""
    return [
        {"actor": actor, "began": began, "device_s": seconds, "finished": began + seconds}
        for actor, began, seconds in spans
    ]


def test_steady_time_begins_with_the_last_actor_and_busy_is_what_was_slept_in_it() -> None:
    images = simulated(*(("a", i, 1.0) for i in range(20)), *(("b", i, 0.5) for i in range(6, 20)))
    window = scale.steady_window(images, actors=2)
    assert window == (6.0, 18.5)
    # One actor had no pause; the other was at work for the first half of each second.
    assert scale.busy_share(images, (6.0, 18.0), actors=2) == pytest.approx(0.75)
    assert scale.busy_share(images, (6.75, 7.75), actors=2) == pytest.approx((1 + 0.5) / 2)
    assert scale.steady_window(images, actors=3) is None


def test_cpu_of_a_run_is_that_between_two_samples_for_each_image_and_kind() -> None:
    watched = Watched()
    for pid, kind in enumerate(["driver (jobs.denoise)", "denoise actor", "raylet", "GCS"]):
        watched.processes[pid] = Process(pid, kind)
    for at in range(0, 21, 2):
        spent = {0: 1 + 0.1 * at, 1: 0.2 * at, 2: 0.3 * at, **({3: at - 8.0} if at >= 8 else {})}
        watched.history.append(Moment(at, spent, 1000 + 10 * at, 0.5 * at))
    first, last = scale._between(watched.history, 3.0, 17.0)
    assert (first.at, last.at) == (4, 16)
    spent = scale._cpu_by_kind(watched, first, last)
    assert spent == pytest.approx(
        {"driver": 1.2, "ledger": 0, "tasks": 0, "actors": 2.4, "services": 3.6 + 8}
    )
    assert [each.at for each in scale._between(watched.history, 30.0, 31.0)] == [18, 20]


def test_cpu_of_rest_and_of_each_image_are_told_apart() -> None:
    def steady(rate: float, cores: float) -> dict:
        return {"images_per_s": rate, "cpu_s_per_image": {"driver": cores / rate}}

    runs = [steady(rate, 0.05 + 0.01 * rate) for rate in (0.5, 2.0, 8.0)]
    assert scale.cpu_load(runs, "driver") == pytest.approx((0.05, 0.01))
    assert scale.cpu_load(runs[:1], "driver") == pytest.approx((0.0, 0.11))
    # No line: less work with more images.
    assert scale.cpu_load([steady(1, 0.3), steady(2, 0.1)], "driver") == pytest.approx((0, 0.4 / 3))


def test_scale_is_projected_by_loads_and_the_largest_run() -> None:
    def measured(actors: int, rate: float) -> dict:
        rest = {"driver": 0.2, "ledger": 0.0, "tasks": 0.0, "actors": 0.0, "services": 0.1}
        cost = {"driver": 0.008, "ledger": 0.001, "tasks": 0.02, "actors": 0.01, "services": 0.02}
        cpu = {kind: rest[kind] / rate + cost[kind] for kind in cost}
        steady = {"busy": 0.99, "cpu_s_per_image": cpu, "images_per_s": rate}
        return {
            **{"actors": actors, "images": 100 * actors, "device_s": 0.2, "rows_cpu_s": 0.001},
            **{"pixel_bytes": 3e6, "carried_bytes": 1e5, "table_bytes": 500.0},
            "wall_s": {"plan": 0.1 * actors, "publish": 0.2 * actors, "report": 0.3 * actors},
            "store": {"bytes": 3e5},
            "most_bytes_held": 1e6 * actors,
            "steady": {**steady, "driver_own": 1e8, "driver_own_per_image": 100.0},
        }

    runs = [measured(1, 1.0), measured(4, 4.0), {**measured(8, 8.0), "steady": None}]
    data = {"runs": runs, "speedup": 5.0, "device": {"patch_ms": 10.0}}
    each = scale.project(data, gpus=10, images=10_000)
    assert each is not None
    assert each["images_of_largest"] == 400
    assert each["seconds"] == pytest.approx(
        {
            **{"plan": 10.0, "devices": 1000.0, "driver": 100.0, "ledger": 10.0},
            **{"publish": 20.0, "report": 30.0},
        }
    )
    assert (each["bottleneck"], each["whole_s"]) == ("devices", pytest.approx(1060.0))
    assert each["most_gpus"] == pytest.approx(100)
    # A tenth of the time for each window, and 10 GPUs would ask for all that the driver can do.
    assert each["least_patch_ms"] == pytest.approx(1.0)
    assert each["store_bytes"] == pytest.approx(9e6)
    assert each["held_bytes_per_gpu"] == pytest.approx(30e6)
    assert each["cores"] == pytest.approx({"tasks": 0.2, "services": 0.3})
    assert scale.project({"runs": []}, gpus=1, images=1) is None
    # So many GPUs that the driver cannot follow.
    assert scale.project(data, gpus=1_000, images=10_000)["bottleneck"] == "driver"


def test_fewer_actors_get_fewer_images_but_not_too_few() -> None:
    config = ScaleConfig(output="x", actors="64,1,8,8", images=6_400, least=300)
    assert config.counts == [1, 8, 64]
    assert [config.images_of(actors) for actors in config.counts] == [300, 800, 6_400]
    assert ScaleConfig(output="x", images=200, least=300).images_of(1) == 200


def test_command_line_repeats_what_is_not_the_default() -> None:
    config = ThroughputConfig(output="a b", megapixels=5.0)
    expected = "python -m jobs.benchmark throughput --output 'a b' --megapixels 5.0"
    assert command_line("throughput", config) == expected


def test_table_is_markdown() -> None:
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


# --- pictures ---------------------------------------------------------------------------------


def test_mirrored_plane_has_no_jumps_and_starts_as_the_source() -> None:
    source = np.arange(5 * 7, dtype=np.uint8).reshape(5, 7, 1)
    plane = pictures.compose(source, (23, 17))
    np.testing.assert_array_equal(plane[:5, :7], source)
    np.testing.assert_array_equal(plane[:5, 7:14], source[:, ::-1])
    assert np.abs(np.diff(plane[..., 0].astype(int), axis=1)).max() == 1


def test_made_pngs_are_seeded_and_reach_the_size(tmp_path: Path) -> None:
    total = pictures.make_pngs(tmp_path / "a", megapixels=0.8, sigma=25, data=None)
    pictures.make_pngs(tmp_path / "b", megapixels=0.8, sigma=25, data=None)
    first, second = (sorted((tmp_path / name).iterdir()) for name in "ab")
    assert total >= 0.8
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    sizes = [pictures.read_picture(path).shape for path in first]
    assert sum(height * width for height, width, _ in sizes) / 1e6 == pytest.approx(total)
    assert {channels for *_, channels in sizes} == {3}


def test_made_tiff_is_tiled_and_deflated(tmp_path: Path) -> None:
    pictures.make_tiff(tmp_path / "a.tif", side=300, sigma=25)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        page = file.pages.first
        assert (page.shape, page.tile) == ((300, 300, 3), (256, 256))
        assert page.compression.name == "ADOBE_DEFLATE"
    clean = pictures.compose(pictures.photographs(None)[0], (300, 300))
    noise = tifffile.imread(tmp_path / "a.tif").astype(float) - clean
    assert 15 < noise[(clean > 60) & (clean < 190)].std() < 27


# --- processes --------------------------------------------------------------------------------


def test_a_child_reports_its_own_peak_and_its_errors(tmp_path: Path) -> None:
    ballast = bytearray(os.urandom(1)) * 300_000_000
    made = call("listing:make_done", names=10, out=str(tmp_path))
    assert made.value == 1
    assert 10e6 < made.peak_rss < len(ballast)
    with pytest.raises(RunFailed, match="unexpected keyword"):
        call("listing:make_done", wrong=1)
    with pytest.raises(UsageError, match=r"^--data /nowhere: no images there"):
        call("pictures:picture_files", folder="/nowhere")


def test_what_ends_a_benchmark_ends_what_it_watches(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    sleep = f"import os, pathlib, time; pathlib.Path({str(told)!r}).write_text(str(os.getpid()))"
    command = [sys.executable, "-c", f"{sleep}; time.sleep(60)"]
    body = (
        "from denoise_core.benchmarks.processes import watch; from jobs._ray import end_on_sigterm"
        f"; end_on_sigterm(); watch({command!r}, every_s=0.1, memory=False)"
    )
    with subprocess.Popen([sys.executable, "-c", body], stderr=subprocess.DEVNULL) as job:
        until = time.monotonic() + 200
        while time.monotonic() < until and not (told.exists() and told.read_text()):
            time.sleep(0.05)
        job.terminate()
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)


def test_sampler_sees_the_memory_of_a_grandchild() -> None:
    hold = "x = bytearray(b'1' * 80_000_000); import time; time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], start_new_session=True) as job:
        sampler = Sampler(job.pid, every_s=0.05, memory=True)
        sampler.start()
        until = time.monotonic() + 200
        while time.monotonic() < until and sampler.watched.together < 85e6:
            time.sleep(0.1)
        watched = sampler.stop()
        os.killpg(job.pid, 9)
    root, child = watched.processes.values()
    assert root.kind == "driver (jobs.denoise)"
    assert child.uss > 75e6
    assert child.rss >= child.uss
    assert root.uss < 75e6


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("ray::MapWorker(MapBatches(Denoise)).submit", "denoise actor"),
        ("ray::MapBatches(Expand)->MapBatches(Read)", "task worker (read, write)"),
        ("ray::MapBatches(Write)", "task worker (read, write)"),
        ("ray::IDLE", "idle worker"),
        ("/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=a", "raylet and object store"),
        ("ray::DashboardAgent", "Ray services"),
    ],
)
def test_kinds_of_processes(title: str, kind: str) -> None:
    assert kind_of(title) == kind
