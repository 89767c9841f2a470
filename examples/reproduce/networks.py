"""Networks of Table 4, smaller ones, and controls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from architecture_table import count
from timm.layers import BatchNormAct2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnetv2 import ResNetV2
from torch import nn

from timm_models import NETWORK_ALGORITHMS
from timm_models.stages.transforms import PadShortcut

__all__ = ["NETWORKS", "Network", "count_network", "learned_coefficients"]

# --- pre-activation ResNet: timm's ResNetV2 with the stem and the shortcuts of CIFAR ResNets --------------------------


def _create_preact(variant: str, n: int, pretrained: bool = False, **kwargs: Any) -> ResNetV2:
    """Create a pre-activation ResNet for CIFAR.

    It is timm's ResNetV2 of basic blocks with a 3×3 stem and option-A shortcuts. T is batch normalisation, ReLU and
    convolution, twice.
    """
    channels = (16, 32, 64)
    shape = dict(layers=[n] * 3, channels=channels, stem_chs=16, basic=True, bottle_ratio=1.0)
    parts = dict(conv_layer=_conv3x3, norm_layer=BatchNormAct2d)
    model = build_model_with_cfg(ResNetV2, variant, pretrained, **dict(shape, **parts, **kwargs))
    model.stem = model.stem[:1]
    model.stem.conv = _conv3x3(kwargs.get("in_chans", 3), 16, 3, device=kwargs.get("device"))
    nn.init.kaiming_normal_(model.stem.conv.weight, mode="fan_out", nonlinearity="relu")
    nn.init.xavier_uniform_(model.head.fc.weight)
    for stage, before, after in zip(model.stages[1:], channels, channels[1:]):
        stage.blocks[0].downsample = PadShortcut(after - before, stride=2)
    return model


def _conv3x3(in_chs: int, out_chs: int, kernel_size: int, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(in_chs, out_chs, kernel_size, padding=kernel_size // 2, bias=False, **kwargs)


_CFG = dict(num_classes=10, input_size=(3, 32, 32), first_conv="stem.conv", classifier="head.fc")
default_cfgs = generate_default_cfgs({f"preact{depth}.untrained": _CFG for depth in (20, 56)})


@register_model
def preact20(pretrained: bool = False, **kwargs: Any) -> ResNetV2:
    """Pre-activation ResNet-20 for CIFAR."""
    return _create_preact("preact20", 3, pretrained, **kwargs)


@register_model
def preact56(pretrained: bool = False, **kwargs: Any) -> ResNetV2:
    """Pre-activation ResNet-56 for CIFAR."""
    return _create_preact("preact56", 9, pretrained, **kwargs)


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A timm model with its arguments, and its label on the results page."""

    model: str
    label: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    uniform_norms: bool = False  # draw γ of every batch normalisation from [0, 1], as torch did before 1.2

    def build(self, classes: int) -> nn.Module:
        """Return the network, initialised from torch's random state."""
        network = timm.create_model(self.model, num_classes=classes, **self.kwargs)
        if self.uniform_norms:
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.uniform_(module.weight)
        return network


L22 = dict(block_config=(6, 6, 6))


