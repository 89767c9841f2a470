"""The content of the folder of a run, as a report shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..cells.genotype import Genotype

__all__ = ["EdgeKey", "Epoch", "NamedGenotype", "Retraining", "SearchEpoch", "SearchRun", "Trial", "Trials"]


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
    """An epoch of a search.

    It has its genotype, and by edge softmax(α), softmax(β) and α itself, empty if there are none or α is not recorded.
    """

    genotype: Genotype
    alpha: Mapping[EdgeKey, Mapping[str, float]]
    beta: Mapping[EdgeKey, float]
    logits: Mapping[EdgeKey, Mapping[str, float]]


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
    from there. ``start`` is α at the start, ``None`` if it is not recorded.
    """

    folder: Path
    stage: str | None
    settings: dict[str, Any]
    about: dict[str, Any]
    history: list[SearchEpoch]
    start: Mapping[EdgeKey, Mapping[str, float]] | None
    genotype: Genotype | None
    retraining: Retraining | None
    hashes: dict[str, str]


@dataclass(frozen=True)
class Trial:
    """A finished trial: its result, ``None`` if it failed, its time in seconds, and the error of a failed one."""

    index: int
    genotype: Genotype
    metric: float | None
    seconds: float
    error: str | None


@dataclass(frozen=True)
class Trials:
    """The files of a multi-trial search."""

    folder: Path
    settings: dict[str, Any]
    trials: list[Trial]
    hashes: dict[str, str]


@dataclass(frozen=True)
class NamedGenotype:
    """A genotype and its name in the package or the path of its file."""

    name: str
    genotype: Genotype
