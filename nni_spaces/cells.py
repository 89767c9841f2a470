"""Cells of the spaces, and what differentiable strategies make of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from nni.mutable import label_scope
from nni.nas.nn.pytorch import Cell, LayerChoice
from nni.nas.nn.pytorch.cell import preprocess_cell_inputs
from nni.nas.oneshot.pytorch.supermodule.differentiable import DifferentiableMixedCell, DifferentiableMixedLayer
from nni.nas.space import current_model
from torch import Tensor, nn

from optinspired_plugins.genotype import heavy_ball_sources
from optinspired_plugins.operations import ZERO, CellPlan, make_operation, make_preprocessors

__all__ = ["EdgeNormalizedCell", "HeavyBallCell", "MixedCell", "MixedLayer", "Preprocessors"]


class Preprocessors(nn.Module):
    """Brings both inputs of a cell to its channels and size."""

    def __init__(self, plan: CellPlan, affine: bool) -> None:
        super().__init__()
        self.preprocess0, self.preprocess1 = make_preprocessors(plan, affine)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Return the two inputs, preprocessed."""
        return [self.preprocess0(inputs[0]), self.preprocess1(inputs[1])]


def candidates(operations: Sequence[str], plan: CellPlan, source: int | None) -> dict[str, nn.Module]:
    """The candidates of an edge from ``source``; ``None`` where it is not chosen yet.

    A supernet's normalisations have no scale and shift, and follow poolings too; a chosen network's are ordinary.
    """
    chosen = current_model() is not None
    stride = 2 if plan.reduction and (source is None or source < 2) else 1
    return {name: make_operation(name, plan.channels, stride, chosen, not chosen) for name in operations}


