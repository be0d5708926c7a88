"""Runs one function of this package in a process of its own, and tells what that process took.

    run = call("throughput:plain_loop", folder=..., out=..., model=...)
    run.value, run.started_at, run.seconds, run.peak_rss

So the start-up (imports, model) belongs to what is measured, and the peak memory to it alone.
Arguments and result travel as JSON.
"""

from __future__ import annotations

import importlib
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoise_core.errors import DenoiseError, RunFailed, UsageError

MODULE = "denoise_core.benchmarks.child"


@dataclass(frozen=True, slots=True)
class ChildRun:
    """What a function returned, and its process: start (epoch), wall time, peak memory in bytes."""

    value: Any
    started_at: float
    seconds: float
    peak_rss: int


def call(function: str, **arguments: Any) -> ChildRun:
    """Run `MODULE:FUNCTION` of `denoise_core.benchmarks`.

    Raises UsageError where it did so, RunFailed with its sentence or last words for all else.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        answer = Path(folder) / "answer.json"
        started_at = time.time()
        done = subprocess.run(
            [sys.executable, "-m", MODULE, function, json.dumps(arguments), str(answer)],
            capture_output=True,
            text=True,
        )
        seconds = time.time() - started_at
        content = json.loads(answer.read_text()) if answer.exists() else {}
        if "error" in content:
            raise (UsageError if content["usage"] else RunFailed)(content["error"])
        if done.returncode != 0:
            raise RunFailed(f"{function} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return ChildRun(content["value"], started_at, seconds, content["peak_rss"])


def peak_rss() -> int:
    """Return the peak resident bytes of this process.

    From /proc where there is one: `ru_maxrss` begins with what the parent had when it forked.
    """
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        match = None
    if match:
        return int(match[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Run the function that the command line names."""
    name, arguments, answer = sys.argv[1:]
    module, _, function = name.partition(":")
    body = getattr(importlib.import_module(f"denoise_core.benchmarks.{module}"), function)
    try:
        content = {"value": body(**json.loads(arguments)), "peak_rss": peak_rss()}
    except DenoiseError as error:
        content = {"error": str(error), "usage": isinstance(error, UsageError)}
    Path(answer).write_text(json.dumps(content))


if __name__ == "__main__":
    main()
