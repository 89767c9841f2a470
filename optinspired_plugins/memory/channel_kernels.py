"""Elementwise kernels over images with one scale and shift per channel, in plain torch.

:mod:`optinspired_plugins.memory.triton_kernels` has the same functions as one GPU kernel each.

An affine map is a tensor of shape (4, channels): scale a, shift b, mean and inverse standard deviation, so that batch
normalisation is y = a x + b. It is float32, or float64 for float64 images. Results of images have their dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Iterate",
    "RunningStatistics",
    "add",
    "affine_of",
    "dots",
    "gradient_of_input",
    "gradient_sums",
    "normalization",
    "rectified",
    "wide_dtype",
]


class Iterate(NamedTuple):
    """An image as the sum of two numbers of the same dtype, which has twice the digits.

    ``low`` is the rounding error of ``high``; it is ``None`` if one number is enough.
    """

    high: Tensor
    low: Tensor | None = None

    def wide(self) -> Tensor:
        """Return the sum in the dtype of statistics."""
        high = self.high.to(wide_dtype(self.high.dtype))
        return high if self.low is None else high + self.low


class RunningStatistics(NamedTuple):
    """Running statistics that a pass updates: ← (1 − momentum) · running + momentum · batch."""

    mean: Tensor
    var: Tensor
    momentum: float


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics: float64 of float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def affine_of(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Return the affine map of a batch normalisation with given statistics."""
    inverse_std = (var + eps).rsqrt()
    scale = weight.to(mean.dtype) * inverse_std
    return torch.stack([scale, bias.to(mean.dtype) - mean * scale, mean, inverse_std])


def normalization(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, running: RunningStatistics | None = None
) -> Tensor:
    """Return the affine map of a batch normalisation by the statistics of x, and update running statistics."""
    var, mean = torch.var_mean(x.to(wide_dtype(x.dtype)), (0, 2, 3), correction=0)
    if running is not None:
        count = x.numel() // x.shape[1]
        running.mean.lerp_(mean.to(running.mean.dtype), running.momentum)
        running.var.lerp_((var * (count / (count - 1))).to(running.var.dtype), running.momentum)
    return affine_of(weight, bias, mean, var, eps)


def rectified(x: Tensor, affine: Tensor) -> Tensor:
    """Return max(a x + b, 0)."""
    return _mapped(x, affine).relu_().to(x.dtype)


def add(
    factors: Sequence[float] | Tensor, x: Tensor, affine: Tensor | None, *iterates: Iterate, wide: bool = False
) -> Iterate:
    """Return f_0 (a x + b) + f_1 p + f_2 q, with p and q the iterates.

    Args:
        factors: f_0, f_1, f_2 as numbers or as a tensor of shape (3,); as many as there are terms.
        x: images.
        affine: a and b, by default 1 and 0.
        *iterates: none, one or two.
        wide: return a result with a low part, for images in half precision.
    """
    total = (x.to(wide_dtype(x.dtype)) if affine is None else _mapped(x, affine)) * factors[0]
    for factor, iterate in zip(factors[1:], iterates):
        total = total + factor * iterate.wide()
    high = total.to(x.dtype)
    return Iterate(high, (total - high).to(x.dtype) if wide and high.dtype != total.dtype else None)


def gradient_sums(g: Tensor, x: Tensor, affine: Tensor, rectify: bool, through_statistics: bool) -> tuple[Tensor, ...]:
    """Return the gradients of weight and bias, and the coefficients of :func:`gradient_of_input`.

    With m the mask of the ReLU, or 1, the gradients are Σ m g (x − mean) / std and Σ m g. The coefficients, shape
    (2, channels), are c and d of a m g + c x + d, the gradient of x.

    Args:
        g: gradient of the normalised and, with ``rectify``, rectified x.
        x: input of the normalisation.
        affine: its affine map.
        rectify: a ReLU follows.
        through_statistics: mean and variance are functions of x, not constants.
    """
    scale, _, mean, inverse_std = affine
    masked = _masked(g, x, affine, rectify)
    of_bias = masked.sum((0, 2, 3))
    centred = (masked * (x - mean[:, None, None])).sum((0, 2, 3)) / (x.numel() // x.shape[1])
    c = -scale * inverse_std.square() * centred
    d = -scale * of_bias / (x.numel() // x.shape[1]) - c * mean
    coefficients = torch.stack([c, d])
    of_weight = centred * inverse_std * (x.numel() // x.shape[1])
    return of_weight, of_bias, coefficients if through_statistics else torch.zeros_like(coefficients)


def gradient_of_input(g: Tensor, x: Tensor, affine: Tensor, coefficients: Tensor, rectify: bool) -> Tensor:
    """Return a m g + c x + d, the gradient of x."""
    c, d = coefficients[:, :, None, None]
    return (affine[0][:, None, None] * _masked(g, x, affine, rectify) + c * x + d).to(x.dtype)


def dots(g: Tensor, *iterates: Iterate) -> Tensor:
    """Return Σ g p for each iterate p, shape (iterates,)."""
    g = g.to(wide_dtype(g.dtype))
    return torch.stack([(g * p.wide()).sum() for p in iterates])


def _mapped(x: Tensor, affine: Tensor) -> Tensor:
    return affine[0][:, None, None] * x + affine[1][:, None, None]


def _masked(g: Tensor, x: Tensor, affine: Tensor, rectify: bool) -> Tensor:
    g = g.to(affine.dtype)
    return g * (_mapped(x, affine) > 0) if rectify else g
