"""Initial values of α: an algorithm, as in (26), zero (§9.3), or small and random (§9.1)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from optinspired_plugins.cells.labels import Label
from optinspired_plugins.cells.operations import IDENTITY, NEGATIVE_IDENTITY
from optinspired_plugins.propagation.named import NETWORK_ALGORITHMS
from optinspired_plugins.propagation.patterns import LINEAR, PatternEdge, pattern

__all__ = [
    "AlgorithmInit",
    "HeavyBallInit",
    "Initialization",
    "RandomInit",
    "ZeroInit",
    "check_edges",
    "check_initialization",
    "initial_beta",
    "initial_logits",
]


# The edges of (23), with the signs of (26).
HEAVY_BALL = pattern(NETWORK_ALGORITHMS["hb"](), 2).nodes[0]


class Initialization(Protocol):
    """Protocol of an initialisation: it returns the initial α of an edge."""

    def alpha(self, rule: str, slot: int, names: Sequence[str]) -> Tensor:
        """Return logits.

        Args:
            rule: the rule of the space, ``"hb"``, ``"agd"`` or another algorithm's.
            slot: the number of the edge at its node where the edges are fixed: for ``"hb"`` 0 and 1 from x_{t−1} and 2
                from x_{t−2}; otherwise 0.
            names: the operations, including zero.

        Returns:
            Shape (len(names),), floating and finite.
        """


@dataclass(frozen=True)
class ZeroInit:
    """α = 0: every operation has the same weight (§9.3)."""

    def alpha(self, rule: str, slot: int, names: Sequence[str]) -> Tensor:
        """Return zeros."""
        return torch.zeros(len(names))


@dataclass(frozen=True)
class RandomInit:
    """α normal with a small standard deviation (§9.1, and DARTS).

    Args:
        std: standard deviation, finite and > 0.

    Raises:
        ValueError: ``std`` is out of range.
    """

    std: float = 1e-3

    def __post_init__(self) -> None:
        _check_positive("std", self.std)

    def alpha(self, rule: str, slot: int, names: Sequence[str]) -> Tensor:
        """Return random logits."""
        return self.std * torch.randn(len(names))


@dataclass(frozen=True)
class AlgorithmInit:
    """Start a search at an algorithm, as (26) starts at HBNet.

    A linear edge starts as the identity, or as the negative identity if its weight is negative. A layer is searched;
    its α is small and random. A one-hot weight needs an infinite logit, so a linear edge starts near it: with nine
    operations ``logit`` 5 gives the weight e⁵ / (e⁵ + 8) = 0.949. A larger logit starts closer and has a smaller
    gradient; weight decay of α reduces it. If ``allowed`` excludes the favoured operation of an edge, the edge starts
    with equal weights.

    Args:
        logit: α of the favoured operation; the other entries are 0. Finite and > 0.
        std: standard deviation of a layer's α.
        edge_weights: in spaces with p, start p at ``|weight| / Σ |weight|`` of the algorithm instead of equal values.

    Raises:
        ValueError: an argument is out of range, or the space has no such edges or operations.
    """

    logit: float = 5.0
    std: float = 1e-3
    edge_weights: bool = False

    def __post_init__(self) -> None:
        _check_positive("logit", self.logit)
        _check_positive("std", self.std)

    def weight(self, operations: int = 9) -> float:
        """Return the initial softmax weight of a favoured operation.

        Args:
            operations: number of operations.
        """
        return 1 / (1 + (operations - 1) * math.exp(-self.logit))

    def alpha(self, rule: str, slot: int, names: Sequence[str]) -> Tensor:
        """Return the logits of an edge of the heavy ball (23)."""
        if rule != "hb":
            raise ValueError(f"initialization={type(self).__name__}: needs HBSpace or an AlgorithmSpace")
        return self.edge_alpha(rule, HEAVY_BALL[slot], names)

    def edge_alpha(self, rule: str, edge: PatternEdge, names: Sequence[str]) -> Tensor:
        """Return the logits of an edge of an algorithm."""
        favoured = self.favoured(edge, names)
        if favoured is None:
            return self.std * torch.randn(len(names))
        alpha = torch.zeros(len(names))
        alpha[list(names).index(favoured)] = self.logit
        return alpha

    def favoured(self, edge: PatternEdge, names: Sequence[str]) -> str | None:
        """Return the operation that an edge starts near, ``None`` for a layer; ValueError if there is none."""
        if edge.kind != LINEAR:
            return None
        name = IDENTITY if edge.weight > 0 else NEGATIVE_IDENTITY
        if name not in names:
            raise ValueError(f"operations={list(names)!r}: must hold {name!r} for {type(self).__name__}")
        return name


@dataclass(frozen=True)
class HeavyBallInit(AlgorithmInit):
    """Start a search at HBNet (26): x_t = F(x_{t−1}) + x_{t−1} − x_{t−2}.

    It is :class:`AlgorithmInit` of the heavy ball. The second edge from x_{t−1} starts as the identity, and the edge
    from x_{t−2} as the negative identity. The first edge from x_{t−1} is F.

    Args:
        logit: as in :class:`AlgorithmInit`.
        std: as in :class:`AlgorithmInit`.
    """

    edge_weights: bool = field(default=False, init=False, repr=False)

    def alpha(self, rule: str, slot: int, names: Sequence[str]) -> Tensor:
        """Return the logits of an edge."""
        if rule != "hb":
            raise ValueError("initialization=HeavyBallInit: needs HBSpace, whose nodes have the three edges of (23)")
        return super().alpha(rule, slot, names)

    def edge_alpha(self, rule: str, edge: PatternEdge, names: Sequence[str]) -> Tensor:
        """Return the logits of an edge."""
        if rule != "hb":
            return self.alpha(rule, 0, names)
        return super().edge_alpha(rule, edge, names)


def check_initialization(initialization: object) -> None:
    """TypeError unless the object is an initialisation."""
    if isinstance(initialization, type):
        name = initialization.__name__
        raise TypeError(f"initialization={name} is a class: must be an object, {name}(…)")
    if not callable(getattr(initialization, "alpha", None)):
        raise TypeError(f"initialization={initialization!r} has no method alpha: must have alpha(rule, slot, names)")


def check_edges(initialization: Initialization, edges: Iterable[PatternEdge], names: Sequence[str]) -> None:
    """ValueError where an algorithm's initialisation favours an operation that is no candidate."""
    if isinstance(initialization, AlgorithmInit):
        for edge in edges:
            initialization.favoured(edge, names)


