"""The heavy-ball rule (16) without its iterates: the backward pass recovers them.

Since x_{k+1} = T_k(x_k) + β1 x_k + β2 x_{k−1},

    x_{k−1} = (x_{k+1} − T_k(x_k) − β1 x_k) / β2,

and the backward pass computes T_k(x_k) again before it needs x_{k−1}. The plain form is
:func:`optinspired_plugins.propagation.rules.heavy_ball`.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .recompute import recompute

__all__ = ["MAX_ERROR_GROWTH", "SplitTransform", "error_growth", "keeps_no_output", "reversible_heavy_ball"]

# An iterate that is recovered may lose five of float32's 24 bits.
MAX_ERROR_GROWTH = 32.0


def error_growth(beta1: Sequence[float], beta2: Sequence[float]) -> float:
    """Return the largest factor by which a rounding error in one iterate can grow in the iterates recovered from it.

    It is the largest |e_j| of e_{k−1} = (e_{k+1} − β1 e_k) / β2 from any e_{k+1} = 0, e_k = 1. How T changes an error
    is left out. The factor is 1 for (1, −1), and infinite where a β2 is 0.

    Args:
        beta1: β1 of every step.
        beta2: β2 of every step.
    """
    if 0 in beta2:
        return math.inf
    largest = 1.0
    for top in range(1, len(beta2) + 1):
        above, error = 0.0, 1.0
        for k in range(top, 0, -1):
            above, error = error, (above - beta1[k - 1] * error) / beta2[k - 1]
            largest = max(largest, abs(error))
    return largest


class SplitTransform(NamedTuple):
    """A transform T of (16) as a chain of parts, each of which is computed again from its own input.

    ``first`` keeps what autograd keeps, without the iterate; each of the ``others`` keeps its input. Without ``first``
    all of T is computed again from the iterate. ``module`` is the module whose state the parts read.
    """

    module: nn.Module
    first: Callable[[Tensor], Tensor] | None
    others: Sequence[Callable[[Tensor], Tensor]]


def reversible_heavy_ball(
    transforms: Sequence[SplitTransform], x0: Tensor, x1: Tensor, beta1: Sequence[Any], beta2: Sequence[Any]
) -> Tensor:
    """Return x_K of (16) from x_0 and x_1 by T_1, …, T_{K−1}, keeping no iterate but the last two.

    In reduced precision the iterates are float32, and each T gets its own rounded to the precision of ``x1``, which is
    also the result's: rounding errors of the iterates would grow in the recovered ones. A warning says so if the x_1
    that was recovered is far from the known one.

    Args:
        transforms: T_1, ….
        x0: x_0.
        x1: x_1, of the same shape.
        beta1: β1 of every step: a number, or a tensor of no dimension, which may have a gradient.
        beta2: β2 of every step, not 0: numbers or tensors as for β1.

    Raises:
        ValueError: a β2 is 0.
        RuntimeError: in the backward pass, where a second derivative is asked for, or where an iterate is needed and
            the result had no part in the loss.
    """
    for k, value in enumerate(beta2, start=1):
        if not value:
            raise ValueError(f"beta2=0 in step {k}: must not be 0, or x_{k - 1} cannot be recovered")
    dtype = x1.dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    iterates = _Iterates(beta1, beta2)
    x_prev, x = x0.to(wide), _FirstIterate.apply(x1.to(wide), iterates, 2e-2 if wide != dtype else 1e-3)
    for k, T in enumerate(transforms, start=1):
        momentum = _PreviousIterate.apply(x_prev, beta2[k - 1], iterates, k)
        t = _transform(iterates, k, T, x.to(dtype))
        if not t.requires_grad:  # T_k and everything before it is frozen
            iterates.frozen[k - 1] = x_prev.detach()
        elif momentum.requires_grad:
            momentum.grad_fn.transform = t.grad_fn
        x_prev, x = x, _Step.apply(t.to(wide), x, beta1[k - 1], momentum, x_prev.detach(), (iterates, k))
    return _LastIterates.apply(x, x_prev.detach(), iterates).to(dtype)


def _transform(iterates: _Iterates, k: int, T: SplitTransform, x: Tensor) -> Tensor:
    """Return T_k(x_k). When the backward pass computes it again, x_{k−1} is recovered from it."""
    dtype, needs_grad, once, (*middle, last) = x.dtype, x.requires_grad, [x], T.others

    def final(y: Tensor) -> Tensor:
        iterates.start_step(k)
        if T.first is None:
            # What a closure holds is kept: the iterate is there once, and recovered later.
            y = once.pop() if once else iterates.get(k).to(dtype).detach().requires_grad_(needs_grad)
        t = last(y)
        iterates.recover_previous(k, t)
        return _Transformed.apply(t)

    if T.first is None:
        return recompute(T.module, final, x.new_empty(1))  # tells the device
    with iterates.not_saved(k, x):
        y = T.first(once.pop())
    for part in middle:
        y = recompute(T.module, part, y)
    return recompute(T.module, final, y)


class _Iterates:
    """x_0, …, x_K of (16) in a backward pass: two neighbours are known, and lower ones follow from T_k(x_k)."""

    def __init__(self, beta1: Sequence[Any], beta2: Sequence[Any]) -> None:
        # As they are now: an optimiser may have moved them before a backward pass.
        values: list[list[Any]] = [
            [b.detach().clone() if isinstance(b, Tensor) else b for b in beta] for beta in (beta1, beta2)
        ]
        self.beta1, self.beta2 = ([0.0, *beta] for beta in values)  # step 0 has none
        self.known: dict[int, Tensor] = {}
        self.frozen: dict[int, Tensor] = {}  # those that no backward pass of a T will recover

    def is_needed(self, k: int) -> bool:
        """Return True if a gradient needs x_k: all but x_0, which only a learned coefficient needs."""
        return k > 0 or isinstance(self.beta2[1], Tensor)

    def start_step(self, k: int) -> None:
        """Forget x_{k+1} where T_k is about to be computed again and x_{k−1} is not needed."""
        if not self.is_needed(k - 1):
            self.known.pop(k + 1, None)

    def recover_previous(self, k: int, term: Tensor) -> None:
        """Take T_k(x_k) from a backward pass, and recover x_{k−1}."""
        if k + 1 not in self.known or not self.is_needed(k - 1):
            return
        above = self.known.pop(k + 1)
        free = keeps_no_output(term) and term.dtype == above.dtype
        x = term.detach().sub_(above) if free else term.detach() - above
        x = _add(x, self.known[k], self.beta1[k])
        self.known[k - 1] = x if _equals(self.beta2[k], -1) else x.div_(-self.beta2[k])

    def get(self, k: int) -> Tensor:
        """Return x_k."""
        x = self.known.get(k, self.frozen.get(k))
        if x is None:
            raise RuntimeError(
                f"x_{k} of a heavy-ball stage cannot be recovered: the stage's output must take part in the loss, not "
                "only something inside the stage, unless it has memory='stored' and no checkpointing"
            )
        return x

    @contextmanager
    def not_saved(self, k: int, x: Tensor) -> Iterator[None]:
        """Have autograd save the number of x_k in its place."""
        storage, shape, stride, dtype = x.untyped_storage()._cdata, x.shape, x.stride(), x.dtype
        offset = x.storage_offset()

        def pack(tensor: Tensor) -> Tensor | None:
            same = (
                tensor.shape == shape
                and tensor.stride() == stride
                and tensor.storage_offset() == offset
                and tensor.dtype == dtype
                and tensor.untyped_storage()._cdata == storage
            )
            return None if same else tensor

        def unpack(tensor: Tensor | None) -> Tensor:
            return self.get(k).to(dtype).detach() if tensor is None else tensor

        with saved_tensors_hooks(pack, unpack):
            yield


# Operations whose backward pass does not read their output, so that it may be overwritten.
_KEEP_NO_OUTPUT = frozenset(
    {
        "AddBackward0",
        "BatchNormWithUpdateBackward0",
        "ConvolutionBackward0",
        "CudnnBatchNormBackward0",
        "DivBackward0",
        "MiopenBatchNormBackward0",
        "MulBackward0",
        "NativeBatchNormBackward0",
        "NativeGroupNormBackward0",
    }
)


def keeps_no_output(x: Tensor) -> bool:
    """Return True if x is the output of an operation whose backward pass does not read it."""
    return x.grad_fn is not None and x.grad_fn.name() in _KEEP_NO_OUTPUT


def _equals(beta: Any, value: float) -> bool:
    return not isinstance(beta, Tensor) and beta == value


def _add(total: Tensor, x: Tensor, factor: Any) -> Tensor:
    """Add a multiple in place."""
    return total.addcmul_(x, factor) if isinstance(factor, Tensor) else total.add_(x, alpha=factor)


def _scaled(gradient: Tensor, beta: Any) -> Tensor:
    return gradient if _equals(beta, 1) else gradient * beta


class _FirstIterate(torch.autograd.Function):
    """The identity of x_1. Its backward comes last, when no iterate is needed any more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, iterates: _Iterates, tolerance: float) -> Tensor:
        ctx.iterates, ctx.tolerance, ctx.sample = iterates, tolerance, _sample(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        recovered = ctx.iterates.known.get(1)
        if recovered is not None and _is_checked(recovered):
            _compare(_sample(recovered), ctx.sample, ctx.tolerance)
        ctx.iterates.known = {}
        return gradient, None, None


class _LastIterates(torch.autograd.Function):
    """The identity of x_K. Its backward comes first: x_{K−1} and x_K, saved as autograd saves tensors, are known."""

    @staticmethod
    def forward(ctx: Any, last: Tensor, before: Tensor, iterates: _Iterates) -> Tensor:
        ctx.save_for_backward(before, last)
        ctx.iterates = iterates
        return last

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: a heavy-ball stage that recovers its iterates has no second derivative; pass "
                "memory='stored' and switch grad checkpointing off"
            )
        steps = len(ctx.iterates.beta1)
        ctx.iterates.known = {k: x.detach() for k, x in zip((steps - 1, steps), ctx.saved_tensors)}
        return gradient, None, None


