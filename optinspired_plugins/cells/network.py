"""The network around the cells: stems and preprocessors (§9.3)."""

from __future__ import annotations

from torch import nn

from .operations import FactorizedReduce, conv_norm
from .plan import CellPlan, plan_cells

__all__ = ["CellPlan", "make_preprocessors", "make_stem", "plan_cells"]


def make_stem(stem: str, in_channels: int, channels: int) -> tuple[nn.Module, nn.Module]:
    """Return the two parts of a stem; their outputs are c_{−2} and c_{−1}.

    Args:
        stem: ``"cifar"``: a 3×3 convolution and the identity; ``"imagenet"``: to 1/4 and to 1/8 of the size.
        in_channels: channels of an image.
        channels: see :func:`plan_cells`.
    """
    if stem == "cifar":
        conv = nn.Conv2d(in_channels, 3 * channels, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(3 * channels)), nn.Identity()
    first = nn.Sequential(
        nn.Conv2d(in_channels, channels // 2, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels // 2),
        nn.ReLU(),
        nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels),
    )
    return first, conv_norm(channels, channels, kernel=3, stride=2)


def make_preprocessors(plan: CellPlan, affine: bool = True) -> tuple[nn.Module, nn.Module]:
    """Return the modules that bring c_{k−2} and c_{k−1} to the channels and size of the nodes."""
    first = FactorizedReduce if plan.reduction_before else conv_norm
    return (
        first(plan.before[0], plan.channels, affine=affine),
        conv_norm(plan.before[1], plan.channels, affine=affine),
    )
