"""Patterns of algorithms: the edges of a cell whose nodes are the points of an algorithm's layers (§9).

The heavy ball z_{k+1} = T(z_k) + β z_k − β z_{k−1} has three edges into each node: a layer of z_k, and z_k and z_{k−1}
themselves. That is (23), and the signs of β are its start (26). :func:`pattern` reads such edges off the traced program
of any algorithm (:mod:`optinspired_plugins.propagation.tracing`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .._checks import check_int
from ..algorithms.methods import Algorithm
from .tracing import Call, Program, Sum, trace_at_present

__all__ = ["LINEAR", "OPERATION", "Pattern", "PatternEdge", "pattern"]

OPERATION, LINEAR = "op", "lin"
INPUTS = 2
RELATIVE = 1e-9  # smaller weights are rounding errors


class PatternEdge(NamedTuple):
    """An edge into a node.

    ``kind`` is ``"op"`` where a layer of the source enters, and ``"lin"`` where the source itself does. ``weight`` is
    its weight in the algorithm.
    """

    kind: str
    source: int
    weight: float


class Pattern(NamedTuple):
    """The edges of each node from node 2 on, and the number of the algorithm's paths.

    Layers are first, then linear edges, from the newest source to the oldest.
    """

    nodes: tuple[tuple[PatternEdge, ...], ...]
    paths: int

    @property
    def sources(self) -> tuple[tuple[int, ...], ...]:
        """The sources of each node's edges."""
        return tuple(tuple(edge.source for edge in node) for node in self.nodes)

    def merged(self) -> Pattern:
        """Return the pattern with one edge per source, from the oldest, as (28) has.

        An edge is a layer if one of its parts is, and has the layer's weight.

        Raises:
            ValueError: the algorithm has two paths.
        """
        if self.paths > 1:
            raise ValueError(f"merge=True with {self.paths} paths: must be False, a path is a chain of its own")
        nodes = []
        for node in self.nodes:
            by_source = {edge.source: edge for edge in reversed(node)}  # layers last, so that they remain
            nodes.append(tuple(by_source[source] for source in sorted(by_source)))
        return Pattern(tuple(nodes), self.paths)


def pattern(algorithm: Algorithm, nodes: int, start: int = 0) -> Pattern:
    """Return the edges of a cell that computes the points of an algorithm's layers.

    Inputs 0 and 1 and the nodes 2, 3, … are successive points of layers. With one layer per step they are the points of
    the steps ``start`` + 1, ``start`` + 2, …. With two layers per step the inputs are both points of step
    ``start`` + 1, so that the nodes are two chains. Step 0 is left out, since it has other weights in many
    algorithms: z_{−1} = z_0, and h_{k,0} = 0 in (5).

    A state that is no point, as λ of ADMM, is written out as the sum that defines it. Points older than the inputs
    count as input 0, or with two layers per step as the input of their path.

    Args:
        algorithm: an object with ``init``, ``step`` and ``result``; learned coefficients have their present values.
        nodes: number of nodes, ≥ 2.
        start: number of steps that are skipped, ≥ 0.

    Raises:
        NotLinearError: the algorithm is not linear; the message names the operation.
        TypeError: a method is missing.
        ValueError: an argument is out of range, a step has no layer or more than two, or a node has none.
    """
    check_int("nodes", nodes, 2)
    check_int("start", start, 0)
    name = type(algorithm).__name__
    paths = trace_at_present(algorithm, 1).calls[0]
    if paths > INPUTS:
        raise ValueError(f"algorithm={name} has {paths} layers per step: must have one or two, a cell has two inputs")
    program = trace_at_present(algorithm, start + 1 - (-(nodes + INPUTS) // paths))
    if set(program.calls) != {paths}:
        raise ValueError(f"algorithm={name} has {program.calls} layers in its steps: must have one number of them")
    points = [instruction.register for instruction in program.instructions if isinstance(instruction, Call)]
    first = paths * (start + 1)
    found = []
    for t in range(INPUTS, INPUTS + nodes):
        edges = _edges(program, points, first + t, first, paths)
        if not any(edge.kind == OPERATION for edge in edges):
            raise ValueError(f"algorithm={name}: node {t} has no op edge, must depend on a layer")
        found.append(edges)
    return Pattern(tuple(found), paths)


def _edges(program: Program, points: list[int], index: int, first: int, paths: int) -> tuple[PatternEdge, ...]:
    """Return the edges into a point; ``first`` is the index of the point that input 0 is."""
    place = {register: i for i, register in reversed([*enumerate(points[:index])])}
    calls = [i + 1 for i, instruction in enumerate(program.instructions) if isinstance(instruction, Call)]
    weights: dict[tuple[str, int], float] = {}

    def add(kind: str, point: int, weight: float) -> None:
        source = point - first if point >= first else (point - first) % paths
        weights[kind, source] = weights.get((kind, source), 0.0) + weight

    pending = {points[index]: 1.0}
    while pending:
        register = max(pending)  # a sum has older registers only, so that each is written out once
        weight = pending.pop(register)
        if register in place or register == 0:
            add(LINEAR, place.get(register, 0), weight)
        elif register in calls:
            add(OPERATION, calls.index(register), weight)
        else:
            instruction = program.instructions[register - 1]
            assert isinstance(instruction, Sum)
            for term in instruction.terms:
                pending[term.register] = pending.get(term.register, 0.0) + weight * term.weight
    return tuple(_ordered(PatternEdge(kind, source, weight) for (kind, source), weight in weights.items()))


def _ordered(edges: Iterable[PatternEdge]) -> list[PatternEdge]:
    """Return edges in their order, without those whose weight is a rounding error."""
    ordered = sorted(edges, key=lambda edge: (edge.kind != OPERATION, -edge.source))
    least = RELATIVE * max(abs(edge.weight) for edge in ordered)
    return [edge for edge in ordered if abs(edge.weight) > least]
