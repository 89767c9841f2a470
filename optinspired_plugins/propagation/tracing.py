"""Traces of algorithms: weighted sums and layer calls of a number of steps.

Every algorithm of the paper is linear in its iterates and gradients. :func:`trace` runs the algorithm object on
symbols, substitutes ∇f(z) = z − T(z), and collects a :class:`Program` of weighted sums and layer calls. In a program
z − (z − T(z)) is T(z), so that a network can execute it and a figure can show it. Symbols support sums and multiples by
numbers only; any other operation raises :class:`NotLinearError`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .._checks import check_int, check_one_of
from ..algorithms.methods import Algorithm, check_algorithm

__all__ = [
    "READINGS",
    "Call",
    "NotLinearError",
    "Program",
    "Step",
    "Sum",
    "Term",
    "trace",
    "trace_at_present",
    "trace_steps",
]

# ∇f(z) = z − T(z), as in the paper, and ∇f(z) = −T(z).
READINGS = ("fixed-point", "residual")


class NotLinearError(ValueError):
    """An algorithm uses more than sums of iterates and multiples by numbers."""


class Term(NamedTuple):
    """A register and its weight in a sum."""

    register: int
    weight: float


class Sum(NamedTuple):
    """A sum Σ weight · register: an entry of a state, or the point of a layer call.

    ``name`` is the field of the state, ``"point"`` or ``"result"``.
    """

    step: int
    name: str
    terms: tuple[Term, ...]


class Call(NamedTuple):
    """A layer call, T_step of a register.

    ``path`` counts the calls of a step. Register −1 is the input of a transition.
    """

    step: int
    path: int
    register: int


@dataclass(frozen=True)
class Program:
    """The computation of an algorithm in a number of steps.

    Register 0 is x_0; instruction i writes register i + 1.

    Attributes:
        instructions: sums and calls, in order.
        result: the register of the algorithm's result.
        calls: the number of layers that each step calls.
    """

    instructions: tuple[Sum | Call, ...]
    result: int
    calls: tuple[int, ...]

    def weights(self) -> list[tuple[float, ...]]:
        """Return the total weights of x_0 and of the output of each call in every register.

        Outputs of different calls are uncorrelated with each other and with x_0 if their layers are random and have
        mean 0. A register with the weights h, w_0, w_1, … then has the variance h² Var(x_0) + Σ_j w_j² Var(T_j).
        """
        unit = [tuple(float(i == j) for j in range(sum(self.calls) + 1)) for i in range(sum(self.calls) + 1)]
        outputs, registers = iter(unit[1:]), unit[:1]
        for instruction in self.instructions:
            if isinstance(instruction, Call):
                registers.append(next(outputs))
            else:
                terms = [[weight * value for value in registers[r]] for r, weight in instruction.terms]
                registers.append(tuple(math.fsum(column) for column in zip(*terms, strict=True)))
        return registers

    def gains(self) -> tuple[float, ...]:
        """Return the total weights of x_0 and of the output of each call in the result."""
        return self.weights()[self.result]


class Step(NamedTuple):
    """The sums and calls of one step, and the result of the algorithm after it."""

    instructions: tuple[Sum | Call, ...]
    result: tuple[Term, ...]


@dataclass(eq=False)
class _Symbol:
    """A linear expression: a sum of (weight, symbol), or a register."""

    terms: Sequence[tuple[float, _Symbol]] = ()
    register: int | None = None

    def __add__(self, other: object) -> _Symbol:
        return _Symbol([(1.0, self), (1.0, _symbol(other))])

    def __radd__(self, other: object) -> _Symbol:
        return self + other

    def __sub__(self, other: object) -> _Symbol:
        return _Symbol([(1.0, self), (-1.0, _symbol(other))])

    def __rsub__(self, other: object) -> _Symbol:
        return _Symbol([(1.0, _symbol(other)), (-1.0, self)])

    def __mul__(self, factor: object) -> _Symbol:
        return _Symbol([(_number(factor), self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> _Symbol:
        return _Symbol([(1 / _number(divisor), self)])

    def __neg__(self) -> _Symbol:
        return _Symbol([(-1.0, self)])

    def __bool__(self) -> bool:
        raise NotLinearError("the algorithm decides by an iterate's value")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "clone":
            return lambda: self
        raise NotLinearError(f"the algorithm uses .{name} of an iterate")

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> _Symbol:
        kwargs = dict(kwargs or {})
        if func is torch.zeros_like:
            return _Symbol()
        alpha = _number(kwargs.pop("alpha", 1))
        if func in _FUNCTIONS and not kwargs:
            return _FUNCTIONS[func](*args, alpha)
        raise NotLinearError(f"the algorithm calls {getattr(func, '__name__', func)} on an iterate")


def _product(a: Any, b: Any, alpha: float) -> _Symbol:
    return a * b if isinstance(a, _Symbol) else b * a


def _sum(a: Any, b: Any, alpha: float) -> _Symbol:
    return _symbol(a) + alpha * _symbol(b)


_FUNCTIONS: dict[Callable, Callable[..., _Symbol]] = {
    torch.add: _sum,
    torch.Tensor.add: _sum,
    torch.sub: lambda a, b, alpha: _symbol(a) - alpha * _symbol(b),
    torch.mul: _product,
    torch.Tensor.mul: _product,
    torch.div: lambda a, b, alpha: _symbol(a) / b,
    torch.neg: lambda a, alpha: -a,
    torch.lerp: lambda a, b, weight, alpha: _symbol(a) + _number(weight) * (_symbol(b) - a),
}


def _symbol(value: object) -> _Symbol:
    if isinstance(value, _Symbol):
        return value
    if isinstance(value, numbers.Real) and value == 0:  # the start of Python's sum()
        return _Symbol()
    raise NotLinearError(f"the algorithm adds {value!r} to an iterate")


# True while tensors of one value count as numbers.
_READS_TENSORS: ContextVar[bool] = ContextVar("_READS_TENSORS", default=False)


def _number(value: object) -> float:
    """Return a number as float; a tensor is refused, since it may be learned or loaded later."""
    if isinstance(value, numbers.Real):
        return float(value)
    if _READS_TENSORS.get() and isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta:
        return float(value.detach())
    raise NotLinearError(f"the algorithm multiplies an iterate by a {type(value).__name__}, not by a number")


@dataclass
class _Recorder:
    """The instructions of an algorithm while it runs."""

    instructions: list[Sum | Call] = field(default_factory=list)
    registers: dict[tuple[Term, ...], int] = field(default_factory=dict)

    def expand(self, symbol: _Symbol) -> tuple[Term, ...]:
        """Return a symbol as weights of registers; symbols with a register are not expanded."""
        parts: dict[int, list[float]] = {}
        stack: list[tuple[float, _Symbol]] = [(1.0, symbol)]
        while stack:
            weight, part = stack.pop()
            if part.register is not None:
                parts.setdefault(part.register, []).append(weight)
            else:
                stack += [(weight * factor, inner) for factor, inner in part.terms]
        weights = {register: math.fsum(values) for register, values in sorted(parts.items(), reverse=True)}
        return tuple(Term(register, weight) for register, weight in weights.items() if weight != 0)

    def register(self, symbol: _Symbol, step: int, name: str) -> int:
        """Return the register of a symbol; a sum writes a new one if there is none."""
        if symbol.register is None:
            terms = self.expand(symbol)
            if not terms:
                raise NotLinearError(f"the {name} of step {step} is 0 for every input")
            if len(terms) == 1 and terms[0].weight == 1:
                symbol.register = terms[0].register
            elif terms in self.registers:
                symbol.register = self.registers[terms]
            else:
                self.instructions.append(Sum(step, name, terms))
                symbol.register = self.registers[terms] = len(self.instructions)
        return symbol.register

    def call(self, step: int, path: int, register: int) -> _Symbol:
        self.instructions.append(Call(step, path, register))
        return _Symbol(register=len(self.instructions))


def trace(algorithm: Algorithm, steps: int, transition: bool = False, reading: str = "fixed-point") -> Program:
    """Run an algorithm on symbols.

    Args:
        algorithm: an object with ``init``, ``step`` and ``result``.
        steps: number of steps, ≥ 1.
        transition: the calls of the first step at x_0 act on another tensor u, which may have another shape, and are
            residual: T(x_0) is T_0(u) + x_0, so ∇f(x_0) = −T_0(u). Calls at other points are ordinary.
        reading: ``"fixed-point"``, ∇f(z) = z − T(z), or ``"residual"``, ∇f(z) = −T(z).

    Returns:
        The program.

    Raises:
        NotLinearError: the algorithm is not linear with constant coefficients; the message names the operation.
        TypeError: a method is missing.
        ValueError: ``steps`` is not an integer ≥ 1, or a step calls no layer.
    """
    recorder = _Recorder()
    check_one_of("reading", reading, READINGS)
    run = list(_run(algorithm, steps, transition, recorder, reading))
    result = recorder.register(_symbol(algorithm.result(run[-1][1])), steps, "result")
    return _without_dead_sums(Program(tuple(recorder.instructions), result, tuple(count for count, _ in run)))


def trace_at_present(
    algorithm: Algorithm, steps: int, transition: bool = False, reading: str = "fixed-point"
) -> Program:
    """Trace an algorithm with the present values of its learned coefficients.

    It has the arguments and errors of :func:`trace`. Only tensors of one value count as numbers.
    """
    token = _READS_TENSORS.set(True)
    try:
        return trace(algorithm, steps, transition, reading)
    finally:
        _READS_TENSORS.reset(token)


def trace_steps(algorithm: Algorithm, steps: int) -> list[Step]:
    """Run an algorithm on symbols with ``transition=True``, and return every step with its result.

    Registers are counted over all steps, as in a :class:`Program`.

    Raises:
        NotLinearError, TypeError, ValueError: see :func:`trace`.
    """
    recorder, start = _Recorder(), 0
    run: list[Step] = []
    for _, state in _run(algorithm, steps, True, recorder, "fixed-point"):
        result = recorder.expand(_symbol(algorithm.result(state)))
        if not result:
            raise NotLinearError(f"the result of step {len(run)} is 0 for every input")
        run.append(Step(tuple(recorder.instructions[start:]), result))
        start = len(recorder.instructions)
    return run


def _run(
    algorithm: Algorithm, steps: int, transition: bool, recorder: _Recorder, reading: str
) -> Iterator[tuple[int, Any]]:
    """Run an algorithm on symbols; yield the number of layer calls of each step and the state after it."""
    check_algorithm(algorithm)
    check_int("steps", steps, 1)
    stored: list[_Symbol] = []
    state = algorithm.init(_Symbol(register=0))  # type: ignore[arg-type]
    for k in range(steps):
        gradients: list[_Symbol] = []

        def gradient(z: Any, k: int = k, gradients: list[_Symbol] = gradients) -> Any:
            point = recorder.register(_symbol(z), k, "point")
            is_residual = k == 0 and transition and point == 0
            t = recorder.call(k, len(gradients), -1 if is_residual else point)
            gradients.append(-t if is_residual or reading == "residual" else z - t)
            return gradients[-1]

        state = algorithm.step(state, gradient)
        if not gradients:
            raise ValueError(f"step {k} of {type(algorithm).__name__} asks for no gradient: it has no layer")
        stored += gradients
        for name, entry in _entries(state):
            # A stored gradient stays z − T(z), of registers that exist; a zero needs none.
            if not any(entry is gradient for gradient in stored) and recorder.expand(entry):
                recorder.register(entry, k + 1, name)
        yield len(gradients), state


def _without_dead_sums(program: Program) -> Program:
    """Return a program without unused sums, as the last multiplier of ADMM.

    Calls stay: each is a layer.
    """
    needed = {program.result}
    for i in reversed(range(len(program.instructions))):
        instruction = program.instructions[i]
        if isinstance(instruction, Call):
            needed |= {i + 1, instruction.register}
        elif i + 1 in needed:
            needed |= {term.register for term in instruction.terms}
    indices = [i for i in range(len(program.instructions)) if i + 1 in needed]
    number = {-1: -1, 0: 0, **{i + 1: n + 1 for n, i in enumerate(indices)}}
    instructions: list[Sum | Call] = []
    for instruction in (program.instructions[i] for i in indices):
        if isinstance(instruction, Call):
            instructions.append(instruction._replace(register=number[instruction.register]))
        else:
            terms = tuple(term._replace(register=number[term.register]) for term in instruction.terms)
            instructions.append(instruction._replace(terms=terms))
    return Program(tuple(instructions), number[program.result], program.calls)


def _entries(state: Any, name: str = "") -> Iterator[tuple[str, _Symbol]]:
    """Yield the symbols of a state with the outermost names of their fields."""
    if isinstance(state, _Symbol):
        yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _entries(value, name or str(key))
    elif isinstance(state, (tuple, list)):
        fields = getattr(state, "_fields", [""] * len(state))
        for key, value in zip(fields, state, strict=True):
            yield from _entries(value, name or key)
    elif hasattr(state, "__dict__"):
        yield from _entries(vars(state), name)
