"""OptNet: networks of ResNet's shape for any optimisation algorithm, also one that the user wrote.

A stage restarts the algorithm at x_0 = S(u), the projected shortcut of its input u. The layer of its first step is
ResNet's transition block, T_0(u) + S(u); from then on step k uses ∇f(z) = z − T_k(z), which gives (7) and (11)-(14).
The transforms and names are ResNet's, so one ``resnet50`` state dict loads strictly into ``optnet50`` for
every algorithm with one path. Algorithms with two paths (ADMM, DMRNet) have a transform for each call, in the order of
calls: ``layer1.0`` is T'_0, ``layer1.1`` is T_0.

Paper: `Optimization-inspired Manual Architecture Design and Neural Architecture Search`.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, Callable, Dict, List, Sequence, Tuple, Type

from timm.models import generate_default_cfgs, register_model
from torch import nn

from optinspired_plugins.algorithms import ALGORITHMS, Algorithm, HeavyBall, load_algorithm
from optinspired_plugins.propagation import TwoPath, layers_per_step

from ._cfgs import cifar_cfg, imagenet_cfg
from ._checks import check_layers
from ._features import build_with_features
from .algorithm_stages import make_stage
from .skeleton import CifarStagedResNet, StagedResNet
from .stages import BasicTransform, BottleneckTransform

__all__ = ["NETWORK_ALGORITHMS", "CifarOptNet", "OptNet"]

# The names of section 3, with the β of §7.1 for the heavy ball, and the last row of Table 3.
NETWORK_ALGORITHMS: Dict[str, Callable[[], Any]] = {
    **ALGORITHMS,
    "hb": partial(HeavyBall, beta=1.0),
    "dmrnet": TwoPath,
}


class OptNet(StagedResNet):
    """A network on timm's ResNet whose stages propagate by an algorithm.

    Args:
        block: ``BasicTransform`` or ``BottleneckTransform``.
        layers: steps in each of the four stages.
        algorithm: ``"gd"`` (7), ``"hb"`` (11) with β = 1, which is HBNet, ``"agd"`` (12), ``"agd2"`` (13), ``"admm"``
            (14), ``"dmrnet"`` (20) with ½; ``"module:attribute"``; or an object with ``init``, ``step`` and ``result``.
            Each stage has a copy. If it is a module or holds parameters they are learned, without weight decay.
        **kwargs: as for :class:`~timm_models.skeleton.StagedResNet`: ``stride_in_1x1``, ``init_last`` and timm's
            ``ResNet`` arguments.

    Raises:
        TypeError: the algorithm lacks a method; an argument is unknown.
        ValueError: the algorithm's name is unknown, a step of it has no layer or a result of another shape or one
            that is not finite; an argument is out of range. Nothing was allocated.
    """

    def __init__(
        self, block: Type[nn.Module], layers: Tuple[int, ...], algorithm: str | Algorithm = "hb", **kwargs: Any
    ) -> None:
        check_layers("layers", layers, stages=4)
        rule = load_algorithm(algorithm, NETWORK_ALGORITHMS)
        counts = layers_per_step(rule, max(layers))
        super().__init__(block, layers, **kwargs)
        _propagate(self, rule, counts, kwargs)


class CifarOptNet(CifarStagedResNet):
    """The same for 32×32 images: a 3×3 stem, three stages of two-layer transforms, 6n + 2 layers (§8).

    Args:
        layers: steps in each of the three stages.
        algorithm: as for :class:`OptNet`.
        **kwargs: as for :class:`~timm_models.skeleton.CifarStagedResNet`.

    Raises:
        TypeError: as for :class:`OptNet`.
        ValueError: likewise.
    """

    def __init__(self, layers: Tuple[int, ...] = (3, 3, 3), algorithm: str | Algorithm = "hb", **kwargs: Any) -> None:
        check_layers("layers", layers, stages=3)
        rule = load_algorithm(algorithm, NETWORK_ALGORITHMS)
        counts = layers_per_step(rule, max(layers))
        super().__init__(layers, **kwargs)
        _propagate(self, rule, counts, kwargs)


def _propagate(net: StagedResNet, algorithm: Algorithm, counts: Sequence[int], kwargs: Dict[str, Any]) -> None:
    """Give every stage of the network the algorithm and as many transforms as it calls."""

    def stage(blocks: List[nn.Module]) -> nn.Module:
        layers = counts[: len(blocks)]
        transforms = [T for block, count in zip(blocks, layers) for T in _paths(block, count)]
        own = copy.deepcopy(algorithm)
        if isinstance(own, nn.Module):
            own.to(device=kwargs.get("device"), dtype=kwargs.get("dtype"))
        return make_stage(transforms, own, layers)

    net.propagate(stage)
    if max(counts) > 1:
        start = {name: kwargs[name] for name in ("zero_init_last", "init_last") if name in kwargs}
        net.init_weights(**start)  # the paths start apart


def _paths(block: Any, count: int) -> List[nn.Module]:
    """The block and copies of it, one a call of its step; they share its shortcut."""
    copies = [copy.deepcopy(block) for _ in range(count - 1)]
    for other in copies:
        other.downsample = None
    return [block, *copies]


def _create_optnet(variant: str, pretrained: bool = False, **kwargs: Any) -> OptNet:
    return build_with_features(OptNet, variant, pretrained, **kwargs)


def _create_cifar_optnet(variant: str, pretrained: bool = False, **kwargs: Any) -> CifarOptNet:
    return build_with_features(CifarOptNet, variant, pretrained, feature_indices=(0, 1, 2, 3), **kwargs)


default_cfgs = generate_default_cfgs(
    {f"optnet{depth}.untrained": imagenet_cfg(first_conv="conv1", classifier="fc") for depth in (18, 34, 50, 101)}
    | {f"optnet{depth}.untrained": cifar_cfg(first_conv="conv1", classifier="fc") for depth in (20, 56, 110)}
)


@register_model
def optnet18(pretrained: bool = False, **kwargs: Any) -> OptNet:
    """OptNet-18."""
    model_args = dict(block=BasicTransform, layers=(2, 2, 2, 2))
    return _create_optnet("optnet18", pretrained, **dict(model_args, **kwargs))


@register_model
def optnet34(pretrained: bool = False, **kwargs: Any) -> OptNet:
    """OptNet-34."""
    model_args = dict(block=BasicTransform, layers=(3, 4, 6, 3))
    return _create_optnet("optnet34", pretrained, **dict(model_args, **kwargs))


@register_model
def optnet50(pretrained: bool = False, **kwargs: Any) -> OptNet:
    """OptNet-50."""
    model_args = dict(block=BottleneckTransform, layers=(3, 4, 6, 3))
    return _create_optnet("optnet50", pretrained, **dict(model_args, **kwargs))


@register_model
def optnet101(pretrained: bool = False, **kwargs: Any) -> OptNet:
    """OptNet-101."""
    model_args = dict(block=BottleneckTransform, layers=(3, 4, 23, 3))
    return _create_optnet("optnet101", pretrained, **dict(model_args, **kwargs))


@register_model
def optnet20(pretrained: bool = False, **kwargs: Any) -> CifarOptNet:
    """OptNet-20 for CIFAR, n = 3."""
    model_args = dict(layers=(3, 3, 3))
    return _create_cifar_optnet("optnet20", pretrained, **dict(model_args, **kwargs))


@register_model
def optnet56(pretrained: bool = False, **kwargs: Any) -> CifarOptNet:
    """OptNet-56 for CIFAR, n = 9."""
    model_args = dict(layers=(9, 9, 9))
    return _create_cifar_optnet("optnet56", pretrained, **dict(model_args, **kwargs))


@register_model
def optnet110(pretrained: bool = False, **kwargs: Any) -> CifarOptNet:
    """OptNet-110 for CIFAR, n = 18."""
    model_args = dict(layers=(18, 18, 18))
    return _create_cifar_optnet("optnet110", pretrained, **dict(model_args, **kwargs))
