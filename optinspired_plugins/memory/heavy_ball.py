"""The heavy-ball rule (16) with reversible iterates.

Since x_{k+1} = T_k(x_k) + β1 x_k + β2 x_{k−1},

    x_{k−1} = (x_{k+1} − T_k(x_k) − β1 x_k) / β2,

and the backward pass recomputes T_k(x_k) before it needs x_{k−1}. The plain form is
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

__all__ = [
    "MAX_ERROR_GROWTH",
    "SplitTransform",
    "compare_samples",
    "error_growth",
    "keeps_no_output",
    "may_read_values",
    "reversible_heavy_ball",
    "sample",
]

# A recovered iterate may lose five of the 24 bits of float32.
MAX_ERROR_GROWTH = 32.0


_questions = itertools.count()


def may_read_values(x: Tensor) -> bool:
    """Return True on the CPU; on a GPU, which would be waited for, once in 61 calls.

    It is False while a CUDA graph is captured. 61 is prime, so that every stage of a network gets its turn.
    """
    if x.device.type == "cpu":
        return True
    capturing = x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return not capturing and next(_questions) % 61 == 0


def error_growth(beta1: Sequence[float], beta2: Sequence[float]) -> float:
    """Return the largest growth of a rounding error in recovered iterates.

    It is the largest ``|e_j|`` of e_{k−1} = (e_{k+1} − β1 e_k) / β2 from any e_{k+1} = 0, e_k = 1. The effect of T on
    an error is left out. The factor is 1 for (1, −1), and infinite if a β2 is 0.

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
    """A transform T of (16) as a chain of parts for checkpointing.

    ``first`` saves the tensors that autograd saves, except the iterate. Each of the ``others`` saves its input and is
    recomputed. Without ``first`` all of T is recomputed from the iterate. The parts read the state of ``module``.
    """

    module: nn.Module
    first: Callable[[Tensor], Tensor] | None
    others: Sequence[Callable[[Tensor], Tensor]]


def reversible_heavy_ball(
    transforms: Sequence[SplitTransform], x0: Tensor, x1: Tensor, beta1: Sequence[Any], beta2: Sequence[Any]
) -> Tensor:
    """Return x_K of (16) from x_0 and x_1 by T_1, …, T_{K−1}, saving only the last two iterates.

    With ``x1`` in reduced precision the iterates are float32, since rounding errors would grow in the recovered ones;
    the inputs of T and the result have the precision of ``x1``. The backward pass warns if the recovered x_1 is far
    from the true one.

    Args:
        transforms: T_1, ….
        x0: x_0.
        x1: x_1, of the same shape.
        beta1: β1 of every step: a number, or a tensor without dimensions, which may have a gradient.
        beta2: β2 of every step, not 0, in the same form; tensors on a GPU are not checked.

    Raises:
        ValueError: a β2 is 0.
        RuntimeError: in the backward pass, if it should be differentiable, or if an iterate is needed and the result is
            not part of the loss.
    """
    for k, value in enumerate(beta2, start=1):
        is_readable = not isinstance(value, Tensor) or value.device.type == "cpu"  # a GPU would be waited for
        if is_readable and not value:
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
    """Return T_k(x_k); when the backward pass recomputes it, x_{k−1} is recovered from it."""
    dtype, needs_grad, holder, (*middle, last) = x.dtype, x.requires_grad, [x], T.others

    def final(y: Tensor) -> Tensor:
        iterates.start_step(k)
        if T.first is None:
            # The first pass takes the iterate out of the closure, which would keep it alive.
            y = holder.pop() if holder else iterates.get(k).to(dtype).detach().requires_grad_(needs_grad)
        t = last(y)
        iterates.recover_previous(k, t)
        return _Transformed.apply(t)

    if T.first is None:
        return recompute(T.module, final, x.new_empty(1))  # tells the device
    with iterates.do_not_save(k, x):
        y = T.first(holder.pop())
    for part in middle:
        y = recompute(T.module, part, y)
    return recompute(T.module, final, y)


class _Iterates:
    """The iterates x_0, …, x_K of (16) in a backward pass.

    Two neighbours are available at a time; x_{k−1} follows from x_k, x_{k+1} and T_k(x_k).
    """

    def __init__(self, beta1: Sequence[Any], beta2: Sequence[Any]) -> None:
        # Copies: an optimiser may change the coefficients before a backward pass.
        values: list[list[Any]] = [
            [b.detach().clone() if isinstance(b, Tensor) else b for b in beta] for beta in (beta1, beta2)
        ]
        self.beta1, self.beta2 = ([0.0, *beta] for beta in values)  # step 0 has none
        self.available: dict[int, Tensor] = {}
        self.frozen: dict[int, Tensor] = {}  # not recovered, since these T have no backward pass

    def is_needed(self, k: int) -> bool:
        """Return True if a gradient needs x_k; only a learned coefficient needs x_0."""
        return k > 0 or isinstance(self.beta2[1], Tensor)

    def start_step(self, k: int) -> None:
        """Free x_{k+1} before T_k is recomputed, if x_{k−1} is not needed."""
        if not self.is_needed(k - 1):
            self.available.pop(k + 1, None)

    def recover_previous(self, k: int, term: Tensor) -> None:
        """Recover x_{k−1} from T_k(x_k)."""
        if k + 1 not in self.available or not self.is_needed(k - 1):
            return
        above = self.available.pop(k + 1)
        free = keeps_no_output(term) and term.dtype == above.dtype
        x = term.detach().sub_(above) if free else term.detach() - above
        x = _add(x, self.available[k], self.beta1[k])
        self.available[k - 1] = x if _equals(self.beta2[k], -1) else x.div_(-self.beta2[k])

    def get(self, k: int) -> Tensor:
        """Return x_k."""
        x = self.available.get(k, self.frozen.get(k))
        if x is None:
            raise RuntimeError(
                f"x_{k} of a heavy-ball stage cannot be recovered: the stage's output must take part in the loss, not "
                "only something inside the stage, unless it has memory='stored' and no checkpointing"
            )
        return x

    @contextmanager
    def do_not_save(self, k: int, x: Tensor) -> Iterator[None]:
        """Make autograd save the number k in place of x_k."""
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


