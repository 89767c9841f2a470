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
    "Gradients",
    "Iterate",
    "RunningStatistics",
    "add",
    "affine_of",
    "affine_of_moments",
    "dots",
    "gradient_of_input",
    "gradient_sums",
    "moments",
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


def moments(x: Tensor, out: Tensor) -> None:
    """Write mean and Σ (x − mean)² of every channel to ``out``, shape (2, channels)."""
    var, mean = torch.var_mean(x.to(out.dtype), (0, 2, 3), correction=0)
    out[0], out[1] = mean, var * (x.numel() // x.shape[1])


def affine_of_moments(
    of: Tensor, count: int, weight: Tensor, bias: Tensor, eps: float, running: RunningStatistics | None = None
) -> Tensor:
    """Return the affine map of a batch normalisation by :func:`moments`, and update running statistics.

    Args:
        of: the moments.
        count: number of values per channel.
        weight: scale of the normalisation.
        bias: shift of the normalisation.
        eps: added to the variance.
        running: the statistics to update.
    """
    mean, var = of[0], of[1] / count
    if running is not None:
        running.mean.lerp_(mean.to(running.mean.dtype), running.momentum)
        running.var.lerp_((var * (count / (count - 1))).to(running.var.dtype), running.momentum)
    return affine_of(weight, bias, mean, var, eps)


def normalization(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, running: RunningStatistics | None = None
) -> Tensor:
    """Return the affine map of a batch normalisation by the statistics of x, and update running statistics."""
    of = torch.empty(2, x.shape[1], dtype=wide_dtype(x.dtype), device=x.device)
    moments(x, of)
    return affine_of_moments(of, x.numel() // x.shape[1], weight, bias, eps, running)


def rectified(x: Tensor, affine: Tensor, factor: Tensor | None = None) -> Tensor:
    """Return f max(a x + b, 0), with a factor f per channel, by default 1."""
    y = _mapped(x, affine).relu_()
    return (y if factor is None else y * factor[:, None, None]).to(x.dtype)


def add(
    factors: Sequence[float] | Tensor,
    x: Tensor,
    affine: Tensor | None,
    *iterates: Iterate,
    wide: bool = False,
    out: Iterate | None = None,
) -> Iterate:
    """Return f_0 (a x + b) + f_1 p + f_2 q, with p and q the iterates.

    Args:
        factors: f_0, f_1, f_2 as numbers or as a tensor of shape (3,); as many as there are terms.
        x: images.
        affine: a and b, by default 1 and 0; further rows are not read.
        *iterates: none, one or two.
        wide: return a result with a low part, for images in half precision.
        out: memory for the result, for instance a term's.
    """
    total = (x.to(wide_dtype(x.dtype)) if affine is None else _mapped(x, affine)) * factors[0]
    for factor, iterate in zip(factors[1:], iterates):
        total = total + factor * iterate.wide()
    high = total.to(x.dtype)
    low = (total - high).to(x.dtype) if wide and high.dtype != total.dtype else None
    if out is None:
        return Iterate(high, low)
    return Iterate(out.high.copy_(high), low if low is None or out.low is None else out.low.copy_(low))


class Gradients(NamedTuple):
    """Gradients of a normalisation: of weight, bias and factor; c and d of :func:`gradient_of_input`."""

    weight: Tensor
    bias: Tensor
    factor: Tensor
    coefficients: Tensor


def gradient_sums(
    g: Tensor,
    x: Tensor,
    affine: Tensor,
    rectify: bool,
    through_statistics: bool,
    factor: Tensor | None = None,
    total: Tensor | None = None,
) -> Gradients:
    """Return the gradients of y = f max(a x + b, 0), or y = a x + b, that are sums over all pixels.

    With m the mask of the ReLU, or 1, the gradients of weight, bias and f are f Σ m g (x − mean) / std, f Σ m g and
    Σ m g (a x + b). The gradient of x is a f m g + c x + d with c and d of shape (2, channels), 0 if the statistics are
    constants.

    Args:
        g: gradient of y.
        x: input of the normalisation.
        affine: its affine map.
        rectify: a ReLU follows.
        through_statistics: mean and variance are functions of x, not constants.
        factor: f, by default 1.
        total: c and d are added to it; it may have more channels.
    """
    scale, shift, mean, inverse_std = affine
    count = x.numel() // x.shape[1]
    masked = _masked(g, x, affine, rectify)
    sums = masked.sum((0, 2, 3))
    products = (masked * (x - mean[:, None, None])).sum((0, 2, 3))
    of_factor = scale * products + (scale * mean + shift) * sums
    if factor is not None:
        sums, products = factor * sums, factor * products
    c = -scale * inverse_std.square() * products / count
    d = -scale * sums / count - c * mean
    coefficients = torch.stack([c, d]) * float(through_statistics)
    if total is not None:
        total[:, : x.shape[1]] += coefficients
    return Gradients(products * inverse_std, sums, of_factor, coefficients)


def gradient_of_input(
    g: Tensor,
    x: Tensor,
    affine: Tensor,
    coefficients: Tensor | None,
    rectify: bool,
    factor: Tensor | None = None,
    into: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return a f m g + c x + d, the gradient of x, or add it to ``into``.

    See :func:`gradient_sums`. Without coefficients c = d = 0. ``out`` is memory for the result, for instance x.
    """
    scale = affine[0] if factor is None else affine[0] * factor
    result = scale[:, None, None] * _masked(g, x, affine, rectify)
    if coefficients is not None:
        result = result + coefficients[0][:, None, None] * x + coefficients[1][:, None, None]
    if into is not None:
        return into.add_(result.to(into.dtype))
    return result.to(x.dtype) if out is None else out.copy_(result)


def dots(g: Tensor, *iterates: Iterate) -> Tensor:
    """Return Σ g p for each iterate p, shape (iterates,)."""
    g = g.to(wide_dtype(g.dtype))
    return torch.stack([(g * p.wide()).sum() for p in iterates])


def _mapped(x: Tensor, affine: Tensor) -> Tensor:
    return affine[0][:, None, None] * x + affine[1][:, None, None]


def _masked(g: Tensor, x: Tensor, affine: Tensor, rectify: bool) -> Tensor:
    g = g.to(affine.dtype)
    return g * (_mapped(x, affine) > 0) if rectify else g
