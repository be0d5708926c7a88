"""How a run's actors are fitted to a cluster. Starts no Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.data.exceptions import ExecutionTimeoutError

from denoise_core.checkpoints import load_checkpoint
from denoise_core.config import DenoiseConfig
from denoise_core.denoiser import resolve_geometry
from denoise_core.errors import UsageError
from denoise_core.pipelines import cluster
from denoise_core.pipelines.cluster import Resources, check_memory, choose_resources
from denoise_core.pipelines.denoise import _make_job
from denoise_core.pipelines.flow import Flow
from denoise_core.storage import StorageOptions

EMPTY = {"node:__internal_head__": 1.0, "memory": 8e9, "object_store_memory": 2e9}


def choose(
    cluster: dict[str, float],
    *,
    images: int = 1000,
    hosts: tuple[int, ...] = (),
    cpus_per_gpu: float = 1.0,
    grows: bool = False,
    **settings: str,
) -> Resources:
    config = DenoiseConfig(inputs=("in",), output="out", **settings)
    return choose_resources(
        config, cluster, images=images, hosts=hosts, cpus_per_gpu=cpus_per_gpu, grows=grows
    )


def test_gpus_are_shared_out_and_cpus_are_left_for_reading() -> None:
    gpus = {"CPU": 16.0, "GPU": 4.0}
    assert choose(gpus, cpus_per_gpu=4.0) == Resources((1, 4), 1.0, 1.0, None)
    assert choose(gpus, gpus_per_actor="0.5").actors == (1, 8)
    cpus = choose({"CPU": 16.0})
    assert cpus.gpus == 0
    assert cpus.actors[1] * cpus.cpus <= 8
    assert cpus.actors[1] * (cpus.threads or 0) == 16


@pytest.mark.parametrize("share", ["0.1", "0.25", "0.3", "1", "2"])
@pytest.mark.parametrize("host", [(1, 1), (1, 4), (2, 1), (4, 1), (4, 4), (8, 1), (96, 8)])
def test_actors_on_gpus_leave_a_host_room_for_a_task(host: tuple[int, int], share: str) -> None:
    """With one CPU and one GPU an actor of a whole CPU would leave nothing to read with."""
    cpus, gpus = host
    if float(share) > gpus:
        return
    cluster = {"CPU": 3.0 * cpus, "GPU": 3.0 * gpus}
    chosen = choose(cluster, cpus_per_gpu=cpus / gpus, gpus_per_actor=share)
    assert 0.01 <= chosen.cpus <= 1.0
    assert chosen.cpus != 0.5, "Ray Data would fuse it with the tasks before"
    most = int(gpus / float(share))
    assert cpus - most * chosen.cpus >= 0.5


def test_gpus_that_can_come_are_trusted_and_others_refused() -> None:
    """CPU workers are up, a group of GPU machines is at none: only a cluster can start some."""
    workers, asked = {"CPU": 16.0}, {"gpus_per_actor": "1", "actors": "1:8"}
    with pytest.raises(UsageError, match=r"has 0 GPU\(s\)\. Use 'auto' for CPUs\.$"):
        choose(workers, **asked)
    assert choose(workers, grows=True, **asked) == choose(EMPTY, grows=True, **asked)
    larger = choose({"CPU": 8.0, "GPU": 1.0}, grows=True, gpus_per_actor="4", actors="2")
    assert larger == Resources((2, 2), 1.0, 4.0, None)
    with pytest.raises(UsageError, match=r"has 0 GPU\(s\)\. .* --actors MIN:MAX"):
        choose(workers, grows=True, gpus_per_actor="1")
    assert choose(workers, grows=True, actors="1:8").gpus == 0


@pytest.mark.parametrize("address", ["auto", None])
def test_who_waits_for_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    config = DenoiseConfig(inputs=("in",), output="out", gpus_per_actor="1", actors="1:8")
    told: list[str] = []
    there = SimpleNamespace(
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}],
        cluster_resources=lambda: {"CPU": 4.0},
    )
    monkeypatch.setattr(cluster, "ray", there)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is None:
        with pytest.raises(UsageError, match=r"has 0 GPU"):
            cluster.fit_actors(config, images=100, tell=told.append)
        assert told == []
        return
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster.fit_actors(config, images=100, tell=told.append).gpus == 1
    assert told == [cluster.GPU_TO_COME]
    there.cluster_resources = lambda: {"CPU": 4.0, "GPU": 1.0}
    there.nodes = lambda: [
        {"Alive": True, "Resources": {"CPU": 3.0}},
        {"Alive": True, "Resources": {"CPU": 1.0, "GPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 1.0, "GPU": 8.0}},
    ]
    assert cluster.fit_actors(config, images=100, tell=told.append).cpus == 0.49
    assert len(told) == 1


@pytest.mark.parametrize(("hosts", "each", "left"), [(2, 2, 1), (2, 1, 1), (3, 8, 1), (16, 16, 8)])
def test_actors_of_lost_hosts_leave_room_for_tasks_on_the_others(
    hosts: int, each: int, left: int
) -> None:
    """Seen with two hosts of two CPUs: both actors on one host, and no task found room for ever."""
    chosen = choose({"CPU": float(hosts * each)}, hosts=(each,) * hosts)
    assert chosen.cpus >= 0.01
    assert left * each - chosen.actors[1] * chosen.cpus >= 0.9


@pytest.mark.parametrize("images", [1, 3, 16, 1000])
@pytest.mark.parametrize("actors", ["auto", "1", "2"])
@pytest.mark.parametrize("hosts", [(16,) * 4, (2, 2), (1, 1, 1), (32, 4), (16,), (1,)])
def test_actors_fit_on_one_host_each(hosts: tuple[int, ...], actors: str, images: int) -> None:
    """Seen with four hosts of 16 CPUs: the one actor for few images asked for 31, and none came."""
    chosen = choose({"CPU": float(sum(hosts))}, images=images, hosts=hosts, actors=actors)
    assert 0.01 <= chosen.cpus <= max(hosts) - 0.5
    assert chosen.threads is not None
    assert 1 <= chosen.threads <= max(hosts)


def test_a_few_images_get_an_actor_on_every_host() -> None:
    hosts = (16,) * 4
    assert choose({"CPU": 64.0}, images=16, hosts=hosts).actors == (4, 4)
    # One large image may have regions for all.
    assert choose({"CPU": 64.0}, images=1, hosts=hosts) == Resources((1, 4), 7.74, 0.0, 16)
    assert choose({"CPU": 16.0}, images=1, hosts=(16,)) == Resources((1, 1), 7.99, 0.0, 16)


def test_workers_that_are_still_to_come_must_be_stated() -> None:
    """A head of 0 CPUs whose autoscaler starts GPU machines on demand: nothing can be counted."""
    assert choose(EMPTY, gpus_per_actor="1", actors="1:8") == Resources((1, 8), 0.49, 1.0, None)
    for settings in ({}, {"actors": "1:8"}, {"gpus_per_actor": "1"}, {"gpus_per_actor": "0"}):
        with pytest.raises(UsageError, match="--gpus-per-actor and --actors MIN:MAX"):
            choose(EMPTY, **settings)


def test_windows_and_regions_that_no_host_can_hold_are_refused_with_the_numbers() -> None:
    checkpoint = load_checkpoint("unet-s")

    def check(gpus: float = 0.0, **settings: Any) -> None:
        config = DenoiseConfig(inputs=("in",), output="out", model="unet-s", **settings)
        geometry = resolve_geometry(checkpoint.card, patch=config.patch, halo=config.halo)
        job = _make_job(config, [checkpoint], geometry, run_id="run", options=StorageOptions())
        hosts = [{"CPU": 4.0}, {"CPU": 4.0, "memory": 4e9}, {"CPU": 1.0, "memory": 1e9}]
        check_memory(job, Resources((1, 1), 1.0, gpus, None), hosts)

    check()
    with pytest.raises(UsageError, match=r"--patch 4096.* 132.9 GB .* 0.3 GB .* 4.0 GB on"):
        check(patch="4096")
    check(patch="4096", gpus=1.0)
    with pytest.raises(UsageError, match="--region 16384"):
        check(region=16384, gpus=1.0)
    # In float32 a CPU takes patch by patch; in no run more of them than it has at hand.
    check(batch_size="1000000", precision="float32")
    check(batch_size="1000000", precision="bfloat16", gpus=1.0)
    check(batch_size="2", precision="bfloat16")
    with pytest.raises(UsageError, match=r"--batch-size 1000000: .* needs \d+\.\d GB"):
        check(batch_size="1000000", precision="bfloat16")


def test_a_fault_is_told_by_its_own_line_and_not_by_rays_advice(tmp_path: Path) -> None:
    trace = """Traceback (most recent call last):
      File "pillow.py", line 1, in save
    ValueError: XMP data is too long
    Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).
    To change retry attempts, backoff, or which errors are retried, configure `ray.data`."""
    flow = Flow.__new__(Flow)
    config = DenoiseConfig(inputs=("in",), output=str(tmp_path))
    flow.job = SimpleNamespace(config=config, run_id="run-1", options=None)  # type: ignore[assignment]
    text = str(flow._failure(RuntimeError(trace)))
    assert "ValueError: XMP data is too long. Trace: " in text
    assert "retry" not in text


def test_run_for_which_no_worker_comes_says_so(tmp_path: Path) -> None:
    """What Ray Data raises then, as one sentence of ours; its own names settings of Ray."""
    flow = Flow.__new__(Flow)
    config = DenoiseConfig(inputs=("in",), output=str(tmp_path), timeout_per_image=60.0)
    flow.job = SimpleNamespace(config=config, run_id="run-1", options=None)  # type: ignore[assignment]
    error = flow._failure(ExecutionTimeoutError("no progress\nraise ds.context.something"))
    assert "nothing moved for 660 s" in str(error)
    assert "ray status" in str(error)
    assert "ds.context" not in str(error)
    assert "ds.context" in (tmp_path / ".denoise/trace-run-1.txt").read_text()
