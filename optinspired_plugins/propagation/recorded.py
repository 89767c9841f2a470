"""Algorithms with constant coefficients as JSON, to be saved with a network.

:func:`record` runs an algorithm on symbols and stores the sums and layer calls of every step. A
:class:`RecordedAlgorithm` executes them: its own trace is the same program, to the bit. The JSON form has numbers and
lists only. Reading it imports and evaluates nothing, and every field is checked.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .._checks import short
from ..algorithms.methods import Algorithm, Gradient
from .tracing import Call, Term, trace_steps

__all__ = ["RecordedAlgorithm", "RecordedState", "record"]

VERSION = 1
LIMIT_STEPS = 1000

Terms = tuple[Term, ...]
Instruction = int | Terms


class RecordedState(NamedTuple):
    """The registers so far, x_0 first, and the number of steps."""

    registers: tuple[Tensor, ...]
    k: int


class RecordedAlgorithm:
    """An algorithm as weighted sums and layer calls.

    Register 0 is x_0, and every instruction writes the next register. A sum is a list of terms, pairs of a register and
    a weight. A call is the number of the register r that it reads; it writes T(r) = r − ∇f(r). The call −1 writes
    T(x_0) − x_0 = −∇f(x_0), the residual branch of a stage's first layer.

    Args:
        steps: the instructions of each step.
        results: the terms of the result after each step.

    Raises:
        ValueError: a field is invalid; the message names it, its value and the allowed values.
    """

    def __init__(self, steps: Sequence[Sequence[Any]], results: Sequence[Sequence[Any]]) -> None:
        _check_list("steps", steps)
        _check_list("results", results)
        if len(results) != len(steps):
            raise ValueError(f"results has {len(results)} entries: must have {len(steps)}, one per step")
        instructions, ends, count = [], [], 1
        for k, (step, result) in enumerate(zip(steps, results)):
            instructions.append(_checked_step(f"steps[{k}]", step, count, starts=k == 0))
            count += len(instructions[-1])
            ends.append(_checked_terms(f"results[{k}]", result, count))
        self.steps: tuple[tuple[Instruction, ...], ...] = tuple(instructions)
        self.results: tuple[Terms, ...] = tuple(ends)

    def init(self, x0: Tensor) -> RecordedState:
        """Return the state x_0."""
        return RecordedState((x0,), 0)

    def step(self, state: RecordedState, grad: Gradient) -> RecordedState:
        """Return the state after the next step.

        Raises:
            ValueError: all steps have been taken.
        """
        registers, k = list(state.registers), state.k
        if k == len(self.steps):
            raise ValueError(f"algorithm has {k} recorded steps: must have as many as the longest stage has layers")
        for instruction in self.steps[k]:
            if not isinstance(instruction, int):
                registers.append(_sum(registers, instruction))
            elif instruction < 0:
                registers.append(-grad(registers[0]))
            else:
                registers.append(registers[instruction] - grad(registers[instruction]))
        return RecordedState(tuple(registers), k + 1)

    def result(self, state: RecordedState) -> Tensor:
        """Return the iterate."""
        return _sum(state.registers, self.results[state.k - 1]) if state.k else state.registers[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the algorithm as dicts, lists and numbers."""
        steps = [[i if isinstance(i, int) else [list(term) for term in i] for i in step] for step in self.steps]
        return {"version": VERSION, "steps": steps, "results": [[list(t) for t in terms] for terms in self.results]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RecordedAlgorithm:
        """Read :meth:`to_dict`'s data.

        Raises:
            ValueError: the data is invalid; the message names the field.
        """
        if data.keys() != {"version", "steps", "results"}:
            raise ValueError(f"algorithm has fields {short(sorted(map(str, data)))}: must have version, steps, results")
        if type(data["version"]) is not int or data["version"] != VERSION:
            raise ValueError(f"version={short(data['version'])}: must be {VERSION}")
        if len(_check_list("steps", data["steps"])) > LIMIT_STEPS:
            raise ValueError(f"steps has {len(data['steps'])} entries: must have at most {LIMIT_STEPS}")
        return cls(data["steps"], data["results"])


def record(algorithm: Algorithm, steps: int) -> RecordedAlgorithm:
    """Return the first steps of an algorithm as data.

    Args:
        algorithm: an object with ``init``, ``step`` and ``result``.
        steps: number of steps, ≥ 1.

    Raises:
        NotLinearError: the algorithm is not linear with constant coefficients.
        TypeError: a method is missing.
        ValueError: ``steps`` is not an integer ≥ 1, or a step calls no layer.
    """
    trace = trace_steps(algorithm, steps)
    instructions = [[i.register if isinstance(i, Call) else i.terms for i in step.instructions] for step in trace]
    return RecordedAlgorithm(instructions, [step.result for step in trace])


def _sum(registers: Sequence[Tensor], terms: Terms) -> Tensor:
    parts = [registers[r] if weight == 1 else registers[r] * weight for r, weight in terms]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _checked_step(name: str, step: object, count: int, starts: bool) -> tuple[Instruction, ...]:
    """Return the instructions of a step, checked; ``count`` is the number of registers before it."""
    instructions: list[Instruction] = []
    for i, instruction in enumerate(_check_list(name, step)):
        if isinstance(instruction, (list, tuple)):
            instructions.append(_checked_terms(f"{name}[{i}]", instruction, count + i))
        else:
            first = -1 if starts else 0
            instructions.append(_checked_register(f"{name}[{i}]", instruction, first, count + i))
    if not any(isinstance(instruction, int) for instruction in instructions):
        raise ValueError(f"{name} has no call: must have a layer, the register that it reads")
    return tuple(instructions)


def _checked_terms(name: str, terms: object, count: int) -> Terms:
    checked = []
    for i, term in enumerate(_check_list(name, terms)):
        if not isinstance(term, (list, tuple)) or len(term) != 2:
            raise ValueError(f"{name}[{i}]={short(term)}: must be a register and a weight")
        register, weight = term
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not abs(weight) <= sys.float_info.max:
            raise ValueError(f"{name}[{i}] has weight {short(weight)}: must be a finite number")
        checked.append(Term(_checked_register(f"{name}[{i}]", register, 0, count), float(weight)))
    return tuple(checked)


def _checked_register(name: str, register: object, first: int, count: int) -> int:
    if type(register) is not int or not first <= register < count:
        raise ValueError(f"{name} has register {short(register)}: must be an integer from {first} to {count - 1}")
    return register


def _check_list(name: str, value: object) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{name}={short(value)}: must be a list with at least one entry")
    return value
