"""The JSON files of a search's or a retraining's folder, read and checked; nothing else of it is opened."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .._files import decode_json, read_file
from ..cells.drawing import LOOKS
from ..cells.genotype import CHOICES, Genotype, heavy_ball_sources
from ..next_steps import plot_cells_command

__all__ = [
    "EdgeKey",
    "Epoch",
    "Retraining",
    "RunFolder",
    "SearchEpoch",
    "is_retraining",
    "read_about",
    "read_retraining",
    "read_run",
]

LIMIT_NUMBER = 10**15
SEARCH_METRICS = ("train_loss", "train_top1", "alpha_loss", "alpha_top1", "seconds")
RETRAIN_METRICS = ("train_loss", "train_top1", "test_loss", "test_top1", "seconds")
LABEL = re.compile(r"(normal|reduce)/(?:(op|beta)_)?(\d{1,3})(?:_(\d{1,3}))?")


class EdgeKey(NamedTuple):
    """An edge of a supernet: cell, node, source, and which of the edges between these two it is."""

    cell: str
    node: int
    source: int
    slot: int


@dataclass(frozen=True)
class Epoch:
    """An epoch: its number from 1, its metrics (``None`` where not recorded), and whether a run was resumed with it."""

    number: int
    metrics: dict[str, float | None]
    resumed: bool


@dataclass(frozen=True)
class SearchEpoch(Epoch):
    """An epoch of a search: also the genotype, and softmax(α) and softmax(β) by edge, empty where there are none."""

    genotype: Genotype
    alpha: Mapping[EdgeKey, Mapping[str, float]]
    beta: Mapping[EdgeKey, float]


@dataclass(frozen=True)
class Retraining:
    """A retraining: its files as they were read; ``genotype`` is that of the settings.

    ``hashes`` are SHA-256 of the files.
    """

    folder: Path
    settings: dict[str, Any]
    about: dict[str, Any]
    history: list[Epoch]
    genotype: Genotype | None
    hashes: dict[str, str]


@dataclass(frozen=True)
class RunFolder:
    """A search: its files as they were read, ``genotype`` and ``retraining`` where there are any.

    Of a search in stages, ``stage`` names the folder of the last one that has an epoch: settings and history are its.
    ``hashes`` are SHA-256 of the files.
    """

    folder: Path
    stage: str | None
    settings: dict[str, Any]
    about: dict[str, Any]
    history: list[SearchEpoch]
    genotype: Genotype | None
    retraining: Retraining | None
    hashes: dict[str, str]


class _Reader:
    """Reads the files of a folder and keeps their hashes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hashes: dict[str, str] = {}

    def read(self, name: str, check: Callable[[Any], Any], default: Any = None) -> Any:
        """Return what ``check`` makes of a JSON file; ``default``, where one is given, if there is none."""
        path = self.folder / name
        if default is not None and not path.exists():
            return default
        content = read_file(path)
        self.hashes[name] = hashlib.sha256(content).hexdigest()
        return decode_json(path, content, check)


def read_run(folder: str | Path) -> RunFolder:
    """Read a search, finished or not.

    Raises:
        OSError: a file that every run with a finished epoch has cannot be read; the message names it.
        ValueError: a file is not what a search or retraining writes; the message names file and field.
    """
    reader = _Reader(Path(folder))
    stage = _last_stage(reader.folder)
    part = "" if stage is None else f"{stage}/"
    settings = reader.read(f"{part}settings.json", _object)
    history = reader.read(f"{part}history.json", _search_history)
    about = reader.read(f"{part}run.json", _about, {})
    genotype = None
    if (reader.folder / "genotype.json").exists():
        genotype = reader.read("genotype.json", _genotype)
    retraining = read_retraining(reader.folder / "retrain") if (reader.folder / "retrain").is_dir() else None
    hashes = reader.hashes | {
        f"retrain/{name}": digest for name, digest in (retraining.hashes if retraining else {}).items()
    }
    return RunFolder(reader.folder, stage, settings, about, history, genotype, retraining, hashes)


