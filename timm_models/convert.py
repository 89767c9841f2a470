"""Warm start: a trained ResNet or DenseNet of timm's as the HBNet or AGDNet that computes the same function.

Both families contain the older one as a special case, so training can go on from its weights with coefficients that
start there: ``to_heavy_ball(resnet, learn_beta=True)``
starts at β1 = 1, β2 = 0,
``to_nesterov(densenet)`` at α = 1, β = 0.
"""

from __future__ import annotations

import copy
from typing import Any

from timm.models.densenet import DenseBlock, DenseLayer, DenseNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from ._checks import check_finite
from .agdnet import AGDNet
from .hbnet import HBNet
from .stages import BasicTransform, BottleneckTransform

__all__ = ["to_heavy_ball", "to_nesterov"]

_TRANSFORMS = {BasicBlock: BasicTransform, Bottleneck: BottleneckTransform}


def to_heavy_ball(
    resnet: Any, beta1: float = 1.0, beta2: float = 0.0, learn_beta: bool = False, post_act: bool = True
) -> HBNet:
    """Turn a ResNet of timm's, weights included, into an HBNet.

    With the defaults it computes the same function, to the bit. The result has copies of the parameters and buffers
    and keeps classes, input channels, training mode, ``requires_grad``, dtype and device.

    Args:
        resnet: a ``timm.models.ResNet`` of plain ``BasicBlock`` or ``Bottleneck`` blocks, with any stem, shortcut,
            attention, dilation or anti-aliasing.
        beta1: β1 of (16), finite.
        beta2: β2 of (16), finite.
        learn_beta: learn β1 and β2 of every step from these values.
        post_act: keep ResNet's activation after every addition.

    Raises:
        TypeError: the model is of another kind; the message names it.
        ValueError: a coefficient is not finite.
    """
    beta1, beta2 = check_finite("beta1", beta1), check_finite("beta2", beta2)
    _check_type("resnet", resnet, ResNet)
    for name, stage in resnet.named_children():
        if name.startswith("layer"):
            for i, block in enumerate(stage.children()):
                _check_type(f"resnet.{name}[{i}]", block, *_TRANSFORMS)
    net = copy.deepcopy(resnet)
    # Network and blocks keep every attribute: only what their forward computes changes.
    for module in net.modules():
        if type(module) in _TRANSFORMS:
            module.__class__ = _TRANSFORMS[type(module)]
    net.__class__ = HBNet
    net.propagate_by_heavy_ball(beta1, beta2, learn_beta, post_act)
    return net


def to_nesterov(densenet: Any, beta: float = 0.0, learn_alpha: bool = True) -> AGDNet:
    """Turn a DenseNet of timm's, weights included, into an AGDNet.

    With the defaults it computes the same function, and α may be learned from there. The result has copies of the
    parameters and buffers and keeps classes, input channels, training mode, ``requires_grad``, dtype and device.

    Args:
        densenet: a ``timm.models.DenseNet``, with any stem, activation or anti-aliasing.
        beta: β of (21), finite.
        learn_alpha: learn α from 1.

    Raises:
        TypeError: the model is of another kind; the message names it.
        ValueError: ``beta`` is not finite.
    """
    beta = check_finite("beta", beta)
    _check_type("densenet", densenet, DenseNet)
    for name, block in densenet.features.named_children():
        if name.startswith("denseblock"):
            _check_type(f"densenet.features.{name}", block, DenseBlock)
            for key, layer in block.items():
                _check_type(f"densenet.features.{name}.{key}", layer, DenseLayer)
                _check_type(f"densenet.features.{name}.{key}.conv1", layer.conv1, nn.Conv2d)
    net = copy.deepcopy(densenet)
    net.__class__ = AGDNet
    net.propagate_by_nesterov(beta, learn_alpha)
    return net


def _check_type(name: str, value: object, *allowed: type) -> None:
    """TypeError unless ``value`` is of exactly one of the types: a subclass may compute something else."""
    if type(value) not in allowed:
        found, names = type(value), ", ".join(f"{t.__module__}.{t.__name__}" for t in allowed)
        raise TypeError(f"{name} is a {found.__module__}.{found.__name__}: must be exactly {names}")
