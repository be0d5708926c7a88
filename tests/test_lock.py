"""A lock whose run gives no sign of life: it is watched, then taken over or respected.

The rest of the lock is in `test_denoise_faults.py`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from denoise_core import lock
from denoise_core.errors import OutputLocked, StorageUnavailable
from denoise_core.storage import LocalStorage


class Clock:
    """Time that passes only while somebody sleeps; at some moments the other run gives a sign."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path, *, beats: list[float]) -> None:
        self.start = self.now = time.time()
        self.path, self.beats = path, beats
        monkeypatch.setattr(lock.time, "time", lambda: self.now)
        monkeypatch.setattr(lock.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(lock.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        while self.beats and self.now - self.start >= self.beats[0]:
            self.beat(self.start + self.beats.pop(0))

    def beat(self, moment: float) -> None:
        held = {**json.loads(lock._content("other")), "host": "elsewhere", "heartbeat": moment}
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(held))

    @property
    def waited(self) -> float:
        return self.now - self.start


def take(clock: Clock, folder: Path, *, age: float) -> lock.Lock:
    clock.beat(clock.start - age)
    return lock._take(LocalStorage(), str(folder), run_id="mine")


@pytest.mark.parametrize(
    ("age", "wait"), [(30.0, 30.0), (59.0, 15.0), (3600.0, 15.0), (-30.0, 60.0), (-3600.0, 60.0)]
)
def test_silent_run_is_dead_after_a_minute_of_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, wait: float
) -> None:
    """Also one whose clock was ahead: its last heartbeat lies in the future."""
    clock = Clock(monkeypatch, tmp_path / ".denoise/lock.json", beats=[])
    assert take(clock, tmp_path, age=age).taken_from == "other"
    assert clock.waited == pytest.approx(wait + lock.SETTLE_S, abs=0.01)


@pytest.mark.parametrize("age", [40.0, -40.0])
def test_run_that_beats_again_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float
) -> None:
    clock = Clock(monkeypatch, tmp_path / ".denoise/lock.json", beats=[12.0])
    with pytest.raises(OutputLocked, match="run other on elsewhere"):
        take(clock, tmp_path, age=age)
    assert clock.waited < 15


def test_names_in_a_lock_file_send_nothing_to_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, tmp_path / ".denoise/lock.json", beats=[])
    held = {"run_id": "\x1b[2J", "host": "a\nb\x9b", "heartbeat": clock.start}
    clock.path.parent.mkdir()
    clock.path.write_text(json.dumps(held))
    with pytest.raises(OutputLocked, match=r"run \\x1b\[2J on a\\nb\\x9b is at work"):
        lock._take(LocalStorage(), str(tmp_path), run_id="mine")
    clock.path.write_text(json.dumps({**held, "heartbeat": 0}))
    assert lock._take(LocalStorage(), str(tmp_path), run_id="mine").taken_from == r"\x1b[2J"


def test_a_lock_that_cannot_be_read_is_not_taken_for_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: one failed read of a silent run's lock, and it was taken over as dead."""

    class Stumbling(LocalStorage):
        def read(self, uri: str) -> bytes:
            if clock.waited >= 6:
                raise StorageUnavailable(f"{uri}: the server is overloaded")
            return super().read(uri)

    clock = Clock(monkeypatch, tmp_path / ".denoise/lock.json", beats=[])
    clock.beat(clock.start - 40)
    with pytest.raises(StorageUnavailable, match="overloaded"):
        lock._take(Stumbling(), str(tmp_path), run_id="mine")
    assert json.loads(clock.path.read_text())["run_id"] == "other"


@pytest.mark.parametrize("age", [20.0, -20.0])
def test_fresh_lock_is_respected_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float
) -> None:
    clock = Clock(monkeypatch, tmp_path / ".denoise/lock.json", beats=[])
    with pytest.raises(OutputLocked, match="run other on elsewhere"):
        take(clock, tmp_path, age=age)
    assert clock.waited == 0
