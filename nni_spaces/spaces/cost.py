"""The size of networks and of the candidates of an edge: parameters and multiply-accumulates (MACs)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache

import torch

from optinspired_plugins._checks import check_int
from optinspired_plugins.cells.labels import KINDS, Label
from optinspired_plugins.cells.network import CellPlan
from optinspired_plugins.cells.operations import make_operation
from optinspired_plugins.counting import Count, count_network

__all__ = ["ImageSize", "edge_counts", "height_and_width"]

ImageSize = int | Sequence[int]


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """Return height and width of images; ValueError unless both are integers ≥ 1."""
    sides = (size, size) if isinstance(size, int) else size
    if len(sides) != 2:
        raise ValueError(f"size={size!r}: must be a side, or height and width")
    for name, side in zip(("height", "width"), sides):
        check_int(name, side, 1)
    return sides[0], sides[1]


@cache
def operation_count(name: str, channels: int, stride: int, sides: tuple[int, int]) -> Count:
    """Return the size of an operation for one input of this height and width."""
    with torch.device("meta"):
        operation = make_operation(name, channels, stride)
    return count_network(operation, (channels, *sides))


def edge_counts(
    plans: Sequence[CellPlan], stem: str, edges: Mapping[str, int], names: Mapping[str, Sequence[str]], size: ImageSize
) -> dict[str, dict[str, Count]]:
    """Return the size of each candidate of each edge in a derived network, summed over the cells of a kind.

    Args:
        plans: the plans of the cells.
        stem: ``"cifar"`` or ``"imagenet"``.
        edges: the sources of the edges, by the labels of their α.
        names: the candidates of the edges, by label.
        size: side of the images, or height and width.
    """
    found = {label: dict.fromkeys(names[label], Count(0, 0)) for label in edges}
    for plan, sides in _with_inputs(plans, stem, height_and_width(size)):
        for label, counts in found.items():
            if Label.parse(label).cell != KINDS[plan.reduction]:
                continue
            halves = plan.reduction and edges[label] < 2
            at = _halved(sides) if plan.reduction and not halves else sides
            for name, count in counts.items():
                counts[name] = count.plus(operation_count(name, plan.channels, 2 if halves else 1, at))
    return found


def _with_inputs(
    plans: Iterable[CellPlan], stem: str, sides: tuple[int, int]
) -> Iterator[tuple[CellPlan, tuple[int, int]]]:
    """Yield the plan of each cell with height and width of its inputs."""
    for _ in range(3 if stem == "imagenet" else 0):
        sides = _halved(sides)
    for plan in plans:
        yield plan, sides
        sides = _halved(sides) if plan.reduction else sides


def _halved(sides: tuple[int, int]) -> tuple[int, int]:
    return (sides[0] + 1) // 2, (sides[1] + 1) // 2
