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
from helpers import job_environment

from denoise_core.benchmarks import QualityConfig, ThroughputConfig, pictures, quality, throughput
from denoise_core.benchmarks.child import call
from denoise_core.benchmarks.processes import Sampler, kind_of
from denoise_core.benchmarks.tables import command_line, table
from denoise_core.errors import RunFailed
from denoise_core.models.classical import CLASSICAL
from jobs.benchmark import main


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
@pytest.mark.timeout(900)
def test_all_runs_every_benchmark_and_joins_the_tables(
    clean_folder: Path, checkpoint: str, tmp_path: Path
) -> None:
    command = [
        *("all", "--output", str(tmp_path), "--model", checkpoint, "--data", str(clean_folder)),
        *("--megapixels", "0.9", "--limit", "1", "--side", "300", "--photo-sizes", "0.1,0.2"),
        *("--names", "500", "--bare-seconds", "0.1"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.benchmark", *command],
        env=job_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    joined = (tmp_path / "benchmark.md").read_text()
    for name in ("throughput", "quality", "precision", "memory", "listing"):
        read(tmp_path, name)
        assert (tmp_path / f"{name}.md").read_text() in joined
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


def test_listing_of_generated_names_and_of_a_rerun(tmp_path: Path) -> None:
    done = run("listing", "--output", str(tmp_path), "--names", "12000")
    assert done.exit_code == 0, done.output
    first, rerun = read(tmp_path, "listing")["cases"].values()
    assert (first["to_do"], first["skipped"], first["shards"]) == (12_000, 0, 2)
    assert (rerun["to_do"], rerun["skipped"], rerun["shards"]) == (0, 12_000, 0)
    assert all(each["rss_before"] <= each["peak_rss"] < 1e9 for each in (first, rerun))


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


def test_sampler_sees_the_memory_of_a_grandchild() -> None:
    hold = "x = bytearray(b'1' * 80_000_000); import time; time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], start_new_session=True) as job:
        sampler = Sampler(job.pid, every_s=0.05, memory=True)
        sampler.start()
        until = time.monotonic() + 30
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
