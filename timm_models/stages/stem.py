"""Recomputation of stems and of pooled normalisations, which do not store their full-size images."""

from __future__ import annotations

from functools import partial
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from optinspired_plugins.memory.eager import is_eager
from optinspired_plugins.memory.recompute import recompute

from .unmodified import is_rectified_norm, is_unmodified

__all__ = ["is_reversible", "recompute_chain", "recompute_pooled"]


def is_reversible(stage: nn.Module) -> bool:
    """Return True for a stage that recovers its iterates; then the stem saves memory, too."""
    return bool(getattr(getattr(stage, "settings", None), "is_reversible", False))


def recompute_pooled(x: Tensor, norm: Any, pool: Any) -> Tensor:
    """Return pool(norm(x)), storing only x on a CPU.

    There it takes as long as storing. Modules with hooks are called once.
    """
    is_known = (
        torch.is_grad_enabled()
        and is_eager(x)
        and x.device.type == "cpu"
        and is_unmodified(pool, nn.MaxPool2d if isinstance(pool, nn.MaxPool2d) else nn.AvgPool2d)
        and is_rectified_norm(norm, x.shape[1], norm.training)
    )
    return recompute_chain([norm, pool], x) if is_known else pool(norm(x))


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
