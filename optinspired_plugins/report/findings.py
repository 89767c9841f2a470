"""Tell the findings of a search from noise: one definition for the lines of the epochs and for the report.

Everything follows from α at the start and after each epoch, which the history records. The *lead* of an edge is the
distance of the strongest operation's α from the next one's. The *way* of α is its learning rate times the number of its
steps, since a step of Adam moves α by about the learning rate.

An edge of a derived cell has one of four kinds:

- ``"tie"``: the lead is 0 within the precision of the recorded numbers, and the order of the names has decided.
- ``"start"``: the operation is that of the start in all epochs, and no α of the edge has moved as far as its lead at
  the start. The initialisation has decided.
- ``"open"``: the lead is at most twice the way of one epoch, so that another epoch could reverse it.
- ``"found"``: the search has decided.

Where a search chooses the edges of a node, the lead is also at most the lead over the best edge that was left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from ..cells.genotype import CHOICES, SKIPS, Genotype
from .runs import EdgeKey, SearchEpoch, SearchRun

__all__ = ["KINDS", "Findings", "distances", "edge_keys", "findings", "kind_of", "lead", "strongest"]

KINDS = ("found", "open", "tie", "start")
TOLERANCE = 2e-6  # of α, which is recorded with six digits
LEAST = 1e-30  # probabilities below count as this

Row = Mapping[str, float]


@dataclass(frozen=True)
class Findings:
    """The kinds of all edges of a derived pair of cells, and the distance of α from its start.

    Args:
        edges: the edges of the derived cells with their operations, in the order of the genotype.
        kinds: the kind of each of them.
        decided: all edges of the supernet that the start decides.
        moved: the largest distance of α from its start, for each edge of the supernet.
        farthest: largest distance of an entry of α from its start, over all edges and operations.
        median: median distance.
        reach: the way of α so far; ``None`` if steps or learning rate are not recorded.
        steps: steps of α so far, or ``None``.
    """

    edges: list[tuple[EdgeKey, str]]
    kinds: dict[EdgeKey, str]
    decided: frozenset[EdgeKey]
    moved: dict[EdgeKey, float]
    farthest: float
    median: float
    reach: float | None
    steps: int | None

    def counts(self) -> Counter[str]:
        """Return the number of edges of each kind."""
        return Counter(self.kinds[key] for key, _ in self.edges)

    def skips(self, cell: str | None = None) -> tuple[int, int]:
        """Return the number of skip connections among the edges that the start has not decided, and of such edges."""
        chosen = [operation for key, operation in self.edges if self.kinds[key] != "start" and cell in (None, key.cell)]
        return sum(operation in SKIPS for operation in chosen), len(chosen)


# --- one edge ---------------------------------------------------------------------------------------------------------


def strongest(row: Row) -> str:
    """Return the operation with the largest α or probability, of those that a genotype can have."""
    return max((operation for operation in row if operation in CHOICES), key=lambda operation: row[operation])


def lead(row: Row) -> float:
    """Return the distance of the strongest operation's α from the next one's; infinite for a single operation."""
    first, *others = sorted((alpha for operation, alpha in row.items() if operation in CHOICES), reverse=True)
    return first - others[0] if others else math.inf


def distances(start: Row, row: Row) -> list[float]:
    """Return |α − start| for each operation of an edge."""
    return [abs(alpha - start[operation]) for operation, alpha in row.items()]


def kind_of(edge_lead: float, is_start: bool, way: float | None) -> str:
    """Return the kind of an edge.

    Args:
        edge_lead: the lead of the edge.
        is_start: the start decides the edge.
        way: the way of α in an epoch, ``None`` if it is unknown.
    """
    if edge_lead <= TOLERANCE:
        return "tie"
    if is_start:
        return "start"
    return "open" if way is not None and edge_lead <= 2 * way else "found"


# --- a search ---------------------------------------------------------------------------------------------------------


def findings(run: SearchRun) -> list[Findings | None]:
    """Return the findings of a search after each epoch; ``None`` where α or its start is not recorded."""
    if run.start is None:
        return [None for _ in run.history]
    schedule = _Schedule.of(run)
    decided = {key: _Decided(row) for key, row in run.start.items()}
    results: list[Findings | None] = []
    for epoch in run.history:
        if not epoch.logits:
            return [*results, *(None for _ in run.history[len(results) :])]
        for key, row in epoch.logits.items():
            decided[key].add(row)
        results.append(_findings(epoch, decided, schedule))
    return results


class _Decided:
    """An edge from the start on: its distances from the start, and True for ``by_start`` while the start decides it."""

    def __init__(self, start: Row) -> None:
        self.start, self.lead, self.operation = start, lead(start), strongest(start)
        self.by_start = True
        self.distances: list[float] = []

    def add(self, row: Row) -> None:
        """Continue with α of the next epoch."""
        self.distances = distances(self.start, row)
        self.by_start &= strongest(row) == self.operation and max(self.distances) < self.lead


def _findings(epoch: SearchEpoch, decided: Mapping[EdgeKey, _Decided], schedule: _Schedule) -> Findings:
    leads, way, steps = _leads(epoch), schedule.way, schedule.steps_until(epoch.number)
    moved = [value for edge in decided.values() for value in edge.distances]
    return Findings(
        edges=edge_keys(epoch.genotype, epoch.alpha),
        kinds={key: kind_of(value, decided[key].by_start, way) for key, value in leads.items()},
        decided=frozenset(key for key, edge in decided.items() if edge.by_start),
        moved={key: max(edge.distances) for key, edge in decided.items()},
        farthest=max(moved),
        median=median(moved),
        reach=None if steps is None or schedule.rate is None else steps * schedule.rate,
        steps=None if steps is None else round(steps),
    )


def edge_keys(genotype: Genotype, alpha: Mapping[EdgeKey, Row]) -> list[tuple[EdgeKey, str]]:
    """Return the edges of a genotype, by the edge of the supernet, with their operations."""
    is_fixed = any(key.slot >= 0 for key in alpha)
    return [
        (EdgeKey(cell, t, edge.source, slot if is_fixed else -1), edge.operation)
        for cell in ("normal", "reduction")
        for t, node in enumerate(getattr(genotype, cell), start=2)
        for slot, edge in enumerate(node)
    ]


def _leads(epoch: SearchEpoch) -> dict[EdgeKey, float]:
    """Return the lead of each edge of the derived cells."""
    weights = {key: _log(epoch.beta.get(key, 1.0)) + _log(row[strongest(row)]) for key, row in epoch.alpha.items()}
    kept = {key for key, _ in edge_keys(epoch.genotype, epoch.alpha)}
    left_out: dict[tuple[str, int], float] = {}
    for key, weight in weights.items():
        if key not in kept:
            left_out[key[:2]] = max(weight, left_out.get(key[:2], -math.inf))
    return {key: min(lead(epoch.logits[key]), abs(weights[key] - left_out.get(key[:2], -math.inf))) for key in kept}


def _log(probability: float) -> float:
    return math.log(max(probability, LEAST))


@dataclass(frozen=True)
class _Schedule:
    """Steps of α per epoch and its learning rate, ``None`` where they are not recorded, and the epochs without any."""

    steps: float | None
    rate: float | None
    warmup: float

    @classmethod
    def of(cls, run: SearchRun) -> _Schedule:
        """Read the schedule off settings and ``run.json``; the settings of a file may be anything."""
        epochs, warmup, rate = (_number(run.settings.get(n)) for n in ("epochs", "warmup_epochs", "alpha_lr"))
        steps, still = run.about.get("alpha_steps"), warmup or 0.0
        moving = (epochs or 0.0) - still
        return cls(steps / moving if steps is not None and moving > 0 else None, rate, still)

    @property
    def way(self) -> float | None:
        """How far α can move in an epoch."""
        return None if self.steps is None or self.rate is None else self.steps * self.rate

    def steps_until(self, epoch: int) -> float | None:
        """Return the number of steps of α until the end of an epoch."""
        return None if self.steps is None else self.steps * max(0, epoch - self.warmup)


def _number(value: object) -> float | None:
    """Return a number that a setting can be, and otherwise ``None``."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e15
    return float(value) if is_number else None  # type: ignore[arg-type]
