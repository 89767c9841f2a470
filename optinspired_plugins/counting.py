"""The size of a network: parameters and multiply-accumulates (MACs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Count", "count_network"]


class Count(NamedTuple):
    """The size of a network: its parameters, and the MACs of its convolutions and classifier for an image."""

    parameters: int
    macs: int

    def plus(self, other: Count, sign: int = 1) -> Count:
        """Return the sum with another size, or the difference."""
        return Count(self.parameters + sign * other.parameters, self.macs + sign * other.macs)


def count_network(network: nn.Module, shape: Sequence[int]) -> Count:
    """Return the size of a network on the meta device, where nothing is computed.

    Args:
        network: is set to evaluation.
        shape: of an image: channels, height, width.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(torch.empty(1, *shape, device="meta"))
    return Count(sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2)
