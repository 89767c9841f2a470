"""Multi-trial search: networks that a strategy samples, trained one after the other, in a folder.

``trials.json`` holds every finished trial, and is either its old or its new version. A run that goes on does not load
a strategy's state, which NNI pickles: it shows the strategy its old results again. What is random is a function of
seed and trial, so the strategy then asks for the same networks, and goes on as if nothing had happened.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nni.nas.evaluator.pytorch import Lightning
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.execution.event import FinalMetricEvent, IntermediateMetricEvent, TrainingEndEvent
from nni.nas.experiment import NasExperiment, NasExperimentConfig
from nni.nas.oneshot.pytorch.strategy import OneShotStrategy
from nni.nas.space import ModelStatus, RawFormatModelSpace
from nni.nas.strategy.hpo import HPOTunerStrategy

from optinspired_plugins._checks import check_int
from optinspired_plugins._files import write_atomically
from optinspired_plugins.genotype import Genotype
from optinspired_plugins.operations import ZERO

from .run_folder import locked
from .spaces import CellSpace
from .trial_evaluator import TrialEvaluator
from .trial_strategies import check_tuner_takes

__all__ = ["Trial", "TrialExperiment", "read_trials", "run_trials", "sequential_config"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A network that was tried.

    Args:
        index: its number, from 0.
        genotype: what it is.
        metric: its result, ``None`` if its loss was not finite.
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
        numbers = [self.metric] * (self.metric is not None) + [*self.intermediate, self.seconds]
        check_int("index", self.index, 0)
        if not all(isinstance(number, Real) and isfinite(number) for number in numbers):
            raise ValueError(f"trial {self.index} has {numbers}: must be finite numbers")
        if (self.metric is None) != isinstance(self.error, str):
            raise ValueError(f"trial {self.index} has error={self.error!r}: must have an error or a metric")

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {**asdict(self), "genotype": json.loads(self.genotype.to_json())}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trial:
        """Read :meth:`to_dict`'s.

        Raises:
            ValueError: a field is not what it must be.
            TypeError: there are other fields.
        """
        return cls(**{**data, "genotype": Genotype.from_json(json.dumps(data["genotype"]))})


def read_trials(folder: str | Path) -> tuple[dict[str, Any], list[Trial]]:
    """Read the settings and the finished trials of a run, in their order; both empty where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / "trials.json"
    if not path.exists():
        return {}, []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        trials = [Trial.from_dict(entry) for entry in data["trials"]]
        if [trial.index for trial in trials] != list(range(len(trials))):
            raise ValueError("trials are not numbered from 0")
        return dict(data["settings"]), trials
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not the trials of a run ({error})") from error


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


class _Engine(SequentialExecutionEngine):
    """NNI's sequential engine; it records what it runs, and answers from the records where there are some."""

    def __init__(self, space: CellSpace, count: int, seed: int, trials: list[Trial], save: Callable[[], None]) -> None:
        super().__init__(max_model_count=count)
        self.space, self.seed, self.trials, self.save = space, seed, trials, save

    def _run_single_model(self, model: Any) -> None:
        index, genotype = self._model_count - 1, self.space.genotype(model.sample)
        if index < len(self.trials):
            self._replay(model, self.trials[index], genotype)
            return
        began, error = time.monotonic(), None
        with _seeded(1_000_003 * self.seed + index):
            try:
                super()._run_single_model(model)
            except FloatingPointError as reason:  # a network that diverges is a result, and not the end of a search
                error = str(reason)
                _logger.warning("Trial %d: %s", index, error)
        if error is None and model.metric is None:
            raise RuntimeError(f"evaluator: reported no result of trial {index}, must call nni.report_final_result")
        intermediate = [float(value) for value in model.metrics.intermediates]
        seconds = round(time.monotonic() - began, 2)
        metric = None if error else float(model.metric)
        self.trials.append(Trial(index, genotype, metric, intermediate, seconds, error))
        self.save()

    def _replay(self, model: Any, trial: Trial, genotype: Genotype) -> None:
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
        RuntimeError: another process runs in the folder; the evaluator reported nothing; no trial has a result.
        OSError: a file cannot be written; the ones before are kept.
    """
    check_int("trials", trials, 1)
    check_int("seed", seed, 0)
    _check_fit(space, strategy, evaluator)
    folder = Path(out)
    mine = dict(space=type(space).__name__, strategy=type(strategy).__name__, evaluator=_name(evaluator), seed=seed)
    mine |= space.describe() | (evaluator.source if isinstance(evaluator, TrialEvaluator) else {})
    with locked(folder):
        settings, done = read_trials(folder)
        differ = [
            f"{name}={value!r} (here {mine.get(name)!r})" for name, value in settings.items() if value != mine.get(name)
        ]
        if differ:
            raise ValueError(f"out={str(folder)!r}: holds trials with {', '.join(differ)}: choose another folder")

        def save() -> None:
            content = {"settings": mine, "trials": [trial.to_dict() for trial in done]}
            write_atomically(folder / "trials.json", json.dumps(content, indent=1) + "\n")
            on_trial(done[-1])

        with _seeded(seed):
            strategy(RawFormatModelSpace(space, evaluator), _Engine(space, trials, seed, done, save))
        ranked = sorted((t for t in done[:trials] if t.metric is not None), key=lambda t: -t.metric)  # type: ignore[operator]
        if not ranked:
            raise RuntimeError(f"out={str(folder)!r}: none of {len(done)} trials has a result; {done[-1].error}")
        ranked[0].genotype.save(folder / "genotype.json")
        return ranked


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
    """

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
