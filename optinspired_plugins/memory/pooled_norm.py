"""Pooling after normalisation and ReLU, without saving the full-size images between them.

:func:`max_pooled_norm` pools first: max pooling commutes with increasing maps, and max(norm(x), 0) increases with s x,
s the sign of the scale. :func:`average_pooled_norm` recomputes the rectified images in the backward pass. The plain
form of both is ``pool(relu(norm(x)))``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch_norm import FixedNorm, pass_statistics
from .double_backward import needs_plain_gradients, plain_gradients

__all__ = ["average_pooled_norm", "max_pooled_norm"]


def max_pooled_norm(x: Tensor, norm: nn.BatchNorm2d, pool: nn.MaxPool2d) -> Tensor:
    """Return pool(max(norm(x), 0)), norm in training.

    Saved for the backward pass are x, the result and the indices of the maxima.

    Args:
        x: shape (batch, channels, height, width), in the precision of the normalisation.
        norm: batch normalisation with scale and shift.
        pool: the pooling, without indices.

    Raises:
        ValueError: a channel of x has one value.
    """
    mean, var = pass_statistics(norm, x.detach(), torch.float64 if x.dtype == torch.float64 else torch.float32)
    sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    window = (*map(_pair, sizes), pool.ceil_mode)
    return _MaxPooledNorm.apply(x, norm.weight, norm.bias, mean, var, norm.eps, window)


def average_pooled_norm(x: Tensor, norm: nn.BatchNorm2d, pool: nn.AvgPool2d) -> Tensor:
    """Return pool(max(norm(x), 0)), norm in training or evaluation.

    Saved for the backward pass are x and its statistics.

    Args:
        x: shape (batch, channels, height, width).
        norm: batch normalisation with scale and shift, and with running statistics in evaluation.
        pool: the pooling.

    Raises:
        ValueError: a channel of x has one value, in training.
    """
    mean, var = pass_statistics(norm, x.detach(), torch.float64 if x.dtype == torch.float64 else torch.float32)
    sizes = map(_pair, (pool.kernel_size, pool.stride, pool.padding))
    window = (*sizes, pool.ceil_mode, pool.count_include_pad, pool.divisor_override)
    return _AveragePooledNorm.apply(x, norm.weight, norm.bias, mean, var, (norm.training, norm.eps), window)


def _plain(
    pool: Callable[[Tensor], Tensor],
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> Tensor:
    """Return the plain form, by the statistics of x if ``mean`` is ``None``."""
    if mean is not None:
        scale, shift = scale.to(mean.dtype), shift.to(mean.dtype)
    return pool(F.batch_norm(x, mean, var, scale, shift, mean is None, 0.0, eps).relu())


class _MaxPooledNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor, eps: float, window: Any
    ) -> Tensor:
        factor = scale * FixedNorm(mean, var, scale, shift, eps).inverse_std()
        positive = bool((factor > 0).all())
        signed = x if positive else x * factor.sign()[:, None, None]
        out, indices = F.max_pool2d(signed, *window, return_indices=True)
        out.mul_(factor.abs()[:, None, None]).add_((shift - mean * factor)[:, None, None]).relu_()
        ctx.save_for_backward(x, scale, shift, mean, var, indices.int(), out)  # half the size of torch's indices
        ctx.eps, ctx.window = eps, window
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, scale, shift, mean, var, indices, out = ctx.saved_tensors
        needs, rest = ctx.needs_input_grad[:3], (None,) * 4
        if needs_plain_gradients(gradient):
            plain = partial(_plain, partial(_max_pool, ctx.window), None, None, ctx.eps)
            return *plain_gradients(plain, (x, scale, shift), gradient, needs), *rest
        indices, invstd = indices.long(), FixedNorm(mean, var, scale, shift, ctx.eps).inverse_std()
        g = torch.ops.aten.threshold_backward(gradient, out, 0)
        centred = x.flatten(2).gather(2, indices.flatten(2)).view_as(g) - mean[:, None, None]
        scale_gradient, shift_gradient = centred.mul_(g).sum((0, 2, 3)) * invstd, g.sum((0, 2, 3))
        del centred
        if not ctx.needs_input_grad[0]:
            return None, scale_gradient, shift_gradient, *rest
        factor = scale * invstd
        dx = torch.ops.aten.max_pool2d_with_indices_backward(g.mul_(factor[:, None, None]), x, *ctx.window, indices)
        # The gradient of the statistics is f/n (Σ g + x̂ Σ g x̂), which is a normalisation of x.
        share = factor / (x.numel() // x.shape[1])
        slope, one = share * scale_gradient * invstd, torch.ones_like(mean)
        dx -= F.batch_norm(x, mean, one, slope, share * shift_gradient, False, 0.0, 0.0)
        return dx, scale_gradient, shift_gradient, *rest


class _AveragePooledNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor, norm: Any, window: Any
    ) -> Tensor:
        ctx.save_for_backward(x, scale, shift, mean, var)
        (ctx.training, ctx.eps), ctx.window = norm, window
        y = F.batch_norm(x, mean, var, scale.to(mean.dtype), shift.to(mean.dtype), False, 0.0, ctx.eps).relu_()
        return F.avg_pool2d(y, *window)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, scale, shift, mean, var = ctx.saved_tensors
        needs, rest = ctx.needs_input_grad[:3], (None,) * 4
        if needs_plain_gradients(gradient):
            statistics = (None, None) if ctx.training else (mean, var)
            plain = partial(_plain, partial(_average_pool, ctx.window), statistics[0], statistics[1], ctx.eps)
            return *plain_gradients(plain, (x, scale, shift), gradient, needs), *rest
        scale, shift = scale.to(mean.dtype), shift.to(mean.dtype)
        y = F.batch_norm(x, mean, var, scale, shift, False, 0.0, ctx.eps)
        g = torch.ops.aten.avg_pool2d_backward(gradient, y, *ctx.window)
        g = torch.ops.aten.threshold_backward(g, y, 0)
        invstd = FixedNorm(mean, var, scale, shift, ctx.eps).inverse_std()
        gradients = torch.ops.aten.native_batch_norm_backward(
            g, x, scale, mean, var, mean, invstd, ctx.training, ctx.eps, list(needs)
        )
        return *(gradient if need else None for gradient, need in zip(gradients, needs)), *rest


def _max_pool(window: Any, x: Tensor) -> Tensor:
    return F.max_pool2d(x, *window)


def _average_pool(window: Any, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, *window)


def _pair(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
