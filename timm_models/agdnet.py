"""AGDNet: Nesterov's accelerated gradient descent read as a network (§7.2).

A block of AGDNet propagates z_{k+1} = Σ_{j≤k} α_{k+1,j} T(z_j) + β (z_k − Σ_{j≤k} h_{k+1,j} z_j) (21) with α learned
from 1, β = 0.1 and h from (5). The rule is :mod:`timm_models.stages.nesterov`. DenseNet is α = 1, β = 0: a convolution
of concatenated sources is the sum of one convolution per source. Names and layers are DenseNet's; every layer gains
``alpha`` for its first convolution.

Paper: `Optimization-inspired Manual Architecture Design and Neural Architecture Search`.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

import torch
from timm.layers import _assert, create_classifier, get_norm_act_layer
from timm.models import generate_default_cfgs
from timm.models.densenet import DenseNet, DenseTransition
from timm.utils import reparameterize_model
from torch import Tensor, nn

from optinspired_plugins._checks import check_bool, check_finite, check_int, check_layers, check_one_of, check_rate
from optinspired_plugins.memory.eager import is_compiled_by_dynamo, is_eager

from ._cfgs import cifar_cfg, imagenet_cfg
from ._conversions import KeepsActivations
from ._features import Intermediates, build_with_features
from ._host import register_model
from .inference.folding import fold_into
from .stages.checkpoint_rules import LearnedRule, warn_without_rule
from .stages.nesterov import NesterovBlock, PooledTransition, SourceLayer, Transition
from .stages.stem import recompute_chain, recompute_pooled
from .stages.unmodified import is_unmodified

__all__ = ["AGDNet", "CifarAGDNet"]


class AGDNet(Intermediates, LearnedRule, KeepsActivations, DenseNet):
    """AGDNet on timm's DenseNet: the same layers and names, blocks propagated by (21) (§7.2).

    Args:
        growth_rate: channels that a layer adds.
        block_config: layers in each block.
        beta: β of (21), finite.
        learn_alpha: learn α, from 1 and without weight decay; otherwise α = 1. ``beta=0, learn_alpha=False`` is
            timm's DenseNet, exactly.
        **kwargs: timm's ``DenseNet`` arguments: ``num_classes``, ``in_chans``, ``global_pool``, ``bn_size``,
            ``stem_type``, ``act_layer``, ``norm_layer``, ``aa_layer``, ``drop_rate``, ``proj_drop_rate``,
            ``memory_efficient``, ``aa_stem_only``, ``device``, ``dtype``.

    Raises:
        ValueError: an argument is out of range; nothing was allocated.
        TypeError: an argument is unknown.
    """

    coefficients, learn_option, conversion = ("alpha",), "learn_alpha", "to_nesterov"

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Tuple[int, ...] = (6, 12, 24, 16),
        beta: float = 0.1,
        learn_alpha: bool = True,
        **kwargs: Any,
    ) -> None:
        beta = check_finite("beta", beta)
        check_bool("learn_alpha", learn_alpha)
        _check_densenet_kwargs(dict(kwargs, growth_rate=growth_rate, block_config=block_config))
        super().__init__(growth_rate, block_config, **kwargs)
        self.propagate_by_nesterov(beta, learn_alpha)
        self.init_weights()

    @torch.jit.ignore
    def propagate_by_nesterov(self, beta: float, learn_alpha: bool) -> None:
        """Replace every dense block by a Nesterov block over the same layers."""
        names = [name for name, _ in self.features.named_children() if name.startswith("denseblock")]
        for name in names:
            dense = getattr(self.features, name)
            layers = [_source_layer(layer) for layer in dense.values()]
            for k, layer in enumerate(layers):
                if learn_alpha and layer.alpha is None:
                    layer.learn_alpha(sources=k + 1)
            block = NesterovBlock(layers, beta)
            block.training = dense.training
            setattr(self.features, name, block)
        warn_without_rule([getattr(self.features, name) for name in names], type(self).__name__, "timm's DenseNet")
        for module in self.features.children():
            if type(module) is DenseTransition:
                module.__class__ = PooledTransition if isinstance(module.pool, nn.AvgPool2d) else Transition
        self.recompute_stem = any(m.grad_checkpointing for m in self.modules() if isinstance(m, SourceLayer))
        # The stem rounds sizes up, the transitions round them down; at least one pixel must reach the last block.
        halvings = 2 ** (len(names) - 1)
        self.min_size = halvings if self.feature_info[0]["reduction"] == 1 else 4 * (halvings - 1) + 1

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise as timm's DenseNet, and α = 1; the CIFAR models' classifier as §8.1 does, by Xavier."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                self._start_classifier(module)
                nn.init.zeros_(module.bias)
            elif isinstance(module, SourceLayer) and module.alpha is not None:
                nn.init.ones_(module.alpha)

    @torch.jit.ignore
    def _start_classifier(self, classifier: nn.Linear) -> None:
        nn.init.kaiming_uniform_(classifier.weight, a=5**0.5)  # torch's default, which timm's DenseNet keeps

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised output of the last block, shape (batch, num_features, height / r, width / r).

        r is 2^(blocks + 1), and 2^(blocks − 1) in :class:`CifarAGDNet`: 32 and 4 by default.
        """
        _assert(x.shape[-2] >= self.min_size, f"image height {x.shape[-2]}: must be at least {self.min_size}")
        _assert(x.shape[-1] >= self.min_size, f"image width {x.shape[-1]}: must be at least {self.min_size}")
        if torch.jit.is_scripting():
            return self.features(x)
        return self._recompute_stem(x)

    @torch.jit.ignore
    def _recompute_stem(self, x: Tensor) -> Tensor:
        """Return ``features`` of x, without storing the stem's images before its pooling."""
        names = [name for name, _ in self.features.named_children()]
        can_save = is_eager(x) or (self.recompute_stem and is_compiled_by_dynamo())
        is_plain = not torch.is_grad_enabled() or not can_save or not is_unmodified(self.features, nn.Sequential)
        if is_plain or "pool0" not in names:
            return self.features(x)
        end = names.index("pool0") + 1
        head, tail, rest = self.features[: end - 2], self.features[end - 2 : end], self.features[end:]
        x = head(x)
        return rest(recompute_chain(list(tail), x) if self.recompute_stem else recompute_pooled(x, *tail))

    def feature_maps(self, x: Tensor) -> Iterator[Tensor]:
        """Yield outputs of stem, blocks and last normalisation."""
        ends = {info["module"].split(".")[1] for info in self.feature_info}
        for name, layer in self.features.named_children():
            x = layer(x)
            if name in ends:
                yield x

    @torch.jit.ignore
    def cut(self, last: int) -> None:
        """Remove the layers after feature map ``last``."""
        names = [name for name, _ in self.features.named_children()]
        end = names.index(self.feature_info[last]["module"].split(".")[1]) + 1
        self.add_module("features", self.features[:end])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute stem and first convolutions in the backward pass."""
        self.recompute_stem = enable
        for layer in self.modules():
            if isinstance(layer, SourceLayer):
                layer.grad_checkpointing = enable

    @torch.jit.ignore
    def fold_alpha(self) -> AGDNet:
        """Fold α into the convolutions, in place, for training or tools.

        The network computes the same by ordinary convolutions: α becomes a part of their weights.
        """
        for layer in self.modules():
            if isinstance(layer, SourceLayer):
                layer.fold_alpha()
        return self

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> AGDNet:
        """Make this an equal network for evaluation, in place, with fewer operations.

        This is timm's ``reparameterize_model``, which leaves out the stem. α and the normalisations around 1×1
        convolutions and in the stem are folded into the convolutions. Normalisations before a 3×3 convolution stay, and
        the last one, which :meth:`forward_features` returns.
        """
        names = [name for name, _ in self.features.named_children()]
        for conv, norm in pairwise(names):
            fold_into(self.features, conv, norm)
        return reparameterize_model(self, inplace=True)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Return the names of parameters without weight decay: α."""
        return {name for name, _ in self.named_parameters() if name.endswith(".alpha")}


