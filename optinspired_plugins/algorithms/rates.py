"""Measured convergence rates of the algorithms of section 3.

On a μ-strongly convex f with an L-Lipschitz gradient, gradient descent needs O((L/μ) log 1/ε) steps, the heavy ball and
Nesterov's method O(√(L/μ) log 1/ε).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .methods import Algorithm, Gradient, GradientDescent, HeavyBall, LinearizedADMM, Nesterov, minimize
from .objectives import Objective

__all__ = [
    "Problem",
    "distances",
    "fitted_exponent",
    "quadratic",
    "steps_to_accuracy",
    "strongly_convex",
    "tanh_objective",
]

DIMENSION = 50


class Problem(NamedTuple):
    """A gradient, its minimiser, a start, and L / μ with L = 1."""

    grad: Gradient
    minimiser: Tensor
    start: Tensor
    condition: float


def quadratic(condition: float) -> Problem:
    """Return f(z) = Σ_i λ_i z_i² / 2 with 50 λ spaced evenly in log from 1/κ to 1; the start is 1.

    Args:
        condition: κ = L / μ, finite and ≥ 1.

    Raises:
        ValueError: κ is out of range.
    """
    if not 1 <= condition < math.inf:
        raise ValueError(f"condition={condition!r}: must be finite and ≥ 1")
    curvature = torch.logspace(-math.log10(condition), 0, DIMENSION, dtype=torch.float64)
    start = torch.ones(DIMENSION, dtype=torch.float64)
    return Problem(lambda z: curvature * z, torch.zeros_like(start), start, condition)


def tanh_objective(condition: float) -> Problem:
    """Return the objective (8) of tanh, with its minimum at 0.

    There ∇²f = I − W; the eigenvalues of W are spaced evenly between 0, excluded, and 1 − 1/κ.

    Args:
        condition: κ = L / μ at the minimiser, > 1.

    Raises:
        ValueError: κ is out of range.
    """
    if not 1 < condition < math.inf:
        raise ValueError(f"condition={condition!r}: must be finite and > 1")
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(DIMENSION, DIMENSION, dtype=torch.float64, generator=generator)).Q
    values = torch.arange(1, DIMENSION + 1, dtype=torch.float64) / DIMENSION * (1 - 1 / condition)
    start = torch.randn(DIMENSION, dtype=torch.float64, generator=generator)
    grad = Objective("tanh", (basis * values) @ basis.T).grad
    return Problem(grad, torch.zeros_like(start), start, condition)


def strongly_convex(condition: float) -> dict[str, Algorithm]:
    """Return the algorithms for a strongly convex f with L = 1, with the momentum of footnote 5."""
    return {
        "gd": GradientDescent(),
        "hb": HeavyBall.strongly_convex(1.0, 1 / condition),
        "agd": Nesterov.strongly_convex(1.0, 1 / condition),
        "admm": LinearizedADMM(),
    }


def steps_to_accuracy(algorithm: Algorithm, problem: Problem, accuracy: float = 1e-6, limit: int = 1_000_000) -> int:
    """Return the number of steps to a relative accuracy.

    It is the first k with ‖z_j − z*‖ ≤ ``accuracy`` ‖z_0 − z*‖ for all j from k to 2k: the heavy ball oscillates, so
    its first crossing comes too early.

    Raises:
        ValueError: ``limit`` steps do not suffice.
    """
    state = algorithm.init(problem.start)
    target = accuracy * (problem.start - problem.minimiser).norm()
    reached = None
    for k in range(limit):
        if reached is not None and k >= 2 * reached:
            return reached
        within = bool((algorithm.result(state) - problem.minimiser).norm() <= target)
        reached = (k if reached is None else reached) if within else None
        state = algorithm.step(state, problem.grad)
    raise ValueError(f"limit={limit!r}: {type(algorithm).__name__} needs more steps for accuracy={accuracy!r}")


def fitted_exponent(conditions: Sequence[float], steps: Sequence[float]) -> float:
    """Return p of the least-squares fit steps ∝ κ^p."""
    x, y = (torch.tensor([float(v) for v in values], dtype=torch.float64).log() for values in (conditions, steps))
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def distances(algorithm: Algorithm, problem: Problem, steps: int) -> Tensor:
    """Return ‖z_k − z*‖ / ‖z_0 − z*‖ for k = 0..steps."""
    iterates = minimize(algorithm, problem.grad, problem.start, steps)
    error = (iterates - problem.minimiser).norm(dim=1)
    return error / error[0]
