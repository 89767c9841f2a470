"""A classifier, a folder of images and an accuracy for mmengine."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

__all__ = ["Accuracy", "Classifier", "Folder"]


@MODELS.register_module()
class Classifier(BaseModel):
    """A linear classifier on the mean of the last feature map.

    Args:
        backbone: config of a backbone with ``out_channels``.
        num_classes: number of classes.
        init_cfg: mmengine's.
    """

    def __init__(self, backbone: Dict[str, Any], num_classes: int, init_cfg: Optional[Dict[str, Any]] = None) -> None:
        super().__init__(init_cfg=init_cfg)
        self.backbone = MODELS.build(backbone)
        self.head = nn.Linear(self.backbone.out_channels[-1], num_classes)

    def forward(
        self, inputs: Tensor, labels: Optional[Tensor] = None, mode: str = "tensor"
    ) -> Union[Tensor, Dict[str, Tensor], List[Dict[str, int]]]:
        """Return logits, a loss, or a prediction and a label per image, by ``mode``."""
        logits = self.head(self.backbone(inputs)[-1].mean((2, 3)))
        if mode == "loss":
            return {"loss": F.cross_entropy(logits, labels)}
        if mode == "predict":
            pairs = zip(logits.argmax(1).tolist(), labels.tolist())
            return [{"predicted": predicted, "label": label} for predicted, label in pairs]
        return logits


@DATASETS.register_module()
class Folder(ImageFolder):
    """A folder of images, ``root/<class>/*``, in mmengine's form.

    Args:
        root: the folder.
        size: height and width to resize to.
    """

    def __init__(self, root: str, size: int) -> None:
        steps = [v2.ToImage(), v2.Resize((size, size), antialias=True), v2.ToDtype(torch.float32, scale=True)]
        super().__init__(root, v2.Compose([*steps, v2.Normalize([0.5] * 3, [0.5] * 3)]))

    def __getitem__(self, index: int) -> Dict[str, Any]:
        """Return an image and its label."""
        image, label = super().__getitem__(index)
        return {"inputs": image, "labels": label}


@METRICS.register_module()
class Accuracy(BaseMetric):
    """The percentage of images with a correct prediction."""

    def process(self, data_batch: Any, data_samples: Sequence[Dict[str, int]]) -> None:
        """Collect the predictions of a batch."""
        self.results += [sample["predicted"] == sample["label"] for sample in data_samples]

    def compute_metrics(self, results: List[bool]) -> Dict[str, float]:
        """Return the accuracy of all predictions."""
        return {"accuracy": 100 * sum(results) / len(results)}
