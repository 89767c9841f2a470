"""Checks that searches, retrainings and trials share; they load no host."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optinspired_plugins._checks import check_int

__all__ = ["check_optimizer", "check_partial_channels"]


def check_optimizer(values: Mapping[str, Any]) -> None:
    """ValueError unless learning rates and clipping are positive, and momentum, decays and penalties ≥ 0."""
    for name in ("lr", "alpha_lr", "gradient_clip"):
        if name in values and not 0 < values[name] < math.inf:
            raise ValueError(f"{name}={values[name]!r}: must be a positive number")
    for name in ("momentum", "weight_decay", "alpha_weight_decay", "mac_weight"):
        if name in values and not 0 <= values[name] < math.inf:
            raise ValueError(f"{name}={values[name]!r}: must be ≥ 0")


def check_partial_channels(partial_channels: int, channels: int) -> None:
    """ValueError unless K is an integer ≥ 1 that divides the channels."""
    check_int("partial_channels", partial_channels, 1)
    if channels % partial_channels:
        raise ValueError(f"channels={channels}: must be divisible by partial_channels={partial_channels}")
