"""A Ray cluster of several hosts on one machine, and what can befall it. Needs root.

Hosts are network namespaces joined by a bridge: a head without CPUs, two workers and one in
reserve, one with the S3 server and one that submits. The tests look on from the bridge.
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
from conftest import free_port, rclone_binary
from flaky import FlakyProxy
from helpers import as_dtype, files_below, job_environment, make_checkpoint, picture, rows_of

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NETWORK = "10.77.0"
HEAD, WORKERS, RESERVE, STORAGE, LAPTOP = 1, (2, 3), 4, 5, 6
ALL = (HEAD, *WORKERS, RESERVE, STORAGE, LAPTOP)
# Words in the command lines of processes.
ACTOR, DRIVER, RAYLET = (
    "ray::MapWorker(MapBatches(Denoise",
    "python -m jobs.denoise",
    "raylet/raylet",
)
# Folders of the bucket. The S3 server remembers for minutes what it has listed, so they are there
# from the beginning.
FOLDERS = ("in", "poison", "photos", "many")


def ip(*words: Any, check: bool = True) -> None:
    subprocess.run(["ip", *map(str, words)], check=check, capture_output=not check)


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@dataclass(frozen=True)
class Tally:
    """What became of the images of a run, compared with an undisturbed one."""

    images: int
    lost: int = 0
    doubled: int = 0
    truncated: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.images + other.images,
            self.lost + other.lost,
            self.doubled + other.doubled,
            self.truncated + other.truncated,
        )

    def __str__(self) -> str:
        return (
            f"of {self.images} images lost {self.lost}, doubled {self.doubled}, "
            f"truncated {self.truncated}"
        )


@dataclass
class Hosts:
    """The machines, and what runs on them."""

    folder: Path
    s3_port: int
    token: str = field(default_factory=lambda: secrets.token_hex(24), repr=False)
    s3: subprocess.Popen[bytes] | None = None
    # When the first submission for an output was made, seconds since the epoch.
    begun: dict[str, float] = field(default_factory=dict)
    undisturbed_s: float = 0.0

    @property
    def bucket(self) -> Path:
        """Where the S3 server keeps s3://bucket."""
        return self.folder / "s3/bucket"

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
            "AWS_ENDPOINT_URL": f"http://{NETWORK}.{STORAGE}:{self.s3_port}",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    # --- build up and tear down -----------------------------------------------------------------

    def build(self) -> None:
        """Make the network, over what a killed run left of one, and start the S3 server."""
        self.clear_network()
        ip("link", "add", "dnbr", "type", "bridge")
        ip("addr", "add", f"{NETWORK}.254/24", "dev", "dnbr")
        ip("link", "set", "dnbr", "up")
        for number in ALL:
            name = f"dn{number}"
            ip("netns", "add", name)
            ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{name}v", "master", "dnbr", "up")
            ip("-n", name, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        for name in FOLDERS:
            (self.bucket / name).mkdir(parents=True)
        self.start_s3()

    def start_s3(self) -> None:
        """Start the S3 server."""
        self.s3 = subprocess.Popen(
            ["ip", "netns", "exec", f"dn{STORAGE}", str(rclone_binary()), "serve", "s3",
             "--config", "", "--addr", f"{NETWORK}.{STORAGE}:{self.s3_port}",
             str(self.bucket.parent)],
            env={**os.environ, "RCLONE_AUTH_KEY": '"key,secret"'},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def start(self, number: int, *, gpus: int = 0) -> None:
        """`ray start` on a host, of so many GPUs that are none."""
        words = ["--head", "--port=6379", "--num-cpus=0", f"--dashboard-host={NETWORK}.{HEAD}"]
        if number != HEAD:
            words = [f"--address={NETWORK}.{HEAD}:6379", "--num-cpus=2", f"--num-gpus={gpus}"]
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

    def destroy(self) -> None:
        """Leave nothing of it."""
        self.clear_network()
        if self.s3 is not None:
            self.s3.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def clear_network(self) -> None:
        """Kill all processes of the hosts and leave nothing of the network."""
        for number in ALL:
            with contextlib.suppress(subprocess.CalledProcessError):
                self.kill(number)
            ip("link", "del", f"dn{number}v", check=False)
            ip("netns", "del", f"dn{number}", check=False)
        ip("link", "del", "dnbr", check=False)

    def put_images(self, folder: str, *names: str) -> None:
        """Write small noisy PNGs to s3://bucket/FOLDER, which nothing has listed yet."""
        for seed, name in enumerate(names):
            pixels = as_dtype(picture(160, 160, 3, seed=seed), "uint8")
            (self.bucket / folder / f"{name}.png").write_bytes(
                bytes(imagecodecs.png_encode(pixels))
            )

    # --- faults ---------------------------------------------------------------------------------

    def processes(self, number: int, word: str = "") -> list[psutil.Process]:
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

    def kill_raylet(self, number: int) -> None:
        """SIGKILL for a host's raylet; its workers end by themselves, at the latest now."""
        assert self.kill(number, RAYLET) == 1
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self.processes(number, "ray::"), timeout_s=20)
        self.kill(number)

    @contextlib.contextmanager
    def cut(self, number: int) -> Iterator[None]:
        """Pull a host's link while the body runs."""
        ip("link", "set", f"dn{number}v", "down")
        try:
            yield
        finally:
            ip("link", "set", f"dn{number}v", "up")

    def storage_hangs(self, seconds: float) -> None:
        """The S3 server takes connections and says nothing."""
        assert self.s3 is not None
        self.s3.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.s3.send_signal(signal.SIGCONT)

    def storage_refuses(self, seconds: float) -> None:
        """The S3 server is gone, connections are refused."""
        assert self.s3 is not None
        self.s3.kill()
        self.s3.wait()
        time.sleep(seconds)
        self.start_s3()

    def is_alive(self, number: int) -> bool:
        """Whether the head counts on a host."""
        nodes = self.ask("v0/nodes")["data"]["result"]["result"]
        address = f"{NETWORK}.{number}"
        return any((node["node_ip"], node["state"]) == (address, "ALIVE") for node in nodes)

    # --- jobs -----------------------------------------------------------------------------------

    def submit(self, name: str, *words: Any, runtime_env: dict[str, Any] | None = None) -> None:
        """`ray job submit --no-wait` of `python WORDS` from the laptop."""
        subprocess.run(
            ["ip", "netns", "exec", f"dn{LAPTOP}", str(BIN / "ray"), "job", "submit",
             "--no-wait", "--submission-id", name, "--working-dir", ".",
             "--runtime-env-json", json.dumps(runtime_env or {}), "--", "python", *map(str, words)],
            env=self.environment() | {"RAY_ADDRESS": f"http://{NETWORK}.{HEAD}:8265"},
            cwd=ROOT, check=True, capture_output=True, timeout=200,
        )  # fmt: skip

    def denoise(self, name: str, out: str, *flags: str, source: str = "in", **more: Any) -> None:
        """Submit `jobs.denoise` from s3://bucket/SOURCE to s3://bucket/OUT."""
        words = ["-m", "jobs.denoise", f"s3://bucket/{source}", "--output", f"s3://bucket/{out}"]
        words += ["--model", f"{self.folder}/model", "--precision", "float32"]
        self.begun.setdefault(out, time.time())
        self.submit(name, *words, *flags, **more)

    def took(self, name: str, out: str) -> float:
        """Seconds from an output's first submission to the end of its last, `name`."""
        return float(self.job(name)["end_time"]) / 1e3 - self.begun[out]

    def stumbling_s3(self, *, seed: int = 0) -> FlakyProxy:
        """A second address of the S3 server, for `--s3-endpoint`, that can be told to fail."""
        target = f"http://{NETWORK}.{STORAGE}:{self.s3_port}"
        return FlakyProxy(target, address=f"{NETWORK}.254", seed=seed)

    def ask(self, path: str, *, method: str = "GET") -> Any:
        """Ask the head's dashboard."""
        request = urllib.request.Request(
            f"http://{NETWORK}.{HEAD}:8265/api/{path}",
            headers={"Authorization": f"Bearer {self.token}"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def job(self, name: str) -> Any:
        """What the head knows of a job."""
        return self.ask(f"jobs/{name}")

    def log(self, name: str) -> str:
        """A job's log."""
        return str(self.ask(f"jobs/{name}/logs")["logs"])

    def status(self, name: str) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        return str(self.job(name)["status"])

    def wait(
        self, name: str, *, until: Callable[[], bool] = lambda: False, timeout_s: float = 400
    ) -> str:
        """Wait for a job's end, or for a condition before that; its status."""
        end = time.monotonic() + timeout_s
        while (status := self.status(name)) in ("PENDING", "RUNNING") and not until():
            assert time.monotonic() < end, self.log(name)
            time.sleep(0.3)
        return status

    def has_rows(self, out: str) -> bool:
        """Whether a run has written its first rows."""
        return any((self.bucket / out / ".denoise/journal").glob("*.parquet"))

    def outputs(self, out: str) -> dict[str, bytes]:
        """Name and bytes of every image of a run."""
        folder = self.bucket / out / "images"
        return {name: (folder / name).read_bytes() for name in files_below(folder)}

    def tally(self, out: str, quiet: dict[str, bytes]) -> Tally:
        """Compare a run's rows and images with the images of an undisturbed one, byte by byte."""
        rows, outputs = rows_of(self.bucket / out), self.outputs(out)
        done = {Path(row["source_uri"]).name for row in rows if row["status"] == "ok"}
        again = len(rows) - len({row["image_id"] for row in rows})
        return Tally(
            images=len(quiet),
            lost=len(quiet.keys() - (done & outputs.keys())),
            doubled=again + len(outputs.keys() - quiet.keys()),
            truncated=sum(outputs[name] != quiet[name] for name in outputs.keys() & quiet.keys()),
        )


@contextlib.contextmanager
def cluster(*, images: int) -> Iterator[Hosts]:
    """A head and two workers, a tiny model, and so many images in s3://bucket/in."""
    hosts = Hosts(Path(tempfile.mkdtemp(prefix="dn", dir="/tmp")), free_port())
    try:
        hosts.build()
        make_checkpoint(hosts.folder / "model")
        hosts.put_images("in", *[f"{index:04d}" for index in range(images)])
        for number in (HEAD, *WORKERS):
            hosts.start(number)
        yield hosts
    finally:
        hosts.destroy()
