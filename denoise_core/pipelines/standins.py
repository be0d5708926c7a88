"""Stand-ins for the stages that touch pixels: a device that sleeps, so that the rest is measured.

`Read` notes an image's size, which its name tells, and what a device would take for it; `Denoise`
sleeps so long; `Write` makes the row and no file. There are no pixels and no model. Tables, ledger,
attempts, deadlines and times are those of the stages that they replace.
"""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Any, ClassVar

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from denoise_core.denoiser import Geometry
from denoise_core.pipelines import stages
from denoise_core.pipelines.flow import Stages
from denoise_core.pipelines.job import Job
from denoise_core.pipelines.stages import Guard, Item, region_of

CHANNELS = 3


def stand_ins(*, patch_s: float, most_bytes: int) -> Stages:
    """Return stages whose device takes `patch_s` seconds for a window of full size.

    An item carries as many bytes as its 8-bit RGB pixels have, but at most `most_bytes`.
    """
    read = partial(Read, patch_s=patch_s, most_bytes=most_bytes)
    return Stages(read=read, denoise=Denoise, write=Write)


def size_in(path: str) -> tuple[int, int]:
    """Return (height, width) from `..._WIDTHxHEIGHT.jpg`."""
    match = re.search(r"_(\d+)x(\d+)\.", path)
    if match is None:
        raise ValueError(f"{path}: no size in the name")
    return int(match[2]), int(match[1])


def full_windows(geometry: Geometry, height: int, width: int) -> float:
    """Return the pixels of all windows of an image, in windows of full size.

    Those at its edges are smaller, and an image of up to two cores a side is one window.
    """
    (region,) = geometry.regions(height, width)
    rows, columns = (sum(tile.length for tile in axis) for axis in (region.rows, region.columns))
    return rows * columns / (geometry.patch + 2 * geometry.halo) ** 2


class Read(stages.Read):
    """Notes what there would be to know, and the seconds of the device; reads nothing."""

    def __init__(self, job: Job, ledger: Any, *, patch_s: float, most_bytes: int) -> None:
        super().__init__(job, ledger)
        self.patch_s, self.most_bytes = patch_s, most_bytes

    def _read(self, item: Item) -> None:
        height, width = size_in(item.facts["path"])
        item.facts |= {
            "size": [height, width],
            "shape": [height, width, CHANNELS],
            "dtype": "uint8",
            "has_alpha": False,
            "data_range": [0, 255],
            "sigma_in": 0.0,
            "device_s": full_windows(self.job.geometry, height, width) * self.patch_s,
        }
        item.metadata = b""
        item.pixels = bytes(min(height * width * CHANNELS, self.most_bytes))
        item.facts["carried"] = len(item.pixels)


class Denoise(stages.Denoise):
    """Sleeps as long as the device would work."""

    def __init__(self, job: Job, ledger: Any, *, threads: int | None, use_gpu: bool) -> None:
        self.job, self.guard = job, Guard(job, "denoise", ledger)
        self.actor = ray.get_runtime_context().get_actor_id()

    def _predict(self, items: list[Item]) -> None:
        for item in items:
            facts, began = item.facts, time.time()
            time.sleep(facts["device_s"])
            item.denoised = bytes(item.pixels.size)
            facts |= {
                "core_shape": facts["shape"],
                "patches": len(region_of(self.job, facts).patches),
                "device": "stand-in",
                "precision": "none",
                "began": began,
                "actor": self.actor,
            }


class Write(stages.Write):
    """Notes what a written image's row has; writes nothing."""

    def _write(self, item: Item) -> None:
        item.facts |= {
            "metadata_lost": [],
            "sigma_out": 0.0,
            "mean_shift": [0.0] * CHANNELS,
            "clipped_fraction": 0.0,
            "residual_autocorrelation": 0.0,
            "seam_ratio": 1.0,
        }


class StoreWatch(ExecutionCallback):
    """What Ray Data's blocks come to, for each operator and, as the most at once, for the run.

    Ray Data makes the instance itself, so the figures are the class's; one run for each process.
    """

    operators: ClassVar[dict[str, dict[str, int]]] = {}
    most_bytes: ClassVar[int] = 0

    def on_execution_step(self, executor: Any) -> None:
        """Note the bytes that blocks hold."""
        held = sum(op.metrics.obj_store_mem_used for op in executor._topology)
        StoreWatch.most_bytes = max(StoreWatch.most_bytes, int(held))

    def after_execution_succeeds(self, executor: Any) -> None:
        """Note blocks, bytes and tasks."""
        for op in executor._topology:
            StoreWatch.operators[op.name] = {
                "tasks": int(op.metrics.num_tasks_finished),
                "blocks": int(op.metrics.num_task_outputs_generated),
                "bytes": int(op.metrics.bytes_task_outputs_generated),
                "spilled": int(op.metrics.obj_store_mem_spilled),
            }
