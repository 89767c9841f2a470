"""A dense block (21) of a GPU as one autograd function with few kernels.

One buffer holds all sources z_0, z_1, …. Each source's statistics are computed once. A layer's normalisation, ReLU and
α are one kernel that reads a slice of the buffer, so that nothing is concatenated. The backward pass recomputes
rectified tensors and adds all gradients of sources to one buffer. The plain form is
:func:`optinspired_plugins.propagation.rules.nesterov`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch_norm import values_per_channel
from .channel_kernels import Iterate, wide_dtype
from .dense_block import empty_buffer, first_source, next_momentum
from .double_backward import needs_plain_gradients, plain_gradients
from .eager import pass_dtype
from .fused_stage import (
    ConvNorm,
    affine_map,
    aligned,
    convolution_gradients,
    convolve,
    fixed_map,
    in_precision,
    plain_norm,
)

__all__ = ["FusedLayer", "fused_block"]


class FusedLayer(NamedTuple):
    """A layer of a dense block: norm, ReLU and convolution, with a bottleneck two of each, and dropout.

    ``alpha`` has a factor for each source after the first ReLU.
    """

    parts: Sequence[ConvNorm]
    alpha: Tensor | None
    drop_rate: float


def fused_block(
    z: Tensor,
    layers: Sequence[FusedLayer],
    momentum: Sequence[float],
    beta: float,
    checkpointing: bool,
    kernels: ModuleType,
) -> Tensor:
    """Return z_0, z_1, … of (21) concatenated.

    With m_1 = 0 and m_{k+1} = c_k (m_k − z_k), z_{k+1} = T_k(z_0, …, z_k) + β m_{k+1}.

    Args:
        z: z_0, shape (batch, channels, height, width).
        layers: T_0, T_1, …; all have α, or none has.
        momentum: c_0, c_1, …; c_0 has no effect.
        beta: β.
        checkpointing: recompute the inputs of the second convolutions, too.
        kernels: :func:`.fused_stage.kernels_for` z, or :mod:`.channel_kernels`.
    """
    dtype = pass_dtype(z)
    plan = _Plan(layers, list(momentum), beta, checkpointing, kernels, dtype, z.shape[1])
    buffer = empty_buffer(z, plan.channels(len(layers)), dtype)
    parameters = [p for layer in layers for part in layer.parts for p in (part.weight, part.scale, part.shift)]
    alphas = [layer.alpha for layer in layers if layer.alpha is not None]
    # In a list the buffer is not an input for autograd, but an output.
    return _Block.apply(plan, [buffer], first_source(z, buffer), *parameters, *alphas)


class _Plan(NamedTuple):
    """The constants of a pass."""

    layers: Sequence[FusedLayer]
    momentum: list[float]
    beta: float
    checkpointing: bool
    kernels: ModuleType
    dtype: torch.dtype
    first: int  # channels of z_0

    @property
    def growth(self) -> int:
        return self.layers[0].parts[-1].weight.shape[0]

    @property
    def width(self) -> int:
        """Parameters per layer."""
        return 3 * len(self.layers[0].parts)

    def channels(self, k: int) -> int:
        """Return the number of channels of z_0, …, z_k, the input of layer k."""
        return self.first + k * self.growth

    def of_layer(self, k: int, flat: Sequence[Any]) -> list[Sequence[Any]]:
        """Return weight, scale and shift, or their gradients, for each part of layer k."""
        own = flat[self.width * k : self.width * (k + 1)]
        return [own[i : i + 3] for i in range(0, self.width, 3)]

    def has_momentum(self, k: int) -> bool:
        """Return True if β m_{k+1} is not 0."""
        return k > 0 and self.beta != 0

    def place_of_alpha(self, device: torch.device) -> Tensor:
        """Return the place of α among all α of the block, for every channel of every layer's input."""
        return _place_of_alpha(self.first, self.growth, len(self.layers), device)

    def factors(self, flat: Sequence[Tensor]) -> list[Any]:
        """Return α for every channel of every layer's input."""
        alphas = [alpha.detach() for alpha in flat[self.width * len(self.layers) :]]
        if not alphas:
            return [None] * len(self.layers)
        values = torch.cat(alphas).to(wide_dtype(self.dtype))[self.place_of_alpha(alphas[0].device)]
        return list(values.split([self.channels(k) for k in range(len(self.layers))]))


