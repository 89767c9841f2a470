"""Checks of arguments: errors name the argument, its value and the allowed values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from numbers import Integral, Real
from typing import Any

__all__ = [
    "check_bool",
    "check_finite",
    "check_int",
    "check_layers",
    "check_one_of",
    "check_rate",
    "load_object",
    "short",
]


def check_bool(name: str, value: object) -> None:
    """ValueError unless ``value`` is a bool.

    timm's scripts pass the string ``"false"``, which would count as true.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be True or False")


def check_finite(name: str, value: object) -> float:
    """Return ``value`` as a float; ValueError unless it is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: must be a finite number")
    return float(value)


def check_int(name: str, value: object, minimum: int) -> None:
    """Raise ValueError if ``value`` is not an integer ≥ ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name}={value!r}: must be an integer ≥ {minimum}")


def check_layers(name: str, value: object, stages: int | None = None) -> None:
    """ValueError unless ``value`` is a sequence of integers ≥ 1, of length ``stages`` if that is not ``None``."""
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_sequence or not value or (stages is not None and len(value) != stages):  # type: ignore[arg-type]
        raise ValueError(
            f"{name}={value!r}: must be a sequence of {stages or 'one or more'} integers ≥ 1, one per stage"
        )
    for i, depth in enumerate(value):  # type: ignore[arg-type, var-annotated]
        check_int(f"{name}[{i}]", depth, 1)


def check_one_of(name: str, value: object, choices: Sequence[object]) -> None:
    """ValueError unless ``value`` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")


def check_rate(name: str, value: object) -> None:
    """ValueError unless 0 ≤ ``value`` < 1."""
    if not 0 <= check_finite(name, value) < 1:
        raise ValueError(f"{name}={value!r}: must be in [0, 1)")


def load_object(name: str, value: str, table: Mapping[str, Callable[[], Any]]) -> Any:
    """Return the object that a text names.

    Args:
        name: the argument, for messages.
        value: a name in ``table``, or ``"module:attribute"``, which is imported; a class is called without arguments.
        table: a function for each name that returns its object.

    Raises:
        ValueError: the name is unknown, or the attribute does not exist.
        ModuleNotFoundError: there is no such module.
    """
    if value in table:
        return table[value]()
    module, colon, attribute = value.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(table)}, or module:attribute")
    namespace = import_module(module)
    if not hasattr(namespace, attribute):
        raise ValueError(f"{name}={value!r}: module {module} has no attribute {attribute}")
    found = getattr(namespace, attribute)
    return found() if isinstance(found, type) else found


def short(value: object) -> str:
    """Return the ``repr`` of a value, cut to 80 characters, for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
