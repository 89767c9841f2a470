"""A dense block (21) as one function with a backward of its own.

Every source z_j is normalised for every layer behind it, by statistics that are the source's: they are computed once,
in the backward pass too. One buffer holds all sources; what a layer makes of them before its convolutions is
elementwise, and the backward pass makes it again. The plain form is :func:`optinspired_plugins.propagation.nesterov`
over layers that concatenate, normalise, rectify and convolve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["DenseLayer", "dense_block", "infer", "rectified_norm"]


class DenseLayer(NamedTuple):
    """A layer of a dense block: norm, ReLU, convolution and, with a bottleneck, again; then dropout.

    The normalisations are batch normalisations with scale and shift, all of a block in training or all in evaluation;
    the weights are those of convolutions of stride 1 that keep the size; ``drop_rate`` is 0 where nothing is dropped.
    """

    norm1: nn.BatchNorm2d
    weight1: Tensor
    norm2: nn.BatchNorm2d | None
    weight2: Tensor | None
    drop_rate: float

    def parameters(self) -> list[Tensor]:
        """Return scale, shift and weight of both parts."""
        first = [self.norm1.weight, self.norm1.bias, self.weight1]
        return first if self.norm2 is None else [*first, self.norm2.weight, self.norm2.bias, self.weight2]  # type: ignore[list-item]


def dense_block(z: Tensor, layers: Sequence[DenseLayer], momentum: Sequence[float], beta: float, lean: bool) -> Tensor:
    """Return z_0, z_1, … of (21) concatenated.

    With m_1 = 0 and m_{k+1} = c_k (m_k − z_k), z_{k+1} = T_k(z_0, …, z_k) + β m_{k+1}.

    Args:
        z: z_0, shape (batch, channels, height, width).
        layers: T_0, T_1, ….
        momentum: c_0, c_1, …; c_0 is not used.
        beta: β.
        lean: compute the bottlenecks' inputs again in the backward pass, too: a third less memory, another 1×1
            convolution a layer.
    """
    kind = z.device.type
    mixed = torch.is_autocast_enabled(kind) and z.dtype != torch.float64
    plan = _Plan(list(layers), list(momentum), beta, lean, torch.get_autocast_dtype(kind) if mixed else z.dtype)
    return _DenseBlock.apply(plan, z, *(p for layer in layers for p in layer.parameters()))


def infer(
    z: Tensor, layers: Sequence[Callable[[Tensor], Tensor]], momentum: Sequence[float], beta: float, growth: int
) -> Tensor:
    """Return what :func:`dense_block` does, in evaluation and without a gradient.

    Args:
        z: z_0, shape (batch, channels, height, width).
        layers: T_0, T_1, …, each of the concatenation of its sources, a part of the buffer that is not contiguous.
        momentum: as for :func:`dense_block`.
        beta: β.
        growth: channels of every source but z_0.
    """
    batch, end, height, width = z.shape
    layout = torch.channels_last if z.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    shape = (batch, end + growth * len(layers), height, width)
    buffer = torch.empty(shape, dtype=z.dtype, device=z.device, memory_format=layout)
    buffer[:, :end] = z
    m = None
    for k, layer in enumerate(layers):
        t = layer(buffer[:, :end])
        if k > 0 and beta != 0:
            last = buffer[:, end - growth : end]
            m = momentum[k] * (-beta * last if m is None else torch.sub(m, last, alpha=beta))
            t = t.add_(m)
        buffer[:, end : end + growth] = t
        end += growth
    return buffer


def rectified_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Return max(norm(x), 0) in evaluation, of x that need not be contiguous."""
    mean, var = _running(norm, torch.float64 if x.dtype == torch.float64 else torch.float32)
    return _rectified(x, mean, var, norm.weight, norm.bias, norm.eps)


