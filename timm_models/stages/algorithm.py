"""Stages that propagate by any algorithm, as code or as a program."""

# No postponed annotations here: TorchScript reads the types of attributes from the class.

import copy
from typing import Any, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from optinspired_plugins.algorithms.methods import Algorithm, Gradient
from optinspired_plugins.memory.memory_format import align_gradient
from optinspired_plugins.memory.recompute import recompute
from optinspired_plugins.propagation.probing import calls_at_start
from optinspired_plugins.propagation.tracing import Call, NotLinearError, Program, Sum, trace, trace_at_present
from optinspired_plugins.propagation.unrolled import as_learnable

from ..strides import subsample
from .checkpoint_rules import StageRule, stride_in_1x1
from .heavy_ball import writable
from .network_algorithms import program_coefficients

__all__ = ["AlgorithmStage", "ProgramStage", "make_stage"]

Terms = List[Tuple[int, float]]


class AlgorithmStage(StageRule):
    """A stage that runs an algorithm's code from its start.

    With u the input and S the shortcut projection, the algorithm starts at x_0 = S(u). A layer that its first step
    calls at x_0 is ResNet's transition block T_0(u) + S(u), so ∇f(x_0) = −T_0(u). All other calls have
    ∇f(z) = z − T(z), or ∇f(z) = −T(z) by the residual reading.

    Which calls are at x_0 is decided once, by :func:`~optinspired_plugins.propagation.probing.calls_at_start`. If such
    a call is at another point in some forward pass, as under a condition, its layer still is T_0(u) + S(u):
    ∇f(z) = z − T_0(u) − S(u).

    Args:
        transforms: the layers in the order in which the algorithm calls them: T_0, T_1, …, or T'_0, T_0, T'_1, … for
            one with two paths. The first holds S as ``downsample``, or ``None``. Transforms that the first step calls
            at x_0 map from u; all others keep the shape.
        algorithm: an object with ``init``, ``step`` and ``result``; if it is a module, its parameters are learned.
        layers: number of layers that each step calls.
        reading: ``"fixed-point"`` or ``"residual"``.
    """

    prefers_names = True

    def __init__(
        self,
        transforms: Sequence[nn.Module],
        algorithm: Algorithm,
        layers: Sequence[int],
        reading: str = "fixed-point",
    ) -> None:
        super().__init__()
        for i, transform in enumerate(transforms):
            self.add_module(str(i), transform)
            transform.drop_activation()  # type: ignore[operator]
        self.layers, self.reading = tuple(layers), reading
        self.at_start = calls_at_start(algorithm, layers[0])
        self.algorithm = as_learnable(algorithm)
        self.stride = 1  # of u, before anything else
        self.grad_checkpointing = False
        self.set_rule([stride_in_1x1(transforms[0])])

    def equals_timm(self) -> bool:
        """Return False: timm has no such network."""
        return False

    @torch.jit.ignore
    def gains(self) -> Sequence[float]:
        """Return the weight of each T in the stage's output at the start; 1 if the algorithm is not linear."""
        try:
            program = trace_at_present(copy.deepcopy(self.algorithm), len(self.layers), True, self.reading)
        except NotLinearError:
            return super().gains()
        return program.gains()[1:]

    def forward(self, u: Tensor) -> Tensor:
        """Return the algorithm's result, shape (batch, channels, height / stride, width / stride)."""
        u = subsample(u, self.stride)
        transforms = [self.get_submodule(str(i)) for i in range(sum(self.layers))]
        x0 = _start(transforms[0], u)
        state = self.algorithm.init(x0)
        first = 0
        for k, count in enumerate(self.layers):
            group = transforms[first : first + count]
            gradient = self._gradient(group, k) if k else self._first_gradient(group, u, x0)
            state = self.algorithm.step(state, gradient)
            first += count
        x = self.algorithm.result(state)
        align_gradient(x)
        return x

    def _gradient(self, transforms: Sequence[nn.Module], k: int) -> Gradient:
        layers = iter(transforms)

        def gradient(z: Tensor) -> Tensor:
            t = self._call(_next(layers, k), z)
            return -t if self.reading == "residual" else z - t

        return gradient

    def _first_gradient(self, transforms: Sequence[nn.Module], u: Tensor, x0: Tensor) -> Gradient:
        layers, at_start = iter(transforms), iter(self.at_start)

        def gradient(z: Tensor) -> Tensor:
            T = _next(layers, 0)
            is_start = next(at_start)
            t = self._call(T, u if is_start else z)
            if self.reading == "residual" or (is_start and z is x0):
                return -t
            return z - x0 - t if is_start else z - t

        return gradient

    def _call(self, T: nn.Module, x: Tensor) -> Tensor:
        return recompute(T, T, x) if self.grad_checkpointing else T(x)


