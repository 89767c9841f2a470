"""Blocks of DenseNet-shaped networks: layers that know no algorithm, and the Nesterov recurrence over them."""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, List, Optional, Sequence

import torch
import torch.nn.functional as F
from timm.models.densenet import DenseTransition
from torch import Tensor, nn

from optinspired_plugins.coefficients import momentum
from optinspired_plugins.dense_memory import DenseLayer, dense_block, infer, rectified_norm
from optinspired_plugins.memory import recompute

from ._fusible import is_eager, is_fusible_norm, is_plain
from .fusion import ChannelClamp, fold_alpha, fold_before, fold_into

__all__ = ["NesterovBlock", "PooledTransition", "SourceConv2d", "SourceLayer", "Transition"]


class SourceConv2d(nn.Conv2d):
    """A convolution of concatenated sources z_0, …, z_k that scales the contribution of source j by α_j.

    It computes Σ_j α_j W_j ∗ z_j, with W_j the columns of the weight that belong to source j, as one convolution: α is
    folded into the weight. ``alpha`` is a parameter of shape (sources,) and starts at 1.

    Args:
        conv: the convolution whose weight and settings to take over.
        growth: channels of every source but z_0.
        sources: number of sources, k + 1.
    """

    def __init__(self, conv: nn.Conv2d, growth: int, sources: int) -> None:
        device = torch.device("meta")  # takes over conv's parameters, allocates none
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            bias=conv.bias is not None,
            device=device,
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.first, self.growth = conv.in_channels - (sources - 1) * growth, growth
        self.training = conv.training
        self.alpha = nn.Parameter(torch.ones(sources, device=conv.weight.device, dtype=conv.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return Σ_j α_j W_j ∗ z_j for x the concatenation of the sources along channels."""
        return F.conv2d(x, self.folded(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def folded(self) -> Tensor:
        """Return α_j W_j, the weight with α folded in."""
        later = self.alpha[1:, None].expand(-1, self.growth).reshape(-1)
        alpha = torch.cat([self.alpha[:1].expand(self.first), later])
        return self.weight * alpha[:, None, None]


class SourceLayer(nn.Module):
    """DenseNet's composite layer over a list of sources: norm, act, conv and, with a bottleneck, norm, act, conv.

    Args:
        norm1: normalisation with activation, of all sources.
        conv1: first convolution.
        norm2: normalisation with activation after it; ``None`` without a bottleneck.
        conv2: second convolution; likewise.
        drop_rate: dropout of the output.
        grad_checkpointing: recompute up to the first convolution in the backward.
    """

    def __init__(
        self,
        norm1: nn.Module,
        conv1: nn.Conv2d,
        norm2: Optional[nn.Module] = None,
        conv2: Optional[nn.Conv2d] = None,
        drop_rate: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = norm1
        self.conv1 = conv1
        self.norm2 = norm2 or nn.Identity()
        self.conv2 = conv2 or nn.Identity()
        self.growth = (conv2 or conv1).out_channels
        self.drop_rate = float(drop_rate)
        self.grad_checkpointing = grad_checkpointing

    def mix(self, zs: List[Tensor]) -> Tensor:
        """Return the first convolution of all sources, shape (batch, channels, height, width)."""
        return self.conv1(self.norm1(torch.cat(zs, 1)))

    @torch.jit.ignore
    def _checkpointed_mix(self, zs: List[Tensor]) -> Tensor:
        return recompute(self, lambda *sources: self.mix(list(sources)), *zs)

    def forward(self, zs: List[Tensor]) -> Tensor:
        """Return T of the sources, shape (batch, growth, height, width)."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            mixed = self._checkpointed_mix(zs)
        else:
            mixed = self.mix(zs)
        z = self.conv2(self.norm2(mixed))
        if self.drop_rate > 0:
            z = F.dropout(z, p=self.drop_rate, training=self.training)
        return z


class Transition(DenseTransition):
    """DenseNet's transition, which can be fused."""

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> Transition:
        """Fold the normalisation into the convolution, but for a bound, for evaluation."""
        fold_before(self, "norm", "conv")
        return self


class PooledTransition(Transition):
    """DenseNet's transition with the average pooling before the 1×1 convolution: they commute.

    That saves three quarters of the multiplications. What is pooled is computed again in the backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return shape (batch, channels, ⌊height / 2⌋, ⌊width / 2⌋)."""
        if not torch.jit.is_scripting():
            return self.conv(self._pooled(x))
        return self.conv(self.pool(self.norm(x)))

    @torch.jit.ignore
    def _pooled(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and is_eager(x):
            return recompute(self.norm, lambda y: self.pool(self.norm(y)), x)
        return self.pool(self.norm(x))


class NesterovBlock(nn.ModuleDict):
    """A block that propagates by the Nesterov rule (21) and returns the concatenation of z_0, z_1, ….

    The h-term needs no sum: m_{k+1} = z_k − Σ_j h_{k+1,j} z_j obeys m_1 = 0 and m_{k+1} = c_k (m_k − z_k) with
    c_k = θ_{k+1} (1 − θ_k) / θ_k, so z_0, whose width differs, never enters. The plain form is
    :func:`optinspired_plugins.propagation.nesterov`.

    Args:
        layers: T_1, T_2, …; each maps the list of all sources so far to the next.
        beta: β, finite.
    """

    def __init__(self, layers: Sequence[nn.Module], beta: float = 0.1) -> None:
        super().__init__({f"denselayer{k + 1}": layer for k, layer in enumerate(layers)})
        self.beta = beta
        self.growth = int(layers[0].growth)  # type: ignore[arg-type]
        self.momentum: List[float] = momentum(len(layers)).tolist()

    def forward(self, z: Tensor) -> Tensor:
        """Return z_0, z_1, … concatenated, shape (batch, first + layers · growth, height, width)."""
        if not torch.jit.is_scripting():
            fused = self._fused(z)
            if fused is not None:
                return fused
        zs = [z]
        m = z  # stands for 0 until m_2
        for k, layer in enumerate(self.values()):
            z = layer(zs)
            if k > 0 and self.beta != 0:
                # m carries the factor β, which saves a multiplication a layer.
                m = -self.beta * zs[k] if k == 1 else torch.sub(m, zs[k], alpha=self.beta)
                m = m * self.momentum[k]
                z += m
            zs.append(z)
        return torch.cat(zs, 1)

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> NesterovBlock:
        """Fold α into the first convolutions, and both normalisations of a bottleneck, for evaluation.

        Without a bottleneck the one normalisation stays: the 3×3 convolution pads with what it gives.
        """
        for layer in self.values():
            if isinstance(layer, SourceLayer):
                fold_alpha(layer)
                fold_into(layer, "conv1", "norm2")
                fold_before(layer, "norm1", "conv1")
        return self

    @torch.jit.ignore
    def _fused(self, z: Tensor) -> Optional[Tensor]:
        """Return the same by one function; ``None`` where a layer is not as it was made, or a graph is wanted."""
        if not is_eager(z):
            return None
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(z.device.type):
            parts = [_inferred_layer(layer) for layer in self.values()]
            found = [part for part in parts if part is not None]
            if len(found) == len(parts):
                return infer(z, found, self.momentum, self.beta, self.growth)
        layers = [_fused_layer(layer) for layer in self.values()]
        known = [layer for layer in layers if layer is not None]
        if len(known) < len(layers) or len({layer.norm1.training for layer in known}) > 1:
            return None
        lean = any(bool(layer.grad_checkpointing) for layer in self.values())
        return dense_block(z, known, self.momentum, self.beta, lean)

    def extra_repr(self) -> str:
        """Name the coefficient."""
        return f"beta={self.beta}"


def _is_fusible_conv(conv: Any) -> bool:
    return (
        type(conv) in (nn.Conv2d, SourceConv2d)
        and conv.bias is None
        and conv.groups == 1
        and set(conv.stride) == set(conv.dilation) == {1}
        and isinstance(conv.padding, tuple)
        and all(2 * p + 1 == k for p, k in zip(conv.padding, conv.kernel_size))
        and conv.padding_mode == "zeros"
        and is_plain(conv)
    )


def _inferred_layer(layer: Any) -> Optional[Callable[[Tensor], Tensor]]:
    """Return a layer in evaluation as a function of the concatenation; ``None`` if somebody changed it."""
    if type(layer) is not SourceLayer or layer.training or not is_plain(layer):
        return None
    first: Callable[[Tensor], Tensor] = layer.norm1
    if is_fusible_norm(first, False):
        first = partial(rectified_norm, layer.norm1)  # type: ignore[arg-type]
    elif type(first) is not ChannelClamp:
        return None
    return lambda x: layer.conv2(layer.norm2(layer.conv1(first(x))))


def _fused_layer(layer: Any) -> Optional[DenseLayer]:
    """Return a layer as the fused form takes it; ``None`` if somebody replaced or hooked a part of it."""
    if type(layer) is not SourceLayer or not is_plain(layer):
        return None
    parts = 1 if isinstance(layer.norm2, nn.Identity) else 2
    norms: List[Any] = [layer.norm1, layer.norm2][:parts]
    convs: List[Any] = [layer.conv1, layer.conv2][:parts]
    fusible = all(is_fusible_norm(norm, layer.norm1.training) for norm in norms) and all(map(_is_fusible_conv, convs))
    if not fusible:
        return None
    weights = [conv.folded() if isinstance(conv, SourceConv2d) else conv.weight for conv in convs]
    second = (norms[1], weights[1]) if parts == 2 else (None, None)
    return DenseLayer(norms[0], weights[0], second[0], second[1], layer.drop_rate if layer.training else 0.0)
