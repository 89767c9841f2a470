"""A heavy-ball stage (16) of convolutions and batch normalisations as one autograd function.

The elementwise parts run as few kernels: normalisation with ReLU, and normalisation with the addition of iterates. The
backward pass is written out, so that it may keep all tensors, only the narrow ones, or none:

- ``Keep.ALL``: nothing is computed twice.
- ``Keep.NARROW``: the last convolution of each transform and all rectified tensors are recomputed, and x_{k−1} is
  recovered from x_{k+1}, x_k and T_k(x_k).
- ``Keep.NOTHING``: all of T_k is recomputed; only statistics are kept.

While iterates are recovered they have a low part (:class:`.channel_kernels.Iterate`), so that rounding errors of half
precision do not accumulate. Only the first two, x_K and x_{K−1}, are rounded, and their errors do not grow. The plain
form is :func:`optinspired_plugins.propagation.rules.heavy_ball`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch_norm import values_per_channel
from .channel_kernels import Iterate, RunningStatistics, wide_dtype
from .double_backward import needs_plain_gradients, plain_gradients
from .eager import pass_dtype
from .heavy_ball import compare_samples, may_read_values, sample

__all__ = [
    "Coefficients",
    "ConvNorm",
    "FusedStage",
    "Keep",
    "affine_map",
    "aligned",
    "convolution_gradients",
    "convolve",
    "fixed_map",
    "fused_stage",
    "in_precision",
    "kernels_for",
    "plain_norm",
]


def kernels_for(x: Tensor) -> ModuleType | None:
    """Return the kernels for images like x; ``None`` if there are none that are faster than torch's."""
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        return None
    is_supported = (
        x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and torch.version.hip is None
    )
    return _triton_kernels() if is_supported else None


@cache  # a failed import would be tried again in every call
def _triton_kernels() -> ModuleType | None:
    try:
        from . import triton_kernels
    except ImportError:  # Triton comes with torch for CUDA on Linux only, and its first releases lack what this needs
        return None
    return triton_kernels


