"""Short heavy-ball stages of bottlenecks without the sequence of iterates, for evaluation."""

from typing import Any, List, Optional, Sequence

import torch
from torch import Tensor, nn

from ..strides import subsample
from .folding import fold

__all__ = ["StreamFreeStage", "stream_free"]

# Beyond so many steps the convolutions of all sources cost more than the stream; larger factors would cost digits.
LONGEST, LARGEST = 6, 4.0


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