class CifarAGDNet(AGDNet):
    """AGDNet for 32×32 images: a 3×3 stem and three blocks (§8).

    By default it has no bottlenecks and no compression.

    Args:
        growth_rate: channels that a layer adds.
        block_config: layers in each block; ((L − 4) / 3,) · 3 for L layers in all.
        beta: as for :class:`AGDNet`.
        learn_alpha: as for :class:`AGDNet`.
        num_classes: number of classes.
        in_chans: number of input channels.
        stem_chs: channels of the stem.
        bn_size: channels of a layer's bottleneck in units of ``growth_rate``; 0 for none.
        compression: share of the channels that a transition keeps, in (0, 1].
        global_pool: timm's pooling type.
        act_layer: activation.
        norm_layer: normalisation.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after every layer.
        device: device of the parameters.
        dtype: data type of the parameters.

    Raises:
        ValueError: an argument is out of range; nothing was allocated.
    """

    def __init__(
        self,
        growth_rate: int = 12,
        block_config: Tuple[int, ...] = (12, 12, 12),
        beta: float = 0.1,
        learn_alpha: bool = True,
        num_classes: int = 10,
        in_chans: int = 3,
        stem_chs: int = 16,
        bn_size: int = 0,
        compression: float = 1.0,
        global_pool: str = "avg",
        act_layer: str = "relu",
        norm_layer: str = "batchnorm2d",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        # 48 lines: sixteen arguments, their checks, then the layers in order.
        beta = check_finite("beta", beta)
        check_bool("learn_alpha", learn_alpha)
        sizes = dict(growth_rate=growth_rate, block_config=block_config, num_classes=num_classes, in_chans=in_chans)
        _check_densenet_kwargs(dict(sizes, drop_rate=drop_rate, proj_drop_rate=proj_drop_rate))
        check_int("stem_chs", stem_chs, 1)
        check_int("bn_size", bn_size, 0)
        if not 0 < check_finite("compression", compression) <= 1:
            raise ValueError(f"compression={compression!r}: must be in (0, 1]")
        if int((stem_chs + growth_rate) * compression) < 1:
            raise ValueError(f"compression={compression!r}: leaves no channel of {stem_chs + growth_rate}")
        nn.Module.__init__(self)  # not DenseNet's, whose stem and transitions are ImageNet's
        dd: Dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans = num_classes, in_chans
        norm_act = get_norm_act_layer(norm_layer, act_layer=act_layer)
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(in_chans, stem_chs, 3, padding=1, bias=False, **dd))
        self.feature_info: List[Dict[str, Any]] = [dict(num_chs=stem_chs, reduction=1, module="features.conv0")]
        make_layer = partial(
            _cifar_layer, growth=growth_rate, bottleneck=bn_size * growth_rate, norm_act=norm_act, **dd
        )
        self._add_blocks(block_config, compression, norm_act, partial(make_layer, drop_rate=proj_drop_rate), dd)
        self.propagate_by_nesterov(beta, learn_alpha)
        self.num_features = self.feature_info[-1]["num_chs"]
        self.global_pool, self.classifier = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **dd
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head_drop = nn.Dropout(drop_rate)
        self.init_weights()

    @torch.jit.ignore
    def _start_classifier(self, classifier: nn.Linear) -> None:
        nn.init.xavier_uniform_(classifier.weight)  # as in §8.1

    @torch.jit.ignore
    def _add_blocks(
        self,
        block_config: Tuple[int, ...],
        compression: float,
        norm_act: Any,
        make_layer: Callable[[int], SourceLayer],
        dd: Dict[str, Any],
    ) -> None:
        """Add dense blocks with transitions between them, and the last normalisation."""
        channels = self.feature_info[0]["num_chs"]
        for i, depth in enumerate(block_config):
            if i > 0:
                width = int(channels * compression)
                self.features.add_module(f"transition{i}", DenseTransition(channels, width, norm_act, **dd))
                channels = width
            block = nn.ModuleDict()
            for k in range(depth):
                block[f"denselayer{k + 1}"] = layer = make_layer(channels)
                channels += layer.growth
            self.features.add_module(f"denseblock{i + 1}", block)
            module = "features.norm5" if i == len(block_config) - 1 else f"features.denseblock{i + 1}"
            self.feature_info.append(dict(num_chs=channels, reduction=2**i, module=module))
        self.features.add_module("norm5", norm_act(channels, **dd))


