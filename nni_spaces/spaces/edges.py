"""Edges of the spaces: their candidates, and the mixed edge of a differentiable search (24)-(25)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import nni_spaces._nni  # noqa: F401

from nni.nas.nn.pytorch import LayerChoice
from nni.nas.oneshot.pytorch.supermodule.differentiable import DifferentiableMixedLayer
from nni.nas.space import current_model
from torch import Tensor, nn

from optinspired_plugins.cells.genotype import SKIPS
from optinspired_plugins.cells.labels import Label
from optinspired_plugins.cells.network import CellPlan, make_preprocessors
from optinspired_plugins.cells.operations import ZERO, make_operation
from optinspired_plugins.propagation.patterns import PatternEdge

from .derivation import derive
from .initialization import Initialization, initial_beta, initial_logits
from .mixed_op import NodeInput, NodeSum

__all__ = ["EdgeOptions", "MixedLayer", "Preprocessors", "SkipDropout", "Start", "WeightedLayer"]


class Preprocessors(nn.Module):
    """Bring both inputs of a cell to its channels and size.

    Args:
        plan: channels and strides of the cell.
        affine: scale and shift in the normalisations.
        used: the inputs that a node reads; the weights of another are not trained.
    """

    def __init__(self, plan: CellPlan, affine: bool, used: Collection[int] = (0, 1)) -> None:
        super().__init__()
        self.preprocess0, self.preprocess1 = make_preprocessors(plan, affine)
        for i, module in enumerate((self.preprocess0, self.preprocess1)):
            if i not in used:  # DDP needs a gradient of every weight that is trained
                module.requires_grad_(False)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Return the two preprocessed inputs."""
        return [self.preprocess0(inputs[0]), self.preprocess1(inputs[1])]


class SkipDropout(nn.Dropout):
    """Dropout after a skip connection of a supernet (Chen et al. 2019).

    Its rate falls linearly to 0 during a search.

    Args:
        rate: rate of the first epoch.
    """

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        self.rate = rate

    def decay(self, epoch: int, epochs: int) -> None:
        """Set the rate of an epoch, rate · (1 − epoch / epochs)."""
        self.p = self.rate * (1 - epoch / epochs)


def relaxed(alpha: Tensor, softmax: nn.Module) -> Tensor:
    """Return the weights of the candidates without sampling: softmax(α), or σ(α) if the strategy has a sigmoid."""
    return alpha.sigmoid() if isinstance(softmax, nn.Sigmoid) else alpha.softmax(-1)


@dataclass(frozen=True)
class EdgeOptions:
    """Options of all edges of a space; :class:`~nni_spaces.HBSpace` describes the fields."""

    partial_channels: int = 1
    skip_dropout: float = 0.0
    allowed: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def restrict(self, label: str, names: Sequence[str]) -> list[str]:
        """Return the names that are allowed on an edge."""
        return [name for name in names if name in self.allowed.get(label, names)]


def candidates(
    operations: Sequence[str], plan: CellPlan, source: int | None, options: EdgeOptions
) -> dict[str, nn.Module]:
    """Return the candidates of an edge by name.

    In a supernet, normalisations have no scale and shift, and poolings are normalised, too. In a chosen network,
    normalisations are ordinary, operations have all channels, and there is no dropout.

    Args:
        operations: names of the candidates.
        plan: channels and strides of the cell.
        source: the edge's source; ``None`` if it is not chosen yet.
        options: options of the edges.
    """
    stride = 2 if plan.reduction and (source is None or source < 2) else 1
    if current_model() is not None:
        return {name: make_operation(name, plan.channels, stride) for name in operations}
    channels = plan.channels // options.partial_channels
    modules = {name: make_operation(name, channels, stride, False, True) for name in operations}
    if options.skip_dropout:
        for name in modules.keys() & {*SKIPS}:
            modules[name] = nn.Sequential(modules[name], SkipDropout(options.skip_dropout))
    return modules


def with_zero(names: Sequence[str]) -> list[str]:
    """Return the names that α has entries for: the candidates, then zero."""
    return [*names, ZERO]


@dataclass(frozen=True)
class Start:
    """The start of a search: the initialisation, and the rule, operations and edges that it is asked for.

    ``edges`` are the edges of the algorithm by the labels of their α.
    """

    initialization: Initialization
    rule: str
    operations: Sequence[str]
    edges: Mapping[str, PatternEdge]

    def alpha(self, label: str, allowed: Sequence[str]) -> nn.Parameter:
        """Return the initial α of an edge.

        It is the α of all operations restricted to ``allowed``: if the operation that the initialisation favours is
        not allowed, the edge has no favoured operation.
        """
        names = with_zero(self.operations)
        alpha = initial_logits(self.initialization, self.rule, label, names, self.edges[label])
        return nn.Parameter(alpha[[names.index(name) for name in allowed]])

    def beta(self, kind: str, node: int) -> nn.Parameter:
        """Return the initial β of a node, one for each of its edges."""
        places = {label: Label.parse(label) for label in self.edges}
        edges = [self.edges[label] for label, place in places.items() if (place.cell, place.node) == (kind, node)]
        return nn.Parameter(initial_beta(self.initialization, edges))


