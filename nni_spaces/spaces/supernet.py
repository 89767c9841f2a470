"""The cells of the DARTS and AGD supernets (24)-(29)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import nni_spaces._nni  # noqa: F401

import torch
from nni.nas.nn.pytorch import Cell
from nni.nas.nn.pytorch.cell import preprocess_cell_inputs
from nni.nas.oneshot.pytorch.supermodule.differentiable import DifferentiableMixedCell
from nni.nas.oneshot.pytorch.supermodule.sampling import PathSamplingCell
from torch import Tensor, nn

from optinspired_plugins.cells.labels import Label

from .derivation import derive
from .edges import EdgeOptions, Start, relaxed, with_zero
from .mixed_op import Edge, mixed_nodes

__all__ = ["EdgeNormalizedCell", "MixedCell"]


class MixedCell(DifferentiableMixedCell):
    """A cell of the DARTS supernet: x_t = Σ_{i<t} Σ_o softmax(α_{it})_o o(x_i), (24)-(25) and (27).

    As in NNI's cell, α has an entry for zero after the candidates.
    """

    def __init__(
        self,
        cell: Cell,
        memo: dict[str, Any],
        kwargs: dict[str, Any],
        start: Start,
        options: EdgeOptions = EdgeOptions(),
    ) -> None:
        names = list(cast(dict, cell.op_candidates_factory))
        labels = [edge_label(cell, t, i) for t in range(2, 2 + cell.num_nodes) for i in range(t)]
        for label in labels:
            key = f"{label}/in_cell"
            if key not in memo:  # cells of a kind share it
                memo[key] = start.alpha(label, options.restrict(label, with_zero(names)))
        PathSamplingCell.__init__(  # the parent's __init__ needs one α per candidate of the cell
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
            for name in set(names) - set(options.restrict(edge_label(self, t, i), names)):
                del operations[name]

    @classmethod
    def hook(cls, start: Start, options: EdgeOptions) -> Any:
        """Return a mutation hook that replaces NNI's cell by this one."""

        def mutate(module: nn.Module, name: str, memo: dict[str, Any], kwargs: dict[str, Any]) -> Any:
            return cls(module, memo, kwargs, start, options) if type(module) is Cell else None

        return mutate

    def edges(self) -> Iterator[tuple[int, int, nn.ModuleDict]]:
        """Yield node, source and operations of each edge."""
        for t, sources in enumerate(cast(Any, self.ops), start=2):
            for i, operations in enumerate(sources):
                yield t, i, operations

    def edge_weights(self, t: int) -> Tensor | None:
        """Return the weights of the edges into node t, shape (t,); ``None`` if all are 1."""
        return None

    def forward(self, *inputs: Any) -> Any:
        """Return the nodes, concatenated along channels."""
        processed = preprocess_cell_inputs(self.num_predecessors, *inputs)
        nodes = [list(self._edges_into(t, edges)) for t, edges in enumerate(cast(Any, self.ops), start=2)]
        states = mixed_nodes(self.preprocessor(processed), nodes, self.options.partial_channels)
        return self.postprocessor(torch.cat(states, self.concat_dim), processed)

    def _edges_into(self, t: int, edges: Any) -> Iterator[Edge]:
        weights = self.edge_weights(t)
        for i, operations in enumerate(edges):
            alpha = self._softmax(self._arch_alpha[edge_label(self, t, i)])
            yield Edge(i, alpha, operations, None if weights is None else weights[i])

    def probabilities(self) -> dict[str, Tensor]:
        """Return softmax(α) of every edge by label, with its gradient."""
        return {label: relaxed(alpha, self._softmax) for label, alpha in self._arch_alpha.items()}

    def export(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return the strongest edges of each node, with their strongest operations other than zero."""
        sample = derive(self.export_probs({}), self.num_ops_per_node)
        return {key: value for key, value in sample.items() if key not in memo}

    def export_probs(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return softmax(α) of every edge, including zero."""
        probs: dict[str, Any] = {}
        for t, i, operations in self.edges():
            label = edge_label(self, t, i)
            names = self.options.restrict(label, with_zero(list(operations)))
            probs[label] = dict(zip(names, relaxed(self._arch_alpha[label], self._softmax).tolist()))
        return {key: value for key, value in probs.items() if key not in memo}


def edge_label(cell: Cell, node: int, source: int) -> str:
    """Return the label of an edge's α."""
    return str(Label(cell.label, "edge", node, source))


class EdgeNormalizedCell(MixedCell):
    """A cell of Search space-AGD: x_t = Σ_{i<t} p_{it} ō(x_i) (28) with p_{it} = softmax_i(β_{it}) (29).

    β starts at 0 unless the initialisation has edge weights. It is an architecture parameter like α, and is shared by
    the cells of a kind.
    """

    _arch_parameter_names = ["_arch_alpha", "_arch_beta"]

    def __init__(
        self,
        cell: Cell,
        memo: dict[str, Any],
        kwargs: dict[str, Any],
        start: Start,
        options: EdgeOptions = EdgeOptions(),
    ) -> None:
        super().__init__(cell, memo, kwargs, start, options)
        self._arch_beta = nn.ParameterDict()
        for t in range(2, 2 + self.num_nodes):
            key = f"{self.label}/{t}"
            if f"{key}/beta" not in memo:
                memo[f"{key}/beta"] = start.beta(self.label, t)
            self._arch_beta[key] = memo[f"{key}/beta"]

    def edge_weights(self, t: int) -> Tensor:
        """Return p_{0t}, …, p_{t−1,t} (29)."""
        return self._arch_beta[f"{self.label}/{t}"].softmax(-1)

    def export_probs(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return softmax(α) of every edge and p of every node."""
        probs = super().export_probs(memo)
        for t in range(2, 2 + self.num_nodes):
            key = str(Label(self.label, "beta", t))
            if key not in memo:
                probs[key] = dict(enumerate(self.edge_weights(t).tolist()))
        return probs
