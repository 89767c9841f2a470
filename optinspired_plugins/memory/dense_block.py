"""A dense block (21) as one autograd function.

Every later layer normalises the source z_j by the statistics of z_j only, so they are computed once per pass. One
buffer holds all sources. The backward pass recomputes the normalised and rectified sources from it. The plain form is
:func:`optinspired_plugins.propagation.rules.nesterov` over layers that concatenate, normalise, rectify and convolve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch_norm import FixedNorm, batch_statistics, pass_statistics, running_statistics, track
from .double_backward import needs_plain_gradients, plain_gradients
from .eager import pass_dtype

__all__ = [
    "DenseLayer",
    "dense_block",
    "dense_block_inference",
    "empty_buffer",
    "first_source",
    "next_momentum",
    "rectified_norm",
]


class DenseLayer(NamedTuple):
    """A layer of a dense block.

    It has norm, ReLU and convolution, with a bottleneck two of each, and then dropout.
    The normalisations are batch normalisations with scale and shift, all of a block in training or all in evaluation.
    The convolutions have stride 1 and keep the size. ``drop_rate`` is 0 without dropout.
    """

    norm1: nn.BatchNorm2d
    weight1: Tensor
    norm2: nn.BatchNorm2d | None
    weight2: Tensor | None
    drop_rate: float

    def parameters(self) -> list[Tensor]:
        """Return scale, shift and weight of one or two parts."""
        first = [self.norm1.weight, self.norm1.bias, self.weight1]
        return first if self.norm2 is None else [*first, self.norm2.weight, self.norm2.bias, self.weight2]  # type: ignore[list-item]


def dense_block(
    z: Tensor, layers: Sequence[DenseLayer], momentum: Sequence[float], beta: float, checkpointing: bool
) -> Tensor:
    """Return z_0, z_1, … of (21) concatenated.

    With m_1 = 0 and m_{k+1} = c_k (m_k − z_k), z_{k+1} = T_k(z_0, …, z_k) + β m_{k+1}. The backward pass uses the mode
    and the statistics of this pass, even if the layers change. It uses the plain form if the gradient must be
    differentiable.

    Args:
        z: z_0, shape (batch, channels, height, width).
        layers: T_0, T_1, ….
        momentum: c_0, c_1, …; c_0 has no effect.
        beta: β.
        checkpointing: recompute the inputs of the second convolutions in the backward pass, too. This saves a third of
            the memory and costs another 1×1 convolution per layer.
    """
    dtype = pass_dtype(z)
    training = layers[0].norm1.training
    eps = [(layer.norm1.eps, layer.norm1.eps if layer.norm2 is None else layer.norm2.eps) for layer in layers]
    bottleneck = layers[0].norm2 is not None
    plan = _Plan(list(momentum), beta, checkpointing, dtype, training, bottleneck, eps)
    growth = layers[0].parameters()[-1].shape[0]
    buffer = empty_buffer(z, z.shape[1] + growth * len(layers), dtype)
    first = first_source(z, buffer)
    # In a list the buffer is not an input for autograd, but an output.
    return _DenseBlock.apply(plan, layers, [buffer], first, *(p for layer in layers for p in layer.parameters()))


def dense_block_inference(
    z: Tensor, layers: Sequence[Callable[[Tensor], Tensor]], momentum: Sequence[float], beta: float, growth: int
) -> Tensor:
    """Return the same as :func:`dense_block`, in evaluation and without a gradient.

    Args:
        z: z_0, shape (batch, channels, height, width).
        layers: T_0, T_1, …; the argument is the concatenation of the sources, a part of the buffer that is not
            contiguous.
        momentum: see :func:`dense_block`.
        beta: β.
        growth: growth rate, the channels of every source but z_0.
    """
    end = z.shape[1]
    buffer = empty_buffer(z, end + growth * len(layers), pass_dtype(z))
    buffer[:, :end] = z
    m = None
    for k, layer in enumerate(layers):
        t, place = layer(buffer[:, :end]), buffer[:, end : end + growth]
        if k > 0 and beta != 0:
            m = next_momentum(m, buffer[:, end - growth : end], momentum[k], beta)
            torch.add(t, m, out=place)  # t is not overwritten: a hook may hold it
        else:
            place.copy_(t)
        end += growth
    return buffer


def rectified_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Return max(norm(x), 0) in evaluation; x need not be contiguous."""
    fixed = FixedNorm.of_running(norm, torch.float64 if x.dtype == torch.float64 else torch.float32)
    return _NormRelu(*fixed).forward(x)


