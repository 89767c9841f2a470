"""A differentiable search in a folder that can be resumed (:mod:`nni_spaces.runs.callback`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import nni_spaces._nni  # noqa: F401

import torch
from nni.nas.evaluator.pytorch import Lightning, LightningModule, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace
from torch import Tensor
from torchmetrics.functional import accuracy

from optinspired_plugins._checks import load_object
from optinspired_plugins.cells.genotype import Genotype
from optinspired_plugins.memory.memory_format import training_layout
from optinspired_plugins.run_folder import GENOTYPE, Execution, lock_folder, process_rank, resolve_devices

from ..spaces.cost import ImageSize
from ..spaces.initialization import AlgorithmInit, HeavyBallInit, RandomInit, ZeroInit
from ..spaces.space import AGDSpace, AlgorithmSpace, CellSpace, DARTSSpace, HBSpace
from ..spaces.structure import CellStructure
from ..strategies.collapse import EigenvalueStop, SkipStop
from ..strategies.differentiable import DARTS, GumbelDARTS
from .callback import RunCallback, check_finite, own_metrics, trainer_options
from .data import Transform, make_loaders, read_run_images
from .objective import Measure, Objective
from .settings import FAVOURING, SearchSettings

__all__ = [
    "INITIALIZATIONS",
    "SPACES",
    "STRATEGIES",
    "SearchModule",
    "cell_structure",
    "make_initialization",
    "make_space",
    "make_strategy",
    "search",
    "start_logit",
]

SPACES: dict[str, type[CellSpace]] = {
    "hb": HBSpace,
    "agd": AGDSpace,
    "darts": DARTSSpace,
    "algorithm": AlgorithmSpace,
}
INITIALIZATIONS: dict[str, Callable[..., Any]] = {
    "heavy-ball": HeavyBallInit,
    "zero": ZeroInit,
    "random": RandomInit,
    "algorithm": AlgorithmInit,
}
STOPS: dict[str, Callable[[], Any]] = {"skips": SkipStop, "eigenvalue": EigenvalueStop}
MIN_LOGIT, MAX_LOGIT = math.log(8), 5.0
STRATEGIES: dict[str, Callable[..., DARTS]] = {
    "darts": DARTS,
    "darts-second-order": lambda **kwargs: DARTS(order=2, **kwargs),
    "gumbel": GumbelDARTS,
    "pc-darts": DARTS,
    "p-darts": DARTS,
}


def start_logit(settings: SearchSettings, steps: float) -> float:
    """Return the start of a favoured α, if the settings leave it open.

    It is the distance that α can travel in the search, about ``steps`` · ``alpha_lr`` under Adam, so that another
    operation can win while the favourite falls and its own α rises. It is at least ln 8, the weight ½ among nine
    operations, and at most 5, the weight 0.95.
    """
    return min(MAX_LOGIT, max(MIN_LOGIT, steps * settings.alpha_lr)) if settings.logit is None else settings.logit


def make_initialization(settings: SearchSettings, steps: float = math.inf) -> Any:
    """Return the initialisation of a search: one of ours, or the user's object, whose module is imported.

    Args:
        settings: settings of the search.
        steps: steps of α, for :func:`start_logit`.

    Raises:
        ValueError: the module has no such attribute.
        ModuleNotFoundError: there is no such module.
    """
    arguments: dict[str, Any] = {}
    if settings.initialization in FAVOURING:
        arguments["logit"] = start_logit(settings, steps)
    if settings.initialization == "algorithm":
        arguments["edge_weights"] = settings.edge_weights
    table = {name: partial(kind, **arguments) for name, kind in INITIALIZATIONS.items()}
    return load_object("initialization", settings.initialization, table)


def make_space(settings: SearchSettings, classes: int, in_chans: int, steps: float = math.inf) -> CellSpace:
    """Return the space of a search.

    Args:
        settings: settings of the search.
        classes: number of classes.
        in_chans: channels of an image.
        steps: steps of α, for :func:`start_logit`.
    """
    space: Callable[..., CellSpace] = SPACES[settings.space]
    if settings.algorithm is not None:
        of_algorithm: dict[str, Any] = dict(
            merge=settings.merge, keep=settings.keep, edge_weights=settings.edge_weights
        )
        space = partial(space, settings.algorithm, **of_algorithm)
    return space(
        channels=settings.channels,
        cells=settings.cells,
        nodes=settings.nodes,
        num_classes=classes,
        in_chans=in_chans,
        initialization=make_initialization(settings, steps),
        stem=settings.stem,
        operations=settings.operations,
        partial_channels=cast(int, settings.partial_channels),
        skip_dropout=settings.skip_dropout,
        allowed=settings.allowed,
        grad_checkpointing=settings.grad_checkpointing,
    )


def cell_structure(settings: SearchSettings) -> CellStructure:
    """Return the structure of the cells of a search."""
    if settings.algorithm is None:
        return SPACES[settings.space].structure
    return CellStructure(settings.algorithm, settings.merge, settings.keep, settings.edge_weights)


def make_strategy(settings: SearchSettings, image_size: ImageSize | None = None) -> DARTS:
    """Return NNI's strategy with the hyper-parameters of a search on images of this side, or height and width."""
    return STRATEGIES[settings.strategy](
        arc_learning_rate=settings.alpha_lr,
        alpha_weight_decay=settings.alpha_weight_decay,
        alpha_decay_to=settings.alpha_decay_to,
        gradient_clip_val=settings.gradient_clip,
        warmup_epochs=settings.warmup_epochs,
        mac_weight=settings.mac_weight,
        image_size=image_size,
    )


