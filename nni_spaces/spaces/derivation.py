"""From softmax(α) and p to a cell (§9.3), and P-DARTS's rules on the way (Chen et al. 2019).

``probabilities`` are what strategies export and histories keep: ``{"normal/op_2_0": {operation: softmax(α)}, …}`` of
Search space-HB, ``{"normal/3_1": {operation: softmax(α)}, …, "normal/beta_3": {source: p}, …}`` of the others, where
DARTS's space has ``beta`` with partial channels only. A file has text for the sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from optinspired_plugins._checks import check_int
from optinspired_plugins.cells.genotype import EDGES
from optinspired_plugins.cells.operations import IDENTITY, NEGATIVE_IDENTITY, ZERO

__all__ = ["SKIPS", "Probabilities", "derive", "limit_skips", "strongest_candidates"]

Probabilities = Mapping[str, Mapping[Any, float]]
SKIPS = (IDENTITY, NEGATIVE_IDENTITY)


class DerivedEdge(NamedTuple):
    """An edge that a derivation keeps.

    ``weight`` is p · softmax(α), ``label`` that of α, ``key`` where a sample has the operation, and ``source`` where
    the edge comes from if that was to be chosen.
    """

    weight: float
    operation: str
    label: str
    key: str
    source: int | None


def ranked(weights: Mapping[str, float]) -> list[str]:
    """Operations from the strongest on; equally strong ones by name, so that there is one answer."""
    return sorted(weights, key=lambda name: (weights[name], name), reverse=True)


def nonzero(weights: Mapping[str, float]) -> list[str]:
    """Operations that are not zero, from the strongest on."""
    return [name for name in ranked(weights) if name != ZERO]


def derived_edges(probabilities: Probabilities) -> list[DerivedEdge]:
    """Return the strongest operation of each edge, zero apart; where sources are chosen, of the two strongest edges."""
    edges: list[DerivedEdge] = []
    nodes: dict[tuple[str, int], list[DerivedEdge]] = {}
    for label, weights in probabilities.items():
        cell, _, edge = label.rpartition("/")
        if edge.startswith("beta_"):
            continue
        name = nonzero(weights)[0]
        if edge.startswith("op_"):
            edges.append(DerivedEdge(weights[name], name, label, label, None))
            continue
        t, source = map(int, edge.split("_"))
        p = {int(i): value for i, value in probabilities.get(f"{cell}/beta_{t}", {}).items()}.get(source, 1.0)
        nodes.setdefault((cell, t), []).append(DerivedEdge(p * weights[name], name, label, "", source))
    for (cell, t), found in nodes.items():
        found.sort(key=lambda edge: -edge.weight)
        edges += [edge._replace(key=f"{cell}/op_{t}_{k}") for k, edge in enumerate(found[: EDGES["agd"]])]
    return edges


def derive(probabilities: Probabilities) -> dict[str, Any]:
    """Return the sample that a search ends with, as NNI's spaces take it.

    Search space-HB keeps the strongest operation of each edge; the others keep, at each node, the strongest operations
    of the two edges where p · softmax(α) is largest. Zero is never among them.
    """
    sample: dict[str, Any] = {}
    for edge in derived_edges(probabilities):
        sample[edge.key] = edge.operation
        if edge.source is not None:
            sample[edge.key.replace("/op_", "/input_")] = [edge.source]
    return sample


def limit_skips(probabilities: Probabilities, most: int = 2) -> dict[str, dict[Any, float]]:
    """Return probabilities from which at most so many skip connections of the normal cell are derived.

    As in P-DARTS, the weakest one that is derived loses its probability, and the cell is derived anew, until few enough
    are left. The negative identity is a skip connection too. An edge that has nothing else keeps its own.

    Of Search space-HB only F's edges count, ``op_{t}_0``: ± identities on the other two are the heavy-ball rule (26)
    itself, not a collapse.

    Args:
        probabilities: of a finished search.
        most: number of skip connections, ≥ 0.

    Raises:
        ValueError: ``most`` is out of range.
    """
    check_int("most", most, 0)
    kept = {label: dict(weights) for label, weights in probabilities.items()}
    while True:
        skips = [e for e in derived_edges(kept) if e.operation in SKIPS and _is_limited(e)]
        removable = [edge for edge in skips if len(nonzero(kept[edge.label])) > 1]
        if len(skips) <= most or not removable:
            return kept
        weakest = min(removable, key=lambda edge: edge.weight)
        del kept[weakest.label][weakest.operation]


def _is_limited(edge: DerivedEdge) -> bool:
    """Whether skip connections of an edge count: in the normal cell, and of Search space-HB on F's edges alone."""
    return edge.key.startswith("normal/") and (edge.source is not None or edge.key.endswith("_0"))


def strongest_candidates(probabilities: Probabilities, keep: int) -> dict[str, list[str]]:
    """Return the candidates of each edge that go on to the next stage, as ``allowed`` of a space takes them.

    Zero counts, as in P-DARTS; the strongest operation beside it always stays.

    Args:
        probabilities: of a finished search.
        keep: number of candidates of an edge, ≥ 1.

    Raises:
        ValueError: ``keep`` is out of range.
    """
    check_int("keep", keep, 1)
    allowed = {}
    for label, weights in probabilities.items():
        if "/beta_" not in label:
            rest = [name for name in ranked(weights) if name != nonzero(weights)[0]]
            chosen = {nonzero(weights)[0], *rest[: keep - 1]}
            allowed[label] = [name for name in weights if name in chosen]
    return allowed