def _source_layer(layer: Any) -> SourceLayer:
    """Return timm's dense layer as a :class:`SourceLayer`."""
    if isinstance(layer, SourceLayer):
        return layer
    parts = (layer.norm1, layer.conv1, layer.norm2, layer.conv2)
    new = SourceLayer(*parts, drop_rate=layer.drop_rate, grad_checkpointing=layer.grad_checkpointing)
    new.training = layer.training
    return new


def _cifar_layer(
    in_chans: int, growth: int, bottleneck: int, norm_act: Any, drop_rate: float, **dd: Any
) -> SourceLayer:
    norm1 = norm_act(in_chans, **dd)
    if not bottleneck:
        return SourceLayer(norm1, nn.Conv2d(in_chans, growth, 3, padding=1, bias=False, **dd), drop_rate=drop_rate)
    conv1 = nn.Conv2d(in_chans, bottleneck, 1, bias=False, **dd)
    conv2 = nn.Conv2d(bottleneck, growth, 3, padding=1, bias=False, **dd)
    return SourceLayer(norm1, conv1, norm_act(bottleneck, **dd), conv2, drop_rate=drop_rate)


def _check_densenet_kwargs(kwargs: Dict[str, Any]) -> None:
    """Check the arguments that timm's DenseNet does not check."""
    check_int("growth_rate", kwargs["growth_rate"], 1)
    check_layers("block_config", kwargs["block_config"])
    check_int("num_classes", kwargs.get("num_classes", 0), 0)
    check_int("in_chans", kwargs.get("in_chans", 3), 1)
    check_int("bn_size", kwargs.get("bn_size", 4), 1)
    check_one_of("stem_type", kwargs.get("stem_type", ""), ("", "deep", "deep_tiered", "deep_tiered_narrow"))
    for name in ("drop_rate", "proj_drop_rate"):
        check_rate(name, kwargs.get(name, 0.0))
    for name in ("memory_efficient", "aa_stem_only"):
        check_bool(name, kwargs.get(name, False))


