"""The paper's training on CIFAR (§8.1), resumable.

Optimiser, schedule and accuracy come from timm, the loop from Lightning, and images, augmentation and the folder from
:mod:`nni_spaces`. All random draws are functions of seed and epoch, so a resumed training gives the same result as an
uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from networks import NETWORKS
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nni_spaces.runs.callback import RunCallback, check_finite, trainer_options
from nni_spaces.runs.data import EpochSampler, ImageSet, SeededImages, channel_moments, make_loader, read_images
from optinspired_plugins._checks import check_int
from optinspired_plugins.run_folder import lock_folder, read_history

__all__ = ["Recipe", "make_loaders", "make_optimizer", "train"]


@dataclass(frozen=True)
class Recipe:
    """Training recipe; the defaults are the paper's for CIFAR (§8.1).

    ``None`` means all images. Weight decay acts on all parameters, as in the training that §8.1 adopts, except β1, β2
    and α.

    Raises:
        ValueError: a setting is unknown or out of range.
    """

    network: str
    data: str = "cifar10"
    augment: bool = True
    train_images: int | None = None
    test_images: int | None = None
    epochs: int = 300
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    padding: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"network={self.network!r}: must be one of {', '.join(NETWORKS)}")
        for name, minimum in (("epochs", 1), ("batch_size", 2), ("seed", 0), ("padding", 1)):
            check_int(name, getattr(self, name), minimum)
        for name in ("train_images", "test_images"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 2)
        for name in ("lr", "momentum", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be ≥ 0")

    @property
    def milestones(self) -> list[int]:
        """Epochs, from 0, at 50 % and 75 %, that divide the learning rate by 10."""
        return [math.ceil(share * self.epochs) for share in (0.5, 0.75)]


def make_optimizer(model: nn.Module, recipe: Recipe) -> tuple[torch.optim.Optimizer, Any]:
    """Return SGD with Nesterov momentum and its schedule by epoch."""
    decay = dict(weight_decay=recipe.weight_decay, filter_bias_and_bn=False)
    sgd = create_optimizer_v2(model, opt="sgd", lr=recipe.lr, momentum=recipe.momentum, **decay)
    after = [milestone + 1 for milestone in recipe.milestones]  # timm's milestone m acts in epoch m - 1
    options = dict(decay_milestones=after, decay_rate=0.1, warmup_epochs=0)
    schedule, _ = create_scheduler_v2(sgd, "multistep", num_epochs=recipe.epochs, **options)
    return sgd, schedule


def make_loaders(data: ImageSet, test: ImageSet, recipe: Recipe) -> tuple[DataLoader, list[DataLoader]]:
    """Return the training loader, and loaders of test images and as many training images."""
    moments = channel_moments(data.images)

    def loader(images: ImageSet, seed: int | None, padding: int = 0) -> DataLoader:
        items = SeededImages(images, None, recipe.seed, padding, moments=moments)
        return make_loader(items, recipe.batch_size, EpochSampler(len(items), seed), 0, drop_last=False)

    count = len(test.labels)
    fit = ImageSet(data.images[:count], data.labels[:count], data.classes)
    padding = recipe.padding if recipe.augment else 0
    return loader(data, recipe.seed, padding), [loader(test, None), loader(fit, None)]


class Training(pl.LightningModule):
    """Training under a recipe, with one test after the last epoch."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model.to(memory_format=torch.channels_last), recipe

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.model(x.to(memory_format=torch.channels_last))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimiser; :meth:`on_train_epoch_start` sets its learning rate."""
        sgd, self.schedule = make_optimizer(self.model, self.recipe)
        return sgd

    def on_train_epoch_start(self) -> None:
        """Set the learning rate, which depends only on the epoch."""
        self.schedule.step(self.current_epoch)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return check_finite(loss, f"epoch {self.current_epoch}, step {batch_idx}")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and error of a batch."""
        images, labels = batch
        logits, name = self(images), ("test", "fit")[dataloader_idx]
        (top1,) = accuracy(logits, labels)
        options = dict(batch_size=len(labels), add_dataloader_idx=False)
        self.log(f"{name}_loss", F.cross_entropy(logits, labels), **options)
        self.log(f"{name}_error", 100 - top1, **options)


def train(
    recipe: Recipe,
    folder: Path,
    accelerator: str = "auto",
    on_epoch: Callable[[dict[str, Any]], None] = lambda entry: None,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train a network, resuming after the last finished epoch.

    Args:
        recipe: the training recipe.
        folder: the folder of the run.
        accelerator: Lightning's.
        on_epoch: called with each new entry of the history.
        on_batch: called after each batch.

    Returns:
        The last entry of the history, with the ``seconds`` of all epochs, and the state dict after training.

    Raises:
        ValueError: the folder holds another run, or the data are invalid.
        RuntimeError: another process trains in the folder.
        FloatingPointError: the loss was not finite.
    """
    with lock_folder(folder):
        data = read_images(recipe.data, recipe.train_images)
        test = read_images(recipe.data, recipe.test_images, "test")
        torch.manual_seed(recipe.seed)
        module = Training(NETWORKS[recipe.network].build(data.classes), recipe)
        run = RunCallback(folder, recipe, data, lambda _: {}, _entry, on_batch, on_epoch)
        resume = run.resume()
        if run.first_epoch < recipe.epochs:
            trainer = pl.Trainer(
                num_sanity_val_steps=0,
                check_val_every_n_epoch=recipe.epochs,
                **trainer_options(run, recipe.epochs, accelerator, devices=1),
            )
            trainer.fit(module, *make_loaders(data, test, recipe), **resume)
        return _result(folder, run.checkpoint)


def _result(folder: Path, checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    history = read_history(folder)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    seconds = sum(entry["seconds"] for entry in history)
    return {**history[-1], "seconds": round(seconds, 1)}, {k.removeprefix("model."): v for k, v in state.items()}


def _entry(module: Any, metrics: dict[str, float]) -> dict[str, Any]:
    """Return an epoch's entry of the history, the last with test results."""
    return {"lr": module.optimizers().param_groups[0]["lr"], **metrics}
