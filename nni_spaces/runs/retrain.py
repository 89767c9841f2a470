"""The network of a genotype, trained from scratch (§9.3), in a folder that survives being killed.

This adds what timm's script has not: an auxiliary loss, operations dropped more often as training goes on, cutout.
Beside what every run's folder holds (:mod:`nni_spaces.runs.callback`), ``model.safetensors`` and
``genotype.json`` hold the network for timm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.classification import MulticlassAccuracy

import timm_models  # noqa: F401  registers cellnet
from optinspired_plugins._checks import check_int
from optinspired_plugins._files import printable, read_file, write_atomically
from optinspired_plugins.cells.genotype import Genotype
from optinspired_plugins.memory.memory_format import training_layout
from optinspired_plugins.run_folder import Execution, last_entry

from .callback import RunFolder, finite, locked, resolve_devices, trainer_options
from .checkpoints import read_checkpoint
from .data import EpochSampler, ImageSet, SeededImages, channel_moments, make_loader, process_rank, read_images

__all__ = ["RetrainModule", "RetrainSettings", "retrain"]

MODELS = ("cellnet_cifar", "cellnet_imagenet")


@dataclass(frozen=True)
class RetrainSettings:
    """What a training is made of; the defaults are §9.3's.

    Raises:
        ValueError: a setting is out of range.
    """

    genotype: dict[str, Any] = field(default_factory=dict)
    """A genotype as JSON holds it."""
    data: str = "cifar10"
    limit: int | None = None
    model: str = "cellnet_cifar"
    epochs: int = 600
    batch_size: int = 96
    cells: int = 20
    width: int = 36
    lr: float = 0.025
    momentum: float = 0.9
    weight_decay: float = 3e-4
    gradient_clip: float = 5.0
    aux_weight: float | None = None
    """Weight of the auxiliary loss; ``None`` is 0.4 where the auxiliary head fits the images, and else 0."""
    drop_path: float = 0.2
    cutout: int | None = None
    """Side of the square cut out of an image; ``None`` is half of the image's, §9.3's 16 of 32."""
    padding: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        self.read_genotype()
        if self.model not in MODELS:
            raise ValueError(f"model={self.model!r}: must be one of {', '.join(MODELS)}")
        for name, least in (("epochs", 1), ("batch_size", 2), ("padding", 0), ("seed", 0)):
            check_int(name, getattr(self, name), least)
        if self.cutout is not None:
            check_int("cutout", self.cutout, 0)
        for name in ("lr", "gradient_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be a positive number")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path!r}: must be in [0, 1)")
        if self.aux_weight is not None and not 0 <= self.aux_weight < math.inf:
            raise ValueError(f"aux_weight={self.aux_weight!r}: must be ≥ 0, or None")
        for name in ("momentum", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be ≥ 0")

    def read_genotype(self) -> Genotype:
        """Return the genotype.

        Raises:
            ValueError: it is not one.
        """
        return Genotype.from_json(json.dumps(self.genotype))

    def make_model(self, classes: int, in_chans: int, **kwargs: Any) -> nn.Module:
        """Return timm's model for images of so many classes and channels; ``kwargs`` are its own."""
        return timm.create_model(
            self.model,
            genotype=self.read_genotype(),
            cells=self.cells,
            channels=self.width,
            num_classes=classes,
            in_chans=in_chans,
            **kwargs,
        )


