"""Stages of ResNet-shaped networks: transforms T that know no algorithm, and the heavy-ball recurrence over them."""

from __future__ import annotations

from functools import partial
from typing import Any, Optional, Sequence

import torch
from torch import Tensor, nn

from optinspired_plugins.memory.eager import is_eager
from optinspired_plugins.memory.heavy_ball import (
    MAX_ERROR_GROWTH,
    SplitTransform,
    error_growth,
    keeps_no_output,
    reversible_heavy_ball,
)
from optinspired_plugins.memory.memory_format import align_gradient
from optinspired_plugins.memory.recompute import recompute

from .._checks import check_layers, check_one_of
from ..inference.stream_free import stream_free
from ..strides import subsample
from .checkpoint_rules import StageRule, heavy_ball_coefficients, stride_in_1x1
from .transforms import BasicTransform, BottleneckTransform
from .unmodified import is_unmodified_inside

__all__ = ["HeavyBallStage"]


class HeavyBallStage(StageRule, nn.Sequential):
    """A stage that propagates by the heavy-ball rule (16).

    With u the input, S the shortcut projection and T_0 the transform that changes shape: x_0 = S(u),
    x_1 = T_0(u) + S(u), then x_{k+1} = T_k(x_k) + β1 x_k + β2 x_{k−1}. The plain form is
    :func:`optinspired_plugins.propagation.rules.heavy_ball`.

    Args:
        transforms: T_0, T_1, …; T_0 may hold S as ``downsample``.
        beta1: β1, finite.
        beta2: β2, finite.
        learn_beta: learn β1 and β2 of every step, from ``beta1`` and ``beta2``: parameters of shape (steps − 1,).
        post_act: activate after every addition.
        memory: ``"stored"``, or ``"reversible"`` to recover the iterates in the backward pass.

    With ``grad_checkpointing`` the iterates are recovered, too, but only the last convolution of each transform is
    computed again. It is plain checkpointing of each transform where iterates cannot be recovered: with ``post_act``,
    and where :func:`~optinspired_plugins.memory.heavy_ball.error_growth` of the coefficients exceeds
    ``MAX_ERROR_GROWTH``, as at β2 = 0. Learned coefficients that come there have plain checkpointing, also with
    ``memory="reversible"``.

    Raises:
        ValueError: ``memory`` is unknown, or the iterates cannot be recovered.
    """

    __constants__ = ["learn_beta"]
    convertible = ("beta1", "beta2", "learn_beta", "post_act")

    def __init__(
        self,
        transforms: Sequence[Any],
        beta1: float = 1.0,
        beta2: float = -1.0,
        learn_beta: bool = False,
        post_act: bool = False,
        memory: str = "stored",
    ) -> None:
        check_memory(memory, beta1, beta2, post_act, [len(transforms)])
        super().__init__(*transforms)
        if not post_act:
            for transform in transforms:
                transform.drop_activation()
        self.stride = 1  # of u, before anything else
        self.grad_checkpointing = False
        self.reversible = memory == "reversible"
        self.post_act = post_act
        self.learn_beta = learn_beta and len(transforms) > 1
        self.start = (float(beta1), float(beta2))
        if self.learn_beta:
            weight = next(self.parameters())
            for name in ("beta1", "beta2"):
                values = torch.empty(len(transforms) - 1, device=weight.device, dtype=weight.dtype)
                self.register_parameter(name, nn.Parameter(values))
            self.reset_parameters()
        else:
            self.beta1, self.beta2 = self.start
        coefficients = () if self.learn_beta else heavy_ball_coefficients(len(transforms), *self.start)
        self.post_act = post_act
        self.set_rule([*coefficients, post_act, stride_in_1x1(transforms[0])])

    def is_twin(self) -> bool:
        """Return True if timm's ResNet computes the same from the same weights."""
        start = self.start if len(self) > 1 else (1.0, 0.0)
        return start == (1.0, 0.0) and self.post_act and self.rule_values[-1] < 1

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Set learned coefficients back to where they start."""
        if self.learn_beta:
            for parameter, value in zip((self.beta1, self.beta2), self.start):
                nn.init.constant_(parameter, value)  # type: ignore[arg-type]

    def forward(self, u: Tensor) -> Tensor:
        """Return the last x, shape (batch, channels, height / stride, width / stride)."""
        u = subsample(u, self.stride)
        if not torch.jit.is_scripting():
            recovered = self._recovering(u)
            x = self._plain(u) if recovered is None else recovered
            align_gradient(x)
            return x
        return self._plain(u)

    def _plain(self, u: Tensor) -> Tensor:
        """Return the last x of (16) by its sums."""
        x_prev = x = u
        for k, T in enumerate(self):
            if torch.jit.is_scripting():
                t = T(x)
            else:
                t = self._transformed(T, x)
            # In place where T allows it, and assigned: torch.fx drops a call whose result nobody uses.
            if k == 0:
                x_prev = T.downsample(u) if T.downsample is not None else u  # type: ignore[operator]
                t = t.add_(x_prev)
            elif self.learn_beta:
                # addcmul, not add: the coefficient is a tensor, and a 0-d one keeps the dtype of autocast.
                t = torch.addcmul(t, x, self.beta1[k - 1]).addcmul_(x_prev, self.beta2[k - 1])  # type: ignore[index]
                x_prev = x
            else:
                if self.beta1 != 0:
                    t = t.add_(x, alpha=self.beta1)
                if self.beta2 != 0:
                    t = t.add_(x_prev, alpha=self.beta2)
                x_prev = x
            x = T.activate(t)  # type: ignore[operator]
        return x

    @torch.jit.ignore
    def _transformed(self, T: nn.Module, x: Tensor) -> Tensor:
        """Return T(x) as a tensor that may be overwritten, computed again in the backward pass if that is wanted."""
        return writable(T, recompute(T, T, x) if self.grad_checkpointing or self.reversible else T(x))

    @torch.jit.ignore
    def _recovering(self, u: Tensor) -> Optional[Tensor]:
        """Return the same without keeping iterates; ``None`` where that is not wanted or not possible."""
        wanted = (self.grad_checkpointing or self.reversible) and torch.is_grad_enabled()
        if not wanted or not is_eager(u) or not self._can_recover():
            return None
        transforms: list[Any] = list(self)
        first = transforms[0]
        x0 = u if first.downsample is None else recompute(first.downsample, first.downsample, u)
        parts = [self._split(T) for T in transforms]
        t = u if parts[0].first is None else parts[0].first(u)
        for part in parts[0].others:
            t = recompute(first, part, t)
        steps = len(transforms) - 1
        beta1, beta2 = (list(b) if isinstance(b, Tensor) else [b] * steps for b in (self.beta1, self.beta2))
        return reversible_heavy_ball(parts[1:], x0, t.add_(x0), beta1, beta2)

    @torch.jit.ignore
    def _split(self, T: Any) -> SplitTransform:
        """Return T in parts; in one, the call of T, with ``memory="reversible"`` and where T is not what it was."""
        ours = type(T) in (BasicTransform, BottleneckTransform) and is_unmodified_inside(T)
        return T.split() if ours and not self.reversible else SplitTransform(T, None, [partial(_call, T)])

    @torch.jit.ignore
    def _can_recover(self) -> bool:
        """Return True if iterates lose little where they are recovered, by the present coefficients."""
        if any(T.is_activated() for T in self):  # type: ignore[operator]
            return False
        steps, betas = len(self) - 1, (self.beta1, self.beta2)
        beta1, beta2 = (b.tolist() if isinstance(b, Tensor) else [b] * steps for b in betas)
        return error_growth(beta1, beta2) <= MAX_ERROR_GROWTH

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Return the stage for evaluation: without its stream if it is short, else itself, for its blocks to fuse."""
        bottlenecks = all(type(T) is BottleneckTransform for T in self)
        return (stream_free(self) if bottlenecks else None) or self

    def extra_repr(self) -> str:
        """Name the coefficients."""
        return "learn_beta=True" if self.learn_beta else f"beta1={self.beta1}, beta2={self.beta2}"


