"""Blocks of DenseNet-shaped networks: layers that know no algorithm, and the Nesterov recurrence over them."""

# No postponed annotations here: TorchScript reads the types of attributes from the class.

from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from timm.models.densenet import DenseTransition
from torch import Tensor, nn

from optinspired_plugins.algorithms.coefficients import momentum
from optinspired_plugins.memory.dense_block import DenseLayer, dense_block, dense_block_inference, rectified_norm
from optinspired_plugins.memory.eager import is_eager
from optinspired_plugins.memory.pooled_norm import average_pooled_norm
from optinspired_plugins.memory.recompute import recompute

from ..inference.folding import ChannelClamp, fold_before, fold_into
from .checkpoint_rules import Ruled
from .unmodified import fits, is_rectified_norm, is_same_size_convolution, is_unmodified

__all__ = ["NesterovBlock", "PooledTransition", "SourceLayer", "Transition"]


class SourceLayer(nn.Module):
    """DenseNet's composite layer over a list of sources: norm, act, conv and, with a bottleneck, norm, act, conv.

    With ``alpha``, a parameter of shape (sources,), the contribution of source z_j to the first convolution is scaled
    by α_j: Σ_j α_j W_j ∗ y_j, with W_j the columns of the weight that belong to source j, and y_j the source after norm
    and act. The convolution itself is an ordinary one: tools that quantise, adapt or prune convolutions find what they
    know.

    Args:
        norm1: normalisation with activation, of all sources.
        conv1: first convolution.
        norm2: normalisation with activation after it; ``None`` without a bottleneck.
        conv2: second convolution; ``None`` without a bottleneck.
        drop_rate: dropout of the output.
        grad_checkpointing: compute the first convolution again in the backward pass.
    """

    alpha: Optional[Tensor]

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
        self.register_parameter("alpha", None)
        self.sources = 0  # entries of α
        self.norm1 = norm1
        self.conv1 = conv1
        self.norm2 = norm2 or nn.Identity()
        self.conv2 = conv2 or nn.Identity()
        self.growth = (conv2 or conv1).out_channels
        self.drop_rate = float(drop_rate)
        self.grad_checkpointing = grad_checkpointing

    @torch.jit.ignore
    def learn_alpha(self, sources: int) -> None:
        """Add α for a number of sources, from 1."""
        weight = self.conv1.weight
        self.sources = sources
        self.alpha = nn.Parameter(torch.ones(sources, device=weight.device, dtype=weight.dtype))

    @torch.jit.ignore
    @torch.no_grad()
    def fold_alpha(self) -> "SourceLayer":
        """Fold α into the weight of the first convolution: the same function without α."""
        if self.alpha is not None:
            self.conv1.weight.copy_(self.folded_weight())
            self.alpha = None
        return self

    @torch.jit.ignore
    def folded_weight(self) -> Tensor:
        """Return α_j W_j, the weight of the first convolution with α in it."""
        weight = self.conv1.weight
        if self.alpha is None:
            return weight
        return weight * self._channel_alpha(self.alpha, weight.shape[1])[:, None, None]

    def _channel_alpha(self, alpha: Tensor, channels: int) -> Tensor:
        """Return α for each channel of the sources, shape (channels,)."""
        if self.sources == 1:  # ONNX cannot expand an empty slice
            return alpha.expand(channels)
        later = alpha[1:, None].expand(-1, self.growth).reshape(-1)
        return torch.cat([alpha[:1].expand(channels - later.shape[0]), later])

    def mix(self, zs: List[Tensor]) -> Tensor:
        """Return the first convolution of all sources, shape (batch, channels, height, width)."""
        y = self.norm1(torch.cat(zs, 1))
        alpha = self.alpha
        if alpha is not None:
            y = y * self._channel_alpha(alpha, y.shape[1]).to(y.dtype)[:, None, None]
        return self.conv1(y)

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

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        old = f"{prefix}conv1.alpha"  # its name in checkpoints of early versions
        if old in state_dict:
            state_dict[f"{prefix}alpha"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Transition(DenseTransition):
    """DenseNet's transition, which can be fused."""

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> "Transition":
        """Fold the normalisation into the convolution, but for a bound, for evaluation."""
        fold_before(self, "norm", "conv")
        return self


class PooledTransition(Transition):
    """DenseNet's transition with the average pooling before the 1×1 convolution: they commute.

    That saves three quarters of the multiplications. The image that is pooled is computed again in the backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return shape (batch, channels, ⌊height / 2⌋, ⌊width / 2⌋)."""
        if not torch.jit.is_scripting():
            return self.conv(self._pooled(x))
        return self.conv(self.pool(self.norm(x)))

    @torch.jit.ignore
    def _pooled(self, x: Tensor) -> Tensor:
        norm, pool = self.norm, self.pool
        may_stand_in = (
            torch.is_grad_enabled()
            and is_eager(x)
            and is_unmodified(pool, nn.AvgPool2d)
            and is_rectified_norm(norm, x.shape[1], norm.training)
            and fits(x, *norm.parameters(), *norm.buffers())
        )
        return average_pooled_norm(x, norm, pool) if may_stand_in else pool(norm(x))


class NesterovBlock(Ruled, nn.ModuleDict):
    """A block that propagates by the Nesterov rule (21) and returns the concatenation of z_0, z_1, ….

    The h-term needs no sum: m_{k+1} = z_k − Σ_j h_{k+1,j} z_j obeys m_1 = 0 and m_{k+1} = c_k (m_k − z_k) with
    c_k = θ_{k+1} (1 − θ_k) / θ_k, so z_0, whose width differs, never enters. The plain form is
    :func:`optinspired_plugins.propagation.rules.nesterov`.

    Args:
        layers: T_1, T_2, …; each maps the list of all sources so far to the next.
        beta: β, finite.
    """

    conversion, convertible = "timm_models.to_nesterov", ("beta",)

    def __init__(self, layers: Sequence[nn.Module], beta: float = 0.1) -> None:
        super().__init__({f"denselayer{k + 1}": layer for k, layer in enumerate(layers)})
        self.beta = beta
        self.growth = int(layers[0].growth)  # type: ignore[arg-type]
        self.momentum: List[float] = momentum(len(layers)).tolist()
        self.set_rule([beta if len(layers) > 1 else 0.0])  # m is 0 at the first layer

    def is_twin(self) -> bool:
        """Return True if timm's dense block computes the same from the same weights and α."""
        return self.rule_values == [0.0]

    def describe(self, values: Optional[Sequence[float]] = None) -> Dict[str, Any]:
        """Return a rule, by default the own, as arguments of the network."""
        return dict(beta=float(f"{(values or self.rule_values)[0]:.3g}"))

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
                z = z + m  # not in place: a hook may hold z
            zs.append(z)
        return torch.cat(zs, 1)

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> "NesterovBlock":
        """Fold α into the first convolutions, and both normalisations of a bottleneck, for evaluation.

        Without a bottleneck the one normalisation stays: the 3×3 convolution pads with what it gives.
        """
        for layer in self.values():
            if isinstance(layer, SourceLayer):
                layer.fold_alpha()
                fold_into(layer, "conv1", "norm2")
                fold_before(layer, "norm1", "conv1")
        return self

    @torch.jit.ignore
    def _fused(self, z: Tensor) -> Optional[Tensor]:
        """Return the same by one function; ``None`` where it may not stand in for the layers."""
        if not is_eager(z) or z.dim() != 4:
            return None
        layers, modules = list(self.values()), list(enumerate(self.values()))
        channels = [z.shape[1] + k * self.growth for k in range(len(layers))]
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(z.device.type):
            inferred = [_inferred_layer(layer, z, channels[k], self.growth) for k, layer in modules]
            parts = [part for part in inferred if part is not None]
            if len(parts) == len(layers):
                return dense_block_inference(z, parts, self.momentum, self.beta, self.growth)
        fused = [_fused_layer(layer, z, channels[k], self.growth) for k, layer in modules]
        known = [layer for layer in fused if layer is not None]
        if len(known) < len(layers) or len({(layer.norm1.training, layer.norm2 is None) for layer in known}) > 1:
            return None
        checkpointing = any(bool(layer.grad_checkpointing) for layer in layers)
        return dense_block(z, known, self.momentum, self.beta, checkpointing)

    def extra_repr(self) -> str:
        """Name the coefficient."""
        return f"beta={self.beta}"


def _inferred_layer(layer: Any, z: Tensor, channels: int, growth: int) -> Optional[Callable[[Tensor], Tensor]]:
    """Return a layer in evaluation as a function of the concatenation; ``None`` where that may not stand in for it."""
    if not is_unmodified(layer, SourceLayer) or layer.training:
        return None
    last = layer.conv1 if isinstance(layer.conv2, nn.Identity) else layer.conv2
    if getattr(last, "out_channels", None) != growth:  # pruned
        return None
    first, conv = layer.norm1, layer.conv1
    if layer.alpha is not None:
        if not is_unmodified(conv, nn.Conv2d):
            return None
        conv = partial(conv._conv_forward, weight=layer.folded_weight(), bias=conv.bias)
    if is_rectified_norm(first, channels, False) and fits(z, *first.parameters(), *first.buffers()):
        first = partial(rectified_norm, first)
    elif not is_unmodified(first, ChannelClamp):
        return None
    return lambda x: layer.conv2(layer.norm2(conv(first(x))))


def _fused_layer(layer: Any, z: Tensor, channels: int, growth: int) -> Optional[DenseLayer]:
    """Return a layer as :func:`dense_block` takes it; ``None`` where that may not stand in for it."""
    if not is_unmodified(layer, SourceLayer) or type(layer.conv1) is not nn.Conv2d:
        return None
    training, middle = layer.norm1.training, layer.conv1.weight.shape[0]
    parts: List[Any] = [(layer.norm1, layer.conv1, channels, middle)]
    if not (is_unmodified(layer.norm2, nn.Identity) and is_unmodified(layer.conv2, nn.Identity)):
        parts.append((layer.norm2, layer.conv2, middle, growth))
    for norm, conv, before, after in parts:
        known = is_rectified_norm(norm, before, training) and is_same_size_convolution(conv, before, after)
        if not known or not fits(z, conv.weight, *norm.parameters(), *norm.buffers()):
            return None
    if parts[-1][3] != growth:
        return None
    norm2, weight2 = (parts[1][0], parts[1][1].weight) if len(parts) == 2 else (None, None)
    return DenseLayer(layer.norm1, layer.folded_weight(), norm2, weight2, layer.drop_rate if layer.training else 0.0)