class SearchModule(LightningModule):
    """A loss under SGD with momentum and a cosine to 0 (§9.3), for NNI's evaluator.

    Args:
        lr: first learning rate.
        momentum: momentum.
        weight_decay: weight decay of the weights.
        epochs: length of the cosine.
        objective: the loss; cross-entropy by default.

    Raises:
        FloatingPointError: in training, where the loss is not finite; it names epoch and step, from 1.
    """

    def __init__(
        self, lr: float, momentum: float, weight_decay: float, epochs: int, objective: Objective | None = None
    ) -> None:
        super().__init__()
        self.objective = objective or Objective()
        self.lr, self.momentum, self.weight_decay, self.epochs = lr, momentum, weight_decay, epochs

    def set_model(self, model: Any) -> None:
        """Set the network, in the fastest memory format that has right gradients."""
        self.layout = training_layout(model)
        super().set_model(model.to(memory_format=self.layout))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.model(x.contiguous(memory_format=self.layout))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch; NNI's strategies call this twice per step, first with the batch of α."""
        images, labels = batch
        logits = self(images)
        loss = self.objective(logits, labels)
        check_finite(loss, f"epoch {self.trainer.current_epoch + 1}, step {batch_idx // 2 + 1}")
        part = ("alpha", "train")[batch_idx % 2]
        measured = {f"{part}_loss": loss, **self.objective.measured(part, logits, labels)}
        if not self.objective.regression:
            top1 = accuracy(logits, labels, "multiclass", num_classes=logits.shape[1])
            measured[f"{part}_top1"] = 100 * top1
        for name, value in measured.items():
            self.log(name, value, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return SGD and its cosine."""
        sgd = torch.optim.SGD(self.parameters(), self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        return [sgd], [torch.optim.lr_scheduler.CosineAnnealingLR(sgd, self.epochs)]


# Over 40 lines: most of them describe arguments and errors.
def search(
    settings: SearchSettings,
    out: str | Path,
    workers: int = 0,
    accelerator: str = "auto",
    devices: int | None = None,
    on_start: Callable[[int, int], None] = lambda done, batches: None,
    on_batch: Callable[[], None] = lambda: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda entry: None,
    trainer: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
    loss: Measure | None = None,
    metric: Measure | None = None,
    on_disk: bool = False,
    precision: str = "32-true",
) -> Genotype:
    """Search, or resume a search after its last finished epoch.

    Args:
        settings: settings of the search.
        out: the folder of the run. Its ``history.json`` holds genotype, α and losses of each epoch.
        workers: processes that load images; no effect on the result.
        accelerator: Lightning's.
        devices: processes that share the work, each with its own batches. Lightning starts the calling script once per
            process, unless ``torchrun`` did. ``None`` for the number of ``torchrun``, or 1.
        on_start: called with the number of finished epochs and the number of batches per epoch.
        on_batch: called after every batch.
        on_epoch: called with every new entry of the history.
        trainer: further arguments of Lightning's Trainer, for instance ``dict(logger=…, callbacks=[…])``; not recorded.
        transform: changes a training image, as in :class:`~nni_spaces.runs.data.SeededImages`; not recorded.
        loss: an own loss, as in :class:`~nni_spaces.runs.objective.Objective`; not recorded.
        metric: an own function to measure, as there; the history has its mean as ``train_metric`` and ``alpha_metric``.
        on_disk: keep the images of a folder in a file that is removed with the process, instead of in memory; no effect
            on the result.
        precision: Lightning's, for instance ``"bf16-mixed"``, but not ``"16-mixed"``, whose scaled gradients a search
            would clip; a resumed search must have the same.

    Returns:
        The genotype, also written to ``genotype.json``.

    Raises:
        ValueError: the folder holds a search with other settings or images, or is damaged; the images are damaged or
            too few; the number of processes is not ``devices``.
        RuntimeError: another process searches in the folder.
        FloatingPointError: the loss was not finite; the checkpoint of the last finished epoch is kept.
        OSError: a file cannot be written; earlier files are kept.
    """
    if settings.strategy == "p-darts":
        raise ValueError("strategy='p-darts': is a search in stages, use search_progressively")
    if precision == "16-mixed":
        raise ValueError("precision='16-mixed': a search clips scaled gradients then, must be another, as bf16-mixed")
    folder, devices = Path(out), resolve_devices(devices)
    with lock_folder(folder, devices):
        data = read_run_images(settings, store=folder if on_disk else None)
        order = (settings.batch_size, settings.seed, workers, settings.padding, devices)
        loaders = make_loaders(data, *order, transform=transform, flip=settings.flip)
        steps = len(loaders[0]) * (settings.epochs - cast(int, settings.warmup_epochs))
        torch.manual_seed(settings.seed)
        space = make_space(settings, data.classes, data.images.shape[1], steps)
        stop = STOPS[settings.early_stop]() if settings.early_stop in STOPS else None
        record = _Record(space, settings, steps, stop)
        execution = Execution(devices, precision)
        run = RunCallback(folder, settings, data, record.facts, record.entry, on_batch, on_epoch, execution)
        resume = run.resume()
        for loader in loaders:
            # Loader processes load their first images before Lightning sets the epoch.
            loader.sampler.set_epoch(run.first_epoch)  # type: ignore[attr-defined]
        on_start(run.first_epoch, len(loaders[0]))
        objective = Objective(settings.regression, settings.label_smoothing, loss, metric)
        module = SearchModule(settings.lr, settings.momentum, settings.weight_decay, settings.epochs, objective)
        options = trainer_options(run, settings.epochs, accelerator, devices, trainer)
        # Before the callback of the run, so that its checkpoint has the decision of the epoch.
        options["callbacks"] = [*([stop] if stop else []), *options["callbacks"]]
        evaluator = Lightning(module, Trainer(precision=precision, **options), *loaders, fit_kwargs=resume)
        strategy = make_strategy(settings, tuple(data.images.shape[2:]))
        strategy(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
        stopped = None if stop is None else stop.sample
        genotype = space.genotype(strategy.oneshot_module.export() if stopped is None else stopped)
        if not process_rank():
            genotype.save(folder / GENOTYPE)
        return genotype


@dataclass
class _Record:
    """The contents of ``run.json`` and ``history.json`` that are a search's own."""

    space: CellSpace
    settings: SearchSettings
    steps: int
    stop: Any = None  # of settings.early_stop
    start: dict[str, Any] = field(default_factory=dict)

    def facts(self, module: Any) -> dict[str, Any]:
        """Return the number of weights of a supernet, the number of its architecture parameters, and the steps of α.

        A favoured α has its start, too. Lightning calls this before the first step.
        """
        self.start = _logits(module)
        logit = round(start_logit(self.settings, self.steps), 4)
        favoured = dict(logit=logit) if self.settings.initialization in FAVOURING else {}
        architecture = sum(map(Tensor.numel, module.arch_parameters()))
        parameters = sum(map(Tensor.numel, module.parameters())) - architecture
        return dict(parameters=parameters, architecture_parameters=architecture, alpha_steps=self.steps, **favoured)

    def entry(self, module: Any, metrics: dict[str, float]) -> dict[str, Any]:
        """Return an entry of the history; the first has the start, and α has no metrics while it stands still."""
        first = {"start_logits": self.start} if module.current_epoch == 0 else {}
        return {
            "genotype": json.loads(self.space.genotype(module.export()).to_json()),
            "probabilities": module.export_probs(),
            "logits": _logits(module),
            **first,
            **{name: metrics.get(name) for name in ("train_loss", "train_top1", "alpha_loss", "alpha_top1")},
            **own_metrics(metrics),
            **dict(zip(["alpha_eigenvalue"], getattr(self.stop, "eigenvalues", [])[-1:])),
        }


def _logits(module: Any) -> dict[str, dict[str, float]]:
    """Return α by edge and operation, with six digits, in the form of ``export_probs``."""
    found: dict[str, Tensor] = {}
    for each in module.supernet_modules():
        alpha = getattr(each, "_arch_alpha", {})
        found.update({each.label: alpha} if isinstance(alpha, Tensor) else alpha.items())
    return {
        label: {name: round(value, 6) for name, value in zip(row, found[label].tolist())}
        for label, row in module.export_probs().items()
        if label in found
    }