@lru_cache(maxsize=64)
def _place_of_alpha(first: int, growth: int, layers: int, device: torch.device) -> Tensor:
    places, start = [], 0
    for k in range(layers):
        places += [start] * first + [start + j for j in range(1, k + 1) for _ in range(growth)]
        start += k + 1
    return torch.tensor(places, device=device)


class _Saved(NamedTuple):
    """The tensors that a layer keeps: affine maps, the first convolution's output, the mask of dropout."""

    affine1: Tensor
    affine2: Tensor | None = None
    middle: Tensor | None = None
    mask: Tensor | None = None


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, buffers: list[Tensor], z: Tensor, *flat: Tensor) -> Tensor:
        (buffer,) = buffers
        with torch.autocast(z.device.type, enabled=False), torch.cuda.device_of(z):
            saved = _forward(plan, buffer, flat)
        ctx.plan = plan
        ctx.save_for_backward(buffer, z, *flat, *(tensor for layer in saved for tensor in layer))
        return buffer

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        plan: _Plan = ctx.plan
        buffer, z, *rest = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        flat, tensors = rest[: len(needs) - 1], iter(rest[len(needs) - 1 :])
        saved = [_Saved(*layer) for layer in zip(*[tensors] * len(_Saved._fields))]
        with torch.autocast(z.device.type, enabled=False), torch.cuda.device_of(z):
            if needs_plain_gradients(gradient):
                return None, None, *plain_gradients(partial(_plain, plan, saved), (z, *flat), gradient, needs)
            gradients = _backward(plan, buffer, flat, saved, gradient, needs[1:])
        return None, None, *(g if need else None for g, need in zip(gradients, needs))


def _forward(plan: _Plan, buffer: Tensor, flat: Sequence[Tensor]) -> list[_Saved]:
    """Fill the buffer after z_0, and return the saved tensors of the layers."""
    kernels, growth, count = plan.kernels, plan.growth, buffer.numel() // buffer.shape[1]
    statistics = torch.empty(2, buffer.shape[1], dtype=wide_dtype(plan.dtype), device=buffer.device)
    weights, factors = in_precision(flat[: plan.width * len(plan.layers) : 3], plan.dtype), plan.factors(flat)
    saved: list[_Saved] = []
    m, start = None, 0
    for k, layer in enumerate(plan.layers):
        end, parts = plan.channels(k), plan.of_layer(k, flat)
        first, own = layer.parts[0], weights[k * len(parts) : (k + 1) * len(parts)]
        if first.training:
            values_per_channel(buffer)
            kernels.moments(buffer[:, start:end], statistics[:, start:end])
            affine = kernels.affine_of_moments(statistics[:, :end], count, *parts[0][1:], first.eps, first.running)
        else:
            affine = fixed_map(kernels, buffer, first)
        t = convolve(kernels.rectified(buffer[:, :end], affine, factors[k]), own[0], first)
        of_layer = _Saved(affine)
        if len(parts) == 2:
            second = affine_map(kernels, t, layer.parts[1], *parts[1][1:])
            of_layer = _Saved(affine, second, None if plan.checkpointing else t)
            t = convolve(kernels.rectified(t, second), own[1], layer.parts[1])
        if layer.drop_rate > 0:
            mask = F.dropout(torch.ones_like(t), layer.drop_rate)
            of_layer, t = of_layer._replace(mask=mask), t * mask
        place = buffer[:, end : end + growth]
        if plan.has_momentum(k):
            c = plan.momentum[k]
            m = kernels.add([-c * plan.beta, c], buffer[:, start:end], None, *([] if m is None else [Iterate(m)])).high
            torch.add(t, m, out=place)
        else:
            place.copy_(t)
        saved.append(of_layer)
        start = end
    return saved