class ProgramStage(StageRule, nn.Sequential):
    """The same stage, executed as a :class:`~optinspired_plugins.propagation.tracing.Program`: sums between layers.

    It also runs in TorchScript, and its sums are simplified: z − (z − T(z)) is T(z). For the heavy ball with β = 1 it
    computes the same as :class:`HeavyBallStage`.

    Args:
        transforms: as for :class:`AlgorithmStage`.
        program: traced with ``transition=True``; as many calls as there are transforms.
    """

    prefers_names = True
    sums: List[List[Tuple[int, bool, Terms]]]
    output_weights: List[float]
    sources: List[int]
    targets: List[int]

    def __init__(self, transforms: Sequence[nn.Module], program: Program) -> None:
        super().__init__(*transforms)
        for transform in transforms:
            transform.drop_activation()  # type: ignore[operator]
        self.stride = 1  # of u, before anything else
        self.grad_checkpointing = False
        slots, self.slots = _allocate(program)
        last_use = _last_uses(program)
        # sums[i] are due before the i-th call, sums[-1] after the last, each as (slot, in place, terms).
        self.sums, self.sources, self.targets = [[]], [], []
        for i, instruction in enumerate(program.instructions):
            if isinstance(instruction, Call):
                self.sources.append(-1 if instruction.register < 0 else slots[instruction.register])
                self.targets.append(slots[i + 1])
                self.sums.append([])
            else:
                fresh = _fresh_call(program, i, last_use)
                terms = sorted(instruction.terms, key=lambda term: term.register != fresh)
                self.sums[-1].append((slots[i + 1], fresh >= 0, [(slots[r], weight) for r, weight in terms]))
        self.result = slots[program.result]
        self.output_weights = list(program.gains()[1:])
        self.set_rule([*program_coefficients(program), False, stride_in_1x1(transforms[0])])

    def equals_timm(self) -> bool:
        """Return False: ResNet has an activation after its additions."""
        return False

    @torch.jit.ignore
    def gains(self) -> Sequence[float]:
        """Return the weight of each T in the stage's output."""
        return self.output_weights

    def forward(self, u: Tensor) -> Tensor:
        """Return the algorithm's result, shape (batch, channels, height / stride, width / stride)."""
        x = self._plain(subsample(u, self.stride))
        if not torch.jit.is_scripting():
            align_gradient(x)
        return x

    def _plain(self, u: Tensor) -> Tensor:
        """Return the program's result by its sums and layer calls."""
        values = [u] * self.slots
        for i, T in enumerate(self):
            if i == 0:
                values[0] = u if T.downsample is None else T.downsample(u)  # type: ignore[operator]
            self._add(values, i)
            x = u if self.sources[i] < 0 else values[self.sources[i]]
            values[self.targets[i]] = T(x) if torch.jit.is_scripting() else self._transform(T, x)
        self._add(values, len(self.targets))
        return values[self.result]

    def _add(self, values: List[Tensor], i: int) -> None:
        """Compute the sums that are due before call i."""
        for target, in_place, terms in self.sums[i]:
            values[target] = weighted_sum(values, terms, in_place)

    @torch.jit.ignore
    def _transform(self, T: nn.Module, x: Tensor) -> Tensor:
        """Return T(x) as a writable tensor, recomputed in the backward pass with ``grad_checkpointing``."""
        return writable(T, recompute(T, T, x) if self.grad_checkpointing else T(x))


def weighted_sum(values: List[Tensor], terms: Terms, in_place: bool) -> Tensor:
    """Return Σ weight · values[slot].

    ``in_place`` overwrites the first value, a layer's output that is not used elsewhere. Normalisation, attention and
    drop path store their input for the backward pass, not their output.
    """
    slot, weight = terms[0]
    out = values[slot]
    if weight != 1.0:
        out = out.mul_(weight) if in_place else out * weight
        in_place = True
    for slot, weight in terms[1:]:
        # Assigned: torch.fx drops a call whose result is not used.
        out = out.add_(values[slot], alpha=weight) if in_place else torch.add(out, values[slot], alpha=weight)
        in_place = True
    return out


def make_stage(
    transforms: Sequence[nn.Module], algorithm: Algorithm, layers: Sequence[int], reading: str = "fixed-point"
) -> nn.Module:
    """Return a :class:`ProgramStage` for constant coefficients, else an :class:`AlgorithmStage`."""
    try:
        program = trace(algorithm, len(layers), True, reading)
    except NotLinearError:
        return AlgorithmStage(transforms, algorithm, layers, reading)
    return ProgramStage(transforms, program)


def _next(layers: Iterator[nn.Module], k: int) -> nn.Module:
    """Return the layer of the next call; ValueError if step k has no more."""
    for layer in layers:  # torch 2.5 does not compile next with a default
        return layer
    raise ValueError(f"step {k} of the algorithm asks for more gradients than when the network was built")


def _start(transform: Any, u: Tensor) -> Tensor:
    """Return x_0 = S(u)."""
    return u if transform.downsample is None else transform.downsample(u)


def _last_uses(program: Program) -> List[int]:
    """Return the last instruction that reads each register."""
    last = [-1] * (len(program.instructions) + 1)
    for i, instruction in enumerate(program.instructions):
        if isinstance(instruction, Call):
            reads = [instruction.register] if instruction.register >= 0 else []
        else:
            reads = [term.register for term in instruction.terms]
        for register in reads:
            last[register] = i
    last[program.result] = len(program.instructions)
    return last


def _fresh_call(program: Program, i: int, last_use: Sequence[int]) -> int:
    """Return a term of sum i that may be overwritten, or −1."""
    instruction = program.instructions[i]
    assert isinstance(instruction, Sum)
    for register, _ in instruction.terms:
        if register > 0 and isinstance(program.instructions[register - 1], Call) and last_use[register] == i:
            return register
    return -1


def _allocate(program: Program) -> Tuple[List[int], int]:
    """Return a slot for each register, and the number of slots."""
    last_use = _last_uses(program)
    slots, count = [0], 1
    free: List[int] = []
    for i in range(len(program.instructions)):
        # An instruction may write to a slot that it reads from.
        free += [slots[r] for r in range(len(slots)) if last_use[r] == i]
        if not free:
            free.append(count)
            count += 1
        slots.append(free.pop())
    return slots, count
