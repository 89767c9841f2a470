"""Checkpointing that repeats a pass of a module as it was, and leaves no trace in its buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .eager import is_compiled_by_dynamo, is_eager

__all__ = ["ModuleState", "recompute"]


class ModuleState:
    """The state that a pass through a module reads: modes, parameters and buffers, as they are now.

    As a context manager it gives the module this state for a repeated pass, and the present state back afterwards. It
    can be entered any number of times, one after the other.

    The parameters of ``torch.func.functional_call`` are used again, not the module's own. A repeated pass reads and
    moves copies of the buffers. Batch normalisations in training do not read their running statistics, so these are
    copied only when a pass is repeated.

    Args:
        module: the module whose submodules are looked at.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts = [_Part(m) for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]

    def __enter__(self) -> None:
        self._present = [part.exchange() for part in self._parts]

    def __exit__(self, *error: object) -> None:
        for put_back in self._present:
            put_back()
        self._present = []


class _Part:
    """The state of one module without its children."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.training, self.parameters = module, module.training, dict(module._parameters)
        unread = isinstance(module, _BatchNorm) and module.training
        self.buffers = None if unread else _copies(module._buffers)

    def exchange(self) -> Callable[[], None]:
        """Give the module this state; return the function that gives it its present one back."""
        module = self.module
        present = module.training, dict(module._parameters), dict(module._buffers)
        _set(module, self.training, self.parameters, _copies(module._buffers if self.buffers is None else self.buffers))
        return lambda: _set(module, *present)


def _copies(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: buffer if buffer is None else buffer.detach().clone() for name, buffer in buffers.items()}


def _set(module: nn.Module, training: bool, parameters: dict[str, Any], buffers: dict[str, Any]) -> None:
    if module.training != training:
        module.training = training
    module._parameters.update(parameters)
    module._buffers.update(buffers)


def recompute(module: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    """Return function(*inputs), keeping only the inputs; the backward pass computes the function again.

    The repeated pass reads the state that the first one read, draws the random numbers that the first one drew, and
    moves no buffer. Where :func:`~optinspired_plugins.memory.eager.is_eager` is False the function is called plainly,
    but for ``torch.compile``, which knows torch's checkpoint.

    Args:
        module: the module whose state the function reads.
        function: what to compute; often the module itself.
        *inputs: its arguments. One of them must be a tensor on the function's device: it tells torch whose random
            state to replay.
    """
    if is_compiled_by_dynamo():
        return checkpoint(function, *inputs, use_reentrant=False)
    if not torch.is_grad_enabled() or not is_eager(*(x for x in inputs if isinstance(x, Tensor))):
        return function(*inputs)
    contexts = nullcontext(), ModuleState(module)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=lambda: contexts)
