"""The folder of a run: the names of its files, its lock, and how its files are read and compared.

Searches, retrainings, trials, reports and tables share this module, which needs the standard library only. The content
of a folder is not trusted: a wrong file raises a ValueError of one line that names the file and the field.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import stat
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from ._checks import check_int, short
from ._files import clear_temporaries, printable, read_json

__all__ = [
    "ABOUT",
    "CHECKPOINT",
    "GENOTYPE",
    "HISTORY",
    "SETTINGS",
    "TRIALS",
    "WEIGHTS",
    "Execution",
    "check_same_settings",
    "digest_of",
    "json_object",
    "last_entry",
    "lock_file",
    "lock_folder",
    "process_rank",
    "read_history",
    "read_images_hash",
    "read_settings",
    "resolve_devices",
]

SETTINGS, ABOUT, HISTORY, CHECKPOINT = "settings.json", "run.json", "history.json", "checkpoint.pt"
GENOTYPE, WEIGHTS, TRIALS = "genotype.json", "model.safetensors", "trials.json"
LOCK = ".lock"
LIMIT_INTEGER = 2**63


@dataclass(frozen=True)
class Execution:
    """The part of a run's execution that changes its result; recorded with the settings.

    The accelerator is no part of it: like the versions, it may change when a run is resumed.
    """

    devices: int = 1
    precision: str = "32-true"


# --- processes and locks ----------------------------------------------------------------------------------------------


def process_rank() -> int:
    """Return the number of this process in a distributed run, 0 outside of one; torch need not know it yet."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def resolve_devices(devices: int | None) -> int:
    """Return the number of processes that share a run.

    Args:
        devices: the number; ``None`` for ``WORLD_SIZE`` of the environment, which ``torchrun`` sets, or 1 without it.

    Raises:
        ValueError: the number is out of range, or differs from ``WORLD_SIZE``: each process would write the folder.
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
def lock_folder(folder: Path, devices: int = 1) -> Iterator[None]:
    """Lock the folder for this run; the system frees it however the process ends.

    In a distributed run the first process locks it for all. Temporary files of a killed run are removed.

    Args:
        folder: the folder of the run.
        devices: the number of processes that share it.

    Raises:
        RuntimeError: another process has locked it.
        NotImplementedError: the system has no record locks, for instance Windows.
        ValueError: the number of running processes is not ``devices``; ``.lock`` is not a regular file.
        OSError: the folder cannot be written, or its file system has no locks.
    """
    resolve_devices(devices)
    if process_rank():
        folder.mkdir(parents=True, exist_ok=True)
        yield
        return
    with lock_file(folder / LOCK):
        clear_temporaries(folder, (SETTINGS, ABOUT, HISTORY, CHECKPOINT, GENOTYPE, WEIGHTS, TRIALS))
        yield


@contextmanager
def lock_file(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock file, which is created with its folder if needed; nothing is written to it.

    Args:
        path: the file.
        wait: wait until no other process holds it.

    Raises:
        RuntimeError: another process holds it, and ``wait`` is false.
        NotImplementedError: the system has no record locks, for instance Windows.
        ValueError: the file is a link, a pipe or another special file.
        OSError: the file system has no locks, or the folder cannot be written; the message names it.
    """
    where = f"out={str(path.parent)!r}"
    try:
        import fcntl
    except ImportError:
        raise NotImplementedError(
            f"{where}: a run locks its folder by fcntl, which {platform.system()} does not have: must be a Unix"
        ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _open(path)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{printable(path)}: must be a regular file")
        try:
            # Not flock: forked loader processes would share that lock, and outlive a killed run for a moment.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            raise RuntimeError(f"{where}: another process is running there") from None
        except OSError as error:
            raise OSError(
                error.errno,
                f"{where}: its file system does not lock files ({error.strerror}): must be a folder on one that does, "
                "as a local disk",
            ) from None
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open a lock file without emptying it, following a link, or waiting for a pipe."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{printable(path)}: is a link: must be a regular file") from None
        raise


# --- settings ---------------------------------------------------------------------------------------------------------


def json_object(value: object, name: str = "content") -> dict[str, Any]:
    """Return a JSON object; ValueError where the value is none."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} is a {type(value).__name__}: must be a JSON object")
    return value


def check_same_settings(
    folder: Path, holds: str, stored: Mapping[str, Any], settings: Mapping[str, Any], advice: str = ""
) -> None:
    """ValueError where a folder holds a run of other settings.

    Args:
        folder: the folder.
        holds: what it holds, for the message: ``"a run"``.
        stored: the settings in the folder, as far as they are compared.
        settings: the settings of the run that begins here.
        advice: the end of the message.
    """
    different = [
        f"{name}={value!r} (here {settings.get(name)!r})"
        for name, value in stored.items()
        if value != settings.get(name)
    ]
    if different:
        found = printable(", ".join(different))
        raise ValueError(f"out={str(folder)!r}: holds {holds} with {found}: choose another folder{advice}")


def read_settings(path: Path, kind: type[Any]) -> dict[str, Any]:
    """Read the settings of a run together with its :class:`Execution`.

    Args:
        path: the file.
        kind: the dataclass of the settings; a setting that the file does not name has its default.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds other fields, or values of other types or out of range.
    """

    def check(value: Any) -> dict[str, Any]:
        content, hints = json_object(value), get_type_hints(kind) | get_type_hints(Execution)
        for name, item in content.items():
            if name not in hints:
                raise ValueError(f"{short(name)}: must be one of {', '.join(hints)}")
            if not _fits(item, hints[name]):
                raise ValueError(f"{name}={short(item)}: must be of type {_type_name(hints[name])}")
        missing = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING and f.name not in content]
        if missing:
            raise ValueError(f"{missing[0]}: is missing")
        execution = {name: content.pop(name) for name in asdict(Execution()) if name in content}
        return asdict(kind(**content)) | asdict(Execution(**execution))

    return read_json(path, check, "the settings of such a run")


def _fits(value: object, hint: Any) -> bool:
    """Return True if a JSON value has the type of an annotation, and an integer a size that a run can have."""
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
    """Return the hash of the images in ``run.json``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no hash.
    """

    def check(value: Any) -> str:
        digest = json_object(json_object(value).get("data"), "data").get("sha256")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"data.sha256={short(digest)}: must be 64 hexadecimal digits")
        return digest

    return read_json(path, check, "the run of such a run")


# --- history ----------------------------------------------------------------------------------------------------------


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Read the finished epochs, none where there is no file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged.
    """
    path = folder / HISTORY
    return read_json(path, _history, "the history of such a run") if path.exists() else []


def _history(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise ValueError(f"content is a {type(value).__name__}: must be a list of epochs")
    for i, item in enumerate(value):
        entry = json_object(item, f"entry {i}")
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
    if name.endswith("_loss"):  # the loss on test images, which stops no training, may be infinite or NaN
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
        raise ValueError(f"{printable(folder / HISTORY)}: has no {name} of a last epoch")
    return history[-1][name]


def digest_of(history: Sequence[Mapping[str, Any]]) -> str:
    """Return a hash of a history without its times."""
    lasting = [{k: v for k, v in entry.items() if k not in ("seconds", "resumed")} for entry in history]
    return hashlib.sha256(json.dumps(lasting).encode()).hexdigest()
