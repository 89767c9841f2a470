"""The Nesterov rule (21): dense blocks that propagate by it, and their layers."""

# No postponed annotations here: TorchScript reads the types of attributes from the class.

from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from timm.models.densenet import DenseTransition
from torch import Tensor, nn

from optinspired_plugins.algorithms.coefficients import momentum
from optinspired_plugins.memory.dense_block import DenseLayer, dense_block, dense_block_inference, rectified_norm
from optinspired_plugins.memory.eager import is_compiled_by_dynamo, is_eager
from optinspired_plugins.memory.fused_block import FusedLayer, fused_block
from optinspired_plugins.memory.fused_stage import kernels_for
from optinspired_plugins.memory.recompute import recompute

from ..inference.folding import ChannelClamp, fold_before, fold_into
from .checkpoint_rules import RuleBuffer
from .fused import conv_norm, count_batches
from .stem import recompute_pooled
from .unmodified import fits, is_rectified_norm, is_same_size_convolution, is_unmodified

__all__ = ["NesterovBlock", "PooledTransition", "SourceLayer", "Transition"]


class SourceLayer(nn.Module):
    """DenseNet's composite layer over a list of sources.

    It is norm, act, conv and, with a bottleneck, norm, act, conv. With ``alpha``, a parameter of shape (sources,), the
    first convolution is Σ_j α_j W_j ∗ y_j. W_j are the columns of the weight that belong to source z_j, and y_j is the
    source after norm and act. The convolution itself is an
    ordinary one, so that tools that quantise, adapt or prune convolutions work on it.

    Args:
        norm1: normalisation with activation, of all sources.
        conv1: first convolution.
        norm2: normalisation with activation after it; ``None`` without a bottleneck.
        conv2: second convolution; ``None`` without a bottleneck.
        drop_rate: dropout of the output.
        grad_checkpointing: recompute the first convolution in the backward pass.
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
        self.sources = 0  # number of entries of α
        self.norm1 = norm1
        self.conv1 = conv1
        self.norm2 = norm2 or nn.Identity()
        self.conv2 = conv2 or nn.Identity()
        self.growth = (conv2 or conv1).out_channels
        self.drop_rate = float(drop_rate)
        self.grad_checkpointing = grad_checkpointing

    @torch.jit.ignore
    def learn_alpha(self, sources: int) -> None:
        """Add α for this number of sources, with all entries 1."""
        weight = self.conv1.weight
        self.sources = sources
        self.alpha = nn.Parameter(torch.ones(sources, device=weight.device, dtype=weight.dtype))

    @torch.jit.ignore
    @torch.no_grad()
    def fold_alpha(self) -> "SourceLayer":
        """Fold α into the weight of the first convolution."""
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

    def convolve(self, zs: List[Tensor]) -> Tensor:
        """Return the first convolution of all sources, shape (batch, channels, height, width)."""
        y = self.norm1(torch.cat(zs, 1))
        alpha = self.alpha
        if alpha is not None:
            if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript reads one condition
                if self._takes_folded_weight(y):
                    return self.conv1._conv_forward(y, self.folded_weight(), self.conv1.bias)
            y = y * self._channel_alpha(alpha, y.shape[1]).to(y.dtype)[:, None, None]
        return self.conv1(y)

    @torch.jit.ignore
    def _takes_folded_weight(self, y: Tensor) -> bool:
        """Return True if α may scale the weight, which is smaller than y, in place of y."""
        return (is_eager(y) or is_compiled_by_dynamo()) and is_unmodified(self.conv1, nn.Conv2d)

    def _transform(self, zs: List[Tensor]) -> Tensor:
        """Return T of the sources without dropout."""
        return self.conv2(self.norm2(self.convolve(zs)))

    @torch.jit.ignore
    def _recomputed(self, zs: List[Tensor]) -> Tensor:
        """Return :meth:`_transform`, with the first convolution recomputed with ``grad_checkpointing``.

        A compiler recomputes all but the last convolution, since no gradient needs its output.
        """
        if not self.grad_checkpointing:
            return self._transform(zs)
        if is_compiled_by_dynamo():
            return recompute(self, lambda *sources: self._transform(list(sources)), *zs)
        return self.conv2(self.norm2(recompute(self, lambda *sources: self.convolve(list(sources)), *zs)))

    def forward(self, zs: List[Tensor]) -> Tensor:
        """Return T of the sources, shape (batch, growth, height, width)."""
        z = self._transform(zs) if torch.jit.is_scripting() else self._recomputed(zs)
        if self.drop_rate > 0:
            z = F.dropout(z, p=self.drop_rate, training=self.training)
        return z

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        early = f"{prefix}conv1.alpha"  # the name in checkpoints of early versions
        if early in state_dict:
            state_dict[f"{prefix}alpha"] = state_dict.pop(early)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Transition(DenseTransition):
    """DenseNet's transition, with a form for evaluation."""

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> "Transition":
        """Fold the normalisation into the convolution, and leave a bound, for evaluation."""
        fold_before(self, "norm", "conv")
        return self


