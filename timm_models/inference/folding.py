"""Normalisations folded into convolutions, for inference.

timm's ``reparameterize_model`` (``--reparam`` of its scripts) calls the ``fuse`` methods of modules. So does ``fuse``
of our models, which folds the stem, too.
"""

from itertools import pairwise
from typing import Any, Optional

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from optinspired_plugins.cells.operations import FactorizedReduce
from optinspired_plugins.memory.batch_norm import FixedNorm

__all__ = ["ChannelClamp", "fold", "fold_all", "fold_before", "fold_into", "fold_shortcut"]


def fold(conv: nn.Module, norm: nn.Module, channels: slice = slice(None)) -> Optional[nn.Conv2d]:
    """Return a convolution that computes norm(conv(x)) in evaluation; ``None`` if there is none.

    Args:
        conv: the convolution.
        norm: the normalisation.
        channels: the channels of the normalisation that the convolution computes.
    """
    if type(conv) is not nn.Conv2d or not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return None
    if conv.padding_mode != "zeros":  # in an operation of a user's
        return None
    eps: Any = norm.eps
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, var, scale, shift = (None if p is None else p[channels] for p in tensors)
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, mean, var, eps, scale, shift)  # type: ignore[arg-type]
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        device="meta",
    )
    folded.weight, folded.bias = weight, bias
    return folded.train(conv.training)


def fold_into(module: nn.Module, conv: str, norm: str) -> None:
    """Fold a child normalisation, plain or with an activation, into a child convolution."""
    before, after = getattr(module, conv), getattr(module, norm)
    folded = fold(before, after)
    if folded is not None:
        setattr(module, conv, folded)
        setattr(module, norm, getattr(after, "act", nn.Identity()))


def fold_all(module: nn.Module) -> None:
    """Fold the normalisations of cells and stems."""
    for part in list(module.modules()):
        if isinstance(part, FactorizedReduce):
            split = part.conv_1.out_channels
            first, second = fold(part.conv_1, part.bn, slice(split)), fold(part.conv_2, part.bn, slice(split, None))
            if first is not None and second is not None:
                part.conv_1, part.conv_2 = first, second
                part.bn = nn.Identity()  # type: ignore[assignment]
        elif type(part) is nn.Sequential:  # another class may have another order
            for conv, norm in pairwise(list(part._modules)):
                fold_into(part, conv, norm)


class ChannelClamp(nn.Module):
    """The rest of norm and ReLU after folding: a bound per channel.

    With factor f and offset o of a normalisation, max(f x + o, 0) = f · max(x, −o/f) + o for f > 0, and min in the
    place of max for f < 0; the convolution takes f and o.

    Args:
        bound: −o/f, shape (channels,).
        below: True for a lower bound, False for an upper one, shape (channels,).
    """

    lower: Tensor
    upper: Tensor

    def __init__(self, bound: Tensor, below: Tensor) -> None:
        super().__init__()
        infinity = torch.full_like(bound, torch.inf)
        self.register_buffer("lower", torch.where(below, bound, -infinity)[:, None, None])
        self.register_buffer("upper", torch.where(below, infinity, bound)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Return the clamped x."""
        if isinstance(x, Tensor) and x.is_cuda:
            return torch.clamp(x, self.lower.type_as(x), self.upper.type_as(x))
        # Two passes, the second in place: on a CPU torch.clamp with two tensors takes four times as long.
        return torch.maximum(x, self.lower.type_as(x)).clamp_(max=self.upper.type_as(x))


def fold_before(module: nn.Module, norm: str, conv: str) -> None:
    """Fold norm and ReLU into the next 1×1 convolution.

    An average pooling without padding may stand between them: it is linear, and its weights add up to 1.
    """
    before, after = getattr(module, norm), getattr(module, conv)
    is_rectified = type(before) is BatchNormAct2d and type(before.act) is nn.ReLU and before.running_mean is not None
    is_pointwise = type(after) is nn.Conv2d and after.kernel_size == (1, 1) and after.padding == (0, 0)
    if not is_rectified or not is_pointwise or after.groups != 1:
        return
    factor, offset = FixedNorm.of_running(before, torch.float64).scale_and_shift()
    dead = factor == 0  # max(o, 0) whatever x is
    offset = torch.where(dead, offset.clamp(min=0), offset)
    bound = torch.where(dead, -torch.inf, -offset / factor)
    weight = after.weight.double()
    bias = weight.flatten(1) @ offset + (0 if after.bias is None else after.bias.double())
    like = after.weight.dtype
    setattr(module, norm, ChannelClamp(bound.to(like), (factor > 0) | dead).train(before.training))
    folded = nn.Conv2d(after.in_channels, after.out_channels, 1, after.stride, device="meta")
    folded.weight = nn.Parameter((weight * factor[:, None, None]).to(like))
    folded.bias = nn.Parameter(bias.to(like))
    setattr(module, conv, folded.train(after.training))


def fold_shortcut(block: Any) -> None:
    """Fold the last normalisation of a block's shortcut."""
    shortcut = block.downsample
    if isinstance(shortcut, nn.Sequential) and len(shortcut) > 1:
        names = list(shortcut._modules)
        fold_into(shortcut, names[-2], names[-1])
