"""What an algorithm asks of its layers, found by running it: how many a step calls, and which of them at the start."""

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
    """Run an algorithm on a small tensor, to check it and to count the gradients that each step asks for.

    Args:
        algorithm: the algorithm.
        steps: number of steps, ≥ 1.

    Returns:
        The count of each step: as many layers does it need.

    Raises:
        TypeError: the algorithm lacks a method.
        ValueError: ``steps`` is below 1; a step asks for no gradient, gives a tensor of another shape or one that is
            not finite.
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
                found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise ValueError(f"{step} makes of shape {tuple(x.shape)} the result {found}: must keep the shape")
            if not (result.is_meta or result.isfinite().all()):
                raise ValueError(f"{step} gives a result that is not finite: coefficients must be finite")
    return tuple(counts)


def calls_at_start(algorithm: Algorithm, count: int) -> tuple[bool, ...]:
    """Return for each of the first step's ``count`` gradients True if it is asked at x_0, whatever is learned.

    The symbols of :func:`~optinspired_plugins.propagation.tracing.trace` decide where they can. Elsewhere numbers do:
    the step runs from a generic x_0 with the algorithm's parameters as they are, and with others. A point is x_0 where
    it equals x_0 both times. So x_0 + β (x_0 − x_{−1}) is, and x_0 − h ∇f(x_0) is not, also where the h that is
    learned begins at 0.

    Args:
        algorithm: the algorithm; it is copied.
        count: gradients of the first step, as :func:`layers_per_step` has it.
    """
    try:
        program = trace(copy.deepcopy(algorithm), 1, transition=True)
    except NotLinearError:
        runs = [_equal_start(algorithm, shift) for shift in (0.0, 0.1)]
        return tuple(all(run[i : i + 1] == [True] for run in runs) for i in range(count))
    return tuple(call.register < 0 for call in program.instructions if isinstance(call, Call))


def _equal_start(algorithm: Algorithm, shift: float) -> list[bool]:
    """Run the first step of a copy with its parameters raised by up to ``shift``; compare each point with x_0."""
    generator = torch.Generator().manual_seed(0)
    own: Any = as_learnable(copy.deepcopy(algorithm))
    if isinstance(own, nn.Module):
        _make_numbers(own, shift, generator)
    x0 = torch.randn(1, 2, 3, 3, device="cpu", generator=generator)
    found: list[bool] = []

    def gradient(z: Tensor) -> Tensor:
        found.append(z is x0 or (z.shape == x0.shape and torch.allclose(z, x0, rtol=1e-5, atol=1e-6)))
        return torch.tanh(z + 0.3)

    with torch.no_grad():
        own.step(own.init(x0), gradient)
    return found


def _make_numbers(module: nn.Module, shift: float, generator: torch.Generator) -> None:
    """Move a module to the CPU, and its parameters by random amounts; those of the meta device become 0.5 before."""
    empty = [p for p in module.parameters() if p.is_meta]
    if empty:
        module.to_empty(device="cpu")
    module.to(device="cpu", dtype=torch.float32)
    for p in module.parameters():
        if empty:
            nn.init.constant_(p, 0.5)
        p.data.add_(shift * torch.rand(p.shape, device="cpu", generator=generator))
