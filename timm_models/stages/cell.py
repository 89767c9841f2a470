"""The cell of a genotype, and the auxiliary classifier (§9.3)."""

# No postponed annotations here: torch.fx writes forward's into its code, where TorchScript must find them.

from typing import List

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from optinspired_plugins.cells.genotype import CellGenotype
from optinspired_plugins.cells.network import CellPlan, make_preprocessors
from optinspired_plugins.cells.operations import IDENTITY, NEGATIVE_IDENTITY, make_operation
from optinspired_plugins.memory.memory_format import align_gradient

from ..inference.folding import fold_all

__all__ = ["AuxiliaryHead", "Cell"]


class Cell(nn.Module):
    """A cell: the concatenation of nodes, each a sum of operations of earlier nodes.

    Args:
        genotype: the edges of each node.
        plan: channels and strides.
        drop_path_rate: rate at which an operation other than ± identity is dropped.
    """

    def __init__(self, genotype: CellGenotype, plan: CellPlan, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.preprocess0, self.preprocess1 = make_preprocessors(plan)
        edges = [edge for node in genotype for edge in node]
        self.is_last: List[bool] = [k == len(node) - 1 for node in genotype for k in range(len(node))]
        self.sources: List[int] = [edge.source for edge in edges]
        strides = [2 if plan.reduction and edge.source < 2 else 1 for edge in edges]
        self.ops = nn.ModuleList(
            make_operation(e.operation, plan.channels, stride) for e, stride in zip(edges, strides)
        )
        # A shortcut without an operation is never dropped: something of the node must remain.
        shortcuts = (IDENTITY, NEGATIVE_IDENTITY)
        self.droppable: List[bool] = [e.operation not in shortcuts or s == 2 for e, s in zip(edges, strides)]
        self.drop_path = DropPath(drop_path_rate)
        for i, module in enumerate((self.preprocess0, self.preprocess1)):
            if i not in self.sources:  # DDP needs a gradient of every weight that is trained
                module.requires_grad_(False)

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        """Return the nodes of c_{k−2} = s0 and c_{k−1} = s1, shape (batch, nodes · channels, height, width)."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        node = states[0]  # a tensor for TorchScript; the first edge replaces it
        for i, op in enumerate(self.ops):
            h = op(states[self.sources[i]])
            if self.droppable[i]:
                h = self.drop_path(h)
            node = h if i == 0 or self.is_last[i - 1] else node + h
            if self.is_last[i]:
                if not torch.jit.is_scripting():
                    align_gradient(node)
                states.append(node)
        return torch.cat(states[2:], 1)

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> "Cell":
        """Fold the normalisations into the convolutions before them, for evaluation."""
        fold_all(self)
        return self


class AuxiliaryHead(nn.Module):
    """The auxiliary classifier on features after two thirds of the cells.

    Args:
        channels: channels of the features.
        num_classes: number of classes, ≥ 1.
        stride: stride of the pooling: 3 for CIFAR's 8×8 features, 2 for ImageNet's 14×14.
        final_norm: normalise after the last convolution; the ImageNet form does not.
    """

    def __init__(self, channels: int, num_classes: int, stride: int, final_norm: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride, padding=0, count_include_pad=False),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768) if final_norm else nn.Identity(),
            nn.ReLU(),
        )
        self.fc = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (batch, num_classes); x must have the size that belongs to the stride."""
        return self.fc(self.features(x).flatten(1))
