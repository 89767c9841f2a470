"""Cells of the spaces, and what differentiable strategies make of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from nni.mutable import label_scope
from nni.nas.nn.pytorch import Cell, LayerChoice
from nni.nas.nn.pytorch.cell import preprocess_cell_inputs
from nni.nas.oneshot.pytorch.supermodule.differentiable import DifferentiableMixedCell, DifferentiableMixedLayer
from nni.nas.oneshot.pytorch.supermodule.sampling import PathSamplingCell
from nni.nas.space import current_model
from torch import Tensor, nn

from optinspired_plugins.genotype import heavy_ball_sources
from optinspired_plugins.operations import ZERO, CellPlan, make_operation, make_preprocessors

from .derivation import SKIPS, derive
from .initialization import Initialization, first_logits
from .mixing import Mixture, Source

__all__ = [
    "EdgeNormalizedCell",
    "EdgeOptions",
    "HeavyBallCell",
    "MixedCell",
    "MixedLayer",
    "Preprocessors",
    "SkipDropout",
]


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


class HeavyBallCell(nn.Module):
    """A cell of Search space-HB (23): x_t = o_1(x_{t−1}) + o_2(x_{t−1}) + o_3(x_{t−2}).

    The choices are labelled ``{kind}/op_{t}_{k}``, k = 0, 1 from x_{t−1} and 2 from x_{t−2}, t from 2.

    Args:
        operations: names of the candidates.
        plan: channels and strides.
        nodes: number of nodes.
        kind: ``"normal"`` or ``"reduce"``; cells of a kind share their choices.
        options: what else is asked of the edges.
    """

    def __init__(
        self, operations: Sequence[str], plan: CellPlan, nodes: int, kind: str, options: EdgeOptions = EdgeOptions()
    ) -> None:
        super().__init__()
        self.preprocessors = Preprocessors(plan, affine=current_model() is not None)
        self.options = options
        self.nodes = nn.ModuleList()
        with label_scope(kind):
            for t in range(2, 2 + nodes):
                edges = []
                for k, source in enumerate(heavy_ball_sources(t)):
                    names = options.restrict(f"{kind}/op_{t}_{k}", operations)
                    edges.append(LayerChoice(candidates(names, plan, source, options), label=f"op_{t}_{k}"))
                self.nodes.append(nn.ModuleList(edges))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Return the nodes, concatenated along channels."""
        states = self.preprocessors(inputs)
        if self.is_supernet():
            return torch.cat(self._mixtures(states), 1)
        for node in self.nodes:
            first, second, third = cast(nn.ModuleList, node)
            states.append(first(states[-1]) + second(states[-1]) + third(states[-2]))
        return torch.cat(states[2:], 1)

    def is_supernet(self) -> bool:
        """Say whether a differentiable strategy has made the edges mixed ones."""
        return all(isinstance(edge, MixedLayer) for node in self.nodes for edge in cast(nn.ModuleList, node))

    def _mixtures(self, states: list[Tensor]) -> list[Tensor]:
        """Return the nodes (23) with the edges mixed (24)."""
        parts = self.options.partial_channels
        sources = [Source(state, parts) for state in states]
        for t, node in enumerate(self.nodes, start=2):
            mixture = Mixture(parts)
            for edge, i in zip(cast(Any, node), heavy_ball_sources(t)):
                mixture.add(edge.weights(), edge.operations(), sources[i])
            states.append(mixture.value())
            sources.append(Source(states[-1], parts))
        return states[2:]


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


