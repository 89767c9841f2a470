"""Operations of several edges from one state as one operation with more channels.

A supernet has several convolutions of each kind that read the same state, and a GPU is idle between small kernels. So E
operations on C channels run as one, whose convolutions have E times the groups and E · C channels. Parameters and
statistics of all operations are concatenated with one launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Group", "Statistics", "is_plain", "kind_of", "run_groups"]

_ATTRIBUTES = ("kernel_size", "stride", "padding", "dilation", "groups", "num_features", "eps", "momentum")


class Group(NamedTuple):
    """Operations of one :func:`kind_of`, and the weight of each, a tensor with one value."""

    operations: Sequence[Any]
    weights: Sequence[Tensor]


def kind_of(operation: nn.Module) -> Optional[tuple[Any, ...]]:
    """Return a value that is equal for operations that can run as one, ``None`` if an operation cannot.

    It can if it is a sequence of rectifications, convolutions and plain normalisations that begins with a rectification
    and ends with a normalisation.
    """
    layers: list[Any] = list(operation) if type(operation) is nn.Sequential else []
    if not layers or type(layers[0]) is not nn.ReLU or type(layers[-1]) is not nn.BatchNorm2d:
        return None
    if not all(map(_is_known, layers)):
        return None
    return tuple((type(layer), layer.training, *(getattr(layer, a, None) for a in _ATTRIBUTES)) for layer in layers)


def _is_known(layer: Any) -> bool:
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if type(layer) is nn.Conv2d:
        return layer.bias is None and layer.padding_mode == "zeros"
    return type(layer) is nn.ReLU or is_plain(layer)


def is_plain(norm: nn.Module) -> bool:
    """Return True for a normalisation without scale and shift, with a moving average of its statistics."""
    return type(norm) is nn.BatchNorm2d and not norm.affine and norm.track_running_stats and norm.momentum is not None


class Statistics:
    """New running statistics of normalisations, written with two launches."""

    def __init__(self) -> None:
        self._old: list[Tensor] = []
        self._new: list[Tensor] = []
        self._counts: list[Tensor] = []

    def set(self, norm: Any, mean: Tensor, var: Tensor) -> None:
        """Remember the running statistics of a normalisation after one more batch."""
        # data: the gradient of an earlier pass may still be due
        self._old += [norm.running_mean.data, norm.running_var.data]
        self._new += [mean, var]
        self._counts.append(norm.num_batches_tracked.data)

    def write(self) -> None:
        """Write them, and count the batch."""
        if self._old:
            torch._foreach_copy_(self._old, self._new)
            torch._foreach_add_(self._counts, 1)


def run_groups(groups: Sequence[Group], x: Tensor, statistics: Statistics) -> list[Tensor]:
    """Return the weighted outputs of each group, concatenated along channels.

    Args:
        groups: the groups; their operations keep the number of channels.
        x: the rectified state, shape (batch, channels, height, width).
        statistics: gets the new running statistics.
    """
    layers = [[*zip(*group.operations)][1:] for group in groups]
    scales = torch.stack([w for group in groups for w in group.weights])[:, None].expand(-1, x.shape[1])
    parameters = _Parameters([same for group in layers for same in group])
    copies, outputs = {1: x}, []
    for group, scale in zip(layers, scales.split([len(group.weights) for group in groups])):
        count = len(scale)
        if count not in copies:
            copies[count] = torch.cat([x] * count, 1)
        y = copies[count]
        for same in group:
            if type(same[0]) is nn.ReLU:
                y = F.relu(y)
            elif type(same[0]) is nn.Conv2d:
                y = parameters.convolve(same, y)
            else:
                y = parameters.normalize(same, y, scale.flatten() if same is group[-1] else None, statistics)
        outputs.append(y)
    return outputs


class _Parameters:
    """Concatenated parameters and statistics of layers of one kind, used in the order of the layers."""

    def __init__(self, layers: Sequence[Sequence[Any]]) -> None:
        norms = [same for same in layers if type(same[0]) is nn.BatchNorm2d]
        self._kernels = _slices([[c.weight for c in same] for same in layers if type(same[0]) is nn.Conv2d])
        self._means = _slices([[norm.running_mean for norm in same] for same in norms])
        self._variances = _slices([[norm.running_var for norm in same] for same in norms])

    def convolve(self, convs: Sequence[nn.Conv2d], x: Tensor) -> Tensor:
        conv, weight = convs[0], next(self._kernels).view(-1, *convs[0].weight.shape[1:])
        return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, len(convs) * conv.groups)

    def normalize(self, norms: Sequence[Any], x: Tensor, scale: Optional[Tensor], statistics: Statistics) -> Tensor:
        norm, mean, var = norms[0], next(self._means), next(self._variances)
        y = F.batch_norm(x, mean, var, scale, None, norm.training, norm.momentum, norm.eps)
        if norm.training:
            for each, *moments in zip(norms, mean.chunk(len(norms)), var.chunk(len(norms))):
                statistics.set(each, *moments)
        return y


def _slices(groups: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """Yield the concatenation of each group, a slice of the concatenation of all."""
    sizes = [sum(x.numel() for x in group) for group in groups]
    return iter(torch.cat([x.flatten() for group in groups for x in group]).split(sizes))
