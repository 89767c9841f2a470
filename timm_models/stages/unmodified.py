"""Conditions under which a fast form may replace module calls.

A fast form reads the parameters of modules and calls functions. It is used only if

- the pass is eager (:func:`~optinspired_plugins.memory.eager.is_eager`);
- each module is exactly of the expected type, has no hook, not even a global one, no replaced method on the instance or
  the class, and is not compiled separately (:func:`is_unmodified`);
- its parameters and buffers are plain tensors on the device of the input, in a precision in which the modules would
  run, too (:func:`fits`);
- the form supports its settings (:func:`is_rectified_norm`, :func:`is_same_size_convolution`).

Otherwise the modules are called one by one.
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

# The original methods of torch and timm, to detect patched classes.
_FORWARDS = {
    kind: kind.forward
    for kind in (nn.Conv2d, nn.BatchNorm2d, BatchNormAct2d, nn.ReLU, nn.Identity, nn.MaxPool2d, nn.AvgPool2d)
}
# torch 2.5's compiler cannot read attributes of an instance; 2.14's can, and no version between them was tried.
_COMPILER_READS_INSTANCES = torch.__version__ >= "2.14"
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def is_unmodified(module: Any, kind: Any) -> bool:
    """Return True if a call runs only the original forward of ``kind``."""
    return (
        isinstance(module, nn.Module)
        and type(module) is kind
        and _FORWARDS.get(kind, kind.forward) is kind.forward
        and not _is_modified(module)
        and not any(_GLOBAL_HOOKS)
    )


def is_unmodified_inside(module: nn.Module) -> bool:
    """Return True if the module and its children are unmodified."""
    return not any(_GLOBAL_HOOKS) and not any(map(_is_modified, module.modules()))


def _is_modified(module: nn.Module) -> bool:
    """Return True for a hook, a replaced method or a compiled call."""
    if not _COMPILER_READS_INSTANCES and torch.compiler.is_compiling():
        return True
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_replaced_method(module)
    )


def _has_replaced_method(module: nn.Module) -> bool:
    kind: Any = type(module)
    if torch.compiler.is_compiling():  # a compiler warns of caches, and cannot trace `isdisjoint`
        return any(_is_method(kind, name) for name in vars(module))
    return not vars(module).keys().isdisjoint(_names(kind))


@cache
def _names(kind: Any) -> FrozenSet[str]:
    """Return the names of a class's methods, and of its compiled call."""
    return frozenset(name for name in dir(kind) if _is_method(kind, name))


def _is_method(kind: Any, name: str) -> bool:
    return name == "_compiled_call_impl" or callable(getattr(kind, name, None))


def fits(x: Tensor, *tensors: Any) -> bool:
    """Return True if tensors have the device and precision of x.

    Under autocast any precision fits; integer counters always do.
    """
    any_precision = torch.is_autocast_enabled(x.device.type)
    return all(
        type(p) in (nn.Parameter, Tensor, type(x))
        and p.device == x.device
        and (any_precision or p.dtype == x.dtype or not p.is_floating_point())
        for p in tensors
    )


def is_rectified_norm(norm: Any, channels: int, training: bool) -> bool:
    """Return True for a supported batch normalisation with ReLU."""
    return (
        is_unmodified(norm, BatchNormAct2d)
        and is_unmodified(norm.act, nn.ReLU)
        and is_unmodified(norm.drop, nn.Identity)
        and is_plain_norm(norm, channels, training)
    )


def is_plain_norm(norm: nn.BatchNorm2d, channels: int, training: bool) -> bool:
    """Return True if the settings of a batch normalisation are supported."""
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
    """Return True for a plain convolution that keeps the image size."""
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
