"""Files that are either the old version or the new one, whatever happens while they are written."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["write_atomically"]


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
