"""Labels of the choices in a search space of cells, in NNI's notation.

============================  =====================================================================
``normal/op_2_0``             operation in slot 0 of node 2 (a genotype has the slots 0, 1, …)
``normal/input_2_0``          source of slot 0 of node 2, where sources are chosen
``normal/3_1``                operation on the edge from 1 to 3 of a supernet with every edge
``reduce/beta_3``             weights (29) of all edges into node 3
============================  =====================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from .._checks import short

__all__ = ["KINDS", "Label", "edge_labels", "slot_labels"]

# Normal and reduction cells, as NNI's hub calls them.
KINDS = ("normal", "reduce")
PATTERN = re.compile(r"(normal|reduce)/(?:(op|input|beta)_)?(0|[1-9][0-9]{0,2})(?:_(0|[1-9][0-9]{0,2}))?")


class Label(NamedTuple):
    """The label of a choice; :meth:`parse` and ``str`` convert from and to text.

    Args:
        cell: ``"normal"`` or ``"reduce"``.
        choice: ``"op"``, ``"input"``, ``"edge"`` or ``"beta"``.
        node: the node, from 2.
        position: the slot of ``"op"`` and ``"input"``, the source of ``"edge"``, and ``None`` for ``"beta"``.
    """

    cell: str
    choice: str
    node: int
    position: int | None = None

    @classmethod
    def parse(cls, text: str) -> Label:
        """Read a label.

        Raises:
            ValueError: the text is not a label.
        """
        match = PATTERN.fullmatch(text)
        if match is None or (match[4] is None) != (match[2] == "beta"):
            raise ValueError(f"label={short(text)}: must be like normal/op_2_0, normal/3_1 or reduce/beta_3")
        return cls(match[1], match[2] or "edge", int(match[3]), None if match[4] is None else int(match[4]))

    def __str__(self) -> str:
        return f"{self.cell}/{self.name}"

    @property
    def name(self) -> str:
        """The label inside its cell, ``"op_2_0"``."""
        words = [self.choice, self.node, self.position]
        return "_".join(str(word) for word in words if word not in ("edge", None))


def slot_labels(nodes: int, slots: int | Sequence[int]) -> Iterator[Label]:
    """Yield the label of every operation of a genotype, ``normal/op_2_0`` first.

    Args:
        nodes: number of nodes.
        slots: number of operations of every node, or of each.
    """
    counts = [slots] * nodes if isinstance(slots, int) else slots
    for cell, (node, count) in product(KINDS, enumerate(counts, start=2)):
        yield from (Label(cell, "op", node, slot) for slot in range(count))


def edge_labels(nodes: int) -> Iterator[Label]:
    """Yield the label of every edge of a supernet with all edges, ``normal/2_0`` first."""
    for cell, node in product(KINDS, range(2, 2 + nodes)):
        yield from (Label(cell, "edge", node, source) for source in range(node))
