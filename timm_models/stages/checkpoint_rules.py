"""What a checkpoint says about the function of its weights: the coefficients that no parameter holds.

One state dict fits networks of many rules. So each stage and dense block keeps its rule in its state dict, as a buffer
``rule``, and compares it when it loads. timm's checkpoints have none, and are loaded with a warning.

Rules of stages are ``[*coefficients, post_act, stride_in_1x1]``. The coefficients are β1, β2 of (16) where they are
constant; nothing where they are parameters, or where there is one layer and so no step of (16); and for any other
algorithm, row by row, the weights of S(u), T_0, T_1, … in each point that a layer is called at and in the result. A
stage that runs an algorithm's own code has ``[stride_in_1x1]`` alone.
It is ½ where a stage has no stride. The rule of a dense block is ``[β]`` of (21).
"""

# No postponed annotations here: TorchScript reads the types of attributes from the class.

import math
import warnings
from functools import lru_cache, partial
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from optinspired_plugins.algorithms.methods import ALGORITHMS, HeavyBall
from optinspired_plugins.propagation.probing import layers_per_step
from optinspired_plugins.propagation.tracing import Call, Program, trace
from optinspired_plugins.propagation.unrolled import TwoPath

__all__ = [
    "NETWORK_ALGORITHMS",
    "Ruled",
    "StageRule",
    "announce",
    "heavy_ball_coefficients",
    "is_rule",
    "learned_hint",
    "program_coefficients",
    "stride_in_1x1",
]

# The names of section 3, with the β of §7.1 for the heavy ball, and the last row of Table 3.
NETWORK_ALGORITHMS: Dict[str, Callable[[], Any]] = {
    **ALGORITHMS,
    "hb": partial(HeavyBall, beta=1.0),
    "dmrnet": TwoPath,
}

# Half precision rounds a coefficient by up to 0.4 %.
RELATIVE, ABSOLUTE = 0.01, 1e-4


WITHOUT_STRIDE = 0.5  # in the place of stride_in_1x1


def stride_in_1x1(transform: Any) -> float:
    """Return ``stride_in_1x1`` of a stage's first transform as a rule holds it."""
    if getattr(transform, "stride", 1) == 1:
        return WITHOUT_STRIDE
    return float(getattr(transform, "stride_in_1x1", False))


def is_rule(key: str) -> bool:
    """Return True if a key of a state dict is the one of a rule."""
    return key.rpartition(".")[2] == "rule"


class Ruled(nn.Module):
    """A module that keeps its rule in its state dict.

    The numbers themselves are ``rule_values``; the buffer is written from them, also when the module is moved, cast or
    given memory, and is never read but from a checkpoint.
    """

    rule: Tensor
    conversion = ""  # what makes a network of other coefficients, and of a twin
    convertible: Tuple[str, ...] = ()  # the arguments that it changes

    def set_rule(self, values: Sequence[float]) -> None:
        """Set the rule; parameters must exist."""
        like = next(self.parameters())
        self.rule_values: List[float] = [float(value) for value in values]
        self.without_rule = ""  # the warning where a checkpoint has no rule
        self.register_buffer("rule", self._as_tensor(like.device, like.dtype))

    def _as_tensor(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.tensor(self.rule_values, device=device, dtype=dtype)

    def is_twin(self) -> bool:
        """Return True if the twin of timm's computes the same from the same weights."""
        raise NotImplementedError

    def describe(self, values: Optional[Sequence[float]] = None) -> Dict[str, Any]:
        """Return a rule, by default the own, as arguments of the network."""
        raise NotImplementedError

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.rule = self._as_tensor(self.rule.device, self.rule.dtype)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: List[str],
        unexpected_keys: List[str],
        error_msgs: List[str],
    ) -> None:
        key = f"{prefix}rule"
        others = {name: value for name, value in state_dict.items() if name != key}
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(others, prefix, *rest)
        if key in missing_keys:
            missing_keys.remove(key)
        own = next((value for name, value in others.items() if name.startswith(prefix)), None)
        if local_metadata.get("assign_to_params_buffers", False) and own is not None:
            self.rule = self._as_tensor(own.device, self.rule.dtype)
        found = state_dict.get(key)
        if found is None:
            if self.without_rule and own is not None:
                warnings.warn(self.without_rule, stacklevel=2)
        elif not getattr(found, "is_meta", False):
            self._compare(torch.as_tensor(found).detach().double().cpu().flatten().tolist(), error_msgs)

    def _agrees(self, found: Sequence[float]) -> bool:
        """Return True if a rule of the same length is the own."""
        return _agree(found, self.rule_values)

    def _compare(self, found: Sequence[float], error_msgs: List[str]) -> None:
        """Add the fault to the errors unless a checkpoint's rule agrees with the own; one fault a network."""
        own = self.rule_values
        if len(found) == len(own) and self._agrees(found):
            return
        layers = len(list(self.children()))
        fault = _Fault(self.describe(found), self.describe(), layers, self.conversion, self.convertible)
        before = [message for message in error_msgs if isinstance(message, _Fault)]
        if before:
            error_msgs.remove(before[0])
            fault = before[0].with_other(fault)
        error_msgs.append(fault)


