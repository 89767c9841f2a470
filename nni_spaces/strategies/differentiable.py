"""NNI's differentiable strategies with the paper's hyper-parameters, a second order, and a corrected resume."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import nni_spaces._nni  # noqa: F401

import pytorch_lightning as pl
import torch
from nni.nas.oneshot.pytorch.base_lightning import BaseOneShotLightningModule
from nni.nas.oneshot.pytorch.differentiable import DartsLightningModule, GumbelDartsLightningModule
from nni.nas.strategy import DARTS as StockDARTS
from nni.nas.strategy import GumbelDARTS as StockGumbelDARTS
from torch import Tensor, nn

from optinspired_plugins._checks import check_one_of

from ..spaces.cost import ImageSize
from ..spaces.edges import MixedLayer, SkipDropout
from ..spaces.space import CellSpace
from ..spaces.supernet import MixedCell

__all__ = ["DARTS", "GumbelDARTS", "distributed_mean", "excluded_weights", "loss_of", "restored"]

# With these options torch's SGD takes another step than _weight_steps.
UNSUPPORTED_OPTIONS = ("dampening", "maximize", "nesterov")


class _ArchitectureStep:
    """Our changes to NNI's modules: order and optimiser of α, steps of second order, falling dropout rates."""

    order: int
    alpha_weight_decay: float
    alpha_betas: tuple[float, float]
    alpha_decay_to: str = "zero"
    alpha_start: list[Tensor]
    mac_weight: float = 0.0
    image_size: ImageSize | None = None
    arc_learning_rate: float
    training_module: pl.LightningModule
    trainer: Any

    def arch_parameters(self) -> list[nn.Parameter]:
        """Return α and β, each once, in the order of the modules.

        NNI uses the order of a set, which differs between processes, so that a resumed run would give Adam's moments
        to other parameters.
        """
        unique: dict[int, nn.Parameter] = {}
        for module in self.supernet_modules():  # type: ignore[attr-defined]
            if hasattr(module, "arch_parameters"):
                unique.update((id(parameter), parameter) for parameter in module.arch_parameters())
        return list(unique.values())

    def configure_architecture_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam over α and β (§9.3)."""
        parameters = self.arch_parameters()
        if not parameters:
            raise ValueError("the model has no architecture parameters: must be a space with something to choose")
        decay = self.alpha_weight_decay if self.alpha_decay_to == "zero" else 0.0
        return torch.optim.Adam(parameters, self.arc_learning_rate, betas=self.alpha_betas, weight_decay=decay)

    def on_train_start(self) -> None:
        """Check the optimiser of the weights before a search of second order.

        Raises:
            ValueError: it is not plain SGD.
        """
        if self.order == 2:
            self._weight_sgd()
        if not hasattr(self, "alpha_start"):  # a resumed search has it from its checkpoint
            self.alpha_start = [alpha.detach().clone() for alpha in self.arch_parameters()]
        super().on_train_start()  # type: ignore[misc]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the start of α, if α decays to it."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        if self.alpha_decay_to == "start":
            checkpoint["alpha_start"] = self.alpha_start

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the start of α."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        if self.alpha_decay_to == "start":
            self.alpha_start = [
                start.to(alpha) for start, alpha in zip(checkpoint["alpha_start"], self.arch_parameters())
            ]

    def on_train_epoch_start(self) -> None:
        """Set the dropout rate after skip connections; it is constant if the trainer has no last epoch."""
        host: Any = self
        for module in host.modules():
            if isinstance(module, SkipDropout) and (self.trainer.max_epochs or 0) > 0:
                module.decay(self.trainer.current_epoch, self.trainer.max_epochs)
        super().on_train_epoch_start()  # type: ignore[misc]
        if _distributed():  # DDP needs gradients of all parameters, also while α stands still
            for parameter in self.arch_parameters():
                parameter.requires_grad_()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        """Take an architecture step on the validation batch and a weight step on the training batch."""
        host: Any = self  # attributes of NNI's module
        if self.trainer.current_epoch >= host.warmup_epochs:
            host.resample()
            optimizer = host.architecture_optimizers()
            optimizer.zero_grad()
            if self.order == 1:
                self._first_order_gradient(batch["val"], batch_idx)
            else:
                self._second_order_gradient(batch["train"], batch["val"], batch_idx)
            self._decay_to_start()
            self._add_penalty_gradient()
            optimizer.step()
        host.resample()
        with _without_gradients(self.arch_parameters()):
            result = self.training_module.training_step(batch["train"], 2 * batch_idx + 1)
            host.advance_optimization(loss_of(result), batch_idx, host.gradient_clip_val)
        host.advance_lr_schedulers(batch_idx)
        if batch_idx % host.log_prob_every_n_step == 0:
            host.log_probs(host.export_probs())
        return result

    def _decay_to_start(self) -> None:
        """Add the gradient of weight_decay/2 ‖α − α_0‖², if α decays to its start α_0."""
        if self.alpha_decay_to == "start":
            for alpha, start in zip(self.arch_parameters(), self.alpha_start):
                if alpha.grad is not None:
                    alpha.grad.add_(alpha.detach() - start, alpha=self.alpha_weight_decay)

    def probabilities(self) -> dict[str, Tensor]:
        """Return softmax(α) of all edges by label, with its gradient; σ(α) in FairDARTS."""
        found: dict[str, Tensor] = {}
        for module in self.supernet_modules():  # type: ignore[attr-defined]
            if isinstance(module, (MixedLayer, MixedCell)):
                found |= module.probabilities()
        return found

    def expected_macs(self) -> Tensor:
        """Return Σ_e Σ_o softmax(α_e)_o MACs(o), summed over all cells; an edge need not be kept by the derived one."""
        host: Any = self
        probabilities = self.probabilities()
        if not hasattr(self, "mac_costs"):
            counts = host.model.candidate_counts(self.image_size)
            macs = {label: [count.macs for count in row.values()] for label, row in counts.items()}
            self.mac_costs = {label: p.new_tensor(macs[label]) for label, p in probabilities.items()}
        return torch.stack([p @ self.mac_costs[label] for label, p in probabilities.items()]).sum()

    def alpha_penalty(self) -> Tensor | None:
        """Return the penalty on α, which needs no images; ``None`` for none."""
        return self.mac_weight * self.expected_macs() / 1e6 if self.mac_weight else None

    def _add_penalty_gradient(self) -> None:
        """Add the gradient of the penalty on α, which is the same in all processes."""
        penalty, alphas = self.alpha_penalty(), self.arch_parameters()
        if penalty is not None:
            for alpha, gradient in zip(alphas, torch.autograd.grad(penalty, alphas, allow_unused=True)):
                if gradient is not None:
                    alpha.grad = gradient if alpha.grad is None else alpha.grad + gradient

    def _first_order_gradient(self, val: Any, batch_idx: int) -> None:
        """Set α's gradient to ∇_α of the loss and of the penalty; gradients of the weights are not computed."""
        host: Any = self
        alphas = self.arch_parameters()
        with excluded_weights(self):
            loss = loss_of(self.training_module.training_step(val, 2 * batch_idx))
            if host.penalty is not None:
                loss, details = host.penalty(loss, host.export_probs())
                host.log_dict({f"penalty/{name}": value for name, value in details.items()})
            # DDP needs gradients of all parameters.
            host.manual_backward(loss, inputs=None if _distributed() else alphas)

    def _second_order_gradient(self, train: Any, val: Any, batch_idx: int) -> None:
        """Set α's gradient to DARTS's gradient of L_val(w − ξ ∇_w L_train(w, α), α).

        ξ is the learning rate of w's parameter group. The step is the optimiser's step with momentum and weight decay,
        before any clipping. The product with the Hessian is a central difference of length 0.01 along ξ ∇_w' L_val, as
        in DARTS.
        """
        sgd = self._weight_sgd()
        groups = [(p, group) for group in sgd.param_groups for p in group["params"] if p.requires_grad]
        weights, rates = [p for p, _ in groups], [group["lr"] for _, group in groups]
        alphas = self.arch_parameters()

        def loss(batch: Any) -> Tensor:
            return loss_of(self.training_module.training_step(batch, 2 * batch_idx))

        with restored(self.training_module, weights) as start:
            steps = _weight_steps(sgd, groups, _gradients(loss(train), weights))
            _assign(weights, [w - step for w, step in zip(start, steps)])
            gradients = _gradients(loss(val), [*alphas, *weights])
            direct = gradients[: len(alphas)]
            vector = [rate * v for rate, v in zip(rates, gradients[len(alphas) :])]
            radius = 0.01 / torch.cat([v.flatten() for v in vector]).norm().clamp(min=1e-12)
            sides = []
            for sign in (1, -1):
                _assign(weights, [w + sign * radius * v for w, v in zip(start, vector)])
                sides.append(_gradients(loss(train), alphas))
        for alpha, g, plus, minus in zip(alphas, direct, *sides):
            alpha.grad = g - (plus - minus) / (2 * radius)

    def _weight_sgd(self) -> Any:
        """Return the optimiser of the weights; ValueError unless :func:`_weight_steps` computes its step."""
        optimizers: Any = self.optimizers()  # type: ignore[attr-defined]
        every = optimizers if isinstance(optimizers, list) else [optimizers]
        of_weights = [o for o in every if not getattr(o, "is_arch_optimizer", False)]
        kinds = [type(getattr(o, "optimizer", o)) for o in of_weights]  # without Lightning's wrapper
        other = {
            name for o in of_weights for group in o.param_groups for name in UNSUPPORTED_OPTIONS if group.get(name)
        }
        if kinds != [torch.optim.SGD] or other:
            names = " and ".join(kind.__name__ for kind in kinds) or "nothing"
            options = f" with {', '.join(sorted(other))}" if other else ""
            raise ValueError(
                f"order=2 with weights trained by {names}{options}: must be one torch.optim.SGD, without "
                f"{', '.join(UNSUPPORTED_OPTIONS)}: the second order differentiates its step; or pass order=1"
            )
        return of_weights[0]


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def loss_of(result: Any) -> Tensor:
    """Return the loss in the result of a training step."""
    return result["loss"] if isinstance(result, dict) else result


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients of the mean loss of all processes, 0 for unused parameters."""
    used = torch.autograd.grad(loss, parameters, allow_unused=True)
    # DDP averages only gradients that a backward pass accumulates.
    return [distributed_mean(torch.zeros_like(p) if g is None else g) for p, g in zip(parameters, used)]


def distributed_mean(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes, in place."""
    if _distributed():
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value


