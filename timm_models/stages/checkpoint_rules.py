"""The propagation rule in a checkpoint: coefficients that are constants, not parameters.

One state dict fits networks of many rules. So each stage and dense block stores its rule in its state dict, as a buffer
``rule``, and compares it on loading. timm's checkpoints have no rule, and are loaded with a warning.

The rule of a stage is ``[*coefficients, post_act, stride_in_1x1]``. The coefficients are

- β1, β2 of (16) where they are constant;
- nothing where they are parameters, or where there is one layer and so no step of (16);
- for any other algorithm those of :func:`~timm_models.stages.network_algorithms.program_coefficients`.

``stride_in_1x1`` is ½ where a stage has no stride. A stage that runs an algorithm's own code has ``[stride_in_1x1]``.
The rule of a dense block is ``[β]`` of (21).
"""

# No postponed annotations here: TorchScript reads the types of attributes from the class.

import warnings
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from optinspired_plugins.propagation.tracing import READINGS

from .network_algorithms import agree, algorithm_names

__all__ = ["LearnedRule", "RuleBuffer", "StageRule", "is_rule", "stride_in_1x1", "warn_without_rule"]

WITHOUT_STRIDE = 0.5  # in the place of stride_in_1x1


def stride_in_1x1(transform: Any) -> float:
    """Return a rule's entry for ``stride_in_1x1`` of a transform."""
    if getattr(transform, "stride", 1) == 1:
        return WITHOUT_STRIDE
    return float(getattr(transform, "stride_in_1x1", False))


def is_rule(key: str) -> bool:
    """Return True if a key of a state dict belongs to a rule."""
    return key.rpartition(".")[2] == "rule"


