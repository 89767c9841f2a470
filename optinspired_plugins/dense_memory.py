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

from .batch_statistics import batch_statistics, channel_sums, track

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
    return _Rectifier.of(mean, var, norm.weight, norm.bias, norm.eps, split=False)(x)


class _Plan(NamedTuple):
    layers: list[DenseLayer]
    momentum: list[float]
    beta: float
    lean: bool
    dtype: torch.dtype

    @property
    def training(self) -> bool:
        return self.layers[0].norm1.training

    def rectifier(self, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, own: Sequence[Tensor]) -> _Rectifier:
        """Return the norm, with a scale and shift of ``own``, and the ReLU behind it."""
        split = mean.device.type == "cpu" and self.dtype == self.accumulate
        return _Rectifier.of(mean, var, own[0], own[1], norm.eps, split)

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


def _convolve_backward(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    padding = [weight.shape[2] // 2] * 2
    found = torch.ops.aten.convolution_backward(
        gradient, x, weight.to(x.dtype), None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return found[0], found[1].to(weight.dtype)


class _Rectifier(NamedTuple):
    """max(norm(x), 0) by given statistics as a · y, y = max(s x + c, 0), with a the next convolution's to take.

    With factor f and offset o of the normalisation, a = |f|, s = ±1 and c = o/|f|: one pass over x where every f is
    positive (s is None then). Where a is not ``split`` off, and in ``direct`` channels, whose f is so small that x
    would be lost in y, a = 1, s = f and c = o.
    """

    a: Tensor
    s: Tensor | None
    c: Tensor
    direct: Tensor | None = None
    split: bool = True

    @staticmethod
    def of(mean: Tensor, var: Tensor, scale: Tensor, shift: Tensor, eps: float, split: bool) -> _Rectifier:
        """Return it; ``split`` takes a out."""
        scale, shift = scale.to(mean.dtype), shift.to(mean.dtype)
        factor = scale * (var + eps).rsqrt()
        if not split:
            offset = torch.addcmul(shift, mean, factor, value=-1)
            return _Rectifier(torch.ones_like(factor), factor, offset, split=False)
        least = shift.abs() * 1e-3
        if bool((scale > least).all()):
            return _Rectifier(factor, None, torch.addcdiv(-mean, shift, factor))
        clear = scale.abs() > least
        a = factor.abs().where(clear, 1)
        direct = None if bool(clear.all()) else clear.logical_not().nonzero().flatten()
        return _Rectifier(a, factor / a, torch.addcmul(shift, mean, factor, value=-1) / a, direct)

    def __call__(self, x: Tensor) -> Tensor:
        """Return y."""
        c = self.c[:, None, None]
        if self.s is None and x.dtype == torch.float32 and x.device.type == "cpu":
            return torch.ops.aten._add_relu.Tensor(x, c)  # one pass; it knows float32 alone
        y = x + c if self.s is None else (x * self.s[:, None, None]).add_(c)
        return y.relu_().to(x.dtype)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution of max(norm(x), 0)."""
        return _convolve(self(x), self.take(weight))

    def take(self, weight: Tensor) -> Tensor:
        """Return the weight of the next convolution with a in it."""
        return weight * self.a.to(weight.dtype)[:, None, None]


class _Part(NamedTuple):
    """A normalisation, the ReLU and the convolution behind it, on their way back."""

    norm: nn.BatchNorm2d
    mean: Tensor
    var: Tensor
    rectifier: _Rectifier
    own: Sequence[Tensor]
    wanted: Sequence[bool]

    def backward(self, g: Tensor, x: Tensor, y: Tensor, through: bool) -> tuple[Tensor, list[Any]]:
        """Return the gradient of x and those of scale, shift and weight; y is what the ReLU makes of x.

        The statistics of a batch are gone through if ``through``, otherwise they count as given.
        """
        weight = self.rectifier.take(self.own[2])
        g, weight_gradient = _convolve_backward(g.contiguous(memory_format=_layout(y)), y, weight)
        torch.ops.aten.threshold_backward.grad_input(g, y, 0, grad_input=g)
        # g is the gradient of s x + c now: of a normalisation of scale s / invstd.
        s, invstd = self.rectifier.s, (self.var + self.norm.eps).rsqrt()
        dx: Any
        if through or not self.rectifier.split:
            scale = invstd.reciprocal() if s is None else s / invstd
            x, mask = x.contiguous(memory_format=_layout(g)), [through, True, True]
            dx, *sums = torch.ops.aten.native_batch_norm_backward(
                g, x, scale, self.mean, self.var, self.mean, invstd, through, self.norm.eps, mask
            )
        else:
            # Σ g y = Σ W ∂W: a convolution is linear in both.
            total = channel_sums(g)
            sums = [self._with_x(g, x, (weight * weight_gradient).sum((0, 2, 3)), total) * invstd, total]
        if not through:
            dx = g if s is None else g.mul_(s[:, None, None])
        own = [(gradient / self.rectifier.a).to(p.dtype) for gradient, p in zip(sums, self.own)]
        of_weight = self.rectifier.take(weight_gradient.to(self.own[2].dtype)) if self.wanted[2] else None
        return dx, [*own, of_weight]

    def _with_x(self, g: Tensor, x: Tensor, with_y: Tensor, total: Tensor) -> Tensor:
        """Return Σ g (x − mean) of every channel from Σ g y and Σ g: g = 0 wherever y is not s x + c."""
        s, c, direct = self.rectifier.s, self.rectifier.c, self.rectifier.direct
        found = with_y - c * total
        found = (found if s is None else found / s) - self.mean * total
        if direct is not None:
            found[direct] = ((x[:, direct] - self.mean[direct, None, None]) * g[:, direct]).sum((0, 2, 3))
        return found


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
            mean[part], var[part] = batch_statistics(value.to(plan.accumulate))

    put(z, 0)
    kept: list[list[Tensor]] = []
    rectifiers: list[list[_Rectifier]] = []
    m, end = None, first
    for k, (layer, own) in enumerate(zip(plan.layers, parameters)):
        if plan.training:
            track(layer.norm1, mean[:end], var[:end], count)
        mean1, var1 = (mean[:end], var[:end]) if plan.training else _running(layer.norm1, plan.accumulate)
        rectifiers.append([plan.rectifier(layer.norm1, mean1, var1, own)])
        t = rectifiers[-1][0].convolve(buffer[:, :end], own[2])
        inner: list[Tensor] = []
        if layer.norm2 is not None:
            if plan.training:
                mean2, var2 = batch_statistics(t.to(plan.accumulate))
                track(layer.norm2, mean2, var2, count)
            else:
                mean2, var2 = _running(layer.norm2, plan.accumulate)
            inner = [mean2, var2] if plan.lean else [mean2, var2, t]
            rectifiers[-1].append(plan.rectifier(layer.norm2, mean2, var2, own[3:]))
            t = rectifiers[-1][1].convolve(t, own[5])
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
    ctx.plan, ctx.rectifiers, ctx.sizes = plan, rectifiers, [len(inner) for inner in kept]
    ctx.save_for_backward(buffer, mean, var, *(x for own in parameters for x in own), *(x for i in kept for x in i))
    return buffer


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
        x = buffer[:, :start]
        first = _Part(layer.norm1, mean1, var1, ctx.rectifiers[k][0], own, wanted)
        y = first.rectifier(x) if plan.lean or layer.norm2 is None else None
        later: list[Any] = []
        if layer.norm2 is not None:
            second = _Part(layer.norm2, inner[0], inner[1], ctx.rectifiers[k][1], own[3:], wanted[3:])
            middle = inner[2] if y is None else _convolve(y, first.rectifier.take(own[2]))
            g, later = second.backward(g, middle, second.rectifier(middle), plan.training)
            del middle, inner
        g, earlier = first.backward(g, x, first.rectifier(x) if y is None else y, False)
        total[:, :start].add_(g)
        del g, x, y
        if plan.training:
            invstd = (var1 + layer.norm1.eps).rsqrt()
            factor = own[0].to(mean.dtype) * invstd / count
            from_mean[:start].addcmul_(factor, earlier[1])
            from_var[:start].addcmul_(factor * invstd, earlier[0])
        found.append([*earlier, *later])
        end = start
    return [settle(slice(0, end)).to(gradient.dtype), *(x for own in reversed(found) for x in own)]


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
