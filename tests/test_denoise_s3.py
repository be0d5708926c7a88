"""The denoising job from S3 to S3, against a real server with signatures; and its refusals."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs
import pytest
from click.testing import CliRunner
from conftest import S3Server, free_port
from helpers import as_dtype, by_name, denoise, files_below, make_checkpoint, picture

from denoise_core.config import DenoiseConfig
from denoise_core.errors import RunFailed
from denoise_core.pipelines import denoise as pipeline
from denoise_core.storage import StorageOptions, join, storage_for
from jobs.denoise import main

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def upload(uri: str, *, seed: int = 0) -> None:
    pixels = as_dtype(picture(70, 90, 3, seed=seed), "uint8")
    storage_for(uri).write(uri, bytes(imagecodecs.png_encode(pixels)))


def test_bucket_to_bucket_and_no_secret_anywhere(
    ray_session: None, s3_server: S3Server, checkpoint: str
) -> None:
    bucket = s3_server.make_bucket()
    for seed, name in enumerate(("a.png", "deep/b c ü.png", "deep/d.png")):
        upload(join(bucket, "in", name), seed=seed)
    storage_for(bucket).write(join(bucket, "in/bad.png"), b"nothing")
    source, out = join(bucket, "in"), join(bucket, "in", "out")
    outcome = denoise(source, out, checkpoint, max_error_rate=0.5)
    assert (outcome.totals.ok, outcome.totals.failed) == (3, 1)
    again = denoise(source, out, checkpoint, max_error_rate=0.5)
    assert (again.totals.to_do, again.totals.skipped) == (0, 4)
    local = s3_server.root / out.removeprefix("s3://")
    assert sorted(files_below(local / "images")) == ["a.png", "deep/b c ü.png", "deep/d.png"]
    rows = by_name(local)
    assert rows["a.png"]["output_uri"] == join(out, "images/a.png")
    assert rows["bad.png"]["error_type"] == "NotAnImage"
    assert (local / "_SUCCESS").exists()
    assert not (local / ".denoise/lock.json").exists()
    for name in files_below(local):
        data = (local / name).read_bytes()
        assert s3_server.secret_key.encode() not in data, name
        assert s3_server.access_key.encode() not in data, name


def test_a_model_replaced_on_s3_meanwhile_ends_the_run_with_a_sentence(
    ray_session: None, s3_server: S3Server, tmp_path: Path
) -> None:
    bucket = s3_server.make_bucket()
    upload(join(bucket, "in/a.png"))
    model = join(bucket, "best")

    def put(seed: int) -> None:
        folder = Path(make_checkpoint(tmp_path / str(seed), seed=seed))
        for name in ("model.safetensors", "model.json"):
            storage_for(model).write(join(model, name), (folder / name).read_bytes())

    put(0)
    config = DenoiseConfig(
        inputs=(join(bucket, "in"),), output=str(tmp_path / "out"), model=model, actors="1"
    )
    sentence = f"the work stopped: --model {model}: its weights are not those that this run began "
    with pytest.raises(RunFailed, match=f"^{re.escape(sentence)}.* on all machines. Finished "):
        pipeline.run_denoising(config, watcher=pipeline.Watcher(), start_ray=lambda: put(1))


def call(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tries in place of eight, and no Ray."""
    monkeypatch.setattr(pipeline, "StorageOptions", partial(StorageOptions, max_attempts=2))
    monkeypatch.setattr("jobs.denoise.start_ray", lambda: pytest.fail("Ray was started"))


@pytest.mark.usefixtures("hasty")
def test_wrong_keys_bucket_and_endpoint_are_one_sentence_each(
    s3_server: S3Server, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_server.make_bucket()
    upload(join(bucket, "a.png"))
    local = tmp_path / "out"

    def refused(*arguments: Any) -> str:
        code, text = call(*arguments, "--model", checkpoint)
        assert code in (1, 2), text
        assert text.startswith("Error: "), text
        assert len(text.strip().splitlines()) == 1, text
        assert s3_server.secret_key not in text
        return text

    missing = "s3://no-such-bucket-here"
    assert "no such bucket" in refused(missing, "--output", local)
    assert "no such bucket" in refused(bucket, "--output", f"{missing}/out")
    assert "no key below it" in refused(join(bucket, "nothing"), "--output", local)
    dead = f"http://127.0.0.1:{free_port()}"
    text = refused(bucket, "--output", local, "--s3-endpoint", dead)
    assert "did not answer after 2 tries" in text
    assert "not valid" in refused(bucket, "--output", local, "--s3-endpoint", "nonsense")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong" * 8)
    assert "AWS_ACCESS_KEY_ID" in refused(bucket, "--output", local)
    assert "AWS_ACCESS_KEY_ID" in refused(tmp_path, "--output", join(bucket, "out"))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "credentials" in refused(bucket, "--output", local)