class _Fault(str):
    """The error where a checkpoint's rule is another one, which later stages may add to.

    Args:
        theirs: the checkpoint's rule as arguments.
        ours: the network's.
        layers: layers of the stage; few can be of several algorithms.
        conversion: what changes a network's rule.
        convertible: the arguments that it changes.
    """

    def __new__(
        cls, theirs: Dict[str, Any], ours: Dict[str, Any], layers: int, conversion: str, convertible: Tuple[str, ...]
    ) -> "_Fault":
        names = [name for name in theirs if theirs[name] != ours.get(name)] or list(theirs)
        wanted = _text({name: theirs[name] for name in names})
        present = _text({name: ours[name] for name in names if name in ours} or ours)
        change = f"; {conversion} changes it afterwards" if set(names) <= set(convertible) else ""
        text = f"the checkpoint's network has {wanted}, this one {present}: pass {wanted} to load it{change}"
        fault = super().__new__(cls, text)
        fault.parts = (theirs, ours, layers, conversion, convertible)
        return fault

    parts: Tuple[Dict[str, Any], Dict[str, Any], int, str, Tuple[str, ...]]

    def with_other(self, other: "_Fault") -> "_Fault":
        """Return one fault of both: flags where any stage has them, else what the longer stage says."""
        short, long = sorted((other, self), key=lambda fault: fault.parts[2])
        merged = [{**a, **b, **_flags(a, b)} for a, b in zip(short.parts[:2], long.parts[:2])]
        return _Fault(merged[0], merged[1], *long.parts[2:])


def _flags(one: Mapping[str, Any], other: Mapping[str, Any]) -> Dict[str, bool]:
    return {name: True for rule in (one, other) for name, value in rule.items() if value is True}


class StageRule(Ruled):
    """The rule of a stage of ResNet's transforms."""

    conversion = "timm_models.to_heavy_ball"
    prefers_names = False

    def _agrees(self, found: Sequence[float]) -> bool:
        """A stage without a stride, a dilated one of the same weights, say, fits either place of it."""
        own = self.rule_values
        anywhere = any(abs(rule[-1] - WITHOUT_STRIDE) < 0.1 for rule in (found, own))
        return _agree(found[:-1], own[:-1]) if anywhere else _agree(found, own)

    def describe(self, values: Optional[Sequence[float]] = None) -> Dict[str, Any]:
        """Return a rule, by default the own, as arguments of the network."""
        given = tuple(self.rule_values if values is None else values)
        if len(given) < 2:
            return dict(algorithm=("one that runs as it stands",), stride_in_1x1=bool(given and given[0] > 0.75))
        flags = dict(post_act=given[-2] > 0.75, stride_in_1x1=given[-1] > 0.75)
        return {**self._named(given[:-2]), **flags}

    def _named(self, coefficients: Tuple[float, ...]) -> Dict[str, Any]:
        calls = sum(1 for name, _ in self.named_children() if name.isdigit())
        if not coefficients:
            return {} if calls == 1 else dict(learn_beta=True)
        pair = len(coefficients) == 2
        names = () if pair and not self.prefers_names else _names_of(coefficients, calls)
        if not names and pair:
            betas = dict(beta1=_rounded(coefficients[0]), beta2=_rounded(coefficients[1]))
            return betas if self.prefers_names else {**betas, "learn_beta": False}
        return dict(algorithm=names or ("one without a name",))


def learned_hint(own: Iterable[str], given: Iterable[str], names: Sequence[str], option: str, conversion: str) -> str:
    """Return what to do where a checkpoint and a network do not learn the same coefficients; empty where they do.

    Args:
        own: keys of the network.
        given: keys of the checkpoint.
        names: how the keys of these coefficients end.
        option: the argument that makes a network learn them.
        conversion: what makes a network that learns them of one that does not.
    """
    learned, found = ({key for key in keys if key.rpartition(".")[2] in names} for keys in (own, given))
    if learned - found:
        return (
            f"\n\tThe checkpoint has no {min(learned - found)}: load it with {option}=False, "
            f"then timm_models.{conversion}(model, {option}=True) learns from there; it takes timm's network, too."
        )
    return f"\n\t{min(found - learned)} is of a network with {option}=True: pass it." if found - learned else ""


