"""The denoising job when things break: killed processes, poisoned and stuck images, locks, faults.

Faults are made by `worker_hook` in Ray's workers, by the image's name.
"""

from __future__ import annotations

import gc
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
import worker_hook
from helpers import (
    Notes,
    as_dtype,
    by_name,
    denoise,
    files_below,
    job_environment,
    json_lines,
    kill_everything,
    picture,
    rows_of,
    run_job,
    wait_until,
)

from denoise_core import lock
from denoise_core.errors import OutputLocked, RunFailed
from denoise_core.images import decode
from denoise_core.results import Done
from denoise_core.storage import LocalStorage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def write_pngs(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        pixels = as_dtype(picture(90, 120, 3, seed=seed), "uint8")
        (folder / f"{name}.png").write_bytes(bytes(imagecodecs.png_encode(pixels)))


def test_killers_and_stuck_images_fail_alone(
    ray_session: None, stand_in: str, tmp_path: Path
) -> None:
    good = [f"good-{i}" for i in range(6)]
    poison = ["poison-read-SIGSEGV", "poison-denoise-SIGKILL", "poison-write-SIGABRT"]
    write_pngs(tmp_path / "in", *good, *poison, "stuck")
    outcome = denoise(
        tmp_path / "in", tmp_path / "out", stand_in, max_attempts=2, timeout_per_image=15.0
    )
    rows = by_name(tmp_path / "out")
    assert outcome.totals.failed == 4
    assert {rows[f"{name}.png"]["status"] for name in good} == {"ok"}
    for name in poison:
        row = rows[f"{name}.png"]
        _, stage, word = name.split("-")
        assert (row["error_type"], row["error_stage"]) == ("WorkerDied", stage)
        assert row["attempts"] == 2
        assert "died 2 times" in row["error_message"]
        assert word in row["error_message"]
    stuck = rows["stuck.png"]
    assert (stuck["error_type"], stuck["error_stage"]) == ("ImageTimeout", "read")
    assert "15 s" in stuck["error_message"]


def test_a_codec_that_never_comes_back_is_ended_with_its_process(
    ray_session: None, stand_in: str, tmp_path: Path
) -> None:
    write_pngs(tmp_path / "in", "good", "wedged")
    outcome = denoise(
        tmp_path / "in", tmp_path / "out", stand_in, max_attempts=1, timeout_per_image=8.0
    )
    rows = by_name(tmp_path / "out")
    assert (outcome.totals.ok, outcome.totals.failed) == (1, 1)
    assert rows["good.png"]["status"] == "ok"
    row = rows["wedged.png"]
    assert (row["error_type"], row["error_stage"]) == ("WorkerDied", "read")
    assert "stuck, by its time limit" in row["error_message"]


def test_fault_of_the_program_ends_the_run_in_one_sentence(
    ray_session: None, stand_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from denoise_core.pipelines import flow

    write_pngs(tmp_path / "in", "bug")
    with pytest.raises(RunFailed, match="a bug of ours") as caught:
        denoise(tmp_path / "in", tmp_path / "out", stand_in)
    assert "\n" not in str(caught.value)
    (trace,) = (tmp_path / "out/.denoise").glob("trace-*.txt")
    assert "KeyError" in trace.read_text()
    assert not (tmp_path / "out/.denoise/lock.json").exists()
    assert not (tmp_path / "out/_SUCCESS").exists()
    # Another run in this process need not wait until Ray itself has the garbage collected, which
    # holds the failed one's actors, and they the CPUs.
    del caught
    left = [weakref.ref(each) for each in gc.get_objects() if isinstance(each, flow.Flow)]
    gone: list[bool] = []
    build = flow.build_dataset

    def building(*arguments: Any, **more: Any) -> Any:
        gone.extend(each() is None for each in left)
        return build(*arguments, **more)

    monkeypatch.setattr(flow, "build_dataset", building)
    write_pngs(tmp_path / "good", "one")
    assert denoise(tmp_path / "good", tmp_path / "good-out", stand_in).totals.ok == 1
    assert gone
    assert all(gone)


# What makes root obey permissions.
BOUND = (
    ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if os.geteuid() == 0 and shutil.which("setpriv")
    else []
)


def start_hooked(*arguments: Any, before: list[str] | None = None) -> subprocess.Popen[str]:
    """`python -m jobs.denoise` with the faults of `worker_hook`, in a session of its own."""
    hook = Path(__file__).with_name("worker_hook.py")
    return subprocess.Popen(
        [*(before or []), sys.executable, str(hook), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=job_environment(),
    )


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        ("full", "no space is left"),
        ("read-only", "is read-only"),
        ("forbidden", "permission denied"),
    ],
)
def test_an_output_that_fails_midway_ends_the_run_and_the_rerun_completes(
    ray_session: None,
    stand_in: str,
    tmp_path: Path,
    small_disk: Path,
    trouble: str,
    sentence: str,
) -> None:
    if trouble == "forbidden" and os.geteuid() == 0 and not BOUND:
        pytest.skip("root may write everywhere, and there is no setpriv")

    def remount(options: str) -> bool:
        command = ["mount", "-o", f"remount,{options}", str(small_disk)]
        return subprocess.run(command, capture_output=True).returncode == 0

    names = [f"slow-{i:02d}" for i in range(24)]
    source, out = tmp_path / "in", small_disk / "out"
    source.mkdir()
    for seed, name in enumerate(names):
        pixels = as_dtype(picture(240, 320, 3, seed=seed), "uint8")
        (source / f"{name}.png").write_bytes(bytes(imagecodecs.png_encode(pixels)))
    if trouble != "full":
        assert remount("size=50m")

    def spoil() -> None:
        end = time.monotonic() + 200
        while len(files_below(out / "images")) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        if trouble == "forbidden":
            (out / "images").chmod(0o500)
        # Refused as long as a file is being written.
        while trouble == "read-only" and not remount("ro") and time.monotonic() < end:
            time.sleep(0.05)

    spoiling = threading.Thread(target=spoil)
    spoiling.start()
    if trouble == "forbidden":  # by workers that may not write everywhere
        words = [str(source), "--output", str(out), "--model", stand_in]
        words += ["--precision", "float32", "--actors", "1"]
        process = start_hooked(*words, before=BOUND)
        text, _ = process.communicate(timeout=200)
        assert process.returncode == 1, text
        told = [line for line in text.splitlines() if sentence in line]
        assert [line.partition(":")[0] for line in told] == ["Error"], text
    else:
        with pytest.raises(RunFailed, match=sentence) as caught:
            denoise(source, out, stand_in)
        text = str(caught.value)
        assert "\n" not in text
        del caught
    spoiling.join()
    assert "Traceback" not in text
    assert "UDF" not in text
    assert remount("rw,size=50m")
    (out / "images").chmod(0o700)
    assert sorted(files_below(out / "images")) != [f"{name}.png" for name in names]
    # Where the lock could not be taken away, it is dead in a minute.
    (out / ".denoise/lock.json").unlink(missing_ok=True)
    with worker_hook.hurry():
        assert denoise(source, out, stand_in).within_budget
    rows = rows_of(out)
    assert sorted(row["status"] for row in rows) == ["ok"] * len(names)
    for row in rows:
        pixels = decode(Path(row["output_uri"]).read_bytes(), name="out").pixels
        assert pixels.shape == (240, 320, 3)


def test_sigkill_of_everything_loses_only_what_is_in_flight(
    ray_session: None, stand_in: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    names = [f"slow-{i:02d}" for i in range(24)]
    write_pngs(source, *names)
    big = as_dtype(picture(1500, 1400, 3, seed=2), "uint8")
    tifffile.imwrite(source / "slow-big.tif", big, tile=(128, 128), photometric="rgb")
    flags = ["--model", stand_in, "--precision", "float32", "--actors", "1", "--region", "512"]
    process = start_hooked(source, "--output", out, *flags)

    def under_way() -> bool:
        # In whatever order: regions of the large image, and rows of small ones before or after.
        markers = list(out.glob(".denoise/regions/*/*.json"))
        rows = list(out.glob(".denoise/journal/*.parquet"))
        return bool(markers and rows) or len(markers) >= 3

    # A second run is refused at once, by the first one's id.
    lock = out / ".denoise/lock.json"
    wait_until(lock.exists, process)
    holder = json.loads(lock.read_text())["run_id"]
    with pytest.raises(OutputLocked, match=holder):
        denoise(source, out, stand_in)
    wait_until(under_way, process)
    time.sleep(random.uniform(0, 0.3))
    kill_everything(process)

    for name in files_below(out / "images"):
        assert name.rpartition("/")[2].startswith("slow-"), "a temporary file was left"
        decode((out / "images" / name).read_bytes(), name=name)
    safe = Done.load(LocalStorage(), str(out)).images
    staged = sorted(out.glob(".denoise/regions/*/*.json"))
    before = {n: (out / "images" / n).stat().st_mtime_ns for n in files_below(out / "images")}
    assert staged
    assert len(safe) < 25
    # What is staged is used and not made again: mark one region to find it in the result.
    marked = np.load(staged[0].with_suffix(".npy"))
    np.save(staged[0].with_suffix(".npy"), 255 - marked)
    notes = Notes()
    with worker_hook.hurry():
        outcome = resume(source, out, stand_in, notes)
    assert notes == [f"Took over the lock of run {holder}, which is dead."]
    assert outcome.totals.skipped == len(safe)
    assert outcome.totals.ok == 25 - len(safe)
    rows = by_name(out)
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert len(rows) == len(files_below(out / "images")) == 25
    for name, moment in before.items():
        if rows[name]["image_id"] in safe:
            assert (out / "images" / name).stat().st_mtime_ns == moment, name
    assert rows["slow-big.tif"]["regions"] == 9
    leftovers = [n for n in files_below(out / ".denoise") if "journal" not in n]
    assert leftovers == []
    check_against_uninterrupted(big, out, marked=marked.size)


def resume(source: Path, out: Path, model: str, notes: Notes) -> Any:
    from denoise_core.config import DenoiseConfig
    from denoise_core.pipelines.denoise import run_denoising

    config = DenoiseConfig(
        inputs=(str(source),), output=str(out), model=model, precision="float32",
        actors="1", region=512,
    )  # fmt: skip
    return run_denoising(config, watcher=notes)


def check_against_uninterrupted(big: np.ndarray, out: Path, *, marked: int) -> None:
    """The image put together over the kill is that of a quiet run, but for the marked region."""
    got = tifffile.imread(out / "images/slow-big.tif")
    expected = worker_hook.stand_in(big)
    same, negative = got == expected, 255 - got == expected
    assert (same | negative).all()
    assert np.count_nonzero(~same) == marked


def test_sigterm_ends_in_order_and_the_rerun_goes_on(stand_in: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_pngs(source, *[f"slow-{i:02d}" for i in range(30)])
    process = start_hooked(source, "--output", out, "--model", stand_in, "--actors", "1")
    wait_until(lambda: list(out.glob(".denoise/journal/*.parquet")), process)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 130, text
    assert "Traceback" not in text
    last = "Interrupted. Finished images are safe; the same command goes on."
    assert text.splitlines()[-1].strip() == last
    assert not (out / ".denoise/lock.json").exists()
    assert not (out / "_SUCCESS").exists()
    done = rows_of(out)
    assert 0 < len(done) < 30


@pytest.mark.parametrize("finished", [0, 1])
def test_an_interrupted_run_leaves_nothing_at_work(
    ray_session: None, stand_in: str, tmp_path: Path, finished: int
) -> None:
    """While the actors start, and later: else the exit of the process meets what goes on."""

    class Interrupting(Notes):
        interrupted = False

        def update(self, totals: Any) -> None:
            at_work = any(map(is_at_work, threading.enumerate()))
            if totals.done >= finished and at_work and not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt

    def is_at_work(thread: threading.Thread) -> bool:
        return "_feed" in thread.name or "StreamingExecutor" in thread.name

    source = tmp_path / "in"
    write_pngs(source, *[f"slow-{i:02d}" for i in range(30)])
    with pytest.raises(KeyboardInterrupt):
        resume(source, tmp_path / "out", stand_in, Interrupting())
    left = [thread.name for thread in threading.enumerate() if is_at_work(thread)]
    assert left == []
    assert finished <= len(rows_of(tmp_path / "out")) < 30


def test_an_interrupted_assembly_is_ended_too(
    ray_session: None, stand_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would publish over what a later run has made. Here it takes a minute."""
    import ray

    from denoise_core.pipelines.flow import Flow

    begun = threading.Event()
    assemble = Flow.assemble

    def noted(flow: Flow, facts: Any) -> None:
        assemble(flow, facts)
        begun.set()

    class Interrupting(Notes):
        def update(self, *_: Any) -> None:
            if begun.is_set():
                begun.clear()
                raise KeyboardInterrupt

    monkeypatch.setattr(Flow, "assemble", noted)
    (tmp_path / "in").mkdir()
    big = as_dtype(picture(600, 900, 3, seed=2), "uint8")
    tifffile.imwrite(tmp_path / "in/slow-big.tif", big, tile=(128, 128), photometric="rgb")
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path / "in", tmp_path / "out", stand_in, Interrupting())
    end = time.monotonic() + 45
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < end, "something is still at work"
        time.sleep(0.2)
    assert not (tmp_path / "out/images/slow-big.tif").exists()


def test_regions_made_twice_are_assembled_once(
    ray_session: None, stand_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second assembly may find the regions deleted, and its failure deletes the image."""
    from denoise_core.pipelines.flow import Flow

    assembled = []
    assemble, really = Flow.assemble, Flow.__iter__

    def noted(flow: Flow, facts: Any) -> None:
        assembled.append(facts["path"])
        assemble(flow, facts)

    def again(flow: Flow) -> Any:
        regions: list[Any] = []
        for facts in really(flow):
            yield facts
            if facts is not None and facts["in_regions"]:
                regions.append(facts)
                if len(regions) == facts["regions"]:
                    yield from regions
                    yield {**facts, "error_type": "CorruptImage", "error_message": "late"}

    monkeypatch.setattr(Flow, "assemble", noted)
    monkeypatch.setattr(Flow, "__iter__", again)
    (tmp_path / "in").mkdir()
    big = as_dtype(picture(600, 900, 3, seed=2), "uint8")
    tifffile.imwrite(tmp_path / "in/big.tif", big, tile=(128, 128), photometric="rgb")
    outcome = denoise(tmp_path / "in", tmp_path / "out", stand_in, region=512)
    assert assembled == ["big.tif"]
    assert (outcome.totals.ok, outcome.totals.failed) == (1, 0)
    assert (tmp_path / "out/images/big.tif").exists()


def test_command_line_from_start_to_exit_code(checkpoint: str, tmp_path: Path) -> None:
    """A whole process: JSON lines, exit 3, then 0 within the budget, without starting Ray."""
    source, out = tmp_path / "in", tmp_path / "out"
    write_pngs(source, "one")
    (source / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbut no more")
    flags = [source, "--output", out, "--model", checkpoint]
    code, text = run_job(*flags, "--progress", "json")
    assert code == 3, text
    lines = json_lines(text)
    assert lines[-1]["done"]["ok"] == lines[-1]["done"]["failed"] == 1
    assert any("progress" in line for line in lines)
    nowhere = job_environment(RAY_ADDRESS="nowhere:1")
    code, text = run_job(*flags, "--max-error-rate", "0.5", environment=nowhere)
    assert code == 0, text
    assert "1 already done" in text
    assert "1 failed in earlier runs" in text
    assert "--retry-failed" in text
    assert "\x1b" not in text
    assert (out / "_SUCCESS").exists()
    code, text = run_job(*flags)
    assert code == 3
    assert "Over the error budget: 50.0% failed" in text
    assert not (out / "_SUCCESS").exists()


@pytest.mark.skipif(os.geteuid() == 0 and not BOUND, reason="root may read everything")
def test_a_terminal_shows_a_bar_and_why_a_file_could_not_be_read(
    checkpoint: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_pngs(source, "one", "two", "secret")
    (source / "secret.png").chmod(0)
    command = [*BOUND, sys.executable, "-m", "jobs.denoise", source, "--output", out]
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [*map(str, command), "--model", checkpoint],
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        env=job_environment(TERM="xterm-256color", COLUMNS="100", LINES="40"),
    )
    os.close(end)
    shown = b""
    # Linux ends a terminal without writers by an error.
    with suppress(OSError):
        while part := os.read(terminal, 1 << 16):
            shown += part
    os.close(terminal)
    text = shown.decode()
    assert process.wait(timeout=30) == 3, text
    assert "Traceback" not in text
    # The bar is drawn again and again in place, and gone at the end.
    assert "Starting workers" in text
    assert "\x1b[2K" in text
    last = text.rpartition("\x1b")[2]
    assert "2 denoised, 0 copied, 1 failed" in last
    assert "━" not in last
    row = by_name(out)["secret.png"]
    assert (row["error_stage"], row["error_type"]) == ("read", "AccessDenied")
    assert "permission denied; give this user the right" in row["error_message"]
    assert by_name(out)["one.png"]["status"] == "ok"


def write_lock(out: Path, **values: Any) -> None:
    (out / ".denoise").mkdir(parents=True, exist_ok=True)
    mine = {**json.loads(lock._content("other")), **values}
    (out / ".denoise/lock.json").write_text(json.dumps(mine))


def test_lock_of_a_living_run_is_refused_and_a_dead_one_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SETTLE_S", 0.0)
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.5)
    storage = LocalStorage()
    write_lock(tmp_path)
    with pytest.raises(OutputLocked, match="run other on"):
        lock.output_lock(storage, str(tmp_path), run_id="mine").__enter__()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    old = time.time() - 3600
    # The process is gone; the machine is another's and its heartbeat old; the file is damaged.
    for values in ({"pid": gone.pid}, {"host": "elsewhere", "heartbeat": old}, {"run_id": "x"}):
        write_lock(tmp_path, **values)
        if values == {"run_id": "x"}:
            (tmp_path / ".denoise/lock.json").write_text("{")
        with lock.output_lock(storage, str(tmp_path), run_id="mine") as held:
            assert held.taken_from in ("other", "unknown")
            held.check()
        assert not (tmp_path / ".denoise/lock.json").exists()
    # Its clock is slow, but it is alive.
    write_lock(tmp_path, host="elsewhere", heartbeat=old)
    beats = iter(range(100))
    content = {"run_id": "other", "host": "elsewhere"}
    monkeypatch.setattr(
        lock, "_holder", lambda *_: {**content, "heartbeat": old + next(beats) * 10}
    )
    with pytest.raises(OutputLocked, match="run other on elsewhere"):
        lock.output_lock(storage, str(tmp_path), run_id="mine").__enter__()


def test_run_that_lost_its_lock_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.02)
    with lock.output_lock(LocalStorage(), str(tmp_path), run_id="mine") as held:
        end = time.monotonic() + 30
        # Again: a beat may have been under way.
        while held.lost_to != "thief" and time.monotonic() < end:
            write_lock(tmp_path, run_id="thief")
            time.sleep(0.05)
        with pytest.raises(RunFailed, match="run thief took over"):
            held.check()
    assert json.loads((tmp_path / ".denoise/lock.json").read_text())["run_id"] == "thief"