def in_precision(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors in another precision, converted by few kernels."""
    tensors = [t.detach() for t in tensors]
    if all(t.dtype == dtype for t in tensors):
        return tensors
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


class Keep(Enum):
    """The tensors that a stage keeps for the backward pass."""

    ALL = "all"
    NARROW = "narrow"
    NOTHING = "nothing"


class ConvNorm(NamedTuple):
    """A convolution without bias, and a batch normalisation with scale and shift."""

    weight: Tensor
    scale: Tensor
    shift: Tensor
    geometry: tuple[Any, Any, Any, int]  # stride, padding, dilation, groups
    eps: float
    running: RunningStatistics | None  # read in evaluation, updated in training
    training: bool


class Coefficients(NamedTuple):
    """β1 and β2 of every step: numbers, or tensors of shape (steps,)."""

    beta1: Sequence[float] | Tensor
    beta2: Sequence[float] | Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """The learned coefficients."""
        return [b for b in self if isinstance(b, Tensor)]


class FusedStage(NamedTuple):
    """The transforms T_0, T_1, … as chains, each with a ReLU between its parts, and the shortcut of T_0."""

    transforms: Sequence[Sequence[ConvNorm]]
    shortcut: ConvNorm | None
    coefficients: Coefficients
    keep: Keep

    def parts(self) -> list[ConvNorm]:
        """Return all parts; the shortcut is the last."""
        return [*(part for T in self.transforms for part in T), *([self.shortcut] if self.shortcut else [])]


def fused_stage(stage: FusedStage, kernels: ModuleType, u: Tensor, x0: Tensor | None = None) -> Tensor:
    """Return x_K of (16), with x_0 = S(u), x_1 = T_0(u) + x_0 and x_{k+1} = T_k(x_k) + β1 x_k + β2 x_{k−1}.

    The result and the convolutions have autocast's precision, without autocast the precision of u.

    Args:
        stage: transforms and coefficients.
        kernels: :func:`kernels_for` u, or :mod:`.channel_kernels`.
        u: input of the stage.
        x0: x_0; by default the stage's shortcut of u, or u.
    """
    parameters = [p for part in stage.parts() for p in (part.weight, part.scale, part.shift)]
    return _Stage.apply(_Plan(stage, kernels, pass_dtype(u)), u, x0, *parameters, *stage.coefficients.tensors)


class _Factors:
    """The factors of x_{k+1}, of x_{k−1} and of the gradient of x_k, for every step k = 1, 2, …."""

    def __init__(self, coefficients: Coefficients, dtype: torch.dtype) -> None:
        beta1, beta2 = coefficients
        if isinstance(beta1, Tensor) and isinstance(beta2, Tensor):
            beta1, beta2 = beta1.detach().to(dtype), beta2.detach().to(dtype)
            one = torch.ones_like(beta1)
            above = torch.cat([beta2[1:], one[:1]])
            self.forward: Any = torch.stack([one, beta1, beta2], 1)
            self.recovery: Any = torch.stack([-one, -beta1, one], 1) / beta2[:, None]
            self.gradient: Any = torch.stack([one, beta1, above], 1)
            self.shortcut: Any = self.forward[0, ::2].contiguous() if len(beta1) else [1.0]
            return
        steps = list(zip(beta1, beta2))
        self.forward = [(1.0, b1, b2) for b1, b2 in steps]
        self.recovery = [(-1.0 / b2, -b1 / b2, 1.0 / b2) if b2 else None for b1, b2 in steps]
        self.gradient = [(1.0, b1, above) for (b1, _), above in zip(steps, [*list(beta2)[1:], 0.0])]
        self.shortcut = (1.0, beta2[0]) if steps else (1.0,)


class _Saved(NamedTuple):
    """The tensors that a chain keeps: outputs of convolutions, affine maps, rectified tensors."""

    convolved: list[Tensor]
    affine: list[Tensor]
    rectified: list[Tensor]


class _Plan:
    """A stage with its kernels and precision."""

    def __init__(self, stage: FusedStage, kernels: ModuleType, dtype: torch.dtype) -> None:
        self.stage, self.kernels, self.dtype = stage, kernels, dtype
        self.sizes = [len(T) for T in stage.transforms]
        # Recovery keeps two iterates. Fewer inputs of transforms are stored instead.
        self.recovers = stage.keep is not Keep.ALL and len(self.sizes) > 3
        self.factors = _Factors(stage.coefficients, wide_dtype(dtype))

    def chain(self, k: int) -> Sequence[ConvNorm]:
        """Return T_k, or the shortcut after the last."""
        if k < len(self.sizes):
            return self.stage.transforms[k]
        assert self.stage.shortcut is not None
        return [self.stage.shortcut]

    def chains(self, items: Sequence[Any]) -> list[Any]:
        """Divide a sequence with an entry per part into one per transform, and one for the shortcut."""
        rest = iter(items)
        sizes = [*self.sizes, 1] if self.stage.shortcut else self.sizes
        return [[next(rest) for _ in range(size)] for size in sizes]

    def weights(self, flat: Sequence[Tensor]) -> list[Tensor]:
        """Return the weights of all convolutions in the precision of the pass."""
        return in_precision(flat[: 3 * len(self.stage.parts()) : 3], self.dtype)

    def maps(self, flat: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Return scale and shift of every part."""
        return [flat[3 * i + 1 : 3 * i + 3] for i in range(len(self.stage.parts()))]

    def kept(self, saved: _Saved) -> _Saved:
        """Return the tensors of a chain that stay until the backward pass."""
        count = self.kept_convolutions(len(saved.convolved))
        return _Saved(saved.convolved[:count], saved.affine, saved.rectified if self.stage.keep is Keep.ALL else [])

    def kept_convolutions(self, length: int) -> int:
        """Return the number of convolutions of a chain that stay until the backward pass."""
        return {Keep.ALL: length, Keep.NARROW: length - 1, Keep.NOTHING: 0}[self.stage.keep]

    def add(self, factors: Any, x: Tensor, affine: Tensor | None, *terms: Iterate, **options: Any) -> Iterate:
        """Return the weighted sum, without reading terms with the number 0 as a factor."""
        if not isinstance(factors, Tensor):
            pairs = [(f, t) for f, t in zip(factors[1:], terms) if f != 0]
            factors, terms = [factors[0], *(f for f, _ in pairs)], tuple(t for _, t in pairs)
        return self.kernels.add(factors, x, affine, *terms, **options)


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, u: Tensor, x0: Tensor | None, *flat: Tensor) -> Tensor:
        with torch.autocast(u.device.type, enabled=False), torch.cuda.device_of(u):
            iterates, first, saved = _forward(plan, u, x0, flat)
        x = iterates[-1].high
        if not plan.recovers:  # no gradient reads x_K, and only learned coefficients read x_0
            iterates = iterates[0 if plan.stage.coefficients.tensors else 1 : -1]
        ctx.plan, ctx.first, ctx.iterates = plan, first, len(iterates)
        ctx.sizes = [tuple(map(len, chain)) for chain in saved]
        tensors = [t for iterate in iterates for t in iterate]
        ctx.save_for_backward(u, x0, *flat, *tensors, *(t for chain in saved for part in chain for t in part))
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        plan: _Plan = ctx.plan
        u, x0, *rest = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        flat, tensors = rest[: len(needs) - 2], iter(rest[len(needs) - 2 :])
        iterates = [Iterate(next(tensors), next(tensors)) for _ in range(ctx.iterates)]
        saved = [_Saved(*([next(tensors) for _ in range(n)] for n in sizes)) for sizes in ctx.sizes]
        with torch.autocast(u.device.type, enabled=False), torch.cuda.device_of(u):
            if needs_plain_gradients(gradient):
                inputs = [u, u.new_empty(0) if x0 is None else x0, *flat]
                return None, *plain_gradients(partial(_plain, plan, saved), inputs, gradient, needs)
            backward = _Backward(plan, u, x0, flat, saved, needs)
            gradients = backward.run(gradient, iterates)
        if backward.first is not None and may_read_values(u):
            compare_samples(backward.first, ctx.first, 1e-3 if wide_dtype(plan.dtype) == plan.dtype else 5e-2)
        return None, *gradients


