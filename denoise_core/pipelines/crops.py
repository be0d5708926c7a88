"""The crops of one training worker, made by Ray Data in a process of its own, or some beside a GPU.

Those have no TensorFlow: to import it would take longer than all else at their start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import ray.data

from denoise_core.config import TrainConfig
from denoise_core.pipelines.cluster import set_data_context
from denoise_core.presets import Preset, Stage
from denoise_core.training import places_of
from denoise_core.training_data import Picture, Sampler

# One row of the stream holds a step; its blocks hold about so many bytes.
BLOCK_BYTES = 8_000_000
# A stream ends after so many steps and is begun anew.
STREAM_STEPS = 50_000
# What it asks of Ray for each process.
STREAM_CPUS = 0.1
# A GPU takes more small batches in a second than one process makes. Each further one keeps its own
# images, up to training_data.CACHE_BYTES.
CPUS_OF_MAKER, MOST_MAKERS = 4, 4

Array = np.ndarray


class _MakeBatches:
    """Rows of steps -> rows with that step's crops of one worker. Keeps the images it has read."""

    def __init__(
        self, pictures: Any, config: TrainConfig, preset: Preset, stage: Stage, places: range
    ) -> None:
        self.sampler = Sampler.make(ray.get(pictures), config, preset)
        self.stage, self.places = stage, places

    def __call__(self, table: dict[str, Array]) -> dict[str, Array]:
        """Return `noisy` and `clean`, float32 (steps, share, crop, crop, C), of each step."""
        crop, size = self.stage.crop, self.stage.batch
        pairs = [
            self.sampler.batch(step=int(step), crop=crop, places=self.places, size=size)
            for step in table["step"]
        ]
        noisy, clean = zip(*pairs, strict=True)
        return {"noisy": np.stack(noisy), "clean": np.stack(clean)}


def makers(host: dict[str, float], *, gpus: float) -> int:
    """Return the processes that make the crops of a worker with `gpus` of its host's resources."""
    if not gpus or not host.get("GPU"):
        return 1
    beside = host.get("CPU", 0.0) * gpus / host["GPU"]
    return max(1, min(MOST_MAKERS, int(beside / CPUS_OF_MAKER)))


class RayStream:
    """A `training.Source`: Ray Data makes the batches of one worker in processes of its own."""

    def __init__(
        self, pictures: list[Picture], config: TrainConfig, preset: Preset, *, rank: int
    ) -> None:
        self.pictures = ray.put(pictures)
        self.config, self.preset, self.rank = config, preset, rank
        here = ray.get_runtime_context().get_node_id()
        host = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
        self.makers = makers(host, gpus=config.gpus_per_worker or 0.0)
        # Of what cannot be kept each process would read all images.
        if self.makers > 1 and not Sampler.make(pictures, config, preset).keeps_all:
            self.makers = 1

    def __call__(self, stage: Stage, *, step: int) -> Iterator[tuple[Array, Array]]:
        """Yield batches from `step` on."""
        while True:
            yield from self._stream(stage, first=step, last=self._last(step))
            step = self._last(step)

    def _last(self, step: int) -> int:
        end = self.config.steps if self.config.steps is not None else step + STREAM_STEPS
        return max(step + 1, min(end, step + STREAM_STEPS))

    def _stream(self, stage: Stage, *, first: int, last: int) -> Iterator[tuple[Array, Array]]:
        places = places_of(stage, rank=self.rank, workers=self.config.workers)
        size = len(places) * stage.crop**2 * self.preset.channels * 4 * 2
        together = max(1, min(64, BLOCK_BYTES // size))
        set_data_context(ordered=True)
        # From items, not from a range: reading tasks would want CPUs of which there may be none.
        dataset = ray.data.from_items(
            [{"step": step} for step in range(first, last)],
            override_num_blocks=max(1, -(-(last - first) // together)),
        ).map_batches(
            _MakeBatches,
            fn_constructor_args=(self.pictures, self.config, self.preset, stage, places),
            batch_format="numpy",
            batch_size=together,
            compute=ray.data.ActorPoolStrategy(size=self.makers),
            num_cpus=STREAM_CPUS,
        )
        for table in dataset.iter_batches(
            batch_size=together, batch_format="numpy", prefetch_batches=2
        ):
            yield from zip(table["noisy"], table["clean"], strict=True)
