"""A search from images to a genotype, in a folder that survives being killed (:mod:`nni_spaces.runs.callback`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from nni.nas.evaluator.pytorch import Lightning, LightningModule, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace
from torch import Tensor
from torchmetrics.functional import accuracy

from optinspired_plugins._checks import check_int
from optinspired_plugins.cells.genotype import Genotype
from optinspired_plugins.memory.memory_format import training_layout
from optinspired_plugins.run_folder import Execution

from ..spaces.initialization import HeavyBallInit, RandomInit, ZeroInit
from ..spaces.space import AGDSpace, CellSpace, DARTSSpace, HBSpace, check_partial_channels, check_rate
from ..strategies.differentiable import DARTS, GumbelDARTS
from .callback import RunFolder, finite, locked, resolve_devices, trainer_options
from .data import make_loaders, process_rank, read_images

__all__ = ["INITIALIZATIONS", "SPACES", "STRATEGIES", "SearchModule", "SearchSettings", "search"]

SPACES: dict[str, type[CellSpace]] = {"hb": HBSpace, "agd": AGDSpace, "darts": DARTSSpace}
INITIALIZATIONS: dict[str, type[Any]] = {"heavy-ball": HeavyBallInit, "zero": ZeroInit, "random": RandomInit}
STRATEGIES: dict[str, Callable[..., DARTS]] = {
    "darts": DARTS,
    "darts-second-order": lambda **kwargs: DARTS(order=2, **kwargs),
    "gumbel": GumbelDARTS,
    "pc-darts": DARTS,
    "p-darts": DARTS,
}
# K, and the part of the epochs in which α stands still: 15 of 50 (Xu et al. 2020), 10 of 25 a stage (Chen et al. 2019).
STRATEGY_DEFAULTS = {"pc-darts": (4, 0.3), "p-darts": (1, 0.4)}


@dataclass(frozen=True)
class SearchSettings:
    """What a search is made of; the defaults are §9.3's.

    ``partial_channels``, ``skip_dropout`` and ``allowed`` are the space's; α stands still in the first
    ``warmup_epochs``. ``None`` becomes what the strategy's paper has for CIFAR, 1 and 0 for the others.
    ``grad_checkpointing`` saves memory for time.

    Raises:
        ValueError: a setting is unknown or out of range.
    """

    space: str = "hb"
    init: str = "zero"
    strategy: str = "darts"
    data: str = "cifar10"
    limit: int | None = None
    epochs: int = 50
    batch_size: int = 64
    channels: int = 16
    cells: int = 8
    nodes: int = 4
    lr: float = 0.025
    momentum: float = 0.9
    weight_decay: float = 3e-4
    alpha_lr: float = 3e-4
    alpha_weight_decay: float = 1e-3
    gradient_clip: float = 5.0
    padding: int = 4
    seed: int = 0
    partial_channels: int | None = None
    warmup_epochs: int | None = None
    skip_dropout: float = 0.0
    allowed: Mapping[str, Sequence[str]] | None = None
    grad_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, table in (("space", SPACES), ("init", INITIALIZATIONS), ("strategy", STRATEGIES)):
            value = getattr(self, name)
            if value not in table:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(table)}")
        for name, least in (("epochs", 1), ("batch_size", 1), ("padding", 0), ("seed", 0)):
            check_int(name, getattr(self, name), least)
        for name in ("lr", "alpha_lr", "gradient_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be a positive number")
        for name in ("momentum", "weight_decay", "alpha_weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be ≥ 0")
        self._settle_options()

    def _settle_options(self) -> None:
        """Put the strategy's own in the place of None, and check."""
        parts, still = STRATEGY_DEFAULTS.get(self.strategy, (1, 0.0))
        for name, value in (("partial_channels", parts), ("warmup_epochs", int(still * self.epochs))):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.allowed is not None:  # as a file gives it back
            object.__setattr__(self, "allowed", {label: list(names) for label, names in self.allowed.items()})
        check_partial_channels(cast(int, self.partial_channels), self.channels)
        check_int("warmup_epochs", self.warmup_epochs, 0)
        if cast(int, self.warmup_epochs) >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs}: must be < epochs={self.epochs}, or α never moves")
        check_rate("skip_dropout", self.skip_dropout)

    def make_space(self, classes: int, in_chans: int) -> CellSpace:
        """Return the space for images of so many classes and channels."""
        return SPACES[self.space](
            channels=self.channels,
            cells=self.cells,
            nodes=self.nodes,
            num_classes=classes,
            in_chans=in_chans,
            initialization=INITIALIZATIONS[self.init](),
            partial_channels=cast(int, self.partial_channels),
            skip_dropout=self.skip_dropout,
            allowed=self.allowed,
            grad_checkpointing=self.grad_checkpointing,
        )

    def make_strategy(self) -> DARTS:
        """Return NNI's strategy with these hyper-parameters."""
        return STRATEGIES[self.strategy](
            arc_learning_rate=self.alpha_lr,
            alpha_weight_decay=self.alpha_weight_decay,
            gradient_clip_val=self.gradient_clip,
            warmup_epochs=self.warmup_epochs,
        )


