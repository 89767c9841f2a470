"""NNI's differentiable strategies: the paper's hyper-parameters as arguments, a second order, a mended resume."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from nni.nas.oneshot.pytorch.base_lightning import BaseOneShotLightningModule
from nni.nas.oneshot.pytorch.differentiable import DartsLightningModule, GumbelDartsLightningModule
from nni.nas.strategy import DARTS as StockDARTS
from nni.nas.strategy import GumbelDARTS as StockGumbelDARTS
from torch import Tensor, nn

from ..spaces.edges import SkipDropout

__all__ = ["DARTS", "GumbelDARTS"]

# Options of torch's SGD under which its step is not that of _steps.
UNKNOWN_STEPS = ("dampening", "maximize", "nesterov")


class _ArchitectureStep:
    """What our modules change in NNI's: order and optimiser of α, the step of second order, dropout that falls."""

    order: int
    alpha_weight_decay: float
    alpha_betas: tuple[float, float]
    arc_learning_rate: float
    training_module: pl.LightningModule
    trainer: Any

    def arch_parameters(self) -> list[nn.Parameter]:
        """Return α and β, each once, in the order of the modules.

        NNI's order is that of a set, which differs between processes, so that a resumed run would hand Adam's moments
        to other parameters.
        """
        found: dict[int, nn.Parameter] = {}
        for module in self.supernet_modules():  # type: ignore[attr-defined]
            if hasattr(module, "arch_parameters"):
                found.update((id(parameter), parameter) for parameter in module.arch_parameters())
        return list(found.values())

    def configure_architecture_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam over α and β (§9.3)."""
        parameters = self.arch_parameters()
        if not parameters:
            raise ValueError("the model has no architecture parameters: must be a space with something to choose")
        return torch.optim.Adam(
            parameters, self.arc_learning_rate, betas=self.alpha_betas, weight_decay=self.alpha_weight_decay
        )

    def on_train_start(self) -> None:
        """Refuse an optimiser that the second order knows no step of before α first moves.

        Raises:
            ValueError: it is not plain SGD.
        """
        if self.order == 2:
            self._weight_sgd()
        super().on_train_start()  # type: ignore[misc]

    def on_train_epoch_start(self) -> None:
        """Set this epoch's rate of the dropout behind skip connections; it is constant if nobody says when to end."""
        host: Any = self
        for module in host.modules():
            if isinstance(module, SkipDropout) and (self.trainer.max_epochs or 0) > 0:
                module.decay(self.trainer.current_epoch, self.trainer.max_epochs)
        super().on_train_epoch_start()  # type: ignore[misc]
        if _distributed():  # DDP waits for the gradients of all parameters, also while α stands still
            for parameter in self.arch_parameters():
                parameter.requires_grad_()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        """Take an architecture step on the validation batch and a weight step on the training batch."""
        host: Any = self  # what NNI's module has
        if self.trainer.current_epoch >= host.warmup_epochs:
            host.resample()
            optimizer = host.architecture_optimizers()
            optimizer.zero_grad()
            if self.order == 1:
                self._first_order_gradient(batch["val"], batch_idx)
            else:
                self._second_order_gradient(batch["train"], batch["val"], batch_idx)
            optimizer.step()
        host.resample()
        with _constant(self.arch_parameters()):
            result = self.training_module.training_step(batch["train"], 2 * batch_idx + 1)
            host.advance_optimization(_loss(result), batch_idx, host.gradient_clip_val)
        host.advance_lr_schedulers(batch_idx)
        if batch_idx % host.log_prob_every_n_step == 0:
            host.log_probs(host.export_probs())
        return result

    def _first_order_gradient(self, val: Any, batch_idx: int) -> None:
        """Put ∇_α of the loss, with the penalty if there is one, into α's; the weights' gradients are not computed."""
        host: Any = self
        alphas = self.arch_parameters()
        with _constant(self._weights()):
            loss = _loss(self.training_module.training_step(val, 2 * batch_idx))
            if host.penalty is not None:
                loss, details = host.penalty(loss, host.export_probs())
                host.log_dict({f"penalty/{name}": value for name, value in details.items()})
            # DDP waits for the gradients of all parameters.
            host.manual_backward(loss, inputs=None if _distributed() else alphas)

    def _weights(self) -> list[nn.Parameter]:
        alphas = {id(alpha) for alpha in self.arch_parameters()}
        return [p for p in self.training_module.parameters() if id(p) not in alphas]

    def _second_order_gradient(self, train: Any, val: Any, batch_idx: int) -> None:
        """Put DARTS's gradient of L_val(w − ξ ∇_w L_train(w, α), α) into α's.

        ξ is the learning rate of w's parameter group, and the step is the optimiser's own, momentum and weight decay
        included, before any clipping. The product with the Hessian is a central difference along ξ ∇_w' L_val of
        length 0.01, as in DARTS.
        """
        sgd = self._weight_sgd()
        groups = [(p, group) for group in sgd.param_groups for p in group["params"] if p.requires_grad]
        weights, rates = [p for p, _ in groups], [group["lr"] for _, group in groups]
        alphas = self.arch_parameters()

        def loss(batch: Any) -> Tensor:
            return _loss(self.training_module.training_step(batch, 2 * batch_idx))

        with _restored(self.training_module, weights) as start:
            steps = _steps(sgd, groups, _gradients(loss(train), weights))
            _assign(weights, [w - step for w, step in zip(start, steps)])
            found = _gradients(loss(val), [*alphas, *weights])
            direct = found[: len(alphas)]
            vector = [rate * v for rate, v in zip(rates, found[len(alphas) :])]
            radius = 0.01 / torch.cat([v.flatten() for v in vector]).norm().clamp(min=1e-12)
            sides = []
            for sign in (1, -1):
                _assign(weights, [w + sign * radius * v for w, v in zip(start, vector)])
                sides.append(_gradients(loss(train), alphas))
        for alpha, g, plus, minus in zip(alphas, direct, *sides):
            alpha.grad = g - (plus - minus) / (2 * radius)

    def _weight_sgd(self) -> Any:
        """Return the optimiser of the weights; ValueError unless :func:`_steps` computes its step."""
        optimizers: Any = self.optimizers()  # type: ignore[attr-defined]
        every = optimizers if isinstance(optimizers, list) else [optimizers]
        found = [o for o in every if not getattr(o, "is_arch_optimizer", False)]
        kinds = [type(getattr(o, "optimizer", o)) for o in found]  # Lightning's wrapper has the optimiser inside
        other = {name for o in found for group in o.param_groups for name in UNKNOWN_STEPS if group.get(name)}
        if kinds != [torch.optim.SGD] or other:
            names = " and ".join(kind.__name__ for kind in kinds) or "nothing"
            options = f" with {', '.join(sorted(other))}" if other else ""
            raise ValueError(
                f"order=2 with weights trained by {names}{options}: must be one torch.optim.SGD, without "
                f"{', '.join(UNKNOWN_STEPS)}, whose step the second order differentiates; or pass order=1"
            )
        return found[0]


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _loss(result: Any) -> Tensor:
    return result["loss"] if isinstance(result, dict) else result


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the mean loss of all processes, 0 where a parameter has no part in it."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]
    if _distributed():
        for gradient in gradients:  # DDP averages only what a backward pass accumulates
            torch.distributed.all_reduce(gradient)
            gradient /= torch.distributed.get_world_size()
    return gradients


