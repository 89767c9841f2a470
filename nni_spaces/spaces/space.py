"""Search spaces of algorithms as NNI's model spaces; HB, AGD and DARTS of section 9 are three of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import nni_spaces._nni  # noqa: F401

import torch
from nni.nas.nn.pytorch import Cell, ModelSpace
from nni.nas.space import current_model, model_context
from nni.nas.strategy import DARTS as StockDARTS
from nni.nas.strategy import ENAS, Proxyless
from torch import Tensor, nn

from optinspired_plugins._checks import check_int, check_rate
from optinspired_plugins.cells.genotype import REGISTER, Genotype
from optinspired_plugins.cells.labels import Label
from optinspired_plugins.cells.network import CellPlan, make_stem, plan_cells
from optinspired_plugins.cells.operations import DARTS_OPERATIONS, OPERATIONS, TABLE_6, ZERO, check_operation
from optinspired_plugins.counting import Count, count_network
from optinspired_plugins.memory.recompute import recompute

from .._checks import check_partial_channels
from .algorithm_cell import AlgorithmCell
from .cost import ImageSize, edge_counts, height_and_width
from .edges import (
    EdgeOptions,
    MixedLayer,
    Preprocessors,
    Start,
    WeightedLayer,
    candidates,
    proxyless_hook,
    with_zero,
)
from .initialization import (
    AlgorithmInit,
    Initialization,
    RandomInit,
    ZeroInit,
    check_edges,
    check_initialization,
    initial_logits,
)
from .structure import CellStructure
from .supernet import EdgeNormalizedCell, MixedCell
from .trainers import check_trainer

__all__ = ["AGDSpace", "AlgorithmSpace", "CellSpace", "DARTSSpace", "HBSpace"]

# Where NNI's cell chooses sources, candidates of single edges need a strategy with α.
ONE_CANDIDATE_LIST = (
    "NNI's cell has one list of candidates for strategies without α; use DARTS, GumbelDARTS, HBSpace or operations"
)


class CellSpace(ModelSpace):
    """A network of searched cells, arranged as in DARTS (§9.3).

    A subclass has the ``structure`` of its cells. The edges of a node are fixed, or the search chooses their sources.

    Args:
        channels: channels of a node of the first cell; they double at both reductions.
        cells: number of cells, ≥ 3.
        nodes: nodes of a cell.
        num_classes: number of classes; 1 for one output.
        in_chans: channels of an image.
        stem: ``"cifar"`` or ``"imagenet"``.
        operations: names of the candidates, of Table 6 or by
            :func:`~optinspired_plugins.cells.operations.register_operation`; ``None`` for the space's own. Zero is left
            out: it has an α in a supernet and no module, so that no strategy can export it.
        initialization: the initial α; ``None`` for :class:`~nni_spaces.RandomInit`. Strategies without α start with
            equal probabilities and accept only :class:`~nni_spaces.ZeroInit` or ``None``.
        partial_channels: K of PC-DARTS (Xu et al. 2020): a supernet mixes operations on 1/K of the channels of an edge
            and passes the other channels, :func:`~nni_spaces.spaces.mixed_op.mixed_op`. A chosen network uses all
            channels. K > 1 needs DARTS or GumbelDARTS.
        skip_dropout: initial rate of P-DARTS's dropout after skip connections of a supernet (Chen et al. 2019); our
            DARTS and GumbelDARTS lower it to 0 by the last epoch.
        allowed: the candidates of single edges, by label as in ``export_probs``: ``"normal/op_2_0"`` in HBSpace,
            ``"normal/3_1"`` in spaces that choose sources, ``"reduce/…"``. Other candidates of these edges are not
            built, and zero has an entry in α only if it is named. Edges without an entry have all candidates.
        grad_checkpointing: as in :meth:`set_grad_checkpointing`.

    Raises:
        ValueError: an argument is out of range, or ``initialization`` returns wrong values.
        TypeError: ``initialization`` has no method ``alpha``.
    """

    structure: CellStructure
    default_operations: Sequence[str] = TABLE_6
    default_initialization: Initialization = RandomInit()

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
        check_int("num_classes", num_classes, 1)
        check_int("in_chans", in_chans, 1)
        self.initialization = self.default_initialization if initialization is None else initialization
        self.has_initialization = initialization is not None
        check_initialization(self.initialization)
        names = self._candidate_names(operations)
        for name in [name for name in names if name not in TABLE_6]:
            check_operation(name, channels // partial_channels)
        self.rule, self.chooses_sources = self.structure.rule, self.structure.chooses(nodes)
        self.sources, self.edges = self.structure.pattern(nodes).sources, self.structure.edges(nodes)
        if current_model() is None:  # a chosen network has no α
            self._check_start(names)
        else:
            check_trainer()
        self._check_allowed(allowed or {}, with_zero(names), nodes)
        self.operations, self.options = names, EdgeOptions(partial_channels, skip_dropout, allowed or {})
        sizes = dict(channels=channels, cells=cells, nodes=nodes, num_classes=num_classes, in_chans=in_chans)
        self._counts: dict[tuple[int, int], Count] = {}
        self.sizes, self.stem = {name: int(value) for name, value in sizes.items()}, stem
        self.stem0, self.stem1 = make_stem(stem, in_chans, channels)
        self.cells = nn.ModuleList(
            self.make_cell(names, plan, nodes, "reduce" if plan.reduction else "normal") for plan in plans
        )
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(nodes * plans[-1].channels, num_classes)

    def _check_start(self, names: Sequence[str]) -> None:
        """ValueError where the initialisation does not fit the space."""
        for label in islice(self.edges, 3):
            initial_logits(self.initialization, self.rule, label, with_zero(names), self.edges[label])
        check_edges(self.initialization, self.edges.values(), names)

    def _candidate_names(self, operations: Sequence[str] | None) -> list[str]:
        names = list(self.default_operations if operations is None else operations)
        for name in names:
            if name not in OPERATIONS:
                raise ValueError(f"operations has {name!r}: must be of {', '.join(OPERATIONS)}, {REGISTER}")
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
        yield from self.structure.edges(nodes)

    def make_cell(self, operations: Sequence[str], plan: CellPlan, nodes: int, kind: str) -> nn.Module:
        """Return a cell: NNI's where sources are chosen, and otherwise one with the algorithm's edges."""
        if not self.chooses_sources:
            return AlgorithmCell(operations, plan, self.sources, kind, self.options)
        factories: Any = {name: _OperationFactory(name, plan, self.options) for name in operations}
        preprocessors = Preprocessors(plan, affine=current_model() is not None)
        return Cell(factories, nodes, self.structure.keep or 0, 2, "all", preprocessors, label=kind)

    def extra_oneshot_hooks(self, strategy: Any) -> list[Any]:
        """Return the mutation hooks of a strategy, for α of zero, β, the initialisation and the derivation."""
        if isinstance(strategy, ENAS):
            raise ValueError(
                "strategy=ENAS: NNI 3.0 unpacks its batches as Lightning before 2.1 made them: must be DARTS, "
                "GumbelDARTS or RandomOneShot, or PolicyBasedRL, which trains every network by itself"
            )
        start = Start(self.initialization, self.rule, self.operations, self.edges)
        if self.chooses_sources and isinstance(strategy, Proxyless):
            raise ValueError(
                f"strategy=Proxyless: NNI has no Proxyless for cells, and so none for {type(self).__name__}; use DARTS "
                "or GumbelDARTS, or HBSpace"
            )
        if self.has_our_supernet(strategy):
            if not self.chooses_sources:
                return [(WeightedLayer if self.structure.edge_weights else MixedLayer).hook(start, self.options)]
            has_beta = self.structure.edge_weights or self.options.partial_channels > 1
            return [(EdgeNormalizedCell if has_beta else MixedCell).hook(start, self.options)]
        starts_at_random = isinstance(self.initialization, RandomInit) and not self.has_initialization
        return [proxyless_hook(start)] if isinstance(strategy, Proxyless) and not starts_at_random else []

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
        if self.chooses_sources and self.options.allowed and not has_supernet:
            raise ValueError(f"allowed with strategy={name}: {ONE_CANDIDATE_LIST}")
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

    def count(self, sample: dict[str, Any], size: ImageSize = 32) -> Count:
        """Return parameters and multiply-accumulates (MACs) of the network of a sample, which is not built.

        Args:
            sample: a sample; :meth:`~optinspired_plugins.Genotype.to_nni` converts a genotype.
            size: side of the images, or height and width.

        Raises:
            ValueError: the sample does not belong to this space, or ``size`` is out of range.
        """
        self._check_sample(sample)
        self.genotype(sample)
        return self._around_cells(size).plus(self._in_cells(sample, size))

    def candidate_counts(self, size: ImageSize = 32) -> dict[str, dict[str, Count]]:
        """Return parameters and MACs of each candidate of each edge, by the label of its α and in the order of α.

        They are counted in a derived network and summed over the cells that share α; zero has none.

        Args:
            size: side of the images, or height and width.

        Raises:
            ValueError: ``size`` is out of range.
        """
        sizes, names = self.sizes, with_zero(self.operations)
        plans = plan_cells(sizes["cells"], sizes["channels"], sizes["nodes"], self.stem)
        sources = {label: edge.source for label, edge in self.edges.items()}
        allowed = {label: self.options.restrict(label, names) for label in sources}
        return edge_counts(plans, self.stem, sources, allowed, size)

    def _in_cells(self, sample: dict[str, Any], size: ImageSize) -> Count:
        """Return the size of the operations of a sample."""
        table, total = self.candidate_counts(size), Count(0, 0)
        for slot in self.structure.slots(self.sizes["nodes"]):
            total = total.plus(table[str(self.edge_label(sample, slot))][sample[str(slot)]])
        return total

    def _around_cells(self, size: ImageSize) -> Count:
        """Return the size of a network without the operations of its sample, the same for all samples."""
        if (key := height_and_width(size)) not in self._counts:
            sample = {label: choice.default() for label, choice in self.simplify().items()}
            with torch.device("meta"), model_context(sample):
                network = type(self)(*self.trace_args, **self.trace_kwargs)
            whole = count_network(network, (self.sizes["in_chans"], *height_and_width(size)))
            self._counts[key] = whole.plus(self._in_cells(sample, size), -1)
        return self._counts[key]

    def _check_sample(self, sample: dict[str, Any]) -> None:
        for slot in self.structure.slots(self.sizes["nodes"]) if self.options.allowed else ():
            if (name := sample.get(str(slot))) is not None:
                names = self.options.allowed.get(str(self.edge_label(sample, slot)), [name])
                if name not in names:
                    advice = f": {ONE_CANDIDATE_LIST}" if self.chooses_sources else ""
                    raise ValueError(f"sample has {slot}={name!r}: must be of {', '.join(names)}{advice}")

    def edge_label(self, sample: dict[str, Any], slot: Label) -> Label:
        """Return the label of the edge that has the operation of a sample's slot."""
        if not self.chooses_sources:
            return slot
        (source,) = sample[str(slot._replace(choice="input"))]
        return slot._replace(choice="edge", position=source)

    def describe(self) -> dict[str, Any]:
        """Return the arguments that determine the networks of this space, as values for JSON."""
        allowed = {label: list(names) for label, names in self.options.allowed.items()}
        return {**self.sizes, "stem": self.stem, "operations": self.operations, "allowed": allowed}

    def genotype(self, sample: dict[str, Any]) -> Genotype:
        """Return a sample as a genotype.

        Raises:
            ValueError: the sample belongs to another space, or contains zero, which a genotype cannot hold.
        """
        genotype = self.structure.genotype(sample, self.sizes["nodes"])
        if genotype.rule != self.rule:
            raise ValueError(
                f"sample has rule {genotype.rule!r}: must be {self.rule!r}, the rule of {type(self).__name__}"
            )
        return genotype


