"""A search from images to a genotype, in a folder that survives being killed.

The folder holds ``settings.json``, ``checkpoint.pt`` of the last finished epoch, ``history.json`` (a genotype, α and
losses each epoch) and, in the end, ``genotype.json``. Every file is either its old or its new version. What is random
is a function of seed and epoch, so a search that is resumed gives what an uninterrupted one gives, to the bit.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nni.nas.evaluator.pytorch import Lightning, LightningModule, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace
from torch import Tensor
from torchmetrics.functional import accuracy

from optinspired_plugins._files import write_atomically
from optinspired_plugins.genotype import Genotype

from .data import make_loaders, read_images
from .initialization import HeavyBallInit, RandomInit, ZeroInit
from .spaces import AGDSpace, CellSpace, DARTSSpace, HBSpace
from .strategies import DARTS, GumbelDARTS

__all__ = ["INITIALIZATIONS", "SPACES", "STRATEGIES", "SearchModule", "SearchSettings", "search"]

SPACES: dict[str, type[CellSpace]] = {"hb": HBSpace, "agd": AGDSpace, "darts": DARTSSpace}
INITIALIZATIONS: dict[str, type[Any]] = {"heavy-ball": HeavyBallInit, "zero": ZeroInit, "random": RandomInit}
STRATEGIES: dict[str, Callable[..., DARTS]] = {
    "darts": DARTS,
    "darts-second-order": lambda **kwargs: DARTS(order=2, **kwargs),
    "gumbel": GumbelDARTS,
}


@dataclass(frozen=True)
class SearchSettings:
    """What a search is made of; the defaults are §9.3's.

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

    def __post_init__(self) -> None:
        for name, table in (("space", SPACES), ("init", INITIALIZATIONS), ("strategy", STRATEGIES)):
            value = getattr(self, name)
            if value not in table:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(table)}")
        for name in ("epochs", "batch_size"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be ≥ 1")
        for name in ("lr", "alpha_lr", "gradient_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be a positive number")
        for name in ("momentum", "weight_decay", "alpha_weight_decay", "padding", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be ≥ 0")

    def make_space(self, classes: int, in_chans: int) -> CellSpace:
        """Return the space for images of so many classes and channels."""
        return SPACES[self.space](
            channels=self.channels,
            cells=self.cells,
            nodes=self.nodes,
            num_classes=classes,
            in_chans=in_chans,
            initialization=INITIALIZATIONS[self.init](),
        )

    def make_strategy(self) -> DARTS:
        """Return NNI's strategy with these hyper-parameters."""
        return STRATEGIES[self.strategy](
            arc_learning_rate=self.alpha_lr,
            alpha_weight_decay=self.alpha_weight_decay,
            gradient_clip_val=self.gradient_clip,
        )


class SearchModule(LightningModule):
    """Cross-entropy under SGD with momentum and a cosine to 0 (§9.3), for NNI's evaluator.

    Args:
        lr: first learning rate.
        momentum: momentum.
        weight_decay: weight decay of the weights.
        epochs: length of the cosine.

    Raises:
        FloatingPointError: in training, where the loss is not finite; it names epoch and step.
    """

    def __init__(self, lr: float, momentum: float, weight_decay: float, epochs: int) -> None:
        super().__init__()
        self.lr, self.momentum, self.weight_decay, self.epochs = lr, momentum, weight_decay, epochs

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch; NNI's strategies call it twice a step, with α's batch first."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        if not loss.isfinite():
            where = f"epoch {self.trainer.current_epoch}, step {batch_idx // 2}"
            raise FloatingPointError(f"loss={loss.item()} in {where}: must be finite; lower lr or clip more")
        part = ("alpha", "train")[batch_idx % 2]
        top1 = accuracy(logits, labels, "multiclass", num_classes=logits.shape[1])
        self.log(f"{part}_loss", loss, on_step=False, on_epoch=True)
        self.log(f"{part}_top1", 100 * top1, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return SGD and its cosine."""
        sgd = torch.optim.SGD(self.parameters(), self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        return [sgd], [torch.optim.lr_scheduler.CosineAnnealingLR(sgd, self.epochs)]


class RunFolder(pl.Callback):
    """Seeds every epoch, and after it writes checkpoint and history.

    Args:
        folder: the folder of the run.
        seed: seed of the run.
        genotype: makes a genotype of what a strategy exports.
        on_batch: called after every batch.
        on_epoch: called with every entry of the history.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        genotype: Callable[[dict[str, Any]], Genotype],
        on_batch: Callable[[], None],
        on_epoch: Callable[[dict[str, Any]], None],
    ) -> None:
        self.folder, self.seed, self.genotype = folder, seed, genotype
        self.on_batch, self.on_epoch = on_batch, on_epoch
        self.began = 0.0

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Seed what an epoch draws from: nothing of a random state needs to be kept."""
        torch.manual_seed(1_000_003 * self.seed + trainer.current_epoch)
        self.began = time.monotonic()

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        """Say that a batch is done."""
        self.on_batch()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Write the history, then the checkpoint: what is killed between them repeats an epoch and its entry."""
        if not trainer.is_global_zero:
            return
        metrics = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        genotype = self.genotype(module.export())
        entry = {
            "epoch": trainer.current_epoch,
            "genotype": json.loads(genotype.to_json()),
            "probabilities": module.export_probs(),
            **{name: metrics[name] for name in ("train_loss", "train_top1", "alpha_loss", "alpha_top1")},
            "seconds": round(time.monotonic() - self.began, 2),
        }
        history = [e for e in read_history(self.folder) if e["epoch"] < entry["epoch"]]
        write_atomically(self.folder / "history.json", json.dumps([*history, entry]))
        save_checkpoint(trainer, self.folder / "checkpoint.pt")
        self.on_epoch(entry)


def save_checkpoint(trainer: Any, path: Path) -> None:
    """Write Lightning's checkpoint beside ``path``, sync and rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        trainer.save_checkpoint(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Read the epochs so far.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / "history.json"
    if not path.exists():
        return []
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
        return [entry for entry in history if isinstance(entry["epoch"], int)]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a history of a search ({error})") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the system frees it however the process ends.

    Raises:
        RuntimeError: another process holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            # Not flock: forked loader processes would share that lock, and outlive a killed search for a moment.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RuntimeError(f"out={str(folder)!r}: another process is searching there") from None
        yield


def search(
    settings: SearchSettings,
    out: str | Path,
    workers: int = 0,
    accelerator: str = "auto",
    on_start: Callable[[int, int], None] = lambda done, batches: None,
    on_batch: Callable[[], None] = lambda: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> Genotype:
    """Search, or go on with a search from its last finished epoch.

    Args:
        settings: what to search.
        out: the folder of the run.
        workers: processes that load images; no effect on the result.
        accelerator: Lightning's.
        on_start: called with the epochs that are done and the batches of one.
        on_batch: called after every batch.
        on_epoch: called with every new entry of the history.

    Returns:
        The genotype, also written to ``genotype.json``.

    Raises:
        ValueError: the folder holds a search of other settings, or is damaged; the data are not as they must be.
        RuntimeError: another process searches in the folder.
        FloatingPointError: the loss was not finite; the checkpoint of the last finished epoch is kept.
        OSError: a file cannot be written; the ones before are kept.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _settle(folder, settings)
        data = read_images(settings.data, settings.limit)
        torch.manual_seed(settings.seed)
        space = settings.make_space(data.classes, data.images.shape[1])
        callback = RunFolder(folder, settings.seed, space.genotype, on_batch, on_epoch)
        loaders = make_loaders(data, settings.batch_size, settings.seed, workers, settings.padding)
        checkpoint = folder / "checkpoint.pt"
        resume: dict[str, Any] = {}
        start = 0
        if checkpoint.exists():
            resume = {"ckpt_path": str(checkpoint), "weights_only": True}
            # Loader processes ask for their first images before Lightning names the epoch.
            start = torch.load(checkpoint, map_location="cpu", weights_only=True)["epoch"] + 1
            for loader in loaders:
                loader.sampler.set_epoch(start)  # type: ignore[attr-defined]
        on_start(start, len(loaders[0]))
        evaluator = Lightning(
            SearchModule(settings.lr, settings.momentum, settings.weight_decay, settings.epochs),
            Trainer(
                max_epochs=settings.epochs,
                accelerator=accelerator,
                devices=1,
                callbacks=[callback],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                default_root_dir=str(folder),
            ),
            train_dataloaders=loaders[0],
            val_dataloaders=loaders[1],
            fit_kwargs=resume,
        )
        strategy = settings.make_strategy()
        strategy(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
        genotype = space.genotype(strategy.oneshot_module.export())
        genotype.save(folder / "genotype.json")
        return genotype


def _settle(folder: Path, settings: SearchSettings) -> None:
    """Write the settings of a new folder; compare those of an old one."""
    path = folder / "settings.json"
    if not path.exists():
        write_atomically(path, json.dumps(asdict(settings), indent=2) + "\n")
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        old = asdict(SearchSettings(**stored))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not the settings of a search ({error})") from error
    mine = asdict(settings)
    different = [f"{name}={old[name]!r} (here {mine[name]!r})" for name in mine if mine[name] != old[name]]
    if different:
        raise ValueError(f"out={str(folder)!r}: holds a search with {', '.join(different)}: choose another folder")