def excluded_weights(module: Any) -> Any:
    """Return a context in which nothing is stored for gradients of the weights of a search."""
    alphas = {id(alpha) for alpha in module.arch_parameters()}
    return _without_gradients([p for p in module.training_module.parameters() if id(p) not in alphas])


def _weight_steps(sgd: Any, groups: Sequence[tuple[Tensor, Any]], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return SGD's step of each weight: lr · (momentum · buffer + gradient + weight_decay · w)."""
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
def _without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Exclude parameters from the graph, so that nothing is stored for their gradients.

    The backward pass belongs inside, since it recomputes checkpointed cells. With DDP this has no effect, since DDP
    needs gradients of all parameters.
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
def restored(module: nn.Module, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Return copies of the weights, and restore weights and buffers at the end."""
    start = [w.detach().clone() for w in weights]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield start
    finally:
        _assign(weights, start)
        for buffer, value in buffers:
            buffer.copy_(value)


class DARTSModule(_ArchitectureStep, DartsLightningModule):
    """NNI's DARTS module with our step."""


class _GumbelDARTSModule(_ArchitectureStep, GumbelDartsLightningModule):
    """NNI's GumbelDARTS module with our step."""


class DARTS(StockDARTS):
    """DARTS (Liu et al. 2019) on any space, with §9.3's hyper-parameters as defaults.

    Args:
        arc_learning_rate: Adam's learning rate for α and β.
        alpha_weight_decay: weight decay of α and β.
        alpha_decay_to: ``"zero"``, as in DARTS, or ``"start"``: α decays to its initial value. Adam makes steps of its
            learning rate even from the decay alone, so that without any gradient a favoured α of
            :class:`~nni_spaces.HeavyBallInit` falls from 5 to 0.
        alpha_betas: Adam's momenta for them.
        gradient_clip_val: the weights' gradient norm is clipped to this; ``None`` for no clipping.
        mac_weight: λ of a penalty λ · expected MACs of the network in millions, which is added to the loss of α. The
            expectation is Σ softmax(α) · MACs over all edges and their candidates
            (:meth:`~nni_spaces.spaces.space.CellSpace.candidate_counts`).
        image_size: with ``mac_weight``, side of the images, or their height and width.
        order: 1 or 2. The second differentiates through one step of the weights and costs three more passes. The
            weights' optimiser must be torch's SGD; NNI's ``Classification`` has Adam by default.
        **kwargs: NNI's: ``log_prob_every_n_step``, ``warmup_epochs``, ``penalty``, ``mutation_hooks``. A penalty needs
            a subclass of ``ExpectationProfilerPenalty`` with a ``forward`` that computes with α: NNI's class receives
            plain numbers without a gradient, and NNI's profilers do not know the shapes of these spaces.

    Raises:
        ValueError: ``order`` is neither 1 nor 2, or 2 with a penalty; ``alpha_decay_to`` is unknown; ``mac_weight`` is
            negative, or has no ``image_size``; for a space that is not of this package, ``mac_weight`` is not 0; when
            training starts: order 2 with another optimiser.
    """

    module_type: type[Any] = DARTSModule

    def __init__(
        self,
        *,
        arc_learning_rate: float = 3e-4,
        alpha_weight_decay: float = 1e-3,
        alpha_betas: tuple[float, float] = (0.5, 0.999),
        gradient_clip_val: float | None = 5.0,
        order: int = 1,
        alpha_decay_to: str = "zero",
        mac_weight: float = 0.0,
        image_size: ImageSize | None = None,
        **kwargs: Any,
    ) -> None:
        check_one_of("alpha_decay_to", alpha_decay_to, ("zero", "start"))
        if order not in (1, 2):
            raise ValueError(f"order={order!r}: must be 1 or 2")
        if order == 2 and kwargs.get("penalty") is not None:
            raise ValueError("order=2 with a penalty: its gradient is defined for the loss only, pass order=1")
        if not 0 <= mac_weight < math.inf:
            raise ValueError(f"mac_weight={mac_weight!r}: must be ≥ 0")
        if mac_weight and image_size is None:
            raise ValueError(f"mac_weight={mac_weight!r} with image_size=None: must be the side of the images")
        super().__init__(arc_learning_rate=arc_learning_rate, gradient_clip_val=gradient_clip_val, **kwargs)
        self.alpha_weight_decay, self.alpha_betas, self.order = alpha_weight_decay, alpha_betas, order
        self.alpha_decay_to, self.mac_weight, self.image_size = alpha_decay_to, mac_weight, image_size

    def mutate_model(self, model: Any) -> Any:
        """Return the supernet of a space."""
        if self.mac_weight and not isinstance(model, CellSpace):
            raise ValueError(
                f"mac_weight={self.mac_weight!r} with {type(model).__name__}: must be 0, the costs are those of a "
                "CellSpace"
            )
        return super().mutate_model(model)

    def configure_oneshot_module(self, training_module: Any) -> BaseOneShotLightningModule:
        """Return NNI's module with our step."""
        module = super().configure_oneshot_module(training_module)
        # The attributes stay; the class changes the steps.
        module.__class__ = self.module_type
        module.order = self.order
        module.alpha_weight_decay, module.alpha_betas = self.alpha_weight_decay, self.alpha_betas
        module.alpha_decay_to = self.alpha_decay_to
        module.mac_weight, module.image_size = self.mac_weight, self.image_size
        return module


class GumbelDARTS(DARTS, StockGumbelDARTS):
    """DARTS with weights sampled by Gumbel's softmax with a falling temperature (SNAS, FBNet).

    Args:
        temperature: a float, or (first, last).
        **kwargs: arguments of :class:`DARTS`; ``order`` must be 1.

    Raises:
        ValueError: ``order`` is not 1.
    """

    module_type = _GumbelDARTSModule

    def __init__(self, *, temperature: Any = (1.0, 0.33), **kwargs: Any) -> None:
        if kwargs.get("order", 1) != 1:
            # The difference of two passes would mostly be the difference of their samples.
            raise ValueError(
                f"order={kwargs['order']!r}: must be 1, the second is defined for softmax weights: use DARTS"
            )
        super().__init__(**kwargs)
        self.temperature = temperature