def read_retraining(folder: str | Path) -> Retraining:
    """Read a retraining, finished or not, also one that has no file yet.

    Raises:
        OSError: a file cannot be read; the message names it.
        ValueError: a file is not what a retraining writes; the message names file and field.
    """
    reader = _Reader(Path(folder))
    settings = reader.read("settings.json", _retrain_settings, {})
    genotype = _genotype(settings["genotype"]) if settings else None
    about, history = reader.read("run.json", _about, {}), reader.read("history.json", _retrain_history, [])
    return Retraining(reader.folder, settings, about, history, genotype, reader.hashes)


def read_about(folder: str | Path) -> dict[str, Any]:
    """Read ``run.json`` of a run, of a search in stages its first stage's; empty where there is none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not what a run writes; the message names file and field.
    """
    reader = _Reader(Path(folder))
    return reader.read("run.json", _about, {}) or reader.read("stage1/run.json", _about, {})


def is_retraining(folder: str | Path) -> bool:
    """Whether a folder is a retraining's.

    Raises:
        OSError: its settings cannot be read.
        ValueError: its settings are damaged, or it holds trials.
    """
    reader = _Reader(Path(folder))
    if (reader.folder / "trials.json").exists():
        best = plot_cells_command(reader.folder / "genotype.json")
        raise ValueError(
            f"folder={str(folder)!r}: holds trials, must be a search's or a retraining's; best of them: {best}"
        )
    return "genotype" in reader.read("settings.json", _object, {})


def _last_stage(folder: Path) -> str | None:
    """The last stage that has an epoch, of a search in stages."""
    stages = [path.parent.name for path in folder.glob("stage*/history.json")]
    numbered = [name for name in stages if name[5:].isdecimal()]
    if not numbered or (folder / "settings.json").exists():
        return None
    return max(numbered, key=lambda name: int(name[5:]))


# --- checks -----------------------------------------------------------------------------------------------------------


def _object(value: object, name: str = "content") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is a {type(value).__name__}: must be a JSON object")
    return value


def _retrain_settings(value: object) -> dict[str, Any]:
    found = _object(value)
    _genotype(found.get("genotype"))
    return found


def _about(value: object) -> dict[str, Any]:
    found = _object(value)
    for name in ("parameters", "architecture_parameters", "macs"):
        if found.get(name) is not None and (type(found[name]) is not int or not 0 <= found[name] <= LIMIT_NUMBER):
            raise ValueError(f"{name}={str(found[name])[:80]}: must be an integer from 0 to {LIMIT_NUMBER:g}")
    for name in ("versions", "data"):
        _object(found.get(name, {}), name)
    return found


def _number(value: object, name: str, high: float = LIMIT_NUMBER) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= high:
        raise ValueError(f"{name}={str(value)[:80]}: must be a number from 0 to {high:g}")
    return value


def _genotype(value: object) -> Genotype:
    return Genotype.from_json(json.dumps(value))


def _metrics(entry: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, float | None]:
    return {name: None if entry.get(name) is None else _metric(entry[name], name) for name in names}


def _metric(value: object, name: str) -> float:
    if not name.endswith("_loss"):
        return _number(value, name, 100.0001 if name.endswith("_top1") else LIMIT_NUMBER)
    if isinstance(value, float) and not math.isfinite(value):
        return value  # a network that diverges is something to report
    return _number(value, name, sys.float_info.max)


def _entries(value: object) -> list[tuple[int, bool, dict[str, Any]]]:
    """Number from 1, mark of a resume, and the rest of every entry."""
    if not isinstance(value, list):
        raise ValueError(f"content is a {type(value).__name__}: must be a list of epochs")
    entries: list[tuple[int, bool, dict[str, Any]]] = []
    for i, entry in enumerate(value):
        epoch, resumed = _object(entry, f"entry {i}").get("epoch"), entry.get("resumed", False)
        if type(epoch) is not int or epoch < (entries[-1][0] if entries else 0):
            raise ValueError(f"entry {i}, epoch={str(epoch)[:80]}: must be an integer above the epoch before")
        if not isinstance(resumed, bool):
            raise ValueError(f"entry {i}, resumed={str(resumed)[:80]}: must be true or false")
        entries.append((epoch + 1, resumed, entry))
    return entries


