"""The search spaces of section 9 as NNI's model spaces: HB, AGD and DARTS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import nni_spaces._nni  # noqa: F401

import torch
from nni.nas.nn.pytorch import Cell, ModelSpace
from nni.nas.space import current_model, model_context
from nni.nas.strategy import DARTS as StockDARTS
from nni.nas.strategy import Proxyless
from torch import Tensor, nn

from optinspired_plugins._checks import check_int, check_rate
from optinspired_plugins.cells.genotype import EDGES, Genotype
from optinspired_plugins.cells.labels import Label, edge_labels, slot_labels
from optinspired_plugins.cells.network import CellPlan, make_stem, plan_cells
from optinspired_plugins.cells.operations import DARTS_OPERATIONS, OPERATIONS, TABLE_6, ZERO
from optinspired_plugins.memory.recompute import recompute

from .._checks import check_partial_channels
from .edges import EdgeOptions, MixedLayer, Preprocessors, candidates, proxyless_hook, with_zero
from .heavy_ball_cell import HeavyBallCell
from .initialization import Initialization, RandomInit, ZeroInit, check_initialization, initial_logits
from .supernet import EdgeNormalizedCell, MixedCell

__all__ = ["AGDSpace", "CellSpace", "DARTSSpace", "HBSpace"]

# Where NNI's cell chooses sources, candidates of single edges need a strategy with α.
ONE_CANDIDATE_LIST = (
    "NNI's cell has one list of candidates for strategies without α; use DARTS, GumbelDARTS, HBSpace or operations"
)


class CellSpace(ModelSpace):
    """A network of searched cells, arranged as in DARTS (§9.3).

    Args:
        channels: channels of a node of the first cell; they double at both reductions.
        cells: number of cells, ≥ 3.
        nodes: nodes of a cell.
        num_classes: number of classes, ≥ 2.
        in_chans: channels of an image.
        stem: ``"cifar"`` or ``"imagenet"``.
        operations: names of the candidates; ``None`` for the space's own. Zero is left out: it has an α in a supernet
            and no module, so that no strategy can export it.
        initialization: the initial α; ``None`` for :class:`~nni_spaces.RandomInit`. Strategies without α start with
            equal probabilities and accept only :class:`~nni_spaces.ZeroInit` or ``None``.
        partial_channels: K of PC-DARTS (Xu et al. 2020): a supernet mixes operations on 1/K of the channels of an edge
            and passes the other channels, :func:`~nni_spaces.spaces.mixed_op.mixed_op`. A chosen network uses all
            channels. K > 1 needs DARTS or GumbelDARTS.
        skip_dropout: initial rate of P-DARTS's dropout after skip connections of a supernet (Chen et al. 2019); our
            DARTS and GumbelDARTS lower it to 0 by the last epoch.
        allowed: the candidates of single edges, by label as in ``export_probs``: ``"normal/op_2_0"`` in HBSpace,
            ``"normal/3_1"`` in the other spaces, ``"reduce/…"``. Other candidates of these edges are not built, and
            zero has an entry in α only if it is named. Edges without an entry have all candidates.
        grad_checkpointing: as in :meth:`set_grad_checkpointing`.

    Raises:
        ValueError: an argument is out of range, or ``initialization`` returns wrong values.
        TypeError: ``initialization`` has no method ``alpha``.
    """

    rule: str
    default_operations: Sequence[str] = TABLE_6
    advice = ""  # ends the error of a sample that is not allowed

    def __init__(
        self,
        channels: int = 16,
        cells: int = 8,
        nodes: int = 4,
        num_classes: int = 10,
        in_chans: int = 3,
        stem: str = "cifar",
        operations: Sequence[str] | None = None,
        initialization: Initialization | None = None,
        partial_channels: int = 1,
        skip_dropout: float = 0.0,
        allowed: Mapping[str, Sequence[str]] | None = None,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = grad_checkpointing
        plans = plan_cells(cells, channels, nodes, stem)
        check_partial_channels(partial_channels, channels)
        check_rate("skip_dropout", skip_dropout)
        check_int("num_classes", num_classes, 2)
        check_int("in_chans", in_chans, 1)
        self.initialization = RandomInit() if initialization is None else initialization
        self.has_initialization = initialization is not None
        check_initialization(self.initialization)
        names = self._candidate_names(operations)
        for label in islice(self.edge_labels(nodes), 3):  # an initialisation that does not fit fails here
            initial_logits(self.initialization, self.rule, label, with_zero(names))
        self._check_allowed(allowed or {}, with_zero(names), nodes)
        self.operations, self.options = names, EdgeOptions(partial_channels, skip_dropout, allowed or {})
        sizes = dict(channels=channels, cells=cells, nodes=nodes, num_classes=num_classes, in_chans=in_chans)
        self.sizes, self.stem = {name: int(value) for name, value in sizes.items()}, stem
        self.stem0, self.stem1 = make_stem(stem, in_chans, channels)
        self.cells = nn.ModuleList(
            self.make_cell(names, plan, nodes, "reduce" if plan.reduction else "normal") for plan in plans
        )
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(nodes * plans[-1].channels, num_classes)

    def _candidate_names(self, operations: Sequence[str] | None) -> list[str]:
        names = list(self.default_operations if operations is None else operations)
        for name in names:
            if name not in OPERATIONS:
                raise ValueError(f"operations has {name!r}: must be of {', '.join(OPERATIONS)}")
        names = [name for name in names if name != ZERO]
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"operations={operations!r}: must be distinct and hold one beside {ZERO!r}")
        return names

    def _check_allowed(self, allowed: Mapping[str, Sequence[str]], names: Sequence[str], nodes: int) -> None:
        labels = list(self.edge_labels(nodes))
        for label, chosen in allowed.items():
            if label not in labels:
                raise ValueError(f"allowed has {label!r}: must be an edge, {labels[0]!r} to {labels[-1]!r}")
            if len(set(chosen)) != len(chosen) or not set(chosen) <= set(names) or set(chosen) <= {ZERO}:
                choice = ", ".join(names)
                raise ValueError(f"allowed[{label!r}]={chosen!r}: must be distinct of {choice}, one beside {ZERO!r}")

    def edge_labels(self, nodes: int) -> Iterator[str]:
        """Yield the labels of α of all edges."""
        raise NotImplementedError

    def make_cell(self, operations: Sequence[str], plan: CellPlan, nodes: int, kind: str) -> nn.Module:
        """Return a cell of this space."""
        raise NotImplementedError

    def has_our_supernet(self, strategy: Any) -> bool:
        """Return True if our supernet is built for a strategy.

        Raises:
            ValueError: the strategy does not support the options of this space.
        """
        name, parts, rate = type(strategy).__name__, self.options.partial_channels, self.options.skip_dropout
        has_supernet = isinstance(strategy, StockDARTS) and not isinstance(strategy, Proxyless)
        if parts > 1 and not has_supernet:
            raise ValueError(f"partial_channels={parts} with strategy={name}: must be 1, or use DARTS or GumbelDARTS")
        if rate and getattr(strategy, "order", 1) == 2:
            # The difference of two passes would mostly be the difference of their dropout masks.
            raise ValueError(f"skip_dropout={rate} with strategy={name}(order=2): must be 0, or order 1")
        if (
            self.has_initialization
            and not isinstance(strategy, StockDARTS)
            and not isinstance(self.initialization, ZeroInit)
        ):
            raise ValueError(
                f"initialization={self.initialization!r} with strategy={name}, which has no α to begin with: must be "
                "None, or use DARTS, GumbelDARTS or Proxyless"
            )
        return has_supernet

    def check_sampled(self, strategy: Any) -> None:
        """ValueError where an option of this space has no effect on networks that a strategy samples."""
        self.has_our_supernet(strategy)
        if self.options.skip_dropout:
            raise ValueError(
                f"skip_dropout={self.options.skip_dropout} with strategy={type(strategy).__name__}: must be 0, only "
                "supernets have it; use DARTS or GumbelDARTS"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (batch, num_classes)."""
        s0 = self.stem0(x)
        s1 = self.stem1(s0)
        for cell in self.cells:
            s0, s1 = s1, self._run(cell, [s0, s1])
        return self.fc(self.global_pool(s1).flatten(1))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Store only the inputs of cells, and recompute each cell in the backward pass.

        The result is the same: running statistics are updated once, and random numbers are drawn once.
        """
        self.grad_checkpointing = enable

    def _run(self, cell: nn.Module, inputs: list[Tensor]) -> Tensor:
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
            return cell(inputs)
        return recompute(cell, cell, inputs)

    def freeze(self, sample: dict[str, Any]) -> nn.Module:
        """Build the network of a sample; its normalisations have scales, and its weights are new.

        Raises:
            ValueError: an edge has an operation that ``allowed`` excludes.
        """
        self._check_sample(sample)
        with model_context(sample):
            return type(self)(*self.trace_args, **self.trace_kwargs)

    def _check_sample(self, sample: dict[str, Any]) -> None:
        for slot in slot_labels(self.sizes["nodes"], EDGES[self.rule]) if self.options.allowed else ():
            if (name := sample.get(str(slot))) is not None:
                names = self.options.allowed.get(str(self.edge_label(sample, slot)), [name])
                if name not in names:
                    raise ValueError(f"sample has {slot}={name!r}: must be of {', '.join(names)}{self.advice}")

    def edge_label(self, sample: dict[str, Any], slot: Label) -> Label:
        """Return the label of the edge that has the operation of a sample's slot."""
        return slot

    def describe(self) -> dict[str, Any]:
        """Return the arguments that determine the networks of this space, as values for JSON."""
        allowed = {label: list(names) for label, names in self.options.allowed.items()}
        return {**self.sizes, "stem": self.stem, "operations": self.operations, "allowed": allowed}

    def genotype(self, sample: dict[str, Any]) -> Genotype:
        """Return a sample as a genotype.

        Raises:
            ValueError: the sample belongs to another space, or contains zero, which a genotype cannot hold.
        """
        genotype = Genotype.from_nni(sample)
        if genotype.rule != self.rule:
            raise ValueError(
                f"sample has rule {genotype.rule!r}: must be {self.rule!r}, the rule of {type(self).__name__}"
            )
        return genotype