class RetrainModule(pl.LightningModule):
    """Cross-entropy, plus a share of the auxiliary head's, under SGD with momentum and a cosine to 0.

    Operations are dropped at a rate that grows from 0 in the first epoch towards ``drop_path``.

    Args:
        model: a :class:`~timm_models.cellnet.CellNet`.
        settings: what the training is made of; without an ``aux_weight`` there is no auxiliary loss.
    """

    def __init__(self, model: Any, settings: RetrainSettings) -> None:
        super().__init__()
        if settings.aux_weight:
            model.set_auxiliary_training()
        self.layout = training_layout(model)
        self.model, self.settings = model.to(memory_format=self.layout), settings
        self.train_top1 = MulticlassAccuracy(model.num_classes, average="micro")
        self.test_top1 = MulticlassAccuracy(model.num_classes, average="micro")

    def forward(self, x: Tensor) -> Any:
        """Return logits, and those of the auxiliary head in training."""
        return self.model(x.contiguous(memory_format=self.layout))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD; :meth:`on_train_epoch_start` moves its learning rate."""
        s = self.settings
        sgd = torch.optim.SGD(self.parameters(), s.lr, momentum=s.momentum, weight_decay=s.weight_decay)
        self.schedule = CosineLRScheduler(sgd, s.epochs)
        return sgd

    def on_train_epoch_start(self) -> None:
        """Set learning rate and drop rate, both functions of the epoch alone."""
        self.schedule.step(self.current_epoch)
        self.model.set_drop_path_rate(self.drop_path_rate)

    @property
    def drop_path_rate(self) -> float:
        """The rate at which operations are dropped in this epoch."""
        return self.settings.drop_path * self.current_epoch / self.settings.epochs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch; what is logged is the main classifier's."""
        images, labels = batch
        logits = self(images)
        logits, auxiliary = logits if self.settings.aux_weight else (logits, None)
        loss = F.cross_entropy(logits, labels)
        self.train_top1(logits, labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("train_top1", self.train_top1, on_step=False, on_epoch=True)
        if auxiliary is not None and self.settings.aux_weight:
            loss = loss + self.settings.aux_weight * F.cross_entropy(auxiliary, labels)
        return finite(loss, f"epoch {self.current_epoch + 1}, step {batch_idx + 1}")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of a batch of test images."""
        images, labels = batch
        logits = self(images)
        self.test_top1(logits, labels)
        self.log("test_loss", F.cross_entropy(logits, labels), sync_dist=True)
        self.log("test_top1", self.test_top1)


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
) -> float:
    """Train the network of a genotype, or go on from the last finished epoch.

    The test images choose nothing: the result is the last epoch's.

    Args:
        settings: what to train.
        out: the folder of the run. Its ``history.json`` holds losses and accuracies an epoch.
        workers: processes that load images; no effect on the result.
        accelerator: Lightning's.
        devices: processes that share the work, each with batches of its own, as for
            :func:`~nni_spaces.runs.search.search`.
        precision: Lightning's, for instance ``"bf16-mixed"``; a run that goes on must have the same.
        on_start: called with the epochs that are done and the batches of one.
        on_batch: called after every batch.
        on_epoch: called with every new entry of the history.

    Returns:
        The test accuracy after the last epoch, in %.

    Raises:
        ValueError: the folder holds a training of other settings or images, or is damaged; the data are not as they
            must be; an auxiliary head does not fit images of this size; there are other processes than ``devices``.
        RuntimeError: another process trains in the folder.
        FloatingPointError: the loss was not finite; the checkpoint of the last finished epoch is kept.
        OSError: a file cannot be written; the ones before are kept.
    """
    folder, devices = Path(out), resolve_devices(devices)
    with locked(folder, devices):
        data, test = (read_images(settings.data, settings.limit, split) for split in ("train", "test"))
        if test.images.shape[1:] != data.images.shape[1:]:
            found = " and ".join(str(tuple(part.images.shape[1:])) for part in (data, test))
            raise ValueError(f"data={settings.data!r}: training and test images are {found}: must be of one shape")
        settings = replace(settings, aux_weight=_aux_weight(settings, data.images))
        torch.manual_seed(settings.seed)
        model = settings.make_model(data.classes, data.images.shape[1], aux_head=bool(settings.aux_weight))

        def entry(module: Any, metrics: dict[str, float]) -> dict[str, Any]:
            rate = module.optimizers().param_groups[0]["lr"]
            tops = {name: round(100 * metrics[name], 4) for name in ("train_top1", "test_top1")}
            losses = {name: metrics[name] for name in ("train_loss", "test_loss")}
            return {"lr": rate, "drop_path_rate": module.drop_path_rate, **losses, **tops}

        facts = _facts(settings, data)
        execution = Execution(devices, precision)
        run = RunFolder(folder, settings, data, lambda module: facts, entry, on_batch, on_epoch, execution)
        resume = run.resume()
        if run.first < settings.epochs:
            loaders = _loaders(data, test, settings, workers, devices, run.first)
            on_start(run.first, len(loaders[0]))
            trainer = pl.Trainer(
                gradient_clip_val=settings.gradient_clip,
                num_sanity_val_steps=0,
                precision=precision,  # type: ignore[arg-type]
                **trainer_options(run, settings.epochs, accelerator, devices),
            )
            trainer.fit(RetrainModule(model, settings), *loaders, **resume)
        if not process_rank():
            _keep_weights(run, is_new=run.first < settings.epochs)
            settings.read_genotype().save(folder / "genotype.json")
        return last_entry(folder, "test_top1")


def _keep_weights(run: RunFolder, is_new: bool) -> None:
    """Write the trained network for timm, or compare what a finished training has written.

    Raises:
        ValueError: the file holds another.
    """
    # From the checkpoint: a run that was killed after its last one has no other.
    state, weights = read_checkpoint(run.checkpoint)[0]["state_dict"], run.folder / "model.safetensors"
    content = save({k.removeprefix("model."): v.contiguous() for k, v in state.items() if "aux_head" not in k})
    if is_new or not weights.exists():
        write_atomically(weights, content)
    elif read_file(weights, limit=None) != content:
        raise ValueError(
            f"{printable(weights)}: is not the network of checkpoint.pt; remove it to have it written again"
        )


def _aux_weight(settings: RetrainSettings, images: Tensor) -> float:
    """Return the weight, or its default; the head takes images of one size."""
    size, taken = tuple(images.shape[-2:]), tuple(timm.get_pretrained_cfg(settings.model).input_size[1:])
    if settings.aux_weight is None:
        return 0.4 if size == taken else 0.0
    if settings.aux_weight and size != taken:
        found = f"data={settings.data!r} has images of {size[0]} × {size[1]}"
        taken_by = f"the auxiliary head of {settings.model} takes {taken[0]} × {taken[1]}"
        raise ValueError(f"aux_weight={settings.aux_weight!r}: {taken_by} and {found}; pass 0 or None")
    return settings.aux_weight


def _cutout(settings: RetrainSettings, images: Tensor) -> int:
    """Return the side, or its default: half of the shorter side of an image."""
    return min(images.shape[-2:]) // 2 if settings.cutout is None else settings.cutout


def _facts(settings: RetrainSettings, data: ImageSet) -> dict[str, Any]:
    """Count parameters and multiply-accumulates of an image, the auxiliary head left out."""
    model = settings.make_model(data.classes, data.images.shape[1], device="meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *data.images.shape[1:], device="meta"))
    mean, std = channel_moments(data.images)
    return dict(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=counter.get_total_flops() // 2,
        cutout=_cutout(settings, data.images),
        genotype_sha256=sha256(settings.read_genotype().to_json().encode()).hexdigest(),
        mean=[round(value / 255, 6) for value in mean],
        std=[round(value / 255, 6) for value in std],
    )


def _loaders(
    data: ImageSet, test: ImageSet, settings: RetrainSettings, workers: int, devices: int, epoch: int
) -> tuple[DataLoader, DataLoader]:
    """Return loaders of the training and the test images; the first begins at ``epoch``."""
    sampler = EpochSampler(len(data.labels), settings.seed, devices)
    if len(sampler) < settings.batch_size:
        raise ValueError(f"batch_size={settings.batch_size!r}: must be at most {len(sampler)}, the images of a process")
    sampler.set_epoch(epoch)
    cutout = _cutout(settings, data.images)
    train_images = SeededImages(data, None, settings.seed, settings.padding, cutout)
    test_images = SeededImages(test, moments=channel_moments(data.images))
    test_sampler = EpochSampler(len(test.labels), None, devices)
    return (
        make_loader(train_images, settings.batch_size, sampler, workers),
        make_loader(test_images, settings.batch_size, test_sampler, workers, drop_last=False),
    )
