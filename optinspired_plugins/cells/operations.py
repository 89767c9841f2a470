"""The candidate operations of Table 6 and registered ones, for search spaces and derived networks.

Table 6 has the eight operations of DARTS (Liu et al. 2019), with their names, and the negative identity. An operation
maps (batch, channels, height, width) to the same shape, or with stride 2 to half the size, rounded up.
:func:`register_operation` adds one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .drawing import LOOKS, OWN, Look
from .genotype import CHOICES, REGISTER

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
    "check_operation",
    "conv_norm",
    "import_modules",
    "make_operation",
    "register_operation",
]

ZERO, IDENTITY, NEGATIVE_IDENTITY = "none", "skip_connect", "neg_skip_connect"
NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_]{0,19}")  # as long as the space of a label in a drawing


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


def register_operation(name: str, factory: Callable[[int, int, bool], nn.Module]) -> None:
    """Add an operation that spaces, genotypes, derived networks, drawings and reports know in this process.

    The default candidates of the spaces stay as they are; ``operations=[…]`` names others. A genotype holds the name
    only, so that the operation must be registered before its file is read.

    Args:
        name: a letter, and up to 19 letters, digits and underscores.
        factory: called with channels, stride (1 or 2) and ``affine``, see :func:`make_operation`. The operation must
            not change its input in place.

    Raises:
        ValueError: ``name`` is of another form, or has another factory.
        TypeError: ``factory`` cannot be called.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"name={name!r}: must be a letter, and at most 19 letters, digits and underscores")
    if not callable(factory):
        raise TypeError(f"factory={factory!r}: must be a function of channels, stride and affine")
    if OPERATIONS.get(name, factory) != factory:
        raise ValueError(f"name={name!r}: has another factory already, {OPERATIONS[name]!r}: must be a new name")
    if name not in OPERATIONS:
        OPERATIONS[name], LOOKS[name] = factory, Look(name, OWN)
        CHOICES.append(name)


def import_modules(modules: Sequence[str]) -> list[str]:
    """Import modules, which may register operations, and return them with absolute paths of files.

    Args:
        modules: names of modules, or paths that end with ``.py``. The folder of a path becomes the first in which
            modules are looked for.

    Raises:
        ValueError: a path is no file, or another module has its name.
        ImportError: there is no such module.
    """
    found = []
    for name in modules:
        path = Path(name)
        if path.suffix == ".py":
            if not path.is_file():
                raise ValueError(f"import={name!r}: must be a file, or the name of a module")
            sys.path.insert(0, str(path.resolve().parent))
            file = getattr(import_module(path.stem), "__file__", None)
            if file is None or not path.samefile(file):
                raise ValueError(f"import={name!r}: another module is named {path.stem}: must have another name")
            found.append(str(path.resolve()))
        else:
            import_module(name)
            found.append(name)
    return found


def make_operation(
    name: str, channels: int, stride: int, affine: bool = True, norm_after_pooling: bool = False
) -> nn.Module:
    """Return a candidate operation.

    Args:
        name: a name in :data:`OPERATIONS`, of Table 6 or registered.
        channels: number of channels, ≥ 1.
        stride: 1 or 2.
        affine: scale and shift in its normalisations; a supernet has none, since α is a scale too.
        norm_after_pooling: normalise after a pooling, as in the supernet of DARTS.

    Raises:
        ValueError: an argument is out of range.
        TypeError: the factory of a registered operation returns something else.
    """
    if name not in OPERATIONS:
        raise ValueError(f"operation={name!r}: must be one of {', '.join(OPERATIONS)}, {REGISTER}")
    if stride not in (1, 2):
        raise ValueError(f"stride={stride!r}: must be 1 or 2")
    operation = OPERATIONS[name](channels, stride, affine)
    if not isinstance(operation, nn.Module):
        raise TypeError(f"operation={name!r}: its factory returns {type(operation).__name__}, must be an nn.Module")
    if norm_after_pooling and name in POOLINGS:
        return nn.Sequential(operation, nn.BatchNorm2d(channels, affine=affine))
    return operation


def check_operation(name: str, channels: int) -> None:
    """ValueError where a registered operation returns another shape than it must, or changes its input in place."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        for stride in (1, 2):
            x, side = torch.linspace(-1, 1, 49 * channels).view(1, channels, 7, 7), -(-7 // stride)
            before = x.clone()
            found, needed = tuple(make_operation(name, channels, stride).eval()(x).shape), (1, channels, side, side)
            where = f"operation={name!r} with {channels} channels and stride={stride}"
            if found != needed:
                raise ValueError(f"{where}: returns the shape {found} for {tuple(x.shape)}, must be {needed}")
            if not torch.equal(x, before):
                raise ValueError(f"{where}: changes its input in place, must not")
