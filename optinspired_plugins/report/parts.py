"""HTML parts of the reports of searches and retrainings: document, sections, cells, tiles and tables.

Text of files is escaped. The script reads its data from JSON in which no tag can begin. The policy of the page allows
its own script, by hash, and no address.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..cells.drawing import COLOURS, to_svg
from ..cells.genotype import CellGenotype, Genotype
from ..next_steps import timm_call
from . import texts
from .data import CELLS, kinds_of
from .figures import download
from .findings import Findings
from .runs import Epoch, Retraining
from .texts import text

__all__ = [
    "CURVES",
    "cells",
    "copied",
    "diverged",
    "document",
    "drawings_of",
    "duration",
    "embedded",
    "number",
    "percent",
    "seconds",
    "section",
    "tables",
    "usage",
    "verdict",
]

LIMIT_ROWS = 100


def document(title: str, name: str, body: Sequence[str], data: object) -> str:
    """Return the page.

    Args:
        title: kind of the report.
        name: name of the run.
        body: the sections.
        data: the data that the script draws.
    """
    script = _part("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    colours = "".join(f"--{family}:{colour};" for family, colour in COLOURS.items())
    name = text(name)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}: {name}</title>\n<style>\n:root{{{colours}}}\n{_part('report.css')}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{title} <small>{name}</small></h1>\n"
        + "\n".join(body)
        + f'\n</main>\n<script type="application/json" id="data">{embedded(data)}</script>\n<script>{script}</script>\n'
        + "</body>\n</html>\n"
    )


def embedded(data: object) -> str:
    """Return JSON for a script element; "<", which could end the element, is escaped."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def section(name: str, title: str, *parts: str) -> str:
    """Return a section with a heading."""
    return f'<section id="{name}">\n<h2>{title}</h2>\n' + "\n".join(parts) + "\n</section>"


CURVES = section("curves", "Losses and accuracies", '<div class="charts"></div>')


def diverged(history: Sequence[Epoch]) -> bool:
    """Return True if a metric of an epoch is not finite."""
    metrics = (value for epoch in history for value in epoch.metrics.values())
    return any(value is not None and not math.isfinite(value) for value in metrics)


def verdict(
    metric: str, meaning: str, tiles: Mapping[str, tuple[str, str]], notes: Sequence[str], first: str = ""
) -> str:
    """Return the first section.

    Args:
        metric: the result.
        meaning: its explanation.
        tiles: value and note by name.
        notes: warnings.
        first: a warning above the result.
    """
    parts = [
        f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, (value, note) in tiles.items()
    ]
    warnings = [f'<p class="note">{note}</p>' for note in notes]
    return (
        '<section id="verdict">\n'
        + (f'<p class="note first">{first}</p>\n' if first else "")
        + f'<p class="metric">{metric}</p>\n<p>{meaning}</p>\n'
        + f"<dl>{''.join(parts)}</dl>\n"
        + "\n".join(warnings)
        + "\n</section>"
    )


def percent(value: float | None) -> str:
    """Return an accuracy."""
    return "not recorded" if value is None else f"{value:.2f} %"


def number(value: int | None) -> str:
    """Return a count, or that it is unknown."""
    return "not known" if value is None else f"{value:,}"


def seconds(history: Sequence[Epoch]) -> str:
    """Return the duration of all epochs."""
    return duration(sum(epoch.metrics["seconds"] or 0.0 for epoch in history))


def duration(seconds: float) -> str:
    """Return a time in hours, minutes and seconds."""
    total = round(seconds)
    hours, minutes = divmod(total // 60, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {total % 60} s"


def copied(name: str, command: str) -> str:
    """Return a command with a button that copies it."""
    return (
        f'<div class="command"><pre id="{name}">{escape(command)}</pre>'
        '<button class="copy" type="button">Copy</button></div>'
    )


def drawings_of(genotypes: Sequence[Genotype]) -> dict[tuple[str, CellGenotype], int]:
    """Return the numbers of the distinct normal and reduction cells."""
    drawings: dict[tuple[str, CellGenotype], int] = {}
    for genotype in genotypes:
        for cell in CELLS:
            drawings.setdefault((cell, getattr(genotype, cell)), len(drawings))
    return drawings


def cells(
    drawings: Mapping[tuple[str, CellGenotype], int], last: Genotype, found: Findings | None = None, name: str = ""
) -> str:
    """Return the drawings of all cells; only the cells of the last genotype are visible.

    Args:
        drawings: the cells, with their numbers.
        last: the last genotype.
        found: the kinds of its edges; ``None`` if they are unknown.
        name: the begin of the names of the downloaded files.
    """
    figures = []
    for cell in CELLS:
        shown, kinds = getattr(last, cell), kinds_of(found, cell)
        svgs = {
            number: to_svg(nodes, f"{kind} cell", kinds if nodes == shown else ())
            for (kind, nodes), number in drawings.items()
            if kind == cell
        }
        visible = drawings[cell, shown]
        divs = [
            f'<div data-drawing="{number}"{"" if number == visible else " hidden"}>{svg}</div>'
            for number, svg in svgs.items()
        ]
        link = download(svgs[visible], f"{name}{cell}.svg", texts.KINDS_IN_FILES if kinds else "")
        figures.append(f'<figure class="scroll"><figcaption>{cell} cell {link}</figcaption>\n{"".join(divs)}</figure>')
    legend = texts.KINDS_LEGEND if found else ""
    return section("cells", "Cells", texts.CELLS_LEGEND, legend, *figures)


def usage(run: Retraining) -> str:
    """Return the call that builds the trained network in timm, or an empty text before the end of the training."""
    call = timm_call(run.folder, run.settings, run.about.get("data", {}))
    if call is None:
        return ""
    moments = [text(run.about.get(name, "not recorded")) for name in ("mean", "std")]
    code = copied("timm-call", f"import timm\n\nmodel = {call}")
    return section("usage", "Use the network in Python", code, texts.normalisation(*moments))


def tables(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the last section, with the tables that have rows: settings, versions, images and hashes."""
    parts = [_table(title, rows) for title, rows in contents.items() if rows]
    return section("provenance", "Versions and hashes", f'<div class="tables">{"".join(parts)}</div>')


def _table(title: str, rows: Mapping[str, Any]) -> str:
    shown = list(rows.items())[:LIMIT_ROWS]
    lines = [f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in shown]
    if len(rows) > len(shown):
        lines.append(f"<tr><th>…</th><td>{len(rows) - len(shown)} more</td></tr>")
    return f"<table><caption>{title}</caption>{''.join(lines)}</table>"
