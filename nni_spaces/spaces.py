"""The search spaces of section 9 as model spaces of NNI: Search space-HB, Search space-AGD, and DARTS's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nni.nas.nn.pytorch import Cell, ModelSpace
from nni.nas.space import current_model, model_context
from nni.nas.strategy import DARTS as StockDARTS
from nni.nas.strategy import Proxyless
from torch import Tensor, nn

from optinspired_plugins._checks import check_int
from optinspired_plugins.genotype import Genotype
from optinspired_plugins.operations import (
    DARTS_OPERATIONS,
    OPERATIONS,
    TABLE_6,
    ZERO,
    CellPlan,
    make_stem,
    plan_cells,
)

from .cells import EdgeNormalizedCell, HeavyBallCell, MixedCell, MixedLayer, Preprocessors, candidates
from .initialization import Initialization, RandomInit

__all__ = ["AGDSpace", "DARTSSpace", "HBSpace"]


class CellSpace(ModelSpace):
    """A network of cells to be chosen, on DARTS's skeleton (§9.3).

    Args:
        channels: channels of a node of the first cell; they double at both reductions.
        cells: number of cells, ≥ 3.
        nodes: nodes of a cell.
        num_classes: number of classes, ≥ 2.
        in_chans: channels of an image.
        stem: ``"cifar"`` or ``"imagenet"``.
        operations: names of the candidates, zero left out; ``None`` for the space's own.
        zero_in_space: make zero a candidate that a strategy without α may choose, the literal reading of Table 6. By
            default it has an α in a supernet and nothing else, so that no strategy can export it.
        initialization: how α begins; ``None`` for :class:`~nni_spaces.RandomInit`.

    Raises:
        ValueError: an argument is out of range.
    """

    rule: str
    default_operations: Sequence[str] = TABLE_6

    def __init__(
        self,
        channels: int = 16,
        cells: int = 8,
        nodes: int = 4,
        num_classes: int = 10,
        in_chans: int = 3,
        stem: str = "cifar",
        operations: Sequence[str] | None = None,
        zero_in_space: bool = False,
        initialization: Initialization | None = None,
    ) -> None:
        super().__init__()
        plans = plan_cells(cells, channels, nodes, stem)
        check_int("num_classes", num_classes, 2)
        check_int("in_chans", in_chans, 1)
        self.initialization = RandomInit() if initialization is None else initialization
        names = self._candidate_names(operations, zero_in_space)
        for slot in range(3):  # an initialisation that does not fit says so now, not when a search starts
            self.initialization.alpha(self.rule, slot, [*names, ZERO])
        self.stem0, self.stem1 = make_stem(stem, in_chans, channels)
        self.cells = nn.ModuleList(
            self.make_cell(names, plan, nodes, "reduce" if plan.reduction else "normal") for plan in plans
        )
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(nodes * plans[-1].channels, num_classes)

    def _candidate_names(self, operations: Sequence[str] | None, zero_in_space: bool) -> list[str]:
        names = list(self.default_operations if operations is None else operations)
        for name in names:
            if name not in OPERATIONS:
                raise ValueError(f"operations has {name!r}: must be of {', '.join(OPERATIONS)}")
        names = [name for name in names if name != ZERO] + ([ZERO] if zero_in_space else [])
        if len(set(names)) != len(names) or set(names) <= {ZERO}:
            raise ValueError(f"operations={operations!r}: must be distinct and hold one beside {ZERO!r}")
        return names

    def make_cell(self, operations: Sequence[str], plan: CellPlan, nodes: int, kind: str) -> nn.Module:
        """Return a cell of this space."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (batch, num_classes)."""
        s0 = self.stem0(x)
        s1 = self.stem1(s0)
        for cell in self.cells:
            s0, s1 = s1, cell([s0, s1])
        return self.fc(self.global_pool(s1).flatten(1))

    def freeze(self, sample: dict[str, Any]) -> nn.Module:
        """Return the network of a sample, built anew: its normalisations have scales, its weights are fresh."""
        with model_context(sample):
            return type(self)(*self.trace_args, **self.trace_kwargs)

    def genotype(self, sample: dict[str, Any]) -> Genotype:
        """Return a sample as a genotype.

        Raises:
            ValueError: the sample is not of this space, or chooses zero, which a genotype cannot hold.
        """
        genotype = Genotype.from_nni(sample)
        if genotype.rule != self.rule:
            raise ValueError(f"sample has rule {genotype.rule!r}: must be {self.rule!r}, that of {type(self).__name__}")
        return genotype


class HBSpace(CellSpace):
    """Search space-HB (23): a node takes two operations of the node before it and one of the one before that.

    Arguments and errors are those of :class:`CellSpace`; the candidates are Table 6's.
    """

    rule = "hb"

    def make_cell(self, operations: Sequence[str], plan: CellPlan, nodes: int, kind: str) -> nn.Module:
        """Return a cell of three edges a node."""
        return HeavyBallCell(operations, plan, nodes, kind)

    def extra_oneshot_hooks(self, strategy: Any) -> list[Any]:
        """Return the hooks that a differentiable strategy needs for α of zero and for the initialisation."""
        if not isinstance(strategy, StockDARTS) or isinstance(strategy, Proxyless):
            return []
        return [MixedLayer.hook(self.rule, self.initialization)]


class DARTSSpace(CellSpace):
    """DARTS's space (27), the paper's baseline: a node takes two operations of earlier ones.

    Arguments and errors are those of :class:`CellSpace`; the candidates are DARTS's.
    """

    rule = "agd"
    default_operations = DARTS_OPERATIONS
    mixed_cell: type[MixedCell] = MixedCell

    def make_cell(self, operations: Sequence[str], plan: CellPlan, nodes: int, kind: str) -> nn.Module:
        """Return NNI's cell of two chosen edges a node."""
        factories = {name: _Factory(name, plan) for name in operations}
        preprocessors = Preprocessors(plan, affine=current_model() is not None)
        return Cell(factories, nodes, 2, 2, "all", preprocessors, label=kind)

    def extra_oneshot_hooks(self, strategy: Any) -> list[Any]:
        """Return the hooks that a differentiable strategy needs for β, the initialisation and the derivation."""
        if isinstance(strategy, Proxyless):
            raise ValueError(
                f"strategy=Proxyless: NNI has no Proxyless for cells, and so none for {type(self).__name__}; use DARTS "
                "or GumbelDARTS, or HBSpace"
            )
        if not isinstance(strategy, StockDARTS):
            return []
        return [self.mixed_cell.hook(self.initialization)]


class AGDSpace(DARTSSpace):
    """Search space-AGD (28)-(29): DARTS's connections, with weights p on the edges.

    Arguments and errors are those of :class:`CellSpace`; the candidates are Table 6's.
    """

    default_operations = TABLE_6
    mixed_cell = EdgeNormalizedCell


class _Factory:
    """Makes an operation of an edge, as NNI's cells ask for them."""

    def __init__(self, name: str, plan: CellPlan) -> None:
        self.name, self.plan = name, plan

    def __call__(self, node: int, slot: int, source: int | None) -> nn.Module:
        return candidates([self.name], self.plan, source)[self.name]
