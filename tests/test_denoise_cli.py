"""The command line of `jobs.denoise`: precedence, suggestions, sentences. Starts no Ray."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import denoise_core.report
from denoise_core.config import DenoiseConfig, TrainConfig
from denoise_core.errors import RunFailed
from denoise_core.pipelines.denoise import Outcome, Totals
from jobs import demo, denoise, report
from jobs._cli import settings_command
from jobs._progress import print_outcome, rate, seconds_left
from jobs.demo import MARKER, make_room


def invoke(
    *arguments: Any, env: dict[str, str] | None = None, settings: type = DenoiseConfig
) -> tuple[int, str, list[Any]]:
    """Parse only; return the exit code, the output and the settings."""
    seen: list[Any] = []
    command = settings_command(
        settings, lambda config: seen.append(config) or 0, name="jobs.denoise", help="Help."
    )
    result = CliRunner().invoke(command, [str(each) for each in arguments], env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result.exit_code, result.output, seen


def refused(*arguments: Any, **more: Any) -> str:
    code, text, seen = invoke(*arguments, **more)
    assert (code, seen) == (2, []), text
    return text


def run(*arguments: Any) -> tuple[int, str]:
    """Run the job itself; every use here ends before Ray."""
    result = CliRunner().invoke(denoise.main, [str(each) for each in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoise, "start_ray", lambda: pytest.fail("Ray was started"))
    for name in [name for name in os.environ if name.startswith("DENOISE_")]:
        monkeypatch.delenv(name)


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('output = "file"\npatch = 512\nstrength = 0.25\nmax-error-rate = 0.5\n')
    env = {"DENOISE_STRENGTH": "0.5", "DENOISE_PATCH": "1024"}
    flags = ("in", "--config", file, "--patch", "128")
    code, text, (config,) = invoke(*flags, env=env)
    assert code == 0, text
    assert (config.patch, config.strength) == ("128", 0.5)
    assert (config.output, config.max_error_rate, config.halo) == ("file", 0.5, "auto")
    code, text, (config,) = invoke("in", env={"DENOISE_CONFIG": str(file)})
    assert code == 0, text
    assert (config.output, config.patch) == ("file", "512")


def test_a_flag_beats_what_it_excludes_in_the_environment_and_the_file(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("hours = 2.0\nvalidate-minutes = 5.0\nseed = 3\n")
    file = ("in", "--output", "o", "--config", tmp_path / "job.toml")

    def lengths(*flags: Any, **env: str) -> tuple[Any, ...]:
        code, text, (config,) = invoke(*file, *flags, env=env, settings=TrainConfig)
        assert (code, config.seed) == (0, 3), text
        return config.steps, config.epochs, config.hours, config.validate_minutes

    assert lengths() == (None, None, 2.0, 5.0)
    assert lengths("--steps", 5) == (5, None, None, 5.0)
    assert lengths(DENOISE_EPOCHS="4") == (None, 4.0, None, 5.0)
    assert lengths("--steps", 5, "--validate-steps", 2, DENOISE_EPOCHS="4") == (5, None, None, None)
    assert "by one of" in refused(*file, "--steps", 5, "--epochs", 2, settings=TrainConfig)


def test_the_example_configuration_leaves_no_kind_of_image_out() -> None:
    file = Path(denoise.__file__).parent / "configs" / "denoise.toml"
    code, text, (config,) = invoke("in", "--output", "o", "--config", file)
    assert code == 0, text
    assert (config.include, config.exclude) == ((), ())


def test_config_file_gives_lists_switches_and_inputs(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(
        'inputs = ["a", "b"]\noutput = "o"\nrecursive = false\ninclude = ["*.png", "*.tif"]\n'
        'exclude = "x*"\nlimit = 3\n'
    )
    code, text, (config,) = invoke("--config", file)
    assert code == 0, text
    assert config.inputs == ("a", "b")
    assert (config.recursive, config.limit) == (False, 3)
    assert (config.include, config.exclude) == (("*.png", "*.tif"), ("x*",))
    _, _, (config,) = invoke("c", "--config", file, "--recursive", "--include", "*.bmp")
    assert (config.inputs, config.recursive, config.include) == (("c",), True, ("*.bmp",))


@pytest.mark.parametrize("flag", ["--recursiv", "--streng", "--max-eror-rate", "--patsh"])
def test_unknown_flag_names_the_nearest(flag: str) -> None:
    text = refused("in", "--output", "o", f"{flag}=1")
    nearest = {"--recursiv": "--recursive", "--streng": "--strength", "--patsh": "--patch"}
    assert nearest.get(flag, "--max-error-rate") in text
    assert flag in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("strenght = 1", "'strength'"),
        ("output = [1", "not valid TOML"),
        ("[model]\nx = 1", "model = {'x': 1}"),
        ("limit = 'many'", "many"),
        ("recursive = 'perhaps'", "perhaps"),
        ("include = 5", "include"),
        ("recursive = 0", "recursive = 0: expected true or false"),
        ("limit = 1.5", "limit = 1.5: expected a whole number"),
        ("limit = true", "limit = True: expected a whole number"),
        ("strength = true", "strength = True: expected a number"),
        ("format = 'gif'", "gif"),
    ],
)
def test_bad_config_file_is_named(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "job.toml"
    file.write_text(content)
    text = refused("in", "--output", "o", "--config", file)
    assert said in text


def test_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "cannot be read" in refused("in", "--output", "o", "--config", tmp_path / "none.toml")
    assert "cannot be read" in refused("in", "--output", "o", "--config", tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'output = "\xe9"')
    assert "TOML" in refused("in", "--output", "o", "--config", tmp_path / "latin.toml")


@pytest.mark.parametrize(
    "flags",
    [
        ("--strength", "2"), ("--patch", "5"), ("--halo", "-1"), ("--limit", "0"),
        ("--batch-size", "0"), ("--actors", "2:1"), ("--region", "100"), ("--data-range", "5:1"),
        ("--gpus-per-actor", "x"), ("--copy-below", "-3"), ("--max-error-rate", "7"),
        ("--timeout-per-image", "0"), ("--timeout-per-image", "inf"),
        ("--max-attempts", "0"), ("--format", "gif"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(flags: tuple[str, str]) -> None:
    assert flags[0] in refused("in", "--output", "o", *flags)


def test_missing_arguments_are_named(tmp_path: Path) -> None:
    assert "--output" in refused("in")
    assert "INPUT" in refused("--output", "o")
    assert "INPUT" in refused("", "--output", "o")


def test_paths_that_cannot_work_are_refused_and_leave_nothing(
    tmp_path: Path, checkpoint: str
) -> None:
    (tmp_path / "in/images").mkdir(parents=True)
    (tmp_path / "in/images/a.png").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    model = ("--model", checkpoint)

    def sentence(*arguments: Any) -> str:
        code, text = run(*arguments)
        assert code == 2, text
        assert text.startswith("Error: "), text
        assert len(text.strip().splitlines()) == 1, text
        return text

    out = ("--output", tmp_path / "out")
    assert "no such file or folder" in sentence(tmp_path / "none", *out, *model)
    assert "No inputs found" in sentence(tmp_path / "empty", *out, *model)
    assert "no file matches" in sentence(tmp_path / "in/*.gif", *out, *model)
    assert "neither a shipped model" in sentence(tmp_path / "in", *out, "--model", "unet-z")
    assert "ftp://" in sentence("ftp://x/y", *out, *model)
    assert "multiple of 2" in sentence(tmp_path / "in", *out, *model, "--patch", "33")
    inside = ("--output", tmp_path / "in")
    assert "among the outputs" in sentence(tmp_path / "in/images", *inside, *model)
    for folder in ("images", "reports"):
        (tmp_path / "in/images").replace(tmp_path / "in" / folder)
        words = f"its folder '{folder}' holds files of no earlier run"
        assert words in sentence(tmp_path / "in", *inside, *model)
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.fixture
def ray_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Exception]:
    """What Ray's starts raise, one after the other; those that are left were not made."""
    import ray

    from jobs import _ray

    errors: list[Exception] = []

    def init(**_: Any) -> None:
        if errors:
            raise errors.pop(0)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(_ray, "end_on_sigterm", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return errors


def test_sigterm_while_ray_starts_is_an_interruption(
    monkeypatch: pytest.MonkeyPatch, ray_starts: list[Exception]
) -> None:
    """Ray then has a handler of its own in place, which exits with the signal's number."""
    import ray

    from jobs import _ray

    monkeypatch.setattr(ray, "init", lambda **_: sys.exit(15))
    with pytest.raises(KeyboardInterrupt):
        _ray.start_ray()


def test_ray_that_cannot_be_joined_is_one_sentence(
    tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch, ray_starts: list[Exception]
) -> None:
    from jobs import _ray

    (tmp_path / "a.png").write_bytes(b"x")
    monkeypatch.setattr(denoise, "start_ray", _ray.start_ray)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere:1")
    ray_starts += [ConnectionError("Could not find any running Ray instance.\nMore text")] * 2
    code, text = run(tmp_path, "--output", tmp_path / "o", "--model", checkpoint)
    assert code == 1
    assert "RAY_ADDRESS=nowhere:1" in text
    assert len(text.strip().splitlines()) == 1, text
    assert len(ray_starts) == 1


def test_a_local_ray_that_was_too_slow_to_start_is_started_again(
    ray_starts: list[Exception],
) -> None:
    from jobs._ray import start_ray

    late = Exception("The current node timed out during startup.")
    ray_starts.append(late)
    start_ray()
    assert ray_starts == []
    ray_starts += [late, late]
    with pytest.raises(RunFailed, match=r"on this machine .* node timed out during startup"):
        start_ray()


@pytest.mark.usefixtures("ray_starts")
def test_the_token_of_ray_is_for_its_owner_alone(tmp_path: Path) -> None:
    from jobs._ray import start_ray

    start_ray()
    token, shared = tmp_path / "home/.ray/auth_token", tmp_path / "shared"
    token.parent.mkdir(parents=True)
    for file in (token, shared):
        file.write_text("secret")
        file.chmod(0o644)
    start_ray()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    # A link is somebody's own arrangement.
    token.unlink()
    token.symlink_to(shared)
    start_ray()
    assert stat.S_IMODE(shared.stat().st_mode) == 0o644


def test_fault_of_the_program_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: DenoiseConfig) -> int:
        raise ZeroDivisionError("one\ntwo")

    command = settings_command(DenoiseConfig, broken, name="x", help="x")
    result = CliRunner().invoke(command, ["in", "--output", "o"])
    assert result.exit_code == 1
    assert "ZeroDivisionError: one two" in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_help_imports_neither_ray_nor_numpy() -> None:
    code = (
        "import sys; sys.argv = ['x', '--help']; import jobs.denoise as d\n"
        "try: d.main()\n"
        "except SystemExit: pass\n"
        "bad = {'ray', 'numpy', 'tensorflow', 'pyarrow'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--output" in done.stdout


def test_why_an_image_has_no_psnr_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = Outcome("run", Totals(ok=2), True, unreferenced=2, reference_problem="a: no \ud800")
    print_outcome(outcome, DenoiseConfig(inputs=("in",), output="out", reference="clean"))
    assert "no PSNR for them. The first: a: no \\ud800" in capsys.readouterr().out


def test_failure_that_cannot_be_printed_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"path": "a.zarr", "error_stage": "read", "error_type": "UnsupportedImage"}
    failure = {**facts, "error_message": "a.zarr: \ud800 samples"}
    outcome = Outcome("run", Totals(failed=1), False, worst_failures=[failure])
    print_outcome(outcome, DenoiseConfig(inputs=("in",), output="out"))
    assert "a.zarr: \\ud800 samples" in capsys.readouterr().out