class _Plan(NamedTuple):
    layers: list[DenseLayer]
    momentum: list[float]
    beta: float
    lean: bool
    dtype: torch.dtype

    @property
    def training(self) -> bool:
        return self.layers[0].norm1.training

    @property
    def accumulate(self) -> torch.dtype:
        """The precision of statistics."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def split(self, flat: Sequence[Any]) -> list[Sequence[Any]]:
        """Group what is in the order of the parameters by layer."""
        size = len(self.layers[0].parameters())
        return [flat[i : i + size] for i in range(0, len(flat), size)]


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight.to(x.dtype), padding=weight.shape[2] // 2)


def _convolve_backward(gradient: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Any]:
    padding = [weight.shape[2] // 2] * 2
    mask = [needs[0], needs[1], False]
    found = torch.ops.aten.convolution_backward(
        gradient, x, weight.to(x.dtype), None, [1, 1], padding, [1, 1], False, [0, 0], 1, mask
    )
    return found[0], found[1].to(weight.dtype) if needs[1] else None


def _rectified(x: Tensor, mean: Tensor, var: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """max(norm(x), 0), by given statistics."""
    factor = scale.to(mean.dtype) * (var + eps).rsqrt()
    offset = torch.addcmul(shift.to(mean.dtype), mean, factor, value=-1)
    return (x * factor[:, None, None]).add_(offset[:, None, None]).relu_().to(x.dtype)


def _rectify_backward(gradient: Tensor, y: Tensor) -> None:
    """Through y = max(x, 0), in place."""
    torch.ops.aten.threshold_backward.grad_input(gradient, y, 0, grad_input=gradient)


def _norm_backward(
    gradient: Tensor, x: Tensor, scale: Tensor, mean: Tensor, var: Tensor, eps: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and shift; in evaluation the statistics are constants."""
    invstd = (var + eps).rsqrt()
    return torch.ops.aten.native_batch_norm_backward(
        gradient, x, scale.to(mean.dtype), mean, var, mean, invstd, training, eps, [True, True, True]
    )


