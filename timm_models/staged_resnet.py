"""Networks of ResNet's shape, with stages of any rule.

A network of this shape is a stem, stages over transforms T that know no algorithm, and a head.
:meth:`StagedResNet.replace_stages` sets the rule by which stages combine their transforms.
"""

from __future__ import annotations

import re
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple, Type, Union

import torch
from timm.layers import DropPath, create_classifier, get_act_layer, get_norm_layer
from timm.models.resnet import ResNet, drop_blocks
from timm.utils import reparameterize_model
from torch import Tensor, nn

from optinspired_plugins._checks import check_bool, check_int, check_layers, check_one_of, check_rate

from ._features import Intermediates
from .inference.folding import fold_into
from .inference.stream_free import StreamFreeStage
from .stages.checkpoint_rules import LearnedRule, StageRule, warn_without_rule
from .stages.start import DEFAULT_START, Start, check_start, start_weight
from .stages.stem import is_reversible, recompute_chain
from .stages.transforms import BasicTransform, BottleneckTransform, PadShortcut
from .stages.unmodified import is_unmodified
from .strides import pull_out_stride

__all__ = ["CifarStagedResNet", "StagedResNet"]

# The names of coefficients among the parameters.
COEFFICIENTS = re.compile(r"layer\d+\.(?:beta\d|algorithm\..*)")


