"""Backward passes that compute again what they would otherwise keep.

:func:`recompute` is torch's checkpoint with a module's buffers left alone in the second pass. :func:`propagate` is the
heavy-ball rule (16) over transforms whose iterates are not kept: since x_{k+1} = T_k(x_k) + β1 x_k + β2 x_{k−1},

    x_{k−1} = (x_{k+1} − T_k(x_k) − β1 x_k) / β2,

and the backward pass knows T_k(x_k) when it needs x_{k−1}. The plain form is
:func:`optinspired_plugins.propagation.heavy_ball`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from .batch_statistics import batch_statistics, move_running

__all__ = ["GROWTH_LIMIT", "Parts", "growth", "propagate", "recompute"]

# An iterate that is found again may lose five of float32's 24 bits.
GROWTH_LIMIT = 32.0


def growth(beta1: Sequence[float], beta2: Sequence[float]) -> float:
    """Return how many times its size an error of one iterate can have in a lower one that is found again from it.

    That is the largest |e_j| of e_{k−1} = (e_{k+1} − β1 e_k) / β2 from any e_{k+1} = 0, e_k = 1: what T makes of an
    error is left out. It is 1 for (1, −1), and infinite where a β2 is 0.

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


class _KeptBuffers:
    """Puts the buffers back afterwards: a pass that is a repetition has been counted already."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.before = [(buffer, buffer.clone()) for buffer in self.module.buffers()]

    def __exit__(self, *error: object) -> None:
        for buffer, value in self.before:
            buffer.data.copy_(value)  # data: no change that autograd should see


class _Normalize(torch.autograd.Function):
    """Batch normalisation by statistics that are given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, mean, invstd = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, invstd, True, ctx.eps, needs
        )
        return (*(g if needed else None for g, needed in zip(found, needs)), None, None, None)


