"""The coefficients of stages that propagate by an algorithm, and the names of algorithms with these coefficients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from optinspired_plugins.propagation.named import NETWORK_ALGORITHMS
from optinspired_plugins.propagation.probing import layers_per_step
from optinspired_plugins.propagation.tracing import Call, Program, trace

__all__ = ["agree", "algorithm_names", "heavy_ball_rows", "program_coefficients"]

# Half precision rounds a coefficient by up to 0.4 %.
RELATIVE, ABSOLUTE = 0.01, 1e-4

Rows = list[list[float]]


def program_coefficients(program: Program) -> tuple[float, ...]:
    """Return the coefficients of a stage's program.

    They are (β1, β2) for a heavy ball (16), nothing for one with a single layer, and otherwise, row by row, the weights
    of S(u), T_0, T_1, … in the point of each call and in the result.

    Args:
        program: traced with ``transition=True``.
    """
    rows = _rows(program)
    layers = len(rows) - 1
    if layers == 1:
        return () if _close(rows, heavy_ball_rows(1, 1.0, 0.0)) else _flat(rows)
    total, beta1 = rows[2][0], rows[2][1]
    if _close(rows, heavy_ball_rows(layers, beta1, total - beta1)):
        return beta1, total - beta1
    return _flat(rows)


def algorithm_names(coefficients: Sequence[float], layers: int, reading: str = "fixed-point") -> tuple[str, ...]:
    """Return the names of algorithms with these coefficients by a reading.

    A short stage can have several names.
    """
    return tuple(
        name
        for name, values in _named_coefficients(layers, reading).items()
        if len(values) == len(coefficients) and agree(coefficients, values)
    )


def agree(some: Sequence[float], others: Sequence[float]) -> bool:
    """Return True if values are equal up to half precision."""
    return all(math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE) for a, b in zip(some, others))


@lru_cache
def _named_coefficients(layers: int, reading: str) -> dict[str, tuple[float, ...]]:
    coefficients = {}
    for name, make in NETWORK_ALGORITHMS.items():
        per_step = layers_per_step(make(), 1)[0]
        if layers % per_step == 0:
            coefficients[name] = program_coefficients(trace(make(), layers // per_step, True, reading))
    return coefficients


def _rows(program: Program) -> Rows:
    """Return the weights of S(u), T_0, … in each call and the result."""
    weights = program.weights()
    calls = [instruction for instruction in program.instructions if isinstance(instruction, Call)]
    points = [weights[max(call.register, 0)][: k + 1] for k, call in enumerate(calls)]
    return [[*row] for row in (*points, weights[program.result])]


def heavy_ball_rows(layers: int, beta1: float, beta2: float) -> Rows:
    """Return x_0, x_1, … of (16), each as the weights of S(u), T_0, T_1, …."""
    rows = [[1.0], [1.0, 1.0]]
    for k in range(1, layers):
        before = [*rows[k - 1], *[0.0] * (k + 1 - len(rows[k - 1]))]
        rows.append([*(beta1 * x + beta2 * y for x, y in zip(rows[k], before)), 1.0])
    return rows


def _close(rows: Rows, others: Rows) -> bool:
    return all(math.isclose(a, b, abs_tol=1e-9) for row, other in zip(rows, others) for a, b in zip(row, other))


def _flat(rows: Rows) -> tuple[float, ...]:
    return tuple(value for row in rows for value in row)
