"""Two algorithms as a user would write them.

    optinspired plot algorithm my_algorithms:OptimizedGradient
    python train.py digits --model optnet20 --model-kwargs algorithm=my_algorithms:OptimizedGradient …

An algorithm is any class with ``init``, ``step`` and ``result``.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["LearnedHeavyBall", "OptimizedGradient"]

Gradient = Callable[[Tensor], Tensor]


class OptimizedGradientState(NamedTuple):
    """x_k, y_k and t_k."""

    x: Tensor
    y: Tensor
    t: float


class OptimizedGradient:
    """The optimised gradient method (Kim and Fessler 2016).

    Its worst case is half of the worst case of Nesterov's method:
    y_{k+1} = x_k − ∇f(x_k), t_{k+1} = (1 + √(1 + 4 t_k²)) / 2 and
    x_{k+1} = y_{k+1} + (t_k − 1) / t_{k+1} (y_{k+1} − y_k) + t_k / t_{k+1} (y_{k+1} − x_k).
    """

    def init(self, x0: Tensor) -> OptimizedGradientState:
        """Return the state x_0 = y_0, t_0 = 1."""
        return OptimizedGradientState(x0, x0, 1.0)

    def step(self, state: OptimizedGradientState, grad: Gradient) -> OptimizedGradientState:
        """Return the next state."""
        x, y, t = state
        y_next = x - grad(x)
        t_next = (1 + (1 + 4 * t**2) ** 0.5) / 2
        x_next = y_next + (t - 1) / t_next * (y_next - y) + t / t_next * (y_next - x)
        return OptimizedGradientState(x_next, y_next, t_next)

    def result(self, state: OptimizedGradientState) -> Tensor:
        """Return y_k."""
        return state.y


class LearnedHeavyBall(nn.Module):
    """The heavy ball with a learned β, as a module."""

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(beta))

    def init(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Return z_0 = z_{−1}."""
        return x0, x0

    def step(self, state: tuple[Tensor, Tensor], grad: Gradient) -> tuple[Tensor, Tensor]:
        """Return z_{k+1}, z_k."""
        z, z_prev = state
        return z - grad(z) + self.beta * (z - z_prev), z

    def result(self, state: tuple[Tensor, Tensor]) -> Tensor:
        """Return z_k."""
        return state[0]
