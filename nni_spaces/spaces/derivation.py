"""Derive a cell from softmax(α) and p (§9.3), with P-DARTS's rules (Chen et al. 2019).

Strategies export ``probabilities`` and histories record them. Search space-HB and other spaces with fixed edges have
``{"normal/op_2_0": {operation: softmax(α)}, …}``, and spaces that choose sources have
``{"normal/3_1": {operation: softmax(α)}, …, "normal/beta_3": {source: p}, …}``. DARTS's space has ``beta`` with partial
channels only; with fixed edges ``beta`` is by edge, not by source. In a file the sources are text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, cast

from optinspired_plugins._checks import check_int
from optinspired_plugins.cells.genotype import EDGES, SKIPS
from optinspired_plugins.cells.labels import Label
from optinspired_plugins.cells.operations import ZERO

__all__ = ["Probabilities", "derive", "limit_skips", "strongest_candidates"]

Probabilities = Mapping[str, Mapping[Any, float]]


class DerivedEdge(NamedTuple):
    """An edge of a derived cell.

    ``weight`` is p · softmax(α). ``label`` is the label of α. ``key`` is the sample's key of the operation. ``source``
    is the edge's source if the search chooses it, and otherwise ``None``.
    """

    weight: float
    operation: str
    label: Label
    key: Label
    source: int | None


def ranked(weights: Mapping[str, float]) -> list[str]:
    """Return the operations in descending order of weight; the name decides between equal weights."""
    return sorted(weights, key=lambda name: (weights[name], name), reverse=True)


def nonzero(weights: Mapping[str, float]) -> list[str]:
    """Return the operations other than zero in descending order of weight."""
    return [name for name in ranked(weights) if name != ZERO]


def derived_edges(probabilities: Probabilities, keep: int) -> list[DerivedEdge]:
    """Return the edges of the derived cells.

    An edge has its strongest operation other than zero. Where the search chooses sources, a node has its ``keep``
    strongest edges.
    """
    edges: list[DerivedEdge] = []
    nodes: dict[tuple[str, int], list[DerivedEdge]] = {}
    for text, weights in probabilities.items():
        label = Label.parse(text)
        if label.choice == "beta":
            continue
        name = nonzero(weights)[0]
        if label.choice == "op":
            edges.append(DerivedEdge(weights[name], name, label, label, None))
            continue
        source = cast(int, label.position)
        row = probabilities.get(str(Label(label.cell, "beta", label.node)), {})
        p = {int(i): value for i, value in row.items()}.get(source, 1.0)
        nodes.setdefault((label.cell, label.node), []).append(
            DerivedEdge(p * weights[name], name, label, label, source)
        )
    for (cell, t), incoming in nodes.items():
        incoming.sort(key=lambda edge: -edge.weight)
        edges += [edge._replace(key=Label(cell, "op", t, k)) for k, edge in enumerate(incoming[:keep])]
    return edges


def derive(probabilities: Probabilities, keep: int = EDGES["agd"]) -> dict[str, Any]:
    """Return the sample of a finished search, as NNI's spaces take it.

    Fixed edges, as Search space-HB has, keep their strongest operations. The other spaces keep ``keep`` edges per node,
    with the largest p · softmax(α), and the strongest operation of each. Zero is never chosen.
    """
    sample: dict[str, Any] = {}
    for edge in derived_edges(probabilities, keep):
        sample[str(edge.key)] = edge.operation
        if edge.source is not None:
            sample[str(edge.key._replace(choice="input"))] = [edge.source]
    return sample


def limit_skips(
    probabilities: Probabilities,
    max_skips: int = 2,
    keep: int = EDGES["agd"],
    layers: Collection[str] | None = None,
) -> dict[str, dict[Any, float]]:
    """Limit the number of skip connections in the derived normal cell.

    As in P-DARTS, the weakest derived skip connection loses its probability and the cell is derived once more, until
    at most ``max_skips`` are left. The negative identity is a skip connection, too. An edge without another operation
    keeps its skip connection.

    Where the edges are fixed only layers count. In Search space-HB these are F's edges ``op_{t}_0``: ± identities on
    the other two edges are the heavy-ball rule (26) itself, not a collapse.

    Args:
        probabilities: of a finished search.
        max_skips: largest number of skip connections, ≥ 0.
        keep: number of edges per node, as in :func:`derive`.
        layers: labels of the edges that are layers of an algorithm; ``None`` for Search space-HB's.

    Returns:
        The probabilities without the removed operations.

    Raises:
        ValueError: ``max_skips`` is out of range.
    """
    check_int("max_skips", max_skips, 0)
    limited = {label: dict(weights) for label, weights in probabilities.items()}
    while True:
        derived = derived_edges(limited, keep)
        skips = [e for e in derived if e.operation in SKIPS and _is_limited(e, layers)]
        removable = [edge for edge in skips if len(nonzero(limited[str(edge.label)])) > 1]
        if len(skips) <= max_skips or not removable:
            return limited
        weakest = min(removable, key=lambda edge: edge.weight)
        del limited[str(weakest.label)][weakest.operation]


def _is_limited(edge: DerivedEdge, layers: Collection[str] | None) -> bool:
    """Return True if the limit applies to an edge: in the normal cell, and with fixed edges only to layers."""
    if edge.key.cell != "normal" or edge.source is not None:
        return edge.key.cell == "normal"
    return edge.key.position == 0 if layers is None else str(edge.label) in layers


def strongest_candidates(probabilities: Probabilities, keep: int) -> dict[str, list[str]]:
    """Return the strongest candidates of each edge, as the argument ``allowed`` of a space.

    Zero counts as a candidate, as in P-DARTS. The strongest operation other than zero is always among them.

    Args:
        probabilities: of a finished search.
        keep: number of candidates per edge, ≥ 1.

    Raises:
        ValueError: ``keep`` is out of range.
    """
    check_int("keep", keep, 1)
    allowed = {}
    for label, weights in probabilities.items():
        if Label.parse(label).choice != "beta":
            rest = [name for name in ranked(weights) if name != nonzero(weights)[0]]
            chosen = {nonzero(weights)[0], *rest[: keep - 1]}
            allowed[label] = [name for name in weights if name in chosen]
    return allowed
