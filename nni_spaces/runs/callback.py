"""The folder of a run, which survives being killed: searches and retrainings keep their state in one alike.

It holds ``settings.json``, ``run.json`` (versions, the images' hash, sizes), ``checkpoint.pt`` of the last finished
epoch and ``history.json``, an entry each epoch (:mod:`optinspired_plugins.run_folder`). Every file is either its
old or its new version, and what a folder holds in which no epoch has finished does not count. What is random
is a function of seed, epoch and process, so a run that is resumed gives what an uninterrupted one gives, to the bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException

from optinspired_plugins._checks import check_int, short
from optinspired_plugins._files import clear_temporaries, printable, write_atomically
from optinspired_plugins._locks import held
from optinspired_plugins.run_folder import Execution, digest_of, read_history, read_images_hash, read_settings

from .checkpoints import SealedCheckpoints, damaged, not_finite, read_checkpoint
from .data import ImageSet, process_rank

__all__ = ["RunFolder", "describe", "finite", "locked", "read_history", "resolve_devices", "trainer_options"]

ADVICE = "lower lr or clip more"
PACKAGES = ("torch", "nni", "pytorch-lightning", "timm", "numpy")
# What a run writes into its folder.
FILES = (
    "settings.json",
    "run.json",
    "history.json",
    "checkpoint.pt",
    "genotype.json",
    "model.safetensors",
    "trials.json",
)


def resolve_devices(devices: int | None) -> int:
    """Return the number of processes that share a run.

    Args:
        devices: the number; ``None`` for as many as ``torchrun`` or the like has started, which ``WORLD_SIZE`` in the
            environment says, and one without it.

    Raises:
        ValueError: the number is none, or not how many there are: each process alone would write the same folder.
    """
    stated = os.environ.get("WORLD_SIZE")
    if stated is not None and not (stated.isascii() and stated.isdecimal() and int(stated)):
        raise ValueError(f"WORLD_SIZE={short(stated)}: must be an integer ≥ 1")
    world = None if stated is None else int(stated)
    if devices is None:
        devices = world or 1
    check_int("devices", devices, 1)
    if world not in (None, devices):
        raise ValueError(f"devices={devices}: must be {world}, the number of processes by WORLD_SIZE, or start one")
    if process_rank() >= devices:
        raise ValueError(f"devices={devices}: must be above the number of this process, RANK={process_rank()}")
    return devices


@contextmanager
def locked(folder: Path, devices: int = 1) -> Iterator[None]:
    """Hold the folder for this process; the system frees it however the process ends.

    Of a distributed run, the first process holds it for all. What a kill left of a file is removed.

    Args:
        folder: the folder of the run.
        devices: the number of processes that share it.

    Raises:
        RuntimeError: another process holds it.
        NotImplementedError: the system has no record locks, as Windows.
        ValueError: other processes than ``devices`` are running; ``.lock`` is no file.
        OSError: the folder cannot be written, or its file system has no locks.
    """
    resolve_devices(devices)
    if process_rank():
        folder.mkdir(parents=True, exist_ok=True)
        yield
        return
    with held(folder / ".lock"):
        clear_temporaries(folder, FILES)
        yield


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def describe(data: ImageSet) -> dict[str, Any]:
    """Return number and shape of the images, and a hash of all that a run takes from them."""
    count, channels, height, width = data.images.shape
    digest = hashlib.sha256(f"{data.images.dtype} {tuple(data.images.shape)} {data.classes}".encode())
    digest.update(data.images.numpy().tobytes())
    digest.update(data.labels.numpy().tobytes())
    shape = dict(channels=channels, height=height, width=width)
    return dict(images=count, classes=data.classes, **shape, sha256=digest.hexdigest())


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
        settings: a dataclass of plain values, with ``seed``, ``epochs`` and ``data``.
        data: the training images.
        sizes: makes more facts for ``run.json`` of the module.
        entry: makes an entry of the history of the module and the epoch's metrics.
        on_batch: called after every batch.
        on_epoch: called with every entry of the history.
        execution: how it is computed; ``None`` for the default.

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
        execution: Execution | None = None,
    ) -> None:
        self.folder, self.settings, self.data, self.sizes = folder, settings, describe(data), sizes
        self.entry, self.on_batch, self.on_epoch = entry, on_batch, on_epoch
        # As a file gives them back.
        self.mine = json.loads(json.dumps(asdict(settings) | asdict(execution or Execution())))
        self.history_digest = ""
        self.shapes: dict[str, Any] = {}
        self.began = 0.0
        self.first = 0
        # Of a folder of an older version, neither execution nor digests are known.
        self.is_of_older_version = False
        if not process_rank():
            self._settle()

    def _settle(self) -> None:
        """Compare the settings and the images of a folder that holds an epoch."""
        path, about = self.folder / "settings.json", self.folder / "run.json"
        # Read also where nothing has finished: a file of another program must not be overwritten.
        digest = read_images_hash(about) if about.exists() else None
        if path.exists():
            stored, has_execution = read_settings(path, type(self.settings))
            self.is_of_older_version = not has_execution
            if self.checkpoint.exists():
                self._compare(stored, digest)

    def _compare(self, stored: Mapping[str, Any], digest: str | None) -> None:
        """ValueError unless settings, as far as they are stored, and images are this run's."""
        where, mine = f"out={str(self.folder)!r}", self.mine
        # Images may be moved: where their hash is known, it decides and not their name.
        compared = [name for name in stored if name != "data" or digest is None]
        differ = [
            f"{name}={stored[name]!r} (here {mine.get(name)!r})" for name in compared if mine.get(name) != stored[name]
        ]
        if differ:
            raise ValueError(f"{where}: holds a run with {printable(', '.join(differ))}: choose another folder")
        if digest not in (None, self.data["sha256"]):
            raise ValueError(f"{where}: holds a run on other images than data={mine['data']!r} has now")

    def _write(self, name: str, content: Any) -> None:
        write_atomically(self.folder / name, json.dumps(content, indent=2) + "\n")

    @property
    def checkpoint(self) -> Path:
        """The last finished epoch's checkpoint."""
        return self.folder / "checkpoint.pt"

    def resume(self) -> dict[str, Any]:
        """Return what ``Trainer.fit`` needs to go on, and remember the first epoch to come.

        Raises:
            ValueError: checkpoint or history are damaged, or of another run.
        """
        history = [] if process_rank() else read_history(self.folder)
        if not self.checkpoint.exists():
            if len(history) > 1:
                known = f"history.json has {len(history)} epochs: must be there, or remove history.json to begin anew"
                raise ValueError(f"{printable(self.checkpoint)}: is missing, and {known}")
            return {}
        found, sealed = read_checkpoint(self.checkpoint)
        if not process_rank():
            self._check_checkpoint(found, sealed, history)
            if not self.is_of_older_version:
                self._write("settings.json", self.mine)  # says where the images are now
        self.first = found["epoch"] + 1
        self.shapes = {name: tuple(value.shape) for name, value in found["state_dict"].items()}
        return {"ckpt_path": str(self.checkpoint), "weights_only": True}

    def _check_checkpoint(self, found: Mapping[str, Any], sealed: bool, history: list[dict[str, Any]]) -> None:
        """ValueError unless a checkpoint is this run's, and the history is the one that it was written with."""
        record, done = _record(found["callbacks"].get(self.state_key)), found["epoch"] + 1
        if not 0 < done <= self.settings.epochs:
            raise damaged(self.checkpoint, f"epoch={done - 1}: must be below epochs={self.settings.epochs}")
        if not self.is_of_older_version and not (sealed and record):
            raise damaged(self.checkpoint, f"has no {'record of its run' if sealed else 'digest'}")
        if record:
            self._compare(record["settings"], record["images"])
        where = printable(self.folder / "history.json")
        if not done <= len(history) <= done + 1:
            raise ValueError(f"{where}: has {len(history)} epochs: must have the {done} of checkpoint.pt")
        if record and record["history"] != digest_of(history[:done]):
            raise ValueError(f"{where}: its entries 0 to {done - 1} are not those of checkpoint.pt, was changed")

    def state_dict(self) -> dict[str, Any]:
        """Return what binds a checkpoint to its run; Lightning puts it in there. Images go by their hash."""
        settings = {name: value for name, value in self.mine.items() if name != "data"}
        return {"settings": settings, "images": self.data["sha256"], "history": self.history_digest}

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """ValueError unless the checkpoint holds the module's state; Lightning would fail in many lines."""
        expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        wrong = [name for name in {**self.shapes, **expected} if self.shapes.get(name) != expected.get(name)]
        if self.first and wrong:
            found, needed = (self.shapes.get(wrong[0]), expected.get(wrong[0]))
            raise damaged(self.checkpoint, f"state_dict, {short(wrong[0])}: has {found}, must have {needed}")

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Write what the run is made of, in the place of what a run left that has finished no epoch."""
        if not trainer.is_global_zero:
            return
        if not self.first:
            (self.folder / "history.json").unlink(missing_ok=True)
        facts = {"versions": versions(), "accelerator": trainer.strategy.root_device.type, "data": self.data}
        for name, content in (("settings.json", self.mine), ("run.json", {**facts, **self.sizes(module)})):
            if not self.first or not (self.folder / name).exists():
                self._write(name, content)

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
        if not_finite(module.state_dict()) is not None:
            raise FloatingPointError(f"weights after epoch {trainer.current_epoch + 1}: must be finite; {ADVICE}")
        metrics = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        entry = {
            "epoch": trainer.current_epoch,
            **self.entry(module, metrics),
            "seconds": round(time.monotonic() - self.began, 2),
            "resumed": 0 < self.first == trainer.current_epoch,
        }
        if trainer.is_global_zero:
            history = [*read_history(self.folder)[: entry["epoch"]], entry]
            self.history_digest = digest_of(history)
            write_atomically(self.folder / "history.json", json.dumps(history))
        # All processes take part.
        trainer.save_checkpoint(self.checkpoint)
        if trainer.is_global_zero:
            self.on_epoch(entry)


def _record(state: Any) -> dict[str, Any] | None:
    """Return what :meth:`RunFolder.state_dict` put into a checkpoint; ``None`` where it did not."""
    kinds = {"settings": dict, "images": str, "history": str}
    is_ours = isinstance(state, dict) and all(isinstance(state.get(name), kind) for name, kind in kinds.items())
    return state if is_ours else None


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
        plugins=[SealedCheckpoints()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(run.folder),
    )
