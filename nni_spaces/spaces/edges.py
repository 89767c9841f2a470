"""Cells of the spaces, and what differentiable strategies make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nni.nas.nn.pytorch import LayerChoice
from nni.nas.oneshot.pytorch.supermodule.differentiable import DifferentiableMixedLayer
from nni.nas.space import current_model
from torch import Tensor, nn

from optinspired_plugins.cells.network import CellPlan, make_preprocessors
from optinspired_plugins.cells.operations import ZERO, make_operation

from .derivation import SKIPS, derive
from .initialization import Initialization, first_logits
from .mixed_op import Mixture, Source

__all__ = ["EdgeOptions", "MixedLayer", "Preprocessors", "SkipDropout"]


class Preprocessors(nn.Module):
    """Brings both inputs of a cell to its channels and size."""

    def __init__(self, plan: CellPlan, affine: bool) -> None:
        super().__init__()
        self.preprocess0, self.preprocess1 = make_preprocessors(plan, affine)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Return the two inputs, preprocessed."""
        return [self.preprocess0(inputs[0]), self.preprocess1(inputs[1])]


class SkipDropout(nn.Dropout):
    """Dropout behind a skip connection of a supernet (Chen et al. 2019), whose rate falls to 0 in a search.

    Args:
        rate: the first rate.
    """

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        self.rate = rate

    def decay(self, epoch: int, epochs: int) -> None:
        """Set the rate of an epoch, rate · (1 − epoch / epochs)."""
        self.p = self.rate * (1 - epoch / epochs)


@dataclass(frozen=True)
class EdgeOptions:
    """What a space asks of its edges beside the candidates; :class:`~nni_spaces.HBSpace` describes the fields."""

    partial_channels: int = 1
    skip_dropout: float = 0.0
    allowed: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def restrict(self, label: str, names: Sequence[str]) -> list[str]:
        """Return those of the names that an edge may have."""
        return [name for name in names if name in self.allowed.get(label, names)]


def candidates(
    operations: Sequence[str], plan: CellPlan, source: int | None, options: EdgeOptions
) -> dict[str, nn.Module]:
    """The candidates of an edge from ``source``; ``None`` where it is not chosen yet.

    A supernet's normalisations have no scale and shift, and follow poolings too; a chosen network's are ordinary, and
    its operations have all channels and no dropout.
    """
    stride = 2 if plan.reduction and (source is None or source < 2) else 1
    if current_model() is not None:
        return {name: make_operation(name, plan.channels, stride) for name in operations}
    channels = plan.channels // options.partial_channels
    made = {name: make_operation(name, channels, stride, False, True) for name in operations}
    if options.skip_dropout:
        made.update(
            {name: nn.Sequential(made[name], SkipDropout(options.skip_dropout)) for name in SKIPS if name in made}
        )
    return made


def zero_last(names: Sequence[str]) -> list[str]:
    """The operations that α speaks of: the candidates, and zero behind them if it is not one."""
    return [*names, *([] if ZERO in names else [ZERO])]


def first_alpha(
    initialization: Initialization, rule: str, label: str, operations: Sequence[str], kept: Sequence[str]
) -> nn.Parameter:
    """α of an edge as a search begins, of the operations that are kept.

    It is the one of all operations with the others left out: a favoured operation that an edge may not have leaves it
    without a favourite.
    """
    names = zero_last(operations)
    alpha = first_logits(initialization, rule, label, names)
    return nn.Parameter(alpha[[names.index(name) for name in kept]])


def proxyless_hook(initialization: Initialization, operations: Sequence[str]) -> Any:
    """Return a mutation hook that starts the α of NNI's Proxyless, which has none for zero, as we start ours."""

    def mutate(module: nn.Module, name: str, memo: dict[str, Any], kwargs: dict[str, Any]) -> None:
        choice: Any = module
        if type(module) is LayerChoice and f"{choice.label}/alpha" not in memo:  # cells of a kind share it
            alpha = first_alpha(initialization, "hb", choice.label, operations, choice.names)
            memo[choice.label] = memo[f"{choice.label}/alpha"] = alpha  # NNI's layer takes the former

    return mutate


class MixedLayer(DifferentiableMixedLayer):
    """An edge of the HB supernet: Σ_o softmax(α)_o o(x), (24)-(25), with zero among the operations.

    Zero has an α and no module, so that it can take weight in the search and cannot be exported.
    """

    def __init__(
        self,
        paths: dict[str, nn.Module],
        alpha: nn.Parameter,
        softmax: nn.Module,
        label: str,
        options: EdgeOptions = EdgeOptions(),
    ) -> None:
        LayerChoice.__init__(self, paths, label=label)  # the parent's asks for as many α as paths
        self._arch_alpha, self._softmax, self.options = alpha, softmax, options

    @classmethod
    def hook(cls, rule: str, initialization: Any, operations: Sequence[str], options: EdgeOptions) -> Any:
        """Return a mutation hook that starts α as ``initialization`` says."""

        def mutate(module: nn.Module, name: str, memo: dict[str, Any], kwargs: dict[str, Any]) -> Any:
            if type(module) is not LayerChoice:
                return None
            choice: Any = module
            key = f"{choice.label}/alpha"
            if key not in memo:  # cells of a kind share it
                kept = options.restrict(choice.label, zero_last(operations))
                memo[key] = first_alpha(initialization, rule, choice.label, operations, kept)
            softmax = kwargs.get("softmax", nn.Softmax(-1))
            return cls(choice.candidates, memo[key], softmax, choice.label, options)

        return mutate

    def weights(self) -> Tensor:
        """Return softmax(α), zero's behind the others' (25)."""
        return self._softmax(self._arch_alpha)

    def operations(self) -> dict[str, nn.Module]:
        """Return the operations by name."""
        return {name: self[name] for name in self.names}

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted sum."""
        parts = self.options.partial_channels
        mixture = Mixture(parts)
        mixture.add(self.weights(), self.operations(), Source(x, parts))
        return mixture.value()

    def export(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return the strongest operation that is not zero."""
        return derive(self.export_probs(memo))

    def export_probs(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return softmax(α), zero included."""
        if self.label in memo:
            return {}
        names = self.options.restrict(self.label, zero_last(self.names))
        return {self.label: dict(zip(names, self._arch_alpha.softmax(-1).tolist()))}
