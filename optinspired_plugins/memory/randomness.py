"""Modules whose passes may draw random numbers."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["may_draw_random_numbers"]

# Packages whose modules draw random numbers only through these attributes, and only in training.
_KNOWN = ("torch", "timm", "timm_models", "optinspired_plugins")
_RATES = ("p", "prob", "drop_prob", "drop_rate", "dropout")


def may_draw_random_numbers(module: nn.Module) -> bool:
    """Return False if no pass through a module draws random numbers in its present mode.

    It is True for dropout, drop path and drop block at a rate above 0 in training, and for all code that cannot be
    judged: modules of other packages, hooks and replaced methods.
    """
    return any(_may_draw(m) for m in module.modules())


def _may_draw(module: Any) -> bool:
    unknown = type(module).__module__.partition(".")[0] not in _KNOWN
    if unknown or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return True
    rates = (getattr(module, name, None) for name in _RATES)
    return module.training and (
        isinstance(module, nn.RReLU) or any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)
    )
