"""The files of a run's folder: how they are read, checked and bound together.

Nothing that a folder holds is believed. What is wrong with a file is a ValueError of one line that names file and
field. A checkpoint ends with its digest, and holds the settings, the images' hash and the history of its run.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from optinspired_plugins._checks import short
from optinspired_plugins._files import printable, read_file, read_json, write_atomically

__all__ = [
    "Execution",
    "SealedCheckpoints",
    "digest_of",
    "last_entry",
    "read_checkpoint",
    "read_history",
    "read_images_hash",
    "read_settings",
]

LIMIT_INTEGER = 2**63
# What Lightning needs to go on, and which type it must have.
CHECKPOINT = {
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "state_dict": dict,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
# A zip archive, as torch writes checkpoints, ends with this, 16 bytes, the length of a comment, and the comment.
END_OF_ARCHIVE = b"PK\x05\x06"
SEAL = re.compile(rb"sha256:[0-9a-f]{64}")
SEAL_BYTES = 71


@dataclass(frozen=True)
class Execution:
    """How a run is computed, as far as it changes the result; recorded with the settings.

    The defaults are those of folders in which nothing is recorded. The accelerator is none of them: as with versions,
    a run may go on elsewhere.
    """

    devices: int = 1
    precision: str = "32-true"


# --- settings and facts -----------------------------------------------------------------------------------------------


def _object(value: object, name: str = "content") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is a {type(value).__name__}: must be a JSON object")
    return value


def read_settings(path: Path, kind: type[Any]) -> tuple[dict[str, Any], bool]:
    """Read the settings of a run.

    Args:
        path: the file.
        kind: their dataclass; what the file does not name has its default.

    Returns:
        The settings and the :class:`Execution` as one dictionary, and whether the file names the latter.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no such settings.
    """

    def check(value: Any) -> tuple[dict[str, Any], bool]:
        found, hints = _object(value), get_type_hints(kind) | get_type_hints(Execution)
        for name, item in found.items():
            if name not in hints:
                raise ValueError(f"{short(name)}: must be one of {', '.join(hints)}")
            if not _fits(item, hints[name]):
                raise ValueError(f"{name}={short(item)}: must be of type {_type_name(hints[name])}")
        missing = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING and f.name not in found]
        if missing:
            raise ValueError(f"{missing[0]}: is missing")
        execution = {name: found[name] for name in asdict(Execution()) if name in found}
        settings = kind(**{name: item for name, item in found.items() if name not in execution})
        return asdict(settings) | asdict(Execution(**execution)), len(execution) == len(fields(Execution))

    return read_json(path, check, "the settings of such a run")


def _fits(value: object, hint: Any) -> bool:
    """Whether a value of JSON is of an annotation's type, and of a size that a run can have."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Any:
        return True
    if kind in (int, float):
        allowed = (int,) if kind is int else (int, float)
        return type(value) in allowed and -LIMIT_INTEGER < value < LIMIT_INTEGER  # type: ignore[operator]
    if kind in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
    if kind is Sequence:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    return isinstance(value, kind)


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("collections.abc.", "").replace("typing.", "")


def read_images_hash(path: Path) -> str:
    """Return the hash of the images that ``run.json`` holds.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds none.
    """

    def check(value: Any) -> str:
        found = _object(_object(value).get("data"), "data").get("sha256")
        if not isinstance(found, str) or not re.fullmatch("[0-9a-f]{64}", found):
            raise ValueError(f"data.sha256={short(found)}: must be 64 hexadecimal digits")
        return found

    return read_json(path, check, "the run of such a run")


