"""The start of a stage: the weight γ of the last normalisation of its transforms.

Each T_j ends in a normalisation. At the start, its output has mean 0 and variance γ², and outputs of different T_j are
uncorrelated. If h and w_j are the total weights of S(u) and T_j in the stage's output, its variance is
h² Var(S(u)) + γ² Σ_j w_j². The start ``"auto"`` is γ = (Σ_j w_j²)^(−1/2), at most 1.
"""

from __future__ import annotations

import math
from typing import Sequence, Union

from optinspired_plugins._checks import check_bool, check_finite

__all__ = ["DEFAULT_START", "Start", "check_start", "start_weight"]

Start = Union[float, str]

DEFAULT_START: Start = "auto"
# The multiple of (Σ_j w_j²)^(−1/2) that "auto" uses.
START_SCALE = 1.0


def check_start(init_last: Start, zero_init_last: bool = False) -> Start:
    """Return the start as a finite number or ``"auto"``; ValueError if it is neither."""
    check_bool("zero_init_last", zero_init_last)
    if zero_init_last and init_last not in (1.0, DEFAULT_START):
        raise ValueError(f"init_last={init_last!r} with zero_init_last=True: pass one of them")
    if zero_init_last or init_last == "zero":
        return 0.0
    if init_last == "auto":
        return "auto"
    try:
        return check_finite("init_last", init_last)
    except ValueError as error:
        raise ValueError(f"{error}, 'auto' or 'zero'") from None


def start_weight(start: Start, weights: Sequence[float]) -> float:
    """Return γ of a stage.

    Args:
        start: from :func:`check_start`.
        weights: w_j of every transform.
    """
    if not isinstance(start, str):
        return start
    squares = math.fsum(weight**2 for weight in weights)
    return min(1.0, START_SCALE * squares**-0.5) if squares > 0 else 1.0
