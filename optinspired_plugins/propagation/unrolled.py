"""Algorithms unrolled into networks by ∇f(z) = z − T(z), (7) and (11)-(14), or by ∇f(z) = −T(z)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .._checks import check_one_of
from ..algorithms.methods import Algorithm, Gradient, check_algorithm, check_coefficient, check_same_shape
from .rules import Coefficient, Transform
from .tracing import READINGS

__all__ = ["TwoPath", "TwoPathState", "Unrolled"]


class Unrolled(nn.Module):
    """An algorithm as a network: step k uses the gradient z − T_k(z).

    Gradient descent gives the feed-forward network (7), the heavy ball (11), Nesterov's method (12), its summed form
    (13), and linearised ADMM (14).

    Args:
        algorithm: an object with ``init``, ``step`` and ``result``; its parameters are learned too.
        transforms: T_0, T_1, …, one per step, at least one. Each is a shape-preserving callable, or a sequence of them
            for an algorithm with several gradients per step (ADMM: one for x', one for x).
        reading: ``"fixed-point"``, or ``"residual"`` for the gradient −T_k(z). Then gradient descent is ResNet,
            x + T(x), and the heavy ball is x + T(x) + β (x − x_prev), momentum ResNet (`Sander et al. 2021
            <https://arxiv.org/abs/2102.07870>`_) up to the factor 1 − β of T. With T = 0, the result is x_0.

    Raises:
        TypeError: the algorithm lacks a method, or a transform cannot be called.
        ValueError: the reading is unknown; there is no transform; the number of gradients of a step is not the number
            of its transforms; or a transform changes the shape.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        transforms: Sequence[Transform | Sequence[Transform]],
        reading: str = "fixed-point",
    ) -> None:
        super().__init__()
        check_algorithm(algorithm)
        check_one_of("reading", reading, READINGS)
        if len(transforms) == 0:
            raise ValueError("transforms is empty: must hold at least one, one per step")
        self.algorithm = as_learnable(algorithm)
        self.reading = reading
        self.transforms = nn.ModuleList(_as_module(T, f"transforms[{k}]") for k, T in enumerate(transforms))

    def forward(self, x: Tensor) -> Tensor:
        """Return the result of the algorithm after one step per transform, shape of x."""
        state = self.algorithm.init(x)
        for k, T in enumerate(self.transforms):
            calls = _Calls(T, f"transforms[{k}]", self.reading)
            state = self.algorithm.step(state, calls.gradient)
            calls.check_all_used()
        return self.algorithm.result(state)


class _LearnableAlgorithm(nn.Module):
    """A module around an algorithm that holds parameters, so that they are trained, saved and moved."""

    def __init__(self, algorithm: Algorithm, names: Sequence[str]) -> None:
        super().__init__()
        self.algorithm = algorithm
        for name in names:
            self.register_parameter(name, getattr(algorithm, name))

    def init(self, x0: Tensor) -> Any:
        for name in self._parameters:  # moving a module may have replaced them
            setattr(self.algorithm, name, getattr(self, name))
        return self.algorithm.init(x0)

    def step(self, state: Any, grad: Gradient) -> Any:
        return self.algorithm.step(state, grad)

    def result(self, state: Any) -> Tensor:
        return self.algorithm.result(state)


def as_learnable(algorithm: Algorithm) -> Algorithm:
    """Return the algorithm, wrapped in a module if an attribute is a parameter."""
    if isinstance(algorithm, nn.Module):
        return algorithm
    names = [name for name, value in getattr(algorithm, "__dict__", {}).items() if isinstance(value, nn.Parameter)]
    return _LearnableAlgorithm(algorithm, names) if names else algorithm


class TwoPathState(NamedTuple):
    """x'_k, x_k and k."""

    x1: Tensor
    x2: Tensor
    k: int


class TwoPath:
    """The rule (20) with the newest states, as an algorithm.

    x'_{k+1} = T'(x'_k) + s_k, x_{k+1} = T(x_k) + s_k with s_k = α x'_k + β x_k, except s_0 = 0, since the sums of (20)
    begin at t = 1; :func:`~optinspired_plugins.propagation.rules.two_path` has s_0 = (α + β) x_0. α = β = ½ is DMRNet
    (Table 3), apart from the first step; with a residual first layer, as in ``optnet``, the first step is DMRNet's too.
    The rule minimises no objective; it has the interface of an algorithm. The result is the mean of both paths, because
    the last T' would have no effect on x.

    Args:
        alpha: α, finite.
        beta: β, finite.

    Raises:
        ValueError: a coefficient is not finite.
    """

    def __init__(self, alpha: Coefficient = 0.5, beta: Coefficient = 0.5) -> None:
        self.alpha, self.beta = check_coefficient("alpha", alpha), check_coefficient("beta", beta)

    def init(self, x0: Tensor) -> TwoPathState:
        """Return the state x'_0 = x_0."""
        return TwoPathState(x0, x0, 0)

    def step(self, state: TwoPathState, grad: Gradient) -> TwoPathState:
        """Return the state x'_{k+1}, x_{k+1}; ``grad`` is called at x'_k and then at x_k."""
        x1, x2, k = state
        t1, t2 = x1 - grad(x1), x2 - grad(x2)
        if k == 0:
            return TwoPathState(t1, t2, 1)
        shared = self.alpha * x1 + self.beta * x2
        return TwoPathState(t1 + shared, t2 + shared, k + 1)

    def result(self, state: TwoPathState) -> Tensor:
        """Return (x'_k + x_k) / 2."""
        return (state.x1 + state.x2) / 2


class _Function(nn.Module):
    """A module around a callable."""

    def __init__(self, function: Transform) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _as_module(transform: object, name: str) -> nn.Module:
    if isinstance(transform, nn.Module):
        return transform
    if isinstance(transform, Sequence):
        return nn.ModuleList(_as_module(part, f"{name}[{i}]") for i, part in enumerate(transform))
    if not callable(transform):
        raise TypeError(f"{name} is a {type(transform).__name__}: must be callable")
    return _Function(transform)


class _Calls:
    """The gradients of one step by a reading; a list of transforms has one for each call."""

    def __init__(self, T: nn.Module, name: str, reading: str) -> None:
        self.T, self.name, self.reading = T, name, reading
        self.rest: list[nn.Module] = list(T) if isinstance(T, nn.ModuleList) else []

    def gradient(self, z: Tensor) -> Tensor:
        part = self.T
        if isinstance(part, nn.ModuleList):
            if not self.rest:
                raise ValueError(
                    f"{self.name} has {len(part)} transforms: the algorithm asks for more gradients per step"
                )
            part = self.rest.pop(0)
        t = check_same_shape(z, part(z), self.name)
        return -t if self.reading == "residual" else z - t

    def check_all_used(self) -> None:
        if self.rest:
            raise ValueError(f"{self.name} has {len(self.rest)} transforms too many: the algorithm asks for no more")
