"""The settings of searches and retrainings, with the defaults of §9.3; the command's options are read from them.

A field with a ``help`` in its metadata is an option of the command, which ``option`` may rename; ``choices`` are the
values that it can have. This module loads neither NNI nor timm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

from optinspired_plugins._checks import check_bool, check_int, check_rate
from optinspired_plugins.cells.genotype import Genotype
from optinspired_plugins.cells.plan import STEMS

from .._checks import check_optimizer, check_partial_channels

__all__ = ["RetrainSettings", "SearchSettings"]

# K, and the share of the epochs in which α stands still: 15 of 50 (Xu et al. 2020), 10 of 25 per stage (Chen et al.
# 2019).
STRATEGY_DEFAULTS = {"pc-darts": (4, 0.3), "p-darts": (1, 0.4)}

INITIALIZATIONS = ("heavy-ball", "zero", "random", "algorithm")
FAVOURING = ("heavy-ball", "algorithm")  # those with a favoured operation

DATA = "digits, cifar10, cifar100, svhn, an .npz file, a folder of images, or timm's name (torch/…, hfds/…, wds/…)."
NAMES = "Sequence[str] | None"  # the type of a list of names, which the command separates by commas
LIMIT = "Use this many images of each part: the first, or the first of each class."
PADDING = "Pixels that a random crop shifts by; 0 for no augmentation."
SEED = "Seed of weights, order and augmentation."
SMOOTHING = "Label smoothing of the training loss."
START = "Begin with the weights (and α) of the run in this folder, for more epochs: a warm restart."
FLIP = "Flip every second image that is cropped, if it is wider than 8 pixels."
RESIZE = "Side of all images: the shorter side becomes this long, and the centre is cut out."
DEPTH = "Keep 16-bit and floating-point images (from 0 to 1); otherwise 16-bit grey becomes 8-bit."
REGRESSION = "Labels are real numbers: one output, and the mean squared error."
IMPORTS = "Modules, or files my_module.py, to import first, for the operations that they register."


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


def _check_shared(settings: Any, least_batch: int) -> None:
    """Check the settings that searches and retrainings share, and the choices."""
    for each in fields(settings):
        choices = each.metadata.get("choices")
        if choices and getattr(settings, each.name) not in choices:
            raise ValueError(f"{each.name}={getattr(settings, each.name)!r}: must be one of {', '.join(choices)}")
    for name, least in (("epochs", 1), ("batch_size", least_batch), ("padding", 0), ("seed", 0)):
        check_int(name, getattr(settings, name), least)
    check_optimizer({each.name: getattr(settings, each.name) for each in fields(settings)})
    if settings.resize is not None:
        check_int("resize", settings.resize, 1)
    check_rate("label_smoothing", settings.label_smoothing)
    if settings.label_smoothing and settings.regression:
        raise ValueError(f"label_smoothing={settings.label_smoothing!r} with regression=True: must be 0")
    for name in ("keep_depth", "flip", "regression"):
        check_bool(name, getattr(settings, name))
    for each in fields(settings):
        if each.type == NAMES and getattr(settings, each.name) is not None:
            object.__setattr__(settings, each.name, _checked_names(each.name, getattr(settings, each.name)))


def _checked_names(name: str, value: Any) -> list[str]:
    """Return a list, as JSON returns it; ValueError unless it is a sequence of names."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not value or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{name}={value!r}: must be a list of names, or None")
    return list(value)


