"""Stems that do not store their full-size images."""

from __future__ import annotations

from functools import partial
from typing import Any, Optional, Sequence

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from optinspired_plugins.memory.eager import is_eager
from optinspired_plugins.memory.pooled_norm import max_pooled_norm
from optinspired_plugins.memory.recompute import recompute

from .unmodified import fits, is_plain_norm, is_rectified_norm, is_unmodified

__all__ = ["pool_first", "recompute_chain"]


def pool_first(x: Tensor, norm: Any, act: Any, pool: Any) -> Optional[Tensor]:
    """Return pool(act(norm(x))) in training by :func:`~optinspired_plugins.memory.pooled_norm.max_pooled_norm`.

    ``None`` where that function may not replace the modules, and where it was not measured to be faster: in reduced
    precision and on devices other than the CPU.

    Args:
        x: shape (batch, channels, height, width).
        norm: the normalisation.
        act: the activation; ``None`` where the normalisation contains it.
        pool: the pooling.
    """
    if not (torch.is_grad_enabled() and is_eager(x) and x.device.type == "cpu" and x.dim() == 4):
        return None
    if x.dtype not in (torch.float32, torch.float64) or norm.__class__ not in (BatchNormAct2d, nn.BatchNorm2d):
        return None
    if act is None:
        is_known = is_rectified_norm(norm, x.shape[1], True)
    else:
        is_known = is_unmodified(norm, nn.BatchNorm2d) and is_unmodified(act, nn.ReLU)
        is_known = is_known and is_plain_norm(norm, x.shape[1], True)
    is_known = is_known and is_unmodified(pool, nn.MaxPool2d) and not pool.return_indices
    tensors = (*norm.parameters(), *norm.buffers())
    has_dtype = all(p.dtype == x.dtype or not p.is_floating_point() for p in tensors)  # autocast does not cast norms
    return max_pooled_norm(x, norm, pool) if is_known and has_dtype and fits(x, *tensors) else None


def recompute_chain(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Run modules in order, storing only x."""
    if len(modules) == 1:
        return modules[0](x)
    return recompute(nn.ModuleList(modules), partial(_run_chain, modules), x)


def _run_chain(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    # Not a Sequential: torch.fx refuses calls of modules that are not in the network.
    for module in modules:
        x = module(x)
    return x