class _StatisticsOnce(TorchFunctionMode):
    """Keeps the batch statistics of a first pass for the passes that repeat it: they are the costly part on a CPU."""

    def __init__(self, found: list[tuple[Tensor, Tensor]], module: nn.Module | None = None) -> None:
        super().__init__()
        self.found, self.buffers = found, _KeptBuffers(module) if module is not None else None

    def __enter__(self) -> Any:
        self.calls = 0
        if self.buffers is not None:
            self.buffers.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self.buffers is not None:
            self.buffers.__exit__()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = self._normalize(*args, **kwargs) if function is F.batch_norm else None
        return function(*args, **kwargs) if found is None else found

    def _normalize(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        """``F.batch_norm``; ``None`` where torch's own is to be taken."""
        exact = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
        if not (training and exact and (weight is None or weight.dtype == x.dtype)):
            return None
        if self.buffers is None:
            with torch.no_grad():
                self.found.append(batch_statistics(x))
                move_running(running_mean, running_var, *self.found[-1], x.numel() // x.shape[1], momentum)
        self.calls += 1
        return _Normalize.apply(x, weight, bias, *self.found[self.calls - 1], eps)


@torch.compiler.disable
def recompute(module: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    """Return function(*inputs), keeping only the inputs and computing the function again in the backward pass.

    Running statistics are updated once, and what is random is drawn once: the second pass replays the random state.

    Args:
        module: the module whose buffers the function may change.
        function: what to compute; itself often the module.
        *inputs: its arguments.
    """
    found: list[tuple[Tensor, Tensor]] = []
    contexts = (_StatisticsOnce(found), _StatisticsOnce(found, module))
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=lambda: contexts)


class Parts(NamedTuple):
    """A transform of (16) as a chain of parts, behind each of which the backward pass begins anew.

    ``first`` keeps what autograd keeps, without the iterate; each of the ``others`` keeps its input and is computed
    again. Without ``first`` all is computed again, from the iterate. ``module`` holds the buffers.
    """

    module: nn.Module
    first: Callable[[Tensor], Tensor] | None
    others: Sequence[Callable[[Tensor], Tensor]]


class _Iterates:
    """x_0, …, x_K of (16) in a backward pass: two neighbours are known, and lower ones follow from T_k(x_k)."""

    def __init__(self, beta1: Sequence[Any], beta2: Sequence[Any]) -> None:
        # As they are now: an optimiser may have moved them before a backward pass.
        values: list[list[Any]] = [
            [b.detach().clone() if isinstance(b, Tensor) else b for b in beta] for beta in (beta1, beta2)
        ]
        self.beta1, self.beta2 = ([0.0, *beta] for beta in values)  # step 0 has none
        self.known: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}  # those that no backward pass of a T will find

    def wants(self, k: int) -> bool:
        """Say whether a gradient needs x_k: all but x_0, which only a learned coefficient does."""
        return k > 0 or isinstance(self.beta2[1], Tensor)

    def begin(self, k: int) -> None:
        """T_k is about to be computed again."""
        if not self.wants(k - 1):
            self.known.pop(k + 1, None)

    def offer(self, k: int, term: Tensor) -> None:
        """Take T_k(x_k) from a backward pass, and find x_{k−1}."""
        if not self.known or not self.wants(k - 1):
            return
        above = self.known.pop(k + 1)
        free = term.grad_fn is not None and term.grad_fn.name() in _KEEP_NO_OUTPUT and term.dtype == above.dtype
        x = term.detach().sub_(above) if free else term.detach() - above
        x = _add(x, self.known[k], self.beta1[k])
        self.known[k - 1] = x if _is(self.beta2[k], -1) else x.div_(-self.beta2[k])

    def get(self, k: int) -> Tensor:
        """Return x_k."""
        x = self.known.get(k, self.kept.get(k))
        if x is None:
            raise RuntimeError(f"x_{k} is needed before T_{k + 1} was differentiated: is a gradient taken twice?")
        return x

    @contextmanager
    def unkept(self, k: int, x: Tensor) -> Iterator[None]:
        """Have autograd keep the number of x_k in its place."""
        address, shape, stride, dtype = x.data_ptr(), x.shape, x.stride(), x.dtype

        def pack(tensor: Tensor) -> Tensor | None:
            same = tensor.data_ptr() == address and tensor.shape == shape and tensor.stride() == stride
            return None if same else tensor

        def unpack(tensor: Tensor | None) -> Tensor:
            return self.get(k).to(dtype).detach() if tensor is None else tensor

        with saved_tensors_hooks(pack, unpack):
            yield


# Operations that need no output of theirs in the backward pass, so that it may be overwritten.
_KEEP_NO_OUTPUT = (
    "NativeBatchNormBackward0",
    "_NormalizeBackward",
    "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0",
    "ConvolutionBackward0",
    "MulBackward0",
    "DivBackward0",
    "AddBackward0",
)


def _is(beta: Any, value: float) -> bool:
    return not isinstance(beta, Tensor) and beta == value


def _add(total: Tensor, x: Tensor, factor: Any) -> Tensor:
    """Add a multiple in place."""
    return total.addcmul_(x, factor) if isinstance(factor, Tensor) else total.add_(x, alpha=factor)


def _scaled(gradient: Tensor, beta: Any) -> Tensor:
    return gradient if _is(beta, 1) else gradient * beta


class _Entry(torch.autograd.Function):
    """The identity of x_1. Its backward comes last: no iterate is needed any more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, iterates: _Iterates) -> Tensor:
        ctx.iterates = iterates
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.iterates.known = {}
        return gradient, None


class _Exit(torch.autograd.Function):
    """The identity of x_K. Its backward comes first: x_{K−1} and x_K, kept as autograd keeps tensors, are known."""

    @staticmethod
    def forward(ctx: Any, last: Tensor, before: Tensor, iterates: _Iterates) -> Tensor:
        ctx.save_for_backward(before, last)
        ctx.iterates = iterates
        return last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        steps = len(ctx.iterates.beta1)
        ctx.iterates.known = {k: x.detach() for k, x in zip((steps - 1, steps), ctx.saved_tensors)}
        return gradient, None, None


class _Momentum(torch.autograd.Function):
    """A number that stands for β2 x_{k−1} and carries its gradient.

    It is made before T_k(x_k), so that its backward comes after T_k's: until then there is no gradient of x_{k−1}, and
    then x_{k−1} is known.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Any, iterates: _Iterates, k: int) -> Tensor:
        ctx.iterates, ctx.k = iterates, k
        return x.new_zeros(()).expand_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        beta, wanted = ctx.iterates.beta2[ctx.k], ctx.needs_input_grad[1]
        slope = (gradient * ctx.iterates.get(ctx.k - 1)).sum() if wanted else None
        return _scaled(gradient, beta), slope, None, None


