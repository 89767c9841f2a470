"""Fake CUDA tensors with a backward pass, on a machine without a GPU.

torch's FakeTensorMode runs CUDA's dispatch and CUDA's autocast on tensors without data. Autograd's engine also asks
CUDA how many devices there are, and the driver whether a context exists. :func:`install` loads a library that answers
both questions: any number of devices, and no context. Nothing is computed.

It needs Linux, a CUDA build of torch and a C++ compiler, and must run before torch is imported.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

__all__ = ["convolution_layout", "fake_cuda", "install", "missing", "to_fake"]

SOURCE = """
static int devices = 0;
extern "C" void set_device_count(int count) { devices = count; }
namespace c10 { namespace cuda {
signed char device_count() { return devices; }
bool hasPrimaryContext(signed char) { return false; }
} }
extern "C" int cuDevicePrimaryCtxGetState(int, unsigned *flags, int *active) { *flags = *active = 0; return 0; }
"""
_library: Any = None


def missing() -> str | None:
    """Return the requirement that this machine lacks, ``None`` if it lacks nothing."""
    torch = find_spec("torch")
    if torch is None or not list(Path(str(torch.origin)).with_name("lib").glob("libc10_cuda.so")):
        return "a CUDA build of torch for Linux"
    return None if shutil.which("c++") else "a C++ compiler, c++"


def install() -> None:
    """Load the library; torch's own symbols of the same names give way to it.

    Raises:
        RuntimeError: torch is imported already, or a requirement is missing.
    """
    global _library
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already: fake_cuda.install() must come before")
    if (reason := missing()) is not None:
        raise RuntimeError(f"fake CUDA tensors need {reason}")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "answers.cpp", Path(folder) / "answers.so"
        source.write_text(SOURCE)
        # Under the driver's name, so that torch finds it loaded when it looks for the driver.
        command = ["c++", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source]
        subprocess.run(command, check=True)
        _library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def convolution_layout(x: Any, weight: Any) -> Any:
    """Return the memory format of cuDNN's convolution: channels last if either argument has it."""
    import torch

    def is_channels_last(tensor: Any) -> bool:
        return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()

    last = x.dim() == 4 and (is_channels_last(x) or is_channels_last(weight))
    return torch.channels_last if last else torch.contiguous_format


def _convolution(mode: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Return empty results of a convolution or its backward pass; torch's own rule asks for a device."""
    import torch

    def empty(shape: Any, like: Any, layout: Any = torch.contiguous_format) -> Any:
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)

    if function is torch.ops.aten.convolution_backward.default:
        _, x, weight, *_, needs = args
        layout = convolution_layout(x, weight)
        with mode:
            shapes = (x.shape, x, layout), (weight.shape, weight, layout), (weight.shape[:1], weight)
            return tuple(empty(*shape) if need else None for shape, need in zip(shapes, needs))
    x, weight, _, stride, padding, dilation = (*args, *kwargs.values())[:6]
    sides = [
        (side + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i, side in enumerate(x.shape[2:])
    ]
    with mode:
        return empty((x.shape[0], weight.shape[0], *sides), x, convolution_layout(x, weight))


def _statistics(mode: Any, function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Return empty statistics of ``batch_norm_update_stats``."""
    import torch

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with mode:
        return tuple(torch.empty(x.shape[1:2], dtype=dtype, device=x.device) for _ in range(2))


def _alike(mode: Any, function: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    import torch

    with mode:
        return torch.empty_like(x)


@contextmanager
def fake_cuda() -> Iterator[Callable[..., None]]:
    """Make every new tensor a fake one on CUDA; give the function that runs a loss's backward pass.

    An operation that needs a value, and so would wait for the device, raises ``DataDependentOutputException``.
    """
    import torch
    import torch.cuda.amp.common
    from torch._subclasses import fake_impls
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils import _foreach_utils
    from torch.utils.checkpoint import DefaultDeviceType

    def backward(loss: Any, **arguments: Any) -> None:
        _library.set_device_count(64)
        try:
            loss.backward(**arguments)
        finally:
            _library.set_device_count(0)

    aten = torch.ops.aten
    rules = {
        aten.convolution.default: _convolution,
        aten.convolution_backward.default: _convolution,
        aten.batch_norm_update_stats.default: _statistics,
        aten.batch_norm_elemt.default: _alike,
    }
    before = DefaultDeviceType.get_device_type()
    DefaultDeviceType.set_device_type("cuda")
    with ExitStack() as stack:
        stack.callback(DefaultDeviceType.set_device_type, before)
        stack.enter_context(patch.dict(fake_impls.op_implementations_dict, rules))
        stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(patch("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True))
        # As in a CUDA graph: checks that read values are left out.
        stack.enter_context(patch("torch.cuda.is_current_stream_capturing", lambda: True))
        for name in ("_exchange_device", "_maybe_exchange_device"):
            stack.enter_context(patch(f"torch.cuda.{name}", lambda index: index))
        # Gradients are clipped as on CUDA, all with one kernel.
        supported = [*_foreach_utils._foreach_supported_types, FakeTensor]
        stack.enter_context(patch("torch.utils._foreach_utils._foreach_supported_types", supported))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.device("cuda"))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield backward


def to_fake(model: Any, layout: Any, dtype: Any = None, optimizers: Sequence[Any] = ()) -> Any:
    """Replace parameters and buffers of a model by fake ones, in place; call it in :func:`fake_cuda`.

    The optimisers get them too, with fake state, and step as on CUDA: a few kernels for all parameters.
    """
    import torch

    made: dict[int, tuple[Any, Any]] = {}

    def fake(tensor: Any) -> Any:
        if tensor is None or id(tensor) in made:
            return tensor if tensor is None else made[id(tensor)][1]
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        values = torch.empty(tensor.shape, dtype=kind)
        values = values.contiguous(memory_format=layout) if values.dim() == 4 else values
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        result = torch.nn.Parameter(values, tensor.requires_grad) if is_parameter else values
        made[id(tensor)] = tensor, result
        return result

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items()})
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update(params=[fake(p) for p in group["params"]], foreach=True)
        states = {fake(p): {k: fake(v) for k, v in state.items()} for p, state in optimizer.state.items()}
        optimizer.state.clear()
        optimizer.state.update(states)
    return model
