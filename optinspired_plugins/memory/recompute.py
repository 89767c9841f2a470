"""Checkpointing of modules: the backward pass repeats a pass in the same state, without changing buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from .eager import is_compiled_by_dynamo, is_eager
from .randomness import may_draw_random_numbers

__all__ = ["ModuleState", "recompute"]

# A checkpoint compiled by torch 2.5 leaves wrong running statistics; no version between 2.5 and 2.14 was tried.
_COMPILER_RECOMPUTES = torch.__version__ >= "2.14"


class ModuleState:
    """The present state of a module and its submodules: modes, parameters and buffers.

    As a context manager it gives the module this state for a repeated pass, and restores the present state afterwards.
    It can be entered any number of times, but not nested.

    Under ``torch.func.functional_call`` the parameters of the call are used. A repeated pass reads and changes copies
    of the buffers. Batch normalisations in training do not read their running statistics, so these are copied only when
    a pass is repeated.

    Args:
        module: the module.
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
        """Give the module this state; return a function that restores the present one."""
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
    """Return function(*inputs), saving only the inputs; the backward pass recomputes the function.

    The repeated pass reads the same state, draws the same random numbers and changes no buffer. If
    :func:`~optinspired_plugins.memory.eager.is_eager` is False, the function is called without checkpointing, except
    under ``torch.compile`` of torch 2.14 or later, which supports torch's checkpoint. Random states are saved only if
    the module may draw random numbers: on CUDA that is slow and prevents the capture of a CUDA graph.

    Args:
        module: the module with the state that the function reads.
        function: the function, often the module itself.
        *inputs: its arguments. One of them must be a tensor on the device of the function, so that torch replays the
            random state of that device. Without a tensor the function is called without checkpointing.
    """
    if is_compiled_by_dynamo():
        return checkpoint(function, *inputs, use_reentrant=False) if _COMPILER_RECOMPUTES else function(*inputs)
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    if not (torch.is_grad_enabled() and tensors and is_eager(*tensors)):
        return function(*inputs)
    contexts = nullcontext(), ModuleState(module)
    random = may_draw_random_numbers(module)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=random, context_fn=lambda: contexts)
