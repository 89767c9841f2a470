"""Blocks of DenseNet-shaped networks: layers that know no algorithm, and the Nesterov recurrence over them."""

from __future__ import annotations

from typing import List, Optional, Sequence

import torch
import torch.nn.functional as F
from timm.models import checkpoint
from torch import Tensor, nn

from optinspired_plugins.coefficients import momentum

__all__ = ["NesterovBlock", "SourceConv2d", "SourceLayer"]


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
        later = self.alpha[1:, None].expand(-1, self.growth).reshape(-1)
        alpha = torch.cat([self.alpha[:1].expand(self.first), later])
        weight = self.weight * alpha[:, None, None]
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


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
        return checkpoint(lambda *sources: self.mix(list(sources)), *zs)

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
        self.momentum: List[float] = momentum(len(layers)).tolist()

    def forward(self, z: Tensor) -> Tensor:
        """Return z_0, z_1, … concatenated, shape (batch, first + layers · growth, height, width)."""
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

    def extra_repr(self) -> str:
        """Name the coefficient."""
        return f"beta={self.beta}"
