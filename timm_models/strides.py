"""The stride of 1×1 convolutions, applied once to their common input.

A 1×1 convolution of stride s is one of stride 1 of every s-th row and column. Bottlenecks with the stride in their
first convolution (ResNet v1) read the same ones as their shortcut, and a backward pass needs only these of their input.
"""

# No postponed annotations here: TorchScript reads the types of arguments.

from typing import Any, Sequence

from torch import Tensor, nn

__all__ = ["pull_out_stride", "subsample"]


def subsample(x: Tensor, stride: int) -> Tensor:
    """Return every ``stride``-th row and column of x.

    The shape is (batch, channels, ⌈height / stride⌉, ⌈width / stride⌉).
    """
    if stride == 1:
        return x
    return x[:, :, ::stride, ::stride].clone()  # contiguous: else each convolution would make a copy of its own


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