def _retrain_history(value: object) -> list[Epoch]:
    return [Epoch(number, _metrics(entry, RETRAIN_METRICS), resumed) for number, resumed, entry in _entries(value)]


def _search_history(value: object) -> list[SearchEpoch]:
    epochs: list[SearchEpoch] = []
    for number, resumed, entry in _entries(value):
        try:
            genotype = _genotype(entry.get("genotype"))
            alpha, beta = _probabilities(_object(entry.get("probabilities", {}), "probabilities"), genotype)
            epochs.append(SearchEpoch(number, _metrics(entry, SEARCH_METRICS), resumed, genotype, alpha, beta))
            _compare(epochs[0], epochs[-1])
        except ValueError as error:
            raise ValueError(f"epoch {number - 1}: {error}") from error
    if not epochs:
        raise ValueError("holds no epoch: there is nothing to report yet")
    return epochs


def _compare(first: SearchEpoch, other: SearchEpoch) -> None:
    """ValueError where two epochs cannot be of one search."""
    if (first.genotype.rule, first.genotype.nodes) != (other.genotype.rule, other.genotype.nodes):
        raise ValueError("genotype has another rule or number of nodes: must be those of the first epoch")
    same = first.alpha.keys() == other.alpha.keys() and first.beta.keys() == other.beta.keys()
    if not same or _operations(first) != _operations(other):
        raise ValueError("probabilities have other edges or operations: must be those of the first epoch")


def _operations(epoch: SearchEpoch) -> set[str]:
    return {operation for row in epoch.alpha.values() for operation in row}


def _probabilities(
    rows: Mapping[str, Any], genotype: Genotype
) -> tuple[dict[EdgeKey, dict[str, float]], dict[EdgeKey, float]]:
    """Sort softmax(α) and softmax(β) by edge."""
    alpha: dict[EdgeKey, dict[str, float]] = {}
    beta: dict[EdgeKey, float] = {}
    for label, row in rows.items():
        kind, key = _edge_of(label, genotype)
        values = {name: _number(p, f"{label} {name[:80]!r}", 1.0001) for name, p in _object(row, label).items()}
        if kind == "beta":
            if values.keys() != {str(i) for i in range(key.node)}:
                raise ValueError(f"{label} has sources {', '.join(values)[:80]}: must be 0 to {key.node - 1}")
            beta.update({key._replace(source=int(i)): p for i, p in values.items()})
        elif not values.keys() & set(CHOICES) or values.keys() - LOOKS.keys():
            raise ValueError(f"{label} has operations {', '.join(values)[:80]!r}: must be of {', '.join(LOOKS)}")
        else:
            alpha[key] = values
    if beta and beta.keys() != alpha.keys():
        raise ValueError("probabilities have β of other edges than α: must be the same")
    return alpha, beta


def _edge_of(label: str, genotype: Genotype) -> tuple[str, EdgeKey]:
    """What a label of NNI's speaks of; for β the edge from source 0 stands for the node."""
    match = LABEL.fullmatch(label)
    if match:
        cell, kind, node, last = "reduction" if match[1] == "reduce" else "normal", match[2], int(match[3]), match[4]
        fits = 2 <= node < 2 + genotype.nodes and (last is None) == (kind == "beta")
        if fits and kind == "beta":
            return kind, EdgeKey(cell, node, 0, 0)
        if fits and genotype.rule == "hb" and kind == "op" and int(last) < 3:
            return "op", EdgeKey(cell, node, heavy_ball_sources(node)[int(last)], int(last))
        if fits and genotype.rule == "agd" and kind is None and int(last) < node:
            return "op", EdgeKey(cell, node, int(last), 0)
    raise ValueError(f"probabilities have {label[:80]!r}: must be an edge of a cell of {genotype.nodes} nodes")