def writable(T: nn.Module, t: Tensor) -> Tensor:
    """Return T's output as a tensor that may be overwritten.

    It is a copy where a hook may hold the output, where a replaced method may return anything, and where the backward
    pass of T's last operation reads its output.
    """
    if not is_eager(t):  # a compiler makes a copy cost nothing, and a trace has no hooks
        return t.clone() if torch.compiler.is_compiling() else t
    return t if is_unmodified_inside(T) and (not t.requires_grad or keeps_no_output(t)) else t.clone()


def _call(T: nn.Module, x: Tensor) -> Tensor:
    return writable(T, T(x))


def check_memory(memory: str, beta1: float, beta2: float, post_act: bool, layers: Sequence[int]) -> None:
    """ValueError unless the iterates of stages can be had as ``memory`` says."""
    check_one_of("memory", memory, ("stored", "reversible"))
    if memory == "stored":
        return
    if post_act:
        raise ValueError("memory='reversible' with post_act=True: the activation cannot be undone, pass post_act=False")
    if beta2 == 0:
        raise ValueError("memory='reversible' with beta2=0: must not be 0, or x_{k-1} cannot be recovered")
    check_layers("layers", layers)
    steps = max(layers) - 1
    factor = error_growth([beta1] * steps, [beta2] * steps)
    if factor > MAX_ERROR_GROWTH:
        raise ValueError(
            f"memory='reversible' with beta1={beta1}, beta2={beta2}: errors of the iterates would grow {factor:.3g} "
            f"times in {steps} steps, must be at most {MAX_ERROR_GROWTH:g}"
        )
