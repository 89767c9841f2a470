"""Gradients of a kernel by its plain form, for backward passes that must be differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .eager import are_transforms_active

__all__ = ["needs_plain_gradients", "plain_gradients"]


def needs_plain_gradients(gradient: Tensor) -> bool:
    """Return True in a backward pass that records a graph, or that has a batch of gradients."""
    batched = are_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(gradient)
    return torch.is_grad_enabled() or batched


def plain_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor, needs: Sequence[bool]
) -> list[Any]:
    """Return the gradients of function(*inputs), with a graph if gradients are enabled.

    Args:
        function: the plain form, without side effects.
        inputs: the saved inputs of the kernel, which are still part of the graph.
        gradient: gradient of the output.
        needs: for each input, True if its gradient is needed; the other gradients are ``None``.
    """
    with torch.enable_grad():
        inputs = [x.view_as(x) for x in inputs]  # one may be a function of another; views are independent
        output = function(*inputs)
    leaves = [x for x, need in zip(inputs, needs) if need]
    create_graph = torch.is_grad_enabled()
    gradients = iter(torch.autograd.grad(output, leaves, gradient, create_graph=create_graph, allow_unused=True))
    return [next(gradients) if need else None for need in needs]
