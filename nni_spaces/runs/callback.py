"""Lightning's callback that writes and resumes the folder of a search or a retraining.

The folder holds ``settings.json``, ``run.json`` (versions, hash of the images, sizes), ``checkpoint.pt`` of the last
finished epoch and ``history.json`` with one entry per epoch (:mod:`optinspired_plugins.run_folder`). Files are replaced
as a whole, so that a killed run leaves old or new versions only. A folder without a finished epoch can be used by any
run. Random numbers are functions of seed, epoch and process, so that a resumed run and an uninterrupted one give the
same result to the bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nni_spaces._nni  # noqa: F401

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning import loggers
from pytorch_lightning.utilities.exceptions import SIGTERMException

from optinspired_plugins._checks import check_one_of, short
from optinspired_plugins._files import printable, write_atomically
from optinspired_plugins.run_folder import (
    ABOUT,
    CHECKPOINT,
    HISTORY,
    SETTINGS,
    Execution,
    check_same_settings,
    digest_of,
    process_rank,
    read_history,
    read_images_hash,
    read_settings,
)

from .checkpoints import SealedCheckpoints, damaged_checkpoint, non_finite_name, read_checkpoint
from .data import ImageSet

__all__ = ["RunCallback", "check_finite", "describe_images", "make_logger", "own_metrics", "trainer_options"]

ADVICE = "lower lr or clip more"
PACKAGES = ("torch", "nni", "pytorch-lightning", "timm", "numpy")
LOGGERS: dict[str, Callable[[Path], Any]] = {
    "csv": lambda folder: loggers.CSVLogger(folder, name="logs"),
    "tensorboard": lambda folder: loggers.TensorBoardLogger(folder, name="logs"),
    "wandb": lambda folder: loggers.WandbLogger(name=folder.name, save_dir=folder),
}
# Arguments of Lightning's Trainer that have another place, or that a run in a folder decides.
DECIDED = {
    **dict(max_epochs="epochs of the settings", gradient_clip_val="gradient_clip of the settings"),
    **{name: f"{name} of the call" for name in ("accelerator", "devices", "precision")},
    **dict.fromkeys(("plugins", "use_distributed_sampler", "num_sanity_val_steps"), "the run"),
}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def describe_images(data: ImageSet) -> dict[str, Any]:
    """Return number, shape and classes of the images, and a hash of images and labels."""
    count, channels, height, width = data.images.shape
    digest = hashlib.sha256(f"{data.images.dtype} {tuple(data.images.shape)} {data.classes}".encode())
    digest.update(np.ascontiguousarray(data.images.numpy()).data)
    digest.update(data.labels.numpy().tobytes())
    shape = dict(channels=channels, height=height, width=width)
    return dict(images=count, classes=data.classes, **shape, sha256=digest.hexdigest())


def own_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the values of a user's own metric, of the metrics of an epoch."""
    return {name: value for name, value in metrics.items() if name.endswith("_metric")}


def check_finite(loss: torch.Tensor, where: str) -> torch.Tensor:
    """Return the loss if it is finite in every process.

    All processes stop together: a single one that stops would leave the others waiting.

    Args:
        loss: the loss of this process.
        where: epoch and step, for the message.

    Raises:
        FloatingPointError: the loss of a process is not finite.
    """
    worst = loss.detach().clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(worst)
    if not worst.isfinite():
        raise FloatingPointError(f"loss={loss.item()} in {where}: must be finite; {ADVICE}")
    return loss