class PooledTransition(Transition):
    """DenseNet's transition with the average pooling before the 1×1 convolution.

    Both orders give the same, and this one saves three quarters of the multiplications; a GPU keeps DenseNet's order,
    which is faster there. On a CPU, the backward pass recomputes the normalisation and the pooling.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return shape (batch, channels, ⌊height / 2⌋, ⌊width / 2⌋)."""
        if isinstance(x, Tensor) and x.is_cuda:  # pooling of more channels takes longer there than the multiplications
            return self.pool(self.conv(self.norm(x)))
        if not torch.jit.is_scripting():
            return self.conv(recompute_pooled(x, self.norm, self.pool))
        return self.conv(self.pool(self.norm(x)))


class NesterovBlock(RuleBuffer, nn.ModuleDict):
    """A block that propagates by the Nesterov rule (21) and returns the concatenation of z_0, z_1, ….

    The h-term needs no sum: m_{k+1} = z_k − Σ_j h_{k+1,j} z_j satisfies m_1 = 0 and m_{k+1} = c_k (m_k − z_k) with
    c_k = θ_{k+1} (1 − θ_k) / θ_k. So z_0, which has another width, does not enter. The same rule as a plain function is
    :func:`optinspired_plugins.propagation.rules.nesterov`.

    Args:
        layers: T_1, T_2, …; each maps the list of all earlier sources to the next.
        beta: β, finite.
    """

    conversion, convertible = "timm_models.to_nesterov", ("beta",)

    def __init__(self, layers: Sequence[nn.Module], beta: float = 0.1) -> None:
        super().__init__({f"denselayer{k + 1}": layer for k, layer in enumerate(layers)})
        self.beta = beta
        self.growth = int(layers[0].growth)  # type: ignore[arg-type]
        self.momentum: List[float] = momentum(len(layers)).tolist()
        self.set_rule([beta if len(layers) > 1 else 0.0])  # m is 0 at the first layer

    def equals_timm(self) -> bool:
        """Return True if timm's dense block computes the same from the same weights and α."""
        return self.rule_values == [0.0]

    def describe(self, values: Optional[Sequence[float]] = None) -> Dict[str, Any]:
        """Return a rule, by default this block's, as arguments of the network."""
        return dict(beta=float(f"{(values or self.rule_values)[0]:.3g}"))

    def forward(self, z: Tensor) -> Tensor:
        """Return z_0, z_1, … concatenated, shape (batch, first + layers · growth, height, width)."""
        if torch.jit.is_scripting():
            return self._plain(z)
        return self._with_memory(z)

    def _plain(self, z: Tensor) -> Tensor:
        """Return all z_{k+1} = T_k(z_0, …, z_k) + β m_{k+1}, m_{k+1} = c_k (m_k − z_k) (21)."""
        zs = [z]
        m = z  # not used before m_2
        for k, layer in enumerate(self.values()):
            z = layer(zs)
            if k > 0 and self.beta != 0:
                # m is β m_{k+1}, which saves a multiplication per layer.
                m = -self.beta * zs[k] if k == 1 else torch.sub(m, zs[k], alpha=self.beta)
                m = m * self.momentum[k]
                z = z + m  # not in place: a hook may hold z
            zs.append(z)
        return torch.cat(zs, 1)

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> "NesterovBlock":
        """Fold α and the normalisations of bottlenecks, for evaluation.

        Without a bottleneck the normalisation stays: the 3×3 convolution pads its output with zeros.
        """
        for layer in self.values():
            if isinstance(layer, SourceLayer):
                layer.fold_alpha()
                fold_into(layer, "conv1", "norm2")
                fold_before(layer, "norm1", "conv1")
        return self

    @torch.jit.ignore
    def _with_memory(self, z: Tensor) -> Tensor:
        """Return the same, by one function where it is supported."""
        if not is_eager(z) or z.dim() != 4:
            return self._plain(z)
        layers = [(layer, z.shape[1] + k * self.growth) for k, layer in enumerate(self.values())]
        has_grad, kernels = torch.is_grad_enabled(), kernels_for(z)
        if not has_grad and (kernels is None or any(isinstance(layer.norm1, ChannelClamp) for layer, _ in layers)):
            functions = [_as_function(layer, z, channels, self.growth) for layer, channels in layers]
            supported = [function for function in functions if function is not None]
            if len(supported) == len(layers):
                return dense_block_inference(z, supported, self.momentum, self.beta, self.growth)
        found = [_pairs(layer, z, channels, self.growth) for layer, channels in layers]
        pairs = [pair for pair in found if pair is not None]
        if len(pairs) < len(layers) or len({(pair[0][1].training, len(pair)) for pair in pairs}) > 1:
            return self._plain(z)
        checkpointing = any(bool(layer.grad_checkpointing) for layer, _ in layers)
        if kernels is not None and len({layer.alpha is None for layer, _ in layers}) == 1:
            fused = [_as_fused_layer(layer, pair) for (layer, _), pair in zip(layers, pairs)]
            sources = fused_block(z, fused, self.momentum, self.beta, checkpointing or not has_grad, kernels)
            count_batches([norm for pair in pairs for _, norm in pair])
            return sources
        if z.is_cuda and not checkpointing:  # the plain form launches fewer kernels
            return self._plain(z)
        parts = [_as_dense_layer(layer, pair) for (layer, _), pair in zip(layers, pairs)]
        return dense_block(z, parts, self.momentum, self.beta, checkpointing)

    def extra_repr(self) -> str:
        """Return the coefficient."""
        return f"beta={self.beta}"


