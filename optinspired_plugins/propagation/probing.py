"""Layers per step of an algorithm, and its calls at x_0, by running it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_int
from ..algorithms.methods import Algorithm, check_algorithm
from .tracing import Call, NotLinearError, trace
from .unrolled import as_learnable

__all__ = ["calls_at_start", "layers_per_step"]


def layers_per_step(algorithm: Algorithm, steps: int) -> tuple[int, ...]:
    """Check an algorithm on a small tensor, and count the gradients of each step.

    Args:
        algorithm: the algorithm.
        steps: number of steps, ≥ 1.

    Returns:
        The number of gradients, and so of layers, of each step.

    Raises:
        TypeError: the algorithm lacks a method.
        ValueError: ``steps`` is below 1, or a step calls no gradient or returns a tensor of another shape or one that
            is not finite.
    """
    check_algorithm(algorithm)
    check_int("steps", steps, 1)
    counts = [0] * steps
    parameter = next(algorithm.parameters(), None) if isinstance(algorithm, nn.Module) else None
    x = torch.ones(1, 2, 3, 3, device="cpu" if parameter is None else parameter.device)

    def gradient(z: Tensor) -> Tensor:
        counts[k] += 1
        return z / 2

    with torch.no_grad():
        state = algorithm.init(x)
        for k in range(steps):
            state = algorithm.step(state, gradient)
            result, step = algorithm.result(state), f"step {k} of {type(algorithm).__name__}"
            if counts[k] == 0:
                raise ValueError(f"{step} asks for no gradient: a step must have a layer")
            if not isinstance(result, Tensor) or result.shape != x.shape:
                wrong = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise ValueError(f"{step} makes of shape {tuple(x.shape)} the result {wrong}: must keep the shape")
            if not (result.is_meta or result.isfinite().all()):
                raise ValueError(f"{step} gives a result that is not finite: coefficients must be finite")
    return tuple(counts)


def calls_at_start(algorithm: Algorithm, count: int) -> tuple[bool, ...]:
    """Find the gradients of the first step at x_0.

    Return True for each gradient that is evaluated at x_0 for all values of the parameters.

    :func:`~optinspired_plugins.propagation.tracing.trace` decides this for linear algorithms. Other algorithms run
    twice from a random x_0, with their own parameters and with changed ones: a point is x_0 if it equals x_0 both
    times. So x_0 + β (x_0 − x_{−1}) is x_0, and x_0 − h ∇f(x_0) is not, even if a learned h starts at 0.

    Args:
        algorithm: the algorithm; it is copied.
        count: number of gradients of the first step, from :func:`layers_per_step`.
    """
    try:
        program = trace(copy.deepcopy(algorithm), 1, transition=True)
    except NotLinearError:
        runs = [_equal_start(algorithm, shift) for shift in (0.0, 0.1)]
        return tuple(all(run[i : i + 1] == [True] for run in runs) for i in range(count))
    return tuple(call.register < 0 for call in program.instructions if isinstance(call, Call))


def _equal_start(algorithm: Algorithm, shift: float) -> list[bool]:
    """Compare each point of the first step with x_0, with parameters raised by up to ``shift``."""
    generator = torch.Generator().manual_seed(0)
    duplicate: Any = as_learnable(copy.deepcopy(algorithm))
    if isinstance(duplicate, nn.Module):
        _make_numbers(duplicate, shift, generator)
    x0 = torch.randn(1, 2, 3, 3, device="cpu", generator=generator)
    equal: list[bool] = []

    def gradient(z: Tensor) -> Tensor:
        equal.append(z is x0 or (z.shape == x0.shape and torch.allclose(z, x0, rtol=1e-5, atol=1e-6)))
        return torch.tanh(z + 0.3)

    with torch.no_grad():
        duplicate.step(duplicate.init(x0), gradient)
    return equal


def _make_numbers(module: nn.Module, shift: float, generator: torch.Generator) -> None:
    """Move a module to the CPU, fill meta parameters with 0.5, and raise all parameters at random."""
    empty = [p for p in module.parameters() if p.is_meta]
    if empty:
        module.to_empty(device="cpu")
    module.to(device="cpu", dtype=torch.float32)
    for p in module.parameters():
        if empty:
            nn.init.constant_(p, 0.5)
        p.data.add_(shift * torch.rand(p.shape, device="cpu", generator=generator))
