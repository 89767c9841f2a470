"""The layers T of ResNet-shaped networks: residual blocks without their addition."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from optinspired_plugins.memory.heavy_ball import SplitTransform

from ..inference.folding import fold_into, fold_shortcut
from .unmodified import is_unmodified

__all__ = ["BasicTransform", "BottleneckTransform", "PadShortcut"]


class ResidualTransform:
    """The end of a layer T: its last normalisation, and ResNet's activation after the addition.

    Both have the number of the last convolution: ``bn2`` and ``act2``, for example.
    """

    convolutions: int

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self: Any) -> Any:
        """Fold the normalisations into the convolutions, for evaluation."""
        for i in range(1, self.convolutions + 1):
            fold_into(self, f"conv{i}", f"bn{i}")
        fold_shortcut(self)
        return self

    @torch.jit.ignore
    def is_activated(self) -> bool:
        """Return True unless ``activate`` is the identity."""
        return not is_unmodified(getattr(self, f"act{self.convolutions}"), nn.Identity)

    @torch.jit.ignore
    def drop_activation(self) -> None:
        """Remove the activation after the addition."""
        setattr(self, f"act{self.convolutions}", nn.Identity())

    @torch.jit.ignore
    def last_norm(self) -> nn.Module:
        """Return the last normalisation: its weight is the size of T."""
        return getattr(self, f"bn{self.convolutions}")


class BasicTransform(ResidualTransform, BasicBlock):
    """T of HBNet, two 3×3 convolutions: timm's ``BasicBlock`` up to its addition.

    The stage does the addition, and calls ``downsample`` and ``act2``.
    """

    convolutions = 2

    def forward(self, x: Tensor) -> Tensor:
        """Return T(x), shape (batch, planes, height / stride, width / stride)."""
        return self.finish(self.conv1(x))

    def finish(self, x: Tensor) -> Tensor:
        """Return T(x) from the first convolution's output."""
        x = self.aa(self.act1(self.drop_block(self.bn1(x))))
        x = self.bn2(self.conv2(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return x

    @torch.jit.ignore
    def split(self) -> SplitTransform:
        """Return T in parts that store their input."""
        return SplitTransform(self, self.conv1, [self.finish])

    def activate(self, x: Tensor) -> Tensor:
        """Apply ResNet's activation after the addition, if there is one."""
        return self.act2(x)


class BottleneckTransform(ResidualTransform, Bottleneck):
    """T of HBNet, 1×1, 3×3 and 1×1 convolutions: timm's ``Bottleneck`` up to its addition.

    Args:
        stride_in_1x1: put the stride in the first 1×1 convolution (ResNet v1) instead of the 3×3 (timm's, "v1.5").
        *args: timm's ``Bottleneck`` arguments.
        **kwargs: timm's ``Bottleneck`` keyword arguments.
    """

    convolutions = 3
    stride_in_1x1 = False  # True if there is a stride and it is there; the default serves blocks of timm

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, *args: Any, stride_in_1x1: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(inplanes, planes, 1 if stride_in_1x1 else stride, *args, **kwargs)
        self.stride_in_1x1 = stride_in_1x1 and stride > 1
        if stride_in_1x1:
            self.conv1.stride = (stride, stride)
            self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return T(x), shape (batch, 4 planes, height / stride, width / stride)."""
        return self.finish(self.middle(self.conv1(x)))

    def middle(self, x: Tensor) -> Tensor:
        """Return the second convolution's output from the first's, shape (batch, planes, …)."""
        return self.conv2(self.act1(self.bn1(x)))

    def finish(self, x: Tensor) -> Tensor:
        """Return T(x) from the second convolution's output."""
        x = self.aa(self.act2(self.drop_block(self.bn2(x))))
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return x

    @torch.jit.ignore
    def split(self) -> SplitTransform:
        """Return T in parts that store their narrow input."""
        return SplitTransform(self, self.conv1, [self.middle, self.finish])

    def activate(self, x: Tensor) -> Tensor:
        """Apply ResNet's activation after the addition, if there is one."""
        return self.act3(x)


class PadShortcut(nn.Module):
    """The shortcut of CIFAR ResNets without parameters (option A).

    It subsamples, then pads with zero channels on both sides.

    Args:
        channels: number of channels to add.
        stride: subsampling stride.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.pad = [0, 0, 0, 0, channels // 2, channels - channels // 2]

    def forward(self, x: Tensor) -> Tensor:
        """Return x, shape (batch, c, h, w), as (batch, c + channels, ⌈h / stride⌉, ⌈w / stride⌉)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.pad)

    @torch.no_grad()
    def as_convolution(self, weight: Tensor) -> nn.Conv2d:
        """Return an equal 1×1 convolution of zeros and ones.

        Args:
            weight: the weight of a convolution of the same input; its channels, precision and device are used.
        """
        channels, (before, after) = weight.shape[1], self.pad[4:]
        conv = nn.Conv2d(channels, before + channels + after, 1, self.stride, bias=False).to(weight)
        nn.init.zeros_(conv.weight)
        conv.weight[before : before + channels, :, 0, 0] = torch.eye(channels).to(weight)
        return conv.requires_grad_(False).train(self.training)
