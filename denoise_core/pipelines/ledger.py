"""The ledger of attempts: what work was begun and not ended, for it killed its worker, and how.

Imports nothing but Ray's core: the ledger's own process need not load Ray Data.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# A machine that does not say within this time how a process of its own died is lost.
LAST_WORDS_S = 60


@dataclass(frozen=True, slots=True)
class Place:
    """A process of Ray's: its node and the file that takes its stderr."""

    node: str
    log: str

    @classmethod
    def here(cls) -> Place:
        """Return this process's own."""
        return cls(ray.get_runtime_context().get_node_id(), os.readlink("/proc/self/fd/2"))


def cause_of_death(place: Place) -> str:
    """Return how the process died, to follow 'it last died'.

    Ray keeps no exit status. But a process that gets a fatal signal, or whose watchdog ends it,
    says so on stderr; one that said nothing got the signal that cannot be caught.
    """
    there = NodeAffinitySchedulingStrategy(place.node, soft=False)
    reference = _last_words.options(scheduling_strategy=there).remote(place.log)
    try:
        return str(ray.get(reference, timeout=LAST_WORDS_S))
    except ray.exceptions.RayError:
        return "with its machine"


@ray.remote(num_cpus=0, max_retries=0)
def _last_words(log: str) -> str:
    try:
        with open(log, "rb") as file:
            text = file.read()
    except OSError:
        return "for a reason unknown: its log is gone"
    signals = re.findall(rb"^\*\*\* (SIG[A-Z]+) received", text, re.MULTILINE)
    if signals:
        return f"by {signals[-1].decode()}"
    if re.search(rb"^Timeout \(\d", text, re.MULTILINE):
        return "stuck, by its time limit"
    return "without a word, as by SIGKILL"


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Ledger:
    """Counts how often work on an image was begun and not ended: attempts that killed a worker."""

    def __init__(self) -> None:
        self.open: dict[str, int] = {}
        self.places: dict[str, Place] = {}

    def opened(self, keys: list[str]) -> list[int]:
        """Return how many times each was started without an end."""
        return [self.open.get(key, 0) for key in keys]

    def begin(self, keys: list[str], place: Place) -> list[tuple[int, Place | None]]:
        """Note the start of work at a place.

        Return how many times each was started without an end, and where the last time before.
        """
        before = [self.places.get(key) for key in keys]
        for key in keys:
            self.open[key] = self.open.get(key, 0) + 1
            self.places[key] = place
        return list(zip(self.opened(keys), before, strict=True))

    def end(self, keys: list[str]) -> None:
        """Note that the worker outlived the work."""
        for key in keys:
            self.open.pop(key, None)
            self.places.pop(key, None)
