"""Evaluation through Ray: real actors, local disk and S3, exit codes."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import S3Server
from helpers import (
    Notes,
    as_dtype,
    files_below,
    files_with,
    make_checkpoint,
    make_keras_file,
    picture,
    ray_folder,
)
from test_evaluate import write_idx

from denoise_core.checkpoints import load_checkpoint, save_checkpoint
from denoise_core.config import EvaluateConfig
from denoise_core.denoiser import Denoiser
from denoise_core.errors import RunFailed
from denoise_core.evaluation.protocol import noisy_of, to_bytes
from denoise_core.metrics import psnr, ssim
from denoise_core.pipelines import evaluate as pipeline
from denoise_core.pipelines.evaluate import Watcher, run_evaluation
from jobs import evaluate

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def without_residual(folder: Path) -> str:
    """A checkpoint whose last layer is zero: it gives its input back."""
    made = load_checkpoint(make_checkpoint(folder / "random"))
    weights = made.weights()
    weights[-1][...] = 0
    card = {k: v for k, v in made.card.items() if k not in ("sha256", "card_version")}
    save_checkpoint(folder / "zero", weights, {**card, "name": "zero"})
    return str(folder / "zero")


def write(folder: Path, name: str, pixels: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(imagecodecs.png_encode(np.squeeze(pixels)))


def rows_of(out: Path) -> list[dict[str, Any]]:
    parts = sorted((out / "reports" / "evaluation").glob("part-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def test_a_model_without_residual_is_the_identity(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = {
        "colour.png": as_dtype(picture(80, 70, 3, sigma=0), "uint8"),
        "grey.png": as_dtype(picture(64, 90, 1, seed=1, sigma=0), "uint8"),
        "deep.png": as_dtype(picture(48, 48, 3, seed=2, sigma=0), "uint16"),
        "tiny.png": as_dtype(picture(9, 7, 3, seed=3, sigma=0), "uint8"),
    }
    for name, pixels in images.items():
        write(tmp_path / "in", name, pixels)
    config = EvaluateConfig(
        data=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        model=(
            without_residual(tmp_path),
            checkpoint,
            make_keras_file(tmp_path / "mine.keras", monkeypatch),
        ),
        model_range="0:255",
        noise=("gaussian:15", "gaussian:25", "speckle:20"),
        baselines=("median",),
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text("{}")
    notes = Notes()
    outcome = run_evaluation(config, watcher=notes)
    assert f"The earlier evaluation in {tmp_path}/out will be replaced." in notes
    rows = {(r["image"], r["method"], r["noise"]): r for r in rows_of(tmp_path / "out")}
    assert len(rows) == 4 * 5 * 3
    for (image, method, noise), found in rows.items():
        if method == "zero":
            identity = rows[image, "identity", noise]
            for name in ("mse", "psnr", "ssim"):
                assert found[name] == identity[name], (image, noise)
        if method == "mine.keras":
            # In a range of 0:1 all would be black.
            assert found["psnr"] > rows[image, "identity", noise]["psnr"] - 1
    check_known_figures(rows, images["colour.png"], checkpoint)
    assert rows["tiny.png", "zero", "gaussian:25"]["ssim"] is None
    results = [each for each in outcome.summary["results"] if each["method"] == "zero"]
    assert [each["gain"]["mean"] for each in results] == [0, 0, 0]
    assert {
        "latent-tiny-0.png",
        "latent-mine.keras.png",
        "worst-zero-gaussian-25.png",
        "best-tiny-0-gaussian-25.png",
    } <= set(files_below(tmp_path / "out" / "pictures"))
    assert files_below(tmp_path / "out" / ".evaluate") == []


def check_known_figures(rows: dict[Any, Any], clean: np.ndarray, checkpoint: str) -> None:
    """The figures of rows are those of the denoiser, called without any of this."""
    noisy = noisy_of(clean, 25)
    denoiser = Denoiser(load_checkpoint(checkpoint), precision="float32")
    (denoised,) = denoiser.denoise([noisy], ranges=[(0.0, 1.0)])
    for method, values in (("identity", noisy), ("tiny-0", denoised)):
        found = rows["colour.png", method, "gaussian:25"]
        output = to_bytes(values)
        assert found["psnr"] == pytest.approx(psnr(output, clean, data_range=255), abs=1e-3)
        assert found["ssim"] == pytest.approx(ssim(output, clean, data_range=255), abs=1e-4)


def test_idx_on_s3_by_the_command(
    checkpoint: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_server.make_bucket()
    folder = s3_server.root / bucket.removeprefix("s3://") / "in"
    folder.mkdir()
    digits = np.stack([picture(28, 28, 1, seed=i, sigma=0)[..., 0] for i in range(12)])
    write_idx(folder / "t-images-idx3-ubyte.gz", as_dtype(digits, "uint8"))
    write_idx(folder / "t-labels-idx1-ubyte.gz", np.arange(12) % 3)
    (folder / "broken.png").write_bytes(b"not an image")
    shutil.copytree(checkpoint, folder.parent / "best")
    words = [f"{bucket}/in", "--output", f"{bucket}/out", "--model", f"{bucket}/best"]
    words += ["--noise", "gaussian:25", "factor:0.5", "--baselines", "none"]
    done = CliRunner().invoke(evaluate.main, words)
    assert done.exit_code == 3, done.output
    assert "'broken.png' (NotAnImage)" in done.output
    assert "Over the error budget: 7.7%" in done.output
    out = folder.parent / "out"
    hidden = [s3_server.secret_key, s3_server.access_key]
    assert [secret for secret in hidden if secret in done.output] == []
    assert files_with(hidden, out) + files_with(hidden, ray_folder()) == []
    summary = json.loads((out / "summary.json").read_text())
    assert summary["images"] == {"total": 13, "ok": 12, "failed": 1}
    assert (out / "evaluation.html").read_bytes().startswith(b"<!doctype html>")
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in summary["pictures"])
    rows = [row for row in rows_of(out) if row["status"] == "ok"]
    assert len(rows) == 12 * 2 * 2
    assert {(row["index"], row["label"]) for row in rows} == {(i, i % 3) for i in range(12)}


def test_damaged_weights_end_the_run_with_a_sentence(tmp_path: Path) -> None:
    model = Path(make_checkpoint(tmp_path / "model"))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    write(tmp_path / "in", "a.png", as_dtype(picture(32, 32, 3), "uint8"))
    config = EvaluateConfig(
        data=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        model=(str(model),),
        baselines=("none",),
    )
    with pytest.raises(RunFailed, match="do not have the card's SHA-256") as caught:
        run_evaluation(config, watcher=Watcher())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "summary.json").exists()


def test_an_output_that_takes_no_file_ends_the_run_with_its_sentence(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in", "a.png", as_dtype(picture(32, 32, 3), "uint8"))
    out = tmp_path / "out"
    monkeypatch.setattr(pipeline, "_sweep", lambda plan: (out / ".evaluate").touch())
    config = EvaluateConfig(data=(str(tmp_path / "in"),), output=str(out), model=(checkpoint,))
    with pytest.raises(RunFailed, match=r"^the evaluation stopped: .*a part of this path is a fi"):
        run_evaluation(config, watcher=Watcher())


def test_an_interrupted_evaluation_ends_its_work_before_it_clears_up(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in", "a.png", as_dtype(picture(16, 16, 3), "uint8"))
    late = tmp_path / "out/.evaluate/ends/late.npz"
    written = []

    class Work:
        """As Ray Data's: it ends when nobody holds it, and an actor of it may still write."""

        def __del__(self) -> None:
            late.parent.mkdir(parents=True)
            late.touch()
            written.append(late)

    def results(*_: Any) -> Iterator[pa.Table]:
        work = Work()  # noqa: F841
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(pipeline, "_results", results)
    monkeypatch.setattr(pipeline, "END_S", 0.0)
    config = EvaluateConfig(
        data=(str(tmp_path / "in"),), output=str(tmp_path / "out"), model=(checkpoint,)
    )
    with pytest.raises(KeyboardInterrupt) as caught:
        run_evaluation(config, watcher=Watcher())
    del caught
    gc.collect()
    assert written
    assert files_below(tmp_path / "out") == []
