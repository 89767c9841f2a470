"""The cell of Search space-HB (23)."""

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
from .mixed_op import NodeInput, NodeSum

__all__ = ["HeavyBallCell"]


class HeavyBallCell(nn.Module):
    """A cell of Search space-HB (23): x_t = o_1(x_{t−1}) + o_2(x_{t−1}) + o_3(x_{t−2}).

    The choices are labelled ``{kind}/op_{t}_{k}``, k = 0, 1 from x_{t−1} and 2 from x_{t−2}, t from 2.

    Args:
        operations: names of the candidates.
        plan: channels and strides of the cell.
        nodes: number of nodes.
        kind: ``"normal"`` or ``"reduce"``; cells of a kind share their choices.
        options: options of the edges.
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
        for node in self.nodes:
            first, second, third = cast(nn.ModuleList, node)
            states.append(first(states[-1]) + second(states[-1]) + third(states[-2]))
        return torch.cat(states[2:], 1)

    def _mixtures(self, states: list[Tensor]) -> list[Tensor]:
        """Return the nodes (23) with mixed edges (24)."""
        parts = self.options.partial_channels
        sources = [NodeInput(state, parts) for state in states]
        for t, node in enumerate(self.nodes, start=2):
            node_sum = NodeSum(parts)
            for edge, i in zip(cast(Any, node), heavy_ball_sources(t)):
                node_sum.add_edge(edge.weights(), edge.operations(), sources[i])
            states.append(node_sum.value())
            sources.append(NodeInput(states[-1], parts))
        return states[2:]
