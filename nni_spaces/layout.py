"""The memory format in which networks are trained."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["training_layout"]

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
