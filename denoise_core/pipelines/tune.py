"""A search for better settings on Ray Tune: trials of `Trainer`, the worse ones ended early.

    plan_search(config)                      # the settings of all trials, checked; no Ray yet
    run_search(search, show=print)           # writes trials.csv, tune.png, best.toml

A trial validates VALIDATIONS times and keeps a checkpoint each time. Trials that fall behind end at
a quarter or a half of their length (asynchronous successive halving, Li et al., MLSys 2020,
https://arxiv.org/abs/1810.05934), except the first, which is the preset as it is.

A search that was killed goes on from its own files: rows.json, and the last state of each trial.
Ray Tune 2.60 writes the state that it restores from in place, and could not read it again after a
kill -9 that came at that moment (seen); it also holds pickles.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from denoise_core.config import TuneConfig, as_dict
from denoise_core.devices import choose_precision, configure_tensorflow, has_gpu
from denoise_core.errors import DenoiseError, RunFailed, UsageError
from denoise_core.lock import Lock, new_run_id, output_lock
from denoise_core.models import architecture
from denoise_core.noise import parse_noise
from denoise_core.presets import Preset
from denoise_core.presets import preset as find_preset
from denoise_core.space import Settings, applied, read_space, train_toml
from denoise_core.storage import LocalStorage
from denoise_core.training import Plan, adapt, prepare, with_length
from denoise_core.trials import Trial, baseline_of, best_of, csv_bytes, plot_bytes, trial_from

VALIDATIONS = 8
# The first cut at two of eight validations: before that warm-up and chance decide. Half go on.
FIRST_CUT, KEEP_ONE_OF = 2, 2
# Any other number would do; a trial that failed must be worse than one that learns nothing.
FAILED_PSNR = 0.0
SEARCH, ROWS, STATES, CURVE = "search.json", "rows.json", "states", "curve.json"

Show = Callable[[str, Trial, Sequence[Trial]], None]


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched: `trials` are the settings of each, `shared` what they have in common."""

    config: TuneConfig
    trials: tuple[Settings, ...]
    shared: Plan
    base: Preset
    validation_noise: str

    @property
    def compared_on(self) -> str:
        """What the PSNR of all trials is of: the noise, or the pairs that bring their own."""
        pairs = self.shared.config.mode == "pairs"
        return "the held-out pairs" if pairs else self.validation_noise

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

    def training_command(self, best: Trial, *, data: str, settings: str) -> str:
        """Return the command that trains with the best settings, for the length of a trial.

        A preset with a length of its own keeps that.
        """
        length = f" --steps {best.steps}" if self.base.epochs is None else ""
        return f"python -m jobs.train {data} --output RUN --config {settings}{length}"


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

    `show(event, trial, trials)` hears of every validation ('validated') and of every end ('ended'),
    and once of a trial whose GPU TensorFlow does not see ('misses_gpu').
    Ray must be initialised. Raises OutputLocked where another search holds the output, RunFailed
    where no trial came to its end or another search took the output over.
    """
    output = Path(search.shared.config.output)
    with output_lock(LocalStorage(), str(output), run_id=new_run_id()) as lock:
        _write(output / SEARCH, (json.dumps(_identity(search), indent=1) + "\n").encode())
        board = Board(search, output, show, lock)
        if board.left:
            with _heard_by(board):
                _fit(search, board, output)
        if board.left:
            raise RunFailed("The search was interrupted. Its trials are safe: go on with --resume.")
        lock.check()
        _publish(search, board.trials, output)
    return board.trials


class Board:
    """The rows of all trials, kept in the output, and who is told when they change."""

    def __init__(self, search: Search, output: Path, show: Show, lock: Lock) -> None:
        self.output, self.show, self.lock, self.misses_gpu = output, show, lock, False
        self.trials = [Trial(number, settings) for number, settings in enumerate(search.trials)]
        if search.config.resume and (output / ROWS).exists():
            rows = [trial_from(row) for row in json.loads((output / ROWS).read_text())]
            # What made a trial fail, a full disk or memory, may have gone.
            self.trials = [
                Trial(row.number, row.settings) if row.status == "failed" else row for row in rows
            ]

    @property
    def left(self) -> list[int]:
        """The numbers of the trials that have not come to an end."""
        return [t.number for t in self.trials if t.status in ("waiting", "running")]

    def of(self, trial: Any) -> Trial:
        """Return the row of one of Ray Tune's trials."""
        return self.trials[int(trial.config["trial"])]

    def validated(self, trial: Any, result: dict[str, Any]) -> None:
        """Take in a validation."""
        row = _row(self.of(trial), result)
        if result.get("misses_gpu") and not self.misses_gpu:
            self.misses_gpu = True
            self.show("misses_gpu", row, self.trials)
        self.change("validated", row)

    def change(self, event: str, row: Trial) -> None:
        """Take in a row, write all of them, pass the event on."""
        self.trials[row.number] = row
        rows = [asdict(trial) for trial in self.trials]
        _write(self.output / ROWS, (json.dumps(rows) + "\n").encode())
        _write(self.output / "trials.csv", csv_bytes(self.trials))
        self.show(event, row, self.trials)