class AlgorithmSpace(CellSpace):
    """The search space of any algorithm: a node has the edges of an iterate.

    The edges are read off the algorithm (:func:`~optinspired_plugins.propagation.patterns.pattern`): one for each layer
    and one for each iterate that enters linearly. All have the candidates of Table 6. ``AlgorithmSpace("hb")`` is
    :class:`HBSpace`, and ``AlgorithmSpace("agd2", merge=True, keep=2, edge_weights=True)`` is :class:`AGDSpace`, apart
    from the default initialisation.

    Args:
        algorithm: a name, ``"module:attribute"``, or an object with ``init``, ``step`` and ``result``.
        nodes: nodes of a cell, ≥ 2.
        merge: one edge per source, as in (28), where an algorithm has a layer of it and the source itself.
        keep: with ``merge``, keep this many sources per node, chosen by the search; ``None`` for all.
        edge_weights: weights p on the edges (29), as in (28).
        initialization: the initial α; ``None`` for :class:`~nni_spaces.AlgorithmInit` in strategies that have α.
        **arguments: other arguments of :class:`CellSpace`.

    Raises:
        NotLinearError: the algorithm is not linear; the message names the operation.
        ValueError: the algorithm has no pattern, or the options do not fit it.
        TypeError: the object is not an algorithm.
    """

    default_initialization: Initialization = AlgorithmInit()

    def __init__(
        self,
        algorithm: Any,
        nodes: int = 4,
        merge: bool = False,
        keep: int | None = None,
        edge_weights: bool = False,
        initialization: Initialization | None = None,
        **arguments: Any,
    ) -> None:
        check_int("nodes", nodes, 2)
        self.structure = CellStructure(algorithm, merge, keep, edge_weights)
        super().__init__(nodes=nodes, initialization=initialization, **arguments)

    def describe(self) -> dict[str, Any]:
        """Return the arguments that determine the networks of this space, as values for JSON."""
        return {**super().describe(), "rule": self.rule, "edges": [list(node) for node in self.sources]}


