"""The memory format of gradients in training with channels last."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from optinspired_plugins.memory.eager import is_eager

__all__ = ["align_gradient"]


def align_gradient(x: Tensor) -> None:
    """Make the gradient of x, shape (batch, channels, height, width), channels last where x is.

    A pooled map, a slice and a concatenation hand back gradients of other strides, and sums pass them on from stage to
    stage. ReLU would put them right, but the rules have none after their sums, and torch's normalisations take about
    three times as long where the gradient is not as their input.
    """
    if is_eager(x) and x.requires_grad and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        x.register_hook(_channels_last)


def _channels_last(gradient: Optional[Tensor]) -> Optional[Tensor]:
    """Undefined gradients, which are zeros, come as ``None``."""
    return None if gradient is None else gradient.contiguous(memory_format=torch.channels_last)
