"""Stems that pool before they normalise."""

from __future__ import annotations

from typing import Any, Optional

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from optinspired_plugins.memory.eager import is_eager
from optinspired_plugins.memory.pooled_norm import max_pooled_norm

from .unmodified import fits, is_plain_norm, is_rectified_norm, is_unmodified

__all__ = ["pool_first"]


def pool_first(x: Tensor, norm: Any, act: Any, pool: Any) -> Optional[Tensor]:
    """Return pool(act(norm(x))) in training by :func:`~optinspired_plugins.memory.pooled_norm.max_pooled_norm`.

    ``None`` where that may not stand in for the modules, and where it was not measured to be faster: in reduced
    precision and away from the CPU.

    Args:
        x: shape (batch, channels, height, width).
        norm: the normalisation.
        act: the activation; ``None`` where the norm has it.
        pool: the pooling.
    """
    if not (torch.is_grad_enabled() and is_eager(x) and x.device.type == "cpu" and x.dim() == 4):
        return None
    if x.dtype not in (torch.float32, torch.float64) or norm.__class__ not in (BatchNormAct2d, nn.BatchNorm2d):
        return None
    if act is None:
        known = is_rectified_norm(norm, x.shape[1], True)
    else:
        known = is_unmodified(norm, nn.BatchNorm2d) and is_unmodified(act, nn.ReLU)
        known = known and is_plain_norm(norm, x.shape[1], True)
    known = known and is_unmodified(pool, nn.MaxPool2d) and not pool.return_indices
    tensors = (*norm.parameters(), *norm.buffers())
    same = all(p.dtype == x.dtype or not p.is_floating_point() for p in tensors)  # autocast leaves norms alone
    return max_pooled_norm(x, norm, pool) if known and same and fits(x, *tensors) else None
