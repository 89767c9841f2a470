"""Multi-trial search: train the networks that a strategy samples, in a folder that can be resumed.

``trials.json`` holds every finished trial and is replaced as a whole. A resumed run does not load the strategy's state,
which NNI pickles: it runs the strategy from its seed and replays the recorded results. Random numbers are functions of
seed and trial, so that the strategy samples the same networks and continues as in an uninterrupted run.

A trial fails if it raises an error, also for lack of memory, or reports no finite number. It is recorded with its
error, and the run continues. Two kinds of errors end the run. ``OSError``, for instance of a full disk, leaves the
trial to be repeated. A broken accelerator, on which no other trial can run, is recorded first, so that a resumed run
skips the trial. Signals end a run as they end any program.
"""

from __future__ import annotations

import json
import logging
import math
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

import nni_spaces._nni  # noqa: F401

import nni
import numpy as np
import torch
from nni.nas.evaluator.pytorch import Lightning
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.execution.event import FinalMetricEvent, IntermediateMetricEvent, TrainingEndEvent
from nni.nas.oneshot.pytorch.strategy import OneShotStrategy
from nni.nas.space import ModelStatus, RawFormatModelSpace
from nni.nas.strategy.hpo import HPOTunerStrategy
from nni.nas.strategy.middleware import Chain, Filter
from nni.runtime.trial_command_channel import (
    TrialCommandChannel,
    get_default_trial_command_channel,
    set_default_trial_command_channel,
)

from optinspired_plugins._checks import check_int, short
from optinspired_plugins._files import printable, read_json, write_atomically
from optinspired_plugins.cells.genotype import Genotype
from optinspired_plugins.run_folder import GENOTYPE, TRIALS, check_same_settings, lock_folder

from ..spaces.space import CellSpace
from ..spaces.trainers import ONE_NETWORK
from ..strategies.sampling import check_tuner_takes
from .evaluator import TrialEvaluator

__all__ = ["Trial", "ranked_trials", "read_trials", "run_trials", "write_trials"]

_logger = logging.getLogger(__name__)
PATIENCE = 1000  # networks in a row that a filter refuses before a run ends


@dataclass(frozen=True)
class Trial:
    """A finished trial of a network.

    Args:
        index: number of the trial, from 0.
        genotype: the network's genotype.
        metric: its result, ``None`` if it failed.
        intermediate: its intermediate results.
        seconds: duration.
        error: the error of a failed trial.

    Raises:
        ValueError: a field has a wrong type or value.
    """

    index: int
    genotype: Genotype
    metric: float | None
    intermediate: list[float]
    seconds: float
    error: str | None = None

    def __post_init__(self) -> None:
        check_int("index", self.index, 0)
        if not isinstance(self.intermediate, list):
            raise ValueError(f"trial {self.index} has intermediate={short(self.intermediate)}: must be a list")
        numbers = [self.metric] * (self.metric is not None) + [*self.intermediate, self.seconds]
        if not all(isinstance(number, Real) and abs(number) <= sys.float_info.max for number in numbers):
            raise ValueError(f"trial {self.index} has {short(numbers)}: must be finite numbers")
        if not isinstance(self.error, (str, type(None))) or (self.metric is None) != isinstance(self.error, str):
            raise ValueError(f"trial {self.index} has error={short(self.error)}: must have an error or a metric")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values for JSON."""
        return {**asdict(self), "genotype": json.loads(self.genotype.to_json())}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trial:
        """Return the trial of a :meth:`to_dict`.

        Raises:
            ValueError: a field is missing, unknown or wrong.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or data.keys() != names:
            content = ", ".join(map(short, data)) if isinstance(data, dict) else short(data)
            raise ValueError(f"a trial has {content}: must have {', '.join(names)}")
        return cls(**{**data, "genotype": Genotype.from_json(json.dumps(data["genotype"]))})


