"""Results as CSV rows, added by several processes."""

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
from optinspired_plugins.run_folder import lock_file

__all__ = ["RESULTS", "add_rows", "find", "provenance", "read_rows", "require"]

RESULTS = Path("runs") / "reproduce" / "results"
Row = Mapping[str, Any]


class _Row(dict[str, str]):
    """A row of a file; a field that it lacks, as in files of earlier versions, is an error that names the file."""

    def __init__(self, values: Mapping[str, str], path: Path) -> None:
        super().__init__(values)
        self.path = path

    def __missing__(self, name: str) -> str:
        raise ValueError(f"{printable(self.path)}: has no field {name!r}, which files of this version have")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file; an absent file has none.

    Raises:
        ValueError: the file is not a table, or a field is read that it lacks; the message names the file.
    """
    return [_Row(row, path) for row in read_table(path).values()] if path.exists() else []


def _values(row: Row, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in names)


def find(path: Path, key: Row) -> dict[str, str] | None:
    """Return the first row with the values of ``key``.

    Raises:
        ValueError: the file lacks a field of ``key``.
    """
    values = _values(key, key)
    return next((row for row in read_rows(path) if _values(row, key) == values), None)


def require(path: Path, shared: Row) -> None:
    """Check that all rows of a file have the shared values.

    Raises:
        ValueError: a row has another value.
    """
    for row in read_rows(path):
        for name, value in shared.items():
            if row.get(name) != str(value):
                actual = str(row.get(name))[:80]
                raise ValueError(f"{printable(path)}: has rows of {name}={actual}, must be another folder for {value}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for the lock of a file; remove temporary files."""
    with lock_file(path.with_name(f".{path.name}.lock"), wait=True):
        clear_temporaries(path.parent, [path.name])
        yield


def add_rows(path: Path, rows: Sequence[Row], key: Sequence[str]) -> None:
    """Add rows, replacing rows with the same values of ``key``.

    A kill leaves either the old or the new version of the file. The columns keep the order of the file.

    Raises:
        ValueError: the file has rows of other fields.
    """
    with _locked(path):
        old_rows, new_keys = read_rows(path), {_values(row, key) for row in rows}
        others: list[Row] = [row for row in old_rows if _values(row, key) not in new_keys]
        names = list((others or rows)[0])
        if set(names) != set(rows[0]):
            raise ValueError(f"{path}: has rows of other fields than {', '.join(rows[0])}: choose another file")
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*others, *rows])
        write_atomically(path, text.getvalue())


def provenance(command: str, device: torch.device) -> dict[str, str]:
    """Return device, threads, versions and the command of a run."""
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    cores = dict(device=model, threads=str(torch.get_num_threads()), cores=str(os.cpu_count()))
    return {**cores, **{name: version(name) for name in ("torch", "timm")}, "command": command}
