"""Results as CSV: whole rows, written by several processes, each saying what made it."""

from __future__ import annotations

import csv
import io
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from optinspired_plugins._files import clear_temporaries, printable, read_table, write_atomically
from optinspired_plugins._locks import held

__all__ = ["RESULTS", "add_rows", "find", "provenance", "read_rows", "require"]

RESULTS = Path("runs") / "reproduce" / "results"
Row = Mapping[str, Any]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file, none where there is no file.

    Raises:
        ValueError: the file is no such table; the message names file and line.
    """
    return list(read_table(path).values()) if path.exists() else []


def _values(row: Row, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in names)


def find(path: Path, wanted: Row) -> dict[str, str] | None:
    """Return the first row that has the wanted values.

    Raises:
        ValueError: the file has not their fields.
    """
    rows, values = read_rows(path), _values(wanted, wanted)
    _check_fields(path, rows, wanted)
    return next((row for row in rows if _values(row, wanted) == values), None)


def _check_fields(path: Path, rows: Sequence[Row], names: Iterable[str]) -> None:
    missing = [name for name in names if rows and name not in rows[0]]
    if missing:
        raise ValueError(f"{printable(path)}: has no field {missing[0]!r}, must have {', '.join(names)}")


def require(path: Path, shared: Row) -> None:
    """Check that all rows of a file have the values that its rows share.

    Raises:
        ValueError: a row has another.
    """
    for row in read_rows(path):
        for name, value in shared.items():
            if row.get(name) != str(value):
                where, found = printable(path), str(row.get(name))[:80]
                raise ValueError(f"{where}: has rows of {name}={found}, must be another folder for {value}")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process changes the file, and remove what a kill left of it."""
    with held(path.with_name(f".{path.name}.lock"), wait=True):
        clear_temporaries(path.parent, [path.name])
        yield


def add_rows(path: Path, rows: Sequence[Row], key: Sequence[str]) -> None:
    """Add rows in the place of those with the same values of ``key``; the file is its old or its new version.

    Raises:
        ValueError: the file has rows of other fields.
    """
    with _alone(path):
        found, replaced = read_rows(path), {_values(row, key) for row in rows}
        _check_fields(path, found, key)
        kept: list[Row] = [old for old in found if _values(old, key) not in replaced]
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
