"""Files: atomic writing, and reading of untrusted files.

An error of a reader is one line without control characters that names the file, for any content of the file.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ._checks import short

__all__ = [
    "clear_temporaries",
    "decode_json",
    "parse_json",
    "printable",
    "read_file",
    "read_json",
    "read_table",
    "write_atomically",
]

LIMIT_BYTES = 64_000_000
LIMIT_DEPTH = 64
LIMIT_MESSAGE = 1_000


# --- writing ----------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file under a temporary name in its folder, sync it, and rename it.

    Args:
        path: the file; its folder must exist.
        content: bytes, or text to be encoded as UTF-8.

    Raises:
        OSError: the disk is full or the folder cannot be written; an older file is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def clear_temporaries(folder: Path, names: Iterable[str]) -> None:
    """Remove temporary files of a killed :func:`write_atomically`.

    No other process may write these files at the same time.

    Raises:
        OSError: the folder cannot be read or written.
    """
    pattern = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.[0-9a-f]{{8}}")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name) and stat.S_ISREG(path.lstat().st_mode):
            path.unlink()


# --- messages ---------------------------------------------------------------------------------------------------------


def printable(value: object) -> str:
    r"""Return text on one line, with control characters as Python's escapes, for example ``\x1b``."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value)[:LIMIT_MESSAGE])


# --- reading ----------------------------------------------------------------------------------------------------------


def read_file(path: Path, limit: int | None = LIMIT_BYTES) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the file, or a link to it.
        limit: maximal number of bytes; ``None`` for any.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or not a regular file.
    """
    at_once = getattr(os, "O_NONBLOCK", 0)  # without waiting for the writer of a pipe
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{printable(path)}: must be a regular file")
        content = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise ValueError(f"{printable(path)}: larger than {limit} bytes: must be less")
    return content


def parse_json(text: str) -> Any:
    """Return the value of JSON text.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or has strings that are not Unicode.
    """
    deep = f"nests deeper than {LIMIT_DEPTH} levels"
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(deep) from None
    level = [value]
    for _ in range(LIMIT_DEPTH):
        for item in level:
            if isinstance(item, str):
                item.encode()  # a UnicodeEncodeError is a ValueError
        level = [child for item in level for child in _children(item)]
        if not level:
            return value
    raise ValueError(deep)


def _children(value: object) -> Iterable[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()


def decode_json(path: Path, content: bytes, check: Callable[[Any], Any], name: str = "") -> Any:
    """Return ``check`` of the content of a JSON file.

    Args:
        path: the file, for messages.
        content: its bytes.
        check: a function of the value; it raises a ValueError that names the field.
        name: a description for messages: ``"the settings of a run"``.

    Raises:
        ValueError: the content is not JSON, or ``check`` refuses it.
    """
    try:
        return check(parse_json(content.decode("utf-8")))
    except ValueError as error:  # a UnicodeDecodeError is one
        message = f"not {name} ({printable(error)})" if name else printable(error)
        # No cause in the traceback: it may quote control characters of the file.
        raise ValueError(f"{printable(path)}: {message}") from None


def read_json(path: Path, check: Callable[[Any], Any], name: str = "") -> Any:
    """Read a JSON file; see :func:`decode_json` for the arguments.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, not JSON, or ``check`` refuses it; the message names the file.
    """
    return decode_json(path, read_file(path), check, name)


def read_table(path: Path, fields: Sequence[str] | None = None) -> dict[int, dict[str, str]]:
    """Read the rows of a CSV file by line number.

    Args:
        path: the file.
        fields: the names in the first line; ``None`` for any.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large or an invalid table; the message names file and line.
    """
    where, rows = printable(path), dict[int, dict[str, str]]()
    content = read_file(path)
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8"), newline=""), strict=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: {error}") from None
    try:
        names = _checked_names(next(reader, []), fields)
        for row in filter(None, reader):
            rows[reader.line_num] = _checked_row(names, row)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{where}, line {max(1, reader.line_num)}: {printable(error)}") from None
    return rows


def _checked_names(names: list[str], fields: Sequence[str] | None) -> list[str]:
    if fields is not None and names != list(fields):
        raise ValueError(f"names the fields {short(names)}: must be {', '.join(fields)}")
    if not names or len(set(names)) < len(names) or not all(name.isprintable() for name in names):
        raise ValueError(f"names the fields {short(names)}: must be names, each once")
    return names


def _checked_row(names: list[str], row: list[str]) -> dict[str, str]:
    if len(row) != len(names):
        raise ValueError(f"does not have the fields of the first line: has {len(row)}, must have {len(names)}")
    for name, value in zip(names, row):
        if not value.isprintable():
            raise ValueError(f"{name}={short(value)}: must be text without control characters")
    return dict(zip(names, row))
