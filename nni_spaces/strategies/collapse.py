"""Callbacks that end a search before skip connections take over: DARTS+ and R-DARTS.

They work with every trainer of Lightning, so with NNI's evaluators and with :func:`~nni_spaces.search`. Their state is
part of Lightning's checkpoints. After a stop, ``sample`` is the cell to derive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import nni_spaces._nni  # noqa: F401

import pytorch_lightning as pl
import torch
from torch import Tensor

from optinspired_plugins._checks import check_int
from optinspired_plugins.cells.genotype import SKIPS

from .differentiable import distributed_mean, excluded_weights, loss_of, restored

__all__ = ["EigenvalueStop", "SkipStop", "alpha_hessian", "count_skips", "largest_eigenvalue"]


class _Stop(pl.Callback):
    """End a search after an epoch.

    A resumed search that had stopped trains no further epoch.
    """

    saved: tuple[str, ...] = ("sample",)  # attributes that checkpoints contain
    sample: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """End a search that has stopped before it was resumed."""
        if self.sample is not None:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Decide whether the search ends; α must have moved."""
        if trainer.current_epoch >= module.warmup_epochs:
            self.sample = self.decide(module)
            trainer.should_stop = trainer.should_stop or self.sample is not None

    def decide(self, module: Any) -> dict[str, Any] | None:
        """Return the sample to derive if the search ends."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the attributes that a resumed search needs."""
        return {name: getattr(self, name) for name in self.saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of :meth:`state_dict`."""
        for name in self.saved:
            setattr(self, name, state_dict[name])


class SkipStop(_Stop):
    """End a search as soon as the normal cell has too many skip connections (DARTS+, Liang et al. 2019).

    The cell to derive is the present one. In spaces with fixed edges, only the edges that are layers of the algorithm
    count, as in :func:`~nni_spaces.limit_skips`.

    Args:
        skips: number of skip connections at which the search ends.

    Raises:
        ValueError: ``skips`` is out of range.
    """

    def __init__(self, skips: int = 2) -> None:
        check_int("skips", skips, 1)
        self.skips = skips

    def decide(self, module: Any) -> dict[str, Any] | None:
        """Return the present sample if it has enough skip connections."""
        sample = module.export()
        return sample if count_skips(module.model, sample) >= self.skips else None


def count_skips(space: Any, sample: dict[str, Any]) -> int:
    """Return the number of skip connections in the normal cell of a sample."""
    layers = None if space.chooses_sources else space.structure.operation_labels(space.sizes["nodes"])
    counted = [name for label, name in sample.items() if label.startswith("normal/op_") and label in (layers or sample)]
    return sum(name in SKIPS for name in counted)


class EigenvalueStop(_Stop):
    """End a search when the loss becomes sharp in α (R-DARTS, Zela et al. 2020).

    λ_i is the largest eigenvalue of the Hessian ∇²_α L_val on the last batch of α of epoch i, and λ̄_i the mean of the
    last k. The search ends if λ̄_{i−k} / λ̄_i < ratio, and the cell of epoch i − k is derived. So it does not end
    before epoch 2k. A Hessian-vector product needs about twice the memory of a step.

    Args:
        window: k.
        ratio: the ratio.
        iterations: Hessian-vector products of the power iteration.

    Raises:
        ValueError: an argument is out of range.
    """

    saved = ("sample", "eigenvalues", "samples")

    def __init__(self, window: int = 5, ratio: float = 0.75, iterations: int = 20) -> None:
        check_int("window", window, 1)
        check_int("iterations", iterations, 1)
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio={ratio!r}: must be > 0 and ≤ 1")
        self.window, self.ratio, self.iterations = window, ratio, iterations
        self.eigenvalues: list[float] = []
        self.samples: list[dict[str, Any]] = []  # of the last k + 1 epochs

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Remember the batch of α."""
        self.batch = batch["val"]

    def decide(self, module: Any) -> dict[str, Any] | None:
        """Return the sample of k epochs before if the largest eigenvalue has grown."""
        with alpha_hessian(module, self.batch) as product:
            size = sum(alpha.numel() for alpha in module.arch_parameters())
            self.eigenvalues.append(largest_eigenvalue(product, size, self.iterations, module.device))
        self.samples = [*self.samples[-self.window :], module.export()]
        k = self.window
        if len(self.eigenvalues) < 2 * k:
            return None
        before, now = sum(self.eigenvalues[-2 * k : -k]) / k, sum(self.eigenvalues[-k:]) / k
        return self.samples[0] if now > 0 and before < self.ratio * now else None


@contextmanager
def alpha_hessian(module: Any, batch: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield v ↦ ∇²_α L v of the loss on a batch, with α and β as one vector, averaged over processes.

    Statistics of normalisations, random numbers and logged metrics are as before at the end.

    Args:
        module: the module of a :class:`~nni_spaces.DARTS` search.
        batch: images and labels.
    """
    training, alphas = module.training_module, module.arch_parameters()
    log, checkpointing = training.log, getattr(module.model, "grad_checkpointing", False)
    devices = [module.device] if module.device.type == "cuda" else []
    training.log = lambda *args, **kwargs: None
    if checkpointing:  # its backward pass cannot be differentiated
        module.model.set_grad_checkpointing(False)
    try:
        with torch.random.fork_rng(devices), restored(training, []), excluded_weights(module):
            with torch.enable_grad():
                gradient = _flat(loss_of(training.training_step(batch, 0)), alphas, create_graph=True)
            yield lambda v: distributed_mean(_flat(gradient @ v, alphas, retain_graph=True))
    finally:
        training.log = log
        if checkpointing:
            module.model.set_grad_checkpointing(True)


def _flat(value: Tensor, alphas: list[Any], **options: Any) -> Tensor:
    """Return the gradient of a value with respect to α as one vector."""
    found = torch.autograd.grad(value, alphas, allow_unused=True, **options)
    return torch.cat([(torch.zeros_like(a) if g is None else g).flatten() for a, g in zip(alphas, found)])


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor], size: int, iterations: int = 20, device: Any = "cpu"
) -> float:
    """Return the largest eigenvalue of a symmetric matrix by power iterations from a fixed vector.

    A power iteration finds the eigenvalue of largest magnitude. If that is negative, a second one, on the matrix
    minus this eigenvalue, finds the largest.

    Args:
        product: v ↦ A v.
        size: number of rows of A.
        iterations: products of one power iteration.
        device: device of v.
    """
    start = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)
    first = _dominant(product, start, iterations)
    return first if first >= 0 else first + _dominant(lambda v: product(v) - first * v, start, iterations)


def _dominant(product: Callable[[Tensor], Tensor], v: Tensor, iterations: int) -> float:
    """Return vᵀ A v after a power iteration, 0 for A = 0."""
    eigenvalue = 0.0
    for _ in range(iterations):
        v = v / v.norm()
        image = product(v)
        eigenvalue = float(v @ image)
        if not image.any():
            break
        v = image
    return eigenvalue