def read_trials(folder: str | Path) -> tuple[dict[str, Any], list[Trial]]:
    """Read the settings and the finished trials of a run, in their order; both are empty if there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / TRIALS
    if not path.exists():
        return {}, []
    return read_json(path, _settings_and_trials, "the trials of a run")


def _settings_and_trials(data: Any) -> tuple[dict[str, Any], list[Trial]]:
    parts = {"settings": dict, "trials": list}
    if not isinstance(data, dict) or not all(isinstance(data.get(name), kind) for name, kind in parts.items()):
        raise ValueError("must be an object of settings, an object, and trials, a list")
    trials = [Trial.from_dict(entry) for entry in data["trials"]]
    if [trial.index for trial in trials] != list(range(len(trials))):
        raise ValueError("trials are not numbered from 0")
    return data["settings"], trials


def write_trials(folder: Path, settings: dict[str, Any], trials: list[Trial]) -> None:
    """Write settings and finished trials of a run."""
    content = {"settings": settings, "trials": [trial.to_dict() for trial in trials]}
    write_atomically(folder / TRIALS, json.dumps(content, indent=1) + "\n")


def ranked_trials(trials: list[Trial]) -> list[Trial]:
    """Return the trials with a result, best first."""
    results = [(-trial.metric, trial) for trial in trials if trial.metric is not None]
    return [trial for _, trial in sorted(results, key=lambda pair: pair[0])]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch, NumPy and Python, and restore their states at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy)
            random.setstate(python)


class _Results(TrialCommandChannel):
    """Receive the reports of a trial; the strategy gets them after the trial."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.intermediate: list[float] = []
        self.final: float | None = None

    def receive_parameter(self) -> Any:
        """Return the trial's model, in the form of NNI's functions."""
        return {"parameter_id": 0, "parameters": self.model}

    def send_metric(self, type: str, parameter_id: Any, trial_job_id: str, sequence: int, value: Any) -> None:
        """Store a result.

        Raises:
            TypeError: the result is no number.
            FloatingPointError: the result is not finite.
        """
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"result={value!r}: must be a number") from None
        if not math.isfinite(number):
            raise FloatingPointError(f"result={value!r}: must be finite")
        if type == "FINAL":
            self.final = number
        else:
            self.intermediate.append(number)


class _Engine(SequentialExecutionEngine):
    """NNI's sequential engine, which records trials and replays recorded ones."""

    def __init__(self, space: CellSpace, count: int, seed: int, trials: list[Trial], save: Callable[[], None]) -> None:
        super().__init__(max_model_count=count)
        self.space, self.seed, self.trials, self.save = space, seed, trials, save

    def _run_single_model(self, model: Any) -> None:
        index, genotype = self._model_count - 1, self.space.genotype(model.sample)
        if index == len(self.trials):
            self._run_trial(model, index, genotype)
        trial = self.trials[index]
        if genotype != trial.genotype:
            raise ValueError(
                f"strategy: asks for another network than it did in trial {trial.index}; must be the same strategy as "
                "before with the same seed, or out another folder"
            )
        for value in trial.intermediate:
            self.dispatch_model_event(IntermediateMetricEvent(model, value))
        if trial.metric is not None:
            self.dispatch_model_event(FinalMetricEvent(model, trial.metric))
        status = ModelStatus.Failed if trial.error else ModelStatus.Trained
        self.dispatch_model_event(TrainingEndEvent(model, status))

    def _run_trial(self, model: Any, index: int, genotype: Genotype) -> None:
        """Run a trial and record it."""
        results, began = _Results(model), time.monotonic()

        def record(metric: float | None, error: str | None = None) -> None:
            seconds = round(time.monotonic() - began, 2)
            self.trials.append(Trial(index, genotype, metric, results.intermediate, seconds, error))
            self.save()

        try:
            with _seeded(1_000_003 * self.seed + index):
                _execute(model, results)
        except OSError:
            raise
        except Exception as reason:
            error = f"{type(reason).__name__}: {reason}"
            # Divergence is a result; other errors are logged with a traceback for their author.
            _logger.warning("Trial %d: %s", index, error, exc_info=not isinstance(reason, FloatingPointError))
            record(None, error)
            if "CUDA error" in str(reason):  # the device does not work in this process any more
                raise
        except SystemExit as stop:  # at SIGTERM Lightning exits with status 0
            stop.code = stop.code or 128 + signal.SIGTERM
            raise
        else:
            record(results.final)


def _execute(model: Any, results: _Results) -> None:
    """Train and test a network; its reports go to ``results``; RuntimeError if there are none."""
    before = get_default_trial_command_channel()
    set_default_trial_command_channel(results)
    try:
        nni.get_next_parameter()
        model.execute()
    finally:
        set_default_trial_command_channel(before)
    if results.final is None:
        raise RuntimeError("evaluator: reported no result, must call nni.report_final_result")


