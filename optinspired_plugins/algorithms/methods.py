"""The optimisation algorithms (1)-(6) of section 3.

An algorithm is an object with three methods: ``init(x0)`` returns the first state, ``step(state, grad)`` the next
state, and ``result(state)`` the iterate of a state. ``grad`` is any callable that keeps the shape of a tensor: ∇f in an
optimiser, ``z − T(z)`` in a network. As in the paper the step size is 1, so ∇f should be 1-Lipschitz. States are tuples
of tensors of any shape, data type and device, and all methods are differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .._checks import check_int, load_object
from .coefficients import constant_momentum, momentum, nesterov_weights

__all__ = [
    "ALGORITHMS",
    "ADMMState",
    "Algorithm",
    "GradientDescent",
    "GradientDescentState",
    "HeavyBall",
    "HeavyBallState",
    "LinearizedADMM",
    "Nesterov",
    "NesterovState",
    "NesterovSummed",
    "NesterovSummedState",
    "check_algorithm",
    "load_algorithm",
    "minimize",
]

Gradient = Callable[[Tensor], Tensor]


class Algorithm(Protocol):
    """The interface of an algorithm."""

    def init(self, x0: Tensor) -> Any:
        """Return the state before the first step."""

    def step(self, state: Any, grad: Gradient) -> Any:
        """Return the state after one step."""

    def result(self, state: Any) -> Tensor:
        """Return the iterate."""


class GradientDescentState(NamedTuple):
    """z_k."""

    z: Tensor


class GradientDescent:
    """Gradient descent (1): z_{k+1} = z_k − ∇f(z_k)."""

    def init(self, x0: Tensor) -> GradientDescentState:
        """Return the state z_0 = x0."""
        return GradientDescentState(x0)

    def step(self, state: GradientDescentState, grad: Gradient) -> GradientDescentState:
        """Return the state z_{k+1}."""
        return GradientDescentState(state.z - grad(state.z))

    def result(self, state: GradientDescentState) -> Tensor:
        """Return z_k."""
        return state.z


class HeavyBallState(NamedTuple):
    """z_k and z_{k−1}."""

    z: Tensor
    z_prev: Tensor


class HeavyBall:
    """The heavy-ball method (2): z_{k+1} = z_k − ∇f(z_k) + β (z_k − z_{k−1}), with z_{−1} = z_0.

    Args:
        beta: β, finite; 0.3 in the paper's simulation (§6.3), 1 in HBNet (§7.1). A parameter is learned.

    Raises:
        ValueError: ``beta`` is not finite.
    """

    def __init__(self, beta: float | Tensor = 0.3) -> None:
        self.beta = check_coefficient("beta", beta)

    @classmethod
    def strongly_convex(cls, smoothness: float, strong_convexity: float) -> HeavyBall:
        """Return the method with the constant momentum of footnote 5."""
        return cls(constant_momentum(smoothness, strong_convexity))

    def init(self, x0: Tensor) -> HeavyBallState:
        """Return the state z_0 = z_{−1} = x0."""
        return HeavyBallState(x0, x0)

    def step(self, state: HeavyBallState, grad: Gradient) -> HeavyBallState:
        """Return the state z_{k+1}, z_k."""
        z, z_prev = state
        return HeavyBallState(z - grad(z) + self.beta * (z - z_prev), z)

    def result(self, state: HeavyBallState) -> Tensor:
        """Return z_k."""
        return state.z


class NesterovState(NamedTuple):
    """z_k, z_{k−1} and k."""

    z: Tensor
    z_prev: Tensor
    k: int


class Nesterov:
    """Nesterov's accelerated gradient descent (3).

    y_k = z_k + β_k (z_k − z_{k−1}), z_{k+1} = y_k − ∇f(y_k).

    Args:
        beta: one finite β for all steps, for strongly convex objectives (footnote 5); ``None`` for the β_k of (12).

    Raises:
        ValueError: ``beta`` is not finite.
    """

    def __init__(self, beta: float | Tensor | None = None) -> None:
        self.beta = beta if beta is None else check_coefficient("beta", beta)

    @classmethod
    def strongly_convex(cls, smoothness: float, strong_convexity: float) -> Nesterov:
        """Return the method with the constant momentum of footnote 5."""
        return cls(constant_momentum(smoothness, strong_convexity))

    def init(self, x0: Tensor) -> NesterovState:
        """Return the state z_0 = z_{−1} = x0."""
        return NesterovState(x0, x0, 0)

    def step(self, state: NesterovState, grad: Gradient) -> NesterovState:
        """Return the state z_{k+1}, z_k."""
        z, z_prev, k = state
        y = z + self._beta(k) * (z - z_prev)
        return NesterovState(y - grad(y), z, k + 1)

    def result(self, state: NesterovState) -> Tensor:
        """Return z_k."""
        return state.z

    def _beta(self, k: int) -> float | Tensor:
        if self.beta is not None:
            return self.beta
        return _momentum_table(_table_size(k))[k - 1] if k else 0.0


class NesterovSummedState(NamedTuple):
    """y_k and ∇f(y_0), …, ∇f(y_{k−1})."""

    y: Tensor
    gradients: tuple[Tensor, ...]


class NesterovSummed:
    """Nesterov's method in its summed form (4)-(5): y_{k+1} = y_k − Σ_{j≤k} h_{k+1,j} ∇f(y_j).

    Its iterates are the y_k of (3), not the z_k, so it never equals :class:`Nesterov` term by term:
    y_k = z_k + β_k (z_k − z_{k−1}).
    """

    def init(self, x0: Tensor) -> NesterovSummedState:
        """Return the state y_0 = x0."""
        return NesterovSummedState(x0, ())

    def step(self, state: NesterovSummedState, grad: Gradient) -> NesterovSummedState:
        """Return the state y_{k+1}."""
        y, gradients = state
        gradients = (*gradients, grad(y))
        k = len(gradients) - 1
        weights = _weight_table(_table_size(k + 1))[k]
        for h, gradient in zip(weights, gradients):
            if h:  # h_{k+1,0} = 0 for k ≥ 1
                y = y - h * gradient
        return NesterovSummedState(y, gradients)

    def result(self, state: NesterovSummedState) -> Tensor:
        """Return y_k."""
        return state.y


class ADMMState(NamedTuple):
    """The two copies z_k (x'_k of (14)) and y_k (x_k), and the multiplier λ_k = Σ_{t≤k} (z_t − y_t)."""

    z: Tensor
    y: Tensor
    multiplier: Tensor


class LinearizedADMM:
    """Linearised ADMM (6) with penalty 1, its two minimisations solved.

    z_{k+1} = ½ (z_k − ∇f(z_k) + y_k − λ_k), y_{k+1} = ½ (y_k − ∇f(y_k) + z_{k+1} + λ_k) and
    λ_{k+1} = λ_k + z_{k+1} − y_{k+1}, from z_0 = y_0, λ_0 = 0. As a network it has two paths: each step calls ``grad``
    twice, at z_k and then at y_k.
    """

    def init(self, x0: Tensor) -> ADMMState:
        """Return the state z_0 = y_0 = x0, λ_0 = 0."""
        return ADMMState(x0, x0, torch.zeros_like(x0))

    def step(self, state: ADMMState, grad: Gradient) -> ADMMState:
        """Return the state z_{k+1}, y_{k+1}, λ_{k+1}."""
        z, y, multiplier = state
        z = (z - grad(z) + y - multiplier) / 2
        y = (y - grad(y) + z + multiplier) / 2
        return ADMMState(z, y, multiplier + z - y)

    def result(self, state: ADMMState) -> Tensor:
        """Return y_k, the x_k of (14)."""
        return state.y


ALGORITHMS: dict[str, type[Any]] = {
    "gd": GradientDescent,
    "hb": HeavyBall,
    "agd": Nesterov,
    "agd2": NesterovSummed,
    "admm": LinearizedADMM,
}


def check_algorithm(algorithm: object) -> None:
    """Raise TypeError if an object is not an algorithm; the message names the missing methods."""
    if isinstance(algorithm, type):
        raise TypeError(f"algorithm={algorithm.__name__} is a class: must be an object, {algorithm.__name__}(…)")
    missing = [name for name in ("init", "step", "result") if not callable(getattr(algorithm, name, None))]
    if missing:
        raise TypeError(
            f"algorithm={algorithm!r} has no method {' and no method '.join(missing)}: must have init(x0), "
            "step(state, grad) and result(state)"
        )


def load_algorithm(algorithm: object, table: Mapping[str, Callable[[], Any]] = ALGORITHMS) -> Any:
    """Return an algorithm from its name, class or object.

    Args:
        algorithm: a name in ``table``; ``"module:attribute"``, to be imported; a class without arguments; or an
            algorithm.
        table: a function for each name that returns its algorithm.

    Raises:
        ValueError: the name is unknown, or the attribute does not exist.
        ModuleNotFoundError: there is no such module.
        TypeError: the object is not an algorithm.
    """
    if isinstance(algorithm, str):
        algorithm = load_object("algorithm", algorithm, table)
    elif isinstance(algorithm, type):
        algorithm = algorithm()
    check_algorithm(algorithm)
    return algorithm


def minimize(algorithm: Algorithm, grad: Gradient, x0: Tensor, steps: int) -> Tensor:
    """Run an algorithm and return all iterates.

    Args:
        algorithm: an object with ``init``, ``step`` and ``result``.
        grad: the gradient, a callable from tensor to tensor of the same shape.
        x0: the start, any shape.
        steps: number of steps, ≥ 1.

    Returns:
        The iterates, shape ``(steps + 1, *x0.shape)``, the start first.

    Raises:
        TypeError: the algorithm lacks a method.
        ValueError: ``steps`` is not an integer ≥ 1, or ``grad`` changes the shape.
    """
    check_algorithm(algorithm)
    check_int("steps", steps, 1)
    state = algorithm.init(x0)
    iterates = [algorithm.result(state)]

    def checked(z: Tensor) -> Tensor:
        return check_same_shape(z, grad(z), f"grad in step {len(iterates) - 1}")

    for _ in range(steps):
        state = algorithm.step(state, checked)
        iterates.append(algorithm.result(state))
    return torch.stack(iterates)


def check_same_shape(z: Tensor, value: Tensor, name: str) -> Tensor:
    """Return ``value``; ValueError unless it has the shape of z."""
    if value.shape != z.shape:
        raise ValueError(f"{name} maps shape {tuple(z.shape)} to {tuple(value.shape)}: must keep the shape")
    return value


def check_coefficient(name: str, value: float | Tensor) -> float | Tensor:
    """Return ``value``; ValueError unless it is a finite number or tensor."""
    finite = value.isfinite().all() if isinstance(value, Tensor) and not value.is_meta else isinstance(value, Tensor)
    if not (finite or (isinstance(value, (int, float)) and math.isfinite(value))):
        raise ValueError(f"{name}={value!r}: must be finite")
    return value


def _table_size(k: int) -> int:
    """Return a power of two ≥ k, at least 64, so that few tables are computed."""
    return max(64, 1 << (k - 1).bit_length()) if k else 64


@lru_cache
def _momentum_table(n: int) -> tuple[float, ...]:
    return tuple(momentum(n).tolist())


@lru_cache
def _weight_table(n: int) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row[: k + 1]) for k, row in enumerate(nesterov_weights(n).tolist()))