@dataclass(frozen=True)
class SearchSettings:
    """The settings of a search.

    ``algorithm`` is a name or ``"module:attribute"``; its space, :class:`~nni_spaces.AlgorithmSpace` with ``merge``,
    ``keep`` and ``edge_weights``, is ``space="algorithm"``, which need not be given. ``initialization`` may be
    ``"module:attribute"``, an object with the method of :class:`~nni_spaces.spaces.initialization.Initialization`.
    ``partial_channels``, ``skip_dropout`` and ``allowed`` are arguments of the space. α stands still in the first
    ``warmup_epochs``. ``None`` stands for the value of the strategy's paper for CIFAR, and for 1 and 0 in the other
    strategies. ``logit`` is the start of a favoured α of the initialisations ``"heavy-ball"`` and ``"algorithm"``;
    ``None`` is :func:`~nni_spaces.runs.search.start_logit`. ``alpha_decay_to`` and ``mac_weight`` are arguments
    of :class:`~nni_spaces.DARTS`. ``early_stop`` is ``"skips"`` for :class:`~nni_spaces.SkipStop` and
    ``"eigenvalue"`` for :class:`~nni_spaces.EigenvalueStop`. ``grad_checkpointing`` saves memory and costs time.
    ``operations`` are the candidates; ``None`` for the space's own. ``imports`` are the modules that a command imports;
    the settings import none. ``resize``, ``keep_depth`` and ``regression`` are arguments of
    :func:`~nni_spaces.runs.data.read_images`, and ``stem`` of the space. ``start_from`` is the folder of a run whose
    weights and α this one begins with.

    Raises:
        ValueError: a setting is unknown or out of range.
    """

    space: str = _option("hb", "Search space (§9).", choices=("hb", "agd", "darts", "algorithm"))
    initialization: str = _option(
        "zero",
        f"How α begins: {', '.join(INITIALIZATIONS)} (heavy-ball for hb only), or my_module:my_initialization.",
        option="--init",
    )
    strategy: str = _option(
        "darts",
        "How α and weights are found.",
        choices=("darts", "darts-second-order", "gumbel", "pc-darts", "p-darts"),
    )
    data: str = _option("cifar10", DATA)
    limit: int | None = _option(None, LIMIT)
    epochs: int = _option(50, "Epochs (§9.3); for p-darts in each of its stages.")
    batch_size: int = _option(64, "Batch size, of both halves (§9.3).")
    channels: int = _option(16, "Channels of the first cells (§9.3).")
    cells: int = _option(8, "Cells (§9.3); p-darts has its own.")
    nodes: int = _option(4, "Nodes of a cell.")
    lr: float = _option(0.025, "First learning rate of the weights (§9.3).")
    momentum: float = 0.9
    weight_decay: float = 3e-4
    alpha_lr: float = _option(3e-4, "Learning rate of α and β (§9.3).")
    alpha_weight_decay: float = _option(1e-3, "Weight decay of α and β (§9.3).")
    gradient_clip: float = 5.0
    padding: int = _option(4, PADDING)
    seed: int = _option(0, SEED)
    partial_channels: int | None = _option(
        None, "K: mix operations on 1/K of the channels; pc-darts has 4, the others 1."
    )
    warmup_epochs: int | None = _option(
        None, "Epochs in which α stands still; pc-darts 30 %, p-darts 40 %, the others 0."
    )
    skip_dropout: float = 0.0
    allowed: Mapping[str, Sequence[str]] | None = None
    grad_checkpointing: bool = _option(False, "Compute cells twice to save memory.")
    algorithm: str | None = _option(None, "Search the space of this algorithm: a name (ogm), or my_module:MyAlgorithm.")
    merge: bool = _option(False, "One edge per source where an algorithm has two, as in (28).")
    keep: int | None = _option(None, "With --merge, sources that a node keeps; all by default.")
    edge_weights: bool = _option(False, "Weights p on the edges of an algorithm's space (29).")

    logit: float | None = _option(
        None, "Start of a favoured α (26), e.g. 5; by default as far as α can travel, between 2.1 and 5."
    )
    mac_weight: float = _option(0.0, "Penalty on α per million expected multiply-accumulates of the network.")
    early_stop: str = _option(
        "never",
        "End when skips take over: skips, two in the normal cell; eigenvalue, of the Hessian of α.",
        choices=("never", "skips", "eigenvalue"),
    )
    alpha_decay_to: str = _option("zero", "Value that the weight decay of α leads to.", choices=("zero", "start"))
    stem: str = _option("cifar", "imagenet reduces large images eightfold before the first cell.", choices=STEMS)
    resize: int | None = _option(None, RESIZE)
    keep_depth: bool = _option(False, DEPTH)
    flip: bool = _option(True, FLIP)
    regression: bool = _option(False, REGRESSION)
    label_smoothing: float = _option(0.0, SMOOTHING)
    start_from: str | None = _option(None, START)
    operations: Sequence[str] | None = _option(None, "Candidates, separated by commas; the space's own by default.")
    imports: Sequence[str] | None = _option(None, IMPORTS, option="--import")

    def __post_init__(self) -> None:
        _check_shared(self, least_batch=1)
        parts, share = STRATEGY_DEFAULTS.get(self.strategy, (1, 0.0))
        for name, value in (("partial_channels", parts), ("warmup_epochs", int(share * self.epochs))):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.allowed is not None:  # lists, as JSON returns them
            object.__setattr__(self, "allowed", {label: list(names) for label, names in self.allowed.items()})
        check_partial_channels(cast(int, self.partial_channels), self.channels)
        check_int("warmup_epochs", self.warmup_epochs, 0)
        if cast(int, self.warmup_epochs) >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs}: must be < epochs={self.epochs}, or α never moves")
        check_rate("skip_dropout", self.skip_dropout)
        self._check_initialization()
        self._check_algorithm()

    def _check_initialization(self) -> None:
        """ValueError unless the initialisation is one of ours, or a name of an object, which has its own logit."""
        module, colon, attribute = str(self.initialization).partition(":")
        is_object = bool(module and colon and attribute)
        if self.initialization not in INITIALIZATIONS and not is_object:
            names = ", ".join(INITIALIZATIONS)
            raise ValueError(f"initialization={self.initialization!r}: must be one of {names}, or module:attribute")
        if self.logit is not None and not 0 < self.logit < math.inf:
            raise ValueError(f"logit={self.logit!r}: must be finite and > 0")
        if self.logit is not None and is_object:
            raise ValueError(f"logit={self.logit!r} with initialization={self.initialization!r}: must be left out")
        if self.start_from is not None and self.strategy == "p-darts":
            raise ValueError(f"start_from={self.start_from!r} with strategy='p-darts': must be None, its stages differ")
        if self.strategy == "p-darts" and self.early_stop != "never":
            raise ValueError(f"early_stop={self.early_stop!r}: must be 'never' with p-darts, which limits skips itself")

    def _check_algorithm(self) -> None:
        """ValueError where options of an algorithm's space have no algorithm, or an algorithm has another space."""
        if self.algorithm is not None:
            if self.space not in ("hb", "algorithm"):  # hb is the default
                raise ValueError(f"space={self.space!r} with algorithm={self.algorithm!r}: must be left out")
            object.__setattr__(self, "space", "algorithm")
        else:
            options = dict(space=self.space == "algorithm", merge=self.merge, keep=self.keep)
            options["edge_weights"] = self.edge_weights
            given = [name for name, value in options.items() if value not in (None, False)]
            if given:
                raise ValueError(f"{given[0]}={getattr(self, given[0])!r}: needs algorithm, a name or module:attribute")