def _track(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Update running statistics by a batch's."""
    assert norm.num_batches_tracked is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    norm.num_batches_tracked.add_(1)
    # data: what autograd keeps of a normalisation are other tensors.
    norm.running_mean.data.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.data.lerp_((var * (count / max(count - 1, 1))).to(norm.running_var.dtype), norm.momentum)


class _DenseBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, z: Tensor, *flat: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return _forward(ctx, plan, z, plan.split(flat))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        with torch.autocast(gradient.device.type, enabled=False):
            found = _backward(ctx, gradient)
        return (None, *found)


def _forward(ctx: Any, plan: _Plan, z: Tensor, parameters: list[Sequence[Tensor]]) -> Tensor:
    growth = parameters[0][-1].shape[0]
    batch, first, height, width = z.shape
    total, count = first + growth * len(parameters), batch * height * width
    layout = torch.channels_last if z.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    buffer = torch.empty((batch, total, height, width), dtype=plan.dtype, device=z.device, memory_format=layout)
    mean, var = (torch.empty(total, dtype=plan.accumulate, device=z.device) for _ in range(2))

    def put(value: Tensor, start: int) -> None:
        part = slice(start, start + value.shape[1])
        buffer[:, part] = value
        if plan.training:
            mean[part], var[part] = _statistics(value, plan)

    put(z, 0)
    kept: list[list[Tensor]] = []
    m, end = None, first
    for k, (layer, own) in enumerate(zip(plan.layers, parameters)):
        if plan.training:
            _track(layer.norm1, mean[:end], var[:end], count)
        mean1, var1 = (mean[:end], var[:end]) if plan.training else _running(layer.norm1, plan.accumulate)
        t = _convolve(_rectified(buffer[:, :end], mean1, var1, own[0], own[1], layer.norm1.eps), own[2])
        inner: list[Tensor] = []
        if layer.norm2 is not None:
            if plan.training:
                mean2, var2 = _statistics(t, plan)
                _track(layer.norm2, mean2, var2, count)
            else:
                mean2, var2 = _running(layer.norm2, plan.accumulate)
            inner = [mean2, var2] if plan.lean else [mean2, var2, t]
            t = _convolve(_rectified(t, mean2, var2, own[3], own[4], layer.norm2.eps), own[5])
        if layer.drop_rate > 0:
            inner.append(F.dropout(torch.ones_like(t), layer.drop_rate))
            t = t * inner[-1]
        if k > 0 and plan.beta != 0:
            last = buffer[:, end - growth : end]
            m = plan.momentum[k] * (-plan.beta * last if m is None else torch.sub(m, last, alpha=plan.beta))
            t = t.add_(m)
        put(t, end)
        kept.append(inner)
        end += growth
    ctx.plan, ctx.first, ctx.sizes = plan, first, [len(inner) for inner in kept]
    ctx.save_for_backward(buffer, mean, var, *(x for own in parameters for x in own), *(x for i in kept for x in i))
    return buffer


def _statistics(x: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel; twice as fast as ``var_mean``."""
    return torch.batch_norm_update_stats(x.to(plan.accumulate), None, None, 0.0)


def _running(norm: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.to(dtype), norm.running_var.to(dtype)


def _backward(ctx: Any, gradient: Tensor) -> list[Any]:
    plan: _Plan = ctx.plan
    buffer, mean, var, *rest = ctx.saved_tensors
    size = len(plan.layers[0].parameters())
    parameters, kept = plan.split(rest[: size * len(plan.layers)]), rest[size * len(plan.layers) :]
    needs = plan.split(ctx.needs_input_grad[2:])
    growth, count = parameters[0][-1].shape[0], buffer.numel() // buffer.shape[1]
    total = gradient.to(buffer.dtype).clone(memory_format=torch.preserve_format)
    # What the statistics of a source have of all its gradients, to be taken off once it has them all.
    from_mean, from_var = torch.zeros_like(mean), torch.zeros_like(var)
    found: list[list[Any]] = []
    gradient_m, end = None, buffer.shape[1]

    def settle(part: slice) -> Tensor:
        """Return the gradient of a source."""
        g = total[:, part]
        if plan.training:
            g = g - (
                from_mean[part, None, None] + (buffer[:, part] - mean[part, None, None]) * from_var[part, None, None]
            )
        return g.to(buffer.dtype)

    for k in reversed(range(len(plan.layers))):
        layer, own, wanted = plan.layers[k], parameters[k], needs[k]
        sizes = ctx.sizes[k]
        inner, kept = kept[len(kept) - sizes :], kept[: len(kept) - sizes]
        start = end - growth
        g = settle(slice(start, end))
        if k > 0 and plan.beta != 0:
            gradient_m = g if gradient_m is None else g + plan.momentum[k + 1] * gradient_m
            total[:, start - growth : start].sub_(gradient_m, alpha=plan.beta * plan.momentum[k])
        if layer.drop_rate > 0:
            g = g * inner.pop()
        mean1, var1 = (mean[:start], var[:start]) if plan.training else _running(layer.norm1, plan.accumulate)
        y = _rectified(buffer[:, :start], mean1, var1, own[0], own[1], layer.norm1.eps)
        later: list[Any] = []
        if layer.norm2 is not None:
            middle = inner[2] if len(inner) > 2 else _convolve(y, own[2])
            g, later = _part_backward(g, middle, inner[0], inner[1], own[3:], layer.norm2, plan.training, wanted[3:])
        g, weight = _convolve_backward(g.contiguous(memory_format=_layout(buffer)), y, own[2], (True, wanted[2]))
        _rectify_backward(g, y)
        del y
        x = buffer[:, :start].contiguous(memory_format=_layout(buffer))
        dx, scale, shift = _norm_backward(g, x, own[0], mean1, var1, layer.norm1.eps, False)
        total[:, :start].add_(dx)
        del g, x, dx
        if plan.training:
            invstd = (var1 + layer.norm1.eps).rsqrt()
            factor = own[0].to(mean.dtype) * invstd / count
            from_mean[:start].addcmul_(factor, shift)
            from_var[:start].addcmul_(factor * invstd, scale)
        found.append([*_like([scale, shift], own[:2]), weight, *later])
        end = start
    return [settle(slice(0, end)).to(gradient.dtype), *(x for own in reversed(found) for x in own)]


def _part_backward(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    own: Sequence[Tensor],
    norm: nn.BatchNorm2d,
    training: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, list[Any]]:
    """Through convolution, ReLU and normalisation: the gradients of x, and of scale, shift and weight."""
    y = _rectified(x, mean, var, own[0], own[1], norm.eps)
    g, weight = _convolve_backward(g.contiguous(memory_format=_layout(x)), y, own[2], (True, wanted[2]))
    _rectify_backward(g, y)
    g, scale, shift = _norm_backward(g, x, own[0], mean, var, norm.eps, training)
    return g, [*_like([scale, shift], own[:2]), weight]


def _like(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    return [gradient.to(parameter.dtype) for gradient, parameter in zip(gradients, parameters)]


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
