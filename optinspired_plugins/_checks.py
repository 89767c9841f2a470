"""What every check uses: errors name argument, value and what is allowed."""

from __future__ import annotations

from numbers import Integral

__all__ = ["check_int", "short"]


def check_int(name: str, value: object, minimum: int) -> None:
    """ValueError unless ``value`` is an integer ≥ ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name}={value!r}: must be an integer ≥ {minimum}")


def short(value: object) -> str:
    """Return a value as an error shows it: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
