"""The plan of a network of cells (§9.3): channels, strides, and the number of its parameters.

This module does not load torch.
"""

from __future__ import annotations

from typing import NamedTuple

from .._checks import check_int
from .genotype import Genotype

__all__ = ["STEMS", "CellPlan", "count_parameters", "plan_cells"]

STEMS = ("cifar", "imagenet")


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


def count_parameters(
    genotype: Genotype, cells: int, channels: int, classes: int, in_chans: int = 3, stem: str = "cifar"
) -> int | None:
    """Return the number of parameters of a genotype's network without auxiliary head.

    Args:
        genotype: the genotype.
        cells: see :func:`plan_cells`.
        channels: see :func:`plan_cells`.
        classes: number of classes.
        in_chans: channels of an image.
        stem: see :func:`plan_cells`.

    Returns:
        The number; ``None`` for an operation that is not in Table 6.

    Raises:
        ValueError: an argument is out of range.
    """
    check_int("classes", classes, 1)
    check_int("in_chans", in_chans, 1)
    operations = {edge.operation for cell in (genotype.normal, genotype.reduction) for node in cell for edge in node}
    if not operations <= {*KERNELS, *WITHOUT_PARAMETERS, *SHORTCUTS}:
        return None
    plans = plan_cells(cells, channels, genotype.nodes, stem)
    total = _stem_parameters(stem, in_chans, channels)
    for plan in plans:
        cell = genotype.reduction if plan.reduction else genotype.normal
        total += sum(before * plan.channels + 2 * plan.channels for before in plan.before)
        total += sum(
            _operation_parameters(edge.operation, plan.channels, plan.reduction and edge.source < 2)
            for node in cell
            for edge in node
        )
    return total + (genotype.nodes * plans[-1].channels + 1) * classes


# Side of the kernel, and the number of pairs of depthwise and pointwise convolution.
KERNELS = {"sep_conv_3x3": (3, 2), "sep_conv_5x5": (5, 2), "dil_conv_3x3": (3, 1), "dil_conv_5x5": (5, 1)}
WITHOUT_PARAMETERS = ("max_pool_3x3", "avg_pool_3x3")
SHORTCUTS = ("skip_connect", "neg_skip_connect")  # 1×1 convolutions where they halve the size


def _operation_parameters(name: str, channels: int, halves: bool) -> int:
    if name in KERNELS:
        kernel, pairs = KERNELS[name]
        return pairs * (channels * kernel**2 + channels**2 + 2 * channels)
    return channels**2 + 2 * channels if name in SHORTCUTS and halves else 0


def _stem_parameters(stem: str, in_chans: int, channels: int) -> int:
    if stem == "cifar":
        return 9 * in_chans * 3 * channels + 2 * 3 * channels
    half = channels // 2
    first = 9 * in_chans * half + 2 * half + 9 * half * channels + 2 * channels
    return first + 9 * channels**2 + 2 * channels
