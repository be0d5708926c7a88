"""The lock of an output folder: one run at a time, and none held for ever by a dead run.

The lock is a small JSON object `OUT/.denoise/lock.json` with the run's id, host, process and a
heartbeat. It is dead when its process is gone (same machine), or when no heartbeat came for
DEAD_AFTER_S and none comes while another run watches it (any machine, whatever its clock says). A
run that meets a lock without a heartbeat for SUSPECT_AFTER_S, or with one that far in the future,
waits for one or for its death; one that meets a fresh lock is refused at once.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from denoise_core.errors import ObjectNotFound, OutputLocked, RunFailed, StorageError
from denoise_core.storage import Storage, join, printable

HEARTBEAT_S = 10.0
DEAD_AFTER_S = 60.0
# Two beats were missed. A cluster made anew after a lost head comes as early as this.
SUSPECT_AFTER_S = 25.0
WATCH_EVERY_S = 2.0
# Longer than another taker needs from finding a lock dead to putting its own in place.
SETTLE_S = 1.0


def new_run_id() -> str:
    """Return the name of a run: when it began, in UTC, and some random digits."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"


@dataclass(slots=True)
class Lock:
    """A lock that this run holds; `taken_from` is the dead run that held it before, or None."""

    run_id: str
    taken_from: str | None = None
    lost_to: str | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raise RunFailed where another run took this one for dead, say after a suspended night."""
        if self.lost_to is not None:
            raise RunFailed(
                f"run {self.lost_to} took over this output while run {self.run_id} gave no sign of "
                "life; this one stops and leaves the output to that one."
            )


def _uri(out: str) -> str:
    return join(out, ".denoise", "lock.json")


def _place() -> dict[str, str]:
    """Where a process id has a meaning: this machine since it started, this container."""
    return {
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "pids": _link("/proc/self/ns/pid"),
    }


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _content(run_id: str) -> bytes:
    mine = {"run_id": run_id, **_place(), "pid": os.getpid()}
    return json.dumps({**mine, "heartbeat": time.time()}).encode()


def _holder(storage: Storage, uri: str) -> dict[str, Any] | None:
    """What the lock file says, its names fit for a terminal: whoever can write OUT writes them.

    None where there is no such file. Raises StorageError where that cannot be told.
    """
    if storage.stat(uri) is None:
        return None
    try:
        held: dict[str, Any] = json.loads(storage.read(uri))
        held["heartbeat"] = float(held["heartbeat"])
        held = {"run_id": "unknown", "host": "an unknown host", **held}
        return held | {name: printable(str(held[name])) for name in ("run_id", "host")}
    except (ValueError, KeyError, TypeError):
        return {"run_id": "unknown", "heartbeat": 0.0}
    except ObjectNotFound:
        return None


def _is_dead(storage: Storage, uri: str, held: dict[str, Any]) -> bool:
    if {name: held.get(name) for name in _place()} == _place() and isinstance(held.get("pid"), int):
        try:
            os.kill(held["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    age = time.time() - held["heartbeat"]
    if abs(age) <= SUSPECT_AFTER_S:
        return False
    # Old by this machine's clock, or of a clock ahead of it, which says nothing of its age. A live
    # run proves itself by its next heartbeat.
    end = time.monotonic() + max(HEARTBEAT_S * 1.5, DEAD_AFTER_S - max(0.0, age))
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, WATCH_EVERY_S))
        later = _holder(storage, uri)
        if later is None or later["heartbeat"] != held["heartbeat"]:
            return later is None
    return True


@contextmanager
def output_lock(storage: Storage, out: str, *, run_id: str) -> Iterator[Lock]:
    """Hold the lock of `out`. Raises OutputLocked, naming the run that holds it."""
    uri = _uri(out)
    lock = _take(storage, out, run_id=run_id)
    thread = threading.Thread(target=_beat, args=(storage, uri, lock), daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        lock.stop.set()
        thread.join(timeout=HEARTBEAT_S)
        # A lock that cannot be deleted dies by itself; the body's error says more.
        with suppress(StorageError):
            if _is_mine(storage, uri, lock):
                storage.delete(uri)


def _take(storage: Storage, out: str, *, run_id: str) -> Lock:
    uri = _uri(out)
    lock = Lock(run_id)
    held = _holder(storage, uri)
    if held is not None and _is_dead(storage, uri, held):
        lock.taken_from = str(held["run_id"])
        storage.delete(uri)
    mine = storage.create(uri, _content(run_id))
    if mine and lock.taken_from:
        # Another run may have found the same lock dead, and have deleted this one for it.
        time.sleep(SETTLE_S)
        mine = _is_mine(storage, uri, lock)
    if mine:
        return lock
    held = _holder(storage, uri) or {"run_id": "unknown", "heartbeat": time.time()}
    age = max(0.0, time.time() - held["heartbeat"])
    raise OutputLocked(
        f"{out}: run {held['run_id']} on {held.get('host', 'an unknown host')} is at work here "
        f"(last sign of life {age:.0f} s ago). Wait for it, stop it, or name another --output; "
        f"the lock of a dead run is taken over after {DEAD_AFTER_S:.0f} s."
    )


def _is_mine(storage: Storage, uri: str, lock: Lock) -> bool:
    held = _holder(storage, uri)
    if held is None or held["run_id"] == lock.run_id:
        return held is not None
    lock.lost_to = str(held["run_id"])
    return False


def _beat(storage: Storage, uri: str, lock: Lock) -> None:
    while not lock.stop.wait(HEARTBEAT_S):
        # One missed beat is no harm: the next comes long before DEAD_AFTER_S.
        with suppress(StorageError):
            if _is_mine(storage, uri, lock) or lock.lost_to is None:
                storage.write(uri, _content(lock.run_id))
