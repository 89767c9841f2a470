"""Memory formats in training: channels last for gradients and for networks of cells."""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor, nn

from .eager import is_eager

__all__ = ["align_gradient", "training_layout"]


def align_gradient(x: Tensor) -> None:
    """Make the gradient of x channels last if x is, shape (batch, channels, height, width).

    The gradients of a pooling, a slice and a concatenation have other strides, and sums pass them to earlier stages.
    The rules have no ReLU after their sums, which would restore the strides. Torch's normalisations take about three
    times as long for a gradient with other strides than their input.
    """
    if is_eager(x) and x.requires_grad and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        x.register_hook(_channels_last)


def _channels_last(gradient: Optional[Tensor]) -> Optional[Tensor]:
    """Return a gradient in channels last; ``None`` is an undefined gradient, which means zero."""
    return None if gradient is None else gradient.contiguous(memory_format=torch.channels_last)


ONEDNN_BLOCK = 16  # channels, with AVX-512; 8 without


def training_layout(model: nn.Module) -> torch.memory_format:
    """Return the memory format for training a network of cells.

    It is channels last, which makes depthwise convolutions much faster, or contiguous if that is unsafe. In channels
    last, the weight gradient of a strided 1×1 convolution with fewer input channels than a block writes past the
    workspace of oneDNN: the gradient is wrong, or the process crashes (oneDNN issue 6035).
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    strided = [conv for conv in convolutions if math.prod(conv.kernel_size) == 1 < math.prod(conv.stride)]
    narrow = any(conv.in_channels // conv.groups < ONEDNN_BLOCK for conv in strided)
    return torch.contiguous_format if narrow else torch.channels_last