class StagedResNet(Intermediates, LearnedRule, ResNet):
    """timm's ResNet, with stages that can be replaced.

    Args:
        block: ``BasicTransform`` or ``BottleneckTransform``.
        layers: transforms in each of the four stages.
        stride_in_1x1: put a bottleneck's stride in its first 1×1 convolution (ResNet v1), which gives the paper's
            FLOPs (Table 5); ``False`` puts it in the 3×3, as timm does. No effect on ``BasicTransform``.
        zero_init_last: start every T at 0: ``init_last="zero"``.
        init_last: weight γ of every T's last normalisation at the start: a finite number; ``"zero"``, timm's
            ``zero_init_last``; or ``"auto"``, the γ of each stage with which its transforms add the variance 1 to its
            output, at most 1 (:mod:`timm_models.stages.start`): (n − ⌊n/3⌋)^(−1/2) for n transforms of a heavy ball
            with (1, −1). It is 1/√n with ``post_act=True``, and for an algorithm that is not linear. ValueError for a
            number other than 1 if the normalisation has no weight.
        final_norm: a normalisation and an activation between the last stage and the pooling, as in a pre-activation
            ResNet. ``feature_info`` names the stage's output, before them.
        **kwargs: timm's ``ResNet`` arguments: ``num_classes``, ``in_chans``, ``output_stride``, ``global_pool``,
            ``cardinality``, ``base_width``, ``stem_width``, ``stem_type``, ``replace_stem_pool``, ``avg_down``,
            ``channels``, ``act_layer``, ``norm_layer``, ``aa_layer``, ``drop_rate``, ``drop_path_rate``,
            ``drop_block_rate``, ``block_args`` (such as ``attn_layer``), ``device``, ``dtype``.

    Raises:
        ValueError: an argument is out of range; nothing was allocated.
        TypeError: an argument is unknown.
    """

    coefficients, learn_option, conversion = ("beta1", "beta2"), "learn_beta", "to_heavy_ball"
    init_last = DEFAULT_START

    def __init__(
        self,
        block: Type[nn.Module],
        layers: Tuple[int, ...],
        stride_in_1x1: bool = True,
        zero_init_last: bool = False,
        init_last: Start = DEFAULT_START,
        final_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        start = check_start(init_last, zero_init_last)
        check_bool("stride_in_1x1", stride_in_1x1)
        check_bool("final_norm", final_norm)
        check_one_of("block", block, (BasicTransform, BottleneckTransform))
        check_layers("layers", layers, stages=4)
        _check_resnet_kwargs(kwargs)
        if block is BottleneckTransform:
            if stride_in_1x1 and kwargs.get("aa_layer") is not None:
                raise ValueError(
                    "stride_in_1x1=True with aa_layer: the blur pool takes over the stride of the 3×3 convolution; "
                    "pass stride_in_1x1=False"
                )
            kwargs["block_args"] = dict(kwargs.get("block_args") or {}, stride_in_1x1=stride_in_1x1)
        super().__init__(block, layers, zero_init_last=False, **kwargs)
        self.init_last = start
        self.norm: Optional[nn.Module] = None
        self.act: Optional[nn.Module] = None
        if final_norm:
            norm = get_norm_layer(kwargs.get("norm_layer", nn.BatchNorm2d))
            self.norm = norm(self.num_features, device=kwargs.get("device"), dtype=kwargs.get("dtype"))
            self.act = get_act_layer(kwargs.get("act_layer", nn.ReLU))(inplace=True)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's output, shape (batch, num_features, height / 32, width / 32)."""
        if torch.jit.is_scripting():
            return self.normalise(self._plain(x))
        return self.normalise(self._run_stages(self._pool(self.conv1(x))))

    def normalise(self, x: Tensor) -> Tensor:
        """Return the features from the last stage's output; the same without ``final_norm``."""
        return x if self.norm is None or self.act is None else self.act(self.norm(x))

    @torch.jit.ignore
    def drop_norm(self) -> None:
        """Remove the final normalisation and its activation."""
        self.norm, self.act = None, None  # no identities, which hooks on all modules would change

    def _plain(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    @torch.jit.ignore
    def _pool(self, x: Tensor) -> Tensor:
        """Return the pooled stem from its last convolution's output."""
        is_folded = is_unmodified(self.bn1, nn.Identity) and is_unmodified(self.act1, nn.ReLU)
        if is_folded and is_unmodified(self.maxpool, nn.MaxPool2d) and not self.maxpool.return_indices:
            return self.act1(self.maxpool(x))  # equal, and a quarter of the values
        if not (self.recompute_stem or any(is_reversible(stage) for stage in self.stages())):
            return self.maxpool(self.act1(self.bn1(x)))
        return recompute_chain([self.bn1, self.act1, self.maxpool], x)

    @torch.jit.ignore
    def _run_stages(self, x: Tensor) -> Tensor:
        """Run the stages in order.

        A stage without its stream computes only the pixels that the next one reads, if that is one, too.
        """
        stages, applied_stride = self.stages(), 1
        for stage, after in zip(stages, [*stages[1:], None]):
            if is_unmodified(stage, StreamFreeStage):
                next_stride = after.stride if is_unmodified(after, StreamFreeStage) else 1
                x = stage.read_by(next_stride, x, stage.stride // applied_stride)
                applied_stride = next_stride
            else:
                x = stage(x)
        return x

    def feature_maps(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the stem before its pooling, and each stage's output."""
        x = self.act1(self.bn1(self.conv1(x)))
        yield x
        x = self.maxpool(x)
        for stage in self.stages():
            x = stage(x)
            yield x

    @torch.jit.ignore
    def cut(self, last: int) -> None:
        """Replace the stages after feature map ``last`` by identities."""
        for i in range(last + 1, len(self.feature_info)):
            setattr(self, f"layer{i}", nn.Identity())
        if last == 0 and hasattr(self, "maxpool"):
            self.maxpool = nn.Identity()

    @torch.jit.ignore
    def replace_stages(self, make_stage: Callable[[List[nn.Module]], nn.Module]) -> None:
        """Replace every stage by ``make_stage`` of its blocks."""
        checkpointing = self.grad_checkpointing  # type: ignore[has-type]
        self.grad_checkpointing = False  # timm's would chain the blocks
        self.recompute_stem = checkpointing
        for name, blocks in self.named_children():
            if name.startswith("layer"):
                stage = make_stage(list(blocks))
                transforms = [T for T in stage.children() if isinstance(T, (BasicTransform, BottleneckTransform))]
                stage.stride = pull_out_stride(transforms)  # type: ignore[assignment]
                stage.training, stage.grad_checkpointing = blocks.training, checkpointing
                setattr(self, name, stage)
        warn_without_rule(self.stages(), type(self).__name__, "timm's ResNet")

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Initialise as §8.1 does: He for convolutions, Xavier for the classifier; coefficients at their start.

        Args:
            zero_init_last: start every T at 0 and not at the constructor's ``init_last``.
        """
        if zero_init_last:
            self.init_last = 0.0
        super().init_weights(zero_init_last=False)
        if isinstance(self.fc, nn.Linear):
            nn.init.xavier_uniform_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)
        for stage in self.stages():
            if hasattr(stage, "reset_parameters"):
                stage.reset_parameters()
        self.start_transforms()

    @torch.jit.ignore
    def start_transforms(self) -> None:
        """Set the weight of each transform's last normalisation to ``init_last``."""
        for stage in self.stages():
            if isinstance(stage, StageRule):  # not yet replaced otherwise
                self._scale_transforms(stage.transforms(), start_weight(self.init_last, stage.gains()))

    @torch.jit.ignore
    def _scale_transforms(self, transforms: Iterable[Any], gamma: float) -> None:
        for transform in transforms:
            weight = getattr(transform.last_norm(), "weight", None)
            if weight is not None:
                nn.init.constant_(weight, gamma)
            elif self.init_last not in ("auto", 1.0):
                raise ValueError(f"init_last={self.init_last}: must be 1 with a norm_layer that has no weight")

    @torch.jit.ignore
    def stages(self) -> List[Any]:
        """Return ``layer1``, ``layer2``, …."""
        return [module for name, module in self.named_children() if name.startswith("layer")]

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute stem and stages in the backward pass."""
        self.recompute_stem = enable
        for stage in self.stages():
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> StagedResNet:
        """Make this an equal network for evaluation, in place, with fewer operations.

        This is timm's ``reparameterize_model``, which leaves out the stem. Normalisations are folded into convolutions,
        and short heavy-ball stages of bottlenecks compute no iterates.
        """
        fold_into(self, "conv1", "bn1")
        return reparameterize_model(self, inplace=True)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Group parameters by block; coefficients belong to a stage's last."""
        matcher = super().group_matcher(coarse)
        if not coarse:
            matcher["blocks"] = [(matcher["blocks"], None), (r"^layer(\d+)\.(?:beta|algorithm)", (99999,))]
        return matcher

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Return the names of parameters without weight decay: the learned coefficients."""
        return {name for name, _ in self.named_parameters() if COEFFICIENTS.fullmatch(name)}


class CifarStagedResNet(StagedResNet):
    """The ResNet for 32×32 images: a 3×3 stem, three stages of two-layer transforms, 6n + 2 layers (§8).

    Args:
        layers: transforms in each of the three stages; (n, n, n) in the paper.
        channels: width of each stage, not decreasing.
        num_classes: number of classes.
        in_chans: number of input channels.
        global_pool: timm's pooling type.
        act_layer: activation.
        norm_layer: normalisation.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last transform, growing linearly from 0.
        drop_block_rate: rate of DropBlock in the last two stages, with timm's sizes of blocks.
        zero_init_last: as for :class:`StagedResNet`.
        init_last: as for :class:`StagedResNet`.
        final_norm: as for :class:`StagedResNet`.
        device: device of the parameters.
        dtype: data type of the parameters.

    Raises:
        ValueError: an argument is out of range; nothing was allocated.
    """

    def __init__(
        self,
        layers: Tuple[int, ...] = (3, 3, 3),
        channels: Tuple[int, ...] = (16, 32, 64),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        act_layer: Union[str, Type[nn.Module]] = "relu",
        norm_layer: Union[str, Type[nn.Module]] = "batchnorm2d",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_block_rate: float = 0.0,
        zero_init_last: bool = False,
        init_last: Start = DEFAULT_START,
        final_norm: bool = False,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        # 55 lines: fifteen arguments, their checks, then the layers in order.
        start = check_start(init_last, zero_init_last)
        check_bool("final_norm", final_norm)
        check_layers("layers", layers, stages=3)
        check_layers("channels", channels, stages=3)
        if sorted(channels) != list(channels):
            raise ValueError(f"channels={channels!r}: must not decrease, the shortcut can only add channels")
        rates = dict(drop_rate=drop_rate, drop_path_rate=drop_path_rate, drop_block_rate=drop_block_rate)
        _check_resnet_kwargs(dict(num_classes=num_classes, in_chans=in_chans, **rates))
        nn.Module.__init__(self)  # not ResNet's, whose stem and four stages are ImageNet's
        dd: Dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.init_last = start
        self.grad_checkpointing = False
        act, norm = get_act_layer(act_layer), get_norm_layer(norm_layer)

        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False, **dd)
        self.bn1 = norm(channels[0], **dd)
        self.act1 = act(inplace=True)
        self.feature_info: List[Dict[str, Any]] = [dict(num_chs=channels[0], reduction=1, module="act1")]

        drop_path = torch.linspace(0, drop_path_rate, sum(layers), device="cpu").split(list(layers))
        kinds = dict(act_layer=act, norm_layer=norm, **dd)
        for i, (planes, drop_block) in enumerate(zip(channels, drop_blocks(drop_block_rate)[1:])):
            inplanes, stride = (channels[i - 1], 2) if i else (channels[0], 1)
            stage = _cifar_stage(inplanes, planes, stride, drop_path[i].tolist(), drop_block=drop_block, **kinds)
            self.add_module(f"layer{i + 1}", stage)
            self.feature_info.append(dict(num_chs=planes, reduction=2**i, module=f"layer{i + 1}"))

        self.norm, self.act = None, None
        if final_norm:
            self.norm, self.act = norm(channels[-1], **dd), act(inplace=True)
        self.num_features = channels[-1]
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.init_weights()

    @torch.jit.ignore
    def convolve_shortcuts(self) -> CifarStagedResNet:
        """Replace padded shortcuts by convolutions, in place, for pruning.

        These tools follow convolutions, not paddings. The weights are zeros and ones, are not trained, and are part of
        the state dict.
        """
        for module in self.modules():
            if isinstance(module, BasicTransform) and isinstance(module.downsample, PadShortcut):
                module.downsample = module.downsample.as_convolution(module.conv1.weight)
        return self

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's output, shape (batch, channels[2], ⌈height / 4⌉, ⌈width / 4⌉)."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.normalise(self.layer3(self.layer2(self.layer1(x))))

    def feature_maps(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the stem's and each stage's output."""
        x = self.act1(self.bn1(self.conv1(x)))
        yield x
        for stage in self.stages():
            x = stage(x)
            yield x


def _cifar_stage(inplanes: int, planes: int, stride: int, drop_path: List[float], **kwargs: Any) -> nn.Sequential:
    """Return a chain of two-layer transforms, one per drop-path rate.

    The first has the stride and the padded shortcut.
    """
    blocks = []
    for rate in drop_path:
        blocks.append(
            BasicTransform(
                inplanes,
                planes,
                stride,
                downsample=PadShortcut(planes - inplanes, stride) if stride > 1 or planes != inplanes else None,
                drop_path=DropPath(rate) if rate else None,
                **kwargs,
            )
        )
        inplanes, stride = planes, 1
    return nn.Sequential(*blocks)


def _check_resnet_kwargs(kwargs: Dict[str, Any]) -> None:
    """Check the arguments that timm's ResNet does not check."""
    check_int("num_classes", kwargs.get("num_classes", 0), 0)
    check_int("in_chans", kwargs.get("in_chans", 3), 1)
    check_one_of("output_stride", kwargs.get("output_stride", 32), (8, 16, 32))
    check_one_of("stem_type", kwargs.get("stem_type", ""), ("", "deep", "deep_tiered"))
    if "channels" in kwargs:
        check_layers("channels", kwargs["channels"], stages=4)
    for name in ("drop_rate", "drop_path_rate", "drop_block_rate"):
        check_rate(name, kwargs.get(name, 0.0))
    for name in ("replace_stem_pool", "avg_down"):
        check_bool(name, kwargs.get(name, False))
