"""Which modules are still as they were made, so that a function may take the place of their calls."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.fx
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from optinspired_plugins.pooled_norm import pooled_norm

__all__ = ["is_eager", "is_fusible_norm", "is_plain", "pool_first"]


def is_eager(x: Tensor) -> bool:
    """Say whether values are wanted, and not shapes or a graph, which has the plain form's operations."""
    return not (
        isinstance(x, torch.fx.Proxy)
        or x.is_meta
        or torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or torch.onnx.is_in_onnx_export()
        or torch._C._are_functorch_transforms_active()  # as torch's own Function asks
    )


def is_plain(module: nn.Module) -> bool:
    """Say whether nothing is hooked to a module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks)


def is_fusible_norm(norm: Any, training: bool) -> bool:
    """Say whether a module is a batch normalisation and a ReLU, in the given mode."""
    return (
        type(norm) is BatchNormAct2d
        and type(norm.act) is nn.ReLU
        and type(norm.drop) is nn.Identity
        and _is_usual(norm)
        and norm.training == training
        and all(map(is_plain, norm.modules()))
    )


def _is_usual(norm: nn.BatchNorm2d) -> bool:
    return norm.affine and norm.running_mean is not None and norm.momentum is not None


def pool_first(x: Tensor, norm: Any, act: Any, pool: Any) -> Optional[Tensor]:
    """Return pool(act(norm(x))) in training by :func:`~optinspired_plugins.pooled_norm.pooled_norm`.

    ``act`` is ``None`` where the norm has it. ``None`` where somebody changed a module, and where it was not measured
    to be faster: in reduced precision and away from the CPU.
    """
    if not (torch.is_grad_enabled() and is_eager(x) and x.device.type == "cpu"):
        return None
    if act is None:
        known = is_fusible_norm(norm, True)
    else:
        known = type(norm) is nn.BatchNorm2d and type(act) is nn.ReLU and _is_usual(norm) and norm.training
        known = known and is_plain(norm) and is_plain(act)
    exact = known and x.dtype in (torch.float32, torch.float64) and norm.weight.dtype == x.dtype
    if not exact or type(pool) is not nn.MaxPool2d or pool.return_indices or not is_plain(pool):
        return None
    return pooled_norm(x, norm, pool)
