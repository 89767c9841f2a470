"""Results as CSV: whole rows, written by several processes, each saying what made it."""

from __future__ import annotations

import csv
import fcntl
import io
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from optinspired_plugins._files import write_atomically

__all__ = ["RESULTS", "add_rows", "find", "provenance", "read_rows", "require"]

RESULTS = Path("runs") / "reproduce" / "results"
Row = Mapping[str, Any]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file, none where there is no file.

    Raises:
        ValueError: a row has not the fields of the first line.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"{path}, row {line - 1}: has not the fields of the first line")
    return rows


def _values(row: Row, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in names)


def find(path: Path, wanted: Row) -> dict[str, str] | None:
    """Return the first row that has the wanted values."""
    values = _values(wanted, wanted)
    return next((row for row in read_rows(path) if _values(row, wanted) == values), None)


def require(path: Path, shared: Row) -> None:
    """Check that all rows of a file have the values that its rows share.

    Raises:
        ValueError: a row has another.
    """
    for row in read_rows(path):
        for name, value in shared.items():
            if row.get(name) != str(value):
                raise ValueError(f"{path}: has rows of {name}={row.get(name)}, must be another folder for {value}")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process changes the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def add_rows(path: Path, rows: Sequence[Row], key: Sequence[str]) -> None:
    """Add rows in the place of those with the same values of ``key``; the file is its old or its new version.

    Raises:
        ValueError: the file has rows of other fields.
    """
    with _alone(path):
        replaced = {_values(row, key) for row in rows}
        kept: list[Row] = [old for old in read_rows(path) if _values(old, key) not in replaced]
        if kept and list(kept[0]) != list(rows[0]):
            raise ValueError(f"{path}: has rows of other fields than {', '.join(rows[0])}: choose another file")
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])
        write_atomically(path, text.getvalue())


def provenance(command: str, device: torch.device) -> dict[str, str]:
    """Return what a figure depends on beside its settings: device, threads, versions and the command."""
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    cores = dict(device=model, threads=str(torch.get_num_threads()), cores=str(os.cpu_count()))
    return {**cores, **{name: version(name) for name in ("torch", "timm")}, "command": command}
