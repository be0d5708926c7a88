"""Starts `python -m jobs.denoise` as a user would, and watches the memory and time of all of it.

Memory of a process is told three ways. RSS counts every page that it has mapped, also those of
Ray's object store and of program files (TensorFlow's library alone is hundreds of MB), once for
each process. PSS divides such pages by those who share them. USS is what is the process's alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from denoise_core import results
from denoise_core.errors import RunFailed, UsageError
from denoise_core.storage import LocalStorage

KINDS = (
    ("driver", "driver (jobs.denoise)"),
    ("MapWorker", "denoise actor"),
    ("Map", "task worker (read, write)"),
    ("ReadRange", "task worker (read, write)"),
    ("assemble_image", "task worker (read, write)"),
    ("ray::IDLE", "idle worker"),
    ("ray::Ledger", "small actors of the job"),
    ("raylet/raylet", "raylet and object store"),
    ("gcs_server", "Ray services"),
)
"""Part of a process's title -> kind; the first that fits, else Ray's own services."""

# When the detailed memory of a process is asked again: after a change of RSS, or some time.
DETAIL_BYTES = 2_000_000
DETAIL_S = 3.0
# A job that is told to end has so long to end its workers.
END_S = 30
IDLE = "idle worker"
OTHER = "Ray services"
ROW_COLUMNS = (
    "source_uri", "status", "width", "height", "regions", "read_ms", "denoise_ms", "write_ms",
    "device", "finished_at",
)  # fmt: skip


@dataclass(slots=True)
class Process:
    """One process as it was seen: its kind, CPU seconds, and peaks of memory in bytes.

    `peak_title` is the process's title when its USS was largest (Ray names the running task there),
    `shared` what of its RSS was not its own then.
    """

    pid: int
    kind: str
    cpu_s: float = 0.0
    rss: int = 0
    uss: int = 0
    pss: int = 0
    shared: int = 0
    peak_title: str = ""


class Moment(NamedTuple):
    """One sample: time (epoch), CPU seconds by pid, the root's own memory, the machine's idle time.

    The memory is without what is shared with others, as the object store's pages are; the idle time
    is in seconds, summed over the cores.
    """

    at: float
    cpu_s: dict[int, float]
    root_own: int
    idle_s: float


@dataclass(slots=True)
class Watched:
    """All processes of one run, and the peak of the sum of their PSS: what the machine must have.

    `gap_s` is the mean time between two samples.
    """

    processes: dict[int, Process] = field(default_factory=dict)
    together: int = 0
    gap_s: float = 0.0
    history: list[Moment] = field(default_factory=list)

    def kinds(self) -> dict[str, list[Process]]:
        """Group the processes, kinds in the order of their first process."""
        groups: dict[str, list[Process]] = {}
        for process in self.processes.values():
            groups.setdefault(process.kind, []).append(process)
        return groups


class _Detail(NamedTuple):
    at: float
    rss: int
    pss: int


def kind_of(title: str) -> str:
    """Return the kind of a process by its title."""
    return next((kind for part, kind in KINDS if part in title), OTHER)


class Sampler:
    """Samples a process and its descendants from a thread, between `start` and `stop`."""

    def __init__(self, pid: int, *, every_s: float, memory: bool) -> None:
        self.root, self.every_s, self.memory = _psutil().Process(pid), every_s, memory
        self.watched = Watched()
        self._handles: dict[int, Any] = {}
        self._details: dict[int, _Detail] = {}
        self._samples = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> Watched:
        """End; return what was seen."""
        self._ended.set()
        self._thread.join()
        return self.watched

    def _run(self) -> None:
        started = time.monotonic()
        while not self._ended.wait(self.every_s):
            self._sample()
            self._samples += 1
            self.watched.gap_s = (time.monotonic() - started) / self._samples

    def _sample(self) -> None:
        psutil = _psutil()
        together = 0
        with contextlib.suppress(psutil.Error):
            for handle in (self.root, *self.root.children(recursive=True)):
                # The same object each time: psutil checks that the pid is still that process.
                handle = self._handles.setdefault(handle.pid, handle)
                with contextlib.suppress(psutil.Error, OSError):
                    together += self._look(handle)
            self.watched.history.append(self._moment())
        self.watched.together = max(self.watched.together, together)

    def _moment(self) -> Moment:
        cpu_s = {pid: process.cpu_s for pid, process in self.watched.processes.items()}
        idle_s = _psutil().cpu_times().idle
        memory = self.root.memory_info()
        return Moment(time.time(), cpu_s, memory.rss - memory.shared, idle_s)

    def _look(self, handle: Any) -> int:
        title = "driver" if handle.pid == self.root.pid else " ".join(handle.cmdline())
        kind = kind_of(title)
        seen = self.watched.processes.setdefault(handle.pid, Process(handle.pid, kind))
        # A process on its way out has no title any more.
        if title and kind != IDLE:
            seen.kind = kind
        times = handle.cpu_times()
        seen.cpu_s = times.user + times.system
        if not self.memory:
            return 0
        own = self._detailed(handle, seen, title)
        # Asked last, and never under the USS: the process may have grown since, and the kernel
        # counts the pages of a high-water mark roughly, those of a USS one by one.
        seen.rss = max(seen.rss, _high_water(handle.pid), seen.uss)
        return own

    def _detailed(self, handle: Any, seen: Process, title: str) -> int:
        """Note USS, PSS and what is shared; return the PSS.

        The kernel walks all pages for them, so a process whose RSS stands still is asked seldom.
        """
        moment, rss = time.monotonic(), handle.memory_info().rss
        before = self._details.get(handle.pid)
        if before and abs(rss - before.rss) < DETAIL_BYTES and moment - before.at < DETAIL_S:
            return before.pss
        now = handle.memory_full_info()
        self._details[handle.pid] = _Detail(moment, rss, now.pss)
        seen.pss = max(seen.pss, now.pss)
        if now.uss > seen.uss:
            seen.uss, seen.peak_title = now.uss, title[:120]
            seen.shared = max(0, now.rss - now.uss)
        return int(now.pss)


def _high_water(pid: int) -> int:
    """The kernel's own peak of the RSS, which no sampling misses; 0 where it is not told."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _psutil() -> Any:
    try:
        import psutil  # type: ignore[import-untyped]
    except ImportError as error:
        raise UsageError(
            "The benchmark needs the package 'psutil', which is not installed. "
            "Install the extra 'benchmark' (uv pip install '.[benchmark]')."
        ) from error
    return psutil


