"""Small mmengine backbones of every family, and the networks that they are parts of."""

import pytest
import timm
import torch
from equality import randomise
from extras import needs

needs("mmengine")

from mmengine.registry import MODELS

from optinspired_plugins import mm  # noqa: F401  registers the backbones

SMALL = [
    dict(type="HBNet", depth=50, layers=(2, 2, 2, 2), channels=(8, 8, 8, 8)),
    dict(type="AGDNet", growth_rate=4, block_config=(2, 3, 2, 2), depth=121),
    dict(type="OptNet", depth=18, channels=(8, 8, 8, 8), algorithm="agd2"),
    dict(type="CellNet", cells=6, channels=4),
]
small = pytest.mark.parametrize("cfg", SMALL, ids=lambda cfg: cfg["type"])


def build(cfg, **options):
    torch.manual_seed(0)
    return MODELS.build(dict(cfg, **options))


def image(size=64, dtype=torch.float32, channels=3):
    return torch.randn(2, channels, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def summed(backbone, x):
    return sum(feature.square().mean() for feature in backbone(x))


def whole(cfg, **options):
    """The whole network of a small config, by timm, with generic weights."""
    backbone = build(cfg, **options)
    return randomise(timm.create_model(backbone.name, num_classes=5, **backbone.options))