class MixedCell(DifferentiableMixedCell):
    """A cell of the DARTS supernet: x_t = Σ_{i<t} Σ_o softmax(α_{it})_o o(x_i), (24)-(25) and (27).

    NNI's cell adds an α for zero behind the candidates; so does this one, unless zero is a candidate.
    """

    def __init__(
        self,
        cell: Cell,
        memo: dict[str, Any],
        kwargs: dict[str, Any],
        initialization: Any,
        options: EdgeOptions = EdgeOptions(),
    ) -> None:
        names = list(cast(dict, cell.op_candidates_factory))
        labels = [f"{cell.label}/{t}_{i}" for t in range(2, 2 + cell.num_nodes) for i in range(t)]
        for label in labels:
            key = f"{label}/in_cell"
            if key not in memo:  # cells of a kind share it
                memo[key] = first_alpha(initialization, "agd", label, names, options.restrict(label, zero_last(names)))
        PathSamplingCell.__init__(  # the parent's asks for as many α as candidates of the cell
            self,
            cast(Any, cell.op_candidates_factory),
            cell.num_nodes,
            cell.num_ops_per_node,
            cell.num_predecessors,
            cell.preprocessor,
            cell.postprocessor,
            cell.concat_dim,
            memo,
            kwargs,
            cell.label,
        )
        self._arch_alpha = nn.ParameterDict()
        for label in labels:
            self._arch_alpha[label] = memo[f"{label}/in_cell"]
        self._softmax, self.options = kwargs.get("softmax", nn.Softmax(-1)), options
        for t, i, operations in self.edges():
            for name in set(names) - set(options.restrict(f"{self.label}/{t}_{i}", names)):
                del operations[name]

    @classmethod
    def hook(cls, initialization: Any, options: EdgeOptions) -> Any:
        """Return a mutation hook that starts α as ``initialization`` says."""

        def mutate(module: nn.Module, name: str, memo: dict[str, Any], kwargs: dict[str, Any]) -> Any:
            return cls(module, memo, kwargs, initialization, options) if type(module) is Cell else None

        return mutate

    def edges(self) -> Iterator[tuple[int, int, nn.ModuleDict]]:
        """Yield node, source and operations of each edge."""
        for t, sources in enumerate(cast(Any, self.ops), start=2):
            for i, operations in enumerate(sources):
                yield t, i, operations

    def edge_weights(self, t: int) -> Tensor | None:
        """Return the weights of the edges into node t, shape (t,); ``None`` for 1."""
        return None

    def forward(self, *inputs: Any) -> Any:
        """Return the nodes, concatenated along channels."""
        processed = preprocess_cell_inputs(self.num_predecessors, *inputs)
        states, parts = self.preprocessor(processed), self.options.partial_channels
        sources = [Source(state, parts) for state in states]
        for t, edges in enumerate(cast(Any, self.ops), start=2):
            weights, mixture = self.edge_weights(t), Mixture(parts)
            for i, operations in enumerate(edges):
                alpha = self._softmax(self._arch_alpha[f"{self.label}/{t}_{i}"])
                mixture.add(alpha, operations, sources[i], None if weights is None else weights[i])
            states.append(mixture.value())
            sources.append(Source(states[-1], parts))
        return self.postprocessor(torch.cat(states[2:], self.concat_dim), processed)

    def export(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return the strongest operations that are not zero, of distinct predecessors, by probability."""
        return {key: value for key, value in derive(self.export_probs({})).items() if key not in memo}

    def export_probs(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return softmax(α) of every edge, zero included."""
        probs: dict[str, Any] = {}
        for t, i, operations in self.edges():
            label = f"{self.label}/{t}_{i}"
            names = self.options.restrict(label, zero_last(list(operations)))
            probs[label] = dict(zip(names, self._arch_alpha[label].softmax(-1).tolist()))
        return {key: value for key, value in probs.items() if key not in memo}


class EdgeNormalizedCell(MixedCell):
    """A cell of Search space-AGD: x_t = Σ_{i<t} p_{it} ō(x_i) (28) with p_{it} = softmax_i(β_{it}) (29).

    β is shared by the cells of a kind, starts at 0 and is an architecture parameter like α.
    """

    _arch_parameter_names = ["_arch_alpha", "_arch_beta"]

    def __init__(
        self,
        cell: Cell,
        memo: dict[str, Any],
        kwargs: dict[str, Any],
        initialization: Any,
        options: EdgeOptions = EdgeOptions(),
    ) -> None:
        super().__init__(cell, memo, kwargs, initialization, options)
        self._arch_beta = nn.ParameterDict()
        for t in range(2, 2 + self.num_nodes):
            key = f"{self.label}/{t}"
            memo.setdefault(f"{key}/beta", nn.Parameter(torch.zeros(t)))
            self._arch_beta[key] = memo[f"{key}/beta"]

    def edge_weights(self, t: int) -> Tensor:
        """Return p_{0t}, …, p_{t−1,t} (29)."""
        return self._arch_beta[f"{self.label}/{t}"].softmax(-1)

    def export_probs(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return softmax(α) of every edge and p of every node."""
        probs = super().export_probs(memo)
        for t in range(2, 2 + self.num_nodes):
            key = f"{self.label}/beta_{t}"
            if key not in memo:
                probs[key] = dict(enumerate(self.edge_weights(t).tolist()))
        return probs
