"""Batch normalisation in parts: its statistics, and what a pass in training does to the running ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["batch_statistics", "channel_sums", "running_statistics", "track"]


def channel_sums(x: Tensor) -> Tensor:
    """Return the sum of every channel of x, shape (batch, channels, height, width)."""
    return x.flatten(2).sum(2).sum(0) if _has_planes(x) else x.sum((0, 2, 3))  # planes are faster


def _has_planes(x: Tensor) -> bool:
    """Return True if x is made of contiguous images of one channel, as a slice of channels is."""
    return x.dim() == 4 and x.stride()[1:] == (x.shape[2] * x.shape[3], x.shape[3], 1)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every channel of x, shape (batch, channels, …).

    Of images on a CPU they are passes over x and over x − mean that are vectorised, which torch's own are not.

    Raises:
        ValueError: a channel has one value.
    """
    count = x.numel() // x.shape[1]
    if count == 1:
        raise ValueError(f"input of shape {tuple(x.shape)}: statistics of a batch need more than one value a channel")
    if x.device.type != "cpu" or not _has_planes(x):
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    mean = channel_sums(x) / count
    planes = torch.linalg.vector_norm((x - mean[:, None, None]).flatten(2), dim=2)
    return mean, planes.square_().sum(0) / count


def running_statistics(norm: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return copies of the running mean and variance, which may move before a backward pass."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.to(dtype, copy=True), norm.running_var.to(dtype, copy=True)


def track(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Move running statistics towards the statistics of a batch of ``count`` values a channel, as ``norm`` would.

    A normalisation with ``track_running_stats=False``, or without running statistics, is left as it is.
    """
    if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    assert norm.momentum is not None
    # data: what autograd keeps of a normalisation are other tensors.
    norm.running_mean.data.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.data.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)
