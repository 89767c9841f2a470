"""The stride of 1×1 convolutions, applied once to their common input.

A 1×1 convolution of stride s is one of stride 1 of every s-th row and column. Bottlenecks with the stride in their
first convolution (ResNet v1) read the same ones as their shortcut, and a backward pass needs only these of their input.
"""

# No postponed annotations here: TorchScript reads the types of arguments.

from typing import Any, Sequence

import torch
from torch import Tensor, nn

from optinspired_plugins.memory.double_backward import needs_plain_gradients
from optinspired_plugins.memory.eager import is_eager

__all__ = ["pull_out_stride", "subsample"]


def subsample(x: Tensor, stride: int) -> Tensor:
    """Return every ``stride``-th row and column of x.

    The shape is (batch, channels, ⌈height / stride⌉, ⌈width / stride⌉).
    """
    if stride == 1:
        return x
    if not torch.jit.is_scripting():
        return _subsampled(x, stride)
    return x[:, :, ::stride, ::stride].clone()


@torch.jit.ignore
def _subsampled(x: Tensor, stride: int) -> Tensor:
    # contiguous: else each convolution would make a copy of its own
    return _Subsample.apply(x, stride) if is_eager(x) else x[:, :, ::stride, ::stride].clone()


class _Subsample(torch.autograd.Function):
    """Every ``stride``-th row and column; unlike a slice's, its gradient keeps channels last, by two kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        ctx.shape, ctx.stride, ctx.layout = tuple(x.shape), stride, _layout(x)
        return x[:, :, ::stride, ::stride].clone(memory_format=ctx.layout)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if needs_plain_gradients(gradient):
            rows = torch.ops.aten.slice_backward(
                gradient, [*gradient.shape[:3], ctx.shape[3]], 3, 0, ctx.shape[3], ctx.stride
            )
            return torch.ops.aten.slice_backward(rows, ctx.shape, 2, 0, ctx.shape[2], ctx.stride), None
        x = torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device, memory_format=ctx.layout).zero_()
        x[:, :, :: ctx.stride, :: ctx.stride] = gradient
        return x, None


def _layout(x: Tensor) -> torch.memory_format:
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format


def pull_out_stride(transforms: Sequence[Any]) -> int:
    """Remove and return the stride of first 1×1 convolutions.

    These are ``conv1`` and the first layer of the shortcut. If any transform has a stride elsewhere, nothing is changed
    and 1 is returned.
    """
    convolutions = []
    for transform in transforms:
        strided = [module for module in transform.modules() if module is not transform and _strides(module) != (1, 1)]
        shortcut = transform.downsample
        entries = [transform.conv1] if shortcut is None else [transform.conv1, next(shortcut.children(), None)]
        if strided and not (len(strided) == len(entries) and all(any(m is e for e in entries) for m in strided)):
            return 1
        convolutions += strided
    strides = {conv.stride[0] if _is_pointwise(conv) else 1 for conv in convolutions}
    if len(strides) != 1 or strides == {1}:
        return 1
    for conv in convolutions:
        conv.stride = (1, 1)
    return int(strides.pop())


def _strides(module: Any) -> Any:
    stride = getattr(module, "stride", 1)
    return (stride, stride) if isinstance(stride, int) else tuple(stride)


def _is_pointwise(conv: Any) -> bool:
    square = isinstance(conv, nn.Conv2d) and conv.stride[0] == conv.stride[1]
    return square and conv.kernel_size == (1, 1) and conv.padding == (0, 0)