# --- parts ------------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """The constants of a pass."""

    momentum: list[float]
    beta: float
    checkpointing: bool
    dtype: torch.dtype
    training: bool
    bottleneck: bool
    eps: list[tuple[float, float]]

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def by_layer(self, flat: Sequence[Any]) -> list[Sequence[Any]]:
        """Group a sequence in the order of the parameters by layer."""
        size = 6 if self.bottleneck else 3
        return [flat[i : i + size] for i in range(0, len(flat), size)]


class _NormRelu(FixedNorm):
    """max(norm(x), 0) by fixed statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """Return max(norm(x), 0)."""
        scale, shift = self.scale_and_shift()
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).relu_().to(x.dtype)

    def backward(self, gradient: Tensor, x: Tensor, through_statistics: bool) -> Any:
        """Return the gradients of x, scale and shift.

        ``through_statistics``: mean and variance are functions of x, not constants.
        """
        x = x.contiguous(memory_format=_layout(gradient))
        return torch.ops.aten.native_batch_norm_backward(
            gradient,
            x,
            self.weight.to(self.mean.dtype),
            self.mean,
            self.var,
            self.mean,
            self.inverse_std(),
            through_statistics,
            self.eps,
            [True, True, True],
        )


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight.to(x.dtype), padding=weight.shape[2] // 2)


def _convolve_backward(gradient: Tensor, y: Tensor, weight: Tensor, needs_weight: bool) -> tuple[Tensor, Any]:
    """Return the gradients of the rectified y, through the ReLU, and of the weight."""
    padding = [weight.shape[2] // 2] * 2
    gradient = gradient.contiguous(memory_format=_layout(y))
    g, of_weight, _ = torch.ops.aten.convolution_backward(
        gradient, y, weight.to(y.dtype), None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, needs_weight, False]
    )
    torch.ops.aten.threshold_backward.grad_input(g, y, 0, grad_input=g)
    return g, of_weight


def next_momentum(m: Tensor | None, last: Tensor, factor: float, beta: float) -> Tensor:
    """Return β m_{k+1} = c_k (β m_k − β z_k)."""
    return factor * (-beta * last if m is None else torch.sub(m, last, alpha=beta))


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def first_source(z: Tensor, buffer: Tensor) -> Tensor:
    """Copy z_0 to the first channels of the buffer; return it as a tensor that shares this memory."""
    return _FirstSource.apply(z, buffer)


def empty_buffer(z: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Return memory for all sources, in the layout of z."""
    shape = (z.shape[0], channels, *z.shape[2:])
    return torch.empty(shape, dtype=dtype, device=z.device, memory_format=_layout(z))


# --- the function -----------------------------------------------------------------------------------------------------


