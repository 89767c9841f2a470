"""The mixed operation of an edge (24), and the sum of all mixed edges of a node.

:func:`mixed_op` is the definition. :class:`NodeSum` gives the same value with less time and memory: edges from the same
source share its rectification and poolings, and multiples of the same tensor are added as one. A weight times a
normalisation is the normalisation's scale, so that the gradient of α needs no output of an operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optinspired_plugins.cells.operations import POOLINGS, TABLE_6, FactorizedReduce, NegativeIdentity

from .grouped import Group, Statistics, is_plain, kind_of, run_groups

__all__ = ["Edge", "NodeInput", "NodeSum", "mixed_nodes", "mixed_op"]


def mixed_op(weights: Tensor, operations: Mapping[str, nn.Module], x: Tensor, parts: int = 1) -> Tensor:
    """Return Σ_o w_o o(x) (24), or PC-DARTS's form of it (Xu et al. 2020).

    PC-DARTS splits x into [x', x''] with x' the first 1/K of the channels, and returns
    shuffle([Σ_o w_o o(x'), x'']). The shuffle interleaves K equal groups of channels, so that the next edge mixes other
    channels. With stride 2, x'' is max-pooled 2×2; odd sides are rounded up, as in the operations.

    Args:
        weights: w; the weight of zero, which has no operation, is the last.
        operations: the operations by name.
        x: shape (batch, channels, height, width).
        parts: K; 1 for the plain sum.
    """
    first, rest = x.tensor_split([x.shape[1] // parts], 1)
    mixed: Tensor = sum(w * o(first) for w, o in zip(weights, operations.values()))
    if parts == 1:
        return mixed
    if rest.shape[2:] != mixed.shape[2:]:
        rest = _halve(rest)
    return _shuffle(mixed, rest, parts)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2, ceil_mode=True)


def _shuffle(mixed: Tensor, rest: Tensor, parts: int) -> Tensor:
    return torch.cat([mixed, rest], 1).unflatten(1, (parts, -1)).transpose(1, 2).flatten(1, 2)


class Edge(NamedTuple):
    """A mixed edge: its source, w and the operations as in :func:`mixed_op`, and p; ``None`` for p = 1."""

    source: int
    weights: Any  # a tensor, or one for each operation
    operations: Mapping[str, nn.Module]
    edge_weight: Tensor | None = None

    def scaled(self) -> Edge:
        """Return the edge with p · w for w, one tensor for each operation."""
        weights = self.weights if self.edge_weight is None else self.edge_weight * self.weights
        return self._replace(weights=tuple(weights))


def mixed_nodes(inputs: Sequence[Tensor], nodes: Sequence[Sequence[Edge]], parts: int = 1) -> list[Tensor]:
    """Return the nodes of a cell.

    Args:
        inputs: states 0, 1, … of the cell, each of shape (batch, channels, height, width).
        nodes: the edges into each node; the nodes are the states after the inputs.
        parts: K of :func:`mixed_op`.
    """
    scaled = [[edge.scaled() for edge in node] for node in nodes]
    outgoing = [[edge for node in scaled for edge in node if edge.source == i] for i in range(len(inputs) + len(nodes))]
    sources = [NodeInput(x, parts, edges) for x, edges in zip(inputs, outgoing)]
    states: list[Tensor] = []
    for edges in scaled:
        node_sum = NodeSum(parts)
        for edge in edges:
            node_sum.add(edge, sources[edge.source])
        states.append(node_sum.value())
        sources.append(NodeInput(states[-1], parts, outgoing[len(sources)]))
    return states


def _launches_are_slow(x: Tensor) -> bool:
    # On a CPU grouped convolutions take longer than separate ones.
    return x.device.type == "cuda"


class NodeInput:
    """A state of a cell, with the values that its edges share; they are computed on first use.

    Args:
        x: shape (batch, channels, height, width).
        parts: K of :func:`mixed_op`.
        edges: all edges from this state, with weights p · w. On a GPU, operations of one kind run together.
    """

    def __init__(self, x: Tensor, parts: int = 1, edges: Sequence[Edge] = ()) -> None:
        self.x, self.rest = x.tensor_split([x.shape[1] // parts], 1) if parts > 1 else (x, x[:, :0])
        self._relu: Tensor | None = None
        self._halved: Tensor | None = None
        self._pooled: dict[str, tuple[Tensor, nn.BatchNorm2d]] = {}
        self._together: dict[int, tuple[set[str], list[Tensor]]] = {id(edge.operations): (set(), []) for edge in edges}
        if edges and _launches_are_slow(x):
            self._run_together(edges)

    def relu(self) -> Tensor:
        """Return max(x, 0)."""
        if self._relu is None:
            self._relu = F.relu(self.x)
        return self._relu

    def together(self, operations: Mapping[str, nn.Module]) -> tuple[set[str], list[Tensor]]:
        """Return the names of an edge's operations that ran together with others, and terms of their weighted sum."""
        return self._together.get(id(operations), (set(), []))

    def _run_together(self, edges: Sequence[Edge]) -> None:
        found: dict[Any, list[tuple[int, nn.Module, Tensor]]] = {}
        for i, edge in enumerate(edges):
            for weight, (name, operation) in zip(edge.weights, edge.operations.items()):
                if name in TABLE_6 and (kind := kind_of(operation)) is not None:
                    found.setdefault((name, kind), []).append((i, operation, weight))
                    self._together[id(edge.operations)][0].add(name)
        if not found:
            return
        members = [list(zip(*group)) for group in found.values()]
        totals: dict[tuple[int, ...], Tensor] = {}
        statistics = Statistics()
        outputs = run_groups([Group(*group[1:]) for group in members], self.relu(), statistics)
        for (on, *_), term in zip(members, outputs):
            totals[on] = _added(totals.get(on), term)
        every = tuple(range(len(edges)))
        if every in totals:
            totals[every] = self._with_multiples(edges, totals[every], statistics)
        statistics.write()
        for on, total in totals.items():
            for i, term in zip(on, total.chunk(len(on), 1)):
                self._together[id(edges[i].operations)][1].append(term)

    def _with_multiples(self, edges: Sequence[Edge], total: Tensor, statistics: Statistics) -> Tensor:
        """Add the multiples of the state and of its poolings that all edges have to their other terms."""
        terms = NodeSum()
        terms._add_term(total.unflatten(1, (len(edges), -1)))
        x = self.x.unsqueeze(1)
        for name in edges[0].operations:
            if not all(name in edge.operations for edge in edges):
                continue
            operations: list[Any] = [edge.operations[name] for edge in edges]
            if all(type(operation) is nn.Identity for operation in operations):
                terms._add_multiple(self._factors(edges, name), x)
            elif all(type(getattr(operation, "shortcut", None)) is nn.Identity for operation in operations):
                terms._add_multiple(-self._factors(edges, name), x)
            elif name in POOLINGS and all(_is_normalized_pooling(operation) for operation in operations):
                pooling, norm = operations[0]
                mean, var = norm.running_mean, norm.running_var
                pooled = F.batch_norm(pooling(self.x), mean, var, None, None, True, norm.momentum, norm.eps)
                terms._add_multiple(self._factors(edges, name), pooled.unsqueeze(1))
                for _, each in operations:  # as in :meth:`pooled`, the images are the same
                    statistics.set(each, mean, var)
        return terms.value().flatten(1, 2)

    def _factors(self, edges: Sequence[Edge], name: str) -> Tensor:
        """Return the weights of an operation that will not run with its edges, shape (edges, 1, 1, 1)."""
        weights = []
        for edge in edges:
            self._together[id(edge.operations)][0].add(name)
            weights.append(edge.weights[list(edge.operations).index(name)])
        return torch.stack(weights)[:, None, None, None]

    def bypass_like(self, mixed: Tensor) -> Tensor:
        """Return x'', the channels that are not mixed, at the size of ``mixed``."""
        if self.rest.shape[2:] == mixed.shape[2:]:
            return self.rest
        if self._halved is None:
            self._halved = _halve(self.rest)
        return self._halved

    def pooled(self, name: str, pooling: nn.Module, norm: nn.BatchNorm2d) -> Tensor:
        """Return the normalised pooling of an edge.

        In training it is the same for every edge from this state, and so are the running statistics, which later edges
        copy from the first.
        """
        if name not in self._pooled:
            self._pooled[name] = (norm(pooling(self.x)), norm)
            return self._pooled[name][0]
        value, first = self._pooled[name]
        if not norm.training:
            return norm(pooling(self.x))
        for buffer, shared in zip(norm.buffers(), first.buffers()):
            buffer.data.copy_(shared)  # data: the gradient of an earlier pass through this edge may still be due
        return value


def _is_normalized_pooling(operation: Any) -> bool:
    is_pair = type(operation) is nn.Sequential and len(operation) == 2
    return is_pair and is_plain(operation[1]) and operation[1].training


class NodeSum:
    """The sum Σ_e p_e · mixed_op(w_e, operations of e, source of e) over the edges e into a node.

    Args:
        parts: K of :func:`mixed_op`.
    """

    def __init__(self, parts: int = 1) -> None:
        self.parts = parts
        self._total: Tensor | None = None
        # id of a tensor -> the tensor and the sum of its factors
        self._multiples: dict[int, tuple[Tensor, Tensor]] = {}
        self._bypasses: list[tuple[NodeInput, Tensor | None]] = []

    def add_edge(
        self, weights: Tensor, operations: Mapping[str, nn.Module], source: NodeInput, edge_weight: Tensor | None = None
    ) -> None:
        """Add an edge.

        Args:
            weights: w_e, as for :func:`mixed_op`.
            operations: the operations by name, as for :func:`mixed_op`.
            source: the state at the start of the edge.
            edge_weight: p_e; ``None`` for 1.
        """
        self.add(Edge(0, weights, operations, edge_weight).scaled(), source)

    def add(self, edge: Edge, source: NodeInput) -> None:
        """Add an edge that is :meth:`Edge.scaled`."""
        done, terms = source.together(edge.operations)
        for term in terms:
            self._add_term(term)
        for weight, (name, operation) in zip(edge.weights, edge.operations.items()):
            if name not in done:
                self._add_operation(weight, name, operation, source)
        if self.parts > 1:
            self._bypasses.append((source, edge.edge_weight))

    def value(self) -> Tensor:
        """Return the sum."""
        mixed = self._total
        for tensor, factor in self._multiples.values():
            mixed = _added(mixed, tensor, factor)
        assert mixed is not None
        if self.parts == 1:
            return mixed
        rests = [(source.bypass_like(mixed), p) for source, p in self._bypasses]
        terms = [rest if p is None else p * rest for rest, p in rests]
        return _shuffle(mixed, sum(terms[1:], terms[0]), self.parts)

    def _add_operation(self, weight: Tensor, name: str, operation: nn.Module, source: NodeInput) -> None:
        if name not in TABLE_6:  # nothing is known of its layers
            return self._add_term(weight * operation(source.x))
        if isinstance(operation, NegativeIdentity):
            weight, operation = -weight, operation.shortcut
        if isinstance(operation, nn.Identity):
            return self._add_multiple(weight, source.x)
        if isinstance(operation, FactorizedReduce) and not operation.bn.affine:
            return self._add_term(_normalize(operation.bn, operation.reduce(source.relu()), weight))
        layers = list(operation) if isinstance(operation, nn.Sequential) else []
        if layers and isinstance(layers[-1], nn.BatchNorm2d) and not layers[-1].affine:
            if name in POOLINGS:
                return self._add_multiple(weight, source.pooled(name, layers[0], layers[-1]))
            if isinstance(layers[0], nn.ReLU):
                x = source.relu()
                for layer in layers[1:-1]:
                    x = layer(x)
                return self._add_term(_normalize(layers[-1], x, weight))
        self._add_term(weight * operation(source.x))

    def _add_multiple(self, factor: Tensor, tensor: Tensor) -> None:
        _, before = self._multiples.get(id(tensor), (tensor, None))
        self._multiples[id(tensor)] = (tensor, factor if before is None else before + factor)

    def _add_term(self, term: Tensor) -> None:
        self._total = _added(self._total, term)


def _added(total: Tensor | None, tensor: Tensor, factor: Tensor | None = None) -> Tensor:
    """Return total + factor · tensor, in place: the gradient of a term does not need the total's value."""
    if total is None:
        return tensor if factor is None else factor * tensor
    if total._is_view():  # it is part of the terms of other edges
        return total + tensor if factor is None else torch.addcmul(total, tensor, factor)
    return total.add_(tensor) if factor is None else total.addcmul_(tensor, factor)


def _normalize(norm: nn.BatchNorm2d, x: Tensor, weight: Tensor) -> Tensor:
    """Return w · norm(x) for a normalisation without scale: w is used as its scale."""
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    assert norm.momentum is not None
    return F.batch_norm(
        x,
        norm.running_mean,
        norm.running_var,
        weight.expand(norm.num_features).contiguous(),
        None,
        norm.training or norm.running_mean is None,
        norm.momentum,
        norm.eps,
    )
