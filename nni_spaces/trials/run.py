"""Multi-trial search: networks that a strategy samples, trained one after the other, in a folder.

``trials.json`` holds every finished trial, and is either its old or its new version. A run that goes on does not load
a strategy's state, which NNI pickles: it shows the strategy its old results again. What is random is a function of
seed and trial, so the strategy then asks for the same networks, and goes on as if nothing had happened.

A trial that raises, for want of memory too, or reports no finite number has failed: it is recorded with its error, and
the run goes on with the next. What is not a network's fault ends the run: ``OSError``, of a full disk or of missing
images, leaves its trial to be repeated; a broken accelerator, on which no other trial could run, is recorded first, so
that a run that goes on gets past it. Signals end a run as they end any program.
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

import nni
import numpy as np
import torch
from nni.nas.evaluator.pytorch import Lightning
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.execution.event import FinalMetricEvent, IntermediateMetricEvent, TrainingEndEvent
from nni.nas.experiment import NasExperiment, NasExperimentConfig
from nni.nas.oneshot.pytorch.strategy import OneShotStrategy
from nni.nas.space import ModelStatus, RawFormatModelSpace
from nni.nas.strategy.hpo import HPOTunerStrategy
from nni.runtime.trial_command_channel import (
    TrialCommandChannel,
    get_default_trial_command_channel,
    set_default_trial_command_channel,
)

from optinspired_plugins._checks import check_int, short
from optinspired_plugins._files import printable, read_json, write_atomically
from optinspired_plugins.cells.genotype import Genotype
from optinspired_plugins.cells.operations import ZERO

from ..runs.callback import locked
from ..spaces.space import CellSpace
from ..strategies.sampling import check_tuner_takes
from .evaluator import SEQUENTIAL, TrialEvaluator

__all__ = ["Trial", "TrialExperiment", "read_trials", "run_trials", "sequential_config"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A network that was tried.

    Args:
        index: its number, from 0.
        genotype: what it is.
        metric: its result, ``None`` if it failed.
        intermediate: its results on the way.
        seconds: how long it took.
        error: why there is no result.

    Raises:
        ValueError: a field is not what it must be.
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
        """Return what JSON can hold."""
        return {**asdict(self), "genotype": json.loads(self.genotype.to_json())}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trial:
        """Read :meth:`to_dict`'s.

        Raises:
            ValueError: a field is not what it must be, or there are others.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or data.keys() != names:
            found = ", ".join(map(short, data)) if isinstance(data, dict) else short(data)
            raise ValueError(f"a trial has {found}: must have {', '.join(names)}")
        return cls(**{**data, "genotype": Genotype.from_json(json.dumps(data["genotype"]))})


def read_trials(folder: str | Path) -> tuple[dict[str, Any], list[Trial]]:
    """Read the settings and the finished trials of a run, in their order; both empty where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / "trials.json"
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


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Let torch, NumPy and Python draw from ``seed`` for a while; then put their states back."""
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
    """Takes what a trial reports; the strategy learns of it when the trial has ended well."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.intermediate: list[float] = []
        self.final: float | None = None

    def receive_parameter(self) -> Any:
        """Return the trial's model, as NNI's functions ask for it."""
        return {"parameter_id": 0, "parameters": self.model}

    def send_metric(self, type: str, parameter_id: Any, trial_job_id: str, sequence: int, value: Any) -> None:
        """Keep a result.

        Raises:
            TypeError: it is no number.
            FloatingPointError: it is not finite.
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
    """NNI's sequential engine; it records what it runs, and answers from the records where there are some."""

    def __init__(self, space: CellSpace, count: int, seed: int, trials: list[Trial], save: Callable[[], None]) -> None:
        super().__init__(max_model_count=count)
        self.space, self.seed, self.trials, self.save = space, seed, trials, save

    def _run_single_model(self, model: Any) -> None:
        index, genotype = self._model_count - 1, self.space.genotype(model.sample)
        if index == len(self.trials):
            self._try(model, index, genotype)
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

    def _try(self, model: Any, index: int, genotype: Genotype) -> None:
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
            # A network that diverges is a result; where anything else raised is for whoever wrote it.
            _logger.warning("Trial %d: %s", index, error, exc_info=not isinstance(reason, FloatingPointError))
            record(None, error)
            if "CUDA error" in str(reason):  # the device answers nothing else in this process
                raise
        except SystemExit as stop:  # Lightning's at SIGTERM has the status of a run that has finished
            stop.code = stop.code or 128 + signal.SIGTERM
            raise
        else:
            record(results.final)


def _execute(model: Any, results: _Results) -> None:
    """Train and judge a network; NNI's functions that report write to ``results``.

    Raises:
        RuntimeError: nothing was reported.
    """
    before = get_default_trial_command_channel()
    set_default_trial_command_channel(results)
    try:
        nni.get_next_parameter()
        model.execute()
    finally:
        set_default_trial_command_channel(before)
    if results.final is None:
        raise RuntimeError("evaluator: reported no result, must call nni.report_final_result")


