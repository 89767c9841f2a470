"""Optional packages: the error of a missing one names the extra that brings it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["from_extra"]


@contextmanager
def from_extra(extra: str, note: str = "") -> Iterator[None]:
    """Imports in this context come from an extra: where a package is missing, the error names it.

    Raises:
        ImportError: a package is missing. ``note`` is added to the message.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        advice = f"needs the extra {extra!r}, pip install '.[{extra}]' in a clone{note}"
        raise ImportError(f"no module named {error.name!r}: {advice}", name=error.name) from error
