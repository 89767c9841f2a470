"""The backward pass of a fast form by its plain form, where a gradient has to be differentiable itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .eager import are_transforms_active

__all__ = ["is_plain_backward", "plain_gradients"]


def is_plain_backward(gradient: Tensor) -> bool:
    """Return True in a backward pass that records a graph, or that takes a batch of gradients at once."""
    batched = are_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(gradient)
    return torch.is_grad_enabled() or batched


def plain_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor, needs: Sequence[bool]
) -> list[Any]:
    """Return the gradients of function(*inputs), which have a graph where ``create_graph`` asks for one.

    Args:
        function: the plain form; it must change nothing.
        inputs: the saved inputs of the fast form, which still are parts of the graph.
        gradient: gradient of the output.
        needs: for each input, whether its gradient is wanted; ``None`` is returned for the others.
    """
    wanted = [x for x, need in zip(inputs, needs) if need]
    with torch.enable_grad():
        output = function(*inputs)
    create_graph = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(output, wanted, gradient, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]
