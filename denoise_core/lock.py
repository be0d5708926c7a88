"""The lock of an output folder: one run at a time, and none held for ever by a dead run.

The lock is a small JSON object `OUT/.denoise/lock.json` with the run's id, host, process and a
heartbeat. It is dead when its process is gone (same host) or its heartbeat is old (any host).
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from denoise_core.errors import OutputLocked, StorageError
from denoise_core.storage import Storage, join

HEARTBEAT_S = 10.0
DEAD_AFTER_S = 60.0


def _uri(out: str) -> str:
    return join(out, ".denoise", "lock.json")


def _content(run_id: str) -> bytes:
    mine = {"run_id": run_id, "host": socket.gethostname(), "boot": _boot_id(), "pid": os.getpid()}
    return json.dumps({**mine, "heartbeat": time.time()}).encode()


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def _holder(storage: Storage, uri: str) -> dict[str, Any] | None:
    if storage.stat(uri) is None:
        return None
    try:
        held: dict[str, Any] = json.loads(storage.read(uri))
        held["heartbeat"] = float(held["heartbeat"])
        return held
    except (ValueError, KeyError, TypeError):
        return {"run_id": "unknown", "heartbeat": 0.0}
    except StorageError:
        return None


def _is_dead(held: dict[str, Any]) -> bool:
    if time.time() - held["heartbeat"] > DEAD_AFTER_S:
        return True
    here = (socket.gethostname(), _boot_id())
    if (held.get("host"), held.get("boot")) != here or not isinstance(held.get("pid"), int):
        return False
    try:
        os.kill(held["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


@contextmanager
def output_lock(storage: Storage, out: str, *, run_id: str) -> Iterator[str | None]:
    """Hold the lock of `out`; yields the id of the dead run that it was taken over from, or None.

    Raises OutputLocked, naming the run that holds it.
    """
    uri = _uri(out)
    taken_from = None
    held = _holder(storage, uri)
    if held is not None and _is_dead(held):
        taken_from = str(held["run_id"])
        storage.delete(uri)
    if not storage.create(uri, _content(run_id)):
        held = _holder(storage, uri) or {"run_id": "unknown", "heartbeat": time.time()}
        age = time.time() - held["heartbeat"]
        raise OutputLocked(
            f"{out}: run {held['run_id']} on {held.get('host', 'an unknown host')} is at work here "
            f"(last sign of life {age:.0f} s ago). Wait for it, stop it, or name another --output; "
            f"the lock of a dead run is taken over after {DEAD_AFTER_S:.0f} s."
        )
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(storage, uri, run_id, stop), daemon=True)
    thread.start()
    try:
        yield taken_from
    finally:
        stop.set()
        thread.join(timeout=HEARTBEAT_S)
        storage.delete(uri)


def _beat(storage: Storage, uri: str, run_id: str, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        try:
            storage.write(uri, _content(run_id))
        except StorageError:
            # One missed beat is no harm: the next comes long before DEAD_AFTER_S.
            continue
