"""Warm start: a trained ResNet or DenseNet of timm's as the HBNet or AGDNet that computes the same function.

Both families contain the older one as a special case, so training can go on from its weights with coefficients that
start there: ``to_heavy_ball(resnet, learn_beta=True)`` starts at β1 = 1, β2 = 0, ``to_nesterov(densenet)`` at α = 1,
β = 0. An HBNet or AGDNet starts at its own.

timm ≥ 1.0.31 saves the result, with its arguments, under the name of ours that builds it:
``save_for_hf(hbnet, "folder")`` and ``timm.create_model("local-dir:folder", pretrained=True)``. Where there is no such
name (``resnet50d``), or an older timm would forget the arguments, saving is a ``KeyError``, for ``resnet18`` would load
the weights as another function. There the name and ``model_args`` are the caller's to give::

    hbnet.pretrained_cfg["architecture"] = "hbnet18"
    rule = dict(beta1=1.0, beta2=0.0, learn_beta=True, post_act=True, stride_in_1x1=False)  # beta, learn_alpha
    save_for_hf(hbnet, "folder", model_args=rule)
"""

from __future__ import annotations

import copy
from typing import Any

from timm.models.densenet import DenseBlock, DenseLayer, DenseNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from ._checks import check_bool, check_finite
from .agdnet import AGDNet, CifarAGDNet
from .hbnet import CifarHBNet, HBNet
from .stages.checkpoint_rules import announce
from .stages.heavy_ball import HeavyBallStage
from .stages.nesterov import NesterovBlock, SourceLayer
from .stages.transforms import BasicTransform, BottleneckTransform

__all__ = ["to_heavy_ball", "to_nesterov"]

_TRANSFORMS = {BasicBlock: BasicTransform, Bottleneck: BottleneckTransform}
# Only what timm's entry points make of block and layers, or growth rate and blocks, alone.
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
    """Turn a ResNet of timm's, or an HBNet with constant coefficients, weights included, into an HBNet.

    With the defaults it computes the same function, to the bit. The result has copies of the parameters and buffers
    and keeps classes, input channels, training mode, ``requires_grad``, dtype and device.

    Args:
        resnet: a ``timm.models.ResNet`` of plain ``BasicBlock`` or ``Bottleneck`` blocks, with any stem, shortcut,
            attention, dilation or anti-aliasing; or an HBNet, also one for CIFAR, that learns no coefficients yet.
        beta1: β1 of (16), finite; ``None`` for 1, or the HBNet's own.
        beta2: β2 of (16), finite; ``None`` for 0, or the HBNet's own.
        learn_beta: learn β1 and β2 of every step from these values.
        post_act: keep ResNet's activation after every addition; ``None`` keeps it where there is one.

    Raises:
        TypeError: the model is of another kind; the message names it.
        ValueError: an argument is out of range; the model learns coefficients, or has no activation to keep.
    """
    given = {name: check_finite(name, beta) for name, beta in (("beta1", beta1), ("beta2", beta2)) if beta is not None}
    check_bool("learn_beta", learn_beta)
    if post_act is not None:
        check_bool("post_act", post_act)
        given["post_act"] = post_act
    own = _own_rule(resnet)
    rule = own | given | dict(learn_beta=learn_beta)
    if rule["post_act"] and not own["post_act"]:
        raise ValueError("post_act=True: must be False or None, the model has no activation after its additions")
    net = copy.deepcopy(resnet)
    if type(net) is not ResNet:
        for name, stage in net.named_children():
            if name.startswith("layer"):
                setattr(net, name, _stage_like(stage, rule))
        announce(net.stages(), type(net).__name__, "timm's ResNet")
        _name(net, **rule)
        return net
    # Network and blocks keep every attribute: only what their forward computes changes.
    for module in net.modules():
        if type(module) in _TRANSFORMS:
            module.__class__ = _TRANSFORMS[type(module)]
    net.__class__ = HBNet
    net.propagate_by_heavy_ball(**rule)
    _name(net, **rule, stride_in_1x1=False)
    return net


def to_nesterov(densenet: Any, beta: float | None = None, learn_alpha: bool = True) -> AGDNet:
    """Turn a DenseNet of timm's, or an AGDNet, weights included, into an AGDNet.

    With the defaults it computes the same function, and α may be learned from there. The result has copies of the
    parameters and buffers and keeps classes, input channels, training mode, ``requires_grad``, dtype and device.

    Args:
        densenet: a ``timm.models.DenseNet``, with any stem, activation or anti-aliasing; or an AGDNet, also one for
            CIFAR.
        beta: β of (21), finite; ``None`` for 0, or the AGDNet's own.
        learn_alpha: learn α, from 1 or from the AGDNet's own.

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


def _own_rule(net: Any) -> dict[str, Any]:
    """Return the rule by which the network propagates; TypeError or ValueError where it is none to start from."""
    _check_type("resnet", net, ResNet, HBNet, CifarHBNet)
    stages = [(f"resnet.{name}", stage) for name, stage in net.named_children() if name.startswith("layer")]
    if type(net) is ResNet:
        for name, stage in stages:
            for i, block in enumerate(stage.children()):
                _check_type(f"{name}[{i}]", block, *_TRANSFORMS)
        return dict(beta1=1.0, beta2=0.0, post_act=True)
    for name, stage in stages:
        _check_type(name, stage, HeavyBallStage)
        if stage.learn_beta:
            raise ValueError(f"{name} has learn_beta=True: must have constant coefficients")
    first = net.layer1[0]
    act = first.act3 if isinstance(first, BottleneckTransform) else first.act2
    return dict(beta1=net.layer1.beta1, beta2=net.layer1.beta2, post_act=not isinstance(act, nn.Identity))


def _stage_like(stage: HeavyBallStage, rule: dict[str, Any]) -> HeavyBallStage:
    """Return a stage of another rule over the same transforms."""
    new = HeavyBallStage(list(stage), **rule, memory="reversible" if stage.reversible else "stored")
    new.stride, new.training, new.grad_checkpointing = stage.stride, stage.training, stage.grad_checkpointing
    return new


def _name(net: Any, **arguments: Any) -> None:
    """Give timm's save what builds the network again, or take from it the name that would build another one."""
    cfg = getattr(net, "pretrained_cfg", {})
    name = cfg.pop("architecture", "")
    name = name if name.startswith(("hbnet", "agdnet")) else _NAMES.get(name)
    if name and hasattr(net, "_model_args"):  # timm's record, from 1.0.31 on
        cfg["architecture"] = name
        net._model_args = {**net._model_args, **arguments}


def _check_type(name: str, value: object, *allowed: type) -> None:
    """TypeError unless ``value`` is of exactly one of the types: a subclass may compute something else."""
    if type(value) not in allowed:
        found, names = type(value), ", ".join(f"{t.__module__}.{t.__name__}" for t in allowed)
        raise TypeError(f"{name} is a {found.__module__}.{found.__name__}: must be exactly {names}")
