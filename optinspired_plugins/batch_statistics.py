"""Statistics of a batch as batch normalisation takes them; on a CPU most of its time goes into them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["batch_statistics", "channel_sums", "move_running", "track"]


def channel_sums(x: Tensor) -> Tensor:
    """Return the sum of every channel of x, shape (batch, channels, height, width)."""
    return x.flatten(2).sum(2).sum(0) if x.is_contiguous() else x.sum((0, 2, 3))  # planes are faster


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every channel of x, shape (batch, channels, …).

    Of images on a CPU they are passes over x and over x − mean that are vectorised, which torch's own are not.

    Raises:
        ValueError: a channel has one value.
    """
    count = x.numel() // x.shape[1]
    if count == 1:
        raise ValueError(f"input of shape {tuple(x.shape)}: statistics of a batch need more than one value a channel")
    if x.device.type != "cpu" or x.dim() != 4 or not x.is_contiguous():
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    mean = channel_sums(x) / count
    planes = torch.linalg.vector_norm((x - mean[:, None, None]).flatten(2), dim=2)
    return mean, planes.square_().sum(0) / count


def track(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Count a batch of ``count`` values a channel, and move running statistics towards its own, as ``norm`` would."""
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked.add_(1)
    move_running(norm.running_mean, norm.running_var, mean, var, count, norm.momentum)


def move_running(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    """Move running statistics, of which there may be none, towards those of a batch of ``count`` values a channel."""
    # data: what autograd keeps of a normalisation are other tensors.
    if running_mean is not None:
        running_mean.data.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        running_var.data.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
