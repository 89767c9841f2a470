"""FairDARTS: candidates weighted by sigmoids."""

from __future__ import annotations

import math
from typing import Any

import nni_spaces._nni  # noqa: F401

import torch
from nni.nas.oneshot.pytorch.base_lightning import BaseOneShotLightningModule
from torch import Tensor, nn

from .differentiable import DARTS, DARTSModule

__all__ = ["FairDARTS"]


class _FairDARTSModule(DARTSModule):
    """NNI's DARTS module with our step and FairDARTS's penalty."""

    zero_one_weight: float

    def alpha_penalty(self) -> Tensor:
        """Return the zero-one loss −w · mean (σ(α) − ½)², plus the penalty of the strategy."""
        weights = torch.cat([*self.probabilities().values()])
        zero_one = -self.zero_one_weight * (weights - 0.5).square().mean()
        others = super().alpha_penalty()
        return zero_one if others is None else zero_one + others


class FairDARTS(DARTS):
    """DARTS with candidates that do not compete: their weights are σ(α), not softmax(α) (Chu et al. 2020).

    So a skip connection gains nothing by the loss of others. A zero-one loss moves the weights away from ½. The derived
    cell has the edges with the largest σ(α). Its probabilities do not sum to 1, so that a penalty on MACs adds
    all candidates of an edge.

    Args:
        zero_one_weight: w of the zero-one loss.
        **kwargs: arguments of :class:`DARTS`.

    Raises:
        ValueError: ``zero_one_weight`` is negative.
    """

    module_type = _FairDARTSModule

    def __init__(self, *, zero_one_weight: float = 10.0, **kwargs: Any) -> None:
        if not 0 <= zero_one_weight < math.inf:
            raise ValueError(f"zero_one_weight={zero_one_weight!r}: must be ≥ 0")
        super().__init__(**kwargs)
        self.zero_one_weight = zero_one_weight

    def configure_softmax(self) -> nn.Module:
        """Return the sigmoid."""
        return nn.Sigmoid()

    def configure_oneshot_module(self, training_module: Any) -> BaseOneShotLightningModule:
        """Return NNI's module with our step and the zero-one loss."""
        module: Any = super().configure_oneshot_module(training_module)
        module.zero_one_weight = self.zero_one_weight
        return module
