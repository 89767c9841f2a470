"""Read and check the JSON files of a run's folder; no other file of it is opened."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._checks import short
from .._files import decode_json, read_file
from ..cells.drawing import LOOKS
from ..cells.genotype import CHOICES, Genotype, genotype_names, load_genotype
from ..cells.labels import Label
from ..run_folder import ABOUT, GENOTYPE, HISTORY, SETTINGS, TRIALS, json_object
from .findings import edge_keys
from .runs import EdgeKey, Epoch, NamedGenotype, Retraining, SearchEpoch, SearchRun, Trial, Trials

__all__ = [
    "EdgeKey",
    "Epoch",
    "Retraining",
    "SearchEpoch",
    "SearchRun",
    "is_retraining",
    "read_about",
    "read_epochs",
    "read_retraining",
    "read_run",
    "read_source",
    "read_trials",
]

LIMIT_NUMBER = 10**15
Alpha = dict[EdgeKey, dict[str, float]]
SEARCH_METRICS = ("train_loss", "train_top1", "alpha_loss", "alpha_top1", "seconds")
RETRAIN_METRICS = ("train_loss", "train_top1", "test_loss", "test_top1", "seconds")


class _Reader:
    """Read the files of a folder and record their hashes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hashes: dict[str, str] = {}

    def read(self, name: str, check: Callable[[Any], Any], default: Any = None) -> Any:
        """Return the value of ``check`` for a JSON file, or ``default``, if it is not ``None`` and there is no file."""
        path = self.folder / name
        if default is not None and not path.exists():
            return default
        content = read_file(path)
        self.hashes[name] = hashlib.sha256(content).hexdigest()
        return decode_json(path, content, check)


def read_run(folder: str | Path) -> SearchRun:
    """Read a search, finished or not, and its retraining.

    Raises:
        OSError: a file of every run with a finished epoch cannot be read; the message names it.
        ValueError: a file has other content than a search or retraining writes; the message names file and field.
    """
    run, reader = read_epochs(folder), _Reader(Path(folder))
    genotype = reader.read(GENOTYPE, _genotype) if (reader.folder / GENOTYPE).exists() else None
    retraining = read_retraining(reader.folder / "retrain") if (reader.folder / "retrain").is_dir() else None
    of_retraining = {f"retrain/{name}": digest for name, digest in (retraining.hashes if retraining else {}).items()}
    hashes = run.hashes | reader.hashes | of_retraining
    return replace(run, genotype=genotype, retraining=retraining, hashes=hashes)


def read_epochs(folder: str | Path) -> SearchRun:
    """Read the epochs of a search, without its genotype and its retraining.

    Raises:
        OSError: a file of every run with a finished epoch cannot be read; the message names it.
        ValueError: a file has other content than a search writes; the message names file and field.
    """
    reader = _Reader(Path(folder))
    stage = _last_stage(reader.folder)
    part = "" if stage is None else f"{stage}/"
    settings = reader.read(f"{part}{SETTINGS}", json_object)
    start, history = reader.read(f"{part}{HISTORY}", _search_history)
    about = reader.read(f"{part}{ABOUT}", _about, {})
    return SearchRun(reader.folder, stage, settings, about, history, start, None, None, reader.hashes)


def read_retraining(folder: str | Path) -> Retraining:
    """Read a retraining, finished or not, also one without files.

    Raises:
        OSError: a file cannot be read; the message names it.
        ValueError: a file has other content than a retraining writes; the message names file and field.
    """
    reader = _Reader(Path(folder))
    settings = reader.read(SETTINGS, _retrain_settings, {})
    genotype = _genotype(settings["genotype"]) if settings else None
    about, history = reader.read(ABOUT, _about, {}), reader.read(HISTORY, _retrain_history, [])
    return Retraining(reader.folder, settings, about, history, genotype, reader.hashes)


def read_about(folder: str | Path) -> dict[str, Any]:
    """Read ``run.json`` of a run or of the first stage of a search in stages; empty if there is no file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file has other content than a run writes; the message names file and field.
    """
    reader = _Reader(Path(folder))
    return reader.read(ABOUT, _about, {}) or reader.read(f"stage1/{ABOUT}", _about, {})


def read_source(source: str | Path) -> SearchRun | Retraining | Trials | NamedGenotype:
    """Read a page's subject.

    Args:
        source: the folder of a search, of a retraining or of trials, a genotype's file, or the name of a genotype of
            the package.

    Raises:
        OSError: a file cannot be read; the message names it.
        ValueError: there is no such folder, file or name, or a file is damaged.
    """
    path = Path(source)
    if path.is_dir():
        if (path / TRIALS).exists():
            return read_trials(path)
        return read_retraining(path) if is_retraining(path) else read_run(path)
    if not path.is_file() and str(source) not in genotype_names():
        names = ", ".join(genotype_names())
        raise ValueError(
            f"source={short(str(source))}: must be the folder of a run, a genotype's file, or one of {names}"
        )
    return NamedGenotype(str(source), load_genotype(path if path.is_file() else source))


