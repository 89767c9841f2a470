"""Checks of constructor arguments, made before anything is allocated: errors name argument, value, what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import List, Optional, Union

from optinspired_plugins._checks import check_int

__all__ = [
    "check_bool",
    "check_feature_indices",
    "check_finite",
    "check_layers",
    "check_non_negative_int",
    "check_one_of",
    "check_positive_int",
    "check_rate",
]


def check_bool(name: str, value: object) -> None:
    """ValueError unless ``value`` is a bool: the string that timm's scripts make of ``false`` would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be True or False")


def check_finite(name: str, value: object) -> float:
    """Return ``value`` as a float if it is a finite real number; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: must be a finite number")
    return float(value)


def check_rate(name: str, value: object) -> None:
    """ValueError unless 0 ≤ ``value`` < 1."""
    if not 0 <= check_finite(name, value) < 1:
        raise ValueError(f"{name}={value!r}: must be in [0, 1)")


def check_non_negative_int(name: str, value: object) -> None:
    """ValueError unless ``value`` is an integer ≥ 0."""
    check_int(name, value, 0)


def check_positive_int(name: str, value: object) -> None:
    """ValueError unless ``value`` is an integer ≥ 1."""
    check_int(name, value, 1)


def check_layers(name: str, value: object, stages: int | None = None) -> None:
    """ValueError unless ``value`` is a sequence of integers ≥ 1, of length ``stages`` if that is given."""
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_sequence or not value or (stages is not None and len(value) != stages):  # type: ignore[arg-type]
        raise ValueError(f"{name}={value!r}: must be a sequence of {stages or 'one or more'} integers ≥ 1, one a stage")
    for i, depth in enumerate(value):  # type: ignore[arg-type, var-annotated]
        check_positive_int(f"{name}[{i}]", depth)


def check_one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """ValueError unless ``value`` is among ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")


def check_feature_indices(indices: Optional[Union[int, List[int]]], count: int) -> List[int]:
    """Return non-negative positions of features, the last n for an int n; ValueError unless they are in range."""
    if indices is None:
        indices = count
    if isinstance(indices, int):
        if isinstance(indices, bool) or not 1 <= indices <= count:
            raise ValueError(f"indices={indices!r}: must be an integer from 1 to {count}, or a list of positions")
        return list(range(count - indices, count))
    if not indices or not all(-count <= i < count for i in indices):
        raise ValueError(f"indices={indices!r}: must be integers from {-count} to {count - 1}, at least one")
    return [i % count for i in indices]
