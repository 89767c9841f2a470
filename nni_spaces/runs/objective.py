"""The loss of searches and retrainings, and what is measured beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Measure", "Objective"]

Measure = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """Cross-entropy, or the mean squared error of one output, or an own loss.

    An own function receives outputs, shape (batch, classes), or (batch,) with ``regression``, and labels, shape
    (batch,), and returns the mean over the batch.

    Args:
        regression: labels are real numbers; the first logit is the output, and there is no accuracy.
        label_smoothing: of cross-entropy in training.
        loss: an own loss; ``None`` for the above.
        metric: another function to measure; ``None`` for none.
    """

    regression: bool = False
    label_smoothing: float = 0.0
    loss: Measure | None = None
    metric: Measure | None = None

    def __call__(self, logits: Tensor, labels: Tensor, training: bool = True) -> Tensor:
        """Return the loss of a batch; without ``training`` labels are not smoothed."""
        if self.loss is not None:
            return self.loss(self.outputs(logits), labels)
        if self.regression:
            return F.mse_loss(self.outputs(logits), labels)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing if training else 0.0)

    def outputs(self, logits: Tensor) -> Tensor:
        """Return what own functions receive."""
        return logits[:, 0] if self.regression else logits

    def measured(self, part: str, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the own metric of a batch, by the name that it has in the history."""
        return {} if self.metric is None else {f"{part}_metric": self.metric(self.outputs(logits).detach(), labels)}