def read_trials(folder: str | Path) -> Trials:
    """Read the trials of a multi-trial search.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file has other content than ``run_trials`` writes; the message names the field.
    """
    reader = _Reader(Path(folder))
    settings, trials = reader.read(TRIALS, _settings_and_trials)
    return Trials(reader.folder, settings, trials, reader.hashes)


def is_retraining(folder: str | Path) -> bool:
    """Return True if the folder of a run is a retraining's.

    Raises:
        OSError: its settings cannot be read.
        ValueError: its settings are damaged.
    """
    return "genotype" in _Reader(Path(folder)).read(SETTINGS, json_object, {})


def _last_stage(folder: Path) -> str | None:
    """Return the folder of the last stage with a finished epoch; ``None`` unless the search has stages."""
    stages = [path.parent.name for path in folder.glob(f"stage*/{HISTORY}")]
    numbered = [name for name in stages if name[5:].isdecimal()]
    if not numbered or (folder / SETTINGS).exists():
        return None
    return max(numbered, key=lambda name: int(name[5:]))


# --- checks -----------------------------------------------------------------------------------------------------------


def _retrain_settings(value: object) -> dict[str, Any]:
    settings = json_object(value)
    _genotype(settings.get("genotype"))
    return settings


def _settings_and_trials(value: object) -> tuple[dict[str, Any], list[Trial]]:
    content = json_object(value)
    settings, entries = json_object(content.get("settings"), "settings"), content.get("trials")
    if not isinstance(entries, list):
        raise ValueError(f"trials is a {type(entries).__name__}: must be a list")
    trials = []
    for i, entry in enumerate(entries):
        try:
            trials.append(_trial(i, json_object(entry, "content")))
        except ValueError as error:
            raise ValueError(f"trial {i}: {error}") from error
    if not trials:
        raise ValueError("holds no trial: there is nothing to report yet")
    return settings, trials


def _trial(number: int, entry: Mapping[str, Any]) -> Trial:
    index, metric, error = entry.get("index"), entry.get("metric"), entry.get("error")
    if index != number or type(index) is not int:
        raise ValueError(f"index={short(index)}: must be {number}")
    is_number = isinstance(metric, (int, float)) and not isinstance(metric, bool)
    if metric is not None and not (is_number and abs(metric) <= sys.float_info.max):
        raise ValueError(f"metric={short(metric)}: must be a finite number or null")
    if not isinstance(error, (str, type(None))) or (metric is None) != isinstance(error, str):
        raise ValueError(f"error={short(error)}: must be there if there is no metric, and otherwise null")
    return Trial(number, _genotype(entry.get("genotype")), metric, _number(entry.get("seconds"), "seconds"), error)


def _about(value: object) -> dict[str, Any]:
    about = json_object(value)
    for name in ("parameters", "architecture_parameters", "macs", "alpha_steps"):
        number = about.get(name)
        if number is not None and (type(number) is not int or not 0 <= number <= LIMIT_NUMBER):
            raise ValueError(f"{name}={str(number)[:80]}: must be an integer from 0 to {LIMIT_NUMBER:g}")
    if "logit" in about:
        _number(about["logit"], "logit")
    for name in ("versions", "data"):
        json_object(about.get(name, {}), name)
    return about


def _number(value: object, name: str, high: float = LIMIT_NUMBER, low: float = 0) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name}={str(value)[:80]}: must be a number from {low:g} to {high:g}")
    return value


def _genotype(value: object) -> Genotype:
    return Genotype.from_json(json.dumps(value))


def _metrics(entry: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, float | None]:
    return {name: None if entry.get(name) is None else _metric(entry[name], name) for name in names}


def _metric(value: object, name: str) -> float:
    if not name.endswith("_loss"):
        return _number(value, name, 100.0001 if name.endswith("_top1") else LIMIT_NUMBER)
    if isinstance(value, float) and not math.isfinite(value):
        return value  # divergence is reported
    return _number(value, name, sys.float_info.max)


def _entries(value: object) -> list[tuple[int, bool, dict[str, Any]]]:
    """Return the number from 1, True if resumed, and the content of every entry."""
    if not isinstance(value, list):
        raise ValueError(f"content is a {type(value).__name__}: must be a list of epochs")
    entries: list[tuple[int, bool, dict[str, Any]]] = []
    for i, entry in enumerate(value):
        epoch, resumed = json_object(entry, f"entry {i}").get("epoch"), entry.get("resumed", False)
        if type(epoch) is not int or epoch < (entries[-1][0] if entries else 0):
            raise ValueError(f"entry {i}, epoch={str(epoch)[:80]}: must be an integer above the epoch before")
        if not isinstance(resumed, bool):
            raise ValueError(f"entry {i}, resumed={str(resumed)[:80]}: must be true or false")
        entries.append((epoch + 1, resumed, entry))
    return entries


