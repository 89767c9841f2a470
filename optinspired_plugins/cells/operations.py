"""The candidate operations of Table 6, for search spaces and derived networks.

Table 6 has the eight operations of DARTS (Liu et al. 2019), with their names, and the negative identity. An operation
maps (batch, channels, height, width) to the same shape, or with stride 2 to half the size, rounded up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "DARTS_OPERATIONS",
    "IDENTITY",
    "NEGATIVE_IDENTITY",
    "OPERATIONS",
    "TABLE_6",
    "ZERO",
    "FactorizedReduce",
    "NegativeIdentity",
    "Zero",
    "conv_norm",
    "make_operation",
]

ZERO, IDENTITY, NEGATIVE_IDENTITY = "none", "skip_connect", "neg_skip_connect"


class Zero(nn.Module):
    """x ↦ 0.

    Args:
        stride: 1 or 2.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros, also where x is not finite."""
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class NegativeIdentity(nn.Module):
    """x ↦ −S(x), with S the identity, or a factorised reduction for stride 2.

    Args:
        shortcut: S.
    """

    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return −S(x)."""
        return -self.shortcut(x)


class FactorizedReduce(nn.Module):
    """A shortcut with stride 2 that reads every pixel.

    It has two 1×1 convolutions, one of them shifted by one pixel in both directions.
    An odd side is padded with a zero for the shifted one, so that both outputs have the same size.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        affine: scale and shift in the normalisation.
    """

    def __init__(self, in_channels: int, out_channels: int, affine: bool = True) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(in_channels, out_channels - out_channels // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Return half the size, rounded up."""
        return self.bn(self.reduce(self.relu(x)))

    def reduce(self, x: Tensor) -> Tensor:
        """Return the output of both convolutions before the normalisation, from the rectified input."""
        shifted = F.pad(x, [-1, 1, -1, 1])
        return torch.cat([self.conv_1(x), self.conv_2(shifted)], 1)


def conv_norm(in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, affine: bool = True) -> nn.Module:
    """Return ReLU, convolution and batch normalisation."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels, affine=affine),
    )


def _depthwise(channels: int, kernel: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    """Return ReLU, depthwise and pointwise convolution, batch normalisation."""
    padding = dilation * (kernel // 2)
    return [
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]


def _separable(kernel: int, channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Sequential(*_depthwise(channels, kernel, stride, 1, affine), *_depthwise(channels, kernel, 1, 1, affine))


def _dilated(kernel: int, channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Sequential(*_depthwise(channels, kernel, stride, 2, affine))


def _identity(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)


# name -> (channels, stride, affine) -> operation; the order is DARTS's.
OPERATIONS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    ZERO: lambda channels, stride, affine: Zero(stride),
    "max_pool_3x3": lambda channels, stride, affine: nn.MaxPool2d(3, stride, padding=1),
    "avg_pool_3x3": lambda channels, stride, affine: nn.AvgPool2d(3, stride, padding=1, count_include_pad=False),
    IDENTITY: _identity,
    "sep_conv_3x3": partial(_separable, 3),
    "sep_conv_5x5": partial(_separable, 5),
    "dil_conv_3x3": partial(_dilated, 3),
    "dil_conv_5x5": partial(_dilated, 5),
    NEGATIVE_IDENTITY: lambda channels, stride, affine: NegativeIdentity(_identity(channels, stride, affine)),
}

TABLE_6 = tuple(OPERATIONS)
DARTS_OPERATIONS = TABLE_6[:-1]
POOLINGS = ("max_pool_3x3", "avg_pool_3x3")


def make_operation(
    name: str, channels: int, stride: int, affine: bool = True, norm_after_pooling: bool = False
) -> nn.Module:
    """Return a candidate operation.

    Args:
        name: a name of Table 6, in :data:`OPERATIONS`.
        channels: number of channels, ≥ 1.
        stride: 1 or 2.
        affine: scale and shift in its normalisations; a supernet has none, since α is a scale too.
        norm_after_pooling: normalise after a pooling, as in the supernet of DARTS.

    Raises:
        ValueError: an argument is out of range.
    """
    if name not in OPERATIONS:
        raise ValueError(f"operation={name!r}: must be one of {', '.join(OPERATIONS)}")
    if stride not in (1, 2):
        raise ValueError(f"stride={stride!r}: must be 1 or 2")
    operation = OPERATIONS[name](channels, stride, affine)
    if norm_after_pooling and name in POOLINGS:
        return nn.Sequential(operation, nn.BatchNorm2d(channels, affine=affine))
    return operation
