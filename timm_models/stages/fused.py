"""Heavy-ball stages as one function with few kernels: the conditions, and the parameters that it reads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from optinspired_plugins.memory.channel_kernels import RunningStatistics
from optinspired_plugins.memory.fused_stage import ConvNorm, kernels_for

from .transforms import BasicTransform, BottleneckTransform
from .unmodified import fits, is_plain_norm, is_unmodified, is_unmodified_inside

__all__ = ["WORTHWHILE", "conv_norm", "count_batches", "fused_parts", "norms_of"]


# Elements of an iterate from which a pass over it takes a GPU at least as long as a launch takes the host.
WORTHWHILE = 2**25


def fused_parts(
    transforms: list[Any], u: Tensor, saves_memory: bool
) -> tuple[list[list[ConvNorm]], ConvNorm | None] | None:
    """Return the transforms and the shortcut in parts; ``None`` if modules are faster or compute something else.

    The shortcut is ``None``, too, unless it is a convolution with a normalisation.

    Args:
        transforms: T_0, T_1, ….
        u: input of the stage.
        saves_memory: the backward pass recomputes tensors; then modules are slower at every size.
    """
    if kernels_for(u) is None or not all(_is_supported(T, u) for T in transforms):
        return None
    strides = math.prod(stride for conv, _ in _pairs(transforms[0]) for stride in conv.stride)
    elements = u.numel() // u.shape[1] // strides * transforms[0].last_norm().num_features
    if not saves_memory and elements < WORTHWHILE:
        return None
    shortcut = transforms[0].downsample
    is_pair = isinstance(shortcut, nn.Sequential) and len(shortcut) == 2 and is_unmodified(shortcut, nn.Sequential)
    pair = conv_norm(*shortcut) if is_pair and _is_supported_pair(shortcut[0], shortcut[1], u) else None
    return [[conv_norm(*pair) for pair in _pairs(T)] for T in transforms], pair


def norms_of(transforms: list[Any], shortcut: ConvNorm | None) -> list[nn.Module]:
    """Return the normalisations of a stage; the shortcut's if ``shortcut`` has its parts."""
    return [norm for T in transforms for _, norm in _pairs(T)] + ([transforms[0].downsample[1]] if shortcut else [])


def count_batches(norms: list[Any]) -> None:
    """Add 1 to the batches that normalisations in training have seen."""
    counters = [norm.num_batches_tracked for norm in norms if norm.training and norm.track_running_stats]
    if counters := [counter for counter in counters if counter is not None]:
        torch._foreach_add_(counters, 1)


def _pairs(T: Any) -> list[tuple[Any, Any]]:
    return [(T.conv1, T.bn1), (T.conv2, T.bn2), *([(T.conv3, T.bn3)] if type(T) is BottleneckTransform else [])]


def _is_supported(T: Any, u: Tensor) -> bool:
    if type(T) not in (BasicTransform, BottleneckTransform) or not is_unmodified_inside(T) or T.is_activated():
        return False
    acts = [T.act1, T.act2] if type(T) is BottleneckTransform else [T.act1]
    rate = getattr(T.drop_path, "drop_prob", 0.0)
    return (
        all(is_unmodified(act, nn.ReLU) for act in acts)
        and is_unmodified(T.aa, nn.Identity)
        and is_unmodified(T.drop_block, nn.Identity)
        and T.se is None
        and not (rate and T.training)
        and all(_is_supported_pair(conv, norm, u) for conv, norm in _pairs(T))
    )


def _is_supported_pair(conv: Any, norm: Any, u: Tensor) -> bool:
    return (
        is_unmodified(conv, nn.Conv2d)
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
        and is_unmodified(norm, nn.BatchNorm2d)
        and is_plain_norm(norm, conv.out_channels, norm.training)
        and fits(u, conv.weight, *norm.parameters(), *norm.buffers())
    )


def conv_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> ConvNorm:
    """Return the parameters of a convolution and a normalisation."""
    running = None
    if (
        norm.running_mean is not None
        and norm.running_var is not None
        and (norm.track_running_stats or not norm.training)
    ):
        running = RunningStatistics(norm.running_mean, norm.running_var, float(norm.momentum or 0.0))
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return ConvNorm(conv.weight, norm.weight, norm.bias, geometry, norm.eps, running, norm.training)