# --- forward ----------------------------------------------------------------------------------------------------------


def _forward(plan: _Plan, u: Tensor, x0: Tensor | None, flat: Sequence[Tensor]) -> Any:
    """Return the iterates, all or the last two, a sample of x_1 if it will be recovered, and the saved tensors."""
    stage, kernels, first = plan.stage, plan.kernels, None
    weights, maps = plan.chains(plan.weights(flat)), plan.chains(plan.maps(flat))
    u, saved, of_shortcut = u.to(plan.dtype), [], []
    if stage.shortcut is not None:
        shortcut = _chain(plan, [stage.shortcut], weights[-1], maps[-1], u)
        x0 = kernels.add([1.0], shortcut.convolved[0], shortcut.affine[0]).high
        of_shortcut = [plan.kept(shortcut)]
    iterates = [Iterate(u if x0 is None else aligned(x0.to(plan.dtype), u))]
    for k, (T, own, maps_of_T) in enumerate(zip(stage.transforms, weights, maps)):
        chain = _chain(plan, T, own, maps_of_T, u if k == 0 else iterates[-1].high)
        factors = plan.factors.forward[k - 1] if k else (1.0, 1.0)
        terms = iterates[:-3:-1] if k else iterates
        iterates.append(plan.add(factors, chain.convolved[-1], chain.affine[-1], *terms, wide=plan.recovers))
        if plan.recovers:
            first = sample(iterates[-1].high) if k == 0 else first
            iterates = iterates[-2:]
        saved.append(plan.kept(chain))
    return [Iterate(x.high) for x in iterates], first, saved + of_shortcut


def _chain(plan: _Plan, chain: Sequence[ConvNorm], weights: Sequence[Tensor], maps: Any, x: Tensor) -> _Saved:
    """Run a chain up to its last convolution and the affine map of its last normalisation."""
    saved = _Saved([], [], [])
    for part, weight, (scale, shift) in zip(chain, weights, maps):
        if saved.convolved:
            x = plan.kernels.rectified(saved.convolved[-1], saved.affine[-1])
            saved.rectified.append(x)
        y = convolve(x, weight, part)
        saved.convolved.append(y)
        saved.affine.append(affine_map(plan.kernels, y, part, scale, shift))
    return saved


def affine_map(kernels: ModuleType, x: Tensor, part: ConvNorm, scale: Tensor, shift: Tensor) -> Tensor:
    """Return the affine map of a normalisation of x; ValueError in training if a channel has one value."""
    if part.training:
        values_per_channel(x)
        return kernels.normalization(x, scale, shift, part.eps, part.running)
    return fixed_map(kernels, x, part)


def fixed_map(kernels: ModuleType, x: Tensor, part: ConvNorm) -> Tensor:
    """Return the affine map of a normalisation of images like x in evaluation."""
    assert part.running is not None
    dtype = wide_dtype(x.dtype)
    mean, var = part.running.mean.to(dtype), part.running.var.to(dtype)
    return kernels.affine_of(part.scale.detach(), part.shift.detach(), mean, var, part.eps)