def _retrain_history(value: object) -> list[Epoch]:
    return [Epoch(number, _metrics(entry, RETRAIN_METRICS), resumed) for number, resumed, entry in _entries(value)]


def _search_history(value: object) -> tuple[Alpha | None, list[SearchEpoch]]:
    """Return α at the start, if it is recorded, and the epochs."""
    epochs: list[SearchEpoch] = []
    start: Alpha | None = None
    for number, resumed, entry in _entries(value):
        try:
            genotype = _genotype(entry.get("genotype"))
            alpha, beta = _by_edge("probabilities", _rows(entry, "probabilities"), genotype, 0, 1.0001)
            logits = _logits("logits", entry, genotype, alpha)
            epochs.append(SearchEpoch(number, _metrics(entry, SEARCH_METRICS), resumed, genotype, alpha, beta, logits))
            _compare(epochs[0], epochs[-1])
            if len(epochs) == 1:
                start = _logits("start_logits", entry, genotype, alpha) or None
        except ValueError as error:
            raise ValueError(f"epoch {number - 1}: {error}") from error
    if not epochs:
        raise ValueError("holds no epoch: there is nothing to report yet")
    return start, epochs


def _rows(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    return json_object(entry.get(name, {}), name)


def _logits(name: str, entry: Mapping[str, Any], genotype: Genotype, alpha: Alpha) -> Alpha:
    """Return α of an entry, empty if it has none; ValueError where it has other edges or operations than softmax(α)."""
    if name not in entry:
        return {}
    logits, _ = _by_edge(name, _rows(entry, name), genotype, -LIMIT_NUMBER, LIMIT_NUMBER)
    if {key: row.keys() for key, row in logits.items()} != {key: row.keys() for key, row in alpha.items()}:
        raise ValueError(f"{name} have other edges or operations than probabilities: must have the same")
    return logits


def _compare(first: SearchEpoch, other: SearchEpoch) -> None:
    """ValueError where two epochs cannot belong to one search."""
    if (first.genotype.rule, first.genotype.nodes) != (other.genotype.rule, other.genotype.nodes):
        raise ValueError("genotype has another rule or number of nodes than in the first epoch: must have the same")
    same = first.alpha.keys() == other.alpha.keys() and first.beta.keys() == other.beta.keys()
    if not same or any(row.keys() != other.alpha[key].keys() for key, row in first.alpha.items()):
        raise ValueError("probabilities have other edges or operations than in the first epoch: must have the same")
    for key, _ in edge_keys(other.genotype, other.alpha) if other.alpha else ():
        if key not in other.alpha:
            place = f"{key.source} → {key.node} of the {key.cell} cell"
            raise ValueError(f"probabilities lack {place}: must have every edge of the genotype")


def _by_edge(
    name: str, rows: Mapping[str, Any], genotype: Genotype, low: float, high: float
) -> tuple[Alpha, dict[EdgeKey, float]]:
    """Sort numbers of operations by edge, and numbers of edges, which are softmax(β)."""
    alpha: Alpha = {}
    beta: dict[EdgeKey, float] = {}
    is_fixed = genotype.rule == "hb" or (genotype.rule != "agd" and any("/op_" in label for label in rows))
    for label, row in rows.items():
        place, edges = _edges_of(name, label, genotype, is_fixed)
        values = {each: _number(p, f"{label} {each[:80]!r}", high, low) for each, p in json_object(row, label).items()}
        if place.choice == "beta":
            if values.keys() != {str(i) for i in range(len(edges))}:
                raise ValueError(f"{label} has sources {', '.join(values)[:80]}: must be 0 to {len(edges) - 1}")
            beta.update({edges[int(i)]: p for i, p in values.items()})
        elif not values.keys() & set(CHOICES) or values.keys() - LOOKS.keys():
            raise ValueError(f"{label} has operations {', '.join(values)[:80]!r}: must be of {', '.join(LOOKS)}")
        else:
            alpha[edges[place.position or 0]] = values
    if beta and beta.keys() != alpha.keys():
        raise ValueError(f"{name} have β of other edges than α: must be the same")
    return alpha, beta


def _edges_of(name: str, text: str, genotype: Genotype, is_fixed: bool) -> tuple[Label, list[EdgeKey]]:
    """Return a label and all edges into its node."""
    wrong = ValueError(f"{name} have {text[:80]!r}: must be an edge of a cell of {genotype.nodes} nodes")
    try:
        label = Label.parse(text)
    except ValueError:
        raise wrong from None
    if label.choice not in ("beta", "op" if is_fixed else "edge") or not 2 <= label.node < 2 + genotype.nodes:
        raise wrong
    cell = "reduction" if label.cell == "reduce" else "normal"
    if is_fixed:
        node = getattr(genotype, cell)[label.node - 2]
        edges = [EdgeKey(cell, label.node, edge.source, slot) for slot, edge in enumerate(node)]
    else:
        edges = [EdgeKey(cell, label.node, source, -1) for source in range(label.node)]
    if (label.position or 0) >= len(edges):
        raise wrong
    return label, edges
