"""Networks for inference: normalisations folded into convolutions, short heavy-ball stages without their stream.

timm's ``reparameterize_model`` (``--reparam`` of its scripts) calls the ``fuse`` methods of modules. So does ``fuse``
of our models, which folds the stem, too.
"""

# No postponed annotations here: TorchScript reads the types of attributes from the class.

from itertools import pairwise
from typing import Any, List, Optional, Sequence

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from optinspired_plugins.operations import FactorizedReduce

from .strides import subsample

__all__ = [
    "ChannelClamp",
    "StreamFreeStage",
    "fold",
    "fold_all",
    "fold_before",
    "fold_into",
    "fold_shortcut",
    "stream_free",
]

# Beyond so many steps the convolutions of all sources cost more than the stream; larger factors would cost digits.
LONGEST, LARGEST = 6, 4.0


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


class StreamFreeStage(nn.Module):
    """A heavy-ball stage (16) of bottlenecks without x_1, …, x_{K−1}.

    With T_k(x_k) = W_k y_k + b_k, y_k the bottleneck's narrow output, every x_k is a sum of multiples of S(u) and of
    T_j(x_j), j < k, and the first convolution of T_k is one of the sources u, y_0, …, y_{k−1}. With β1 = 1, β2 = −1 a
    third of the multiples is 0.

    Args:
        stride: the stage's, of u before anything else.
        shrink: what brings u to the stage's size for S.
        first: y_0 from u.
        mixes: the first convolutions of T_1, …, and the one that gives x_K.
        sources: which of u, y_0, y_1, … each takes.
        tails: y_k from the first convolution of T_k, k ≥ 1.
    """

    sources: List[List[int]]

    def __init__(
        self,
        stride: int,
        shrink: nn.Module,
        first: nn.Module,
        mixes: Sequence[nn.Module],
        sources: Sequence[Sequence[int]],
        tails: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.stride, self.shrink, self.first = stride, shrink, first
        self.mixes, self.tails = nn.ModuleList(mixes), nn.ModuleList([*tails, nn.Identity()])
        self.sources = [list(own) for own in sources]

    def forward(self, u: Tensor) -> Tensor:
        """Return the last x, shape (batch, channels, height / stride, width / stride)."""
        return self.read_by(1, u, self.stride)

    def read_by(self, next_stride: int, u: Tensor, stride: int) -> Tensor:
        """Return every ``next_stride``-th row and column of the last x, if ``stride`` is left of the stage's."""
        u = subsample(u, stride)
        narrow = [self.shrink(u), self.first(u)]
        for k, (mix, tail) in enumerate(zip(self.mixes, self.tails)):
            own = [narrow[i] for i in self.sources[k]]
            if k == len(self.mixes) - 1:
                own = [x[:, :, ::next_stride, ::next_stride] for x in own]
            narrow.append(tail(mix(torch.cat(own, 1))))
        return narrow[-1]


def _shrink(downsample: Any, conv: nn.Conv2d) -> Optional[nn.Module]:
    """What a shortcut does before its 1×1 convolution, with the convolution's stride; ``None`` if it is not one."""
    if conv.kernel_size != (1, 1) or conv.padding != (0, 0) or conv.groups != 1:
        return None
    stride = conv.stride[0]
    before = list(downsample)[:-2]
    return nn.Sequential(*before, *([nn.AvgPool2d(1, stride)] if stride > 1 else []))


def _convolution(weight: Tensor, bias: Tensor, like: nn.Conv2d) -> nn.Conv2d:
    made = nn.Conv2d(weight.shape[1], weight.shape[0], 1, device="meta")
    made.weight, made.bias = (nn.Parameter(x.to(like.weight)) for x in (weight[:, :, None, None], bias))
    return made.train(like.training)


def _multiples(steps: int, beta1: Sequence[float], beta2: Sequence[float]) -> Tensor:
    """Rows x_0, …, x_K of (16) in terms of S(u), T_0, …, T_{K−1}."""
    rows = torch.zeros(steps + 1, steps + 1, dtype=torch.float64)
    rows[0, 0] = rows[1, 0] = rows[1, 1] = 1
    for k in range(1, steps):
        rows[k + 1] = beta1[k - 1] * rows[k] + beta2[k - 1] * rows[k - 1]
        rows[k + 1, k + 1] += 1
    return rows


def stream_free(stage: Any) -> Optional[StreamFreeStage]:
    """Return a stage without its stream; ``None`` where it is too long, or its layers are not convolutions alone."""
    transforms = list(stage)
    steps, shortcut = len(transforms), transforms[0].downsample
    plain = all(T.se is None and isinstance(T.aa, nn.Identity) and isinstance(T.act3, nn.Identity) for T in transforms)
    if not 1 < steps <= LONGEST or not plain or not isinstance(shortcut, nn.Sequential):
        return None
    pairs = [
        (shortcut[-2], shortcut[-1]),
        *((T.conv3, T.bn3) for T in transforms),
        *((T.conv1, T.bn1) for T in transforms),
    ]
    folded = [fold(conv, norm) for conv, norm in pairs]
    known = [conv for conv in folded if conv is not None]
    shrink = _shrink(shortcut, known[0]) if len(known) == len(folded) else None
    if shrink is None:
        return None
    wide, narrow = known[: steps + 1], known[steps + 1 :]
    if any(conv.kernel_size != (1, 1) or conv.stride != (1, 1) for conv in [*wide[1:], *narrow[1:]]):
        return None
    betas = [
        [float(b) for b in beta] if isinstance(beta, Tensor) else [beta] * steps for beta in (stage.beta1, stage.beta2)
    ]
    rows = _multiples(steps, *betas)
    if rows.abs().max() > LARGEST:
        return None
    mixes, sources = [], []
    for k in range(1, steps + 1):
        # Learned coefficients that are 0 today are not so in the next checkpoint: shapes do not depend on them.
        used = [i for i in range(k + 1) if stage.learn_beta or rows[k, i] != 0]
        weight = torch.cat([rows[k, i] * wide[i].weight.detach().double().flatten(1) for i in used], 1)
        bias = torch.stack([rows[k, i] * wide[i].bias.detach().double() for i in used]).sum(0)  # type: ignore[union-attr]
        if k < steps:
            own = narrow[k].weight.detach().double().flatten(1)
            weight, bias = own @ weight, own @ bias + narrow[k].bias.detach().double()  # type: ignore[union-attr]
        mixes.append(_convolution(weight, bias, narrow[0]))
        sources.append(used)
    tails = [_tail(T) for T in transforms]
    return StreamFreeStage(stage.stride, shrink, nn.Sequential(narrow[0], tails[0]), mixes, sources, tails[1:])


def _tail(T: Any) -> nn.Module:
    """Y from the first convolution: activation, second convolution, activation."""
    second = fold(T.conv2, T.bn2)
    layers = [T.conv2, T.bn2] if second is None else [second]
    return nn.Sequential(T.act1, *layers, T.act2)
