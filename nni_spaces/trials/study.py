"""Trials of Optuna: the choices of a space, and a study in the form of a folder of trials.

Optuna itself is not imported: its trials and studies are arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nni_spaces._nni  # noqa: F401

from nni.mutable import CategoricalMultiple

from optinspired_plugins.run_folder import GENOTYPE, lock_folder

from ..spaces.space import CellSpace
from .run import Trial, ranked_trials, write_trials

__all__ = ["save_study", "study_trials", "suggest_sample"]


def suggest_sample(trial: Any, space: CellSpace) -> dict[str, Any]:
    """Return the sample of a space that a trial of Optuna suggests.

    Args:
        trial: Optuna's trial.
        space: the space; each of its choices is a categorical parameter of the study, by its label.
    """
    sample: dict[str, Any] = {}
    for label, choice in space.simplify().items():
        value = trial.suggest_categorical(label, list(choice.values))
        sample[label] = [value] if isinstance(choice, CategoricalMultiple) else value
    return sample


def study_trials(study: Any, space: CellSpace) -> list[Trial]:
    """Return the finished trials of a study, numbered from 0 in their order.

    Pruned and failed trials have an error and no result.

    Args:
        study: Optuna's study, with one objective to maximise, as results of trials are.
        space: the space that its trials sample.

    Raises:
        ValueError: the study is of another space, minimises, or has several objectives.
    """
    directions = [direction.name.lower() for direction in study.directions]
    if directions != ["maximize"]:
        raise ValueError(f"study={study.study_name!r} has directions={directions}: must be ['maximize']")
    finished = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished() and trial.params]
    return [_trial(index, trial, space) for index, trial in enumerate(finished)]


def _trial(index: int, trial: Any, space: CellSpace) -> Trial:
    name, done = trial.state.name, trial.state.name == "COMPLETE"
    return Trial(
        index,
        space.genotype(trial.params),
        float(trial.value) if done else None,
        [float(value) for _, value in sorted(trial.intermediate_values.items())],
        round(trial.duration.total_seconds(), 2) if trial.duration else 0.0,
        None if done else f"{name.lower()} as trial {trial.number} of the study",
    )


def save_study(study: Any, space: CellSpace, out: str | Path) -> list[Trial]:
    """Write a study as :func:`~nni_spaces.run_trials` writes a run: ``trials.json``, and ``genotype.json`` of the best.

    Args:
        study: Optuna's study, with one objective to maximise, as results of trials are.
        space: the space that its trials sample.
        out: the folder; an earlier export there is replaced.

    Returns:
        The trials with a result, best first.

    Raises:
        ValueError: the study is of another space, minimises, or has several objectives.
        RuntimeError: another process writes to the folder.
        OSError: a file cannot be written.
    """
    trials, folder = study_trials(study, space), Path(out)
    settings = dict(space=type(space).__name__, strategy=type(study.sampler).__name__, evaluator="Optuna")
    ranked = ranked_trials(trials)
    with lock_folder(folder):
        write_trials(folder, {**settings, "study": study.study_name, **space.describe()}, trials)
        if ranked:
            ranked[0].genotype.save(folder / GENOTYPE)
    return ranked
