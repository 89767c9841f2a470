"""Checkpointing of modules: the backward pass repeats a pass in the same state, without changing buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Optional

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
        modules = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._parts = [(m, m.training, dict(m._parameters)) for m in modules]
        self._buffers = _copies({m: m._buffers for m in modules if not (isinstance(m, _BatchNorm) and m.training)})

    def __enter__(self) -> None:
        modules = [module for module, *_ in self._parts]
        self._present = [(m, m.training, dict(m._parameters), dict(m._buffers)) for m in modules]
        buffers = _copies({m: self._buffers.get(m, m._buffers) for m in modules})
        for module, training, parameters in self._parts:
            _set(module, training, parameters, buffers[module])

    def __exit__(self, *error: object) -> None:
        for present in self._present:
            _set(*present)
        self._present = []


_Buffers = Mapping[str, Optional[Tensor]]


def _copies(buffers: Mapping[nn.Module, _Buffers]) -> dict[nn.Module, _Buffers]:
    """Return copies, with one launch on a GPU for all buffers of a dtype."""
    buffers = {module: dict(of_module) for module, of_module in buffers.items()}  # other threads exchange them
    found = {id(b): b.detach() for of_module in buffers.values() for b in of_module.values() if b is not None}
    copies = {key: torch.empty_like(buffer) for key, buffer in found.items()}
    for kind in {(buffer.device, buffer.dtype) for buffer in found.values()}:
        keys = [key for key, buffer in found.items() if (buffer.device, buffer.dtype) == kind]
        torch._foreach_copy_([copies[key] for key in keys], [found[key] for key in keys])
    return {
        module: {name: b if b is None else copies[id(b)] for name, b in of_module.items()}
        for module, of_module in buffers.items()
    }


def _set(module: nn.Module, training: bool, parameters: Mapping[str, Any], buffers: _Buffers) -> None:
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