class RuleBuffer(nn.Module):
    """A module that stores its rule in its state dict.

    The values are ``rule_values``. The buffer is written from them, also when the module is moved or cast; only the
    buffer of a checkpoint is ever read.
    """

    rule: Tensor
    conversion = ""  # the function that changes the rule of a network, and converts timm's network
    convertible: Tuple[str, ...] = ()  # the arguments that it changes

    def set_rule(self, values: Sequence[float]) -> None:
        """Set the rule; parameters must exist."""
        like = next(self.parameters())
        self.rule_values: List[float] = [float(value) for value in values]
        self.missing_rule_warning = ""  # given where a checkpoint has no rule
        self.register_buffer("rule", self._as_tensor(like.device, like.dtype))

    def _as_tensor(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.tensor(self.rule_values, device=device, dtype=dtype)

    def equals_timm(self) -> bool:
        """Return True if timm's counterpart computes the same from the same weights."""
        raise NotImplementedError

    def describe(self, values: Optional[Sequence[float]] = None) -> Dict[str, Any]:
        """Return a rule, by default this module's, as arguments of the network."""
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
        weight = next((value for name, value in others.items() if name.startswith(prefix)), None)
        if local_metadata.get("assign_to_params_buffers", False) and weight is not None:
            self.rule = self._as_tensor(weight.device, self.rule.dtype)
        rule = state_dict.get(key)
        if rule is None:
            if self.missing_rule_warning and weight is not None:
                warnings.warn(self.missing_rule_warning, stacklevel=2)
        elif not getattr(rule, "is_meta", False):
            self._compare(torch.as_tensor(rule).detach().double().cpu().flatten().tolist(), error_msgs)

    def _agrees(self, values: Sequence[float]) -> bool:
        """Return True if a rule of the same length is this module's."""
        return agree(values, self.rule_values)

    def _compare(self, values: Sequence[float], error_msgs: List[str]) -> None:
        """Add an error unless a checkpoint's rule agrees."""
        if len(values) == len(self.rule_values) and self._agrees(values):
            return
        layers = len(list(self.children()))
        error = _RuleError(self.describe(values), self.describe(), layers, self.conversion, self.convertible)
        earlier = [message for message in error_msgs if isinstance(message, _RuleError)]
        if earlier:
            error_msgs.remove(earlier[0])
            error = earlier[0].with_other(error)
        error_msgs.append(error)


class _RuleError(str):
    """The error message for another rule; later stages may extend it.

    Args:
        theirs: the checkpoint's rule as arguments.
        ours: the network's.
        layers: layers of the stage; a short one can belong to several algorithms.
        conversion: the function that changes a network's rule.
        convertible: the arguments that it changes.
    """

    def __new__(
        cls, theirs: Dict[str, Any], ours: Dict[str, Any], layers: int, conversion: str, convertible: Tuple[str, ...]
    ) -> "_RuleError":
        names = [name for name in theirs if theirs[name] != ours.get(name)] or list(theirs)
        expected = _text({name: theirs[name] for name in names})
        present = _text({name: ours[name] for name in names if name in ours} or ours)
        change = f"; {conversion} changes it afterwards" if set(names) <= set(convertible) else ""
        text = f"the checkpoint's network has {expected}, this one {present}: pass {expected} to load it{change}"
        error = super().__new__(cls, text)
        error.parts = (theirs, ours, layers, conversion, convertible)
        return error

    parts: Tuple[Dict[str, Any], Dict[str, Any], int, str, Tuple[str, ...]]

    def with_other(self, other: "_RuleError") -> "_RuleError":
        """Return one error for two stages, by the longer one's rule."""
        short, long = sorted((other, self), key=lambda error: error.parts[2])
        merged = []
        for a, b in zip(short.parts[:2], long.parts[:2]):
            flags = {name: True for rule in (a, b) for name, value in rule.items() if value is True}
            merged.append({**a, **b, **flags})
        return _RuleError(merged[0], merged[1], *long.parts[2:])


class StageRule(RuleBuffer):
    """The rule of a stage of ResNet's transforms."""

    conversion = "timm_models.to_heavy_ball"
    prefers_names = False

    @torch.jit.ignore
    def transforms(self) -> List[Any]:
        """Return T_0, T_1, …."""
        return [module for name, module in self.named_children() if name.isdigit()]

    @torch.jit.ignore
    def gains(self) -> Sequence[float]:
        """Return the weight of each T in the stage's output at the start; ResNet's, 1, if it is unknown."""
        return [1.0] * len(self.transforms())

    def _agrees(self, values: Sequence[float]) -> bool:
        """Return True if the rules agree; without a stride its place is ignored.

        A dilated stage, for example, has the weights of a strided one.
        """
        present = self.rule_values
        is_anywhere = any(abs(rule[-1] - WITHOUT_STRIDE) < 0.1 for rule in (values, present))
        return agree(values[:-1], present[:-1]) if is_anywhere else agree(values, present)

    def describe(self, values: Optional[Sequence[float]] = None) -> Dict[str, Any]:
        """Return a rule, by default this stage's, as arguments of the network."""
        rule = tuple(self.rule_values if values is None else values)
        if len(rule) < 2:
            return dict(algorithm=("one that runs as it stands",), stride_in_1x1=bool(rule and rule[0] > 0.75))
        flags = dict(post_act=rule[-2] > 0.75, stride_in_1x1=rule[-1] > 0.75)
        return {**self._named(rule[:-2]), **flags}

    def _named(self, coefficients: Tuple[float, ...]) -> Dict[str, Any]:
        layers = len(self.transforms())
        if not coefficients:
            return {} if layers == 1 else dict(learn_beta=True)
        is_pair = len(coefficients) == 2
        for reading in READINGS if self.prefers_names or not is_pair else ():
            names = algorithm_names(coefficients, layers, reading)
            if names:
                return dict(algorithm=names, reading=reading)
        if is_pair:
            beta1, beta2 = (float(f"{value:.3g}") for value in coefficients)
            betas = dict(beta1=beta1, beta2=beta2)
            return betas if self.prefers_names else {**betas, "learn_beta": False}
        return dict(algorithm=("one without a name",))


class LearnedRule:
    """A network whose rule can be learned: an error on loading names the arguments that fit the weights."""

    coefficients: Tuple[str, ...]  # the last parts of the keys of learned coefficients
    learn_option: str  # the argument that makes a network learn them
    conversion: str  # the function that makes a network learn them

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, timm's too, as ``torch.nn.Module`` does.

        Raises:
            RuntimeError: keys, shapes or the rule of the weights do not fit; the message names the arguments that do.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)  # type: ignore[misc]
        except RuntimeError as error:
            raise RuntimeError(f"{error}{self._mismatch_hint(state_dict) if strict else ''}") from error

    def _mismatch_hint(self: Any, state_dict: Iterable[str]) -> str:
        """Return advice if a checkpoint has other learned coefficients or no final normalisation, else ""."""
        all_keys = (self.state_dict(), state_dict)
        normed, wanted = ("norm.weight" in keys for keys in all_keys)
        if normed != wanted:
            return f"\n\tThe checkpoint has {'a' if wanted else 'no'} final normalisation: pass final_norm={wanted}."
        ours, theirs = ({key for key in keys if key.rpartition(".")[2] in self.coefficients} for keys in all_keys)
        option = self.learn_option
        if ours - theirs:
            return (
                f"\n\tThe checkpoint has no {min(ours - theirs)}: load it with {option}=False, "
                f"then timm_models.{self.conversion}(model, {option}=True) learns from there; it takes timm's network, "
                "too."
            )
        return f"\n\t{min(theirs - ours)} is of a network with {option}=True: pass it." if theirs - ours else ""


def warn_without_rule(stages: Sequence[Any], ours: str, theirs: str) -> None:
    """Warn when a checkpoint without a rule is loaded.

    One stage gives the warning, so that there is one per network.

    Args:
        stages: the network's stages or blocks.
        ours: the network's name.
        theirs: the name of timm's counterpart.
    """
    different = [stage for stage in stages if not stage.equals_timm()]
    for stage in stages:
        stage.missing_rule_warning = ""
    if not different:
        return
    rule = max(different, key=lambda stage: len(list(stage.children()))).describe()
    rule.pop("learn_beta", None)
    if rule.get("reading") == READINGS[0]:
        del rule["reading"]
    if "stride_in_1x1" in rule and not any(stage.describe()["stride_in_1x1"] for stage in stages):
        del rule["stride_in_1x1"]  # the argument may have no effect
    elif "stride_in_1x1" in rule:
        rule["stride_in_1x1"] = True
    different[0].missing_rule_warning = (
        f"the checkpoint does not hold the rule that its weights were trained by; this {ours} has {_text(rule)}. "
        f"For weights of {theirs}, timm_models.{different[0].conversion.rpartition('.')[2]} makes the network of "
        "the same function"
    )


def _text(rule: Mapping[str, Any]) -> str:
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in rule.items()}
    return ", ".join(f"{name}={' or '.join(map(repr, value))}" for name, value in values.items())