def _backward(
    plan: _Plan, buffer: Tensor, flat: Sequence[Tensor], saved: list[_Saved], gradient: Tensor, needs: Sequence[bool]
) -> list[Any]:
    """Return the gradients of z_0 and of all parameters."""
    kernels, growth, layers = plan.kernels, plan.growth, plan.layers
    weights, factors = in_precision(flat[: plan.width * len(layers) : 3], plan.dtype), plan.factors(flat)
    total = aligned(gradient.to(plan.dtype).clone(memory_format=torch.preserve_format), buffer)
    of_statistics = torch.zeros(2, buffer.shape[1], dtype=wide_dtype(plan.dtype), device=buffer.device)

    def complete(start: int, end: int) -> Tensor:
        """Return the gradient of a source that all later layers have added to."""
        x, g = buffer[:, start:end], total[:, start:end]
        return kernels.add([1.0, 1.0], x, of_statistics[:, start:end], Iterate(g)).high

    gradients: list[Any] = []
    of_factors: list[Tensor] = []
    of_m: Tensor | None = None
    for k in reversed(range(len(layers))):
        start, count = plan.channels(k), len(layers[k].parts)
        g = complete(start, start + growth)
        if plan.has_momentum(k):
            of_m = g if of_m is None else torch.add(g, of_m, alpha=plan.momentum[k + 1])
            total[:, start - growth : start].sub_(of_m, alpha=plan.beta * plan.momentum[k])
        own, wanted = weights[k * count : (k + 1) * count], plan.of_layer(k, needs)
        of_layer, of_factor = _layer_backward(
            plan, k, buffer[:, :start], own, factors[k], saved[k], g, wanted, total[:, :start], of_statistics
        )
        gradients[:0] = of_layer
        of_factors.insert(0, of_factor)
    if factors[0] is not None:
        sizes = [k + 1 for k in range(len(layers))]
        of_alpha = of_statistics.new_zeros(sum(sizes))
        of_alpha.index_add_(0, plan.place_of_alpha(buffer.device), torch.cat(of_factors))
        gradients += of_alpha.split(sizes)
    return [complete(0, plan.first), *gradients]


def _layer_backward(
    plan: _Plan,
    k: int,
    x: Tensor,
    weights: Sequence[Tensor],
    factor: Tensor | None,
    saved: _Saved,
    g: Tensor,
    needs: list[Sequence[bool]],
    total: Tensor,
    of_statistics: Tensor,
) -> tuple[list[Any], Tensor]:
    """Return the gradients of a layer's parameters and factors; add to the gradients of sources and statistics."""
    kernels, (first, *others) = plan.kernels, plan.layers[k].parts
    if saved.mask is not None:
        g = g * saved.mask
    y, of_second = kernels.rectified(x, saved.affine1, factor), []
    if others:
        (second,) = others
        middle = convolve(y, weights[0], first) if saved.middle is None else saved.middle
        rectified = kernels.rectified(middle, saved.affine2)
        g, of_weight = convolution_gradients(g, rectified, weights[1], second, True, needs[1][0])
        del rectified
        sums = kernels.gradient_sums(g, middle, saved.affine2, True, second.training)
        g = kernels.gradient_of_input(g, middle, saved.affine2, sums.coefficients, True)
        of_second = [of_weight, sums.weight, sums.bias]
        del middle
    g, of_weight = convolution_gradients(g, y, weights[0], first, True, needs[0][0])
    sums = kernels.gradient_sums(g, x, saved.affine1, True, first.training, factor, of_statistics)
    kernels.gradient_of_input(g, x, saved.affine1, None, True, factor, total)
    return [of_weight, sums.weight, sums.bias, *of_second], sums.factor


def _plain(plan: _Plan, saved: list[_Saved], z: Tensor, *flat: Tensor) -> Tensor:
    """Return z_0, z_1, … concatenated, by differentiable operations, with the saved statistics and masks."""
    zs, m = [z], None
    alphas = flat[plan.width * len(plan.layers) :]
    for k, (layer, kept) in enumerate(zip(plan.layers, saved)):
        t = torch.cat(zs, 1)
        for i, (part, (weight, scale, shift)) in enumerate(zip(layer.parts, plan.of_layer(k, flat))):
            affine = kept.affine2 if i else kept.affine1
            assert affine is not None
            t = plain_norm(part, scale, shift, affine, t).relu().to(plan.dtype)
            if i == 0 and alphas:
                counts = torch.tensor([plan.first] + [plan.growth] * k, device=z.device)
                t = t * alphas[k].repeat_interleave(counts)[:, None, None].to(t.dtype)
            t = convolve(t, weight.to(plan.dtype), part)
        if kept.mask is not None:
            t = t * kept.mask
        if plan.has_momentum(k):
            m = next_momentum(m, zs[-1], plan.momentum[k], plan.beta)
            t = t + m
        zs.append(t)
    return torch.cat(zs, 1)
