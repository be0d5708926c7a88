"""`ray job submit` to a real head with token authentication: logs, exit codes, stop, resubmit.

The head has ports and a folder of its own and listens on loopback only; images and results are on
the S3 server, whose keys the head has in its environment, as nodes of a cluster have.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import psutil
import pytest
from conftest import S3Server, free_port
from helpers import as_dtype, files_below, files_with, job_environment, picture, rows_of

ROOT = Path(__file__).parents[1]
IMAGES = 400

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Head:
    """A running `ray start --head`."""

    address: str
    token: str
    folder: Path
    environment: dict[str, str]

    def ray(self, *words: Any) -> subprocess.CompletedProcess[str]:
        """Run `ray WORDS` as a user with the token does."""
        ray = str(Path(sys.executable).with_name("ray"))
        return subprocess.run(
            [ray, *map(str, words)],
            env=self.environment | {"RAY_ADDRESS": self.address},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=400,
        )

    def submit(self, name: str, *arguments: Any, wait: bool = True) -> tuple[int, str]:
        """`ray job submit` of jobs.denoise; the command's exit code and what it printed."""
        words = ["job", "submit", "--submission-id", name, *([] if wait else ["--no-wait"])]
        job = ["python", "-m", "jobs.denoise", *arguments]
        done = self.ray(*words, "--working-dir", ".", "--", *job)
        return done.returncode, done.stdout + done.stderr

    def get(self, path: str, *, token: str | None = None, method: str = "GET") -> Any:
        """Ask the dashboard; raises HTTPError."""
        bearer = {"Authorization": f"Bearer {self.token if token is None else token}"}
        request = urllib.request.Request(
            f"{self.address}/api/{path}", headers=bearer, method=method
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())