def convolve(x: Tensor, weight: Tensor, part: ConvNorm) -> Tensor:
    """Return the convolution of x, in the layout of x."""
    stride, padding, dilation, groups = part.geometry
    return aligned(F.conv2d(x, weight, None, stride, padding, dilation, groups), x)


def convolution_gradients(
    g: Tensor, x: Tensor, weight: Tensor, part: ConvNorm, needs_x: bool, needs_weight: bool
) -> tuple[Any, Any]:
    """Return the gradients of a convolution's input and weight, ``None`` where they are not needed."""
    stride, padding, dilation, groups = part.geometry
    needs = [needs_x, needs_weight, False]
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, [0, 0], groups, needs
    )
    return aligned(of_x, x) if needs_x else None, of_weight


def aligned(y: Tensor, x: Tensor) -> Tensor:
    """Return y in the layout of x."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


# --- backward ---------------------------------------------------------------------------------------------------------


class _Backward:
    """The backward pass of a stage, from the last step to the first.

    ``first`` is a sample of the recovered x_1.
    """

    def __init__(
        self, plan: _Plan, u: Tensor, x0: Tensor | None, flat: Sequence[Tensor], saved: list[_Saved], needs: Any
    ) -> None:
        self.plan, self.u, self.saved = plan, u.to(plan.dtype), saved
        self.has_x0 = x0 is not None
        self.weights = plan.chains(plan.weights(flat))
        self.needs_u, self.needs_x0, *self.needs = needs
        self.gradients: list[Tensor | None] = [None] * len(flat)
        self.slopes = [p.new_zeros(p.shape, dtype=wide_dtype(plan.dtype)) for p in plan.stage.coefficients.tensors]
        self.first: Tensor | None = None

    def run(self, gradient: Tensor, iterates: list[Iterate]) -> list[Tensor | None]:
        """Return the gradients of u, x_0, the parameters and the coefficients."""
        g, above = aligned(gradient.to(self.plan.dtype), self.u), None
        for k in reversed(range(1, len(self.plan.sizes))):
            if not self.is_needed(k):
                return self.result(None, None)
            g, above = self.step(k, iterates, g, above), g
        if self.plan.recovers:
            iterates.clear()
        return self.result(*self.of_start(g, above)) if self.is_needed(0) else self.result(None, None)

    def step(self, k: int, iterates: list[Iterate], g: Tensor, above: Tensor | None) -> Tensor:
        """Return the gradient of x_k from the gradients of x_{k+1} and x_{k+2}.

        ``iterates`` are the stored ones, or x_k and x_{k+1}; these are replaced by x_{k−1} and x_k.
        """
        plan, first = self.plan, 0 if self.slopes else 1  # first: number of the first stored iterate
        x = iterates[0 if plan.recovers else k - first]
        chain = self.restored(k, x.high)
        if plan.recovers and (k > 1 or self.slopes):
            iterates[:] = [self.below(k, chain, iterates), x]
        if self.slopes:
            x_prev = iterates[0 if plan.recovers else k - 1]
            self.slopes[0][k - 1], self.slopes[1][k - 1] = plan.kernels.dots(g, x, x_prev)
        of_x = self.of_chain(k, x.high, chain, g, True)
        terms = [Iterate(g)] if above is None else [Iterate(g), Iterate(above)]
        return plan.add(plan.factors.gradient[k - 1], of_x, None, *terms, out=Iterate(of_x)).high

    def is_needed(self, k: int) -> bool:
        """Return True if a gradient of T_k or of anything before it is needed."""
        count = 3 * sum(self.plan.sizes[: k + 1])
        last = 3 * sum(self.plan.sizes)
        return self.needs_u or self.needs_x0 or any(self.needs[:count]) or any(self.needs[last:])

    def restored(self, k: int, x: Tensor) -> _Saved:
        """Return the tensors of chain k; the ones that were not kept are recomputed."""
        saved, self.saved[k] = self.saved[k], _Saved([], [], [])
        rectified = list(saved.rectified)
        for i, (part, weight) in enumerate(zip(self.plan.chain(k), self.weights[k])):
            if i == len(saved.convolved):
                saved.convolved.append(convolve(rectified[i - 1] if i else x, weight, part))
            if i == len(rectified) and i < len(self.weights[k]) - 1:
                rectified.append(self.plan.kernels.rectified(saved.convolved[i], saved.affine[i]))
        return saved._replace(rectified=rectified)

    def below(self, k: int, chain: _Saved, iterates: list[Iterate]) -> Iterate:
        """Return x_{k−1}, recovered from x_k and x_{k+1}."""
        plan = self.plan
        out = iterates[1] if k < len(plan.sizes) - 2 else None  # x_{k+1} is no saved tensor
        term = chain.convolved[-1], chain.affine[-1]
        wide = k > 2 or bool(self.slopes)  # nothing is recovered from x_1
        x = plan.kernels.add(plan.factors.recovery[k - 1], *term, *iterates, wide=wide, out=out)
        if k == 2:
            self.first = sample(x.high)
        return x

    def of_chain(self, k: int, x: Tensor, saved: _Saved, g: Any, needs_x: bool) -> Any:
        """Return the gradient of the chain's input x from its output's gradient g; store its parameters' gradients."""
        plan, chain = self.plan, self.plan.chain(k)
        start = 3 * sum(plan.sizes[:k])
        for i in reversed(range(len(chain))):
            part, y, affine, place = chain[i], saved.convolved.pop(), saved.affine[i], start + 3 * i
            rectify = i < len(chain) - 1
            sums = plan.kernels.gradient_sums(g, y, affine, rectify, part.training)
            out = y if i >= plan.kept_convolutions(len(chain)) else None
            g = plan.kernels.gradient_of_input(g, y, affine, sums.coefficients, rectify, out=out)
            del y, out
            source = saved.rectified.pop() if i else x
            needs = i > 0 or needs_x, self.needs[place]
            g, of_weight = convolution_gradients(g, source, self.weights[k][i], part, *needs)
            self.gradients[place : place + 3] = of_weight, sums.weight, sums.bias
        return g

    def of_start(self, g: Tensor, above: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of u and x_0 from the gradients of x_1 and x_2."""
        plan, u = self.plan, self.u
        of_u = self.of_chain(0, u, self.restored(0, u), g, self.needs_u)
        of_x0 = g if above is None else plan.add(plan.factors.shortcut, g, None, Iterate(above)).high
        if plan.stage.shortcut is not None:
            k = len(plan.sizes)
            of_x0 = self.of_chain(k, u, self.restored(k, u), of_x0, self.needs_u)
        elif self.has_x0:
            return of_u, of_x0 if self.needs_x0 else None
        return (of_u + of_x0 if self.needs_u else None), None

    def result(self, of_u: Tensor | None, of_x0: Tensor | None) -> list[Tensor | None]:
        """Return all gradients in the order of the function's inputs."""
        gradients = self.gradients[: len(self.gradients) - len(self.slopes)] + self.slopes
        return [of_u, of_x0, *(g if need else None for g, need in zip(gradients, self.needs))]


# --- plain form -------------------------------------------------------------------------------------------------------


def _plain(plan: _Plan, saved: list[_Saved], u: Tensor, x0: Tensor, *flat: Tensor) -> Tensor:
    """Return x_K of (16) by differentiable operations; an empty x0 stands for the shortcut of u."""
    stage, u = plan.stage, u.to(plan.dtype)
    parts = plan.chains([flat[3 * i : 3 * i + 3] for i in range(len(stage.parts()))])
    chains = [partial(_plain_chain, plan, plan.chain(k), of_chain, saved[k]) for k, of_chain in enumerate(parts)]
    if x0.numel() == 0:
        x0 = u if stage.shortcut is None else chains[-1](u)
    beta1, beta2 = flat[3 * len(stage.parts()) :] or stage.coefficients
    x_prev, x = x0.to(plan.dtype), chains[0](u) + x0.to(plan.dtype)
    for T, b1, b2 in zip(chains[1:], beta1, beta2):
        x_prev, x = x, T(x) + b1 * x + b2 * x_prev
    return x


def _plain_chain(plan: _Plan, chain: Sequence[ConvNorm], parameters: Any, saved: _Saved, x: Tensor) -> Tensor:
    for i, (part, (weight, scale, shift)) in enumerate(zip(chain, parameters)):
        y = convolve(x.relu() if i else x, weight.to(plan.dtype), part)
        x = plain_norm(part, scale, shift, saved.affine[i], y).to(plan.dtype)
    return x


def plain_norm(part: ConvNorm, scale: Tensor, shift: Tensor, affine: Tensor, x: Tensor) -> Tensor:
    """Return the normalised x by differentiable operations, in evaluation with the statistics of an affine map."""
    _, _, mean, inverse_std = affine
    running = None if part.training else mean, None if part.training else inverse_std**-2 - part.eps
    dtype = wide_dtype(x.dtype)
    return F.batch_norm(x.to(dtype), *running, scale.to(dtype), shift.to(dtype), part.training, 0.0, part.eps)
