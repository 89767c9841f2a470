"""The search spaces of section 9 as model spaces of NNI: Search space-HB, Search space-AGD, and DARTS's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from nni.nas.nn.pytorch import Cell, ModelSpace
from nni.nas.space import current_model, model_context
from nni.nas.strategy import DARTS as StockDARTS
from nni.nas.strategy import Proxyless
from torch import Tensor, nn

from optinspired_plugins._checks import check_int
from optinspired_plugins.cells.genotype import EDGES, Genotype
from optinspired_plugins.cells.network import CellPlan, make_stem, plan_cells
from optinspired_plugins.cells.operations import DARTS_OPERATIONS, OPERATIONS, TABLE_6, ZERO
from optinspired_plugins.memory.recompute import recompute

from .edges import EdgeOptions, MixedLayer, Preprocessors, candidates, proxyless_hook, zero_last
from .heavy_ball_cell import HeavyBallCell
from .initialization import Initialization, RandomInit, ZeroInit, check_initialization, first_logits
from .supernet import EdgeNormalizedCell, MixedCell

__all__ = ["AGDSpace", "DARTSSpace", "HBSpace", "check_partial_channels", "check_rate"]

KINDS = ("normal", "reduce")
# Why only strategies with α can have candidates of single edges where NNI's cell chooses sources too.
ONE_LIST = (
    "NNI's cell has one list of candidates for strategies without α; use DARTS, GumbelDARTS, HBSpace or operations"
)


def check_partial_channels(partial_channels: int, channels: int) -> None:
    """ValueError unless K is an integer ≥ 1 that divides the channels."""
    check_int("partial_channels", partial_channels, 1)
    if channels % partial_channels:
        raise ValueError(f"channels={channels}: must be divisible by partial_channels={partial_channels}")


def check_rate(name: str, value: float) -> None:
    """ValueError unless ``value`` is a rate of dropout, in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r}: must be a number ≥ 0 and < 1")


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
        initialization: how α begins; ``None`` for :class:`~nni_spaces.RandomInit`. Strategies without α refuse it, all
            but :class:`~nni_spaces.ZeroInit`: they begin with equal chances.
        partial_channels: K of PC-DARTS (Xu et al. 2020): a supernet mixes operations on 1/K of the channels of an edge
            and passes the rest, :func:`~nni_spaces.spaces.mixed_op.mix`. A chosen network has all; only supernets of
            DARTS and GumbelDARTS compute with K > 1.
        skip_dropout: first rate of the dropout behind skip connections of a supernet, P-DARTS's (Chen et al. 2019); our
            DARTS and GumbelDARTS lower it to 0 by the last epoch.
        allowed: the candidates of single edges, by label as ``export_probs`` has them: ``"normal/op_2_0"`` in HBSpace,
            ``"normal/3_1"`` in the others, ``"reduce/…"``. The others are neither built nor computed, and zero has an α
            only if it is named. Edges that are left out have all candidates.
        grad_checkpointing: as :meth:`set_grad_checkpointing`.

    Raises:
        ValueError: an argument is out of range, or what ``initialization`` returns is.
        TypeError: ``initialization`` has no method ``alpha``.
    """

    rule: str
    default_operations: Sequence[str] = TABLE_6
    advice = ""  # for who samples what is not allowed

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
        self.has_own_start = initialization is not None
        check_initialization(self.initialization)
        names = self._candidate_names(operations, zero_in_space)
        for label in islice(self.edge_labels(nodes), 3):  # one that does not fit says so now, not when a search starts
            first_logits(self.initialization, self.rule, label, zero_last(names))
        self._check_allowed(allowed or {}, zero_last(names), nodes)
        self.operations, self.options = names, EdgeOptions(partial_channels, skip_dropout, allowed or {})
        sizes = dict(channels=channels, cells=cells, nodes=nodes, num_classes=num_classes, in_chans=in_chans)
        self.sizes, self.stem = {name: int(value) for name, value in sizes.items()}, stem
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

    def _check_allowed(self, allowed: Mapping[str, Sequence[str]], names: Sequence[str], nodes: int) -> None:
        labels = list(self.edge_labels(nodes))
        for label, chosen in allowed.items():
            if label not in labels:
                raise ValueError(f"allowed has {label!r}: must be an edge, {labels[0]!r} to {labels[-1]!r}")
            if len(set(chosen)) != len(chosen) or not set(chosen) <= set(names) or set(chosen) <= {ZERO}:
                choice = ", ".join(names)
                raise ValueError(f"allowed[{label!r}]={chosen!r}: must be distinct of {choice}, one beside {ZERO!r}")

    def edge_labels(self, nodes: int) -> Iterator[str]:
        """Yield the label of every edge's α."""
        raise NotImplementedError

    def make_cell(self, operations: Sequence[str], plan: CellPlan, nodes: int, kind: str) -> nn.Module:
        """Return a cell of this space."""
        raise NotImplementedError

    def is_differentiable(self, strategy: Any) -> bool:
        """Say whether a strategy gets our supernet.

        Raises:
            ValueError: it cannot take the options of this space.
        """
        name, parts, rate = type(strategy).__name__, self.options.partial_channels, self.options.skip_dropout
        ours = isinstance(strategy, StockDARTS) and not isinstance(strategy, Proxyless)
        if parts > 1 and not ours:
            raise ValueError(f"partial_channels={parts} with strategy={name}: must be 1, or use DARTS or GumbelDARTS")
        if rate and getattr(strategy, "order", 1) == 2:
            # The difference of two passes would be that of their dropouts.
            raise ValueError(f"skip_dropout={rate} with strategy={name}(order=2): must be 0, or order 1")
        if (
            self.has_own_start
            and not isinstance(strategy, StockDARTS)
            and not isinstance(self.initialization, ZeroInit)
        ):
            raise ValueError(
                f"initialization={self.initialization!r} with strategy={name}, which has no α to begin with: must be "
                "None, or use DARTS, GumbelDARTS or Proxyless"
            )
        return ours

    def check_sampled(self, strategy: Any) -> None:
        """ValueError where the networks that a multi-trial strategy samples would not have an option of this space."""
        self.is_differentiable(strategy)
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
        """Keep only what goes from cell to cell, and compute each cell again in the backward pass.

        The result is the same: running statistics are updated once, and what is random is drawn once.
        """
        self.grad_checkpointing = enable

    def _run(self, cell: nn.Module, inputs: list[Tensor]) -> Tensor:
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
            return cell(inputs)
        return recompute(cell, cell, inputs)

    def freeze(self, sample: dict[str, Any]) -> nn.Module:
        """Return the network of a sample, built anew: its normalisations have scales, its weights are fresh.

        Raises:
            ValueError: an edge has an operation that ``allowed`` does not name.
        """
        self._check_sample(sample)
        with model_context(sample):
            return type(self)(*self.trace_args, **self.trace_kwargs)

    def _check_sample(self, sample: dict[str, Any]) -> None:
        for key, name in sample.items() if self.options.allowed else ():
            cell, _, choice = key.rpartition("/")
            if choice.startswith("op_"):
                names = self.options.allowed.get(self.edge_label(sample, cell, choice), [name])
                if name not in names:
                    raise ValueError(f"sample has {key}={name!r}: must be of {', '.join(names)}{self.advice}")

    def edge_label(self, sample: dict[str, Any], cell: str, choice: str) -> str:
        """Return the label of the edge whose operation is ``{cell}/{choice}`` of a sample."""
        return f"{cell}/{choice}"

    def describe(self) -> dict[str, Any]:
        """Return what tells the networks of this space from those of another of its class, as JSON holds it."""
        allowed = {label: list(names) for label, names in self.options.allowed.items()}
        return {**self.sizes, "stem": self.stem, "operations": self.operations, "allowed": allowed}

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
        return HeavyBallCell(operations, plan, nodes, kind, self.options)

    def edge_labels(self, nodes: int) -> Iterator[str]:
        """Yield the label of every edge's α."""
        for kind in KINDS:
            yield from (f"{kind}/op_{t}_{k}" for t in range(2, 2 + nodes) for k in range(EDGES[self.rule]))

    def extra_oneshot_hooks(self, strategy: Any) -> list[Any]:
        """Return the hooks that a differentiable strategy needs for α of zero and for the initialisation."""
        if self.is_differentiable(strategy):
            return [MixedLayer.hook(self.rule, self.initialization, self.operations, self.options)]
        if isinstance(strategy, Proxyless) and self.has_own_start:
            return [proxyless_hook(self.initialization, self.operations)]
        return []


