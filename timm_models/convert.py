"""Warm start: turn timm's trained networks into HBNet and AGDNet.

Both families contain the older one as a special case, so training can continue from its weights and coefficients:
``to_heavy_ball(resnet, learn_beta=True)`` starts at β1 = 1, β2 = 0, ``to_nesterov(densenet)`` at α = 1, β = 0. An HBNet
or AGDNet starts at its present coefficients.

timm ≥ 1.0.31 saves the result and its arguments under the name of the HBNet or AGDNet that they build:
``save_for_hf(hbnet, "folder")`` and ``timm.create_model("local-dir:folder", pretrained=True)``. Saving is a
``KeyError`` if there is no such name (``resnet50d``), or if an older timm would not save the arguments, because
``resnet18`` would load the weights as another function. Then the caller passes the name and ``model_args``::

    hbnet.pretrained_cfg["architecture"] = "hbnet18"
    rule = dict(beta1=1.0, beta2=0.0, learn_beta=True, post_act=True, stride_in_1x1=False)  # beta, learn_alpha
    save_for_hf(hbnet, "folder", model_args=rule)
"""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

from timm.models.densenet import DenseBlock, DenseLayer, DenseNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from optinspired_plugins._checks import check_bool, check_finite

from .agdnet import AGDNet, CifarAGDNet
from .hbnet import CifarHBNet, HBNet
from .stages.checkpoint_rules import warn_without_rule
from .stages.heavy_ball import HeavyBallRule, HeavyBallStage
from .stages.nesterov import NesterovBlock, SourceLayer
from .stages.transforms import BasicTransform, BottleneckTransform

__all__ = ["to_heavy_ball", "to_nesterov"]

_TRANSFORMS = {BasicBlock: BasicTransform, Bottleneck: BottleneckTransform}
# Only models that block and layers, or growth rate and blocks, describe completely.
_NAMES = {f"resnet{depth}": f"hbnet{depth}" for depth in (18, 34, 50, 101, 152)} | {
    f"densenet{depth}": f"agdnet{depth}" for depth in (121, 161, 169, 201)
}


def to_heavy_ball(
    resnet: Any,
    beta1: float | None = None,
    beta2: float | None = None,
    learn_beta: bool = False,
    post_act: bool | None = None,
) -> HBNet | CifarHBNet:
    """Turn timm's ResNet, or an HBNet with constant coefficients, into an HBNet.

    With the defaults it computes the same function, to the bit. The result has copies of the parameters and buffers,
    and the same classes, input channels, training mode, ``requires_grad``, dtype and device.

    Args:
        resnet: a ``timm.models.ResNet`` of plain ``BasicBlock`` or ``Bottleneck`` blocks, with any stem, shortcut,
            attention, dilation or anti-aliasing; or an HBNet, also one for CIFAR, with constant coefficients.
        beta1: β1 of (16), finite; ``None`` for 1, or the HBNet's value.
        beta2: β2 of (16), finite; ``None`` for 0, or the HBNet's value.
        learn_beta: learn β1 and β2 of every step from these values.
        post_act: keep ResNet's activation after every addition; ``None`` keeps it if there is one.

    Raises:
        TypeError: the model is of another kind; the message names it.
        ValueError: an argument is out of range; the model learns coefficients, or has no activation to keep.
    """
    start = _rule_of(resnet)
    changes: dict[str, Any] = dict(beta1=beta1, beta2=beta2, post_act=post_act)
    rule = replace(start, learn_beta=learn_beta, **{name: x for name, x in changes.items() if x is not None})
    if rule.post_act and not start.post_act:
        raise ValueError("post_act=True: must be False or None, the model has no activation after its additions")
    arguments = {name: value for name, value in asdict(rule).items() if name != "memory"}
    net = copy.deepcopy(resnet)
    if type(net) is ResNet:
        _become_hbnet(net, rule)
        _name(net, **arguments, stride_in_1x1=False)
        return net
    _change_rule(net, rule)
    _name(net, **arguments)
    return net


