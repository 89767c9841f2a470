"""HBNet, AGDNet, OptNet and CellNet as timm models. Importing this package registers their names with timm.

After installation no import is needed: ``timm.create_model("hbnet50")`` works by itself.
"""

from ._host import register_all
from .agdnet import AGDNet, CifarAGDNet
from .cellnet import CellNet
from .convert import to_heavy_ball, to_nesterov
from .hbnet import CifarHBNet, HBNet
from .optnet import NETWORK_ALGORITHMS, CifarOptNet, OptNet
from .stages.algorithm import AlgorithmStage, ProgramStage
from .stages.cell import AuxiliaryHead, Cell
from .stages.heavy_ball import HeavyBallStage
from .stages.nesterov import NesterovBlock, SourceLayer
from .stages.transforms import BasicTransform, BottleneckTransform

__all__ = [
    "NETWORK_ALGORITHMS",
    "AGDNet",
    "AlgorithmStage",
    "AuxiliaryHead",
    "BasicTransform",
    "BottleneckTransform",
    "Cell",
    "CellNet",
    "CifarAGDNet",
    "CifarHBNet",
    "CifarOptNet",
    "HBNet",
    "HeavyBallStage",
    "NesterovBlock",
    "OptNet",
    "ProgramStage",
    "SourceLayer",
    "to_heavy_ball",
    "to_nesterov",
]

register_all()
