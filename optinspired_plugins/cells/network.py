"""The network around the cells: plan, stems and preprocessors (§9.3)."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .._checks import check_int
from .operations import FactorizedReduce, conv_norm

__all__ = ["CellPlan", "make_preprocessors", "make_stem", "plan_cells"]


class CellPlan(NamedTuple):
    """Channels and strides of a cell.

    Attributes:
        before: channels of c_{k−2} and c_{k−1}.
        channels: channels of a node.
        reduction: edges from the inputs have stride 2.
        reduction_before: the cell before is a reduction cell, so c_{k−2} is twice as large as c_{k−1}.
    """

    before: tuple[int, int]
    channels: int
    reduction: bool
    reduction_before: bool


STEMS = ("cifar", "imagenet")


def plan_cells(cells: int, channels: int, nodes: int, stem: str) -> list[CellPlan]:
    """Return the plans of all cells, as in DARTS.

    Reduction cells at one and two thirds of the depth double the channels.

    Args:
        cells: number of cells, ≥ 3.
        channels: channels of a node of the first cell, ≥ 2.
        nodes: nodes of a cell, ≥ 1.
        stem: ``"cifar"``, with 3 · channels, or ``"imagenet"``, with a reduction before the first cell.

    Raises:
        ValueError: an argument is out of range.
    """
    for name, value, least in (("cells", cells, 3), ("channels", channels, 2), ("nodes", nodes, 1)):
        check_int(name, value, least)
    if stem not in STEMS:
        raise ValueError(f"stem={stem!r}: must be one of {', '.join(map(repr, STEMS))}")
    before = (channels, channels) if stem == "imagenet" else (3 * channels, 3 * channels)
    reduction_before, plans = stem == "imagenet", []
    for i in range(cells):
        reduction = i in (cells // 3, 2 * cells // 3)
        channels = 2 * channels if reduction else channels
        plans.append(CellPlan(before, channels, reduction, reduction_before))
        before, reduction_before = (before[1], nodes * channels), reduction
    return plans


def make_stem(stem: str, in_channels: int, channels: int) -> tuple[nn.Module, nn.Module]:
    """Return the two parts of a stem; their outputs are c_{−2} and c_{−1}.

    Args:
        stem: ``"cifar"``: a 3×3 convolution and the identity; ``"imagenet"``: to 1/4 and to 1/8 of the size.
        in_channels: channels of an image.
        channels: see :func:`plan_cells`.
    """
    if stem == "cifar":
        conv = nn.Conv2d(in_channels, 3 * channels, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(3 * channels)), nn.Identity()
    first = nn.Sequential(
        nn.Conv2d(in_channels, channels // 2, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels // 2),
        nn.ReLU(),
        nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels),
    )
    return first, conv_norm(channels, channels, kernel=3, stride=2)


def make_preprocessors(plan: CellPlan, affine: bool = True) -> tuple[nn.Module, nn.Module]:
    """Return the modules that bring c_{k−2} and c_{k−1} to the channels and size of the nodes."""
    first = FactorizedReduce if plan.reduction_before else conv_norm
    return (
        first(plan.before[0], plan.channels, affine=affine),
        conv_norm(plan.before[1], plan.channels, affine=affine),
    )