def _as_function(layer: Any, z: Tensor, channels: int, growth: int) -> Optional[Callable[[Tensor], Tensor]]:
    """Return a layer as a function of concatenated sources; ``None`` if unsupported."""
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


def _pairs(layer: Any, z: Tensor, channels: int, growth: int) -> Optional[List[Any]]:
    """Return the convolutions of a layer with the normalisations before them; ``None`` if unsupported."""
    if not is_unmodified(layer, SourceLayer) or type(layer.conv1) is not nn.Conv2d:
        return None
    training, middle = layer.norm1.training, layer.conv1.weight.shape[0]
    pairs: List[Any] = [(layer.conv1, layer.norm1)]
    sizes = [(channels, middle)]
    if not (is_unmodified(layer.norm2, nn.Identity) and is_unmodified(layer.conv2, nn.Identity)):
        pairs.append((layer.conv2, layer.norm2))
        sizes.append((middle, growth))
    for (conv, norm), (before, after) in zip(pairs, sizes):
        is_supported = is_rectified_norm(norm, before, training) and is_same_size_convolution(conv, before, after)
        if not is_supported or not fits(z, conv.weight, *norm.parameters(), *norm.buffers()):
            return None
    return pairs if sizes[-1][1] == growth else None


def _as_fused_layer(layer: Any, pairs: List[Any]) -> FusedLayer:
    drop_rate = layer.drop_rate if layer.training else 0.0
    return FusedLayer([conv_norm(conv, norm) for conv, norm in pairs], layer.alpha, drop_rate)


def _as_dense_layer(layer: Any, pairs: List[Any]) -> DenseLayer:
    drop_rate = layer.drop_rate if layer.training else 0.0
    norm2, weight2 = (pairs[1][1], pairs[1][0].weight) if len(pairs) == 2 else (None, None)
    return DenseLayer(layer.norm1, layer.folded_weight(), norm2, weight2, drop_rate)
