"""Short heavy-ball stages of bottlenecks without their iterates, for evaluation."""

from typing import Any, List, Optional, Sequence

import torch
from torch import Tensor, nn

from ..strides import subsample
from .folding import fold

__all__ = ["StreamFreeStage", "stream_free"]

# In longer stages the convolutions of all sources cost more than the iterates; larger multiples would lose digits.
MAX_STEPS, MAX_MULTIPLE = 6, 4.0


class StreamFreeStage(nn.Module):
    """A heavy-ball stage (16) of bottlenecks without x_1, …, x_{K−1}.

    T_k(x_k) = W_k y_k + b_k, with y_k the bottleneck's narrow output. So every x_k is a sum of multiples of S(u) and of
    T_j(x_j), j < k, and the first convolution of T_k is a convolution of u, y_0, …, y_{k−1}. With β1 = 1, β2 = −1 a
    third of the multiples is 0.

    Args:
        stride: the stage's stride, applied to u before anything else.
        shrink: the part of S before its convolution, which brings u to the stage's size.
        first: maps u to y_0.
        mixes: the first convolutions of T_1, …, and the convolution that computes x_K.
        sources: for each of these, the positions of its inputs in u, y_0, y_1, ….
        tails: map the first convolution of T_k to y_k, k ≥ 1.
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
        self.sources = [list(positions) for positions in sources]

    def forward(self, u: Tensor) -> Tensor:
        """Return the last x, shape (batch, channels, height / stride, width / stride)."""
        return self.read_by(1, u, self.stride)

    def read_by(self, next_stride: int, u: Tensor, stride: int) -> Tensor:
        """Return every ``next_stride``-th row and column of the last x.

        Args:
            next_stride: stride of the next stage.
            u: the input.
            stride: the part of this stage's stride that is not applied to u yet.
        """
        u = subsample(u, stride)
        narrow = [self.shrink(u), self.first(u)]
        for k, (mix, tail) in enumerate(zip(self.mixes, self.tails)):
            inputs = [narrow[i] for i in self.sources[k]]
            if k == len(self.mixes) - 1:
                inputs = [x[:, :, ::next_stride, ::next_stride] for x in inputs]
            narrow.append(tail(mix(torch.cat(inputs, 1))))
        return narrow[-1]


def _shrink(downsample: Any, conv: nn.Conv2d) -> Optional[nn.Module]:
    """Return a shortcut up to its 1×1 convolution; ``None`` for other convolutions."""
    if conv.kernel_size != (1, 1) or conv.padding != (0, 0) or conv.groups != 1:
        return None
    stride = conv.stride[0]
    before = list(downsample)[:-2]
    return nn.Sequential(*before, *([nn.AvgPool2d(1, stride)] if stride > 1 else []))


def _convolution(weight: Tensor, bias: Tensor, like: nn.Conv2d) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, device="meta")
    conv.weight, conv.bias = (nn.Parameter(x.to(like.weight)) for x in (weight[:, :, None, None], bias))
    return conv.train(like.training)


def _multiples(steps: int, beta1: Sequence[float], beta2: Sequence[float]) -> Tensor:
    """Return x_0, …, x_K of (16) as multiples of S(u), T_0, …."""
    rows = torch.zeros(steps + 1, steps + 1, dtype=torch.float64)
    rows[0, 0] = rows[1, 0] = rows[1, 1] = 1
    for k in range(1, steps):
        rows[k + 1] = beta1[k - 1] * rows[k] + beta2[k - 1] * rows[k - 1]
        rows[k + 1, k + 1] += 1
    return rows


def stream_free(stage: Any) -> Optional[StreamFreeStage]:
    """Return a stage without its iterates; ``None`` if unsupported."""
    transforms = list(stage)
    steps, shortcut = len(transforms), transforms[0].downsample
    is_plain = all(T.se is None and all(isinstance(m, nn.Identity) for m in (T.aa, T.act3)) for T in transforms)
    if not 1 < steps <= MAX_STEPS or not is_plain or not isinstance(shortcut, nn.Sequential):
        return None
    pairs = [
        (shortcut[-2], shortcut[-1]),
        *((T.conv3, T.bn3) for T in transforms),
        *((T.conv1, T.bn1) for T in transforms),
    ]
    folded = [fold(conv, norm) for conv, norm in pairs]
    convolutions = [conv for conv in folded if conv is not None]
    shrink = _shrink(shortcut, convolutions[0]) if len(convolutions) == len(folded) else None
    if shrink is None:
        return None
    wide, narrow = convolutions[: steps + 1], convolutions[steps + 1 :]
    if any(conv.kernel_size != (1, 1) or conv.stride != (1, 1) for conv in [*wide[1:], *narrow[1:]]):
        return None
    betas = [
        [float(b) for b in beta] if isinstance(beta, Tensor) else [beta] * steps for beta in (stage.beta1, stage.beta2)
    ]
    rows = _multiples(steps, *betas)
    if rows.abs().max() > MAX_MULTIPLE:
        return None
    mixes, sources = [], []
    for k in range(1, steps + 1):
        # Learned coefficients that are 0 may be others in the next checkpoint: shapes must not depend on them.
        used = [i for i in range(k + 1) if stage.learn_beta or rows[k, i] != 0]
        weight = torch.cat([rows[k, i] * wide[i].weight.detach().double().flatten(1) for i in used], 1)
        bias = torch.stack([rows[k, i] * wide[i].bias.detach().double() for i in used]).sum(0)  # type: ignore[union-attr]
        if k < steps:
            first = narrow[k].weight.detach().double().flatten(1)
            weight, bias = first @ weight, first @ bias + narrow[k].bias.detach().double()  # type: ignore[union-attr]
        mixes.append(_convolution(weight, bias, narrow[0]))
        sources.append(used)
    tails = [_tail(T) for T in transforms]
    return StreamFreeStage(stage.stride, shrink, nn.Sequential(narrow[0], tails[0]), mixes, sources, tails[1:])


def _tail(T: Any) -> nn.Module:
    """Return the part of T that maps its first convolution to y."""
    second = fold(T.conv2, T.bn2)
    layers = [T.conv2, T.bn2] if second is None else [second]
    return nn.Sequential(T.act1, *layers, T.act2)
