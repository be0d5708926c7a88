"""How many devices the job keeps busy: the real pipeline with a device that sleeps, 1 to 64 actors.

Each number of actors is a run of `python -m jobs.benchmark simulate` (`simulation.py`), whose
processes are watched. The device takes the time for a window that the shipped model was measured to
take here, or that `--patch-ms` says, divided by `--speedup`. Fewer actors get fewer images, so that
all runs last as long. Steady: from when every actor is at work and a tenth of the images is
finished until nine tenths are.

What a million images on 64 GPUs would take is then a line of formulas on what was measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from denoise_core.benchmarks.child import call
from denoise_core.benchmarks.model import ModelConfig
from denoise_core.benchmarks.processes import Moment, Watched, watch
from denoise_core.benchmarks.quality import split_words
from denoise_core.benchmarks.simulation import PIXELS
from denoise_core.benchmarks.tables import Result, megabytes, number, table
from denoise_core.checkpoints import load_checkpoint
from denoise_core.config import require, setting
from denoise_core.denoiser import GPU_BATCH_PIXELS, Denoiser
from denoise_core.devices import cores
from denoise_core.errors import UsageError
from denoise_core.tiling import Patch, Tile

BUSY = 0.95
# Ours and others' work leaves less than this share of the cores idle: the machine is saturated.
IDLE = 0.05
CHANNELS = 3
MOST_PATCHES = 64
STACK = 8  # windows for each thread of a CPU
# Kinds of processes -> what the tables call them; the others are Ray's services.
KINDS = {
    "driver (jobs.denoise)": "driver",
    "small actors of the job": "ledger",
    "task worker (read, write)": "tasks",
    "idle worker": "tasks",
    "denoise actor": "actors",
}
SERVICES = "services"
LOADS = (*dict.fromkeys(KINDS.values()), SERVICES)
# One process each, however large the cluster; tasks and actors spread over it.
ALONE = ("driver", "ledger")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleConfig(ModelConfig):
    """Settings of `jobs.benchmark scale`."""

    output: str = setting(help="Folder for scale.md and scale.json.", metavar="DIR")
    model: str = setting("unet-s", "The model that the device stands for.", metavar="NAME|PATH")
    actors: str = setting("1,2,4,8,16,32,64", "Numbers of actors, a run for each.", metavar="N,N")
    images: int = setting(10_000, "Images of the run with the most actors.", metavar="N")
    least: int = setting(
        500, "Fewer actors get fewer images, in proportion, but at least so many.", metavar="N"
    )
    patch_ms: float | None = setting(
        None, "Milliseconds of the device for a window; default: measured here.", metavar="MS"
    )
    speedup: float = setting(10.0, "The device sleeps this many times shorter.", metavar="F")
    patch_seconds: float = setting(20.0, "Least time of measuring a window.", metavar="S")
    most_bytes: int = setting(
        200_000, "An item carries its pixels' bytes, but at most so many.", metavar="N"
    )
    gpus: int = setting(64, "GPUs of the projection.", metavar="N")
    million: int = setting(1_000_000, "Images of the projection.", metavar="N")
    every: float = setting(2.0, "Seconds between two samples of the processes.", metavar="S")

    def __post_init__(self) -> None:
        require(self.images >= 1, "--images: expected a number from 1.")
        require(self.least >= 1, "--least: expected a number from 1.")
        require(self.patch_ms is None or self.patch_ms > 0, "--patch-ms: expected more than 0.")
        require(self.speedup > 0, "--speedup: expected a number above 0.")
        require(self.every > 0, "--every: expected a number above 0.")
        require(self.gpus >= 1 and self.million >= 1, "--gpus, --million: expected 1 or more.")
        require(bool(self.counts), "--actors: expected numbers from 1, such as 1,4,16.")

    @property
    def counts(self) -> list[int]:
        """The numbers of actors, in rising order. Raises UsageError."""
        words = split_words(self.actors)
        if not all(word.isdigit() and int(word) for word in words):
            raise UsageError(f"--actors {self.actors}: expected numbers from 1, such as 1,4,16.")
        return sorted({int(word) for word in words})

    def images_of(self, actors: int) -> int:
        """The images of the run with so many actors."""
        share = round(self.images * actors / self.counts[-1])
        return min(self.images, max(self.least, share))


def run(config: ScaleConfig) -> Result:
    """Measure the device, run every number of actors, project."""
    config.load()
    device = (
        {"patch_ms": config.patch_ms}
        if config.patch_ms is not None
        else call("scale:patch_time", **config.named, least_s=config.patch_seconds).value
    )
    runs = [_simulated(actors, device["patch_ms"], config) for actors in config.counts]
    data = {
        "device": device,
        "speedup": config.speedup,
        "most_bytes": config.most_bytes,
        "cores": cores(),
        "runs": runs,
    }
    data["projection"] = project(data, gpus=config.gpus, images=config.million)
    title = f"Scale: {config.counts[0]} to {config.counts[-1]} actors"
    return Result("scale", title, _body(data), data)


def patch_time(model: str, model_range: str, least_s: float) -> dict[str, Any]:
    """Time the bare model on windows of full size, with all of this machine's device."""
    denoiser = Denoiser(load_checkpoint(model, model_range=model_range))
    halo = denoiser.geometry.halo
    side = denoiser.geometry.patch + 2 * halo
    gpu = max(1, min(MOST_PATCHES, GPU_BATCH_PIXELS // side**2))
    count = gpu if denoiser.device == "gpu" else STACK * denoiser.threads
    channels = int(denoiser.card["arguments"].get("channels", 3))
    batch = np.random.default_rng(0).random((count, side, side, channels), np.float32)
    tile = Tile(halo, side - halo, 0, side)
    context = denoiser.context(Patch(tile, tile))
    denoiser.predict(batch, context)
    done, started = 0, time.perf_counter()
    while done == 0 or time.perf_counter() - started < least_s:
        denoiser.predict(batch, context)
        done += count
    seconds = time.perf_counter() - started
    return {
        "patch_ms": seconds * 1e3 / done,
        "windows": done,
        "side": side,
        "device": denoiser.device,
        "precision": denoiser.precision,
    }


def _simulated(actors: int, patch_ms: float, config: ScaleConfig) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        command = [
            *(sys.executable, "-m", "jobs.benchmark", "simulate", "--output", folder),
            *("--actors", str(actors), "--images", str(config.images_of(actors))),
            *("--patch-ms", repr(patch_ms / config.speedup), *config.flags),
            *("--most-bytes", str(config.most_bytes)),
        ]
        watched, _ = watch(command, every_s=config.every, memory=False)
        simulation = json.loads((Path(folder) / "simulation.json").read_text())
    return figures(simulation, watched, actors=actors)


# --- figures ------------------------------------------------------------------------------------


def figures(simulation: dict[str, Any], watched: Watched, *, actors: int) -> dict[str, Any]:
    """What one run was: loads for each image, and what its steady time shows."""
    images = simulation["images"]
    count = len(images)
    pixels = sum(height * width for height, width in (each["size"] for each in images))
    window = steady_window(images, actors=actors)
    return {
        "actors": actors,
        "images": count,
        "megapixels": pixels / 1e6,
        "pixel_bytes": CHANNELS * pixels / count,
        "carried_bytes": _mean(images, "carried"),
        "patches": _mean(images, "patches"),
        "device_s": _mean(images, "device_s"),
        "wall_s": simulation["wall_s"],
        "rows_cpu_s": simulation["rows_cpu_s"] / count,
        "table_bytes": simulation["table_bytes"] / count,
        "store": store_load(simulation["operators"], count),
        "operators": simulation["operators"],
        "most_bytes_held": simulation["most_bytes_held"],
        "steady": _steady(images, watched, window, actors) if window else None,
    }


def _mean(images: Sequence[dict[str, Any]], name: str) -> float:
    return sum(float(each[name]) for each in images) / len(images)


def store_load(operators: dict[str, dict[str, int]], images: int) -> dict[str, float]:
    """Return Ray's tasks, and the blocks and bytes that they make, for each image."""
    return {
        name: sum(each[name] for each in operators.values()) / images
        for name in ("tasks", "blocks", "bytes", "spilled")
    }


def steady_window(images: Sequence[dict[str, Any]], *, actors: int) -> tuple[float, float] | None:
    """Return (start, end) of the time in which all actors had work; None where there was none."""
    begun: dict[str, float] = {}
    for image in images:
        begun[image["actor"]] = min(image["began"], begun.get(image["actor"], image["began"]))
    finished = sorted(image["finished"] for image in images)
    start = max(finished[len(finished) // 10], *begun.values())
    end = finished[(9 * len(finished)) // 10]
    return (start, end) if len(begun) == actors and start < end else None


def busy_share(
    images: Sequence[dict[str, Any]], window: tuple[float, float], *, actors: int
) -> float:
    """Return the share of the actors' time in the window in which the device was at work.

    Of a sleep only what was asked for counts: what the machine overslept is not work.
    """
    start, end = window
    worked = sum(
        max(0.0, min(end, each["began"] + each["device_s"]) - max(start, each["began"]))
        for each in images
    )
    return worked / (actors * (end - start))


def _steady(
    images: Sequence[dict[str, Any]], watched: Watched, window: tuple[float, float], actors: int
) -> dict[str, Any]:
    start, end = window
    done = sum(start < each["finished"] <= end for each in images)
    # Samples are seconds apart: their CPU time goes by the images finished between the two.
    first, last = _between(watched.history, start, end)
    seen = max(1, sum(first.at < each["finished"] <= last.at for each in images))
    passed, spent = last.at - first.at, _cpu_by_kind(watched, first, last)
    return {
        "seconds": end - start,
        "images_per_s": done / (end - start),
        "busy": busy_share(images, window, actors=actors),
        "cpu_s_per_image": {kind: used / seen for kind, used in spent.items()},
        "cores_used": sum(spent.values()) / passed,
        "idle_share": max(0.0, last.idle_s - first.idle_s) / (passed * cores()),
        "driver_own": last.root_own,
        "driver_own_per_image": (last.root_own - first.root_own) / seen,
    }


def _between(history: Sequence[Moment], start: float, end: float) -> tuple[Moment, Moment]:
    """Return the first sample from `start` on and the last up to `end`, or the nearest two."""
    times = [moment.at for moment in history]
    first = min(bisect_left(times, start), len(times) - 2)
    last = max(bisect_left(times, end) - 1, first + 1)
    return history[first], history[last]


def _cpu_by_kind(watched: Watched, first: Moment, last: Moment) -> dict[str, float]:
    spent = dict.fromkeys(LOADS, 0.0)
    for pid, used in last.cpu_s.items():
        name = KINDS.get(watched.processes[pid].kind, SERVICES)
        spent[name] += used - first.cpu_s.get(pid, 0.0)
    return spent


def cpu_load(steady: Sequence[dict[str, Any]], kind: str) -> tuple[float, float]:
    """Return (cores, CPU seconds): what a kind of process takes at rest, and more for each image.

    The line of least squares through cores used by images/s; of one run all is for its images.
    """
    rates = np.array([each["images_per_s"] for each in steady])
    used = rates * np.array([each["cpu_s_per_image"][kind] for each in steady])
    if np.ptp(rates) > 0:
        slope, rest = np.polyfit(rates, used, 1)
        if slope > 0 and rest >= 0:
            return float(rest), float(slope)
    return 0.0, float(used.sum() / rates.sum())


def project(data: dict[str, Any], *, gpus: int, images: int) -> dict[str, Any] | None:
    """Return what so many images on so many GPUs would take; None where no run was steady.

    What is done once, the driver's memory and the store's load are by the run with the most images.
    A CPU second is one of a core here.
    """
    steady = [each["steady"] for each in data["runs"] if each["steady"]]
    if not steady:
        return None
    largest = max((each for each in data["runs"] if each["steady"]), key=_images)
    once = {name: seconds / largest["images"] for name, seconds in largest["wall_s"].items()}
    loads = {kind: cpu_load(steady, kind) for kind in LOADS}
    # Seconds for an image that one process takes of a core of its own, of which it rests some.
    alone = {kind: loads[kind][1] / max(1e-3, 1 - loads[kind][0]) for kind in ALONE}
    device_s = largest["device_s"] * data["speedup"]
    seconds = {
        "plan": images * once["plan"],
        "devices": images * device_s / gpus,
        **{kind: images * each for kind, each in alone.items()},
        "publish": images * once["publish"],
        "report": images * once["report"],
    }
    bottleneck = max(("devices", *ALONE), key=lambda name: seconds[name])
    rate, slowest = images / seconds[bottleneck], max(alone.values())
    # Pixels that the items did not carry would go the same way as those that they did.
    store, real = largest["store"], largest["pixel_bytes"] / largest["carried_bytes"]
    return {
        "images_of_largest": largest["images"],
        "gpus": gpus,
        "images": images,
        "device_s": device_s,
        "loads": loads,
        "alone_s": slowest,
        "seconds": seconds,
        "bottleneck": bottleneck,
        "whole_s": images / rate + sum(seconds[name] for name in ("plan", "publish", "report")),
        "images_per_s": rate,
        "most_gpus": device_s / slowest,
        "least_patch_ms": data["device"]["patch_ms"] * slowest * gpus / device_s,
        "cores": {kind: loads[kind][0] + loads[kind][1] * rate for kind in ("tasks", SERVICES)},
        "rows_cpu_s": largest["rows_cpu_s"] * images,
        "table_bytes": largest["table_bytes"] * images,
        "driver_own": largest["steady"]["driver_own"]
        + largest["steady"]["driver_own_per_image"] * images,
        "copies": store["bytes"] / largest["carried_bytes"],
        "store_bytes": store["bytes"] * real,
        "store_bytes_per_s_and_gpu": store["bytes"] * real * rate / gpus,
        "held_bytes_per_gpu": largest["most_bytes_held"] * real / largest["actors"],
    }


def _images(each: dict[str, Any]) -> int:
    return int(each["images"])


# --- words --------------------------------------------------------------------------------------


def _body(data: dict[str, Any]) -> str:
    parts = [_head(data), _rates(data), _verdict(data), _loads(data), _projection(data)]
    return "\n\n".join(part for part in parts if part)


def _head(data: dict[str, Any]) -> str:
    device, first = data["device"], data["runs"][-1]
    measured = (
        f"measured here ({device['device']}, {device['precision']}, {device['side']} px, "
        f"{device['windows']} windows)"
        if "device" in device
        else "as given"
    )
    low, high = (f"{pixels / 1e6:g}" for pixels in PIXELS)
    return (
        f"The device is a sleep: {number(device['patch_ms'], 3)} ms for a window of full size, "
        f"{measured}, divided by {data['speedup']:g}. Images of {low} to {high} Mpx, evenly over "
        f"the logarithm, are {first['megapixels'] / first['images']:.1f} Mpx and "
        f"{first['patches']:.0f} patches on average, {first['device_s'] * 1e3:.0f} ms of the "
        "device so shortened. Pipeline, order, settings, ledger, journal, table and page are the "
        "job's; reading, decoding, measuring, cutting, pasting and encoding are not there. An item "
        f"carries its pixels' bytes up to {data['most_bytes']:,}. Steady: from when all actors "
        "work and a tenth of the images is finished until nine tenths are."
    )


def _rates(data: dict[str, Any]) -> str:
    header = (
        *("actors", "images", "steady for", "images/s", "device busy", "cores used", "idle cores"),
        *(f"{kind}, CPU ms/image" for kind in LOADS),
    )
    return table(header, [_rate(each, len(header)) for each in data["runs"]])


def _rate(each: dict[str, Any], columns: int) -> list[str]:
    steady, words = each["steady"], [str(each["actors"]), f"{each['images']:,}"]
    if steady is None:
        return [*words, "-", *["-"] * (columns - len(words) - 1)]
    return [
        *words,
        f"{steady['seconds']:.0f} s",
        number(steady["images_per_s"]),
        f"{steady['busy']:.3f}",
        number(steady["cores_used"]),
        number(steady["idle_share"] * cores()),
        *(number(seconds * 1e3, 1) for seconds in steady["cpu_s_per_image"].values()),
    ]


def _verdict(data: dict[str, Any]) -> str:
    steady = [each for each in data["runs"] if each["steady"]]
    if not steady:
        return "No run was steady: give more --images, or less --speedup."
    busy = [each["actors"] for each in steady if each["steady"]["busy"] >= BUSY]
    full = [each["actors"] for each in steady if each["steady"]["idle_share"] < IDLE]
    last = steady[-1]
    cost = sum(last["steady"]["cpu_s_per_image"].values())
    most = data["cores"] / cost
    return (
        f"Actors were busy for {BUSY} of their time or more with: "
        f"{', '.join(map(str, busy)) or 'no number'}. The machine had less than {IDLE:.0%} of its "
        f"cores idle, other programs' work included, with: {', '.join(map(str, full)) or 'none'}. "
        f"At {cost * 1e3:.0f} ms of CPU for each image (the last line), {data['cores']} core(s) "
        f"hold {most:.0f} images/s, which is {most * last['device_s']:.0f} actors of this device."
    )


def _loads(data: dict[str, Any]) -> str:
    header = (
        *("actors", "tasks/image", "blocks/image", "kB/image to the store", "spilled kB/image"),
        *(
            "most held at once, MB",
            "driver's own memory, MB",
            "growth of it, kB/image",
            "rows, CPU ms/image",
        ),
    )
    rows = [
        (
            str(each["actors"]),
            number(each["store"]["tasks"]),
            number(each["store"]["blocks"]),
            number(each["store"]["bytes"] / 1e3, 0),
            number(each["store"]["spilled"] / 1e3, 0),
            megabytes(each["most_bytes_held"]),
            megabytes(each["steady"] and each["steady"]["driver_own"]),
            number(each["steady"] and each["steady"]["driver_own_per_image"] / 1e3, 1),
            number(each["rows_cpu_s"] * 1e3),
        )
        for each in data["runs"]
    ]
    return table(header, rows)


def _projection(data: dict[str, Any]) -> str:
    each = data["projection"]
    if each is None:
        return ""
    seconds, loads = each["seconds"], each["loads"]
    n, g = f"{each['images']:,}", each["gpus"]
    per = {name: f"{value / each['images'] * 1e3:.3g} ms" for name, value in seconds.items()}
    device = f"{each['device_s']:.3g} s"
    alone = f"{each['alone_s'] * 1e3:.3g} ms"
    rows = [
        ("listing and planning", f"{n} x {per['plan']}", _time(seconds["plan"])),
        ("devices, always busy", f"{n} x {device} / {g}", _time(seconds["devices"])),
        *(
            (
                f"{kind}, one core",
                f"{n} x {loads[kind][1] * 1e3:.3g} ms / (1 - {loads[kind][0]:.3f})",
                _time(seconds[kind]),
            )
            for kind in ALONE
        ),
        ("rows to the table, at the end", f"{n} x {per['publish']}", _time(seconds["publish"])),
        ("report page", f"{n} x {per['report']}", _time(seconds["report"])),
        (
            "**whole run**",
            f"planning + {each['bottleneck']} + table + page",
            f"**{_time(each['whole_s'])}**",
        ),
        (
            f"GPUs that one driver feeds at {number(data['device']['patch_ms'], 3)} ms a window",
            f"{device} / {alone}",
            number(each["most_gpus"], 0),
        ),
        (
            f"a window must take at least, for {g} GPUs to be busy",
            f"{number(data['device']['patch_ms'], 3)} ms x {alone} x {g} / {device}",
            f"{each['least_patch_ms']:.3g} ms",
        ),
        *(
            (
                f"cores for {kind}, beside the images' own work",
                f"{loads[kind][0]:.3f} + {each['images_per_s']:.3g} images/s x "
                f"{loads[kind][1] * 1e3:.3g} ms",
                number(value, 1),
            )
            for kind, value in each["cores"].items()
        ),
        (
            "driver's memory at the end",
            "its own + growth x images",
            f"{each['driver_own'] / 1e9:.2f} GB",
        ),
        ("table of rows", f"{n} x bytes/image", f"{each['table_bytes'] / 1e6:,.0f} MB"),
        (
            "to the store, for each image",
            f"{each['copies']:.2f} times its pixels",
            f"{each['store_bytes'] / 1e6:.1f} MB",
        ),
        (
            "to the store, for each GPU",
            f"{each['images_per_s']:.3g} images/s x bytes / {g}",
            f"{each['store_bytes_per_s_and_gpu'] / 1e6:.1f} MB/s",
        ),
        (
            "held in the store, for each GPU",
            "most held x pixels / carried / actors",
            f"{each['held_bytes_per_gpu'] / 1e6:,.0f} MB",
        ),
    ]
    text = (
        f"**{n} images on {g} GPUs**: {_time(each['whole_s'])}, {each['images_per_s']:.3g} "
        f"images/s; the bottleneck: **{each['bottleneck']}**. The device's time is the unshortened "
        "one. CPU of driver, ledger, tasks and services: cores at rest + images/s x CPU of an "
        "image, a line through the runs; the rest by the run with "
        f"{each['images_of_largest']:,} images."
    )
    return f"{text}\n\n{table(('', 'formula', ''), rows)}"


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"
