"""Measure speed, quality, precision, memory, listing and scale on this machine.

    python -m jobs.benchmark throughput --output DIR [--megapixels 200] [--data PHOTOS]
    python -m jobs.benchmark quality    --output DIR --data CLEAN [--baselines NAME,NAME]
    python -m jobs.benchmark input      --output DIR --data CLEAN [--preset NAME]
    python -m jobs.benchmark harm       --output DIR --data CLEAN
    python -m jobs.benchmark precision | memory | listing --output DIR
    python -m jobs.benchmark scale      --output DIR [--actors 1,4,16] [--patch-ms MS]
    python -m jobs.benchmark all        --output DIR --data CLEAN,CLEAN

Each writes DIR/NAME.md and DIR/NAME.json. `all` is all but input and scale, which are run by
themselves; it also writes DIR/benchmark.md.
Exit codes: 0 measured, 1 a run failed, 2 wrong usage.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from denoise_core.benchmarks import (
    HarmConfig,
    InputConfig,
    ListingConfig,
    MemoryConfig,
    PrecisionConfig,
    QualityConfig,
    ScaleConfig,
    SimulationConfig,
    ThroughputConfig,
    join_results,
    write_result,
)
from denoise_core.benchmarks.model import ModelConfig
from denoise_core.benchmarks.quality import BASELINES, split_words
from denoise_core.benchmarks.tables import machine_facts
from denoise_core.config import setting
from jobs._cli import settings_command
from jobs._ray import end_on_sigterm

INTERRUPTED = "Nothing of this measurement is kept."
BENCHMARKS: dict[str, tuple[type, str]] = {
    "throughput": (ThroughputConfig, "Mpx/s of jobs.denoise, of a plain loop, of the bare model."),
    "quality": (QualityConfig, "PSNR and SSIM beside Mpx/s, of models and classical filters."),
    "harm": (HarmConfig, "What becomes of images with little noise or none."),
    "precision": (PrecisionConfig, "float32 against bfloat16: speed and dB."),
    "input": (InputConfig, "Training's steps/s with Ray Data's crops and with some in memory."),
    "memory": (MemoryConfig, "Peak memory of the workers: one large TIFF, and photographs."),
    "listing": (ListingConfig, "Time and memory of planning a million images."),
    "scale": (ScaleConfig, "How many devices the job keeps busy: 1 to 64 actors that sleep."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AllConfig(ModelConfig):
    """Settings of `jobs.benchmark all`, without `input` and `scale`; the rest as in the others."""

    output: str = setting(help="Folder for all tables.", metavar="DIR")
    data: str = setting(
        "",
        "Folders of clean 8-bit images: all for quality, the first for harm and precision.",
        metavar="DIR[,DIR]",
    )
    photos: str | None = setting(None, "Photographs to make throughput's of.", metavar="DIR")
    megapixels: float = setting(200.0, "Mpx of throughput.", metavar="MPX")
    bare_seconds: float = setting(20.0, "Least time of throughput's bare model.", metavar="S")
    limit: int = setting(10, "Images for the slow baselines.", metavar="N")
    images: int | None = setting(None, "Images for quality.", metavar="N")
    baselines: str = setting(
        BASELINES, "Filters beside quality's models; or none.", metavar="NAME[,NAME]"
    )
    side: int = setting(12_000, "Side of memory's TIFF.", metavar="N")
    photo_sizes: str = setting("12,16,20,24,12,16,20,24", "Mpx of memory's photographs.")
    names: int = setting(1_000_000, "Names of listing.", metavar="N")
    tree: bool = setting(False, "Listing also makes a real tree.")

    def single(self) -> dict[str, Any]:
        """The settings of each benchmark."""
        same: dict[str, Any] = {"output": self.output, **self.named}
        first = next(iter(split_words(self.data)), None)
        return {
            "throughput": ThroughputConfig(
                **same,
                data=self.photos,
                megapixels=self.megapixels,
                bare_seconds=self.bare_seconds,
            ),
            "quality": QualityConfig(
                **same,
                data=self.data,
                limit=self.limit,
                images=self.images,
                baselines=self.baselines,
            ),
            "harm": HarmConfig(**same, data=first),
            "precision": PrecisionConfig(**same, data=first),
            "memory": MemoryConfig(**same, side=self.side, photos=self.photo_sizes),
            "listing": ListingConfig(**same, names=self.names, tree=self.tree),
        }


def measure(name: str, config: Any) -> Path:
    """Run one benchmark, write and print its tables; return the Markdown file."""
    end_on_sigterm()
    facts = machine_facts()
    module = importlib.import_module(f"denoise_core.benchmarks.{name}")
    path = write_result(module.run(config), config, facts=facts)
    click.echo(path.read_text())
    return path


def measure_all(config: AllConfig) -> int:
    """Run them one after another and join their tables."""
    paths = [measure(name, single) for name, single in config.single().items()]
    click.echo(f"All tables: {join_results(paths, config.output)}")
    return 0


def _one(name: str) -> Callable[[Any], int]:
    def run(config: Any) -> int:
        measure(name, config)
        return 0

    return run


def simulated(config: SimulationConfig) -> int:
    """Make the one run that `scale` watches."""
    from denoise_core.benchmarks.simulation import simulate
    from jobs._ray import start_ray

    simulate(config, start_ray=start_ray)
    return 0


@click.group(context_settings={"max_content_width": 100})
def main() -> None:
    """Measure speed, quality, precision, memory, listing and scale on this machine."""


for _name, (_settings, _help) in BENCHMARKS.items():
    main.add_command(
        settings_command(_settings, _one(_name), name=_name, help=_help, interrupted=INTERRUPTED)
    )
_simulate = settings_command(
    SimulationConfig, simulated, name="simulate", help="One run without pixels, for `scale`."
)
_simulate.hidden = True
main.add_command(_simulate)
main.add_command(
    settings_command(
        AllConfig,
        measure_all,
        name="all",
        help="All of them but input and scale.",
        interrupted=INTERRUPTED,
    )
)

if __name__ == "__main__":
    main()
