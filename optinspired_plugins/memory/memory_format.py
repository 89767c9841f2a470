"""The memory format of gradients in training with channels last."""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor, nn

from .eager import is_eager

__all__ = ["align_gradient", "training_layout"]


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


ONEDNN_BLOCK = 16  # channels, with AVX-512; 8 without


def training_layout(model: nn.Module) -> torch.memory_format:
    """Return channels last, in which depthwise convolutions are much faster, or contiguous where that is not safe.

    In channels last the weight gradient of a strided 1×1 convolution of fewer input channels than a block writes past
    oneDNN's workspace: the gradient is wrong, or the process crashes (oneDNN's issue 6035).
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    strided = [conv for conv in convolutions if math.prod(conv.kernel_size) == 1 < math.prod(conv.stride)]
    narrow = any(conv.in_channels // conv.groups < ONEDNN_BLOCK for conv in strided)
    return torch.contiguous_format if narrow else torch.channels_last
