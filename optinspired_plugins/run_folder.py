"""The files of a run's folder: how they are read, checked and bound together.

Nothing that a folder holds is believed. What is wrong with a file is a ValueError of one line that names file and
field. A checkpoint ends with its digest, and holds the settings, the images' hash and the history of its run.
"""

from __future__ import annotations

import hashlib
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from ._checks import short
from ._files import printable, read_json

__all__ = [
    "Execution",
    "digest_of",
    "last_entry",
    "read_history",
    "read_images_hash",
    "read_settings",
]

LIMIT_INTEGER = 2**63


@dataclass(frozen=True)
class Execution:
    """How a run is computed, as far as it changes the result; recorded with the settings.

    The defaults are those of folders in which nothing is recorded. The accelerator is none of them: as with versions,
    a run may go on elsewhere.
    """

    devices: int = 1
    precision: str = "32-true"


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