# Over 40 lines: most of them describe arguments and errors.
def run_trials(
    space: CellSpace,
    strategy: Any,
    evaluator: Any,
    out: str | Path,
    trials: int,
    seed: int = 0,
    on_trial: Callable[[Trial], None] = lambda trial: None,
    model_filter: Callable[[dict[str, Any]], bool] | None = None,
) -> list[Trial]:
    """Train networks of a space, or resume a run after its last finished trial.

    A resumed run does not repeat failed trials. A folder in which all trials failed can be used with other settings;
    with the same settings it is begun anew once it holds ``trials`` failed trials.

    Args:
        space: the space.
        strategy: NNI's multi-trial strategy; give ``Random`` and ``RegularizedEvolution`` a seed.
        evaluator: a :class:`~nni_spaces.TrialEvaluator`, or NNI's evaluator that reports a number to maximise.
        out: the folder of the run, for ``trials.json`` after each trial and ``genotype.json`` of the best one.
        trials: number of trials, including recorded ones.
        seed: seed of weights and of the strategy's draws from torch and NumPy.
        on_trial: called with every new trial.
        model_filter: called with the sample of every network that the strategy asks for. Where it returns false, the
            network is neither trained nor counted; the run ends after 1,000 of them in a row.

    Returns:
        The trials with a result, best first.

    Raises:
        ValueError: strategy, space or evaluator do not fit; the folder holds other trials, or is damaged.
        RuntimeError: another process runs in the folder; no trial has a result, with the error of the last one;
            ``model_filter`` refused all networks.
        OSError: a file cannot be written or read; earlier trials are kept.
    """
    check_int("trials", trials, 1)
    check_int("seed", seed, 0)
    _check_fit(space, strategy, evaluator)
    folder = Path(out)
    is_ours = isinstance(evaluator, TrialEvaluator)
    name = repr(evaluator) if is_ours else type(evaluator).__name__
    settings = dict(space=type(space).__name__, strategy=type(strategy).__name__, evaluator=name, seed=seed)
    settings |= space.describe() | (evaluator.source if is_ours else {})
    with lock_folder(folder):
        done = _trials_to_continue(folder, settings, trials)

        def save() -> None:
            write_trials(folder, settings, done)
            on_trial(done[-1])

        if model_filter is not None:
            strategy = Chain(strategy, Filter(lambda model: model_filter(model.sample), patience=PATIENCE))
        with _seeded(seed):
            strategy(RawFormatModelSpace(space, evaluator), _Engine(space, trials, seed, done, save))
        ranked = ranked_trials(done[:trials])
        if not done:
            raise RuntimeError(f"model_filter: refused all of the last {PATIENCE} networks")
        if not ranked:
            failed = done[:trials]
            where, why = printable(folder), printable(failed[-1].error or "")
            raise RuntimeError(f"out={where!r}: none of {len(failed)} trials has a result; {why}")
        ranked[0].genotype.save(folder / GENOTYPE)
        return ranked


def _trials_to_continue(folder: Path, settings: dict[str, Any], trials: int) -> list[Trial]:
    """Return the trials to continue from; ValueError if the folder has trials with other settings."""
    stored, done = read_trials(folder)
    is_same = {**settings, **stored} == settings
    if all(trial.error for trial in done) and (not is_same or len(done) >= trials):
        return []
    check_same_settings(folder, "trials", stored, settings)
    return done


def _check_fit(space: CellSpace, strategy: Any, evaluator: Any) -> None:
    """ValueError where NNI would fail late, or run with another meaning."""
    name = type(strategy).__name__
    if isinstance(strategy, OneShotStrategy):
        raise ValueError(f"strategy={name}: trains one supernet, must be one that samples networks, or use search")
    if isinstance(strategy, HPOTunerStrategy):
        check_tuner_takes(space)
        mode = getattr(strategy.tuner, "optimize_mode", None)
        if getattr(mode, "value", mode) == "minimize":
            raise ValueError(f"strategy={name}: looks for the lowest result, must maximise; use nni_spaces.TPE")
    if type(evaluator).evaluate is Lightning.evaluate:
        raise ValueError(f"evaluator={type(evaluator).__name__}: {ONE_NETWORK}")
    space.check_sampled(strategy)
