"""Steps a second of training with Ray Data's crops against those with a batch already in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from denoise_core.benchmarks.child import call
from denoise_core.benchmarks.tables import Result, number, table
from denoise_core.config import TrainConfig, require, setting
from denoise_core.devices import configure_tensorflow
from denoise_core.training import prepare

NAMES = {
    "memory": "one batch in memory",
    "ray": "Ray Data (`--input ray`, the default)",
    "thread": "a thread of the worker (`--input thread`)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class InputConfig:
    """Settings of `jobs.benchmark input`."""

    output: str = setting(help="Folder for input.md and input.json.", metavar="DIR")
    data: str = setting(help="Folder of clean images.", metavar="DIR")
    preset: str = setting("unet-s", "What is trained.", metavar="NAME")
    steps: int = setting(200, "Steps that are timed, for each source.", metavar="N")
    warm: int = setting(
        200, "Steps before those: the images are read and decoded once, then kept.", metavar="N"
    )

    def __post_init__(self) -> None:
        require(self.steps >= 1, "--steps: expected a number from 1.")
        require(self.warm >= 1, "--warm: expected a number from 1.")


def run(config: InputConfig) -> Result:
    """Time the steps with each source, in a process of its own."""
    lengths = {"steps": config.steps, "warm": config.warm}
    rates = call("input:rates", data=config.data, preset=config.preset, **lengths).value
    memory = rates["memory"]
    rows = [
        (NAMES[name], number(rate), f"{rate / memory:.0%}" if name != "memory" else "")
        for name, rate in rates.items()
    ]
    body = (
        f"`{config.preset}`, first stage of its schedule, {config.steps} steps each after "
        f"{config.warm} untimed ones; the batch in memory is timed before and after the others.\n\n"
        + table(("crops from", "steps/s", "of the rate in memory"), rows)
    )
    return Result("input", "Input of training", body, {"steps_per_s": rates})


def rates(data: str, preset: str, steps: int, warm: int) -> dict[str, Any]:
    """Return steps a second by source."""
    from denoise_core.pipelines.train import input_rates

    configure_tensorflow(threads=None, use_gpu=False)
    plan = prepare(
        TrainConfig(data=(data,), output="/nonexistent/input-benchmark", preset=preset, steps=10**6)
    )
    return input_rates(plan, steps=steps, warm=warm)
