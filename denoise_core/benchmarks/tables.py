"""Results as Markdown and JSON, with the machine, the versions and the command beside the figures.

DIR/NAME.md      tables for people
DIR/NAME.json    every figure, unrounded
DIR/benchmark.md all of one `all` run
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from denoise_core.devices import cores, cpu_has_bfloat16

PACKAGES = (
    "ray", "tensorflow", "keras", "numpy", "pyarrow", "imagecodecs", "tifffile", "scikit-image",
    "opencv-python-headless", "bm3d",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Result:
    """One benchmark's outcome: `body` is Markdown without a heading, `data` plain JSON values."""

    name: str
    title: str
    body: str
    data: dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: float | None, digits: int = 2) -> str:
    """Return a figure for a table; a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def megabytes(size: float | None) -> str:
    """Return bytes as MB of 10^6."""
    return "-" if size is None else f"{size / 1e6:,.0f}"


def machine_facts() -> dict[str, Any]:
    """Return the CPU, its load now, memory, and the versions of what does the work."""
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "bfloat16_hardware": cpu_has_bfloat16(),
        "load_average_1min": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def command_line(name: str, config: Any) -> str:
    """Return the command that repeats a benchmark: its settings that are not the defaults."""
    words = ["python", "-m", "jobs.benchmark", name]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = "--" + field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
            continue
        for item in value if isinstance(value, tuple) else (value,):
            words += [flag, str(item)]
    return shlex.join(words)


def write_result(result: Result, config: Any, *, facts: dict[str, Any]) -> Path:
    """Write `config.output`/NAME.md and NAME.json; return the path of the first.

    `facts` are `machine_facts()` of before the benchmark: they tell the load that it met.
    """
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    command = command_line(result.name, config)
    moment = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"command": command, "finished_at": moment, "machine": facts, **result.data}
    (folder / f"{result.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    path = folder / f"{result.name}.md"
    heading = f"## {result.title}\n\n`{command}`"
    path.write_text(f"{heading}\n\n{result.body}\n\n{_facts_line(facts, moment)}\n")
    return path


def _facts_line(facts: dict[str, Any], moment: str) -> str:
    bfloat16 = "with" if facts["bfloat16_hardware"] else "without"
    versions = ", ".join(f"{name} {text}" for name, text in facts["versions"].items())
    return (
        f"Measured {moment} on {facts['cpu']}, {facts['cores']} core(s), {bfloat16} bfloat16 "
        f"arithmetic, {facts['memory_bytes'] / 2**30:.0f} GiB, {facts['system']}, load average "
        f"before the start {facts['load_average_1min']:.1f}; {versions}."
    )


def join_results(paths: Sequence[Path], output: str) -> Path:
    """Concatenate the Markdown files to `output`/benchmark.md."""
    target = Path(output) / "benchmark.md"
    target.write_text("\n".join(path.read_text() for path in paths))
    return target
