"""Default configurations, for timm's transforms, loaders, heads and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

__all__ = ["cifar10_weights", "cifar_cfg", "imagenet_cfg"]

WEIGHTS = Path(__file__).with_name("weights")

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def imagenet_cfg(**kwargs: Any) -> Dict[str, Any]:
    """Return the configuration of a 224×224, 1000-class, stride-32 model; ``kwargs`` add or override entries."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "license": "apache-2.0",
        **kwargs,
    }


def cifar_cfg(**kwargs: Any) -> Dict[str, Any]:
    """Return the configuration of a 32×32, 10-class, stride-4 model; ``kwargs`` add or override entries."""
    return imagenet_cfg(
        **{
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": (8, 8),
            "crop_pct": 1.0,
            "mean": CIFAR_MEAN,
            "std": CIFAR_STD,
            **kwargs,
        }
    )


def cifar10_weights(name: str, accuracy: float, **kwargs: Any) -> Dict[str, Any]:
    """Return the configuration of weights in this package, trained on CIFAR-10.

    Args:
        name: the file in ``weights``, without ``.safetensors``.
        accuracy: top-1 on the 10,000 test images in percent, by timm's ``validate.py``.
        **kwargs: further entries.
    """
    return cifar_cfg(
        file=str(WEIGHTS / f"{name}.safetensors"),
        label_names=CIFAR10_CLASSES,
        description=f"Trained on CIFAR-10 by timm's train.py; top-1 {accuracy:.2f} % of the test images.",
        **kwargs,
    )
