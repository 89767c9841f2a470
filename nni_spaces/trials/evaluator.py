"""The evaluator of a multi-trial search: train a network for a few epochs and report its held-out accuracy."""

from __future__ import annotations

import gc
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nni_spaces._nni  # noqa: F401

import nni
import torch
import torch.nn.functional as F
from nni.nas.evaluator import Evaluator
from nni.nas.evaluator.pytorch import Lightning, Trainer
from torch import Tensor
from torchmetrics.functional import accuracy

from optinspired_plugins._checks import check_int
from optinspired_plugins.next_steps import absolute_source

from .._checks import check_optimizer
from ..runs.callback import check_finite, describe_images
from ..runs.data import EpochSampler, SeededImages, channel_moments, make_loader, read_images
from ..runs.search import SearchModule

__all__ = ["TrialEvaluator", "TrialModule"]


class TrialModule(SearchModule):
    """A search's recipe for one network, with its accuracy on held-out images, ``val_top1``, in %.

    Args:
        gradient_clip: largest gradient norm.
        **kwargs: arguments of :class:`~nni_spaces.runs.search.SearchModule`.

    Raises:
        FloatingPointError: a loss is not finite.
    """

    def __init__(self, gradient_clip: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gradient_clip = gradient_clip
        self.on_epoch: Callable[[int, float], None] = lambda epoch, top1: None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return super().training_step(batch, 2 * batch_idx + 1)  # odd steps of a search train the weights

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of a batch of held-out images."""
        images, labels = batch
        logits = self(images)
        loss = check_finite(F.cross_entropy(logits, labels), f"validation of epoch {self.trainer.current_epoch + 1}")
        top1 = accuracy(logits, labels, "multiclass", num_classes=logits.shape[1])
        self.log("val_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        self.log("val_top1", 100 * top1, on_step=False, on_epoch=True, batch_size=len(labels))

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip the gradient norm; the trainer does not clip under strategies with their own steps."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), self.gradient_clip)

    @property
    def top1(self) -> float:
        """The accuracy of the last validation, in %."""
        return round(self.trainer.callback_metrics["val_top1"].item(), 4)

    def on_validation_epoch_end(self) -> None:
        """Report the epoch."""
        self.on_epoch(self.trainer.current_epoch, self.top1)
        if nni.get_current_parameter() is not None:
            nni.report_intermediate_result(self.top1)


class _FrozenEvaluator(Evaluator):
    """The evaluator of a sampled network.

    NNI's training service sends it to the process of the trial, which makes the evaluator, and so its loaders, from
    the arguments of :meth:`TrialEvaluator.from_images`.
    """

    def __init__(self, arguments: dict[str, Any] | None, evaluator: Evaluator | None = None) -> None:
        self.arguments, self.evaluator = arguments, evaluator

    def evaluate(self, model: Any) -> Any:
        """Train and test a network."""
        if self.evaluator is None:
            self.evaluator = TrialEvaluator.from_images(**(self.arguments or {}))
        return self.evaluator.evaluate(model)

    def __repr__(self) -> str:
        return repr(self.evaluator or self.arguments)

    def _dump(self) -> dict[str, Any]:
        if self.arguments is None:
            raise RuntimeError(
                "evaluator=TrialEvaluator: loaders cannot be sent to NNI's training service: must be "
                "TrialEvaluator.from_images, or use run_trials or NNI's sequential engine"
            )
        return {"arguments": self.arguments}

    @classmethod
    def _load(cls, **content: Any) -> _FrozenEvaluator:
        return cls(content["arguments"])


@nni.trace
class TrialEvaluator(Lightning):
    """Train networks of a space from scratch and report their held-out top-1 in %.

    NNI's Lightning evaluators have a single trainer, which has finished after the first network and does not train
    later ones. Here every network has its own trainer and module. The defaults of the recipe are §9.3's.

    The evaluator works with :func:`~nni_spaces.run_trials`, and with NNI's experiment on its sequential engine. NNI's
    default engine for multi-trial strategies is a training service with a process for each trial, which needs
    :meth:`from_images`: it raises RuntimeError for loaders.

    Args:
        train_loader: images and labels to train on.
        val_loader: held-out images and labels.
        epochs: epochs per network.
        lr: first learning rate.
        momentum: momentum.
        weight_decay: weight decay.
        gradient_clip: largest gradient norm.
        accelerator: Lightning's.

    Raises:
        ValueError: an argument is out of range.
    """

    module: Any
    # The arguments of from_images, as values for JSON; unknown for other loaders.
    source: dict[str, Any] = {"images": None}
    arguments: dict[str, Any] | None = None

    def __init__(
        self,
        train_loader: Any,
        val_loader: Any,
        epochs: int = 1,
        lr: float = 0.025,
        momentum: float = 0.9,
        weight_decay: float = 3e-4,
        gradient_clip: float = 5.0,
        accelerator: str = "auto",
    ) -> None:
        check_int("epochs", epochs, 1)
        self.recipe = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, epochs=epochs)
        self.recipe["gradient_clip"] = gradient_clip
        check_optimizer(self.recipe)
        self.accelerator = accelerator
        with warnings.catch_warnings():
            # The warning is about evaluators that are sent to other processes with their loaders.
            warnings.filterwarnings("ignore", "When using training service")
            loaders = dict(train_dataloaders=train_loader, val_dataloaders=val_loader)
            super().__init__(self._module(), self._trainer(), **loaders)

    # Over 40 lines: most of them describe arguments.
    @classmethod
    def from_images(
        cls,
        source: str | Path,
        held_out: float = 0.2,
        limit: int | None = None,
        batch_size: int = 64,
        padding: int = 0,
        seed: int = 0,
        workers: int = 0,
        **kwargs: Any,
    ) -> TrialEvaluator:
        """Return an evaluator for the training images of a source.

        Args:
            source: a source of :func:`~nni_spaces.runs.data.read_images`.
            held_out: share of the images that networks are tested on; drawn from ``seed``.
            limit: number of images to use, as in :func:`~nni_spaces.runs.data.read_images`.
            batch_size: images per batch.
            padding: largest shift of a random crop of a training image, in pixels.
            seed: seed of split, order and crops.
            workers: processes that load images.
            **kwargs: arguments of the class.

        Raises:
            ValueError: an argument is out of range, or the source is unknown.
        """
        arguments = dict(held_out=held_out, limit=limit, batch_size=batch_size, padding=padding, seed=seed)
        data = read_images(source, limit)
        count = len(data.labels)
        size = round(held_out * count)
        if not 1 <= size < count:
            raise ValueError(f"held_out={held_out!r}: must leave images on both sides, of {count}")
        val_indices, train_indices = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tensor_split(
            [size]
        )
        if len(train_indices) < batch_size:
            raise ValueError(f"batch_size={batch_size!r}: must be at most {len(train_indices)}, the images to train on")
        moments = channel_moments(data.images[train_indices])
        train = SeededImages(data, train_indices, seed, padding, moments=moments)
        val = SeededImages(data, val_indices, moments=moments)
        evaluator = cls(
            make_loader(train, batch_size, EpochSampler(len(train_indices), seed), workers),
            make_loader(val, batch_size, EpochSampler(len(val_indices), None), workers, drop_last=False),
            **kwargs,
        )
        options = dict(held_out=held_out, batch_size=batch_size, padding=padding, images_seed=seed)
        evaluator.source = {"images": describe_images(data)["sha256"], **options}
        evaluator.arguments = {**arguments, **kwargs, "source": absolute_source(str(source)), "workers": workers}
        return evaluator

    def freeze(self, sample: dict[str, Any]) -> Evaluator:
        """Return the evaluator of a sampled network."""
        return _FrozenEvaluator(self.arguments, super().freeze(sample))

    def _module(self) -> TrialModule:
        return TrialModule(**self.recipe)

    def _trainer(self) -> Any:
        return Trainer(
            max_epochs=self.recipe["epochs"],
            accelerator=self.accelerator,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )

    def evaluate(self, model: Any, on_epoch: Callable[[int, float], None] = lambda epoch, top1: None) -> Any:
        """Train a network, report its accuracy to NNI if NNI calls this, and return it.

        Args:
            model: the network.
            on_epoch: called with the number of each epoch and its accuracy; an error that it raises ends the training.

        Raises:
            FloatingPointError: a loss is not finite.
            SystemExit: the process received SIGTERM; the exit status says so.
        """
        if not isinstance(self.module, TrialModule):  # the module of a one-shot strategy, which trains once
            return super().evaluate(model)
        self.module, self.trainer = self._module(), self._trainer()
        self.module.on_epoch = on_epoch
        gc.collect()  # frees the network before, which Lightning holds in reference cycles
        for loader in (self.train_dataloaders, self.val_dataloaders):
            if hasattr(getattr(loader, "sampler", None), "set_epoch"):
                loader.sampler.set_epoch(0)  # persistent loader processes start before Lightning sets the epoch
        try:
            super().evaluate(model)
        finally:
            # Lightning exits with status 0, or does not exit if loader processes die first or no batch is left.
            if self.trainer.received_sigterm:
                raise SystemExit(128 + signal.SIGTERM)
        top1 = self.module.top1
        if nni.get_current_parameter() is not None:
            nni.report_final_result(top1)
        return top1

    def __repr__(self) -> str:
        sizes = dict(train=self.train_dataloaders, val=self.val_dataloaders)
        images = {f"{part}_images": len(loader.dataset) for part, loader in sizes.items() if hasattr(loader, "dataset")}
        return f"TrialEvaluator({', '.join(f'{name}={value!r}' for name, value in {**self.recipe, **images}.items())})"
