"""Networks whose normalisations keep their activation when somebody converts them to ``SyncBatchNorm`` or back."""

from __future__ import annotations

from typing import Any, Optional

from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["KeepsActivations"]


class KeepsActivations:
    """Base of a network: it mends what torch's and mmengine's conversions make of timm's ``BatchNormAct2d``.

    They make a normalisation of it that has the activation as a child and does not call it. Both put the children of a
    network back by ``add_module``, the inner ones first.
    """

    def add_module(self, name: str, module: Optional[nn.Module]) -> None:
        """Register a child whose normalisations call their activations."""
        super().add_module(name, module)  # type: ignore[misc]
        for norm in [] if module is None else module.modules():
            if "act" in norm._modules:
                _call_activation(norm)


def _call_activation(norm: Any) -> None:
    """Make a converted normalisation one of timm's that calls its activation."""
    kind = type(norm)
    if kind.__module__.startswith("mmcv."):
        norm.register_forward_pre_hook(_refuse)
    elif kind is nn.SyncBatchNorm:
        norm.__class__ = SyncBatchNormAct
    elif isinstance(norm, _BatchNorm) and kind.forward is _BatchNorm.forward:
        norm.__class__ = BatchNormAct2d


def _refuse(norm: nn.Module, args: Any) -> None:
    raise ValueError(f"sync_bn: must be 'torch'; {type(norm).__name__} of mmcv does not call the activation it has")