def test_failed_images_say_nothing_of_the_speed() -> None:
    """Those that are refused as the run is planned take no time at all."""
    totals = Totals(to_do=10_000, ok=11, failed=5000, megapixels=110.0)
    assert (rate(totals), seconds_left(totals)) == (0.0, None)
    totals.first_image_s, totals.seconds = 20.0, 60.0
    assert rate(totals) == 2.5
    assert seconds_left(totals) == (10_000 - 5011) * 4.0
    one = Totals(to_do=2, ok=1, failed=1, megapixels=12.0, first_image_s=20.0, seconds=20.03)
    assert (rate(one), seconds_left(one)) == (0.0, None)


def test_the_demo_deletes_nothing_but_its_own(tmp_path: Path) -> None:
    (tmp_path / "noisy").mkdir()
    (tmp_path / "noisy/mine.png").touch()
    result = CliRunner().invoke(demo.main, ["--output", str(tmp_path)])
    assert (result.exit_code, "its noisy were not made by this demo" in result.output) == (2, True)
    assert (tmp_path / "noisy/mine.png").exists()
    fresh = tmp_path / "fresh"
    make_room(fresh)
    (fresh / "out").mkdir()
    (fresh / "kept").mkdir()
    make_room(fresh)
    assert {path.name for path in fresh.iterdir()} == {MARKER, "kept"}


def test_the_demo_names_a_wrong_model_before_it_deletes_or_starts_anything(tmp_path: Path) -> None:
    make_room(tmp_path)
    (tmp_path / "out").mkdir()
    result = CliRunner().invoke(demo.main, ["--output", str(tmp_path), "--model", "unet-z"])
    assert (result.exit_code, (tmp_path / "out").exists()) == (2, True)
    assert "Error: --model 'unet-z': neither a shipped model" in result.output


def test_an_interrupted_demo_or_report_is_an_interrupted_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "start_ray", interrupt)
    monkeypatch.setattr(denoise_core.report, "build_report", interrupt)
    for command, arguments in ((demo.main, ["--output", str(tmp_path)]), (report.main, ["out"])):
        result = CliRunner().invoke(command, arguments)
        assert (result.exit_code, "Interrupted. The same" in result.output) == (130, True)
