"""Batch normalisation in parts: statistics of a batch, running statistics, and the map by fixed statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "FixedNorm",
    "batch_statistics",
    "pass_statistics",
    "running_statistics",
    "track",
    "values_per_channel",
]


class FixedNorm(NamedTuple):
    """Batch normalisation by fixed statistics: norm(x) = weight · (x − mean) / √(var + eps) + bias.

    The statistics may have a wider dtype than weight and bias; results have the dtype of the statistics.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of_running(cls, norm: nn.BatchNorm2d, dtype: torch.dtype) -> FixedNorm:
        """Return the map of a normalisation in evaluation; a missing weight is 1 and a missing bias 0."""
        mean, var = running_statistics(norm, dtype)
        weight = torch.ones_like(mean) if norm.weight is None else norm.weight
        bias = torch.zeros_like(mean) if norm.bias is None else norm.bias
        return cls(mean, var, weight, bias, norm.eps)

    def inverse_std(self) -> Tensor:
        """Return 1 / √(var + eps)."""
        return (self.var + self.eps).rsqrt()

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return a and b of norm(x) = a x + b, each of shape (channels,)."""
        scale = self.weight.to(self.mean.dtype) * self.inverse_std()
        return scale, torch.addcmul(self.bias.to(self.mean.dtype), self.mean, scale, value=-1)


def values_per_channel(x: Tensor) -> int:
    """Return the number of values that a channel's statistics are made of; ValueError if there is only one."""
    count = x.numel() // x.shape[1]
    if count == 1:
        raise ValueError(f"input of shape {tuple(x.shape)}: statistics of a batch need more than one value a channel")
    return count


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every channel of x, shape (batch, channels, …).

    Raises:
        ValueError: a channel has one value.
    """
    values_per_channel(x)
    return torch.batch_norm_update_stats(x, None, None, 0.0)


def pass_statistics(norm: nn.BatchNorm2d, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return mean and variance by which a pass normalises x, and track them in training.

    Raises:
        ValueError: a channel of x has one value, in training.
    """
    if not norm.training:
        return running_statistics(norm, dtype)
    mean, var = batch_statistics(x.to(dtype))
    track(norm, mean, var, x.numel() // x.shape[1])
    return mean, var


def running_statistics(norm: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return copies of the running mean and variance, since these may change before a backward pass."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.to(dtype, copy=True), norm.running_var.to(dtype, copy=True)


def track(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Update running statistics by the statistics of a batch with ``count`` values per channel.

    A normalisation with ``track_running_stats=False``, or without running statistics, does not change.
    """
    if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    assert norm.momentum is not None
    # data: autograd saves other tensors of a normalisation.
    norm.running_mean.data.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.data.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)