class _FirstSource(torch.autograd.Function):
    """The identity of z_0, placed in the buffer, so that the input of the block needs no extra memory."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, buffer: Tensor) -> Tensor:
        part = buffer[:, : z.shape[1]]
        part.copy_(z)
        # No view for autograd, since the rest of the buffer is written later.
        return buffer.new_empty(0).set_(buffer.untyped_storage(), 0, part.shape, part.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class _Saved(NamedTuple):
    """The tensors that a layer saves for the backward pass, apart from its parameters.

    ``mean1`` and ``var1`` are statistics of all sources of the layer. ``middle`` is the output of the first
    convolution, ``None`` with checkpointing. ``mask`` is the mask of dropout.
    """

    mean1: Tensor
    var1: Tensor
    mean2: Tensor | None = None
    var2: Tensor | None = None
    middle: Tensor | None = None
    mask: Tensor | None = None


class _DenseBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, layers: Sequence[DenseLayer], buffers: list[Tensor], z: Tensor, *flat: Tensor
    ) -> Tensor:
        (buffer,) = buffers
        with torch.autocast(z.device.type, enabled=False):
            saved = _forward(plan, layers, buffer, z, plan.by_layer(flat))
        ctx.plan = plan
        ctx.save_for_backward(buffer, z, *flat, *(tensor for layer in saved for tensor in layer))
        return buffer

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        plan: _Plan = ctx.plan
        buffer, z, *rest = ctx.saved_tensors
        count = len(rest) - len(plan.eps) * len(_Saved._fields)
        flat, tensors = rest[:count], iter(rest[count:])
        saved = [_Saved(*layer) for layer in zip(*[tensors] * len(_Saved._fields))]
        with torch.autocast(gradient.device.type, enabled=False):
            if needs_plain_gradients(gradient):
                gradients = plain_gradients(
                    partial(_plain, plan, saved), (z, *flat), gradient, ctx.needs_input_grad[3:]
                )
            else:
                needs = plan.by_layer(ctx.needs_input_grad[4:])
                gradients = _backward(plan, buffer, plan.by_layer(flat), saved, gradient, needs)
        return None, None, None, *gradients


def _plain(plan: _Plan, saved: list[_Saved], z: Tensor, *flat: Tensor) -> Tensor:
    """Return z_0, z_1, … concatenated, by differentiable operations, with the saved statistics and masks."""
    zs, m = [z], None
    for k, (parameters, layer) in enumerate(zip(plan.by_layer(flat), saved)):
        t = _plain_part(plan, torch.cat(zs, 1), parameters[:3], (layer.mean1, layer.var1), plan.eps[k][0])
        if plan.bottleneck:
            t = _plain_part(plan, t, parameters[3:], (layer.mean2, layer.var2), plan.eps[k][1])
        if layer.mask is not None:
            t = t * layer.mask
        if k > 0 and plan.beta != 0:
            m = next_momentum(m, zs[-1], plan.momentum[k], plan.beta)
            t = t + m
        zs.append(t)
    return torch.cat(zs, 1)


def _plain_part(plan: _Plan, x: Tensor, parameters: Sequence[Tensor], statistics: Any, eps: float) -> Tensor:
    """Return the convolution of max(norm(x), 0), in training by the statistics of x."""
    scale, shift = (p.to(plan.statistics_dtype) for p in parameters[:2])
    mean, var = (None, None) if plan.training else statistics
    return _convolve(F.batch_norm(x, mean, var, scale, shift, plan.training, 0.0, eps).relu(), parameters[2])


def _forward(
    plan: _Plan, layers: Sequence[DenseLayer], buffer: Tensor, z: Tensor, parameters: list[Sequence[Tensor]]
) -> list[_Saved]:
    """Fill the buffer after z, and return the saved tensors of the layers."""
    growth, count = parameters[0][-1].shape[0], buffer.numel() // buffer.shape[1]
    means, variances = (buffer.new_empty(buffer.shape[1], dtype=plan.statistics_dtype) for _ in range(2))
    saved: list[_Saved] = []
    source, m, start, end = z, None, 0, z.shape[1]
    for k, (layer, own) in enumerate(zip(layers, parameters)):
        if plan.training:
            means[start:end], variances[start:end] = batch_statistics(source.to(plan.statistics_dtype))
            first = means[:end], variances[:end]
            track(layer.norm1, *first, count)
        else:
            first = running_statistics(layer.norm1, plan.statistics_dtype)
        t = _convolve(_NormRelu(*first, own[0], own[1], plan.eps[k][0]).forward(buffer[:, :end]), own[2])
        saved_layer = _Saved(*first)
        if layer.norm2 is not None:
            second = pass_statistics(layer.norm2, t, plan.statistics_dtype)
            saved_layer = _Saved(*first, *second, None if plan.checkpointing else t)
            t = _convolve(_NormRelu(*second, own[3], own[4], plan.eps[k][1]).forward(t), own[5])
        if layer.drop_rate > 0:
            mask = F.dropout(torch.ones_like(t), layer.drop_rate)
            saved_layer, t = saved_layer._replace(mask=mask), t * mask
        if k > 0 and plan.beta != 0:
            m = next_momentum(m, buffer[:, start:end], plan.momentum[k], plan.beta)
            t = t.add_(m)
        source, start, end = t, end, end + growth
        buffer[:, start:end] = t
        saved.append(saved_layer)
    return saved


def _backward(
    plan: _Plan,
    buffer: Tensor,
    parameters: list[Sequence[Tensor]],
    saved: list[_Saved],
    gradient: Tensor,
    needs: list[Sequence[bool]],
) -> list[Any]:
    """Return the gradients of z_0 and of all parameters."""
    growth, count = parameters[0][-1].shape[0], buffer.numel() // buffer.shape[1]
    sources = _SourceGradients(buffer, gradient, saved[-1] if plan.training else None)
    gradients: list[list[Any]] = []
    gradient_m: Tensor | None = None
    end = buffer.shape[1]
    for k in reversed(range(len(parameters))):
        start = end - growth
        g = sources.complete(start, end)
        if k > 0 and plan.beta != 0:
            gradient_m = g if gradient_m is None else g + plan.momentum[k + 1] * gradient_m
            sources.total[:, start - growth : start].sub_(gradient_m, alpha=plan.beta * plan.momentum[k])
        norm = _NormRelu(saved[k].mean1, saved[k].var1, parameters[k][0], parameters[k][1], plan.eps[k][0])
        g, of_layer = _layer_backward(plan, k, norm, buffer[:, :start], parameters[k], saved[k], g, needs[k])
        sources.total[:, :start].add_(g)
        if plan.training:
            sources.through_statistics(norm, of_layer[0], of_layer[1], count)
        gradients.append(of_layer)
        end = start
    return [sources.complete(0, end), *(g for of_layer in reversed(gradients) for g in of_layer)]


def _layer_backward(
    plan: _Plan,
    k: int,
    norm1: _NormRelu,
    x: Tensor,
    parameters: Sequence[Tensor],
    saved: _Saved,
    g: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Any]]:
    """Return the gradients of the sources x and of the parameters of one layer, with constant statistics of x."""
    if saved.mask is not None:
        g = g * saved.mask
    y = norm1.forward(x) if saved.middle is None else None
    of_second: list[Any] = []
    if saved.mean2 is not None and saved.var2 is not None:
        middle = _convolve(y, parameters[2]) if saved.middle is None else saved.middle  # type: ignore[arg-type]
        norm2 = _NormRelu(saved.mean2, saved.var2, parameters[3], parameters[4], plan.eps[k][1])
        g, of_weight = _convolve_backward(g, norm2.forward(middle), parameters[5], needs[5])
        g, *of_norm = norm2.backward(g, middle, plan.training)
        of_second = [*of_norm, of_weight]
        del middle
    g, of_weight = _convolve_backward(g, norm1.forward(x) if y is None else y, parameters[2], needs[2])
    del y
    g, of_scale, of_shift = norm1.backward(g, x, False)
    return g, [of_scale, of_shift, of_weight, *of_second]


class _SourceGradients:
    """The gradients of all sources, summed over the layers from the last to the first.

    The gradients of the statistics of a source are summed as well, and propagated to the source once, when its gradient
    is complete.
    """

    def __init__(self, buffer: Tensor, gradient: Tensor, last: _Saved | None) -> None:
        self.buffer, self.last = buffer, last  # in training, last has the statistics of all sources
        self.total = gradient.to(buffer.dtype).clone(memory_format=torch.preserve_format)
        if last is not None:
            self.of_mean, self.of_var = torch.zeros_like(last.mean1), torch.zeros_like(last.var1)

    def through_statistics(self, norm: FixedNorm, of_scale: Tensor, of_shift: Tensor, count: int) -> None:
        """Add the gradients of the statistics of a normalisation, from the gradients of its scale and shift."""
        invstd, channels = norm.inverse_std(), len(norm.mean)
        factor = norm.weight.to(norm.mean.dtype) * invstd / count
        self.of_mean[:channels].addcmul_(factor, of_shift)
        self.of_var[:channels].addcmul_(factor * invstd, of_scale)

    def complete(self, start: int, end: int) -> Tensor:
        """Return the gradient of the source in these channels, after all later layers have added to it."""
        g = self.total[:, start:end]
        if self.last is None or start >= len(self.of_mean):  # no layer reads the last source
            return g
        mean, of_mean, of_var = (v[start:end, None, None] for v in (self.last.mean1, self.of_mean, self.of_var))
        return (g - (of_mean + (self.buffer[:, start:end] - mean) * of_var)).to(self.buffer.dtype)
