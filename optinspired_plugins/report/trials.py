"""The report of a multi-trial search: the best network, results against parameters, and all trials."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cells.genotype import SKIPS, Genotype
from ..cells.plan import STEMS, count_parameters
from ..next_steps import retrain_command
from ..run_folder import GENOTYPE
from . import texts
from .data import curves_data, thinned
from .figures import Point, download, pareto_front, scatter
from .genotypes import edges_of
from .parts import cells, copied, document, drawings_of, duration, number, section, tables, verdict
from .retraining import PAGE
from .runs import Trial, Trials
from .texts import text

__all__ = ["parameters_of", "render_trials"]

LIMIT_TRIALS = 2_000
LIMIT_RESULT = 1e15
# Sizes of a network whose parameters are counted: the settings of a file may be anything.
LIMIT_SIZES = {"cells": 1_000, "channels": 10**5, "num_classes": 10**7, "in_chans": 10**5}


def render_trials(run: Trials) -> str:
    """Return the page of trials."""
    finished = sorted((t for t in run.trials if t.metric is not None), key=lambda t: -t.metric)  # type: ignore[operator]
    failed = [trial for trial in run.trials if trial.metric is None]
    best = finished[0] if finished else None
    tiles = {
        "Trials": (
            f"{len(run.trials):,}",
            f"{len(failed):,} without a result; {duration(sum(t.seconds for t in run.trials))}",
        ),
        "Parameters": (number(parameters_of(best.genotype, run.settings)) if best else "", "of the best network"),
        "Strategy": (text(run.settings.get("strategy", "not recorded")), ""),
        "Seed": (text(run.settings.get("seed", "not recorded")), ""),
    }
    result = f"{best.metric:.6g}" if best else "no result"
    meaning = texts.best_trial(best.index, len(finished)) if best else texts.NO_RESULT
    body = [
        verdict(result, meaning, tiles, []),
        _scatter(finished, run.settings),
        cells(drawings_of([best.genotype]), best.genotype, name="best-") if best else "",
        _train(run) if best else "",
        _table(thinned([*finished, *failed], LIMIT_TRIALS), run),
        tables({"Settings": run.settings, "Versions": PAGE, "SHA-256 of the files": run.hashes}),
    ]
    return document("Trials report", run.folder.resolve().name, body, curves_data())


def parameters_of(genotype: Genotype, settings: Mapping[str, Any]) -> int | None:
    """Return the number of parameters of a trial's network; ``None`` if the settings do not say its size."""
    cells, channels, classes, in_chans = (settings.get(name) for name in LIMIT_SIZES)
    sizes = (cells, channels, classes, in_chans)
    if not all(type(n) is int and 0 < n <= limit for n, limit in zip(sizes, LIMIT_SIZES.values())):
        return None
    if (stem := settings.get("stem")) not in STEMS:
        return None
    try:
        return count_parameters(genotype, cells, channels, classes, in_chans, stem)  # type: ignore[arg-type]
    except ValueError:  # fewer cells or channels than a network has
        return None


def _scatter(trials: list[Trial], settings: dict[str, Any]) -> str:
    """Return the figure of results against parameters, if both are known."""
    points = []
    for trial in thinned(trials, LIMIT_TRIALS):
        parameters, metric = parameters_of(trial.genotype, settings), trial.metric
        if parameters is not None and metric is not None and abs(metric) <= LIMIT_RESULT:
            points.append(Point(parameters, metric, f"trial {trial.index}", f"trial-{trial.index}"))
    if not points:
        return ""
    svg = scatter(points, "result")
    link = download(svg, "parameters-and-results.svg", texts.FRONT_IN_FILES)
    figure = f'<figure class="scroll"><figcaption>Result by parameters {link}</figcaption>{texts.FRONT}{svg}</figure>'
    return section("pareto", "Parameters and results", texts.explain_front(len(pareto_front(points))), figure)


def _train(run: Trials) -> str:
    path: Path = run.folder / GENOTYPE
    return section("retrain", "Train the best network", copied("retrain-command", retrain_command(path, run.settings)))


def _table(trials: list[Trial], run: Trials) -> str:
    rows = []
    for trial in trials:
        edges = edges_of(trial.genotype)
        skips = f"{sum(operation in SKIPS for operation in edges)}/{len(edges)}"
        result = "none" if trial.metric is None else f"{trial.metric:.6g}"
        values = (result, number(parameters_of(trial.genotype, run.settings)), skips, duration(trial.seconds))
        cells = "".join(f"<td>{value}</td>" for value in values)
        error = f'<td class="error">{text(trial.error or "")}</td>'
        rows.append(f'<tr id="trial-{trial.index}"><th>{trial.index}</th>{cells}{error}</tr>')
    head = "".join(f"<th>{name}</th>" for name in ("trial", "result", "parameters", "skips", "time", "error"))
    left_out = len(run.trials) - len(trials)
    note = f"<p>{left_out:,} trials are left out.</p>" if left_out else ""
    table = f'<div class="scroll tall"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    return section("trials", "Trials, the best first", note, table)
