"""Where a fast form may stand in for the calls of modules: only where it computes what they would.

A fast form reads the parameters of modules and calls functions. It may do so while

- the pass is eager (:func:`~optinspired_plugins.memory.eager.is_eager`);
- each module is exactly of the type that the form knows, has no hook, also no global one, no method replaced on the
  instance or on the class, and is not compiled by itself (:func:`is_unmodified`);
- its parameters and buffers are plain tensors on the device of the input, in a precision in which the modules would
  run, too (:func:`fits`);
- its settings are those that the form computes (:func:`is_rectified_norm`, :func:`is_same_size_convolution`).

Everything else runs plainly, module by module.
"""

from __future__ import annotations

from functools import cache
from typing import Any, FrozenSet

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

__all__ = [
    "fits",
    "is_plain_norm",
    "is_rectified_norm",
    "is_same_size_convolution",
    "is_unmodified",
    "is_unmodified_inside",
]

# Torch's and timm's own methods, to notice a class that somebody has patched.
_FORWARDS = {
    kind: kind.forward
    for kind in (nn.Conv2d, nn.BatchNorm2d, BatchNormAct2d, nn.ReLU, nn.Identity, nn.MaxPool2d, nn.AvgPool2d)
}
# torch 2.5's compiler cannot read what is set on an instance; 2.14's can, and none between was tried.
_COMPILER_READS_INSTANCES = torch.__version__ >= "2.14"
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def is_unmodified(module: Any, kind: Any) -> bool:
    """Return True if a call of the module is a call of the forward method that ``kind`` was written with."""
    return (
        isinstance(module, nn.Module)
        and type(module) is kind
        and _FORWARDS.get(kind, kind.forward) is kind.forward
        and not _is_modified(module)
        and not any(_GLOBAL_HOOKS)
    )


def is_unmodified_inside(module: nn.Module) -> bool:
    """Return True if nothing watches or replaces a call of the module, or of one inside it."""
    return not any(_GLOBAL_HOOKS) and not any(map(_is_modified, module.modules()))


def _is_modified(module: nn.Module) -> bool:
    """Return True if the module has a hook, a method of its own, or a compiled call, or if that cannot be known."""
    if not _COMPILER_READS_INSTANCES and torch.compiler.is_compiling():
        return True
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or not vars(module).keys().isdisjoint(_names(type(module)))  # type: ignore[arg-type]
    )


@cache
def _names(kind: Any) -> FrozenSet[str]:
    """Return the names that a class defines, methods above all, but for the defaults that instances set."""
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name, None)) or name == "_compiled_call_impl")


def fits(x: Tensor, *tensors: Any) -> bool:
    """Return True if parameters and buffers are plain tensors on the input's device and in its precision.

    Autocast chooses the precision by itself, and counters have none.
    """
    any_precision = torch.is_autocast_enabled(x.device.type)
    return all(
        type(p) in (nn.Parameter, Tensor, type(x))
        and p.device == x.device
        and (any_precision or p.dtype == x.dtype or not p.is_floating_point())
        for p in tensors
    )


def is_rectified_norm(norm: Any, channels: int, training: bool) -> bool:
    """Return True if a module is a batch normalisation with ReLU, in the given mode, that the fast forms compute."""
    return (
        is_unmodified(norm, BatchNormAct2d)
        and is_unmodified(norm.act, nn.ReLU)
        and is_unmodified(norm.drop, nn.Identity)
        and is_plain_norm(norm, channels, training)
    )


def is_plain_norm(norm: nn.BatchNorm2d, channels: int, training: bool) -> bool:
    """Return True if a batch normalisation, by the class, has the settings that the fast forms compute."""
    return (
        norm.training == training
        and norm.num_features == channels
        and norm.weight is not None
        and norm.bias is not None
        and (norm.momentum is not None or not norm.track_running_stats)
        and (training or norm.running_mean is not None)
        and (norm.running_mean is None) == (norm.running_var is None)
    )


def is_same_size_convolution(conv: Any, in_channels: int, out_channels: int) -> bool:
    """Return True if a module is a convolution that keeps the size, without bias and groups."""
    return (
        is_unmodified(conv, nn.Conv2d)
        and tuple(conv.weight.shape[:2]) == (out_channels, in_channels)
        and conv.bias is None
        and conv.groups == 1
        and set(conv.stride) == set(conv.dilation) == {1}
        and isinstance(conv.padding, tuple)
        and all(2 * p + 1 == k for p, k in zip(conv.padding, conv.weight.shape[2:]))
        and conv.weight.shape[2] == conv.weight.shape[3]
        and conv.padding_mode == "zeros"
    )
