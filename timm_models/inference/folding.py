"""Networks for inference: normalisations folded into convolutions, short heavy-ball stages without their stream.

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

__all__ = [
    "ChannelClamp",
    "fold",
    "fold_all",
    "fold_before",
    "fold_into",
    "fold_shortcut",
]


def fold(conv: nn.Module, norm: nn.Module, channels: slice = slice(None)) -> Optional[nn.Conv2d]:
    """Return a convolution that computes norm(conv(x)) in evaluation; ``None`` where that is no convolution.

    Args:
        conv: the convolution.
        norm: the normalisation.
        channels: those of the normalisation that the convolution gives.
    """
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return None
    of_norm: Any = norm
    own = [None if p is None else p[channels] for p in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, own[0], own[1], of_norm.eps, own[2], own[3])  # type: ignore[arg-type]
    found = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        device="meta",
    )
    found.weight, found.bias = weight, bias
    return found.train(conv.training)


def fold_into(module: nn.Module, conv: str, norm: str) -> None:
    """Fold a child normalisation, plain or with an activation, into a child convolution."""
    before, after = getattr(module, conv), getattr(module, norm)
    found = fold(before, after)
    if found is not None:
        setattr(module, conv, found)
        setattr(module, norm, getattr(after, "act", nn.Identity()))


def fold_all(module: nn.Module) -> None:
    """Fold every normalisation of cells and their stems into the convolution, or the two convolutions, before it."""
    for part in list(module.modules()):
        if isinstance(part, FactorizedReduce):
            split = part.conv_1.out_channels
            first, second = fold(part.conv_1, part.bn, slice(split)), fold(part.conv_2, part.bn, slice(split, None))
            if first is not None and second is not None:
                part.conv_1, part.conv_2 = first, second
                part.bn = nn.Identity()  # type: ignore[assignment]
        elif isinstance(part, nn.Sequential):
            for conv, norm in pairwise(list(part._modules)):
                fold_into(part, conv, norm)


class ChannelClamp(nn.Module):
    """What is left of norm and ReLU in front of a 1×1 convolution: a bound for every channel.

    With factor f and offset o of a normalisation, max(f x + o, 0) = f · max(x, −o/f) + o for f > 0, and min in the
    place of max for f < 0; the convolution takes f and o. What it computes is a function of its buffers alone.

    Args:
        bound: −o/f, shape (channels,).
        below: where it is a lower bound; elsewhere it is an upper one.
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
        # Two passes, the second in place: torch.clamp with two tensors is not vectorised, and takes four times as long.
        return torch.maximum(x, self.lower.type_as(x)).clamp_(max=self.upper.type_as(x))


def fold_before(module: nn.Module, norm: str, conv: str) -> None:
    """Fold a child normalisation with a ReLU into the child 1×1 convolution behind it, but for a bound.

    An average pooling without padding may stand between them: it is linear, and its weights add up to 1.
    """
    before, after = getattr(module, norm), getattr(module, conv)
    plain = type(after) is nn.Conv2d and after.kernel_size == (1, 1) and after.padding == (0, 0) and after.groups == 1
    if (
        type(before) is not BatchNormAct2d
        or type(before.act) is not nn.ReLU
        or before.running_mean is None
        or not plain
    ):
        return
    factor = (before.weight.double() if before.affine else 1) * (before.running_var.double() + before.eps).rsqrt()
    offset = (before.bias.double() if before.affine else 0) - before.running_mean.double() * factor
    dead = factor == 0  # max(o, 0) whatever x is
    offset = torch.where(dead, offset.clamp(min=0), offset)
    bound = torch.where(dead, -torch.inf, -offset / factor)
    weight = after.weight.double()
    bias = weight.flatten(1) @ offset + (0 if after.bias is None else after.bias.double())
    like = after.weight.dtype
    setattr(module, norm, ChannelClamp(bound.to(like), (factor > 0) | dead).train(before.training))
    made = nn.Conv2d(after.in_channels, after.out_channels, 1, after.stride, device="meta")
    made.weight = nn.Parameter((weight * factor[:, None, None]).to(like))
    made.bias = nn.Parameter(bias.to(like))
    setattr(module, conv, made.train(after.training))


def fold_shortcut(block: Any) -> None:
    """Fold the normalisation that ends a block's shortcut."""
    shortcut = block.downsample
    if isinstance(shortcut, nn.Sequential) and len(shortcut) > 1:
        names = list(shortcut._modules)
        fold_into(shortcut, names[-2], names[-1])
