"""Faults on demand in Ray's workers, by the name of the image; installed by the Ray fixture.

The product has no switch for this: Python calls `install` where `hooked` is in PYTHONPATH. A
`poison-STAGE` kills its worker in that stage, with the signal in its name or SIGKILL. TIFFs go
through in regions from half a megapixel on, so that small ones show it. A model whose path ends in
`STAND_IN` is one that halves each value, so that no actor starts TensorFlow where the model is not
what is tested.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.util
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REGION_FROM_PIXELS = 500_000
STAND_IN = "stand-in"
# There while nothing is to be slow. Of this process of tests alone; Ray's workers inherit the name.
HURRY_NAME = "WORKER_HOOK_HURRY"


def wait(seconds: float) -> None:
    """Sleep, for somebody to break something meanwhile; not inside `hurry`."""
    if not os.path.exists(os.environ.get(HURRY_NAME, "")):
        time.sleep(seconds)


@contextmanager
def hurry() -> Iterator[None]:
    """Let nothing be slow on the session's Ray."""
    flag = Path(os.environ[HURRY_NAME])
    flag.touch()
    try:
        yield
    finally:
        flag.unlink()


def stand_in(pixels: Any) -> Any:
    """What the stand-in makes of an image of integers."""
    return pixels // 2


class StandIn:
    """A `Denoiser` without a network."""

    device, precision = "cpu", "float32"

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def warm_up(self) -> None:
        pass

    def denoise_parts(self, parts: Any) -> list[Any]:
        from denoise_core.denoiser import _untouched

        return [stand_in(_untouched(part)) for part in parts]


def poison(stage: str, name: str) -> None:
    """End this process where the name says so."""
    if f"poison-{stage}" in name:
        (word,) = re.findall("SIG[A-Z]+", name) or ["SIGKILL"]
        os.kill(os.getpid(), signal.Signals[word])
        time.sleep(60)


class _Patching(importlib.abc.MetaPathFinder):
    """Patches the stages once somebody imports them: most of Ray's processes never do."""

    def find_spec(self, name: str, *_: object) -> Any:
        if name != "denoise_core.pipelines.stages":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    sys.meta_path.insert(0, _Patching())


def patch(stages: Any) -> None:
    stages.expand.REGION_FROM_PIXELS = REGION_FROM_PIXELS
    decode, encode_, part = stages.read.decode, stages.Write._write, stages.Denoise._part
    publish, begin = stages.write.publish_image, stages.Denoise.__init__

    def begin_by_name(self: Any, job: Any, *more: Any, **named: Any) -> None:
        if job.models[0].name.endswith(STAND_IN):
            stages.denoise.configure_tensorflow = lambda **_: None
            stages.denoise.Denoiser = StandIn
        begin(self, job, *more, **named)

    def faulty_decode(data: bytes, *, name: str, **more: Any) -> Any:
        poison("read", name)
        if "stuck" in name:
            time.sleep(3600)
        if "wedged" in name:
            # As C code that does not come back: no alarm reaches it, and it keeps Python's lock.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            ctypes.PyDLL(None).sleep(3600)
        if "slow" in name:
            wait(0.3)
        return decode(data, name=name, **more)

    def faulty_part(self: Any, item: Any) -> Any:
        poison("denoise", item.facts["path"])
        if "bug" in item.facts["path"]:
            raise KeyError("a bug of ours")
        if "slow" in item.facts["path"]:
            wait(1.0 if item.facts["regions"] > 1 else 0.3)
        return part(self, item)

    def faulty_write(self: Any, item: Any) -> None:
        poison("write", item.facts["path"])
        encode_(self, item)

    def slow_publish(job: Any, facts: Any) -> Any:
        if "slow" in facts["path"]:
            wait(60.0)
        return publish(job, facts)

    stages.Denoise.__init__ = begin_by_name
    stages.read.decode = faulty_decode
    stages.Denoise._part = faulty_part
    stages.Write._write = faulty_write
    # By the module that its own name gives: Ray sends the task that calls it by value.
    stages.write.publish_image = slow_publish


def start_ray() -> None:
    """Start Ray with the hook in every worker, as quietly as the job does."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")

    from jobs._ray import end_on_sigterm, rest_log_monitor, start_local

    rest_log_monitor()
    here, before = Path(__file__).parent, os.environ.get("PYTHONPATH")
    # No `worker_process_setup_hook` of Ray's: with it each worker starts Python and Ray twice.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(here / "hooked"), str(here), before))
    )
    try:
        start_local(num_cpus=2)
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    end_on_sigterm()


def stretch_the_end() -> None:
    """Make long the moment at exit in which Ray's core is gone and Python does not know.

    A thread that asks Ray for something then ends the process with code 1.
    """
    import ray

    class Core(ray._raylet.CoreWorker):
        def shutdown_driver(self) -> None:
            super().shutdown_driver()
            time.sleep(2.0)

    ray._raylet.CoreWorker = Core


if __name__ == "__main__":
    # `python worker_hook.py ARGUMENTS`: jobs.denoise with the hook.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    stretch_the_end()
    from jobs import denoise

    denoise.start_ray = start_ray
    denoise.main()