def _fit(search: Search, board: Board, output: Path) -> None:
    # It prints the tracebacks of workers that died; the table has a sentence for each.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL + 1)
    # Else it ends as if all trials had come to their end.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    try:
        _tuner(search, board, output).fit()
    except (ray.exceptions.RayError, tune.TuneError) as error:
        _raise_told(error)
        raise RunFailed(
            f"Ray ended before the search did ({type(error).__name__}). Go on with --resume."
        ) from error


def _raise_told(error: BaseException) -> None:
    """Raise what the board could not do, where Tune's error stands for that."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, DenoiseError):
            raise inner from None
        inner = inner.__cause__ or inner.__context__


def _publish(search: Search, trials: list[Trial], output: Path) -> None:
    best = best_of(trials)
    title = f"{search.config.preset}: {len(trials)} trials, compared on {search.compared_on}"
    _write(output / "tune.png", plot_bytes(trials, title=title))
    if best is None:
        notes = [trial.note for trial in trials if trial.note]
        raise RunFailed(f"No trial came to its end. {notes[0] if notes else ''}".strip())
    text = train_toml(
        best.settings,
        preset=search.base,
        shared=search.shared.config,
        notes=_notes(search, best, baseline_of(trials)),
    )
    _write(output / "best.toml", text.encode())
    # 20 bytes a parameter for each trial, needed only to resume.
    shutil.rmtree(output / STATES, ignore_errors=True)
    shutil.rmtree(output / "ray", ignore_errors=True)


def _notes(search: Search, best: Trial, baseline: Trial | None) -> str:
    against = "" if baseline is None else f"; the preset as it is: {baseline.psnr:.2f} dB"
    return (
        f"The best of {len(search.trials)} trials of `python -m jobs.tune`, trial {best.number}:\n"
        f"validation PSNR {best.psnr:.2f} dB on {search.compared_on} after {best.steps} steps"
        f"{against}.\n"
        f"Use it with: {search.training_command(best, data='DATA...', settings='THIS_FILE')}\n"
        f"The rate was found for {best.steps} steps; longer trainings often like a lower one."
    )


def _write(path: Path, data: bytes) -> None:
    LocalStorage().write(str(path), data)


def _tuner(search: Search, board: Board, output: Path) -> tune.Tuner:
    # A table of our own is written; Ray's loggers would write three files for each trial.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # Its newer printer shows a table of itself at every verbosity.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cluster = ray.cluster_resources()
    at_once, resources = choose_trials(search.config, cluster, hosts, trials=len(board.left))
    # None for a GPU, which TensorFlow's own number of them serves.
    threads = max(1, int(resources["cpu"])) if not resources.get("gpu") else None
    shutil.rmtree(output / "ray", ignore_errors=True)
    return tune.Tuner(
        tune.with_resources(
            tune.with_parameters(train_trial, search=search, threads=threads), resources
        ),
        param_space={"trial": tune.grid_search(board.left)},
        tune_config=tune.TuneConfig(
            metric="psnr",
            mode="max",
            scheduler=Halving(board.trials) if search.config.stop == "halving" else FIFOScheduler(),
            max_concurrent_trials=at_once,
            trial_dirname_creator=_folder_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(output / "ray"),
            callbacks=[Messenger()],
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=search.config.max_failures),
        ),
    )


def _folder_name(trial: Any) -> str:
    return f"trial-{trial.config['trial']}"


def choose_trials(
    config: TuneConfig,
    cluster: dict[str, float],
    hosts: Sequence[dict[str, float]],
    *,
    trials: int,
) -> tuple[int, dict[str, float]]:
    """Return the trials at one time and the CPUs and GPUs of each; of `trials` that are left.

    `hosts` are Ray's resources of each machine. No trial asks for more than a machine has, or Ray
    Tune would wait for ever. Raises UsageError for what no machine has, and where none has come
    yet and the settings do not state it.
    """
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    stated = None if config.concurrent == "auto" else int(config.concurrent)
    share = float(gpus >= 1.0) if config.gpus_per_trial is None else config.gpus_per_trial
    if "CPU" not in cluster and not gpus:
        return min(_trials_to_come(stated, share), trials), {"cpu": 1.0, "gpu": share}
    if share:
        most, each = _beside_gpus(hosts, share)
        if not most:
            raise UsageError(f"--gpus-per-trial {share:g}: the cluster has {gpus:g} GPU(s).")
        return max(1, min(stated or most, most, trials)), {"cpu": _whole(each), "gpu": share}
    if not cpus:
        raise UsageError("--gpus-per-trial 0: the cluster has no CPU; leave the flag out.")
    at_once = max(1, min(stated or int(cpus / 2), trials))
    largest = max(host.get("CPU", 0.0) for host in hosts)
    return at_once, {"cpu": _whole(min(cpus / at_once, largest)), "gpu": 0.0}


def _trials_to_come(stated: int | None, share: float) -> int:
    """Return the trials at one time on a cluster whose workers an autoscaler has yet to start."""
    if stated is None or not share:
        raise UsageError(
            "the cluster has no workers yet, so the trials cannot be fitted to them: state "
            "--gpus-per-trial and --concurrent N, or keep one worker running (minReplicas: 1)."
        )
    return stated


def _beside_gpus(hosts: Sequence[dict[str, float]], share: float) -> tuple[int, float]:
    """Return how many trials of that share of a GPU fit, and the CPUs that each finds beside it."""
    # A trial's share is of one GPU: of two, three trials of 0.6 do not fit.
    slots = [int(host.get("GPU", 0.0)) * int(1.0 / share) for host in hosts]
    beside = [host.get("CPU", 0.0) / n for host, n in zip(hosts, slots, strict=True) if n]
    return sum(slots), min(beside, default=0.0)


def _whole(cpus: float) -> float:
    """Return a whole number of what is above one, as Ray wants it."""
    return math.floor(cpus) if cpus > 1 else cpus


class Halving(ASHAScheduler):
    """Successive halving that spares the first trial and knows the trials of an earlier run."""

    def __init__(self, known: Sequence[Trial] = ()) -> None:
        super().__init__(
            time_attr="validations",
            max_t=VALIDATIONS,
            grace_period=FIRST_CUT,
            reduction_factor=KEEP_ONE_OF,
            stop_last_trials=False,
        )
        self.curves = {trial.number: [psnr for _, psnr in trial.curve] for trial in known}
        for trial in known:
            if trial.status in ("done", "stopped"):
                self._replay(trial.number, f"earlier-{trial.number}", self._brackets[0])

    def _replay(self, number: int, trial_id: str, bracket: Any) -> None:
        for place, psnr in enumerate(self.curves.get(number, []), 1):
            bracket.on_result(SimpleNamespace(trial_id=trial_id), place, psnr)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take a trial in, with what it had shown in an earlier run."""
        super().on_trial_add(tune_controller, trial)
        bracket = self._trial_info[trial.trial_id]
        self._replay(int(trial.config["trial"]), trial.trial_id, bracket)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether the trial goes on."""
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if trial.config["trial"] == 0 else decision


class Messenger(tune.Callback):
    """Writes Ray Tune's events on the board.

    Tune copies and pickles its callbacks, so the board belongs to the class.
    """

    board: ClassVar[Board | None] = None

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Raise RunFailed where another search took the output over."""
        if self.board is not None:
            self.board.lock.check()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Take in a validation; the trial itself does not know it yet."""
        if self.board is not None:
            self.board.validated(trial, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Take in an end."""
        if self.board is not None:
            self.board.change("ended", _ended(self.board.of(trial), trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Take in a trial whose worker died too often."""
        if self.board is not None:
            self.board.change("ended", _ended(self.board.of(trial), trial))


@contextmanager
def _heard_by(board: Board) -> Iterator[None]:
    Messenger.board = board
    try:
        yield
    finally:
        Messenger.board = None


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
    row = _row(row, trial.last_result) if trial.last_result else row
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
        _report_failure(str(error))
    except Exception as error:
        # Keras and TensorFlow tell in many ways that a network cannot be built or has no memory.
        reason = (str(error).strip() or "no reason given").splitlines()[-1].strip()
        _report_failure(f"{type(error).__name__}: {reason}")


def _report_failure(note: str) -> None:
    tune.report({"psnr": FAILED_PSNR, "validations": VALIDATIONS, "note": note})


def _train(search: Search, number: int, threads: int | None) -> None:
    from denoise_core.training import Trainer

    tf = configure_tensorflow(threads=threads, use_gpu=threads is None)
    plan = search.plan(number)
    trainer = Trainer(
        plan.config, plan.preset, plan.data, precision=choose_precision(plan.config.precision, tf)
    )
    states = Path(plan.config.output) / STATES / str(number)
    curve = _load(trainer, states)
    misses_gpu = threads is None and not has_gpu(tf)
    size = architecture(plan.preset.architecture).mflop_per_pixel(**plan.preset.arguments)

    def row() -> dict[str, Any]:
        return {
            "psnr": curve[-1][1],
            "validations": len(curve),
            "curve": list(curve),
            "steps": trainer.progress.step,
            "seconds": round(trainer.progress.seconds, 2),
            "parameters": int(trainer.model.count_params()),
            "mflop_per_pixel": round(size, 4),
            "misses_gpu": misses_gpu,
        }

    def report(metrics: dict[str, float], save: bool) -> None:
        if not math.isfinite(metrics["psnr"]):
            return
        curve.append((trainer.progress.fraction(plan.config), metrics["psnr"]))
        _save(trainer, states, curve)
        tune.report(row())

    if trainer.progress.fraction(plan.config) >= 1.0:
        # Killed between its last state and the news of it.
        tune.report(row())
    trainer.run(report)


def _save(trainer: Any, states: Path, curve: list[tuple[float, float]]) -> None:
    """Keep the state of the last validation: a folder that appears whole, then the older one goes.

    Its name is the number of validations.
    """
    whole = states / str(len(curve))
    unfinished = states / f".{len(curve)}.tmp"
    for folder in (unfinished, whole):
        shutil.rmtree(folder, ignore_errors=True)
    trainer.save_state(unfinished)
    (unfinished / CURVE).write_text(json.dumps(curve))
    unfinished.rename(whole)
    for folder in states.iterdir():
        if folder != whole:
            shutil.rmtree(folder, ignore_errors=True)


def _load(trainer: Any, states: Path) -> list[tuple[float, float]]:
    """Take up the last state where there is one; return its curve."""
    found = [f for f in states.iterdir() if f.name.isdigit()] if states.exists() else []
    if not found:
        return []
    last = max(found, key=lambda folder: int(folder.name))
    trainer.load_state(last)
    return [(share, psnr) for share, psnr in json.loads((last / CURVE).read_text())]
