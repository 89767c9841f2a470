"""The content of a search's or a retraining's folder, as a report shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..cells.genotype import Genotype

__all__ = ["EdgeKey", "Epoch", "Retraining", "SearchEpoch", "SearchRun"]


class EdgeKey(NamedTuple):
    """An edge of a supernet: cell, node, source, and slot.

    The slot is its number among the edges of its node where these are fixed, as in HBSpace, and −1 where the search
    chooses them.
    """

    cell: str
    node: int
    source: int
    slot: int


@dataclass(frozen=True)
class Epoch:
    """An epoch: its number from 1, its metrics (``None`` if not recorded), and True if a run was resumed with it."""

    number: int
    metrics: dict[str, float | None]
    resumed: bool


@dataclass(frozen=True)
class SearchEpoch(Epoch):
    """An epoch of a search, with its genotype, and softmax(α) and softmax(β) by edge, empty if there are none."""

    genotype: Genotype
    alpha: Mapping[EdgeKey, Mapping[str, float]]
    beta: Mapping[EdgeKey, float]


@dataclass(frozen=True)
class Retraining:
    """The files of a retraining; ``genotype`` is in its settings, and ``hashes`` are SHA-256 of the files."""

    folder: Path
    settings: dict[str, Any]
    about: dict[str, Any]
    history: list[Epoch]
    genotype: Genotype | None
    hashes: dict[str, str]


@dataclass(frozen=True)
class SearchRun:
    """The files of a search; ``hashes`` are SHA-256 of the files.

    In a search in stages, ``stage`` is the folder of the last stage with a finished epoch; settings and history are
    from there.
    """

    folder: Path
    stage: str | None
    settings: dict[str, Any]
    about: dict[str, Any]
    history: list[SearchEpoch]
    genotype: Genotype | None
    retraining: Retraining | None
    hashes: dict[str, str]