# The backward pass of these operations does not read their output, so that it may be overwritten.
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
    """Return True if x is an output that the backward pass of its operation does not read."""
    return x.grad_fn is not None and x.grad_fn.name() in _KEEP_NO_OUTPUT


def _equals(beta: Any, value: float) -> bool:
    return not isinstance(beta, Tensor) and beta == value


def _add(total: Tensor, x: Tensor, factor: Any) -> Tensor:
    """Add a multiple of x in place."""
    return total.addcmul_(x, factor) if isinstance(factor, Tensor) else total.add_(x, alpha=factor)


def _scaled(gradient: Tensor, beta: Any) -> Tensor:
    return gradient if _equals(beta, 1) else gradient * beta


class _FirstIterate(torch.autograd.Function):
    """The identity of x_1.

    Its backward runs last: it checks the recovered x_1 and frees the iterates.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, iterates: _Iterates, tolerance: float) -> Tensor:
        ctx.iterates, ctx.tolerance, ctx.sample = iterates, tolerance, sample(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        recovered = ctx.iterates.available.get(1)
        if recovered is not None and may_read_values(recovered):
            compare_samples(sample(recovered), ctx.sample, ctx.tolerance)
        ctx.iterates.available = {}
        return gradient, None, None


class _LastIterates(torch.autograd.Function):
    """The identity of x_K.

    Its backward runs first: it takes x_{K−1} and x_K from autograd's saved tensors.
    """

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
        ctx.iterates.available = {k: x.detach() for k, x in zip((steps - 1, steps), ctx.saved_tensors)}
        return gradient, None, None


class _Transformed(torch.autograd.Function):
    """The identity of T_k(x_k).

    Its backward recomputes T_k completely, if that has not been done. Torch stops a recomputation at the last saved
    tensor that is needed: the tensor saved here comes after T_k(x_k).
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
    """A zero in place of β2 x_{k−1}, with the gradient of β2 x_{k−1}.

    It is created before T_k(x_k), so that its backward runs after the backward of T_k: then x_{k−1} has been recovered.
    ``ctx.transform`` is the :class:`_Transformed` of T_k.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Any, iterates: _Iterates, k: int) -> Tensor:
        ctx.iterates, ctx.k = iterates, k
        return x.new_zeros(()).expand_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        beta, slope = ctx.iterates.beta2[ctx.k], None
        if ctx.needs_input_grad[1]:
            if ctx.k - 1 not in ctx.iterates.available and hasattr(ctx, "transform"):
                _ = ctx.transform.saved_tensors  # T_k has no other gradient, and is recomputed here
            slope = (gradient * ctx.iterates.get(ctx.k - 1)).sum()
        return _scaled(gradient, beta), slope, None, None


class _Step(torch.autograd.Function):
    """T_k(x_k) + β1 x_k + β2 x_{k−1}, in place.

    The gradient of the last term goes to :class:`_PreviousIterate`.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, x: Tensor, beta: Any, momentum: Tensor, x_prev: Tensor, place: Any) -> Tensor:
        ctx.iterates, ctx.k = place
        ctx.mark_dirty(t)
        return _add(_add(t, x, beta), x_prev, ctx.iterates.beta2[ctx.k])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        beta = ctx.iterates.beta1[ctx.k]
        slope = (gradient * ctx.iterates.get(ctx.k)).sum() if ctx.needs_input_grad[2] else None
        return gradient, _scaled(gradient, beta), slope, gradient, None, None


# --- check of the recovered x_1 ---------------------------------------------------------------------------------------


def sample(x: Tensor) -> Tensor:
    """Return a few hundred values of the first image."""
    first = x.detach()[0].flatten()
    return first[:: max(1, len(first) // 256)].clone()


def compare_samples(recovered: Tensor, original: Tensor, tolerance: float) -> None:
    """Warn if the recovered x_1 is far from the true one."""
    error, size = (recovered - original).norm().item(), original.norm().item()
    if not error <= tolerance * size and math.isfinite(size):
        warnings.warn(
            f"memory: the x_1 that a heavy-ball stage recovered differs by more than {tolerance:g} of its size, so "
            "gradients are inexact: T enlarges rounding errors. Train with normalisations that use the statistics of "
            "the batch, compute in a higher precision, or pass memory='stored' without grad checkpointing",
            stacklevel=2,
        )