def run_trials(
    space: CellSpace,
    strategy: Any,
    evaluator: Any,
    out: str | Path,
    trials: int,
    seed: int = 0,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Try networks of a space, or go on with a run from its last finished trial.

    Trials that failed stay failed when a run goes on. Where none has a result, the folder binds nothing: other
    settings, or the same ones once all have failed, begin anew.

    Args:
        space: the space.
        strategy: a multi-trial strategy of NNI's; ``Random`` and ``RegularizedEvolution`` need a seed of their own.
        evaluator: a :class:`~nni_spaces.TrialEvaluator`, or any of NNI's that reports a number, the higher the better.
        out: the folder of the run. It gets ``trials.json`` after each trial, and ``genotype.json`` of the best.
        trials: number of trials, those that are done included.
        seed: seed of weights and of what a strategy draws from torch or NumPy.
        on_trial: called with every new trial.

    Returns:
        The trials that have a result, best first.

    Raises:
        ValueError: strategy, space or evaluator do not fit; the folder holds other trials, or is damaged.
        RuntimeError: another process runs in the folder; no trial has a result, and why the last has none.
        OSError: a file cannot be written or read; the trials before are kept.
    """
    check_int("trials", trials, 1)
    check_int("seed", seed, 0)
    _check_fit(space, strategy, evaluator)
    folder = Path(out)
    mine = dict(space=type(space).__name__, strategy=type(strategy).__name__, evaluator=_name(evaluator), seed=seed)
    mine |= space.describe() | (evaluator.source if isinstance(evaluator, TrialEvaluator) else {})
    with locked(folder):
        done = _earlier(folder, mine, trials)

        def save() -> None:
            content = {"settings": mine, "trials": [trial.to_dict() for trial in done]}
            write_atomically(folder / "trials.json", json.dumps(content, indent=1) + "\n")
            on_trial(done[-1])

        with _seeded(seed):
            strategy(RawFormatModelSpace(space, evaluator), _Engine(space, trials, seed, done, save))
        ranked = sorted((t for t in done[:trials] if t.metric is not None), key=lambda t: -t.metric)  # type: ignore[operator]
        if not ranked:
            tried = done[:trials]
            where, why = printable(folder), printable(tried[-1].error or "")
            raise RuntimeError(f"out={where!r}: none of {len(tried)} trials has a result; {why}")
        ranked[0].genotype.save(folder / "genotype.json")
        return ranked


def _earlier(folder: Path, mine: dict[str, Any], trials: int) -> list[Trial]:
    """Return the trials to go on from; ValueError if those of the folder have other settings."""
    settings, done = read_trials(folder)
    differ = [
        f"{name}={value!r} (here {mine.get(name)!r})" for name, value in settings.items() if value != mine.get(name)
    ]
    if all(trial.error for trial in done) and (differ or len(done) >= trials):
        return []
    if differ:
        raise ValueError(f"out={str(folder)!r}: holds trials with {', '.join(differ)}: choose another folder")
    return done


def _name(evaluator: Any) -> str:
    return repr(evaluator) if isinstance(evaluator, TrialEvaluator) else type(evaluator).__name__


def _check_fit(space: CellSpace, strategy: Any, evaluator: Any) -> None:
    """ValueError where NNI would fail late, or run and mean something else."""
    name = type(strategy).__name__
    if isinstance(strategy, OneShotStrategy):
        raise ValueError(f"strategy={name}: trains one supernet, must be one that samples networks, or use search")
    if isinstance(strategy, HPOTunerStrategy):
        check_tuner_takes(space)
        mode = getattr(strategy.tuner, "optimize_mode", None)
        if getattr(mode, "value", mode) == "minimize":
            raise ValueError(f"strategy={name}: looks for the lowest result, must maximise; use nni_spaces.TPE")
    if type(evaluator).evaluate is Lightning.evaluate:
        raise ValueError(
            f"evaluator={type(evaluator).__name__}: NNI's trainer has finished after one network and trains no other; "
            "use TrialEvaluator"
        )
    space.check_sampled(strategy)
    if any(ZERO in getattr(mutable, "values", ()) for mutable in space.simplify().values()):
        raise ValueError(f"space has {ZERO!r} to choose, which no genotype can hold: must have zero_in_space=False")


def sequential_config(folder: str | Path, trials: int) -> NasExperimentConfig:
    """Return NNI's configuration of so many trials in this process, with its files in ``folder``.

    NNI's own default starts a server for trials that listens on every interface.

    Raises:
        ValueError: ``trials`` is not a positive integer.
    """
    check_int("trials", trials, 1)
    config = NasExperimentConfig("sequential", "raw")
    config.experiment_working_directory = Path(folder)
    config.max_trial_number = trials
    return config


class TrialExperiment(NasExperiment):
    """NNI's experiment with all its files in the folder of its configuration; arguments are NNI's.

    NNI's own also keeps a list of experiments in the home directory, for its command line. It resumes by unpickling,
    which current torch refuses; :func:`run_trials` resumes.

    Raises:
        ValueError: the strategy samples networks that would not have an option of the space; when it starts, the
            evaluator is a :class:`~nni_spaces.TrialEvaluator` and the engine NNI's default, the training service.
    """

    def __init__(self, model_space: Any, evaluator: Any, strategy: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(model_space, CellSpace) and not isinstance(strategy, OneShotStrategy):
            model_space.check_sampled(strategy)
        super().__init__(model_space, evaluator, strategy, *args, **kwargs)

    def start(self, *args: Any, **kwargs: Any) -> None:
        """Run the experiment; arguments are NNI's."""
        if isinstance(self.evaluator, TrialEvaluator) and self._nni_manager_required():
            raise ValueError(f"evaluator=TrialEvaluator: {SEQUENTIAL}")
        super().start(*args, **kwargs)

    def _start_without_nni_manager(self) -> None:
        """Add nothing to the list of experiments."""

    def _stop_without_nni_manager(self) -> None:
        """Likewise."""

    def load_checkpoint(self) -> None:
        """Refuse.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("NNI's checkpoints are pickles: use run_trials, which goes on from trials.json")
