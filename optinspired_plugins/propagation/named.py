"""The named algorithms of networks and search spaces."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..algorithms.faster import FASTER
from ..algorithms.methods import ALGORITHMS, HeavyBall
from .unrolled import TwoPath

__all__ = ["NETWORK_ALGORITHMS"]

# The names of section 3, with the β of §7.1 for the heavy ball, the last row of Table 3, and methods beyond the paper.
NETWORK_ALGORITHMS: dict[str, Callable[[], Any]] = {
    **ALGORITHMS,
    "hb": partial(HeavyBall, beta=1.0),
    "dmrnet": TwoPath,
    **FASTER,
}