class RunCallback(pl.Callback):
    """Check the folder, seed every epoch, and write history and checkpoint after it.

    Args:
        folder: the folder of the run, locked by this process.
        settings: a dataclass of plain values, with ``seed``, ``epochs`` and ``data``.
        data: the training images.
        sizes: returns more entries of ``run.json``, from the module.
        entry: returns an entry of the history, from the module and the metrics of the epoch.
        on_batch: called after every batch.
        on_epoch: called with every entry of the history.
        execution: processes and precision; ``None`` for the default.

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
        self.folder, self.settings, self.data, self.sizes = folder, settings, describe_images(data), sizes
        self.entry, self.on_batch, self.on_epoch = entry, on_batch, on_epoch
        # as JSON returns them
        self.recorded = json.loads(json.dumps(asdict(settings) | asdict(execution or Execution())))
        self.history_digest = ""
        self.shapes: dict[str, Any] = {}
        self.start_time = 0.0
        self.first_epoch = 0
        if not process_rank():
            self._check_folder()

    def _check_folder(self) -> None:
        """ValueError unless a folder with a finished epoch has the settings and images of this run."""
        path, about = self.folder / SETTINGS, self.folder / ABOUT
        # Also read without a finished epoch: a file of another program must not be overwritten.
        digest = read_images_hash(about) if about.exists() else None
        if path.exists():
            stored = read_settings(path, type(self.settings))
            if self.checkpoint.exists():
                self._compare(stored, digest)

    def _compare(self, stored: Mapping[str, Any], digest: str | None) -> None:
        """ValueError unless stored settings and images are equal to this run's."""
        # Images may be moved: where their hash is recorded, it is compared instead of their name.
        compared = {name: value for name, value in stored.items() if name != "data" or digest is None}
        epochs = stored.get("epochs")
        more = isinstance(epochs, int) and epochs < self.recorded["epochs"]
        advice = f", with start_from={str(self.folder)!r} for more epochs" if more else ""
        check_same_settings(self.folder, "a run", compared, self.recorded, advice)
        if digest not in (None, self.data["sha256"]):
            raise ValueError(
                f"out={str(self.folder)!r}: holds a run on other images than data={self.recorded['data']!r} has now"
            )

    def _write(self, name: str, content: Any) -> None:
        write_atomically(self.folder / name, json.dumps(content, indent=2) + "\n")

    @property
    def checkpoint(self) -> Path:
        """Path of the checkpoint of the last finished epoch."""
        return self.folder / CHECKPOINT

    def resume(self) -> dict[str, Any]:
        """Return the arguments of ``Trainer.fit`` that resume the run, and set ``first_epoch``.

        Raises:
            ValueError: checkpoint or history are damaged, or belong to another run.
        """
        history = [] if process_rank() else read_history(self.folder)
        if not self.checkpoint.exists():
            if len(history) > 1:
                advice = "must be there, or remove history.json to begin anew"
                raise ValueError(
                    f"{printable(self.checkpoint)}: is missing, and history.json has {len(history)} epochs: {advice}"
                )
            return {}
        state = read_checkpoint(self.checkpoint)
        if not process_rank():
            self._check_checkpoint(state, history)
            self._write(SETTINGS, self.recorded)  # with the present place of the images
        self.first_epoch = state["epoch"] + 1
        self.shapes = {name: tuple(value.shape) for name, value in state["state_dict"].items()}
        return {"ckpt_path": str(self.checkpoint), "weights_only": True}

    def _check_checkpoint(self, state: Mapping[str, Any], history: list[dict[str, Any]]) -> None:
        """ValueError unless checkpoint and history belong to this run and to each other."""
        record, done = _record(state["callbacks"].get(self.state_key)), state["epoch"] + 1
        if not 0 < done <= self.settings.epochs:
            raise damaged_checkpoint(self.checkpoint, f"epoch={done - 1}: must be below epochs={self.settings.epochs}")
        if record is None:
            raise damaged_checkpoint(self.checkpoint, "has no record of its run")
        self._compare(record["settings"], record["images"])
        where = printable(self.folder / HISTORY)
        if not done <= len(history) <= done + 1:
            raise ValueError(f"{where}: has {len(history)} epochs: must have the {done} of checkpoint.pt")
        if record["history"] != digest_of(history[:done]):
            raise ValueError(f"{where}: entries 0 to {done - 1} differ from checkpoint.pt, so the file was changed")

    def state_dict(self) -> dict[str, Any]:
        """Return the record of the run, which Lightning stores in the checkpoint; images are recorded by their hash."""
        settings = {name: value for name, value in self.recorded.items() if name != "data"}
        return {"settings": settings, "images": self.data["sha256"], "history": self.history_digest}

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """ValueError in one line unless the checkpoint holds the module's state; Lightning's error has many."""
        expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        if self.first_epoch and (wrong := _difference(self.shapes, expected)):
            raise damaged_checkpoint(self.checkpoint, wrong)
        start_from = getattr(self.settings, "start_from", None)
        if not self.first_epoch and start_from is not None:
            _load_weights(module, Path(start_from) / CHECKPOINT, expected)

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Write settings and ``run.json``; files of a run without a finished epoch are replaced."""
        if not trainer.is_global_zero:
            return
        if not self.first_epoch:
            (self.folder / HISTORY).unlink(missing_ok=True)
        facts = {"versions": versions(), "accelerator": trainer.strategy.root_device.type, "data": self.data}
        for name, content in ((SETTINGS, self.recorded), (ABOUT, {**facts, **self.sizes(module)})):
            if not self.first_epoch or not (self.folder / name).exists():
                self._write(name, content)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Seed torch from seed, epoch and process, so that no random state needs to be saved."""
        torch.manual_seed(1_000_003 * self.settings.seed + trainer.current_epoch + (trainer.global_rank << 40))
        self.start_time = time.monotonic()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Set the exit status of a terminated run; Lightning's status is 0, as for a finished one."""
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + signal.SIGTERM

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        """Report a finished batch."""
        self.on_batch()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Write the history, then the checkpoint; a run that is killed between them repeats the epoch.

        Raises:
            FloatingPointError: weights are not finite after the last step.
        """
        if non_finite_name(module.state_dict()) is not None:
            raise FloatingPointError(f"weights after epoch {trainer.current_epoch + 1}: must be finite; {ADVICE}")
        metrics = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        entry = {
            "epoch": trainer.current_epoch,
            **self.entry(module, metrics),
            "seconds": round(time.monotonic() - self.start_time, 2),
            "resumed": 0 < self.first_epoch == trainer.current_epoch,
        }
        if trainer.is_global_zero:
            history = [*read_history(self.folder)[: entry["epoch"]], entry]
            self.history_digest = digest_of(history)
            write_atomically(self.folder / HISTORY, json.dumps(history))
        # called in all processes
        trainer.save_checkpoint(self.checkpoint)
        if trainer.is_global_zero:
            self.on_epoch(entry)


def _load_weights(module: Any, path: Path, expected: Mapping[str, Any]) -> None:
    """Load the weights of another run; ValueError if it has other ones or none."""
    where = f"start_from={str(path.parent)!r}"
    if not path.is_file():
        raise ValueError(f"{where}: must be the folder of a run with a finished epoch")
    state = read_checkpoint(path)["state_dict"]
    if wrong := _difference({name: tuple(value.shape) for name, value in state.items()}, expected):
        raise ValueError(f"{where}: must hold a run of the same network ({wrong})")
    module.load_state_dict(state)


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return the first difference of the shapes of two states, as text; empty if there is none."""
    wrong = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    if not wrong:
        return ""
    return f"state_dict, {short(wrong[0])}: has {found.get(wrong[0])}, must have {expected.get(wrong[0])}"