class HeavyBallCell(nn.Module):
    """A cell of Search space-HB (23): x_t = o_1(x_{t−1}) + o_2(x_{t−1}) + o_3(x_{t−2}).

    The choices are labelled ``{kind}/op_{t}_{k}``, k = 0, 1 from x_{t−1} and 2 from x_{t−2}, t from 2.

    Args:
        operations: names of the candidates.
        plan: channels and strides.
        nodes: number of nodes.
        kind: ``"normal"`` or ``"reduce"``; cells of a kind share their choices.
    """

    def __init__(self, operations: Sequence[str], plan: CellPlan, nodes: int, kind: str) -> None:
        super().__init__()
        self.preprocessors = Preprocessors(plan, affine=current_model() is not None)
        self.nodes = nn.ModuleList()
        with label_scope(kind):
            for t in range(2, 2 + nodes):
                edges = [
                    LayerChoice(candidates(operations, plan, source), label=f"op_{t}_{k}")
                    for k, source in enumerate(heavy_ball_sources(t))
                ]
                self.nodes.append(nn.ModuleList(edges))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Return the nodes, concatenated along channels."""
        states = self.preprocessors(inputs)
        for node in self.nodes:
            first, second, third = cast(nn.ModuleList, node)
            states.append(first(states[-1]) + second(states[-1]) + third(states[-2]))
        return torch.cat(states[2:], 1)


def zero_last(names: Sequence[str]) -> list[str]:
    """The operations that α speaks of: the candidates, and zero behind them if it is not one."""
    return [*names, *([] if ZERO in names else [ZERO])]


def strongest(names: Sequence[str], weights: Tensor) -> tuple[float, str]:
    """The weight and name of the strongest operation that is not zero."""
    return max((weight, name) for name, weight in zip(names, weights.tolist()) if name != ZERO)


class MixedLayer(DifferentiableMixedLayer):
    """An edge of the HB supernet: Σ_o softmax(α)_o o(x), (24)-(25), with zero among the operations.

    Zero has an α and no module, so that it can take weight in the search and cannot be exported.
    """

    def __init__(self, paths: dict[str, nn.Module], alpha: nn.Parameter, softmax: nn.Module, label: str) -> None:
        LayerChoice.__init__(self, paths, label=label)  # the parent's asks for as many α as paths
        self._arch_alpha, self._softmax = alpha, softmax

    @classmethod
    def hook(cls, rule: str, initialization: Any) -> Any:
        """Return a mutation hook that starts α as ``initialization`` says."""

        def mutate(module: nn.Module, name: str, memo: dict[str, Any], kwargs: dict[str, Any]) -> Any:
            if type(module) is not LayerChoice:
                return None
            choice: Any = module
            key = f"{choice.label}/alpha"
            if key not in memo:  # cells of a kind share it
                slot = int(choice.label.rpartition("_")[2])
                memo[key] = nn.Parameter(initialization.alpha(rule, slot, zero_last(choice.names)))
            return cls(choice.candidates, memo[key], kwargs.get("softmax", nn.Softmax(-1)), choice.label)

        return mutate

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted sum."""
        return mix(self._softmax(self._arch_alpha), [self[name] for name in self.names], self.names, x)

    def export(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return the strongest operation that is not zero."""
        if self.label in memo:
            return {}
        return {self.label: strongest(zero_last(self.names), self._arch_alpha)[1]}

    def export_probs(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return softmax(α), zero included."""
        if self.label in memo:
            return {}
        weights = self._arch_alpha.softmax(-1).tolist()
        return {self.label: dict(zip(zero_last(self.names), weights))}


def mix(weights: Tensor, operations: Sequence[nn.Module], names: Sequence[str], x: Tensor) -> Tensor:
    """Σ_o w_o o(x) over operations that are not zero; summed as they come, so that no stack of outputs is kept."""
    total: Tensor | None = None
    for weight, operation, name in zip(weights, operations, names):
        if name != ZERO:
            term = weight * operation(x)
            total = term if total is None else total + term
    assert total is not None
    return total


class MixedCell(DifferentiableMixedCell):
    """A cell of the DARTS supernet: x_t = Σ_{i<t} Σ_o softmax(α_{it})_o o(x_i), (24)-(25) and (27).

    NNI's cell adds an α for zero behind the candidates; so does this one, unless zero is a candidate.
    """

    def __init__(self, cell: Cell, memo: dict[str, Any], kwargs: dict[str, Any], initialization: Any) -> None:
        names = list(cast(dict, cell.op_candidates_factory))
        for t in range(2, 2 + cell.num_nodes):
            for i in range(t):
                key = f"{cell.label}/{t}_{i}/in_cell"
                if key not in memo:  # cells of a kind share it
                    memo[key] = nn.Parameter(initialization.alpha("agd", 0, zero_last(names)))
        super().__init__(
            cell.op_candidates_factory,
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

    @classmethod
    def hook(cls, initialization: Any) -> Any:
        """Return a mutation hook that starts α as ``initialization`` says."""

        def mutate(module: nn.Module, name: str, memo: dict[str, Any], kwargs: dict[str, Any]) -> Any:
            return cls(module, memo, kwargs, initialization) if type(module) is Cell else None

        return mutate

    def edge_weights(self, t: int) -> Tensor | None:
        """Return the weights of the edges into node t, shape (t,); ``None`` for 1."""
        return None

    def alphas(self, t: int) -> Iterator[Tensor]:
        """Yield α of each edge into node t."""
        return (self._arch_alpha[f"{self.label}/{t}_{i}"] for i in range(t))

    def forward(self, *inputs: Any) -> Any:
        """Return the nodes, concatenated along channels."""
        processed = preprocess_cell_inputs(self.num_predecessors, *inputs)
        states = self.preprocessor(processed)
        for t, edges in enumerate(cast(Any, self.ops), start=2):
            weights, total = self.edge_weights(t), None
            for i, (alpha, operations) in enumerate(zip(self.alphas(t), edges)):
                term = mix(self._softmax(alpha), list(operations.values()), self.op_names, states[i])
                term = term if weights is None else weights[i] * term
                total = term if total is None else total + term
            states.append(total)
        return self.postprocessor(torch.cat(states[2:], self.concat_dim), processed)

    def export(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return the strongest operations that are not zero, of distinct predecessors, by probability."""
        exported: dict[str, Any] = {}
        for t in range(2, 2 + self.num_nodes):
            weights, edges = self.edge_weights(t), []
            for i, alpha in enumerate(self.alphas(t)):
                probability = alpha.softmax(-1) * (1 if weights is None else weights[i])
                edges.append((*strongest(zero_last(self.op_names), probability), i))
            edges.sort(key=lambda edge: -edge[0])
            for k in range(self.num_ops_per_node):
                _, name, source = edges[k]
                exported[f"{self.label}/op_{t}_{k}"] = name
                exported[f"{self.label}/input_{t}_{k}"] = [source]
        return {key: value for key, value in exported.items() if key not in memo}

    def export_probs(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return softmax(α) of every edge, zero included."""
        probs: dict[str, Any] = {}
        for t in range(2, 2 + self.num_nodes):
            for i, alpha in enumerate(self.alphas(t)):
                probs[f"{self.label}/{t}_{i}"] = dict(zip(zero_last(self.op_names), alpha.softmax(-1).tolist()))
        return {key: value for key, value in probs.items() if key not in memo}


class EdgeNormalizedCell(MixedCell):
    """A cell of Search space-AGD: x_t = Σ_{i<t} p_{it} ō(x_i) (28) with p_{it} = softmax_i(β_{it}) (29).

    β is shared by the cells of a kind, starts at 0 and is an architecture parameter like α.
    """

    _arch_parameter_names = ["_arch_alpha", "_arch_beta"]

    def __init__(self, cell: Cell, memo: dict[str, Any], kwargs: dict[str, Any], initialization: Any) -> None:
        super().__init__(cell, memo, kwargs, initialization)
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