# --- history ----------------------------------------------------------------------------------------------------------


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Read the epochs so far, none where there is no file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged.
    """
    path = folder / "history.json"
    return read_json(path, _history, "the history of such a run") if path.exists() else []


def _history(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise ValueError(f"content is a {type(value).__name__}: must be a list of epochs")
    for i, item in enumerate(value):
        entry = _object(item, f"entry {i}")
        if type(entry.get("epoch")) is not int or entry["epoch"] != i:
            raise ValueError(f"entry {i}, epoch={short(entry.get('epoch'))}: must be {i}")
        if not isinstance(entry.get("resumed"), bool):
            raise ValueError(f"entry {i}, resumed={short(entry.get('resumed'))}: must be true or false")
        for name, number in entry.items():
            if name.endswith(("seconds", "_loss", "_top1", "_error", "lr", "_rate")) and not _is_measure(name, number):
                raise ValueError(f"entry {i}, {short(name)}={short(number)}: must be a number ≥ 0")
        if "seconds" not in entry:
            raise ValueError(f"entry {i}, seconds: is missing")
    return value


def _is_measure(name: str, value: object) -> bool:
    if value is None:  # α has no batches while it stands still
        return name != "seconds"
    if type(value) is not float and not (type(value) is int and value < LIMIT_INTEGER):
        return False
    if name.endswith("_loss"):  # of test images, which stops no training, it may be anything
        return not value < 0
    return 0 <= value <= (100.0001 if name.endswith(("_top1", "_error")) else LIMIT_INTEGER)


def last_entry(folder: Path, name: str) -> Any:
    """Return a field of the last epoch.

    Raises:
        OSError: the history cannot be read.
        ValueError: it is damaged, or has no such field.
    """
    history = read_history(folder)
    if not history or history[-1].get(name) is None:
        raise ValueError(f"{printable(folder / 'history.json')}: has no {name} of a last epoch")
    return history[-1][name]


def digest_of(history: Sequence[Mapping[str, Any]]) -> str:
    """Return a hash of what epochs were, without the times that they took."""
    lasting = [{k: v for k, v in entry.items() if k not in ("seconds", "resumed")} for entry in history]
    return hashlib.sha256(json.dumps(lasting).encode()).hexdigest()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def seal(archive: bytes) -> bytes:
    """Return a zip archive with its SHA-256 as its comment, so that no kill can part them.

    Raises:
        ValueError: it is no zip archive.
    """
    body = archive[: archive.rindex(END_OF_ARCHIVE) + 20]
    comment = b"sha256:" + hashlib.sha256(body).hexdigest().encode()
    return body + len(comment).to_bytes(2, "little") + comment


def _is_sealed(archive: bytes) -> bool:
    """Whether an archive has a digest.

    Raises:
        ValueError: it is another's.
    """
    if not SEAL.fullmatch(archive, max(0, len(archive) - SEAL_BYTES)):
        return False
    if seal(archive[: -SEAL_BYTES - 2] + bytes(2)) != archive:
        raise ValueError("its digest is that of another content")
    return True


def read_checkpoint(path: Path) -> tuple[dict[str, Any], bool]:
    """Return a checkpoint, and whether it has a digest, as those of older versions have not.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged; its weights are not finite.
    """
    content = read_file(path, limit=None)
    try:
        sealed = _is_sealed(content)
        found = _unpickled(content)
        for name, kind in CHECKPOINT.items():
            if not isinstance(found.get(name), kind) or isinstance(found[name], bool):
                raise ValueError(f"{name} is a {type(found.get(name)).__name__}: must be a {kind.__name__}")
        for name, value in found["state_dict"].items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"state_dict, {short(name)}: is a {type(value).__name__}, must be a tensor")
        wrong = not_finite(found["state_dict"])
        if wrong is not None:
            raise ValueError(f"state_dict, {short(wrong)}: must be finite")
    except ValueError as error:
        raise damaged(path, str(error)) from None
    return found, sealed


def damaged(path: Path, why: str) -> ValueError:
    """Return the error of a checkpoint that cannot be used, with the ways out."""
    ways = "damaged; remove it to begin anew, and history.json with it, or choose another folder"
    return ValueError(f"{printable(path)}: {ways} ({printable(why)})")


def _unpickled(content: bytes) -> dict[str, Any]:
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # there is no end to the ways in which a damaged pickle fails
        raise ValueError(f"{type(error).__name__} when it is read") from None
    if not isinstance(found, dict):
        raise ValueError(f"is a {type(found).__name__}: must be a dict")
    return found


def not_finite(state: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of a weight or statistic that is not finite, ``None`` where all are."""
    return next((name for name, value in state.items() if not value.isfinite().all()), None)


class SealedCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, written whole or not at all, with a digest that is checked when they are read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        archive = io.BytesIO()
        torch.save(checkpoint, archive)
        write_atomically(Path(path), seal(archive.getvalue()))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, to the CPU and without objects, whatever the arguments say."""
        return read_checkpoint(Path(path))[0]
