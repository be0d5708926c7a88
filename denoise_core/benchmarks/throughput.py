"""Speed of `jobs.denoise` against the bare model and against a plain loop, on the same images.

bare model     stacked patches in memory through `Denoiser.predict`: nothing but the model
plain loop     one process, what one would write: decode, cut padded windows, predict in batches of
               the Keras model with TensorFlow's own threads, stitch, encode, write, image by image
denoiser loop  the same with `Denoiser.denoise`, the project's own, in the middle
jobs.denoise   the job as a user runs it

Each runs in a process of its own. The steady state is what was finished between the first and the
last tenth of the images; a whole run is a process from its start to its end.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from denoise_core import metrics
from denoise_core.benchmarks.child import ChildRun, call
from denoise_core.benchmarks.model import ModelConfig
from denoise_core.benchmarks.pictures import make_pngs, picture_files
from denoise_core.benchmarks.processes import JobRun, run_denoise
from denoise_core.benchmarks.tables import Result, number, table
from denoise_core.checkpoints import load_checkpoint
from denoise_core.config import require, setting
from denoise_core.denoiser import (
    CPU_BATCH_PIXELS,
    GPU_BATCH_PIXELS,
    Denoiser,
    Geometry,
    in_unit_range,
    resolve_geometry,
)
from denoise_core.devices import choose_precision, cores, import_tensorflow
from denoise_core.images import data_range, decode, encode, to_dtype
from denoise_core.patches import Context, Cut, batch_size, batches, cut, stack

Array = np.ndarray

# Pixels of the windows that the bare model gets, 12 bytes each in memory.
BARE_PIXELS = 30_000_000
MOST_PATCHES = 64  # of a batch: the Denoiser's own limit
PROBED_PIXELS = 8_000_000  # pixels on which the cost of the metrics is measured
# Windows that the plain loop predicts together. Of 1, 2, 4, 8, 16 and 32, 2 and 4 were the fastest
# on two cores: 0.6 Mpx/s of windows against 0.43 in batches of 32.
LOOP_BATCH = 4
BARE_STACK = 8  # patches for each thread of the bare model
SAMPLED_S = 3.0  # looking at every process takes time of the cores that the job is to have
OWN_SHARE = 5  # the loop with our Denoiser takes one image in so many; its steady state counts


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputConfig(ModelConfig):
    """Settings of `jobs.benchmark throughput`."""

    output: str = setting(help="Folder for throughput.md and throughput.json.", metavar="DIR")
    data: str | None = setting(
        None, "Photographs to make the images of; default: scikit-image's.", metavar="DIR"
    )
    megapixels: float = setting(200.0, "At least so many Mpx of PNG.", metavar="MPX")
    noise: float = setting(25.0, "Sigma of the added noise, of 255.", metavar="SIGMA")
    precision: str = setting(
        "auto", "Compute type of all three.", choices=("auto", "float32", "bfloat16")
    )
    actors: str = setting("auto", "Denoising actors of the job.", metavar="auto|N|MIN:MAX")
    bare_seconds: float = setting(20.0, "Least time of the bare model.", metavar="S")
    work: str | None = setting(
        None, "Folder for the images, removed at the end; default: the system's.", metavar="DIR"
    )

    def __post_init__(self) -> None:
        require(self.megapixels > 0, "--megapixels: expected a number above 0.")
        require(self.noise >= 0, "--noise: expected a number from 0.")


def run(config: ThroughputConfig) -> Result:
    """Make the images, run the three, compare."""
    config.load()
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=config.work) as folder:
        images = Path(folder) / "images"
        make_pngs(images, megapixels=config.megapixels, sigma=config.noise, data=config.data)
        same = {"folder": str(images), **config.named, "precision": config.precision}
        bare = call("throughput:bare_model", **same, least_s=config.bare_seconds)
        loop = call("throughput:plain_loop", **same, out=str(Path(folder) / "loop"))
        own = call("throughput:denoiser_loop", **same, out=str(Path(folder) / "own"))
        # Nothing is copied for its low noise: all three do the same work.
        job = run_denoise(
            [str(images)],
            Path(folder) / "job",
            *(*config.flags, "--precision", config.precision),
            *("--actors", config.actors, "--copy-below", "0"),
            every_s=SAMPLED_S,
        )
    data = {
        "bare_model": bare.value,
        "plain_loop": loop_figures(loop),
        "denoiser_loop": loop_figures(own),
        "job": job_figures(job),
        "processes": _cpu_by_kind(job),
        "images": len(job.rows),
        "cores": cores(),
    }
    data["ratios"] = ratios(data)
    return Result("throughput", "Throughput", _body(data), data)


# --- what runs in processes of its own ----------------------------------------------------------


def bare_model(
    folder: str, model: str, model_range: str, precision: str, least_s: float
) -> dict[str, Any]:
    """Time `Denoiser.predict` on full batches of the images' own patches.

    Mpx/s of cores, the pixels that come out, and of windows, which have the halo.
    """
    denoiser = Denoiser(load_checkpoint(model, model_range=model_range), precision=precision)
    stacks, core, window = _stacks(denoiser, picture_files(folder))
    for each in {(batch.shape, context): (batch, context) for batch, context in stacks}.values():
        denoiser.predict(*each)
    passes, started = 0, time.perf_counter()
    while passes == 0 or time.perf_counter() - started < least_s:
        for each in stacks:
            denoiser.predict(*each)
        passes += 1
    seconds = time.perf_counter() - started
    return {
        "mpx_per_s": passes * core / 1e6 / seconds,
        "window_mpx_per_s": passes * window / 1e6 / seconds,
        "batches": len(stacks),
        "passes": passes,
        "seconds": seconds,
        "precision": denoiser.precision,
        "device": denoiser.device,
        "patch": denoiser.geometry.patch,
        "halo": denoiser.geometry.halo,
    }


def _stacks(
    denoiser: Denoiser, files: Sequence[Path]
) -> tuple[list[tuple[Array, Context]], int, int]:
    """Full batches of the first images' patches, and the pixels of their cores and windows."""
    images = []
    for path in files:
        images.append(decode(path.read_bytes(), name=path.name).pixels)
        if sum(pixels[..., 0].size for pixels in images) >= BARE_PIXELS:
            break
    todo = [
        Cut(source, patch, None, denoiser.context(patch))
        for source, pixels in enumerate(images)
        for (region,) in [denoiser.geometry.regions(*pixels.shape[:2])]
        for patch in region.patches
    ]
    limit = GPU_BATCH_PIXELS if denoiser.device == "gpu" else CPU_BATCH_PIXELS
    # On a CPU a stack is patches that go alone, in as many threads: enough for all to be busy.
    limit *= BARE_STACK * denoiser.threads if denoiser.threads > 1 else 1
    stacks: list[tuple[Array, Context]] = []
    core = window = 0
    for batch in batches(todo, batch_pixels=limit, most=MOST_PATCHES):
        shape = batch[0].patch.shape
        if len(batch) < batch_size(shape, batch_pixels=limit, most=MOST_PATCHES) and stacks:
            continue
        windows = [_window(images[item.source], item) for item in batch]
        stacks.append((stack(windows), batch[0].context))
        window += len(batch) * shape[0] * shape[1]
        core += sum(
            (item.patch.y.stop - item.patch.y.start) * (item.patch.x.stop - item.patch.x.start)
            for item in batch
        )
    return stacks, core, window