def initial_beta(initialization: Initialization, edges: Sequence[PatternEdge]) -> Tensor:
    """Return the initial β of a node: 0, or ``log |weight|`` where the initialisation says so."""
    if isinstance(initialization, AlgorithmInit) and initialization.edge_weights:
        return torch.tensor([math.log(abs(edge.weight)) for edge in edges])
    return torch.zeros(len(edges))


def initial_logits(
    initialization: Initialization, rule: str, label: str, names: Sequence[str], edge: PatternEdge | None = None
) -> Tensor:
    """Return the initial α of an edge, in torch's default dtype.

    Args:
        initialization: the initialisation.
        rule: ``"hb"``, ``"agd"`` or another algorithm's.
        label: label of the edge's α, ``"normal/op_2_1"`` for ``"hb"``.
        names: the operations, including zero.
        edge: the edge of the algorithm.

    Raises:
        ValueError: the initialisation does not return a tensor with one finite floating number per operation.
    """
    place = Label.parse(label)
    if edge is not None and isinstance(initialization, AlgorithmInit):
        alpha = initialization.edge_alpha(rule, edge, names)
    else:
        alpha = initialization.alpha(rule, (place.position or 0) if place.choice == "op" else 0, names)
    where = f"initialization={initialization!r}: alpha of edge {label!r}"
    if not isinstance(alpha, Tensor):
        raise ValueError(f"{where} is of type {type(alpha).__name__}: must be a tensor")
    if alpha.shape != (len(names),) or not alpha.is_floating_point():
        raise ValueError(
            f"{where} has shape {tuple(alpha.shape)} and dtype {alpha.dtype}: must have ({len(names)},), a floating "
            "number per operation"
        )
    if not alpha.isfinite().all():
        raise ValueError(f"{where} is {alpha.tolist()}: must be finite")
    return alpha.detach().to(torch.get_default_dtype())


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: must be a finite number > 0")
