"""The next steps that terminal and report name: commands and calls that work from any folder."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["absolute_source", "plot_cells_command", "retrain_command", "timm_call"]

# Images that go by a name; every other source is a path.
SOURCES = ("digits", "cifar10")
# What ``search`` and ``retrain`` both take and mean alike, with the defaults of ``retrain``.
SHARED = {"data": "cifar10", "limit": None, "padding": 4, "seed": 0, "workers": 0, "accelerator": "auto", "devices": 1}
BATCH_SIZE = 96


def absolute_source(data: str) -> str:
    """Return a path of images as an absolute one; a name, or a path where nothing is, as it stands."""
    return data if data in SOURCES or not os.path.exists(data) else os.path.abspath(data)


def retrain_command(genotype: str | Path, settings: Mapping[str, Any], images: int | None = None) -> str:
    """Compose the command that trains what a search has found on the images that it has searched with.

    Args:
        genotype: the file.
        settings: the search's, and where it ran. What both commands take and is not the default is passed on.
        images: number of training images, if it is known: a batch cannot have more than a process's share of them.
    """
    words = ["optinspired", "retrain", os.path.abspath(genotype)]
    for name, default in SHARED.items():
        value = settings.get(name, default)
        kind = int if default is None else type(default)  # the settings of a file may be of any type
        if type(value) is kind and value != default:
            words += [f"--{name}", absolute_source(str(value)) if name == "data" else str(value)]
    devices = settings.get("devices")
    share = None if images is None else images // (devices if type(devices) is int and devices > 0 else 1)
    if share is not None and share < BATCH_SIZE:
        words += ["--batch-size", str(share)]
    return shlex.join(words)


def plot_cells_command(genotype: str | Path) -> str:
    """Compose the command that draws the cells of a genotype's file."""
    return shlex.join(["optinspired", "plot", "cells", os.path.abspath(genotype)])


def timm_call(folder: str | Path, settings: Mapping[str, Any], data: Mapping[str, Any]) -> str | None:
    """Compose the Python expression that builds the network of a retraining with its weights.

    Args:
        folder: the folder of the retraining.
        settings: its settings.
        data: its images, as ``run.json`` describes them.

    Returns:
        The expression; ``None`` where the training has not finished, or ``run.json`` does not describe the images.
    """
    genotype, weights = (os.path.abspath(Path(folder) / name) for name in ("genotype.json", "model.safetensors"))
    numbers = {
        "cells": settings.get("cells"),
        "channels": settings.get("width"),
        "num_classes": data.get("classes"),
        "in_chans": data.get("channels"),
    }
    complete = os.path.exists(genotype) and os.path.exists(weights) and all(type(n) is int for n in numbers.values())
    if not complete:
        return None
    arguments = {"genotype": genotype, **numbers, "checkpoint_path": weights}
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"timm.create_model({str(settings.get('model'))!r}, {given})"
