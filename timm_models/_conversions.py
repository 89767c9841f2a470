"""Normalisations that keep their activation in conversions to ``SyncBatchNorm``."""

from __future__ import annotations

from typing import Any, Optional

from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["KeepsActivations"]


class KeepsActivations:
    """Base of a network that repairs converted normalisations.

    torch's and mmengine's conversions turn timm's ``BatchNormAct2d`` into a normalisation that has the activation as a
    child and does not call it. Both register the children of a network by ``add_module``, the inner ones first.
    """

    def add_module(self, name: str, module: Optional[nn.Module]) -> None:
        """Register a child, and make its normalisations call their activations."""
        super().add_module(name, module)  # type: ignore[misc]
        for norm in [] if module is None else module.modules():
            if "act" in norm._modules:
                _call_activation(norm)


def _call_activation(norm: Any) -> None:
    """Give a converted normalisation timm's class, which calls its activation."""
    kind = type(norm)
    if kind.__module__.startswith("mmcv."):
        norm.register_forward_pre_hook(_refuse)
    elif kind is nn.SyncBatchNorm:
        norm.__class__ = SyncBatchNormAct
    elif isinstance(norm, _BatchNorm) and kind.forward is _BatchNorm.forward:
        norm.__class__ = BatchNormAct2d


def _refuse(norm: nn.Module, args: Any) -> None:
    raise ValueError(f"sync_bn: must be 'torch'; {type(norm).__name__} of mmcv does not call the activation it has")
