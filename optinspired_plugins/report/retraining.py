"""The report of a retraining: test accuracy, cells, curves and the call that builds the network in timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import __version__
from . import texts
from .data import curves_data
from .parts import CURVES, cells, diverged, document, drawings_of, percent, seconds, tables, usage, verdict
from .runs import Retraining, SearchRun
from .texts import text

__all__ = ["PAGE", "facts", "measured", "render_retraining", "retrained_metric", "unfinished"]

# The version that writes the page.
PAGE = {"optinspired-plugins of this page": __version__}


def render_retraining(run: Retraining) -> str:
    """Return the page of a retraining."""
    assert run.genotype is not None, "its settings hold it"
    metric, meaning = "no epoch yet", texts.NO_EPOCH
    if run.history:
        metric, meaning = retrained_metric(run)
    tiles = {
        "Parameters": measured(run, "parameters", "without auxiliary head"),
        "MACs": measured(run, "macs", "one image"),
        "Seed": (text(run.settings.get("seed", "not recorded")), ""),
        "Training": (f"{len(run.history)} epoch{'s' * (len(run.history) != 1)}", seconds(run.history)),
    }
    notes = [texts.NOT_FINITE] if diverged(run.history) else []
    body = [
        verdict(metric, meaning, tiles, notes + unfinished(run)),
        usage(run),
        cells(drawings_of([run.genotype]), run.genotype),
        CURVES if run.history else "",
        tables({**facts(run, PAGE), "SHA-256 of the files": run.hashes}),
    ]
    name = "/".join(run.folder.resolve().parts[-2:])  # most are called retrain
    return document("Retraining report", name, body, curves_data(run.history))


def retrained_metric(run: Retraining) -> tuple[str, str]:
    """Return the test accuracy after the last epoch, and its explanation."""
    last = run.history[-1]
    if last.metrics["test_top1"] is None and (loss := last.metrics["test_loss"]) is not None:
        return f"{loss:.4g}", texts.loss_of("the retrained network on the test images", last.number)
    best, number = max((epoch.metrics["test_top1"] or 0.0, -epoch.number) for epoch in run.history)
    return percent(last.metrics["test_top1"]), texts.retrained_accuracy(last.number, percent(best), -number)


def measured(run: Retraining, name: str, note: str) -> tuple[str, str]:
    """Return a number of ``run.json`` and its note, for a tile."""
    value = run.about.get(name)
    return ("not recorded", "") if value is None else (f"{value:,}", note)


def unfinished(run: Retraining) -> list[str]:
    """Return a note if epochs are missing."""
    done, planned = len(run.history), run.settings.get("epochs")
    return [] if done == planned else [texts.unfinished(done, planned or "?", "retraining")]


def facts(run: Retraining | SearchRun, versions: Mapping[str, str] = {}) -> dict[str, Mapping[str, Any]]:
    """Return the tables of settings, images and versions, which ``versions`` extends."""
    return {
        "Settings": {name: value for name, value in run.settings.items() if name != "genotype"},
        "Versions": {**run.about.get("versions", {}), **versions},
        "Images": run.about.get("data", {}),
    }
