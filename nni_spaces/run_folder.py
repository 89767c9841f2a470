"""The folder of a run, which survives being killed: searches and retrainings keep their state in one alike.

It holds ``settings.json``, ``run.json`` (versions, the images' hash, sizes), ``checkpoint.pt`` of the last finished
epoch and ``history.json``, an entry each epoch. Every file is either its old or its new version. What is random is a
function of seed, epoch and process, so a run that is resumed gives what an uninterrupted one gives, to the bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException

from optinspired_plugins._files import write_atomically

from .data import ImageSet, process_rank

__all__ = ["RunFolder", "describe", "finite", "locked", "read_history", "trainer_options"]

ADVICE = "lower lr or clip more"
PACKAGES = ("torch", "nni", "pytorch-lightning", "timm", "numpy")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the system frees it however the process ends.

    Of a distributed run, the first process holds it for all.

    Raises:
        RuntimeError: another process holds it.
        NotImplementedError: the system has no record locks, as Windows.
    """
    try:
        import fcntl
    except ImportError:
        raise NotImplementedError(
            f"out={str(folder)!r}: a run locks its folder by fcntl, which {platform.system()} has not: must be a Unix"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    if process_rank():
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            # Not flock: forked loader processes would share that lock, and outlive a killed run for a moment.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RuntimeError(f"out={str(folder)!r}: another process is running there") from None
        yield


def _read(path: Path, check: Callable[[Any], Any]) -> Any:
    """Return what ``check`` makes of a JSON file, ``None`` where there is none."""
    if not path.exists():
        return None
    try:
        return check(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not the {path.stem} of such a run ({error})") from error


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def describe(data: ImageSet) -> dict[str, Any]:
    """Return the number, shape and hash of images and labels."""
    count, channels, height, width = data.images.shape
    digest = hashlib.sha256(data.images.numpy().tobytes())
    digest.update(data.labels.numpy().tobytes())
    shape = dict(channels=channels, height=height, width=width)
    return dict(images=count, classes=data.classes, **shape, sha256=digest.hexdigest())


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Read the epochs so far.

    Raises:
        ValueError: the file is damaged.
    """
    found = _read(folder / "history.json", lambda history: [e for e in history if isinstance(e["epoch"], int)])
    return found or []


def finite(loss: torch.Tensor, where: str) -> torch.Tensor:
    """Return a loss that is finite in every process: one that stops alone would leave the others waiting.

    Raises:
        FloatingPointError: it is not, and where.
    """
    worst = loss.detach().clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(worst)
    if not worst.isfinite():
        raise FloatingPointError(f"loss={loss.item()} in {where}: must be finite; {ADVICE}")
    return loss


class RunFolder(pl.Callback):
    """Settles the folder, seeds every epoch, and after it writes history and checkpoint.

    Args:
        folder: the folder of the run, held by this process.
        settings: a dataclass of plain values, with ``seed`` and ``data``.
        data: the training images.
        sizes: makes more facts for ``run.json`` of the module.
        entry: makes an entry of the history of the module and the epoch's metrics.
        on_batch: called after every batch.
        on_epoch: called with every entry of the history.

    Raises:
        ValueError: the folder holds a run of other settings or images, or is damaged.
    """

    def __init__(
        self,
        folder: Path,
        settings: Any,
        data: ImageSet,
        sizes: Callable[[Any], dict[str, int]],
        entry: Callable[[Any, dict[str, float]], dict[str, Any]],
        on_batch: Callable[[], None],
        on_epoch: Callable[[dict[str, Any]], None],
    ) -> None:
        self.folder, self.settings, self.data, self.sizes = folder, settings, describe(data), sizes
        self.entry, self.on_batch, self.on_epoch = entry, on_batch, on_epoch
        self.began = 0.0
        self.first = 0
        if not process_rank():
            self._settle()

    def _settle(self) -> None:
        """Write the settings of a new folder; compare those and the images of one that holds an epoch."""
        mine = asdict(self.settings)
        if not self.checkpoint.exists() and not (self.folder / "history.json").exists():
            # Settings that were refused, or failed in the first epoch, must not bind those that mend them.
            for name in ("settings.json", "run.json"):
                (self.folder / name).unlink(missing_ok=True)
        stored = _read(self.folder / "settings.json", lambda found: asdict(type(self.settings)(**found)))
        if stored is None:
            write_atomically(self.folder / "settings.json", json.dumps(mine, indent=2) + "\n")
            return
        where = f"out={str(self.folder)!r}"
        differ = [f"{name}={stored[name]!r} (here {mine[name]!r})" for name in mine if mine[name] != stored[name]]
        if differ:
            raise ValueError(f"{where}: holds a run with {', '.join(differ)}: choose another folder")
        digest = _read(self.folder / "run.json", lambda found: found["data"]["sha256"])
        if digest not in (None, self.data["sha256"]):
            raise ValueError(f"{where}: holds a run on other images than data={mine['data']!r} has now")

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Write what the run is made of."""
        path = self.folder / "run.json"
        if trainer.is_global_zero and not path.exists():
            facts = {"versions": versions(), "data": self.data, **self.sizes(module)}
            write_atomically(path, json.dumps(facts, indent=2) + "\n")

    @property
    def checkpoint(self) -> Path:
        """The last finished epoch's checkpoint."""
        return self.folder / "checkpoint.pt"

    def resume(self) -> dict[str, Any]:
        """Return what ``Trainer.fit`` needs to go on, and remember the first epoch to come.

        Raises:
            ValueError: the checkpoint is damaged.
        """
        if not self.checkpoint.exists():
            return {}
        try:
            self.first = torch.load(self.checkpoint, map_location="cpu", weights_only=True)["epoch"] + 1
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.checkpoint}: damaged; remove it to begin anew, or choose another folder"
            ) from error
        return {"ckpt_path": str(self.checkpoint), "weights_only": True}

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Seed what an epoch draws from: nothing of a random state needs to be kept."""
        torch.manual_seed(1_000_003 * self.settings.seed + trainer.current_epoch + (trainer.global_rank << 40))
        self.began = time.monotonic()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Let a terminated run end with the status of one; Lightning's would say that it has finished."""
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + signal.SIGTERM

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        """Say that a batch is done."""
        self.on_batch()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Write the history, then the checkpoint: what is killed between them repeats an epoch and its entry.

        Raises:
            FloatingPointError: the last step, whose loss was finite, left weights that are not.
        """
        if not all(parameter.isfinite().all() for parameter in module.parameters()):
            raise FloatingPointError(f"weights after epoch {trainer.current_epoch + 1}: must be finite; {ADVICE}")
        metrics = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        entry = {
            "epoch": trainer.current_epoch,
            **self.entry(module, metrics),
            "seconds": round(time.monotonic() - self.began, 2),
            "resumed": 0 < self.first == trainer.current_epoch,
        }
        if trainer.is_global_zero:
            history = [e for e in read_history(self.folder) if e["epoch"] < entry["epoch"]]
            write_atomically(self.folder / "history.json", json.dumps([*history, entry]))
        self._save_checkpoint(trainer)
        if trainer.is_global_zero:
            self.on_epoch(entry)

    def _save_checkpoint(self, trainer: Any) -> None:
        """Write Lightning's checkpoint, which all processes take part in, sync and rename it."""
        temporary = self.checkpoint.with_name(f".{self.checkpoint.name}.tmp")
        try:
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, self.checkpoint)
        finally:
            if trainer.is_global_zero:
                temporary.unlink(missing_ok=True)


def trainer_options(run: RunFolder, epochs: int, accelerator: str, devices: int) -> dict[str, Any]:
    """Return the arguments of Lightning's Trainer that a run in a folder needs.

    Args:
        run: the run's callback.
        epochs: number of epochs.
        accelerator: Lightning's.
        devices: number of processes.
    """
    return dict(
        max_epochs=epochs,
        accelerator=accelerator,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=[run],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(run.folder),
    )