def _steps(sgd: Any, groups: Sequence[tuple[Tensor, Any]], gradients: Sequence[Tensor]) -> list[Tensor]:
    """What the weight optimiser would subtract: lr · (m · buffer + gradient + decay · w), each by its group."""
    steps = []
    for (w, group), g in zip(groups, gradients):
        buffer = sgd.state.get(w, {}).get("momentum_buffer")
        step = g + group.get("weight_decay", 0.0) * w.detach()
        steps.append(group["lr"] * (step if buffer is None else group.get("momentum", 0.0) * buffer + step))
    return steps


def _assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values):
            parameter.copy_(value)


@contextmanager
def _constant(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Build no graph for these parameters, so that nothing is kept for their gradients; DDP must have them all.

    The backward pass belongs inside, since checkpointed cells are computed again in it.
    """
    moving = [] if _distributed() else [p for p in parameters if p.requires_grad]
    try:
        for parameter in moving:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in moving:
            parameter.requires_grad_()


@contextmanager
def _restored(module: nn.Module, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Give the weights as they are; put them and the buffers back afterwards, whatever was tried on them."""
    start = [w.detach().clone() for w in weights]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield start
    finally:
        _assign(weights, start)
        for buffer, value in buffers:
            buffer.copy_(value)


class _DARTSModule(_ArchitectureStep, DartsLightningModule):
    """NNI's module with our step."""


class _GumbelDARTSModule(_ArchitectureStep, GumbelDartsLightningModule):
    """Likewise, with softmax weights sampled."""


class DARTS(StockDARTS):
    """DARTS (Liu et al. 2019) on any space, with §9.3's hyper-parameters as defaults.

    Args:
        arc_learning_rate: Adam's learning rate for α and β.
        alpha_weight_decay: their weight decay. At 1e-3 it alone pulls a favoured α of :class:`HeavyBallInit` back.
        alpha_betas: Adam's momenta for them.
        gradient_clip_val: the weights' gradient norm is clipped to this; ``None`` for no clipping.
        order: 1 or 2. The second differentiates through one step of the weights, which torch's SGD must take, momentum
            and weight decay at will, and costs three more passes. NNI's ``Classification`` has Adam by default.
        **kwargs: NNI's: ``log_prob_every_n_step``, ``warmup_epochs``, ``penalty``, ``mutation_hooks``. A penalty must
            be of a subclass of ``ExpectationProfilerPenalty`` whose ``forward`` computes with α: NNI's own gets plain
            numbers, without a gradient, and NNI's profilers know no shapes of these spaces.

    Raises:
        ValueError: ``order`` is neither, or 2 with a penalty; as training begins, 2 with another optimiser.
    """

    module_type: type[Any] = _DARTSModule

    def __init__(
        self,
        *,
        arc_learning_rate: float = 3e-4,
        alpha_weight_decay: float = 1e-3,
        alpha_betas: tuple[float, float] = (0.5, 0.999),
        gradient_clip_val: float | None = 5.0,
        order: int = 1,
        **kwargs: Any,
    ) -> None:
        if order not in (1, 2):
            raise ValueError(f"order={order!r}: must be 1 or 2")
        if order == 2 and kwargs.get("penalty") is not None:
            raise ValueError("order=2 with a penalty: its gradient is defined for the loss alone, pass order=1")
        super().__init__(arc_learning_rate=arc_learning_rate, gradient_clip_val=gradient_clip_val, **kwargs)
        self.alpha_weight_decay, self.alpha_betas, self.order = alpha_weight_decay, alpha_betas, order

    def configure_oneshot_module(self, training_module: Any) -> BaseOneShotLightningModule:
        """Return NNI's module with our step."""
        module = super().configure_oneshot_module(training_module)
        # Every attribute stays; only what it does with them changes.
        module.__class__ = self.module_type
        module.order = self.order
        module.alpha_weight_decay, module.alpha_betas = self.alpha_weight_decay, self.alpha_betas
        return module


class GumbelDARTS(DARTS, StockGumbelDARTS):
    """DARTS with weights sampled by Gumbel's softmax, whose temperature falls (SNAS, FBNet).

    Args:
        temperature: a float, or (first, last).
        **kwargs: :class:`DARTS`'s, of first order.

    Raises:
        ValueError: ``order`` is not 1.
    """

    module_type = _GumbelDARTSModule

    def __init__(self, *, temperature: Any = (1.0, 0.33), **kwargs: Any) -> None:
        if kwargs.get("order", 1) != 1:
            # Its difference of two passes would be that of their samples.
            raise ValueError(
                f"order={kwargs['order']!r}: must be 1, the second is defined for softmax weights: use DARTS"
            )
        super().__init__(**kwargs)
        self.temperature = temperature