class HBSpace(AlgorithmSpace):
    """Search space-HB (23): x_t = o_1(x_{t−1}) + o_2(x_{t−1}) + o_3(x_{t−2}).

    It is the :class:`AlgorithmSpace` of the heavy ball. Its arguments are described in :class:`CellSpace`; the
    candidates are the operations of Table 6.
    """

    structure = CellStructure("hb")
    default_initialization = RandomInit()
    __init__ = CellSpace.__init__
    describe = CellSpace.describe


class DARTSSpace(AlgorithmSpace):
    """DARTS's space (27), the paper's baseline: a node has two operations on earlier nodes.

    It is the :class:`AlgorithmSpace` of Nesterov's summed form without edge weights. Its arguments are described in
    :class:`CellSpace`; the candidates are DARTS's. With partial channels the edges have weights as in
    :class:`AGDSpace`, the edge normalisation of PC-DARTS (Xu et al. 2020).
    """

    structure = CellStructure("agd2", merge=True, keep=2)
    default_operations = DARTS_OPERATIONS
    default_initialization = RandomInit()
    __init__ = CellSpace.__init__
    describe = CellSpace.describe


class AGDSpace(DARTSSpace):
    """Search space-AGD (28)-(29): DARTS's connections, with weights p on the edges.

    It is the :class:`AlgorithmSpace` of Nesterov's summed form. Its arguments are described in :class:`CellSpace`; the
    candidates are the operations of Table 6.
    """

    structure = CellStructure("agd2", merge=True, keep=2, edge_weights=True)
    default_operations = TABLE_6


class _OperationFactory:
    """Create an operation of an edge, in the interface of NNI's cells."""

    def __init__(self, name: str, plan: CellPlan, options: EdgeOptions) -> None:
        self.name, self.plan, self.options = name, plan, options

    def __call__(self, node: int, slot: int, source: int | None) -> nn.Module:
        return candidates([self.name], self.plan, source, self.options)[self.name]
