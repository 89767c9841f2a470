"""The cell of an algorithm's search space, and the heavy ball's (23)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import nni_spaces._nni  # noqa: F401

import torch
from nni.mutable import label_scope
from nni.nas.nn.pytorch import LayerChoice
from nni.nas.space import current_model
from torch import Tensor, nn

from optinspired_plugins.cells.genotype import heavy_ball_sources
from optinspired_plugins.cells.labels import Label
from optinspired_plugins.cells.network import CellPlan

from .edges import EdgeOptions, MixedLayer, Preprocessors, candidates
from .mixed_op import Edge, mixed_nodes

__all__ = ["AlgorithmCell", "HeavyBallCell"]


class AlgorithmCell(nn.Module):
    """A cell whose nodes have the edges of an algorithm: x_t = Σ_k o_k(x_{s(t,k)}).

    The choices are labelled ``{kind}/op_{t}_{k}``, t from 2 and k from 0.

    Args:
        operations: names of the candidates.
        plan: channels and strides of the cell.
        sources: s(t, k), the sources of each node's edges.
        kind: ``"normal"`` or ``"reduce"``; cells of a kind share their choices.
        options: options of the edges.
    """

    def __init__(
        self,
        operations: Sequence[str],
        plan: CellPlan,
        sources: Sequence[Sequence[int]],
        kind: str,
        options: EdgeOptions = EdgeOptions(),
    ) -> None:
        super().__init__()
        used = {source for node in sources for source in node}
        self.preprocessors = Preprocessors(plan, current_model() is not None, used)
        self.options, self.sources = options, sources
        self.nodes = nn.ModuleList()
        with label_scope(kind):
            for t, node in enumerate(sources, start=2):
                edges = []
                for k, source in enumerate(node):
                    label = Label(kind, "op", t, k)
                    names = options.restrict(str(label), operations)
                    edges.append(LayerChoice(candidates(names, plan, source, options), label=label.name))
                self.nodes.append(nn.ModuleList(edges))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Return the nodes, concatenated along channels."""
        states = self.preprocessors(inputs)
        # A differentiable strategy has replaced the edges by mixed ones.
        if all(isinstance(edge, MixedLayer) for node in self.nodes for edge in cast(nn.ModuleList, node)):
            return torch.cat(self._mixtures(states), 1)
        for node, sources in zip(self.nodes, self.sources):
            first, *others = [edge(states[i]) for edge, i in zip(cast(nn.ModuleList, node), sources)]
            states.append(sum(others, first))
        return torch.cat(states[2:], 1)

    def _mixtures(self, states: list[Tensor]) -> list[Tensor]:
        """Return the nodes with mixed edges (24)."""
        nodes = [
            [
                Edge(i, edge.weights(), edge.operations(), edge.edge_weight())
                for edge, i in zip(cast(Any, node), sources)
            ]
            for node, sources in zip(self.nodes, self.sources)
        ]
        return mixed_nodes(states, nodes, self.options.partial_channels)


class HeavyBallCell(AlgorithmCell):
    """A cell of Search space-HB (23): x_t = o_1(x_{t−1}) + o_2(x_{t−1}) + o_3(x_{t−2}).

    Its arguments are described in :class:`AlgorithmCell`; ``nodes`` is the number of nodes.
    """

    def __init__(
        self, operations: Sequence[str], plan: CellPlan, nodes: int, kind: str, options: EdgeOptions = EdgeOptions()
    ) -> None:
        sources = [heavy_ball_sources(t) for t in range(2, 2 + nodes)]
        super().__init__(operations, plan, sources, kind, options)
