"""Lock files: one process at a time, and the system frees what a process held, however it ends."""

from __future__ import annotations

import errno
import os
import platform
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._files import printable

__all__ = ["held"]


@contextmanager
def held(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock file; its folder and the file are made if there are none, and nothing is written to it.

    Args:
        path: the file.
        wait: wait for another process that holds it.

    Raises:
        RuntimeError: another process holds it, and ``wait`` is false.
        NotImplementedError: the system has no record locks, as Windows.
        ValueError: the file is a link, a pipe or the like.
        OSError: the file system has no locks, or the folder cannot be written; the message names it.
    """
    where = f"out={str(path.parent)!r}"
    try:
        import fcntl
    except ImportError:
        raise NotImplementedError(
            f"{where}: a run locks its folder by fcntl, which {platform.system()} has not: must be a Unix"
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
    """Open a file to lock it, without emptying it, without following a link, and without waiting for a pipe."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{printable(path)}: is a link: must be a regular file") from None
        raise
