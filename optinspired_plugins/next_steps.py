"""Commands and calls of the next step, printed by terminal and report; they work from any folder."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cells.genotype import genotype_names
from .run_folder import GENOTYPE, WEIGHTS

__all__ = ["absolute_source", "genotype_call", "retrain_command", "timm_call"]

# Names of sources of images; every other source is a path.
SOURCES = ("digits", "cifar10", "cifar100", "svhn")
# Options with the same meaning in ``search`` and ``retrain``, with the defaults of ``retrain``.
SHARED = {
    "data": "cifar10",
    "limit": None,
    "padding": 4,
    "seed": 0,
    "resize": None,
    "keep_depth": False,
    "flip": True,
    "regression": False,
    "label_smoothing": 0.0,
    "imports": None,
    "workers": 0,
    "accelerator": "auto",
    "devices": 1,
    "logger": None,
    "on_disk": False,
    "precision": "32-true",
}
# The types of options without a default, and names that differ from the setting's.
KINDS, NAMES = {"limit": int, "resize": int, "imports": list, "logger": str}, {"imports": "import"}
BATCH_SIZE = 96


def absolute_source(data: str) -> str:
    """Return the absolute path of images; names and missing paths are returned unchanged."""
    return data if data in SOURCES or not os.path.exists(data) else os.path.abspath(data)


def retrain_command(genotype: str | Path, settings: Mapping[str, Any], images: int | None = None) -> str:
    """Return the command that trains a genotype on the images of its search.

    Args:
        genotype: the file, or the name of a genotype of the package.
        settings: settings of the search and its machine options. Shared options are passed on if they differ from the
            default.
        images: number of training images, ``None`` if unknown; a batch is at most the share of a process.
    """
    words = ["optinspired", "retrain", _located(genotype)]
    for name, default in SHARED.items():
        value = settings.get(name, default)
        # the settings of a file may be of any type
        if type(value) is KINDS.get(name, type(default)) and value != default:
            words += _option(NAMES.get(name, name).replace("_", "-"), value)
    if settings.get("stem") == "imagenet":
        words += ["--model", "cellnet_imagenet"]
    devices = settings.get("devices")
    share = None if images is None else images // (devices if type(devices) is int and devices > 0 else 1)
    if share is not None and share < BATCH_SIZE:
        words += ["--batch-size", str(share)]
    return shlex.join(words)


def _option(name: str, value: Any) -> list[str]:
    """Return an option as words; existing files and folders have absolute paths."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    items = value if isinstance(value, list) else [value]
    are_paths = name in ("data", "import")
    return [f"--{name}", ",".join(absolute_source(str(item)) if are_paths else str(item) for item in items)]


def genotype_call(genotype: str | Path) -> str:
    """Return the Python expression that builds the untrained network of a genotype.

    Args:
        genotype: the file, or the name of a genotype of the package.
    """
    return f"timm.create_model('cellnet_cifar', genotype={_located(genotype)!r})"


def _located(genotype: str | Path) -> str:
    """Return the absolute path of a genotype's file; names are returned unchanged."""
    return str(genotype) if str(genotype) in genotype_names() else os.path.abspath(genotype)


def timm_call(folder: str | Path, settings: Mapping[str, Any], data: Mapping[str, Any]) -> str | None:
    """Return the Python expression that builds the network of a retraining with its weights.

    Args:
        folder: the folder of the retraining.
        settings: its settings.
        data: the entry ``data`` of its ``run.json``.

    Returns:
        The expression; ``None`` if the training has not finished, or ``run.json`` does not describe the images.
    """
    genotype, weights = (os.path.abspath(Path(folder) / name) for name in (GENOTYPE, WEIGHTS))
    numbers = {
        "cells": settings.get("cells"),
        "channels": settings.get("channels"),
        "num_classes": data.get("classes"),
        "in_chans": data.get("channels"),
    }
    complete = os.path.exists(genotype) and os.path.exists(weights) and all(type(n) is int for n in numbers.values())
    if not complete:
        return None
    arguments = {"genotype": genotype, **numbers, "checkpoint_path": weights}
    keywords = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"timm.create_model({str(settings.get('model'))!r}, {keywords})"
