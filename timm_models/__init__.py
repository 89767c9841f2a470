"""HBNet and AGDNet as timm models. Importing this package registers their names with timm.

After installation no import is needed: ``timm.create_model("hbnet50")`` works by itself.
"""

from .agdnet import AGDNet, CifarAGDNet
from .blocks import NesterovBlock, SourceConv2d, SourceLayer
from .convert import to_heavy_ball, to_nesterov
from .hbnet import CifarHBNet, HBNet
from .stages import BasicTransform, BottleneckTransform, HeavyBallStage

__all__ = [
    "AGDNet",
    "BasicTransform",
    "BottleneckTransform",
    "CifarAGDNet",
    "CifarHBNet",
    "HBNet",
    "HeavyBallStage",
    "NesterovBlock",
    "SourceConv2d",
    "SourceLayer",
    "to_heavy_ball",
    "to_nesterov",
]
