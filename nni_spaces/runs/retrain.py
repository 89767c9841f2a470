"""Training of a genotype's network from scratch (§9.3), in a folder that can be resumed.

The recipe has three parts that timm's script lacks: an auxiliary loss, a drop rate that grows with the epochs, and
cutout. The folder (:mod:`nni_spaces.runs.callback`) also holds the network for timm, as ``model.safetensors`` and
``genotype.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import nni_spaces._nni  # noqa: F401

import pytorch_lightning as pl
import timm
import torch
from safetensors.torch import save
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import timm_models  # noqa: F401  registers cellnet
from optinspired_plugins._files import printable, read_file, write_atomically
from optinspired_plugins.counting import count_network
from optinspired_plugins.memory.memory_format import training_layout
from optinspired_plugins.run_folder import (
    GENOTYPE,
    WEIGHTS,
    Execution,
    last_entry,
    lock_folder,
    process_rank,
    resolve_devices,
)

from .callback import RunCallback, check_finite, own_metrics, trainer_options
from .checkpoints import read_checkpoint
from .data import EpochSampler, ImageSet, SeededImages, Transform, channel_moments, make_loader, read_run_images
from .objective import Measure, Objective
from .settings import RetrainSettings

__all__ = ["RetrainModule", "make_model", "retrain"]


def make_model(settings: RetrainSettings, classes: int, in_chans: int, **kwargs: Any) -> nn.Module:
    """Return timm's model of a retraining, for images with ``in_chans`` channels; ``kwargs`` are timm's."""
    return timm.create_model(
        settings.model,
        genotype=settings.read_genotype(),
        cells=settings.cells,
        channels=settings.channels,
        num_classes=classes,
        in_chans=in_chans,
        **kwargs,
    )


class RetrainModule(pl.LightningModule):
    """Loss and weighted auxiliary loss under SGD with momentum and a cosine to 0.

    The rate at which operations are dropped grows from 0 in the first epoch towards ``drop_path_rate``.

    Args:
        model: a :class:`~timm_models.cellnet.CellNet`.
        settings: settings of the training; without an ``aux_weight`` there is no auxiliary loss.
        objective: the loss; cross-entropy by default.
    """

    def __init__(self, model: Any, settings: RetrainSettings, objective: Objective | None = None) -> None:
        super().__init__()
        self.objective = objective or Objective()
        if settings.aux_weight:
            model.set_auxiliary_training()
        self.layout = training_layout(model)
        self.model, self.settings = model.to(memory_format=self.layout), settings
        if not self.objective.regression:
            self.train_top1 = MulticlassAccuracy(model.num_classes, average="micro")
            self.test_top1 = MulticlassAccuracy(model.num_classes, average="micro")

    def forward(self, x: Tensor) -> Any:
        """Return logits, and in training also the logits of the auxiliary head."""
        return self.model(x.contiguous(memory_format=self.layout))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD; :meth:`on_train_epoch_start` moves its learning rate."""
        s = self.settings
        sgd = torch.optim.SGD(self.parameters(), s.lr, momentum=s.momentum, weight_decay=s.weight_decay)
        self.schedule = CosineLRScheduler(sgd, s.epochs)
        return sgd

    def on_train_epoch_start(self) -> None:
        """Set learning rate and drop rate; both depend on the epoch only."""
        self.schedule.step(self.current_epoch)
        self.model.set_drop_path_rate(self.drop_path_rate)

    @property
    def drop_path_rate(self) -> float:
        """The rate at which operations are dropped in this epoch."""
        return self.settings.drop_path_rate * self.current_epoch / self.settings.epochs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch, and log the loss of the main classifier."""
        images, labels = batch
        logits = self(images)
        logits, auxiliary = logits if self.settings.aux_weight else (logits, None)
        loss = self.objective(logits, labels)
        self._log("train", loss, logits, labels)
        if auxiliary is not None and self.settings.aux_weight:
            loss = loss + self.settings.aux_weight * self.objective(auxiliary, labels)
        return check_finite(loss, f"epoch {self.current_epoch + 1}, step {batch_idx + 1}")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of a batch of test images."""
        images, labels = batch
        logits = self(images)
        self._log("test", self.objective(logits, labels, training=False), logits, labels)

    def _log(self, part: str, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        over_epoch: dict[str, Any] = dict(on_step=False, on_epoch=True)
        for name, value in {f"{part}_loss": loss, **self.objective.measured(part, logits, labels)}.items():
            self.log(name, value, sync_dist=True, **over_epoch)
        if not self.objective.regression:
            top1 = getattr(self, f"{part}_top1")
            top1(logits, labels)
            self.log(f"{part}_top1", top1, **over_epoch)


# Over 40 lines: most of them describe arguments and errors.
def retrain(
    settings: RetrainSettings,
    out: str | Path,
    workers: int = 0,
    accelerator: str = "auto",
    devices: int | None = None,
    precision: str = "32-true",
    on_start: Callable[[int, int], None] = lambda done, batches: None,
    on_batch: Callable[[], None] = lambda: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda entry: None,
    trainer: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
    loss: Measure | None = None,
    metric: Measure | None = None,
    on_disk: bool = False,
) -> float:
    """Train the network of a genotype, or resume after the last finished epoch.

    The test images select nothing: the result is the accuracy after the last epoch.

    Args:
        settings: settings of the training.
        out: the folder of the run. Its ``history.json`` holds losses and accuracies of each epoch.
        workers: processes that load images; no effect on the result.
        accelerator: Lightning's.
        devices: processes that share the work, as in :func:`~nni_spaces.runs.search.search`.
        precision: Lightning's, for instance ``"bf16-mixed"``; a resumed run must have the same.
        on_start: called with the number of finished epochs and the number of batches per epoch.
        on_batch: called after every batch.
        on_epoch: called with every new entry of the history.
        trainer: further arguments of Lightning's Trainer, as in a search.
        transform: changes a training image, as in a search.
        loss: an own loss, as in a search.
        metric: an own function to measure, as in a search; the history has ``train_metric`` and ``test_metric``.
        on_disk: keep the images of a folder in a file, as in a search.

    Returns:
        The test accuracy after the last epoch, in %; with ``regression`` the test loss.

    Raises:
        ValueError: the folder holds a training with other settings or images, or is damaged; the images are damaged or
            too few; an auxiliary head does not fit images of this size; the number of processes is not ``devices``.
        RuntimeError: another process trains in the folder.
        FloatingPointError: the loss was not finite; the checkpoint of the last finished epoch is kept.
        OSError: a file cannot be written; earlier files are kept.
    """
    folder, devices = Path(out), resolve_devices(devices)
    with lock_folder(folder, devices):
        data, test = _read_both_splits(settings, folder if on_disk else None)
        settings = replace(settings, aux_weight=_aux_weight(settings, data.images))
        torch.manual_seed(settings.seed)
        model = make_model(settings, data.classes, data.images.shape[1], aux_head=bool(settings.aux_weight))
        facts = _facts(settings, data)
        execution = Execution(devices, precision)
        run = RunCallback(folder, settings, data, lambda module: facts, _entry, on_batch, on_epoch, execution)
        resume = run.resume()
        if run.first_epoch < settings.epochs:
            loaders = _loaders(data, test, settings, workers, devices, run.first_epoch, transform)
            on_start(run.first_epoch, len(loaders[0]))
            loop = pl.Trainer(
                gradient_clip_val=settings.gradient_clip,
                num_sanity_val_steps=0,
                precision=precision,  # type: ignore[arg-type]
                **trainer_options(run, settings.epochs, accelerator, devices, trainer),
            )
            objective = Objective(settings.regression, settings.label_smoothing, loss, metric)
            loop.fit(RetrainModule(model, settings, objective), *loaders, **resume)
        if not process_rank():
            _write_weights(run, is_new=run.first_epoch < settings.epochs)
            settings.read_genotype().save(folder / GENOTYPE)
        return last_entry(folder, "test_loss" if settings.regression else "test_top1")


def _read_both_splits(settings: RetrainSettings, store: Path | None) -> tuple[ImageSet, ImageSet]:
    """Return training and test images; ValueError unless they have one shape, and the test images no other classes."""
    data, test = (read_run_images(settings, split, store) for split in ("train", "test"))
    if not settings.regression and (label := int(test.labels.max())) >= data.classes:
        raise ValueError(f"data={settings.data!r}: test images have the label {label}, must be 0 … {data.classes - 1}")
    if test.images.shape[1:] != data.images.shape[1:]:
        shapes = " and ".join(str(tuple(part.images.shape[1:])) for part in (data, test))
        raise ValueError(f"data={settings.data!r}: training and test images are {shapes}: must be of one shape")
    return data, test


def _entry(module: Any, metrics: dict[str, float]) -> dict[str, Any]:
    """Return an entry of the history."""
    rate = module.optimizers().param_groups[0]["lr"]
    top1 = {name: round(100 * metrics[name], 4) if name in metrics else None for name in ("train_top1", "test_top1")}
    losses = {name: metrics[name] for name in ("train_loss", "test_loss")}
    return {"lr": rate, "drop_path_rate": module.drop_path_rate, **losses, **top1, **own_metrics(metrics)}


def _write_weights(run: RunCallback, is_new: bool) -> None:
    """Write the trained network for timm; ValueError if a finished training has another file."""
    # From the checkpoint: a run that was killed after its last epoch has the weights only there.
    state, weights = read_checkpoint(run.checkpoint)["state_dict"], run.folder / WEIGHTS
    content = save({k.removeprefix("model."): v.contiguous() for k, v in state.items() if "aux_head" not in k})
    if is_new or not weights.exists():
        write_atomically(weights, content)
    elif read_file(weights, limit=None) != content:
        raise ValueError(
            f"{printable(weights)}: is not the network of checkpoint.pt; remove it to have it written anew"
        )


def _aux_weight(settings: RetrainSettings, images: Tensor) -> float:
    """Return the weight of the auxiliary loss, or its default; the head needs images of one size."""
    size, needed = tuple(images.shape[-2:]), tuple(timm.get_pretrained_cfg(settings.model).input_size[1:])
    if settings.aux_weight is None:
        return 0.4 if size == needed else 0.0
    if settings.aux_weight and size != needed:
        head = f"the auxiliary head of {settings.model} takes {needed[0]} × {needed[1]}"
        sizes = f"data={settings.data!r} has images of {size[0]} × {size[1]}"
        raise ValueError(f"aux_weight={settings.aux_weight!r}: {head} and {sizes}; pass 0 or None")
    return settings.aux_weight


def _cutout(settings: RetrainSettings, images: Tensor) -> int:
    """Return the side of the cutout, or its default: half of the shorter side of an image."""
    return min(images.shape[-2:]) // 2 if settings.cutout is None else settings.cutout


def _facts(settings: RetrainSettings, data: ImageSet) -> dict[str, Any]:
    """Return the entries of ``run.json``: sizes and multiply-accumulates without auxiliary head, and moments."""
    model = make_model(settings, data.classes, data.images.shape[1], device="meta")
    size = count_network(model, data.images.shape[1:])
    mean, std = channel_moments(data.images)
    return dict(
        **size._asdict(),
        cutout=_cutout(settings, data.images),
        genotype_sha256=sha256(settings.read_genotype().to_json().encode()).hexdigest(),
        mean=[round(value / data.white, 6) for value in mean],
        std=[round(value / data.white, 6) for value in std],
    )


def _loaders(
    data: ImageSet,
    test: ImageSet,
    settings: RetrainSettings,
    workers: int,
    devices: int,
    epoch: int,
    transform: Transform | None = None,
) -> tuple[DataLoader, DataLoader]:
    """Return loaders of the training images, which start at ``epoch``, and of the test images."""
    sampler = EpochSampler(len(data.labels), settings.seed, devices)
    if len(sampler) < settings.batch_size:
        raise ValueError(f"batch_size={settings.batch_size!r}: must be at most {len(sampler)}, the images of a process")
    sampler.set_epoch(epoch)
    cutout = _cutout(settings, data.images)
    options: dict[str, Any] = dict(transform=transform, flip=settings.flip)
    train_images = SeededImages(data, None, settings.seed, settings.padding, cutout, **options)
    test_images = SeededImages(test, moments=channel_moments(data.images))
    test_sampler = EpochSampler(len(test.labels), None, devices)
    return (
        make_loader(train_images, settings.batch_size, sampler, workers),
        make_loader(test_images, settings.batch_size, test_sampler, workers, drop_last=False),
    )
