"""Initial values of α: the heavy-ball rule (26), zero (§9.3), or small and random (§9.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from optinspired_plugins.cells.labels import Label
from optinspired_plugins.cells.operations import IDENTITY, NEGATIVE_IDENTITY

__all__ = ["HeavyBallInit", "Initialization", "RandomInit", "ZeroInit", "check_initialization", "initial_logits"]


class Initialization(Protocol):
    """Protocol of an initialisation: it returns the initial α of an edge."""

    def alpha(self, rule: str, slot: int, names: Sequence[str]) -> Tensor:
        """Return logits.

        Args:
            rule: ``"hb"`` or ``"agd"``, the rule of the space.
            slot: for ``"hb"`` the number of the edge at its node: 0 and 1 from x_{t−1}, 2 from x_{t−2}; otherwise 0.
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
class HeavyBallInit:
    """Start a search at HBNet (26): x_t = F(x_{t−1}) + x_{t−1} − x_{t−2}.

    The second edge from x_{t−1} starts as the identity, and the edge from x_{t−2} as the negative identity. The first
    edge from x_{t−1} is F; its α is small and random. A one-hot weight needs an infinite logit, so the two edges start
    near it: with nine operations ``logit`` 5 gives the weight e⁵ / (e⁵ + 8) = 0.949. A larger logit starts closer and
    has a smaller gradient; weight decay of α reduces it. If ``allowed`` excludes the favoured operation of an edge, the
    edge starts with equal weights.

    Args:
        logit: α of the favoured operation; the other entries are 0. Finite and > 0.
        std: standard deviation of F's α.

    Raises:
        ValueError: an argument is out of range, or the space has no such edges or operations.
    """

    logit: float = 5.0
    std: float = 1e-3

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
        """Return the logits of an edge."""
        if rule != "hb":
            raise ValueError("initialization=HeavyBallInit: needs HBSpace, whose nodes have the three edges of (23)")
        if slot == 0:
            return self.std * torch.randn(len(names))
        favoured = IDENTITY if slot == 1 else NEGATIVE_IDENTITY
        if favoured not in names:
            raise ValueError(f"operations={list(names)!r}: must hold {favoured!r} for HeavyBallInit")
        alpha = torch.zeros(len(names))
        alpha[list(names).index(favoured)] = self.logit
        return alpha


def check_initialization(initialization: object) -> None:
    """TypeError unless the object is an initialisation."""
    if isinstance(initialization, type):
        name = initialization.__name__
        raise TypeError(f"initialization={name} is a class: must be an object, {name}(…)")
    if not callable(getattr(initialization, "alpha", None)):
        raise TypeError(f"initialization={initialization!r} has no method alpha: must have alpha(rule, slot, names)")


def initial_logits(initialization: Initialization, rule: str, label: str, names: Sequence[str]) -> Tensor:
    """Return the initial α of an edge, in torch's default dtype.

    Args:
        initialization: the initialisation.
        rule: ``"hb"`` or ``"agd"``.
        label: label of the edge's α, ``"normal/op_2_1"`` for ``"hb"``.
        names: the operations, including zero.

    Raises:
        ValueError: the initialisation does not return a tensor with one finite floating number per operation.
    """
    slot = Label.parse(label).position or 0 if rule == "hb" else 0
    alpha = initialization.alpha(rule, slot, names)
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