def _create_agdnet(variant: str, pretrained: bool = False, **kwargs: Any) -> AGDNet:
    return build_with_features(AGDNet, variant, pretrained, flatten_sequential=True, **kwargs)


def _create_cifar_agdnet(variant: str, pretrained: bool = False, **kwargs: Any) -> CifarAGDNet:
    indices = (0, 1, 2, 3)
    return build_with_features(CifarAGDNet, variant, pretrained, indices, flatten_sequential=True, **kwargs)


_DEPTHS = (121, 161, 169, 201)
_CIFAR_DEPTHS = (40, 52)
_NAMES = dict(first_conv="features.conv0", classifier="classifier")

default_cfgs = generate_default_cfgs(
    {f"agdnet{depth}.untrained": imagenet_cfg(**_NAMES) for depth in _DEPTHS}
    | {
        f"agdnet{depth}_k12{suffix}.untrained": cifar_cfg(**_NAMES)
        for depth in _CIFAR_DEPTHS
        for suffix in ("", "_densenet")
    }
)


@register_model
def agdnet121(pretrained: bool = False, **kwargs: Any) -> AGDNet:
    """AGDNet-121."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 24, 16))
    return _create_agdnet("agdnet121", pretrained, **dict(model_args, **kwargs))


@register_model
def agdnet161(pretrained: bool = False, **kwargs: Any) -> AGDNet:
    """AGDNet-161."""
    model_args = dict(growth_rate=48, block_config=(6, 12, 36, 24))
    return _create_agdnet("agdnet161", pretrained, **dict(model_args, **kwargs))


@register_model
def agdnet169(pretrained: bool = False, **kwargs: Any) -> AGDNet:
    """AGDNet-169."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 32, 32))
    return _create_agdnet("agdnet169", pretrained, **dict(model_args, **kwargs))


@register_model
def agdnet201(pretrained: bool = False, **kwargs: Any) -> AGDNet:
    """AGDNet-201."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 48, 32))
    return _create_agdnet("agdnet201", pretrained, **dict(model_args, **kwargs))


@register_model
def agdnet40_k12(pretrained: bool = False, **kwargs: Any) -> CifarAGDNet:
    """AGDNet for CIFAR, growth rate k = 12, L = 40 layers."""
    model_args = dict(growth_rate=12, block_config=(12, 12, 12))
    return _create_cifar_agdnet("agdnet40_k12", pretrained, **dict(model_args, **kwargs))


@register_model
def agdnet52_k12(pretrained: bool = False, **kwargs: Any) -> CifarAGDNet:
    """AGDNet for CIFAR, growth rate k = 12, L = 52 layers."""
    model_args = dict(growth_rate=12, block_config=(16, 16, 16))
    return _create_cifar_agdnet("agdnet52_k12", pretrained, **dict(model_args, **kwargs))


@register_model
def agdnet40_k12_densenet(pretrained: bool = False, **kwargs: Any) -> CifarAGDNet:
    """DenseNet for CIFAR, k = 12, L = 40: α = 1, β = 0 (Table 4)."""
    model_args = dict(growth_rate=12, block_config=(12, 12, 12), beta=0.0, learn_alpha=False)
    return _create_cifar_agdnet("agdnet40_k12_densenet", pretrained, **dict(model_args, **kwargs))


@register_model
def agdnet52_k12_densenet(pretrained: bool = False, **kwargs: Any) -> CifarAGDNet:
    """DenseNet for CIFAR, k = 12, L = 52: α = 1, β = 0 (Table 4)."""
    model_args = dict(growth_rate=12, block_config=(16, 16, 16), beta=0.0, learn_alpha=False)
    return _create_cifar_agdnet("agdnet52_k12_densenet", pretrained, **dict(model_args, **kwargs))
