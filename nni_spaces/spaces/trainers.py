"""A check of the trainer of NNI's evaluators, which trains one network only."""

from __future__ import annotations

import nni_spaces._nni  # noqa: F401

import nni
from nni.nas.evaluator.pytorch import Lightning
from nni.nas.space import ModelStatus

__all__ = ["ONE_NETWORK", "check_trainer"]

ONE_NETWORK = "NNI's trainer has finished after one network and trains no other; use TrialEvaluator"


def check_trainer() -> None:
    """ValueError where NNI makes another network for a trainer that has finished.

    NNI's evaluators have one trainer. Under NNI's sequential engine it gets every network, and does not train the
    second and later ones; NNI's own error is ``KeyError: 'val_acc'``.
    """
    model = nni.get_current_parameter()
    evaluator = getattr(model, "evaluator", None)
    if getattr(model, "status", None) != ModelStatus.Training or not isinstance(evaluator, Lightning):
        return
    if type(evaluator).evaluate is Lightning.evaluate and evaluator.trainer.state.finished:
        raise ValueError(f"evaluator={type(evaluator).__name__}: {ONE_NETWORK}")