class _Transformed(torch.autograd.Function):
    """The identity of T_k(x_k), which has T_k computed again, whole, before its backward pass and at the latest then.

    Torch ends a repetition at the last tensor that it is asked for: this one comes after T_k(x_k).
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.save_for_backward(t.new_empty(0))
        ctx.mark_dirty(t)
        return t

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return gradient


class _PreviousIterate(torch.autograd.Function):
    """A number that stands for β2 x_{k−1} and carries its gradient.

    It is made before T_k(x_k), so that its backward comes after T_k's: until then there is no gradient of x_{k−1}, and
    then x_{k−1} is known. ``ctx.transform`` is the :class:`_Transformed` of T_k.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Any, iterates: _Iterates, k: int) -> Tensor:
        ctx.iterates, ctx.k = iterates, k
        return x.new_zeros(()).expand_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        beta, slope = ctx.iterates.beta2[ctx.k], None
        if ctx.needs_input_grad[1]:
            if ctx.k - 1 not in ctx.iterates.known and hasattr(ctx, "transform"):
                _ = ctx.transform.saved_tensors  # nothing else asked for a gradient of T_k
            slope = (gradient * ctx.iterates.get(ctx.k - 1)).sum()
        return _scaled(gradient, beta), slope, None, None


class _Step(torch.autograd.Function):
    """T_k(x_k) + β1 x_k + β2 x_{k−1}, in the place of the first; the last's gradient goes to what stands for it."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, x: Tensor, beta: Any, momentum: Tensor, x_prev: Tensor, place: Any) -> Tensor:
        ctx.iterates, ctx.k = place
        ctx.mark_dirty(t)
        return _add(_add(t, x, beta), x_prev, ctx.iterates.beta2[ctx.k])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        beta, wanted = ctx.iterates.beta1[ctx.k], ctx.needs_input_grad[2]
        slope = (gradient * ctx.iterates.get(ctx.k)).sum() if wanted else None
        return gradient, _scaled(gradient, beta), slope, gradient, None, None


# --- is the recovered x_1 the one that was there? ---------------------------------------------------------------------

_passes = itertools.count()


def _sample(x: Tensor) -> Tensor:
    """Return a few hundred values of x, of its first row."""
    first = x.detach()[0].flatten()
    return first[:: max(1, len(first) // 256)].clone()


def _is_checked(x: Tensor) -> bool:
    """Return True if x is to be looked at: looking waits for a device, so only now and then where it is not the CPU."""
    if x.device.type == "cpu":
        return True
    capturing = x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return not capturing and next(_passes) % 64 == 0


def _compare(recovered: Tensor, known: Tensor, tolerance: float) -> None:
    error, size = (recovered - known).norm().item(), known.norm().item()
    if not error <= tolerance * size and math.isfinite(size):
        warnings.warn(
            f"memory: the x_1 that a heavy-ball stage recovered differs by more than {tolerance:g} of its size, so "
            "gradients are inexact: T enlarges rounding errors. Train with normalisations that use the statistics of "
            "the batch, compute in a higher precision, or pass memory='stored' without grad checkpointing",
            stacklevel=2,
        )
