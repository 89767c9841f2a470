"""HBNet, AGDNet, OptNet and CellNet as timm models.

Importing this package registers their names with timm. After installation no import is needed:
``timm.create_model("hbnet50")`` works by itself.

With the paper open:

- (16), HBNet: :meth:`~timm_models.stages.heavy_ball.HeavyBallStage._plain`; its coefficients and options are
  :class:`~timm_models.stages.heavy_ball.HeavyBallRule`, the place to change a coefficient rule.
- (18), (21), AGDNet: :meth:`~timm_models.stages.nesterov.NesterovBlock._plain`, with the coefficients of
  :mod:`optinspired_plugins.algorithms.coefficients`.
- (7), (11)-(14), (20), OptNet: :mod:`timm_models.stages.algorithm`; algorithms and their coefficients are in
  :mod:`optinspired_plugins.algorithms.methods`, names in :mod:`optinspired_plugins.propagation.named`.
- §9.3, networks of cells: :mod:`timm_models.cellnet` and :mod:`timm_models.stages.cell`.
- Table 4 and 5: the networks at the ends of :mod:`timm_models.hbnet` and :mod:`timm_models.agdnet`.

A network (``hbnet.py``, …) is a list of stages, and ``stages/`` has one file per rule. ``inference/`` holds equal
networks for evaluation. :mod:`timm_models.convert` turns trained networks of timm into ours.
"""

from optinspired_plugins.propagation.named import NETWORK_ALGORITHMS

from ._host import register_all
from .agdnet import AGDNet, CifarAGDNet
from .cellnet import CellNet
from .convert import to_heavy_ball, to_nesterov
from .hbnet import CifarHBNet, HBNet
from .optnet import CifarOptNet, OptNet
from .stages.algorithm import AlgorithmStage, ProgramStage
from .stages.cell import AuxiliaryHead, Cell
from .stages.heavy_ball import HeavyBallRule, HeavyBallStage
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
    "HeavyBallRule",
    "HeavyBallStage",
    "NesterovBlock",
    "OptNet",
    "ProgramStage",
    "SourceLayer",
    "to_heavy_ball",
    "to_nesterov",
]

register_all()
