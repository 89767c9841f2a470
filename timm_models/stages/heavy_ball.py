"""The heavy-ball rule (16), and the stage that propagates by it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Dict, Sequence

import torch
from torch import Tensor, nn

from optinspired_plugins._checks import check_bool, check_finite, check_layers, check_one_of
from optinspired_plugins.memory.eager import is_eager
from optinspired_plugins.memory.fused_stage import Coefficients, FusedStage, Keep, fused_stage, kernels_for
from optinspired_plugins.memory.heavy_ball import (
    MAX_ERROR_GROWTH,
    SplitTransform,
    error_growth,
    keeps_no_output,
    may_read_values,
    reversible_heavy_ball,
)
from optinspired_plugins.memory.memory_format import align_gradient
from optinspired_plugins.memory.recompute import recompute

from ..inference.stream_free import stream_free
from ..strides import subsample
from .checkpoint_rules import StageRule, stride_in_1x1
from .fused import count_batches, fused_parts, norms_of
from .network_algorithms import heavy_ball_rows
from .transforms import BasicTransform, BottleneckTransform
from .unmodified import is_unmodified_inside

__all__ = ["HeavyBallRule", "HeavyBallStage", "writable"]


@dataclass(frozen=True)
class HeavyBallRule:
    """The rule x_{k+1} = T_k(x_k) + β1 x_k + β2 x_{k−1} (16).

    Args:
        beta1: β1, finite.
        beta2: β2, finite; 0 is ResNet's propagation.
        learn_beta: learn β1 and β2 of every step, from ``beta1`` and ``beta2`` and without weight decay.
        beta_lr_scale: multiple of the learning rate at which they are learned, > 0: the factor of their gradients.
            SGD moves them by this part of the step, and optimisers that divide by the size of the gradient, such as
            Adam, ignore it.
        post_act: activate after every addition, as ResNet does.
        memory: ``"stored"``, or ``"reversible"``: the backward pass recovers x_{k−1} from x_k and x_{k+1}, so that
            memory does not grow with depth, for the time of another forward pass. Not with ``post_act`` or β2 = 0.

    Raises:
        ValueError: an argument is out of range, or ``memory="reversible"`` is not possible.
    """

    beta1: float = 1.0
    beta2: float = -1.0
    learn_beta: bool = False
    beta_lr_scale: float = 0.1
    post_act: bool = False
    memory: str = "stored"

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "beta_lr_scale"):
            object.__setattr__(self, name, check_finite(name, getattr(self, name)))
        if self.beta_lr_scale <= 0:
            raise ValueError(f"beta_lr_scale={self.beta_lr_scale!r}: must be > 0")
        check_bool("learn_beta", self.learn_beta)
        check_bool("post_act", self.post_act)
        check_one_of("memory", self.memory, ("stored", "reversible"))
        if self.is_reversible and self.post_act:
            raise ValueError(
                "memory='reversible' with post_act=True: the activation cannot be undone, pass post_act=False"
            )
        if self.is_reversible and self.beta2 == 0:
            raise ValueError("memory='reversible' with beta2=0: must not be 0, or x_{k-1} cannot be recovered")

    @classmethod
    def pop_from(cls, arguments: Dict[str, Any]) -> HeavyBallRule:
        """Remove a rule from keyword arguments, and return it."""
        return cls(**{f.name: arguments.pop(f.name) for f in fields(cls) if f.name in arguments})

    @property
    def is_reversible(self) -> bool:
        """True with ``memory="reversible"``."""
        return self.memory == "reversible"

    def check_depth(self, layers: Sequence[int]) -> None:
        """ValueError if recovered iterates would lose too many digits."""
        if not self.is_reversible:
            return
        check_layers("layers", layers)
        steps = max(layers) - 1
        factor = error_growth([self.beta1] * steps, [self.beta2] * steps)
        if factor > MAX_ERROR_GROWTH:
            raise ValueError(
                f"memory='reversible' with beta1={self.beta1}, beta2={self.beta2}: errors of the iterates would grow "
                f"{factor:.3g} times in {steps} steps, must be at most {MAX_ERROR_GROWTH:g}"
            )


class HeavyBallStage(StageRule, nn.Sequential):
    """A stage that propagates by the heavy-ball rule (16).

    With u the input, S the shortcut projection and T_0 the transform that changes shape: x_0 = S(u),
    x_1 = T_0(u) + S(u), then x_{k+1} = T_k(x_k) + β1 x_k + β2 x_{k−1}. The same rule as a plain function is
    :func:`optinspired_plugins.propagation.rules.heavy_ball`.

    Learned coefficients are parameters of shape (steps − 1,).

    Args:
        transforms: T_0, T_1, …; T_0 may hold S as ``downsample``.
        rule: coefficients and memory.

    With ``grad_checkpointing``, too, the backward pass recovers the iterates, but it recomputes only the last
    convolution of each transform. Where iterates cannot be recovered, each transform is recomputed completely: with
    ``post_act``, and where :func:`~optinspired_plugins.memory.heavy_ball.error_growth` of the coefficients exceeds
    ``MAX_ERROR_GROWTH``, as at β2 = 0. The same holds for ``memory="reversible"`` with learned coefficients that have
    moved there.

    Raises:
        ValueError: iterates cannot be recovered in a stage of this depth.
    """

    __constants__ = ["learn_beta"]
    convertible = ("beta1", "beta2", "learn_beta", "post_act")

    def __init__(self, transforms: Sequence[Any], rule: HeavyBallRule = HeavyBallRule()) -> None:
        rule.check_depth([len(transforms)])
        super().__init__(*transforms)
        if not rule.post_act:
            for transform in transforms:
                transform.drop_activation()
        self.stride = 1  # of u, before anything else
        self.grad_checkpointing = False
        self.settings = rule
        self.beta_lr_scale = rule.beta_lr_scale
        self.learn_beta = rule.learn_beta and len(transforms) > 1
        if self.learn_beta:
            weight = next(self.parameters())
            for name in ("beta1", "beta2"):
                values = torch.empty(len(transforms) - 1, device=weight.device, dtype=weight.dtype)
                self.register_parameter(name, nn.Parameter(values))
            self.reset_parameters()
        else:
            self.beta1, self.beta2 = rule.beta1, rule.beta2
        constants = [] if self.learn_beta or len(transforms) == 1 else [rule.beta1, rule.beta2]
        self.set_rule([*constants, rule.post_act, stride_in_1x1(transforms[0])])

    def equals_timm(self) -> bool:
        """Return True if timm's ResNet computes the same from the same weights."""
        rule = self.settings
        resnet = len(self) == 1 or (rule.beta1, rule.beta2) == (1.0, 0.0)
        return resnet and rule.post_act and self.rule_values[-1] < 1

    @torch.jit.ignore
    def gains(self) -> Sequence[float]:
        """Return the weight of each T in the stage's output at the start; 1 with ``post_act``."""
        rule = self.settings
        if rule.post_act:
            return super().gains()
        return heavy_ball_rows(len(self), rule.beta1, rule.beta2)[-1][1:]

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Reset learned coefficients to their start."""
        if self.learn_beta:
            starts = self.settings.beta1, self.settings.beta2
            for parameter, value in zip((self.beta1, self.beta2), starts):
                nn.init.constant_(parameter, value)  # type: ignore[arg-type]
            self.last_read: Any = tuple([value] * (len(self) - 1) for value in starts)

    def forward(self, u: Tensor) -> Tensor:
        """Return the last x, shape (batch, channels, height / stride, width / stride)."""
        u = subsample(u, self.stride)
        if torch.jit.is_scripting():
            return self._plain(u)
        return self._with_memory(u)

    def _plain(self, u: Tensor) -> Tensor:
        """Return x_K of (16): x_{k+1} = T_k(x_k) + β1 x_k + β2 x_{k−1}."""
        x_prev = x = u
        for k, T in enumerate(self):
            t = T(x) if torch.jit.is_scripting() else self._transform(T, x)
            if k == 0:
                x_prev = u if T.downsample is None else T.downsample(u)  # type: ignore[operator]
                x = T.activate(t.add_(x_prev))  # type: ignore[operator]
            else:
                x, x_prev = T.activate(self._add_iterates(k, t, x, x_prev)), x  # type: ignore[operator]
        return x

    def _add_iterates(self, k: int, t: Tensor, x: Tensor, x_prev: Tensor) -> Tensor:
        """Return t + β1 x + β2 x_prev, in place for constant coefficients."""
        if self.learn_beta:
            # In the precision of t: on CUDA autocast would widen all iterates to float32, as the coefficients are.
            beta1 = scale_gradient(self.beta1[k - 1], self.beta_lr_scale).to(t.dtype)  # type: ignore[index]
            beta2 = scale_gradient(self.beta2[k - 1], self.beta_lr_scale).to(t.dtype)  # type: ignore[index]
            return torch.addcmul(t, x, beta1).addcmul_(x_prev, beta2)
        # Assigned: torch.fx drops a call whose result is not used.
        if self.beta1 != 0:
            t = t.add_(x, alpha=self.beta1)
        if self.beta2 != 0:
            t = t.add_(x_prev, alpha=self.beta2)
        return t

    @torch.jit.ignore
    def _with_memory(self, u: Tensor) -> Tensor:
        """Return the last x, by the backward pass that the settings ask for."""
        is_saving = self.grad_checkpointing or self.settings.is_reversible
        can_recover = is_saving and torch.is_grad_enabled() and is_eager(u) and self._can_recover()
        x = self._fused(u, can_recover) if can_recover or not is_saving else None
        if x is None:
            x = self._recovering(u) if can_recover else self._plain(u)
        align_gradient(x)
        return x

    @torch.jit.ignore
    def _fused(self, u: Tensor, recover: bool) -> Tensor | None:
        """Return the last x by one function with few kernels; ``None`` where there is none."""
        transforms: list[Any] = list(self)
        parts = fused_parts(transforms, u, recover) if torch.is_grad_enabled() and is_eager(u) else None
        if parts is None:
            return None
        chains, shortcut = parts
        downsample = transforms[0].downsample
        x0 = downsample(u) if shortcut is None and downsample is not None else None
        steps = len(transforms) - 1
        betas: tuple[Any, Any] = (self.beta1, self.beta2)
        beta1, beta2 = (scale_gradient(b, self.beta_lr_scale) if self.learn_beta else [b] * steps for b in betas)
        keep = Keep.NOTHING if recover and self.settings.is_reversible else Keep.NARROW if recover else Keep.ALL
        stage = FusedStage(chains, shortcut, Coefficients(beta1, beta2), keep)
        kernels = kernels_for(u)
        assert kernels is not None
        x = fused_stage(stage, kernels, u, x0)
        count_batches(norms_of(transforms, shortcut))
        return x

    @torch.jit.ignore
    def _transform(self, T: nn.Module, x: Tensor) -> Tensor:
        """Return T(x) as a writable tensor, recomputed to save memory."""
        is_saving = self.grad_checkpointing or self.settings.is_reversible
        return writable(T, recompute(T, T, x) if is_saving else T(x))

    @torch.jit.ignore
    def _recovering(self, u: Tensor) -> Tensor:
        """Return the last x without storing iterates."""
        transforms: list[Any] = list(self)
        first = transforms[0]
        x0 = u if first.downsample is None else recompute(first.downsample, first.downsample, u)
        parts = [self._split(T) for T in transforms]
        t = u if parts[0].first is None else parts[0].first(u)
        for part in parts[0].others:
            t = recompute(first, part, t)
        steps = len(transforms) - 1
        betas: tuple[Any, Any] = (self.beta1, self.beta2)
        scaled = (scale_gradient(b, self.beta_lr_scale) if self.learn_beta else [b] * steps for b in betas)
        beta1, beta2 = map(list, scaled)
        return reversible_heavy_ball(parts[1:], x0, t.add_(x0), beta1, beta2)

    @torch.jit.ignore
    def _split(self, T: Any) -> SplitTransform:
        """Return T in parts; in one part if reversible or modified."""
        can_split = type(T) in (BasicTransform, BottleneckTransform) and is_unmodified_inside(T)
        if self.settings.is_reversible or not can_split:
            return SplitTransform(T, None, [partial(_call, T)])
        return T.split()

    @torch.jit.ignore
    def _can_recover(self) -> bool:
        """Return True if recovered iterates lose few digits by the present coefficients."""
        if any(T.is_activated() for T in self):  # type: ignore[operator]
            return False
        return error_growth(*self._numbers()) <= MAX_ERROR_GROWTH

    @torch.jit.ignore
    def _numbers(self) -> tuple[list[float], list[float]]:
        """Return β1 and β2 of every step as numbers; on a GPU those of some passes ago, since reading waits for it."""
        if not isinstance(self.beta1, Tensor) or not isinstance(self.beta2, Tensor):
            steps = len(self) - 1
            return [self.beta1] * steps, [self.beta2] * steps
        if self.last_read is None or may_read_values(self.beta1):
            self.last_read = self.beta1.tolist(), self.beta2.tolist()
        return self.last_read

    @torch.jit.ignore
    def _load_from_state_dict(self, *args: Any) -> None:
        self.last_read = None
        super()._load_from_state_dict(*args)

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Return an equal stage for evaluation, without iterates if it is short."""
        bottlenecks = all(type(T) is BottleneckTransform for T in self)
        return (stream_free(self) if bottlenecks else None) or self

    def extra_repr(self) -> str:
        """Return the coefficients."""
        return "learn_beta=True" if self.learn_beta else f"beta1={self.beta1}, beta2={self.beta2}"


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Return x to the bit; its gradient is multiplied by ``scale``."""
    return x if scale == 1.0 else torch.lerp(x.detach(), x, scale)


def writable(T: nn.Module, t: Tensor) -> Tensor:
    """Return T's output as a tensor that may be overwritten.

    It is a copy where a hook may hold the output, where a replaced method may return any tensor, and where the
    backward pass of T's last operation reads its output.
    """
    if not is_eager(t):  # a compiler makes a copy cost nothing, and a trace has no hooks
        return t.clone() if torch.compiler.is_compiling() else t
    return t if is_unmodified_inside(T) and (not t.requires_grad or keeps_no_output(t)) else t.clone()


def _call(T: nn.Module, x: Tensor) -> Tensor:
    return writable(T, T(x))