class SearchModule(LightningModule):
    """Cross-entropy under SGD with momentum and a cosine to 0 (§9.3), for NNI's evaluator.

    Args:
        lr: first learning rate.
        momentum: momentum.
        weight_decay: weight decay of the weights.
        epochs: length of the cosine.

    Raises:
        FloatingPointError: in training, where the loss is not finite; it names epoch and step, from 1.
    """

    def __init__(self, lr: float, momentum: float, weight_decay: float, epochs: int) -> None:
        super().__init__()
        self.lr, self.momentum, self.weight_decay, self.epochs = lr, momentum, weight_decay, epochs

    def set_model(self, model: Any) -> None:
        """Take the network, in the fastest layout whose gradients are right."""
        self.layout = training_layout(model)
        super().set_model(model.to(memory_format=self.layout))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.model(x.contiguous(memory_format=self.layout))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch; NNI's strategies call it twice a step, with α's batch first."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        finite(loss, f"epoch {self.trainer.current_epoch + 1}, step {batch_idx // 2 + 1}")
        part = ("alpha", "train")[batch_idx % 2]
        top1 = accuracy(logits, labels, "multiclass", num_classes=logits.shape[1])
        self.log(f"{part}_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log(f"{part}_top1", 100 * top1, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return SGD and its cosine."""
        sgd = torch.optim.SGD(self.parameters(), self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        return [sgd], [torch.optim.lr_scheduler.CosineAnnealingLR(sgd, self.epochs)]


def search(
    settings: SearchSettings,
    out: str | Path,
    workers: int = 0,
    accelerator: str = "auto",
    devices: int | None = None,
    on_start: Callable[[int, int], None] = lambda done, batches: None,
    on_batch: Callable[[], None] = lambda: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> Genotype:
    """Search, or go on with a search from its last finished epoch.

    Args:
        settings: what to search.
        out: the folder of the run. Its ``history.json`` holds a genotype, α and losses an epoch.
        workers: processes that load images; no effect on the result.
        accelerator: Lightning's.
        devices: processes that share the work, each with batches of its own; with several, Lightning starts the
            script that calls this again for each, or ``torchrun`` has. ``None`` for as many as ``torchrun`` has, or 1.
        on_start: called with the epochs that are done and the batches of one.
        on_batch: called after every batch.
        on_epoch: called with every new entry of the history.

    Returns:
        The genotype, also written to ``genotype.json``.

    Raises:
        ValueError: the folder holds a search of other settings or images, or is damaged; the data are not as they
            must be; there are other processes than ``devices``.
        RuntimeError: another process searches in the folder.
        FloatingPointError: the loss was not finite; the checkpoint of the last finished epoch is kept.
        OSError: a file cannot be written; the ones before are kept.
    """
    if settings.strategy == "p-darts":
        raise ValueError("strategy='p-darts': is a search in stages, use search_progressively")
    folder, devices = Path(out), resolve_devices(devices)
    with locked(folder, devices):
        data = read_images(settings.data, settings.limit)
        torch.manual_seed(settings.seed)
        space = settings.make_space(data.classes, data.images.shape[1])

        def entry(module: Any, metrics: dict[str, float]) -> dict[str, Any]:
            return {
                "genotype": json.loads(space.genotype(module.export()).to_json()),
                "probabilities": module.export_probs(),
                # α has no batches while it stands still.
                **{name: metrics.get(name) for name in ("train_loss", "train_top1", "alpha_loss", "alpha_top1")},
            }

        run = RunFolder(folder, settings, data, _sizes, entry, on_batch, on_epoch, Execution(devices))
        resume = run.resume()
        loaders = make_loaders(data, settings.batch_size, settings.seed, workers, settings.padding, devices)
        for loader in loaders:
            # Loader processes ask for their first images before Lightning names the epoch.
            loader.sampler.set_epoch(run.first)  # type: ignore[attr-defined]
        on_start(run.first, len(loaders[0]))
        evaluator = Lightning(
            SearchModule(settings.lr, settings.momentum, settings.weight_decay, settings.epochs),
            Trainer(**trainer_options(run, settings.epochs, accelerator, devices)),
            train_dataloaders=loaders[0],
            val_dataloaders=loaders[1],
            fit_kwargs=resume,
        )
        strategy = settings.make_strategy()
        strategy(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
        genotype = space.genotype(strategy.oneshot_module.export())
        if not process_rank():
            genotype.save(folder / "genotype.json")
        return genotype


def _sizes(module: Any) -> dict[str, int]:
    """Count the weights of a supernet, and its α and β."""
    alphas = module.arch_parameters()
    every = sum(p.numel() for p in module.parameters())
    return dict(
        parameters=every - sum(p.numel() for p in alphas), architecture_parameters=sum(map(Tensor.numel, alphas))
    )
