"""The structure of a cell: which edges its nodes have, read off an algorithm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from optinspired_plugins._checks import check_int
from optinspired_plugins.algorithms.methods import ALGORITHMS, load_algorithm
from optinspired_plugins.cells.genotype import EDGES, Genotype
from optinspired_plugins.cells.labels import Label, edge_labels, slot_labels
from optinspired_plugins.propagation.named import NETWORK_ALGORITHMS
from optinspired_plugins.propagation.patterns import OPERATION, Pattern, PatternEdge, pattern

__all__ = ["CellStructure"]

CLASSES = {make: name for name, make in ALGORITHMS.items()}


@dataclass(frozen=True)
class CellStructure:
    """The edges of a space's cells; :class:`~nni_spaces.AlgorithmSpace` describes the fields.

    Raises:
        ValueError: ``keep`` is out of range, or without ``merge``.
    """

    algorithm: Any
    merge: bool = False
    keep: int | None = None
    edge_weights: bool = False

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_int("keep", self.keep, 1)
            if not self.merge:
                raise ValueError(f"keep={self.keep} with merge=False: must be None, or merge the edges of a source")

    @property
    def rule(self) -> str:
        """The rule of the space's genotypes: ``"hb"``, ``"agd"``, or the algorithm's name with its options."""
        kind = self.algorithm if isinstance(self.algorithm, type) else type(self.algorithm)
        name = self.algorithm if isinstance(self.algorithm, str) else CLASSES.get(kind, kind.__name__)
        if (name, self.merge, self.keep) == ("agd2", True, 2):
            return "agd"
        # The space of (28) is called agd, and so Nesterov's two layers (12) have another name.
        name = "nesterov" if name == "agd" else name
        return name + "-merged" * self.merge + (f"-{self.keep}" if self.keep is not None else "")

    def pattern(self, nodes: int) -> Pattern:
        """Return the edges of each node.

        Raises:
            TypeError, ValueError: the algorithm has no such pattern, or not with these options.
        """
        # A pattern has two nodes or more; cells of a single one are possible.
        found = pattern(load_algorithm(self.algorithm, NETWORK_ALGORITHMS), max(nodes, 2))
        found = found.merged() if self.merge else found
        return Pattern(found.nodes[:nodes], found.paths)

    def chooses(self, nodes: int) -> bool:
        """Return True if a search chooses the sources of a node.

        Raises:
            ValueError: ``keep`` does not fit the pattern.
        """
        sources = self.pattern(nodes).sources
        # The rule agd chooses also in a cell of one node, which has no more than two sources.
        if self.keep is None or (self.rule not in EDGES and all(len(node) <= self.keep for node in sources)):
            return False
        if any(node != tuple(range(t)) for t, node in enumerate(sources, start=2)):
            most = max(map(len, sources))
            raise ValueError(f"keep={self.keep}: must be None or ≥ {most}, a node of {self.rule} has {most} sources")
        if self.keep > 2:
            raise ValueError(f"keep={self.keep}: must be None, 1 or 2, node 2 has two sources")
        return True

    def edges(self, nodes: int) -> dict[str, PatternEdge]:
        """Return the edges of a supernet by the labels of their α."""
        found = self.pattern(nodes)
        both = [edge for node in found.nodes for edge in node] * 2
        labels = edge_labels(nodes) if self.chooses(nodes) else slot_labels(nodes, [len(node) for node in found.nodes])
        return dict(zip(map(str, labels), both, strict=True))

    def slots(self, nodes: int) -> Iterator[Label]:
        """Return the labels of the operations of a sample."""
        if self.chooses(nodes):
            return slot_labels(nodes, self.keep or 0)
        return slot_labels(nodes, [len(node) for node in self.pattern(nodes).nodes])

    def operation_labels(self, nodes: int) -> list[str]:
        """Return the labels of the edges that are layers; the others are identities at the start."""
        return [label for label, edge in self.edges(nodes).items() if edge.kind == OPERATION]

    def genotype(self, sample: Mapping[str, Any], nodes: int) -> Genotype:
        """Return a sample as a genotype.

        Raises:
            ValueError: the sample belongs to cells of another structure, or contains zero.
        """
        if self.rule in EDGES:
            return Genotype.from_nni(sample)
        return Genotype.from_nni(sample, self.rule, None if self.chooses(nodes) else self.pattern(nodes).sources)
