"""What options of the command may be."""

from __future__ import annotations

from typing import Literal

import typer

from .algorithms.methods import ALGORITHMS

__all__ = [
    "Accelerator",
    "Initialization",
    "Model",
    "Precision",
    "Space",
    "Strategy",
    "integers",
    "network_names",
]

# The names of tables that NNI and Lightning load, which takes seconds; a test holds the ones against the others.
Space = Literal["hb", "agd", "darts"]
Initialization = Literal["heavy-ball", "zero", "random"]
Strategy = Literal["darts", "darts-second-order", "gumbel", "pc-darts", "p-darts"]
Model = Literal["cellnet_cifar", "cellnet_imagenet"]
Accelerator = Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"]
Precision = Literal["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"]


def integers(text: str) -> list[int]:
    """Parse ``10,20,30``."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r}: must be integers separated by commas, 10,20,30") from None


def network_names(text: str) -> list[str]:
    """Parse ``gd,hb``."""
    names = text.split(",")
    for name in names:
        if name not in ALGORITHMS:
            raise typer.BadParameter(f"network={name!r}: must be one of {', '.join(ALGORITHMS)}")
    return names