@pytest.fixture(scope="module")
def head(s3_server: S3Server) -> Iterator[Head]:
    # A short name: Ray's sockets lie below it, and a socket's path has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="dn", dir="/tmp"))
    ports: set[int] = set()
    while len(ports) < 4:
        ports.add(free_port())
    port, dashboard, agent, client = ports
    token = secrets.token_hex(24)
    environment = job_environment(
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, RAY_USAGE_STATS_ENABLED="0"
    )
    # As in the files in cluster/.
    environment["RAY_JOB_STOP_WAIT_TIME_S"] = "60"
    # Ray's 60 s are few where all processes start at once on two busy cores.
    environment["RAY_DASHBOARD_STARTUP_TIMEOUT_S"] = "300"
    # Else workers give way to all else on a busy machine.
    environment["RAY_worker_niceness"] = "0"
    environment.pop("PYTHONPATH", None)
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    head = Head(f"http://127.0.0.1:{dashboard}", token, folder, environment)
    try:
        start = [
            *("start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
            *(f"--temp-dir={folder}", "--object-store-memory=300000000"),
        ]
        started = head.ray(*start)
        if started.returncode != 0:
            # Ray gives a machine's processes 30 s, by a constant: as in jobs/_ray.py.
            kill_below(folder)
            started = head.ray(*start)
        assert started.returncode == 0, started.stderr
        yield head
    finally:
        kill_below(folder)
        shutil.rmtree(folder, ignore_errors=True)


def kill_below(folder: Path) -> None:
    """Kill Ray's processes of this folder and what they started. `ray stop` would stop others'."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(folder) in word for word in process.cmdline()):
                for each in [*process.children(recursive=True), process]:
                    with contextlib.suppress(psutil.Error):
                        each.kill()


def wait_for(
    condition: Callable[[], bool], head: Head, job: str, *, timeout_s: float = 300
) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        running = head.get(f"jobs/{job}")["status"] in ("PENDING", "RUNNING")
        assert running, head.get(f"jobs/{job}/logs")["logs"]
        assert time.monotonic() < end, head.get(f"jobs/{job}/logs")["logs"]
        time.sleep(0.2)


def test_submit_stop_resubmit_and_no_secret_in_what_ray_keeps(
    head: Head, s3_server: S3Server, checkpoint: str
) -> None:
    bucket = s3_server.make_bucket()
    local = s3_server.root / bucket.removeprefix("s3://")
    (local / "in").mkdir()
    for seed in range(IMAGES):
        pixels = as_dtype(picture(128, 128, 3, seed=seed), "uint8")
        (local / f"in/{seed:03d}.png").write_bytes(bytes(imagecodecs.png_encode(pixels)))
    (local / "in/bad.png").write_bytes(b"nothing")
    flags = [f"{bucket}/in", "--output", f"{bucket}/out", "--model", checkpoint]
    flags += ["--precision", "float32", "--actors", "1"]
    out = local / "out"

    # Stopped in the middle: rows are kept, the lock is free, no image is half there.
    code, text = head.submit("first", *flags, wait=False)
    assert code == 0, text
    wait_for(lambda: any(out.glob(".denoise/journal/*.parquet")), head, "first")
    # What `ray job stop` asks for, without the seconds in which the command starts.
    assert head.get("jobs/first/stop", method="POST") == {"stopped": True}
    stopped = head.ray("job", "stop", "first")
    assert stopped.returncode == 0, stopped.stderr
    assert head.get("jobs/first")["status"] == "STOPPED"
    assert "Interrupted. Finished images are safe" in head.get("jobs/first/logs")["logs"]
    assert not (out / ".denoise/lock.json").exists()
    assert not (out / "_SUCCESS").exists()
    done = rows_of(out)
    assert 0 < len(done) < IMAGES
    assert all(re.fullmatch(r"\d{3}\.png", name) for name in files_below(out / "images"))

    # Submitted again it goes on. The job's exit code is in its record; Ray's own command has 1.
    code, text = head.submit("second", *flags)
    assert code == 1
    assert head.get("jobs/second")["status"] == "FAILED"
    assert head.get("jobs/second")["driver_exit_code"] == 3
    assert f"{len(done)} already done" in text
    assert "Over the error budget" in text
    rows = rows_of(out)
    assert len(rows) == len({row["image_id"] for row in rows}) == IMAGES + 1
    assert len(files_below(out / "images")) == IMAGES
    assert {row["run_id"] for row in done} < {row["run_id"] for row in rows}

    code, text = head.submit("third", *flags, "--max-error-rate", "0.1")
    assert code == 0, text
    assert head.get("jobs/third")["driver_exit_code"] == 0
    code, text = head.submit("wrong", *flags, "--no-such-flag")
    assert (code, head.get("jobs/wrong")["driver_exit_code"]) == (1, 2), text

    # One package, or more where the checkout was edited meanwhile.
    packages = [each for each in head.folder.glob("session_2*/**/_ray_pkg_*") if each.is_dir()]
    for sent in map(files_below, packages):
        assert "denoise_core/models/weights/unet-s.safetensors" in sent
        assert {name.split("/")[0] for name in sent} & {".git", ".venv", "tests", "demo"} == set()
    assert packages

    hidden = [s3_server.secret_key, s3_server.access_key, head.token]
    records = json.dumps([head.get("jobs/"), [head.get(f"jobs/{n}/logs") for n in JOBS]])
    assert [secret for secret in hidden if secret in records] == []
    assert files_with(hidden, head.folder) == []
    assert files_with(hidden, out) == []
    assert [line for line in command_lines() if any(secret in line for secret in hidden)] == []
    # The search does find what is there.
    (head.folder / "planted.log").write_bytes(b"\x00" + hidden[0].encode())
    assert files_with(hidden, head.folder) == ["planted.log"]


JOBS = ("first", "second", "third", "wrong")


def command_lines() -> list[str]:
    """Those of all processes, which any user of a machine may read."""
    lines = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            lines.append(" ".join(process.cmdline()))
    return lines


def test_without_the_token_nothing_is_told(head: Head) -> None:
    for token in ("", "wrong" * 8):
        with pytest.raises(urllib.error.HTTPError) as refused:
            head.get("jobs/", token=token)
        assert refused.value.code in (401, 403)
    stranger = Head(head.address, "", head.folder, {**head.environment, "RAY_AUTH_TOKEN": "0" * 48})
    code, text = stranger.submit("stranger", "in", "--output", "out")
    assert code != 0
    assert "authentication token" in text
    assert os.listdir(head.folder)