@dataclass(frozen=True, slots=True)
class JobRun:
    """A finished `jobs.denoise`: times (epoch), its run.json, its rows, its processes."""

    started_at: float
    seconds: float
    run: dict[str, Any]
    rows: list[dict[str, Any]]
    watched: Watched

    @property
    def finished(self) -> list[tuple[float, float]]:
        """(time, Mpx) of every image that came out, in the order of time."""
        return sorted(
            (row["finished_at"].timestamp(), row["width"] * row["height"] / 1e6)
            for row in self.rows
        )


def run_denoise(
    inputs: Sequence[str],
    output: Path,
    *options: str,
    every_s: float = 1.0,
    memory: bool = False,
) -> JobRun:
    """Run the job on this machine and wait. Raises RunFailed where an image or the job failed."""
    command = [sys.executable, "-m", "jobs.denoise", *inputs, "--output", str(output), *options]
    started_at = time.time()
    watched, seconds = watch([*command, "--progress", "plain"], every_s=every_s, memory=memory)
    run = json.loads((output / "run.json").read_text())
    rows = [
        row
        for part in results.iter_rows(LocalStorage(), str(output), columns=list(ROW_COLUMNS))
        for row in part.to_pylist()
    ]
    return JobRun(started_at, seconds, run, rows, watched)


def watch(command: Sequence[str], *, every_s: float, memory: bool) -> tuple[Watched, float]:
    """Run a command while sampling its processes; return them and the wall time.

    Without RAY_ADDRESS: what is measured is this machine. Raises RunFailed on an exit code but 0.
    Who interrupts it ends the command too.
    """
    environment = {name: text for name, text in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        with subprocess.Popen(command, stdout=log, stderr=log, env=environment) as job:
            try:
                sampler = Sampler(job.pid, every_s=every_s, memory=memory)
                sampler.start()
                code = job.wait()
            except BaseException:
                _end(job)
                raise
            seconds = time.monotonic() - started
            watched = sampler.stop()
        log.seek(0)
        tail = log.read().decode(errors="replace")[-3000:]
    if code != 0:
        raise RunFailed(f"{' '.join(command)} ended with {code}:\n{tail}")
    return watched, seconds


def _end(job: subprocess.Popen[bytes]) -> None:
    job.terminate()
    try:
        job.wait(END_S)
    except subprocess.TimeoutExpired:
        job.kill()