def _resnets(depth: int) -> dict[str, Network]:
    """Return ResNet, HBNet and their variants."""
    hb, one = f"hbnet{depth}", dict(init_last=1.0)
    small = dict(init_last=((depth - 2) // 6) ** -0.5)
    return {
        f"resnet{depth}": Network(f"{hb}_resnet", f"ResNet-{depth}"),
        hb: Network(hb, f"HBNet-{depth}", one),
        f"resnet{depth}-no-last-relu": Network(hb, f"ResNet-{depth} without its last ReLU", dict(one, beta2=0.0)),
        f"resnet{depth}-preact": Network(f"preact{depth}", f"pre-activation ResNet-{depth}"),
        f"{hb}-post-act": Network(hb, f"HBNet-{depth} with ResNet's last ReLU", dict(one, post_act=True)),
        f"{hb}-learn-beta": Network(hb, f"HBNet-{depth}, β learned", dict(one, learn_beta=True, beta_lr_scale=1.0)),
        f"resnet{depth}-small-init": Network(f"{hb}_resnet", f"ResNet-{depth}, γ from 1/√n", small),
        f"{hb}-small-init": Network(hb, f"HBNet-{depth}, γ from 1/√n", small),
        f"{hb}-auto": Network(hb, f"HBNet-{depth}, γ by the rule", dict(init_last="auto")),
        f"{hb}-auto-final-norm": Network(
            hb, f"HBNet-{depth}, γ by the rule, with a final normalisation", dict(init_last="auto", final_norm=True)
        ),
        f"resnet{depth}-zero-init": Network(f"{hb}_resnet", f"ResNet-{depth}, γ from 0", dict(init_last="zero")),
        f"resnet{depth}-no-last-relu-auto": Network(
            hb, f"ResNet-{depth} without its last ReLU, γ by the rule", dict(init_last="auto", beta2=0.0)
        ),
        f"resnet{depth}-uniform-init": Network(f"{hb}_resnet", f"ResNet-{depth}, γ from U(0, 1)", uniform_norms=True),
        f"{hb}-uniform-init": Network(hb, f"HBNet-{depth}, γ from U(0, 1)", uniform_norms=True),
    }


def _densenets(layers: int, model: str = "agdnet40_k12", **kwargs: Any) -> dict[str, Network]:
    """Return DenseNet, AGDNet and its variants; k = 12."""
    return {
        f"densenet{layers}": Network(f"{model}_densenet", f"DenseNet, L = {layers}", kwargs),
        f"agdnet{layers}": Network(model, f"AGDNet, L = {layers}", kwargs),
        f"agdnet{layers}-alpha-1": Network(model, f"AGDNet, L = {layers}, α = 1", dict(kwargs, learn_alpha=False)),
        f"agdnet{layers}-beta-0": Network(model, f"AGDNet, L = {layers}, β = 0", dict(kwargs, beta=0.0)),
    }


def _narrow(depth: int) -> dict[str, Network]:
    """Return HBNets of bottlenecks with a quarter of the channels."""
    name, label, shape = f"hbnet{depth}", f"HBNet-{depth}, 16 channels", dict(channels=(16, 32, 64, 128))
    return {
        f"{name}-narrow": Network(name, label, dict(shape, init_last=1.0)),
        f"{name}-narrow-auto": Network(name, f"{label}, γ by the rule", dict(shape, init_last="auto")),
    }


def _algorithms(depth: int) -> dict[str, Network]:
    """Return OptNets by both readings of ∇f, and by the second without its final normalisation."""
    networks = {}
    for name in NETWORK_ALGORITHMS:
        key, label = f"optnet{depth}-{name}", f"OptNet-{depth}, {name}"
        networks[key] = Network(f"optnet{depth}", label, dict(algorithm=name))
        if name != "dmrnet":  # has no residual reading
            residual = dict(algorithm=name, reading="residual")
            networks[f"{key}-residual"] = Network(f"optnet{depth}", f"{label}, residual", residual)
            plain = f"{label}, residual, without its final normalisation"
            networks[f"{key}-residual-plain"] = Network(f"optnet{depth}", plain, dict(residual, final_norm=False))
    return networks


NETWORKS = {
    **_resnets(20),
    **_resnets(56),
    **{name: network for name, network in _resnets(110).items() if "preact" not in name},
    **_densenets(22, **L22),
    **_densenets(40),
    **_densenets(52, "agdnet52_k12"),
    **_narrow(152),
    **_algorithms(56),
}


def count_network(network: Network, classes: int) -> tuple[int, int]:
    """Return parameters and multiply-accumulates per image."""
    return count(network.model, num_classes=classes, **network.kwargs)


def learned_coefficients(state: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Return the values of β1, β2 and α as rows.

    ``layer`` is the module's name. ``index`` is the step of a stage for β, and the source j for α_{k+1,j}.
    """
    rows = []
    for name, values in state.items():
        layer, _, coefficient = name.rpartition(".")
        if coefficient in ("beta1", "beta2", "alpha"):
            rows += [
                dict(layer=layer, coefficient=coefficient, index=i, value=f"{value:.6f}")
                for i, value in enumerate(values.tolist(), start=int(coefficient != "alpha"))
            ]
    return rows
