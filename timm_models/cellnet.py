"""CellNet: the network of a genotype, on DARTS's skeleton (§9.3).

It has normal cells, and a reduction cell after one and after two thirds of them. Each reduction cell doubles the
channels. The ImageNet form has a stem that reduces eightfold. Weights have torch's initial values, as in DARTS.

The state dict has the order and the shapes of the state dict of NNI's hub network of the same genotype without
auxiliary head, so that values can be copied in order.

Paper: `Optimization-inspired Manual Architecture Design and Neural Architecture Search`; DARTS, Liu et al. 2019.
"""

# No postponed annotations here: torch.fx writes forward's into its code, where TorchScript must find them.

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple, Union

import torch
from timm.layers import create_classifier
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from optinspired_plugins._checks import check_bool, check_int, check_rate
from optinspired_plugins.cells.genotype import Genotype, load_genotype
from optinspired_plugins.cells.network import make_stem, plan_cells
from optinspired_plugins.memory.recompute import recompute

from ._cfgs import cifar_cfg, imagenet_cfg
from ._features import Intermediates, build_with_features
from ._host import SavesArguments, register_model
from .inference.folding import fold_all
from .stages.cell import AuxiliaryHead, Cell

__all__ = ["CellNet"]


class CellNet(Intermediates, SavesArguments, nn.Module):
    """A network of cells.

    Args:
        genotype: a :class:`~optinspired_plugins.cells.genotype.Genotype`, its ``to_dict()``, the name of a published
            genotype, or a JSON file. timm's ``save_for_hf`` writes the genotype itself.
        cells: number of cells, ≥ 3.
        channels: channels of a node of the first cells; they double at both reductions.
        stem: ``"cifar"``, a 3×3 convolution, or ``"imagenet"``, three of stride 2.
        num_classes: number of classes; 0 for no classifier.
        in_chans: number of input channels.
        global_pool: timm's pooling type.
        drop_rate: dropout before the classifier.
        drop_path_rate: rate at which operations are dropped; :meth:`set_drop_path_rate` changes it during training.
        aux_head: add an auxiliary classifier after two thirds of the cells, for :meth:`set_auxiliary_training`. Until
            that is called it is not used and its parameters need no gradient. It takes images of the stem's usual size.
        device: device of the parameters.
        dtype: data type of the parameters.

    Raises:
        TypeError: ``genotype`` has another type.
        ValueError: an argument is out of range, or the genotype's file is damaged; nothing was allocated.
    """

    def __init__(
        self,
        genotype: Union[Genotype, Mapping[str, Any], str, Path] = "darts_v2",
        cells: int = 20,
        channels: int = 36,
        stem: str = "cifar",
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        aux_head: bool = False,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        _check_arguments(cells, channels, stem, num_classes, in_chans, drop_rate, drop_path_rate, aux_head)
        genotype = load_genotype(genotype)
        super().__init__()
        self.genotype = genotype
        self.saved_args = dict(genotype=genotype.to_dict())
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        with torch.device(device) if device is not None else nullcontext():
            self._build(genotype, cells, channels, stem, drop_path_rate)
            self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
            self.aux_head: Optional[AuxiliaryHead] = None
            self.auxiliary_training = False
            if aux_head:
                # It reads the first cell of the last stage, as in DARTS; all cells of a stage have the same channels.
                cifar = stem == "cifar"
                self.aux_head = AuxiliaryHead(self.num_features, num_classes, 3 if cifar else 2, final_norm=cifar)
                self.aux_head.requires_grad_(False)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        if dtype is not None:
            self.to(dtype)

    @torch.jit.ignore
    def _build(self, genotype: Genotype, cells: int, channels: int, stem: str, drop_path_rate: float) -> None:
        """Build stem and cells, and the table of features."""
        self.stem0, self.stem1 = make_stem(stem, self.in_chans, channels)
        plans = plan_cells(cells, channels, genotype.nodes, stem)
        self.stage_ends: List[int] = [*(i - 1 for i, plan in enumerate(plans) if plan.reduction), cells - 1]
        reduction = 4 if stem == "imagenet" else 1
        self.feature_info: List[Dict[str, Any]] = [
            dict(num_chs=plans[0].before[0], reduction=reduction, module="stem0")
        ]
        reduction = 8 if stem == "imagenet" else 1
        self.cells = nn.ModuleList()
        for i, plan in enumerate(plans):
            kind = genotype.reduction if plan.reduction else genotype.normal
            reduction = 2 * reduction if plan.reduction else reduction
            self.cells.append(Cell(kind, plan, drop_path_rate))
            if i in self.stage_ends:
                info = dict(num_chs=genotype.nodes * plan.channels, reduction=reduction, module=f"cells.{i}")
                self.feature_info.append(info)
        self.num_features = self.feature_info[-1]["num_chs"]

    @torch.jit.ignore
    def set_drop_path_rate(self, rate: float) -> None:
        """Change the rate of drop path; §9.3 raises it in training."""
        check_rate("rate", rate)
        for cell in self.cells:
            if isinstance(cell, Cell):
                cell.drop_path.drop_prob = rate

    @torch.jit.ignore
    def set_auxiliary_training(self, enable: bool = True) -> None:
        """Make ``forward`` return logits and auxiliary logits in training.

        Call it before creating an optimiser. By default ``forward`` returns only logits, as timm's scripts expect, and
        the auxiliary head's parameters need no gradient: distributed training reports parameters that get none as an
        error.

        Raises:
            ValueError: there is no auxiliary head.
        """
        check_bool("enable", enable)
        if self.aux_head is None:
            if enable:
                raise ValueError("enable=True without an auxiliary head: must be False, or make it by aux_head=True")
            return
        self.auxiliary_training = enable
        self.aux_head.requires_grad_(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Return the empty set: a cell has no coefficients."""
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each cell in the backward instead of storing its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> "CellNet":
        """Make this an equal network for evaluation, in place.

        Normalisations are folded into the convolutions before them, also in the stem, which timm's
        ``reparameterize_model`` leaves out.
        """
        fold_all(self)
        return self

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Group parameters by cell, or by stage if ``coarse``."""
        if not coarse:
            return dict(stem=r"^stem", blocks=[(r"^cells\.(\d+)", None), (r"^aux_head", (99999,))])
        first, second, _ = (end + 1 for end in self.stage_ends)
        numbers = "|".join(map(str, range(first))), "|".join(map(str, range(first, second)))
        stages = [(rf"^cells\.({group})\.", (i,)) for i, group in enumerate(numbers)]
        return dict(stem=r"^stem", blocks=[*stages, (r"^cells\.|^aux_head", (2,))])

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier, and the auxiliary classifier if there is one.

        Args:
            num_classes: number of classes; 0 for no classifier, not even an auxiliary one.
            global_pool: pooling type; ``None`` keeps it.
        """
        self.num_classes = num_classes
        parameter = next(self.parameters())
        pool_type = global_pool if global_pool is not None else self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool_type)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        new = [self.global_pool, self.fc]
        if num_classes == 0:
            self.aux_head = None
        if self.aux_head is not None:
            self.aux_head.fc = nn.Linear(self.aux_head.fc.in_features, num_classes)
            self.aux_head.fc.requires_grad_(self.auxiliary_training)
            new.append(self.aux_head.fc)
        for module in new:
            module.to(device=parameter.device, dtype=parameter.dtype).train(self.training)

    def forward_cells(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Return the features, and the input of the auxiliary head."""
        s0 = self.stem0(x)
        s1 = self.stem1(s0)
        middle = s1
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1) if torch.jit.is_scripting() else self._run_cell(cell, s0, s1)
            if i == self.stage_ends[1] + 1:
                middle = s1
        return s1, middle

    @torch.jit.ignore
    def _run_cell(self, cell: nn.Module, s0: Tensor, s1: Tensor) -> Tensor:
        """Return the cell's output, recomputed in the backward pass with ``grad_checkpointing``."""
        return recompute(cell, cell, s0, s1) if self.grad_checkpointing else cell(s0, s1)

    def feature_maps(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the stem's output, and each stage's."""
        s0 = self.stem0(x)
        yield s0
        s1 = self.stem1(s0)
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, self._run_cell(cell, s0, s1)
            if i in self.stage_ends:
                yield s1

    @torch.jit.ignore
    def cut(self, last: int) -> None:
        """Remove the cells after feature map ``last``, and the auxiliary head."""
        self.cells = self.cells[: self.stage_ends[last - 1] + 1 if last else 0]
        self.aux_head = None
        if last == 0:
            self.stem1 = nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last cell's output, shape (batch, num_features, height / r, width / r).

        r is 4 with the CIFAR stem and 32 with the ImageNet stem.
        """
        return self.forward_cells(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of features.

        Args:
            x: features.
            pre_logits: return the classifier's input.
        """
        x = self.global_pool(x)
        if self.drop_rate > 0:
            x = nn.functional.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Union[Tensor, Tuple[Tensor, Tensor]]:
        """Return logits, shape (batch, num_classes); in training a pair if :meth:`set_auxiliary_training` is on."""
        features, middle = self.forward_cells(x)
        logits = self.forward_head(features)
        if self.aux_head is not None and self.auxiliary_training and self.training:
            return logits, self.aux_head(middle)
        return logits


def _check_arguments(
    cells: int,
    channels: int,
    stem: str,
    num_classes: int,
    in_chans: int,
    drop_rate: float,
    drop_path_rate: float,
    aux_head: bool,
) -> None:
    plan_cells(cells, channels, 1, stem)
    check_int("num_classes", num_classes, 0)
    check_int("in_chans", in_chans, 1)
    check_rate("drop_rate", drop_rate)
    check_rate("drop_path_rate", drop_path_rate)
    check_bool("aux_head", aux_head)
    if aux_head and num_classes == 0:
        raise ValueError("aux_head=True with num_classes=0: an auxiliary classifier needs classes")


def _create_cellnet(variant: str, pretrained: bool = False, **kwargs: Any) -> CellNet:
    return build_with_features(CellNet, variant, pretrained, feature_indices=(0, 1, 2, 3), is_chain=False, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "cellnet_cifar.untrained": cifar_cfg(first_conv="stem0.0", classifier="fc"),
        "cellnet_imagenet.untrained": imagenet_cfg(first_conv="stem0.0", classifier="fc"),
    }
)


@register_model
def cellnet_cifar(pretrained: bool = False, **kwargs: Any) -> CellNet:
    """The network of a genotype for CIFAR, 20 cells of 36 channels."""
    model_args = dict(cells=20, channels=36, stem="cifar")
    return _create_cellnet("cellnet_cifar", pretrained, **dict(model_args, **kwargs))


@register_model
def cellnet_imagenet(pretrained: bool = False, **kwargs: Any) -> CellNet:
    """The network of a genotype for ImageNet, 14 cells of 48 channels."""
    model_args = dict(cells=14, channels=48, stem="imagenet", num_classes=1000)
    return _create_cellnet("cellnet_imagenet", pretrained, **dict(model_args, **kwargs))