class HBSpace(CellSpace):
    """Search space-HB (23): x_t = o_1(x_{t−1}) + o_2(x_{t−1}) + o_3(x_{t−2}).

    Its arguments are described in :class:`CellSpace`; the candidates are the operations of Table 6.
    """

    rule = "hb"

    def make_cell(self, operations: Sequence[str], plan: CellPlan, nodes: int, kind: str) -> nn.Module:
        """Return a cell with three edges per node."""
        return HeavyBallCell(operations, plan, nodes, kind, self.options)

    def edge_labels(self, nodes: int) -> Iterator[str]:
        """Yield the labels of α of all edges."""
        return map(str, slot_labels(nodes, EDGES[self.rule]))

    def extra_oneshot_hooks(self, strategy: Any) -> list[Any]:
        """Return the mutation hooks of a strategy, for α of zero and the initialisation."""
        if self.has_our_supernet(strategy):
            return [MixedLayer.hook(self.rule, self.initialization, self.operations, self.options)]
        if isinstance(strategy, Proxyless) and self.has_initialization:
            return [proxyless_hook(self.initialization, self.operations)]
        return []


class DARTSSpace(CellSpace):
    """DARTS's space (27), the paper's baseline: a node has two operations on earlier nodes.

    Its arguments are described in :class:`CellSpace`; the candidates are DARTS's. With partial channels the edges have
    weights as in :class:`AGDSpace`, the edge normalisation of PC-DARTS (Xu et al. 2020).
    """

    rule = "agd"
    default_operations = DARTS_OPERATIONS
    mixed_cell: type[MixedCell] = MixedCell
    advice = f": {ONE_CANDIDATE_LIST}"

    def make_cell(self, operations: Sequence[str], plan: CellPlan, nodes: int, kind: str) -> nn.Module:
        """Return NNI's cell with two chosen edges per node."""
        factories = {name: _OperationFactory(name, plan, self.options) for name in operations}
        preprocessors = Preprocessors(plan, affine=current_model() is not None)
        return Cell(factories, nodes, EDGES[self.rule], 2, "all", preprocessors, label=kind)

    def edge_labels(self, nodes: int) -> Iterator[str]:
        """Yield the labels of α of all edges."""
        return map(str, edge_labels(nodes))

    def edge_label(self, sample: dict[str, Any], slot: Label) -> Label:
        """Return the label of the edge that has the operation of a sample's slot."""
        (source,) = sample[str(slot._replace(choice="input"))]
        return slot._replace(choice="edge", position=source)

    def has_our_supernet(self, strategy: Any) -> bool:
        """Return True if our supernet is built for a strategy, as in :class:`CellSpace`."""
        has_supernet = super().has_our_supernet(strategy)
        if self.options.allowed and not has_supernet:
            raise ValueError(f"allowed with strategy={type(strategy).__name__}{self.advice}")
        return has_supernet

    def extra_oneshot_hooks(self, strategy: Any) -> list[Any]:
        """Return the mutation hooks of a strategy, for β, the initialisation and the derivation."""
        if isinstance(strategy, Proxyless):
            raise ValueError(
                f"strategy=Proxyless: NNI has no Proxyless for cells, and so none for {type(self).__name__}; use DARTS "
                "or GumbelDARTS, or HBSpace"
            )
        if not self.has_our_supernet(strategy):
            return []
        cell = EdgeNormalizedCell if self.options.partial_channels > 1 else self.mixed_cell
        return [cell.hook(self.initialization, self.options)]


class AGDSpace(DARTSSpace):
    """Search space-AGD (28)-(29): DARTS's connections, with weights p on the edges.

    Its arguments are described in :class:`CellSpace`; the candidates are the operations of Table 6.
    """

    default_operations = TABLE_6
    mixed_cell = EdgeNormalizedCell


class _OperationFactory:
    """Create an operation of an edge, in the interface of NNI's cells."""

    def __init__(self, name: str, plan: CellPlan, options: EdgeOptions) -> None:
        self.name, self.plan, self.options = name, plan, options

    def __call__(self, node: int, slot: int, source: int | None) -> nn.Module:
        return candidates([self.name], self.plan, source, self.options)[self.name]