@dataclass(frozen=True)
class RetrainSettings:
    """The settings of a training from scratch.

    ``genotype`` is a genotype as JSON holds it. ``aux_weight`` is the weight of the auxiliary loss; ``None`` is 0.4
    where the auxiliary head fits the images, and otherwise 0. ``cutout`` is the side of a square that is set to 0;
    ``None`` is half of the image's side, §9.3's 16 of 32. ``imports`` are the modules that a command imports, and
    ``resize``, ``keep_depth`` and ``regression`` arguments of :func:`~nni_spaces.runs.data.read_images`.
    ``start_from`` is the folder of a training whose weights this one begins with.

    Raises:
        ValueError: a setting is out of range.
    """

    genotype: dict[str, Any] = field(default_factory=dict)
    data: str = _option("cifar10", DATA)
    limit: int | None = _option(None, LIMIT)
    model: str = _option("cellnet_cifar", "timm's name of the network.", choices=("cellnet_cifar", "cellnet_imagenet"))
    epochs: int = _option(600, "Epochs (§9.3).")
    batch_size: int = _option(96, "Batch size (§9.3).")
    cells: int = _option(20, "Cells (§9.3).")
    channels: int = _option(36, "Channels of the first cells (§9.3).")
    lr: float = _option(0.025, "First learning rate (§9.3).")
    momentum: float = 0.9
    weight_decay: float = 3e-4
    gradient_clip: float = 5.0
    aux_weight: float | None = _option(
        None, "Weight of the auxiliary loss; 0.4 (§9.3) where its head fits the images, otherwise 0."
    )
    drop_path_rate: float = _option(0.2, "Rate at which operations are dropped in the last epochs (§9.3).")
    cutout: int | None = _option(None, "Side of the square cut out of an image; half a side by default, 0 for none.")
    padding: int = _option(4, PADDING)
    seed: int = _option(0, SEED)
    resize: int | None = _option(None, RESIZE)
    keep_depth: bool = _option(False, DEPTH)
    flip: bool = _option(True, FLIP)
    regression: bool = _option(False, REGRESSION)
    label_smoothing: float = _option(0.0, SMOOTHING)
    start_from: str | None = _option(None, START)
    imports: Sequence[str] | None = _option(None, IMPORTS, option="--import")

    def __post_init__(self) -> None:
        self.read_genotype()
        _check_shared(self, least_batch=2)
        if self.cutout is not None:
            check_int("cutout", self.cutout, 0)
        check_rate("drop_path_rate", self.drop_path_rate)
        if self.aux_weight is not None and not 0 <= self.aux_weight < math.inf:
            raise ValueError(f"aux_weight={self.aux_weight!r}: must be ≥ 0, or None")

    def read_genotype(self) -> Genotype:
        """Return the genotype.

        Raises:
            ValueError: ``genotype`` holds none.
        """
        return Genotype.from_json(json.dumps(self.genotype))