def announce(stages: Sequence[Any], ours: str, theirs: str) -> None:
    """Let the first stage that is not its twin's warn where a checkpoint has no rule: one warning a network."""
    different = [stage for stage in stages if not stage.is_twin()]
    for stage in stages:
        stage.without_rule = ""
    if different:
        rule = max(different, key=lambda stage: len(list(stage.children()))).describe()
        rule.pop("learn_beta", None)
        if "stride_in_1x1" in rule and not any(stage.describe()["stride_in_1x1"] for stage in stages):
            del rule["stride_in_1x1"]  # perhaps an argument without an effect
        elif "stride_in_1x1" in rule:
            rule["stride_in_1x1"] = True
        different[0].without_rule = (
            f"the checkpoint does not hold the rule that its weights were trained by; this {ours} has {_text(rule)}. "
            f"For weights of {theirs}, timm_models.{different[0].conversion.rpartition('.')[2]} makes the network of "
            "the same function"
        )


def heavy_ball_coefficients(layers: int, beta1: float, beta2: float) -> Tuple[float, ...]:
    """Return the coefficients of a heavy-ball stage (16) of so many layers, as a rule holds them."""
    return (beta1, beta2) if layers > 1 else ()


def program_coefficients(program: Program) -> Tuple[float, ...]:
    """Return the coefficients of a program that was traced as a stage: β1, β2 where it is a heavy ball."""
    rows = _rows(program)
    layers = len(rows) - 1
    if layers == 1:
        return () if _close(rows, _heavy_ball_rows(1, 1.0, 0.0)) else _flat(rows)
    total, beta1 = rows[2][0], rows[2][1]
    if _close(rows, _heavy_ball_rows(layers, beta1, total - beta1)):
        return beta1, total - beta1
    return _flat(rows)


def _rows(program: Program) -> List[List[float]]:
    """The weights of S(u), T_0, T_1, … in the point of each call, and in the result."""
    calls = sum(program.calls)
    registers = [[1.0, *[0.0] * calls]]
    rows: List[List[float]] = []
    for instruction in program.instructions:
        if isinstance(instruction, Call):
            rows.append(registers[max(instruction.register, 0)][: len(rows) + 1])
            made = [0.0] * (calls + 1)
            made[len(rows)] = 1.0
        else:
            terms = [[weight * value for value in registers[register]] for register, weight in instruction.terms]
            made = [math.fsum(column) for column in zip(*terms)]
        registers.append(made)
    return [*rows, registers[program.result]]


def _heavy_ball_rows(layers: int, beta1: float, beta2: float) -> List[List[float]]:
    """Rows x_0, x_1, … of (16)."""
    rows = [[1.0], [1.0, 1.0]]
    for k in range(1, layers):
        before = [*rows[k - 1], *[0.0] * (k + 1 - len(rows[k - 1]))]
        rows.append([*(beta1 * x + beta2 * y for x, y in zip(rows[k], before)), 1.0])
    return rows


def _close(rows: List[List[float]], others: List[List[float]]) -> bool:
    return all(math.isclose(a, b, abs_tol=1e-9) for row, other in zip(rows, others) for a, b in zip(row, other))


def _agree(some: Sequence[float], others: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE) for a, b in zip(some, others))


def _flat(rows: List[List[float]]) -> Tuple[float, ...]:
    return tuple(value for row in rows for value in row)


def _names_of(coefficients: Tuple[float, ...], calls: int) -> Tuple[str, ...]:
    """Return the names of the algorithms whose stage of so many layers has the coefficients: few layers, many names."""
    return tuple(
        name
        for name, known in _named_coefficients(calls).items()
        if len(known) == len(coefficients) and _agree(coefficients, known)
    )


@lru_cache
def _named_coefficients(calls: int) -> Dict[str, Tuple[float, ...]]:
    found = {}
    for name, make in NETWORK_ALGORITHMS.items():
        per_step = layers_per_step(make(), 1)[0]
        if calls % per_step == 0:
            found[name] = program_coefficients(trace(make(), calls // per_step, transition=True))
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _text(rule: Mapping[str, Any]) -> str:
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in rule.items()}
    return ", ".join(f"{name}={' or '.join(map(repr, value))}" for name, value in values.items())