def _window(pixels: Array, item: Cut) -> Array:
    low, high = data_range(pixels)
    return cut(pixels, item.patch, origin=(0, 0), low=low, high=high)


def plain_loop(
    folder: str, out: str, model: str, model_range: str, precision: str
) -> dict[str, Any]:
    """What one would write without the job; returns times of every image and of the metrics."""
    tf = import_tensorflow()
    checkpoint = load_checkpoint(model, model_range=model_range)
    network = checkpoint.build(precision=choose_precision(precision, tf))
    shape = tf.TensorSpec((None, None, None, 3), tf.float32)
    predict = tf.function(in_unit_range(network, checkpoint.card), input_signature=[shape])
    geometry = resolve_geometry(checkpoint.card, patch="256", halo="auto")

    def denoise(pixels: Array) -> Array:
        return _plainly(pixels, lambda x: predict(tf.constant(x)).numpy(), geometry=geometry)

    denoise(np.zeros((256, 256, 3), np.uint8))
    return _loop(denoise, folder=folder, out=out)


def _plainly(pixels: Array, predict: Callable[[Array], Array], *, geometry: Geometry) -> Array:
    """Pad (H, W, 3) uint8 by reflection to whole windows, predict batches of them, paste cores."""
    core, halo = geometry.patch, geometry.halo
    height, width = pixels.shape[:2]
    more = [(halo, halo + -side % core) for side in (height, width)]
    padded = np.pad(pixels, (*more, (0, 0)), "reflect").astype(np.float32) / np.float32(255)
    side = core + 2 * halo
    corners = [(y, x) for y in range(0, height, core) for x in range(0, width, core)]
    result = np.empty((*(-(-size // core) * core for size in (height, width)), 3), np.uint8)
    for start in range(0, len(corners), LOOP_BATCH):
        batch = corners[start : start + LOOP_BATCH]
        outputs = predict(np.stack([padded[y : y + side, x : x + side] for y, x in batch]))
        for (y, x), output in zip(batch, outputs, strict=True):
            values = output[halo : halo + core, halo : halo + core]
            result[y : y + core, x : x + core] = np.rint(np.clip(values, 0, 1) * 255)
    return result[:height, :width]


def denoiser_loop(
    folder: str, out: str, model: str, model_range: str, precision: str
) -> dict[str, Any]:
    """The plain loop with the project's `Denoiser`, without Ray."""
    denoiser = Denoiser(load_checkpoint(model, model_range=model_range), precision=precision)
    denoiser.warm_up()

    def denoise(pixels: Array) -> Array:
        return to_dtype(denoiser.denoise([pixels])[0], "uint8", 0.0, 255.0)

    return _loop(denoise, folder=folder, out=out, every=OWN_SHARE)


def _loop(
    denoise: Callable[[Array], Array], *, folder: str, out: str, every: int = 1
) -> dict[str, Any]:
    Path(out).mkdir(parents=True)
    began, files = time.time(), picture_files(folder)[::every]
    images = [_one_image(denoise, path, Path(out) / path.name) for path in files]
    return {
        "began": began,
        "images": images,
        "metrics_ms_per_mpx": _metrics_cost(files, Path(out)),
        "threads": cores(),
    }


def _one_image(denoise: Callable[[Array], Array], source: Path, target: Path) -> dict[str, float]:
    times = [time.perf_counter()]
    image = decode(source.read_bytes(), name=source.name)
    times.append(time.perf_counter())
    values = denoise(image.pixels)
    times.append(time.perf_counter())
    content, _ = encode(values, image.alpha, image.metadata)
    target.write_bytes(content)
    times.append(time.perf_counter())
    spent = dict(zip(("read_ms", "denoise_ms", "write_ms"), np.diff(times) * 1e3, strict=True))
    height, width = image.pixels.shape[:2]
    return {
        "megapixels": height * width / 1e6,
        "finished": time.time(),
        **{name: float(value) for name, value in spent.items()},
    }


def _metrics_cost(files: Sequence[Path], out: Path) -> float:
    """Milliseconds for 1 Mpx of what the job measures beyond denoising, in one thread."""
    seconds = pixels = 0.0
    for path in files:
        noisy = decode(path.read_bytes(), name=path.name).pixels
        denoised = decode((out / path.name).read_bytes(), name=path.name).pixels
        started = time.perf_counter()
        metrics.estimate_sigma(noisy, data_range=255)
        metrics.estimate_sigma(denoised, data_range=255)
        metrics.residual_sums(noisy, denoised, lo=0, hi=255, cuts_y=(256,), cuts_x=(256,)).stats()
        seconds += time.perf_counter() - started
        pixels += noisy[..., 0].size
        if pixels >= PROBED_PIXELS:
            break
    return seconds * 1e3 / (pixels / 1e6)


# --- figures ------------------------------------------------------------------------------------


def steady_rate(finished: Sequence[tuple[float, float]]) -> float | None:
    """Mpx/s between 10 % and 90 % of the images, from their (time, Mpx) in order of time.

    None where no time passes between them.
    """
    last_place = len(finished) - 1
    first, last = math.floor(0.1 * last_place), math.ceil(0.9 * last_place)
    if last <= first:
        return None
    seconds = finished[last][0] - finished[first][0]
    total = sum(size for _, size in finished[first + 1 : last + 1])
    return total / seconds if seconds > 0 else None


def _stages(images: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {
        stage: sum(image[f"{stage}_ms"] or 0.0 for image in images) / 1e3
        for stage in ("read", "denoise", "write")
    }


def loop_figures(loop: ChildRun) -> dict[str, Any]:
    """Figures of the plain loop. Its process ends with the last image; the metrics come after."""
    images = loop.value["images"]
    finished = [(image["finished"], image["megapixels"]) for image in images]
    return _figures(
        finished, started=loop.started_at, ended=finished[-1][0], work=_stages(images)
    ) | {
        "peak_rss": loop.peak_rss,
        "without_startup_mpx_per_s": sum(size for _, size in finished)
        / (finished[-1][0] - loop.value["began"]),
        "metrics_ms_per_mpx": loop.value["metrics_ms_per_mpx"],
    }


def job_figures(job: JobRun) -> dict[str, Any]:
    """Figures of the job, by its rows and its run.json."""
    ended = job.started_at + job.seconds
    figures = _figures(job.finished, started=job.started_at, ended=ended, work=_stages(job.rows))
    names = ("seconds", "first_image_seconds", "megapixels")
    return figures | {"run_json": {name: job.run[name] for name in names}}


def _figures(
    finished: Sequence[tuple[float, float]],
    *,
    started: float,
    ended: float,
    work: dict[str, float],
) -> dict[str, Any]:
    total = sum(size for _, size in finished)
    return {
        "megapixels": total,
        "seconds": ended - started,
        "mpx_per_s": total / (ended - started),
        "steady_mpx_per_s": steady_rate(finished),
        "first_image_s": finished[0][0] - started,
        "after_last_image_s": ended - finished[-1][0],
        "work_s": work,
    }


def ratios(data: dict[str, Any]) -> dict[str, float | None]:
    """The job against the loop and the bare model, from their figures."""
    job, loop, bare = data["job"], data["plain_loop"], data["bare_model"]
    own = data["denoiser_loop"]

    def quotient(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    return {
        "job_to_loop_steady": quotient(job["steady_mpx_per_s"], loop["steady_mpx_per_s"]),
        "job_to_loop_whole": quotient(job["mpx_per_s"], loop["mpx_per_s"]),
        "job_to_denoiser_loop_steady": quotient(job["steady_mpx_per_s"], own["steady_mpx_per_s"]),
        "job_whole_to_loop_without_startup": quotient(
            job["mpx_per_s"], loop["without_startup_mpx_per_s"]
        ),
        "job_to_bare_steady": quotient(job["steady_mpx_per_s"], bare["mpx_per_s"]),
        "loop_to_bare_steady": quotient(loop["steady_mpx_per_s"], bare["mpx_per_s"]),
    }


def _cpu_by_kind(job: JobRun) -> dict[str, float]:
    return {
        kind: sum(process.cpu_s for process in group) for kind, group in job.watched.kinds().items()
    }


# --- words --------------------------------------------------------------------------------------


def _body(data: dict[str, Any]) -> str:
    job, bare, shares = data["job"], data["bare_model"], data["ratios"]
    head = (
        f"{data['images']} PNG images, {job['megapixels']:.1f} Mpx, 8-bit RGB; "
        f"{bare['device']}, {bare['precision']}, patches of {bare['patch']} with a halo of "
        f"{bare['halo']}. Steady: between the first and the last tenth of the images. Whole: the "
        "process from its start to its end."
    )
    verdict = (
        f"Job to plain loop: **{number(shares['job_to_loop_steady'])}** steady, "
        f"**{number(shares['job_to_loop_whole'])}** whole runs (start-up of both), "
        f"{number(shares['job_whole_to_loop_without_startup'])} whole run against a loop whose "
        f"start-up is not counted. Job to the loop with the project's own Denoiser: "
        f"{number(shares['job_to_denoiser_loop_steady'])} steady. Job to bare model, steady: "
        f"{number(shares['job_to_bare_steady'])}."
    )
    parts = [head, _rates(data), verdict, _work(data), _cpu(data)]
    return "\n\n".join(parts)


def _rates(data: dict[str, Any]) -> str:
    bare, loop, job = data["bare_model"], data["plain_loop"], data["job"]
    header = ("", "steady Mpx/s", "whole Mpx/s", "first image after", "after the last", "whole")
    model = ("bare model, patches in memory", number(bare["mpx_per_s"]), *["-"] * 4)
    rows = [
        (
            name,
            number(each["steady_mpx_per_s"]),
            number(each["mpx_per_s"]),
            f"{each['first_image_s']:.1f} s",
            f"{each['after_last_image_s']:.1f} s",
            f"{each['seconds']:.1f} s",
        )
        for name, each in (
            ("plain loop, one process", loop),
            ("the same with our `Denoiser`, a fifth of the images", data["denoiser_loop"]),
            ("`jobs.denoise`", job),
        )
    ]
    note = (
        f"The bare model's pixels are those that come out; with the halo it computes "
        f"{bare['window_mpx_per_s']:.2f} Mpx/s."
    )
    return f"{table(header, [model, *rows])}\n\n{note}"


def _work(data: dict[str, Any]) -> str:
    """Time that images spent in each stage; in the job, stages overlap and share the cores."""
    job, loop = data["job"], data["plain_loop"]
    whole = sum(job["work_s"].values()) or 1.0
    header = ("stage", "job: seconds", "share", "job: ms/Mpx", "loop: ms/Mpx")
    rows = [
        (
            stage,
            number(seconds, 1),
            f"{seconds / whole:.0%}",
            number(seconds * 1e3 / job["megapixels"], 0),
            number(loop["work_s"][stage] * 1e3 / loop["megapixels"], 0),
        )
        for stage, seconds in job["work_s"].items()
    ]
    measured = loop["metrics_ms_per_mpx"]
    note = (
        "Wall time inside the stages; in the job they overlap and wait for each other's cores. "
        "Its read and write include the metrics (noise in and out, residual): "
        f"{measured:.0f} ms/Mpx measured alone in one thread, "
        f"{measured * job['megapixels'] / 1e3 / whole:.0%} of the job's work; the loop has none."
    )
    return f"{table(header, rows)}\n\n{note}"


def _cpu(data: dict[str, Any]) -> str:
    job = data["job"]
    there = job["seconds"] * data["cores"]
    used = data["processes"]
    rows = [
        (kind, number(seconds, 1), f"{seconds / there:.0%}")
        for kind, seconds in sorted(used.items(), key=lambda pair: -pair[1])
    ]
    rest = max(0.0, there - sum(used.values()))
    rows.append(("idle, or used by other programs", number(rest, 1), f"{rest / there:.0%}"))
    header = ("the job's processes", "CPU seconds", f"share of {data['cores']} core(s), whole run")
    return table(header, rows)