class DARTSSpace(CellSpace):
    """DARTS's space (27), the paper's baseline: a node takes two operations of earlier ones.

    Arguments and errors are those of :class:`CellSpace`; the candidates are DARTS's. With partial channels its edges
    have weights like :class:`AGDSpace`'s: PC-DARTS normalises them (Xu et al. 2020).
    """

    rule = "agd"
    default_operations = DARTS_OPERATIONS
    mixed_cell: type[MixedCell] = MixedCell
    advice = f": {ONE_LIST}"

    def make_cell(self, operations: Sequence[str], plan: CellPlan, nodes: int, kind: str) -> nn.Module:
        """Return NNI's cell of two chosen edges a node."""
        factories = {name: _Factory(name, plan, self.options) for name in operations}
        preprocessors = Preprocessors(plan, affine=current_model() is not None)
        return Cell(factories, nodes, EDGES[self.rule], 2, "all", preprocessors, label=kind)

    def edge_labels(self, nodes: int) -> Iterator[str]:
        """Yield the label of every edge's α."""
        for kind in KINDS:
            yield from (f"{kind}/{t}_{i}" for t in range(2, 2 + nodes) for i in range(t))

    def edge_label(self, sample: dict[str, Any], cell: str, choice: str) -> str:
        """Return the label of the edge whose operation is ``{cell}/{choice}`` of a sample."""
        _, t, slot = choice.split("_")
        (source,) = sample[f"{cell}/input_{t}_{slot}"]
        return f"{cell}/{t}_{source}"

    def is_differentiable(self, strategy: Any) -> bool:
        """Say whether a strategy gets our supernet.

        Raises:
            ValueError: it cannot take the options of this space.
        """
        ours = super().is_differentiable(strategy)
        if self.options.allowed and not ours:
            raise ValueError(f"allowed with strategy={type(strategy).__name__}{self.advice}")
        return ours

    def extra_oneshot_hooks(self, strategy: Any) -> list[Any]:
        """Return the hooks that a differentiable strategy needs for β, the initialisation and the derivation."""
        if isinstance(strategy, Proxyless):
            raise ValueError(
                f"strategy=Proxyless: NNI has no Proxyless for cells, and so none for {type(self).__name__}; use DARTS "
                "or GumbelDARTS, or HBSpace"
            )
        if not self.is_differentiable(strategy):
            return []
        cell = EdgeNormalizedCell if self.options.partial_channels > 1 else self.mixed_cell
        return [cell.hook(self.initialization, self.options)]


class AGDSpace(DARTSSpace):
    """Search space-AGD (28)-(29): DARTS's connections, with weights p on the edges.

    Arguments and errors are those of :class:`CellSpace`; the candidates are Table 6's.
    """

    default_operations = TABLE_6
    mixed_cell = EdgeNormalizedCell


class _Factory:
    """Makes an operation of an edge, as NNI's cells ask for them."""

    def __init__(self, name: str, plan: CellPlan, options: EdgeOptions) -> None:
        self.name, self.plan, self.options = name, plan, options

    def __call__(self, node: int, slot: int, source: int | None) -> nn.Module:
        return candidates([self.name], self.plan, source, self.options)[self.name]
