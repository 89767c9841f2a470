"""The passes in which a kernel may run: eager ones, with values, under no compiler, tracer or transform."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

__all__ = ["are_transforms_active", "is_compiled_by_dynamo", "is_eager", "pass_dtype"]

# torch 2.5 cannot tell an export from a compilation.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
_TENSORS = (Tensor, torch.nn.Parameter, FakeTensor)


def is_eager(*inputs: Any) -> bool:
    """Return True if a pass over the inputs computes values in torch's ordinary reverse mode.

    Return False while torch compiles, exports, scripts or traces, under ``torch.func`` and forward-mode
    differentiation, and for inputs without values: proxies, meta tensors, empty batches and foreign tensor subclasses.
    The plain form works in all of these cases.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
        or are_transforms_active()
        or forward_ad._current_level >= 0
    ) and all(type(x) in _TENSORS and not x.is_meta and x.numel() > 0 for x in inputs)


def are_transforms_active() -> bool:
    """Return True under a transform of ``torch.func``, and in a backward pass with a batch of gradients."""
    return torch._C._are_functorch_transforms_active()  # as in torch.autograd.Function


def is_compiled_by_dynamo() -> bool:
    """Return True under ``torch.compile``, but not in an export."""
    return torch.compiler.is_dynamo_compiling() and not _is_exporting()


def pass_dtype(x: Tensor) -> torch.dtype:
    """Return the precision of convolutions of x: autocast's, without autocast and for float64 the precision of x."""
    kind = x.device.type
    mixed = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if mixed else x.dtype
