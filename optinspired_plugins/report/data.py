"""The data that a report's script draws: epochs of a search with entropy, margin, kinds and counts of operations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ..cells.drawing import LOOKS
from ..cells.genotype import CHOICES, CellGenotype, Genotype
from .findings import Findings, Row, findings, strongest
from .runs import EdgeKey, Epoch, SearchEpoch, SearchRun
from .texts import KIND_WORDS

__all__ = ["CELLS", "changes", "curves_data", "entropy", "kinds_of", "margin", "page_data", "thinned"]

CELLS = ("normal", "reduction")
LIMIT_CURVE = 1_000

T = TypeVar("T")


def thinned(items: Sequence[T], count: int) -> list[T]:
    """Return ``count`` ≥ 2 items, evenly spaced from the first to the last; all items if there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def entropy(probabilities: Iterable[float]) -> float:
    """Return −Σ p ln p."""
    return sum(-p * math.log(p) for p in probabilities if p > 0)


def margin(row: Row) -> float:
    """Return the difference of the two largest probabilities of operations that a genotype can have."""
    first = strongest(row)
    return row[first] - max(
        (p for operation, p in row.items() if operation in CHOICES and operation != first), default=0
    )


def changes(before: Genotype, after: Genotype) -> list[str]:
    """Describe the edges that differ between two genotypes, one line per node."""
    lines = []
    for cell in CELLS:
        for t, (old, new) in enumerate(zip(getattr(before, cell), getattr(after, cell)), start=2):
            removed, added = Counter(old) - Counter(new), Counter(new) - Counter(old)
            if removed:
                both = (removed, added)
                sides = [", ".join(f"{name}({source})" for name, source in side.elements()) for side in both]
                lines.append(f"{cell} node {t}: {sides[0]} → {sides[1]}")
    return lines


def kinds_of(found: Findings | None, cell: str) -> list[str]:
    """Return the kinds of the edges of a cell, in the order of its genotype; empty if they are unknown."""
    return [] if found is None else [found.kinds[key] for key, _ in found.edges if key.cell == cell]


def page_data(
    run: SearchRun, epochs: Sequence[SearchEpoch], drawings: Mapping[tuple[str, CellGenotype], int]
) -> dict[str, Any]:
    """Return the data of a search.

    Args:
        run: the search, for its curves.
        epochs: the epochs that the page shows.
        drawings: the number of the drawing of each normal and reduction cell.
    """
    first = epochs[0].alpha
    edges = sorted(first, key=lambda key: (key.cell, key.node, key.slot, key.source))
    operations = [operation for operation in LOOKS if any(operation in row for row in first.values())]
    genotypes = [epoch.genotype for epoch in epochs]
    alphas = [[epoch.alpha[edge] for edge in edges] for epoch in epochs if edges]
    by_number = {epoch.number: found for epoch, found in zip(run.history, findings(run))}
    found = [by_number[epoch.number] for epoch in epochs]
    return {
        "epochs": [epoch.number for epoch in epochs],
        "operations": operations,
        "looks": LOOKS,
        "edges": [{"cell": edge.cell, "name": _edge_name(edge, edges)} for edge in edges],
        "alpha": [[_rounded(map(row.get, operations), 4) for row in rows] for rows in alphas],
        "strongest": [[operations.index(strongest(row)) for row in rows] for rows in alphas],
        "entropy": [_rounded(entropy(row.values()) for row in rows) for rows in alphas],
        "greatest_entropy": round(math.log(max(2, len(operations))), 4),
        "margin": [_rounded(margin(row) for row in rows) for rows in alphas],
        "moved": [_rounded((each.moved[edge] for edge in edges), 4) if each else [] for each in found],
        "kind_words": {"": "dropped", **KIND_WORDS},
        "kinds": [[each.kinds.get(edge, "") for edge in edges] if each else [] for each in found],
        "drawn": [[kinds_of(each, cell) for cell in CELLS] for each in found],
        "decided": [found[-1] is not None and edge in found[-1].decided for edge in edges],
        "beta": [_rounded(epoch.beta[edge] for edge in edges) for epoch in epochs if epoch.beta],
        "chosen": [[_chosen(genotype, edge) for edge in edges] for genotype in genotypes],
        "drawings": [[drawings[cell, getattr(genotype, cell)] for cell in CELLS] for genotype in genotypes],
        "counts": {
            cell: [
                Counter(edge.operation for node in getattr(genotype, cell) for edge in node) for genotype in genotypes
            ]
            for cell in CELLS
        },
        "curves": {
            "search": _curves(run.history),
            "retrain": _curves(run.retraining.history if run.retraining else []),
        },
    }


def curves_data(history: Sequence[Epoch] = ()) -> dict[str, Any]:
    """Return the data of a page without a search: the curves of a retraining, if there is one."""
    return {"epochs": [], "curves": {"search": _curves([]), "retrain": _curves(history)}}


def _rounded(values: Iterable[float | None], digits: int = 6) -> list[float | None]:
    return [None if value is None else round(value, digits) for value in values]


def _edge_name(edge: EdgeKey, edges: Sequence[EdgeKey]) -> str:
    double = sum(other[:3] == edge[:3] for other in edges) > 1
    return f"{edge.source} → {edge.node}" + (f" ({edge.slot + 1})" if double else "")


def _chosen(genotype: Genotype, edge: EdgeKey) -> list[str]:
    """Return the operations of a genotype on an edge of the supernet."""
    node = getattr(genotype, edge.cell)[edge.node - 2]
    if edge.slot >= 0:
        return [node[edge.slot].operation]
    return [operation for operation, source in node if source == edge.source]


def _curves(history: Sequence[Epoch]) -> dict[str, Any]:
    """Return metrics by epoch, and the epochs with which a run was resumed."""
    shown = thinned(history, LIMIT_CURVE)
    return {
        "epochs": [epoch.number for epoch in shown],
        "resumed": thinned([epoch.number for epoch in history if epoch.resumed], LIMIT_CURVE),
        **{name: [_finite(epoch.metrics[name]) for epoch in shown] for name in (history[0].metrics if history else ())},
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
