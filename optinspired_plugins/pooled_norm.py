"""Max pooling of a rectified normalisation, pooled first.

Max pooling commutes with maps that do not decrease, and max(norm(x), 0) is one of s x, s the sign of the scale. So a
stem need not make the images of full size that lie between its convolution and its pooling. The plain form is
``pool(relu(norm(x)))``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .batch_statistics import batch_statistics, channel_sums, track

__all__ = ["pooled_norm"]


def pooled_norm(x: Tensor, norm: nn.BatchNorm2d, pool: nn.MaxPool2d) -> Tensor:
    """Return pool(max(norm(x), 0)), norm in training.

    Kept for the backward pass are x, the result and where the maxima are.

    Args:
        x: shape (batch, channels, height, width).
        norm: batch normalisation with scale, shift and running statistics of a momentum.
        pool: the pooling, without indices.

    Raises:
        ValueError: a channel of x has one value.
    """
    with torch.no_grad():
        mean, var = batch_statistics(x)
        track(norm, mean, var, x.numel() // x.shape[1])
    sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    window = (*map(_pair, sizes), pool.ceil_mode)
    return _PooledNorm.apply(x, norm.weight, norm.bias, mean, (var + norm.eps).rsqrt(), window)


class _PooledNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, invstd: Tensor, window: Any) -> Tensor:
        factor = scale * invstd
        positive = bool((factor > 0).all())
        signed = x if positive else x * factor.sign()[:, None, None]
        out, indices = F.max_pool2d(signed, *window, return_indices=True)
        out.mul_(factor.abs()[:, None, None]).add_((shift - mean * factor)[:, None, None]).relu_()
        ctx.save_for_backward(x, scale, mean, invstd, indices.int(), out)  # half of what torch makes
        ctx.window = window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, scale, mean, invstd, indices, out = ctx.saved_tensors
        indices = indices.long()
        g = torch.ops.aten.threshold_backward(gradient, out, 0)
        centred = x.flatten(2).gather(2, indices.flatten(2)).view_as(g) - mean[:, None, None]
        scale_gradient, shift_gradient = channel_sums(centred.mul_(g)) * invstd, channel_sums(g)
        del centred
        if not ctx.needs_input_grad[0]:
            return None, scale_gradient, shift_gradient, None, None, None
        factor = scale * invstd
        dx = torch.ops.aten.max_pool2d_with_indices_backward(g.mul_(factor[:, None, None]), x, *ctx.window, indices)
        # Through the statistics: f/n (Σ g + x̂ Σ g x̂), in one pass as a normalisation of its own.
        share = factor / (x.numel() // x.shape[1])
        slope, one = share * scale_gradient * invstd, torch.ones_like(mean)
        dx -= F.batch_norm(x, mean, one, slope, share * shift_gradient, False, 0.0, 0.0)
        return dx, scale_gradient, shift_gradient, None, None, None


def _pair(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
