"""A search for better settings on Ray Tune: trials of `Trainer`, the worse ones ended early.

    plan_search(config)                      # the settings of all trials, checked; no Ray yet
    run_search(search, show=print)           # writes trials.csv, tune.png, best.toml

A trial validates VALIDATIONS times and keeps a checkpoint each time. Trials that fall behind end at
a quarter or a half of their length (asynchronous successive halving, Li et al., MLSys 2020,
https://arxiv.org/abs/1810.05934), except the first, which is the preset as it is. Ray Tune keeps
the state of the search in OUT/ray and takes it up again; its files hold pickles, so resume only
searches of your own.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from denoise_core.config import TuneConfig, as_dict
from denoise_core.errors import DenoiseError, RunFailed, UsageError
from denoise_core.models import architecture
from denoise_core.noise import parse_noise
from denoise_core.presets import Preset
from denoise_core.presets import preset as find_preset
from denoise_core.space import Settings, applied, read_space, train_toml
from denoise_core.training import Plan, adapt, prepare, with_length
from denoise_core.trials import Trial, baseline_of, best_of, csv_bytes, plot_bytes

VALIDATIONS = 8
# The first cut at two of eight validations: before that warm-up and chance decide. Half go on.
FIRST_CUT, KEEP_ONE_OF = 2, 2
# Any other number would do; a trial that failed must be worse than one that learns nothing.
FAILED_PSNR = 0.0
CURVE = "curve.json"
SEARCH = "search.json"

Show = Callable[[str, Trial, Sequence[Trial]], None]


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched: `trials` are the settings of each, `shared` what they have in common."""

    config: TuneConfig
    trials: tuple[Settings, ...]
    shared: Plan
    base: Preset
    validation_noise: str

    def plan(self, number: int) -> Plan:
        """Return the plan of one trial. Raises UsageError for settings that do not fit."""
        preset, config = applied(self.trials[number], self.base, self.config.training())
        recipe = replace(adapt(config, preset), validation_noise=self.validation_noise)
        config = with_length(
            replace(config, data=self.shared.config.data, output=self.shared.config.output),
            recipe,
            self.shared.data,
        )
        if config.steps is not None:
            every: dict[str, Any] = {"validate_steps": -(-config.steps // VALIDATIONS)}
        else:
            assert config.hours is not None
            every = {"validate_minutes": config.hours * 60.0 / VALIDATIONS}
        # A validation keeps a checkpoint; none are needed between.
        return Plan(
            replace(config, **every, checkpoint_minutes=1e9, epochs=None), recipe, self.shared.data
        )


def plan_search(config: TuneConfig) -> Search:
    """Draw the settings of all trials and check what can be told without Ray.

    Raises UsageError for a space, data or output that do not fit.
    """
    base = find_preset(config.preset)
    try:
        text = Path(config.space).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--space {config.space}: cannot be read ({error}).") from error
    space = read_space(text, source=config.space, preset=base)
    shared = prepare(config.training())
    noise = config.validation_noise or shared.preset.validation_noise or shared.preset.noise
    parse_noise(noise)
    trials = tuple(space.trials(config.trials, seed=config.seed))
    search = Search(config, trials, shared, base, noise)
    for number, settings in enumerate(trials):
        try:
            search.plan(number)
        except UsageError as error:
            raise UsageError(
                f"--space {config.space}: {json.dumps(settings)} cannot be trained: {error}"
            ) from error
    _check_output(search)
    return search


def _check_output(search: Search) -> None:
    """Raise UsageError where the output holds another search, or none to resume."""
    config, path = search.config, Path(search.config.output) / SEARCH
    if not path.exists():
        if config.resume:
            raise UsageError(f"--resume: {config.output} holds no search; leave --resume out.")
        return
    if not config.resume:
        raise UsageError(
            f"--output {config.output} holds a search: go on with --resume or name another."
        )
    before, now = json.loads(path.read_text()), _identity(search)
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        name = changed[0].replace("_", "-")
        raise UsageError(
            f"--resume: --{name} is not what the search in {config.output} was begun with; give "
            "what it was, or another --output."
        )


def _identity(search: Search) -> dict[str, Any]:
    """Return what must stay the same when a search is taken up again, as plain JSON."""
    free = {"output", "space", "concurrent", "gpus_per_trial", "max_failures", "resume"}
    settings = {k: v for k, v in as_dict(search.config).items() if k not in free}
    return json.loads(json.dumps({**settings, "space": search.trials}))


# --- the driver ---------------------------------------------------------------------------------


def run_search(search: Search, *, show: Show) -> list[Trial]:
    """Run the trials that are left; write the table, the plot and the best settings.

    `show(event, trial, trials)` hears of every validation ('validated') and of every end ('ended').
    Ray must be initialised. Raises RunFailed where no trial came to its end.
    """
    output = Path(search.config.output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    _write(output / SEARCH, (json.dumps(_identity(search), indent=1) + "\n").encode())

    def hear(event: str, number: int, trials: list[Trial]) -> None:
        _write(output / "trials.csv", csv_bytes(trials))
        show(event, trials[number], trials)

    with _heard_by(_Listener(search, hear)) as listener:
        try:
            _tuner(search, output).fit()
        except (ray.exceptions.RayError, tune.TuneError) as error:
            raise RunFailed(
                f"Ray ended before the search did ({type(error).__name__}). Go on with --resume."
            ) from error
    trials = listener.trials
    _write(output / "trials.csv", csv_bytes(trials))
    if any(trial.status in ("waiting", "running") for trial in trials):
        raise RunFailed("The search was interrupted. Its trials are safe: go on with --resume.")
    _publish(search, trials, output)
    return trials


def _publish(search: Search, trials: list[Trial], output: Path) -> None:
    best = best_of(trials)
    title = f"{search.config.preset}: {len(trials)} trials, compared on {search.validation_noise}"
    _write(output / "tune.png", plot_bytes(trials, title=title))
    if best is None:
        notes = [trial.note for trial in trials if trial.note]
        raise RunFailed(f"No trial came to its end. {notes[0] if notes else ''}".strip())
    text = train_toml(
        best.settings,
        preset=search.base,
        name=search.config.preset,
        notes=_notes(search, best, baseline_of(trials)),
    )
    _write(output / "best.toml", text.encode())
    # 20 bytes a parameter for each trial, needed only to resume.
    for folder in (output / "ray").glob("tune/*/checkpoint_*"):
        shutil.rmtree(folder, ignore_errors=True)


def _notes(search: Search, best: Trial, baseline: Trial | None) -> str:
    against = "" if baseline is None else f"; the preset as it is: {baseline.psnr:.2f} dB"
    return (
        f"The best of {len(search.trials)} trials of `python -m jobs.tune`, trial {best.number}:\n"
        f"validation PSNR {best.psnr:.2f} dB on {search.validation_noise} after {best.steps} steps"
        f"{against}.\n"
        "Use it with: python -m jobs.train DATA... --output RUN --config THIS_FILE\n"
        f"The rate was found for {best.steps} steps; longer trainings often like a lower one."
    )


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _tuner(search: Search, output: Path) -> tune.Tuner:
    """Return a new Tuner, or that of an earlier run with its unfinished trials to go on."""
    # A table of our own is written; Ray's loggers would write three files for each trial.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # Its newer printer shows a table of itself at every verbosity.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    at_once, resources = _resources(search)
    threads = max(1, int(resources["cpu"])) if not resources.get("gpu") else None
    trainable = tune.with_resources(
        tune.with_parameters(train_trial, search=search, threads=threads), resources
    )
    storage = output / "ray"
    # A search that was killed in its first seconds has nothing to restore.
    if search.config.resume and any((storage / "tune").glob("experiment_state-*.json")):
        return tune.Tuner.restore(
            str(storage / "tune"),
            trainable,
            resume_unfinished=True,
            restart_errored=True,
        )
    return tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(list(range(len(search.trials))))},
        tune_config=tune.TuneConfig(
            metric="psnr",
            mode="max",
            scheduler=Halving() if search.config.stop == "halving" else FIFOScheduler(),
            max_concurrent_trials=at_once,
            trial_dirname_creator=_folder_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(storage),
            callbacks=[Messenger()],
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=search.config.max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
        ),
    )


def _folder_name(trial: Any) -> str:
    return f"trial-{trial.config['trial']}"


def _resources(search: Search) -> tuple[int, dict[str, float]]:
    """Return the trials at one time and the CPUs and GPUs of each."""
    config, cluster = search.config, ray.cluster_resources()
    cpus, gpus = cluster.get("CPU", 1.0), cluster.get("GPU", 0.0)
    share = config.gpus_per_trial
    if share > gpus:
        raise UsageError(f"--gpus-per-trial {share:g}: the cluster has {gpus:g} GPU(s).")
    if config.concurrent == "auto":
        at_once = int(gpus / share) if share else int(cpus / 2)
    else:
        at_once = int(config.concurrent)
    at_once = max(1, min(at_once, len(search.trials)))
    # No more than a whole node has, so that a trial finds a place.
    largest = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
    each = min(cpus / at_once, largest)
    # Whole numbers above one, as Ray wants them.
    return at_once, {"cpu": math.floor(each) if each > 1 else each, "gpu": share}


class Halving(ASHAScheduler):
    """Successive halving that spares the first trial, and knows the trials before a restart."""

    def __init__(self) -> None:
        super().__init__(
            time_attr="validations",
            max_t=VALIDATIONS,
            grace_period=FIRST_CUT,
            reduction_factor=KEEP_ONE_OF,
            stop_last_trials=False,
        )

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take a trial in, with what it had shown in an earlier run."""
        super().on_trial_add(tune_controller, trial)
        bracket = self._trial_info[trial.trial_id]
        for place, (_, psnr) in enumerate((trial.last_result or {}).get("curve", []), 1):
            bracket.on_result(trial, place, psnr)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether the trial goes on."""
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if trial.config["trial"] == 0 else decision


class Messenger(tune.Callback):
    """Passes Ray Tune's events to `listener`.

    Tune pickles its callbacks and restores copies of them, so the listener belongs to the class.
    """

    listener: ClassVar[_Listener | None] = None

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tell which trials run, and which an earlier run has left."""
        if self.listener is not None:
            self.listener.take(trials)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Tell of the trials of a search that was at its end before: it has no steps."""
        if self.listener is not None:
            self.listener.take([trial for trial in trials if trial.last_result])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Tell of a validation; the trial itself does not know it yet."""
        if self.listener is not None:
            self.listener.validated(trial, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell of an end."""
        if self.listener is not None:
            self.listener.ended(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell of a trial whose worker died too often."""
        if self.listener is not None:
            self.listener.ended(trial)


class _Listener:
    """Keeps the rows of all trials, of Ray Tune's objects, and passes events on."""

    def __init__(self, search: Search, hear: Callable[[str, int, list[Trial]], None]) -> None:
        self.hear = hear
        self.trials = [Trial(number, settings) for number, settings in enumerate(search.trials)]

    def validated(self, trial: Any, result: dict[str, Any]) -> None:
        """Take in a validation."""
        self._change("validated", trial, _row(self._of(trial), result))

    def ended(self, trial: Any) -> None:
        """Take in an end."""
        self._change("ended", trial, _ended(self._of(trial), trial))

    def take(self, trials: Sequence[Any]) -> None:
        """Take in what an earlier run left, and which trials run."""
        for trial in trials:
            row = self._of(trial)
            if row.status == "waiting" and trial.status == "RUNNING":
                self.trials[row.number] = _row(row, trial.last_result or {})
            elif row.status == "waiting" and trial.status in ("TERMINATED", "ERROR"):
                self.trials[row.number] = _ended(row, trial)

    def _of(self, trial: Any) -> Trial:
        return self.trials[int(trial.config["trial"])]

    def _change(self, event: str, trial: Any, row: Trial) -> None:
        self.trials[row.number] = row
        self.hear(event, row.number, self.trials)


@contextmanager
def _heard_by(listener: _Listener) -> Iterator[_Listener]:
    Messenger.listener = listener
    try:
        yield listener
    finally:
        Messenger.listener = None


def _row(row: Trial, result: dict[str, Any]) -> Trial:
    """Return a trial's row with what it has reported."""
    return replace(
        row,
        status="running",
        curve=tuple((share, psnr) for share, psnr in result.get("curve", [])),
        steps=result.get("steps", 0),
        seconds=result.get("seconds", 0.0),
        parameters=result.get("parameters", 0),
        mflop_per_pixel=result.get("mflop_per_pixel", 0.0),
        note=result.get("note", ""),
    )


def _ended(row: Trial, trial: Any) -> Trial:
    """Return an ended trial's row."""
    row = _row(row, trial.last_result or {})
    if trial.status == "ERROR":
        row = replace(row, note="Its worker died; is there enough memory?")
    if row.note:
        return replace(row, status="failed")
    return replace(row, status="done" if row.fraction >= 1.0 else "stopped")


# --- a trial ------------------------------------------------------------------------------------


def train_trial(config: dict[str, Any], *, search: Search, threads: int | None) -> None:
    """Run one trial in a worker. What is wrong with its settings ends it, not the search."""
    try:
        _train(search, int(config["trial"]), threads)
    except DenoiseError as error:
        tune.report({"psnr": FAILED_PSNR, "validations": VALIDATIONS, "note": str(error)})


def _train(search: Search, number: int, threads: int | None) -> None:
    from denoise_core.devices import choose_precision, configure_tensorflow
    from denoise_core.training import Trainer

    tf = configure_tensorflow(threads=threads, use_gpu=search.config.gpus_per_trial > 0)
    plan = search.plan(number)
    trainer = Trainer(
        plan.config, plan.preset, plan.data, precision=choose_precision(plan.config.precision, tf)
    )
    curve: list[tuple[float, float]] = []
    last = tune.get_checkpoint()
    if last is not None:
        with last.as_directory() as folder:
            trainer.load_state(Path(folder))
            curve = [tuple(point) for point in json.loads((Path(folder) / CURVE).read_text())]
    size = architecture(plan.preset.architecture).mflop_per_pixel(**plan.preset.arguments)

    def report(metrics: dict[str, float], save: bool) -> None:
        if not math.isfinite(metrics["psnr"]):
            return
        curve.append((trainer.progress.fraction(plan.config), metrics["psnr"]))
        row = {
            "psnr": metrics["psnr"],
            "validations": len(curve),
            "curve": list(curve),
            "steps": trainer.progress.step,
            "seconds": round(trainer.progress.seconds, 2),
            "parameters": int(trainer.model.count_params()),
            "mflop_per_pixel": round(size, 4),
        }
        with tempfile.TemporaryDirectory() as folder:
            trainer.save_state(Path(folder))
            (Path(folder) / CURVE).write_text(json.dumps(curve))
            tune.report(row, checkpoint=tune.Checkpoint.from_directory(folder))

    trainer.run(report)
