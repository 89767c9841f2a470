"""What an edge of a supernet computes (24), plainly, and for all edges of a node at once.

:func:`mix` is the definition. :class:`Mixture` sums the edges of a node and computes what they share once: the
rectified source, its poolings, and every multiple of the same tensor as one. It holds no output of an operation for α's
gradient, since a weight in front of a normalisation is the normalisation's scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optinspired_plugins.cells.operations import POOLINGS, ZERO, FactorizedReduce, NegativeIdentity

__all__ = ["Mixture", "Source", "mix"]


def mix(weights: Tensor, operations: Mapping[str, nn.Module], x: Tensor, parts: int = 1) -> Tensor:
    """Σ_o w_o o(x) over operations that are not zero, or PC-DARTS's form of it (Xu et al. 2020).

    With x = [x', x''], x' the first 1/K of the channels, the latter is shuffle([Σ_o w_o o(x'), x'']), where K equal
    groups of channels are interleaved, so that the next edge mixes others. Behind stride 2, x'' is max-pooled 2×2,
    odd sides rounded up as the operations do.

    Args:
        weights: w, zero's behind the others'.
        operations: the operations by name.
        x: shape (batch, channels, height, width).
        parts: K; 1 for the plain sum.
    """
    first, rest = x.tensor_split([x.shape[1] // parts], 1)
    mixed: Tensor = sum(w * o(first) for w, (name, o) in zip(weights, operations.items()) if name != ZERO)
    if parts == 1:
        return mixed
    if rest.shape[2:] != mixed.shape[2:]:
        rest = _halve(rest)
    return _shuffle(mixed, rest, parts)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2, ceil_mode=True)


def _shuffle(mixed: Tensor, rest: Tensor, parts: int) -> Tensor:
    return torch.cat([mixed, rest], 1).unflatten(1, (parts, -1)).transpose(1, 2).flatten(1, 2)


class Source:
    """A state of a cell, and what the edges from it have in common, computed when it is first asked for.

    Args:
        x: shape (batch, channels, height, width).
        parts: K of :func:`mix`.
    """

    def __init__(self, x: Tensor, parts: int = 1) -> None:
        self.x, self.rest = x.tensor_split([x.shape[1] // parts], 1) if parts > 1 else (x, x[:, :0])
        self._relu: Tensor | None = None
        self._halved: Tensor | None = None
        self._pooled: dict[str, tuple[Tensor, nn.BatchNorm2d]] = {}

    def relu(self) -> Tensor:
        """Return max(x, 0)."""
        if self._relu is None:
            self._relu = F.relu(self.x)
        return self._relu

    def rest_like(self, mixed: Tensor) -> Tensor:
        """Return the channels that are passed, at the size of those that are mixed."""
        if self.rest.shape[2:] == mixed.shape[2:]:
            return self.rest
        if self._halved is None:
            self._halved = _halve(self.rest)
        return self._halved

    def pooled(self, name: str, pooling: nn.Module, norm: nn.BatchNorm2d) -> Tensor:
        """Return the normalised pooling of an edge.

        In training it is the same for every edge, and so are the running statistics, which this edge takes over.
        """
        if name not in self._pooled:
            self._pooled[name] = (norm(pooling(self.x)), norm)
            return self._pooled[name][0]
        value, first = self._pooled[name]
        if not norm.training:
            return norm(pooling(self.x))
        for own, its in zip(norm.buffers(), first.buffers()):
            own.data.copy_(its)  # data: an earlier pass through this edge may still want its gradient
        return value


class Mixture:
    """Σ_e p_e · mix(w_e, operations of e, source of e) over the edges e into a node.

    Args:
        parts: K of :func:`mix`.
    """

    def __init__(self, parts: int = 1) -> None:
        self.parts = parts
        self._total: Tensor | None = None
        # id of a tensor -> the tensor and its factor, so that multiples of one are added once.
        self._multiples: dict[int, tuple[Tensor, Tensor]] = {}
        self._passed: list[tuple[Source, Tensor | None]] = []

    def add(
        self,
        weights: Tensor,
        operations: Mapping[str, nn.Module],
        source: Source,
        edge_weight: Tensor | None = None,
    ) -> None:
        """Add an edge.

        Args:
            weights: w_e, as for :func:`mix`.
            operations: the operations by name, as for :func:`mix`.
            source: where the edge comes from.
            edge_weight: p_e; ``None`` for 1.
        """
        weights = weights if edge_weight is None else edge_weight * weights
        for weight, (name, operation) in zip(weights, operations.items()):
            if name != ZERO:
                self._add_operation(weight, name, operation, source)
        if self.parts > 1:
            self._passed.append((source, edge_weight))

    def value(self) -> Tensor:
        """Return the sum."""
        mixed = self._total
        for tensor, factor in self._multiples.values():
            mixed = factor * tensor if mixed is None else mixed.addcmul_(tensor, factor)
        assert mixed is not None
        if self.parts == 1:
            return mixed
        passed = [source.rest_like(mixed) if p is None else p * source.rest_like(mixed) for source, p in self._passed]
        return _shuffle(mixed, sum(passed[1:], passed[0]), self.parts)

    def _add_operation(self, weight: Tensor, name: str, operation: nn.Module, source: Source) -> None:
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
        # No gradient of a term needs the term, so that the first holds the sum.
        self._total = term if self._total is None else self._total.add_(term)


def _normalize(norm: nn.BatchNorm2d, x: Tensor, weight: Tensor) -> Tensor:
    """Return w · norm(x) of a norm without scale: w takes its place, and no gradient needs norm(x)."""
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