def proxyless_hook(start: Start) -> Any:
    """Return a mutation hook that initialises α of NNI's Proxyless, which has no entry for zero."""

    def mutate(module: nn.Module, name: str, memo: dict[str, Any], kwargs: dict[str, Any]) -> None:
        choice: Any = module
        if type(module) is LayerChoice and f"{choice.label}/alpha" not in memo:  # cells of a kind share it
            alpha = start.alpha(choice.label, choice.names)
            memo[choice.label] = memo[f"{choice.label}/alpha"] = alpha  # NNI's layer uses the first key

    return mutate


class MixedLayer(DifferentiableMixedLayer):
    """An edge of the HB supernet: Σ_o softmax(α)_o o(x), (24)-(25).

    Zero has an entry in α and no module, so that it can have weight in the search and cannot be exported.
    """

    def __init__(
        self,
        paths: dict[str, nn.Module],
        alpha: nn.Parameter,
        softmax: nn.Module,
        label: str,
        options: EdgeOptions = EdgeOptions(),
    ) -> None:
        LayerChoice.__init__(self, paths, label=label)  # the parent's __init__ needs one α per path
        self._arch_alpha, self._softmax, self.options = alpha, softmax, options

    @classmethod
    def hook(cls, start: Start, options: EdgeOptions) -> Any:
        """Return a mutation hook that replaces a choice by this layer."""

        def mutate(module: nn.Module, name: str, memo: dict[str, Any], kwargs: dict[str, Any]) -> Any:
            if type(module) is not LayerChoice:
                return None
            choice: Any = module
            key = f"{choice.label}/alpha"
            if key not in memo:  # cells of a kind share it
                memo[key] = start.alpha(choice.label, options.restrict(choice.label, with_zero(start.operations)))
            softmax = kwargs.get("softmax", nn.Softmax(-1))
            layer = cls(choice.candidates, memo[key], softmax, choice.label, options)
            layer.set_beta(start, memo)
            return layer

        return mutate

    def set_beta(self, start: Start, memo: dict[str, Any]) -> None:
        """Set β of the edge's node, which this layer has not."""

    def edge_weight(self) -> Tensor | None:
        """Return p of the edge; ``None`` for 1."""
        return None

    def weights(self) -> Tensor:
        """Return softmax(α) (25); the entry of zero is the last."""
        return self._softmax(self._arch_alpha)

    def probabilities(self) -> dict[str, Tensor]:
        """Return softmax(α) by label, with its gradient."""
        return {self.label: relaxed(self._arch_alpha, self._softmax)}

    def operations(self) -> dict[str, nn.Module]:
        """Return the operations by name."""
        return {name: self[name] for name in self.names}

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted sum."""
        parts = self.options.partial_channels
        node_sum = NodeSum(parts)
        node_sum.add_edge(self.weights(), self.operations(), NodeInput(x, parts), self.edge_weight())
        return node_sum.value()

    def export(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return the strongest operation other than zero."""
        return derive(self.export_probs(memo))

    def export_probs(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return softmax(α) by operation, including zero."""
        if self.label in memo:
            return {}
        names = self.options.restrict(self.label, with_zero(self.names))
        return {self.label: dict(zip(names, relaxed(self._arch_alpha, self._softmax).tolist()))}


class WeightedLayer(MixedLayer):
    """An edge with a weight: p Σ_o softmax(α)_o o(x), with p = softmax(β) over the edges into its node (28)-(29).

    β is an architecture parameter, shared by the edges of a node and by the cells of a kind.
    """

    _arch_parameter_names = ["_arch_alpha", "_arch_beta"]

    def set_beta(self, start: Start, memo: dict[str, Any]) -> None:
        """Set β of the edge's node."""
        self.place = Label.parse(self.label)
        key = f"{self.beta_label()}/beta"
        if key not in memo:
            memo[key] = start.beta(self.place.cell, self.place.node)
        self._arch_beta = memo[key]

    def beta_label(self) -> str:
        """Return the label of the node's β."""
        return str(Label(self.place.cell, "beta", self.place.node))

    def edge_weight(self) -> Tensor | None:
        """Return p of the edge."""
        return self._arch_beta.softmax(-1)[self.place.position]

    def export_probs(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return softmax(α) by operation, and p by edge with the first edge of a node."""
        probs, label = super().export_probs(memo), self.beta_label()
        if label not in memo and self.place.position == 0:
            probs[label] = dict(enumerate(self._arch_beta.softmax(-1).tolist()))
        return probs
