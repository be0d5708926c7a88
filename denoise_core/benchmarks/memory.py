"""Peak memory of every process of `jobs.denoise`: on one large tiled TIFF, and on photographs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoise_core.benchmarks.model import ModelConfig
from denoise_core.benchmarks.pictures import make_photos, make_tiff
from denoise_core.benchmarks.processes import JobRun, Process, run_denoise
from denoise_core.benchmarks.quality import split_words
from denoise_core.benchmarks.tables import Result, megabytes, table
from denoise_core.config import require, setting
from denoise_core.errors import RunFailed, UsageError
from denoise_core.images import read_header

NOTE = (
    "RSS, the resident memory, counts shared pages in every process that touched them: images in "
    "Ray's object store, and program files such as TensorFlow's libraries. USS is what is the "
    "process's alone; PSS divides shared pages by those who share them. Each figure is the largest "
    "of the kind's processes; RSS is the kernel's high-water mark, the others are sampled. Shared: "
    "RSS less USS when USS was largest."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig(ModelConfig):
    """Settings of `jobs.benchmark memory`."""

    output: str = setting(help="Folder for memory.md and memory.json.", metavar="DIR")
    side: int = setting(12_000, "Side of the square TIFF in pixels.", metavar="N")
    photos: str = setting("12,16,20,24,12,16,20,24", "Mpx of the photographs.", metavar="MPX[,MPX]")
    noise: float = setting(25.0, "Sigma of the added noise, of 255.", metavar="SIGMA")
    every: float = setting(0.2, "Seconds between two samples.", metavar="S")
    work: str | None = setting(
        None, "Folder for the images, removed at the end; default: the system's.", metavar="DIR"
    )

    def __post_init__(self) -> None:
        require(self.side >= 16, "--side: expected a number from 16.")
        require(self.every > 0, "--every: expected a number above 0.")
        require(bool(self.sizes), "--photos: expected sizes in Mpx.")

    @property
    def sizes(self) -> list[float]:
        """The photographs' sizes in Mpx. Raises UsageError."""
        try:
            return [float(word) for word in split_words(self.photos)]
        except ValueError:
            raise UsageError(f"--photos {self.photos}: expected numbers.") from None


def run(config: MemoryConfig) -> Result:
    """Make the images, run the job on each kind, tell the peaks."""
    config.load()
    data = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=config.work) as folder:
        large, photos = Path(folder) / "large", Path(folder) / "photos"
        large.mkdir()
        make_tiff(large / "large.tif", side=config.side, sigma=config.noise)
        data["tiff"] = _watch(large, config) | {"side": config.side}
        _check_tiff(large / "large.tif", large / "out" / "images" / "large.tif")
        make_photos(photos, megapixels=config.sizes, sigma=config.noise)
        data["photographs"] = _watch(photos, config) | {"sizes": config.sizes}
    return Result("memory", "Memory of the workers", _body(data), data)


def _watch(folder: Path, config: MemoryConfig) -> dict[str, Any]:
    inputs = sorted(str(path) for path in folder.iterdir())
    job = run_denoise(
        inputs,
        folder / "out",
        *(*config.flags, "--copy-below", "0"),
        every_s=config.every,
        memory=True,
    )
    return figures(job)


def _check_tiff(source: Path, output: Path) -> None:
    """Raise RunFailed where the output is not of the input's size, type and tiling."""
    before, after = (_shape(path) for path in (source, output))
    if before != after:
        raise RunFailed(f"{output}: got {after}, expected {before}.")


def _shape(path: Path) -> tuple[Any, ...]:
    with path.open("rb") as file:
        header = read_header(file, name=path.name, max_pixels=1 << 62)
    return header.height, header.width, header.channels, header.dtype, header.tile


def figures(job: JobRun) -> dict[str, Any]:
    """Peaks of each kind of process, in bytes."""
    return {
        "images": len(job.rows),
        "regions": sum(row["regions"] for row in job.rows),
        "megapixels": sum(size for _, size in job.finished),
        "seconds": job.seconds,
        "sampled_every_s": job.watched.gap_s,
        "kinds": {kind: _peaks(group) for kind, group in job.watched.kinds().items()},
        "largest_worker": _peaks(
            [
                process
                for kind, group in job.watched.kinds().items()
                for process in group
                if kind.startswith(("task worker", "denoise actor"))
            ]
        ),
        "together_pss": job.watched.together,
    }


def _peaks(group: Sequence[Process]) -> dict[str, Any]:
    top = max(group, key=lambda process: process.uss, default=None)
    return {
        "processes": len(group),
        "rss": max((process.rss for process in group), default=0),
        "shared": max((process.shared for process in group), default=0),
        "uss": top.uss if top else 0,
        "pss": max((process.pss for process in group), default=0),
        "title_at_peak": top.peak_title if top else "",
    }


def _body(data: dict[str, Any]) -> str:
    tiff, photos = data["tiff"], data["photographs"]
    side, sizes = tiff["side"], photos["sizes"]
    return "\n\n".join(
        [
            _table(f"One tiled RGB TIFF of {side:,}x{side:,} ({tiff['regions']} region(s))", tiff),
            _table(f"{len(sizes)} photographs of {min(sizes):g} to {max(sizes):g} Mpx", photos),
            NOTE,
        ]
    )


def _table(title: str, part: dict[str, Any]) -> str:
    header = ("process", "number", "peak RSS, MB", "of it shared", "peak USS, MB", "peak PSS, MB")
    names = ("rss", "shared", "uss", "pss")
    rows = [
        (kind, str(peaks["processes"]), *(megabytes(peaks[name]) for name in names))
        for kind, peaks in sorted(part["kinds"].items(), key=lambda pair: -pair[1]["rss"])
    ]
    worker = part["largest_worker"]
    text = (
        f"**{title}**: {part['megapixels']:.1f} Mpx in {part['seconds']:.0f} s, sampled every "
        f"{part['sampled_every_s']:.2f} s. Largest worker: **{megabytes(worker['rss'])} MB** RSS, "
        f"{megabytes(worker['uss'])} MB of its own; all processes together "
        f"{megabytes(part['together_pss'])} MB (PSS)."
    )
    return f"{text}\n\n{table(header, rows)}"