class _Step(torch.autograd.Function):
    """T_k(x_k) + β1 x_k + β2 x_{k−1}, in the place of the first; the last's gradient goes to what stands for it."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, x: Tensor, beta: Any, stand_in: Tensor, x_prev: Tensor, iterates: Any) -> Tensor:
        ctx.iterates, ctx.k = iterates
        ctx.mark_dirty(t)
        return _add(_add(t, x, beta), x_prev, ctx.iterates.beta2[ctx.k])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        beta, wanted = ctx.iterates.beta1[ctx.k], ctx.needs_input_grad[2]
        slope = (gradient * ctx.iterates.get(ctx.k)).sum() if wanted else None
        return gradient, _scaled(gradient, beta), slope, gradient, None, None


@torch.compiler.disable
def propagate(
    transforms: Sequence[Parts], x0: Tensor, x1: Tensor, beta1: Sequence[Any], beta2: Sequence[Any]
) -> Tensor:
    """Return x_K of (16) from x_0 and x_1 by T_1, …, T_{K−1}, without keeping an iterate but the last two.

    In reduced precision the iterates are float32, and each T gets its own rounded to the precision of ``x1``, which is
    also the result's: rounding errors of the iterates would grow in the reconstruction.

    Args:
        transforms: T_1, ….
        x0: x_0.
        x1: x_1, of the same shape.
        beta1: β1 of every step: a number, or a tensor of no dimension, which may have a gradient.
        beta2: β2 of every step, not 0; likewise.

    Raises:
        ValueError: a β2 is 0.
    """
    for k, value in enumerate(beta2, start=1):
        if not value:
            raise ValueError(f"beta2=0 in step {k}: must not be 0, or x_{k - 1} cannot be found again")
    dtype = x1.dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    iterates = _Iterates(beta1, beta2)
    x_prev, x = x0.to(wide), _Entry.apply(x1.to(wide), iterates)
    for k, T in enumerate(transforms, start=1):
        stand_in = _Momentum.apply(x_prev, beta2[k - 1], iterates, k)
        t = _term(iterates, k, T, x.to(dtype)).to(wide)
        if not t.requires_grad:  # T_k and all before it is frozen
            iterates.kept[k - 1] = x_prev.detach()
        x_prev, x = x, _Step.apply(t, x, beta1[k - 1], stand_in, x_prev.detach(), (iterates, k))
    return _Exit.apply(x, x_prev.detach(), iterates).to(dtype)


def _term(iterates: _Iterates, k: int, T: Parts, x: Tensor) -> Tensor:
    """T_k(x_k); the pass of the backward offers its value."""
    dtype, needs_grad, once, (*middle, last) = x.dtype, x.requires_grad, [x], T.others

    def final(y: Tensor | None) -> Tensor:
        iterates.begin(k)
        if y is None:
            # What a closure holds is kept: the iterate is there once, and found again later.
            y = once.pop() if once else iterates.get(k).to(dtype).detach().requires_grad_(needs_grad)
        t = last(y)
        iterates.offer(k, t)
        return t

    y = None
    if T.first is not None:
        with iterates.unkept(k, x):
            y = T.first(once.pop())
        for part in middle:
            y = recompute(T.module, part, y)
    with set_checkpoint_early_stop(False):  # or it would stop before the value
        return recompute(T.module, final, y)