def _record(state: Any) -> dict[str, Any] | None:
    """Return the record of :meth:`RunCallback.state_dict` in a checkpoint, ``None`` if there is none."""
    kinds = {"settings": dict, "images": str, "history": str}
    is_record = isinstance(state, dict) and all(isinstance(state.get(name), kind) for name, kind in kinds.items())
    return state if is_record else None


def make_logger(name: str, folder: Path) -> Any:
    """Return one of Lightning's loggers for a run in a folder; files are in ``logs``, of W&B where that puts them.

    Args:
        name: ``"csv"``, ``"tensorboard"`` or ``"wandb"``.
        folder: the folder of the run.

    Raises:
        ValueError: the name is unknown.
        ModuleNotFoundError: the logger's package is not installed.
    """
    check_one_of("logger", name, tuple(LOGGERS))
    try:
        return LOGGERS[name](folder)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"logger={name!r}: needs the package {name}, which is not installed") from error


def trainer_options(
    run: RunCallback, epochs: int, accelerator: str, devices: int, further: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the arguments of Lightning's Trainer for a run in a folder.

    Args:
        run: the callback of the run.
        epochs: number of epochs.
        accelerator: Lightning's.
        devices: number of processes, on all machines together; ``torchrun`` says how many each machine has.
        further: other arguments; their callbacks come before the run's, whose checkpoint has their states.

    Raises:
        ValueError: ``further`` has an argument that the run decides.
    """
    further = further or {}
    for name in further:
        if name in DECIDED:
            raise ValueError(f"trainer has {name!r}: must not, {DECIDED[name]} decides it")
    callbacks = further.get("callbacks") or []
    callbacks = [callbacks] if isinstance(callbacks, pl.Callback) else callbacks
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", devices))
    options = dict(
        max_epochs=epochs,
        accelerator=accelerator,
        devices=per_machine,
        num_nodes=devices // per_machine,
        strategy="ddp" if devices > 1 else "auto",
        plugins=[SealedCheckpoints()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(run.folder),
    )
    return {**options, **further, "callbacks": [*callbacks, run]}
