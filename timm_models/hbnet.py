"""HBNet: the heavy-ball method read as a network (§7.1).

A stage of HBNet propagates x_{k+1} = T_k(x_k) + β1 x_k + β2 x_{k−1} (16) with β1 = 1, β2 = −1; ResNet is β2 = 0. The
rule is :mod:`timm_models.stages.heavy_ball`. Names and T are ResNet's, so a ``resnet50`` state dict loads strictly into
``hbnet50``. There is no activation after the addition, since (16) has none; ``post_act=True`` adds ResNet's. With the
default coefficients HBNet is ``optnet50(algorithm="hb")``, the heavy ball with β = 1, in fewer operations and with more
options.

Paper: `Optimization-inspired Manual Architecture Design and Neural Architecture Search`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Tuple, Type

import torch
from timm.models import generate_default_cfgs
from torch import nn

from ._cfgs import cifar10_weights, cifar_cfg, imagenet_cfg
from ._features import build_with_features
from ._host import register_model
from .staged_resnet import CifarStagedResNet, StagedResNet
from .stages.heavy_ball import HeavyBallRule, HeavyBallStage
from .stages.transforms import BasicTransform, BottleneckTransform

__all__ = ["CifarHBNet", "HBNet"]


class _HeavyBallNet(StagedResNet):
    """The methods of networks of heavy-ball stages."""

    rule_class = HeavyBallRule

    @torch.jit.ignore
    def propagate_by_heavy_ball(self, rule: HeavyBallRule) -> None:
        """Replace every stage by a heavy-ball stage over the same blocks."""
        self.replace_stages(partial(HeavyBallStage, rule=rule))

    @torch.jit.ignore
    def set_memory(self, memory: str) -> None:
        """Store or recover the iterates from now on.

        Args:
            memory: ``"stored"`` or ``"reversible"``, as for the constructor.

        Raises:
            ValueError: ``memory`` is unknown, or the iterates cannot be recovered; nothing was changed.
        """
        stages = self.stages()
        rules = [replace(stage.settings, memory=memory) for stage in stages]
        for stage, rule in zip(stages, rules):
            rule.check_depth([len(stage)])
        for stage, rule in zip(stages, rules):
            stage.settings = rule


class HBNet(_HeavyBallNet):
    """HBNet on timm's ResNet: the same layers and names, stages propagated by (16) (§7.1).

    ``post_act=True, beta2=0, stride_in_1x1=False`` is timm's ResNet, exactly.

    Args:
        block: ``BasicTransform`` or ``BottleneckTransform``.
        layers: transforms in each of the four stages.
        **kwargs: the fields of :class:`~timm_models.stages.heavy_ball.HeavyBallRule`: ``beta1``, ``beta2``,
            ``learn_beta``, ``beta_lr_scale``, ``post_act``, ``memory``; and as for
            :class:`~timm_models.staged_resnet.StagedResNet`: ``stride_in_1x1``, ``init_last``, ``zero_init_last``,
            ``final_norm`` and timm's ``ResNet`` arguments.

            ``zero_init_last`` is not the default: with T = 0 the input of a stage of n layers reaches its output with
            the weight 1, 1, 0, −1, −1, 0, … for n = 0, 1, 2, …. A stage of 2, 5, 8, … layers then returns 0, and the
            layers around it get no gradient. Independent T of variance γ² add the variance (n − ⌊n/3⌋) γ², which the
            default ``init_last="auto"`` makes 1; with γ = 1, HBNet-110 diverges: see ``docs/results.md``.

    Raises:
        ValueError: an argument is out of range; nothing was allocated.
        TypeError: an argument is unknown.
    """

    def __init__(self, block: Type[nn.Module], layers: Tuple[int, ...], **kwargs: Any) -> None:
        rule = HeavyBallRule.pop_from(kwargs)
        rule.check_depth(layers)
        super().__init__(block, layers, **kwargs)
        self.propagate_by_heavy_ball(rule)
        self.start_transforms()


class CifarHBNet(_HeavyBallNet, CifarStagedResNet):
    """HBNet for 32×32 images: a 3×3 stem, three stages of two-layer transforms, 6n + 2 layers (§8).

    Args:
        layers: transforms in each of the three stages; (n, n, n) in the paper.
        **kwargs: the fields of :class:`~timm_models.stages.heavy_ball.HeavyBallRule`, and as for
            :class:`~timm_models.staged_resnet.CifarStagedResNet`.

    Raises:
        ValueError: an argument is out of range; nothing was allocated.
        TypeError: an argument is unknown.
    """

    def __init__(self, layers: Tuple[int, ...] = (3, 3, 3), **kwargs: Any) -> None:
        rule = HeavyBallRule.pop_from(kwargs)
        rule.check_depth(layers)
        super().__init__(layers, **kwargs)
        self.propagate_by_heavy_ball(rule)
        self.start_transforms()


def _create_hbnet(variant: str, pretrained: bool = False, **kwargs: Any) -> HBNet:
    return build_with_features(HBNet, variant, pretrained, **kwargs)


def _create_cifar_hbnet(variant: str, pretrained: bool = False, **kwargs: Any) -> CifarHBNet:
    return build_with_features(CifarHBNet, variant, pretrained, feature_indices=(0, 1, 2, 3), **kwargs)


_DEPTHS = (18, 34, 50, 101, 152)
_CIFAR_DEPTHS = (20, 32, 44, 56, 110)
_NAMES = dict(first_conv="conv1", classifier="fc")
_TRAINED = {"hbnet20": 89.81, "hbnet56": 90.52}  # top-1 by validate.py, in docs/results/weights.csv

default_cfgs = generate_default_cfgs(
    {f"{name}.cifar10": cifar10_weights(f"{name}.cifar10", top1, **_NAMES) for name, top1 in _TRAINED.items()}
    | {f"hbnet{depth}.untrained": imagenet_cfg(**_NAMES) for depth in _DEPTHS}
    | {
        f"{name}.untrained": cifar_cfg(**_NAMES)
        for depth in _CIFAR_DEPTHS
        for name in (f"hbnet{depth}", f"hbnet{depth}_resnet")
        if name not in _TRAINED
    }
)


@register_model
def hbnet18(pretrained: bool = False, **kwargs: Any) -> HBNet:
    """HBNet-18."""
    model_args = dict(block=BasicTransform, layers=(2, 2, 2, 2))
    return _create_hbnet("hbnet18", pretrained, **dict(model_args, **kwargs))


@register_model
def hbnet34(pretrained: bool = False, **kwargs: Any) -> HBNet:
    """HBNet-34."""
    model_args = dict(block=BasicTransform, layers=(3, 4, 6, 3))
    return _create_hbnet("hbnet34", pretrained, **dict(model_args, **kwargs))


@register_model
def hbnet50(pretrained: bool = False, **kwargs: Any) -> HBNet:
    """HBNet-50."""
    model_args = dict(block=BottleneckTransform, layers=(3, 4, 6, 3))
    return _create_hbnet("hbnet50", pretrained, **dict(model_args, **kwargs))


@register_model
def hbnet101(pretrained: bool = False, **kwargs: Any) -> HBNet:
    """HBNet-101."""
    model_args = dict(block=BottleneckTransform, layers=(3, 4, 23, 3))
    return _create_hbnet("hbnet101", pretrained, **dict(model_args, **kwargs))


@register_model
def hbnet152(pretrained: bool = False, **kwargs: Any) -> HBNet:
    """HBNet-152."""
    model_args = dict(block=BottleneckTransform, layers=(3, 8, 36, 3))
    return _create_hbnet("hbnet152", pretrained, **dict(model_args, **kwargs))


@register_model
def hbnet20(pretrained: bool = False, **kwargs: Any) -> CifarHBNet:
    """HBNet-20 for CIFAR, n = 3."""
    model_args = dict(layers=(3, 3, 3))
    return _create_cifar_hbnet("hbnet20", pretrained, **dict(model_args, **kwargs))


@register_model
def hbnet32(pretrained: bool = False, **kwargs: Any) -> CifarHBNet:
    """HBNet-32 for CIFAR, n = 5."""
    model_args = dict(layers=(5, 5, 5))
    return _create_cifar_hbnet("hbnet32", pretrained, **dict(model_args, **kwargs))


@register_model
def hbnet44(pretrained: bool = False, **kwargs: Any) -> CifarHBNet:
    """HBNet-44 for CIFAR, n = 7."""
    model_args = dict(layers=(7, 7, 7))
    return _create_cifar_hbnet("hbnet44", pretrained, **dict(model_args, **kwargs))


@register_model
def hbnet56(pretrained: bool = False, **kwargs: Any) -> CifarHBNet:
    """HBNet-56 for CIFAR, n = 9."""
    model_args = dict(layers=(9, 9, 9))
    return _create_cifar_hbnet("hbnet56", pretrained, **dict(model_args, **kwargs))


@register_model
def hbnet110(pretrained: bool = False, **kwargs: Any) -> CifarHBNet:
    """HBNet-110 for CIFAR, n = 18."""
    model_args = dict(layers=(18, 18, 18))
    return _create_cifar_hbnet("hbnet110", pretrained, **dict(model_args, **kwargs))


@register_model
def hbnet20_resnet(pretrained: bool = False, **kwargs: Any) -> CifarHBNet:
    """ResNet-20 for CIFAR, n = 3: β2 = 0 (Table 4)."""
    model_args = dict(layers=(3, 3, 3), beta2=0.0, post_act=True, init_last=1.0)
    return _create_cifar_hbnet("hbnet20_resnet", pretrained, **dict(model_args, **kwargs))


@register_model
def hbnet32_resnet(pretrained: bool = False, **kwargs: Any) -> CifarHBNet:
    """ResNet-32 for CIFAR, n = 5: β2 = 0 (Table 4)."""
    model_args = dict(layers=(5, 5, 5), beta2=0.0, post_act=True, init_last=1.0)
    return _create_cifar_hbnet("hbnet32_resnet", pretrained, **dict(model_args, **kwargs))


@register_model
def hbnet44_resnet(pretrained: bool = False, **kwargs: Any) -> CifarHBNet:
    """ResNet-44 for CIFAR, n = 7: β2 = 0 (Table 4)."""
    model_args = dict(layers=(7, 7, 7), beta2=0.0, post_act=True, init_last=1.0)
    return _create_cifar_hbnet("hbnet44_resnet", pretrained, **dict(model_args, **kwargs))


@register_model
def hbnet56_resnet(pretrained: bool = False, **kwargs: Any) -> CifarHBNet:
    """ResNet-56 for CIFAR, n = 9: β2 = 0 (Table 4)."""
    model_args = dict(layers=(9, 9, 9), beta2=0.0, post_act=True, init_last=1.0)
    return _create_cifar_hbnet("hbnet56_resnet", pretrained, **dict(model_args, **kwargs))


@register_model
def hbnet110_resnet(pretrained: bool = False, **kwargs: Any) -> CifarHBNet:
    """ResNet-110 for CIFAR, n = 18: β2 = 0 (Table 4)."""
    model_args = dict(layers=(18, 18, 18), beta2=0.0, post_act=True, init_last=1.0)
    return _create_cifar_hbnet("hbnet110_resnet", pretrained, **dict(model_args, **kwargs))