def to_nesterov(densenet: Any, beta: float | None = None, learn_alpha: bool = True) -> AGDNet:
    """Turn timm's DenseNet, or an AGDNet, into an AGDNet.

    With the defaults it computes the same function, with α to be learned. The result has copies of the parameters and
    buffers, and the same classes, input channels, training mode, ``requires_grad``, dtype and device.

    Args:
        densenet: a ``timm.models.DenseNet``, with any stem, activation or anti-aliasing; or an AGDNet, also one for
            CIFAR.
        beta: β of (21), finite; ``None`` for 0, or the AGDNet's value.
        learn_alpha: learn α, from 1 or from the AGDNet's value.

    Raises:
        TypeError: the model is of another kind; the message names it.
        ValueError: ``beta`` is not finite; ``learn_alpha=False``, and the model has learned α.
    """
    check_bool("learn_alpha", learn_alpha)
    if beta is not None:
        beta = check_finite("beta", beta)
    _check_type("densenet", densenet, DenseNet, AGDNet, CifarAGDNet)
    for name, block in densenet.features.named_children():
        if name.startswith("denseblock"):
            _check_type(f"densenet.features.{name}", block, DenseBlock, NesterovBlock)
            for key, layer in block.items():
                _check_type(f"densenet.features.{name}.{key}", layer, DenseLayer, SourceLayer)
                _check_type(f"densenet.features.{name}.{key}.conv1", layer.conv1, nn.Conv2d)
                if isinstance(layer, SourceLayer) and layer.alpha is not None and not learn_alpha:
                    raise ValueError("learn_alpha=False: must be True for a model that has learned α")
    if beta is None:
        beta = getattr(densenet.features.denseblock1, "beta", 0.0)
    net = copy.deepcopy(densenet)
    if type(net) is DenseNet:
        net.__class__ = AGDNet
    net.propagate_by_nesterov(beta, learn_alpha)
    _name(net, beta=beta, learn_alpha=learn_alpha)
    return net


def _rule_of(net: Any) -> HeavyBallRule:
    """Return the network's rule; TypeError or ValueError if there is none."""
    _check_type("resnet", net, ResNet, HBNet, CifarHBNet)
    stages = [(f"resnet.{name}", stage) for name, stage in net.named_children() if name.startswith("layer")]
    if type(net) is ResNet:
        for name, stage in stages:
            for i, block in enumerate(stage.children()):
                _check_type(f"{name}[{i}]", block, *_TRANSFORMS)
        return HeavyBallRule(beta1=1.0, beta2=0.0, post_act=True)
    for name, stage in stages:
        _check_type(name, stage, HeavyBallStage)
        if stage.learn_beta:
            raise ValueError(f"{name} has learn_beta=True: must have constant coefficients")
    return net.layer1.settings


def _become_hbnet(net: Any, rule: HeavyBallRule) -> None:
    """Turn timm's ResNet into an HBNet in place."""
    for module in net.modules():
        if type(module) in _TRANSFORMS:
            module.__class__ = _TRANSFORMS[type(module)]
    net.__class__ = HBNet
    net.drop_norm()
    net.propagate_by_heavy_ball(rule)


def _change_rule(net: Any, rule: HeavyBallRule) -> None:
    """Replace the stages of an HBNet by stages of another rule over the same transforms."""
    for name, stage in net.named_children():
        if name.startswith("layer"):
            new = HeavyBallStage(list(stage), rule)
            new.stride, new.training, new.grad_checkpointing = stage.stride, stage.training, stage.grad_checkpointing
            setattr(net, name, new)
    warn_without_rule(net.stages(), type(net).__name__, "timm's ResNet")


def _name(net: Any, **arguments: Any) -> None:
    """Record the name and arguments that build the network, for timm's ``save_for_hf``.

    Without a name that builds it, the name of the original network is removed.
    """
    cfg = getattr(net, "pretrained_cfg", {})
    name = cfg.pop("architecture", "")
    name = name if name.startswith(("hbnet", "agdnet")) else _NAMES.get(name)
    if name and hasattr(net, "_model_args"):  # recorded by timm ≥ 1.0.31
        cfg["architecture"] = name
        net._model_args = {**net._model_args, **arguments}


def _check_type(name: str, value: object, *allowed: type) -> None:
    """TypeError unless ``value`` has exactly one of the types: a subclass may compute something else."""
    if type(value) not in allowed:
        kind, names = type(value), ", ".join(f"{t.__module__}.{t.__name__}" for t in allowed)
        raise TypeError(f"{name} is a {kind.__module__}.{kind.__name__}: must be exactly {names}")
