"""The report of a search: one HTML page, made from the JSON files of its folder, that needs nothing else.

What the files say is escaped; data go to the script as JSON in which no tag can begin; and the page's policy allows
its own script, by hash, and no address at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import __version__
from ._files import write_atomically
from .cell_layout import COLOURS, to_svg
from .genotype import CellGenotype
from .report_data import CELLS, changes, page_data, thinned
from .report_files import Epoch, Retraining, RunFolder, SearchEpoch, read_run

__all__ = ["render", "write_report"]

LIMIT_PAGE = 2_000_000
LIMIT_TEXT = 300
LIMIT_ROWS = 100
SKIPS = ("skip_connect", "neg_skip_connect")


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run, finished or not.

    Args:
        folder: the folder of the run.
        out: the page; ``None`` for ``report.html`` in the folder.

    Returns:
        The page's path.

    Raises:
        OSError: a file cannot be read or written; the message names it.
        ValueError: a file is damaged; the message names it and the field.
    """
    run = read_run(folder)
    path = Path(folder) / "report.html" if out is None else Path(out)
    page = render(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def render(run: RunFolder, limit: int = LIMIT_PAGE) -> str:
    """Return the page; so many epochs are left out, evenly, that it has at most ``limit`` bytes.

    Raises:
        ValueError: not even the first and the last epoch fit.
    """
    steps = len(run.history)
    while len((page := _page(run, thinned(run.history, steps))).encode()) > limit:
        if steps <= 2:
            raise ValueError(f"{run.folder}: its first and last epoch alone need more than limit={limit} bytes")
        steps = max(2, steps // 2)
    return page


def _page(run: RunFolder, epochs: Sequence[SearchEpoch]) -> str:
    drawings = _drawings(epochs)
    script = _part("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    data = embedded(page_data(run, epochs, drawings))
    colours = "".join(f"--{family}:{colour};" for family, colour in COLOURS.items())
    name = _text(run.folder.resolve().name)
    body = [
        f"<h1>Search report <small>{name}</small></h1>",
        _verdict(run),
        _controls(run, epochs),
        _cells(drawings, epochs[-1]),
        *_figures(epochs),
        _history(epochs),
        _command(run),
        _provenance(run),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Search report: {name}</title>\n<style>\n:root{{{colours}}}\n{_part('report.css')}</style>\n</head>\n"
        + "<body>\n<main>\n"
        + "\n".join(body)
        + f'\n</main>\n<script type="application/json" id="data">{data}</script>\n<script>{script}</script>\n'
        + "</body>\n</html>\n"
    )


def embedded(data: object) -> str:
    """Return JSON for a script element, which only a "<" could end."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _text(value: object) -> str:
    """Escape what a file says, and cut it where it is long."""
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return escape(text if len(text) <= LIMIT_TEXT else text[:LIMIT_TEXT] + "…")


def _section(name: str, title: str, *parts: str) -> str:
    return f'<section id="{name}">\n<h2>{title}</h2>\n' + "\n".join(parts) + "\n</section>"


# --- verdict ----------------------------------------------------------------------------------------------------------


def _verdict(run: RunFolder) -> str:
    metric, meaning = _metric(run)
    tiles = {
        "Parameters": _parameters(run),
        "MACs": _macs(run.retraining),
        "Seed": _seed(run),
        "Search": (f"{run.history[-1].number} epoch{'s' * (len(run.history) > 1)}", _seconds(run.history)),
    }
    parts = [
        f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, (value, note) in tiles.items()
    ]
    notes = [f'<p class="note">{note}</p>' for note in _notes(run)]
    return (
        f'<section id="verdict">\n<p class="metric">{metric}</p>\n<p>{meaning}</p>\n'
        + f"<dl>{''.join(parts)}</dl>\n"
        + "\n".join(notes)
        + "\n</section>"
    )


def _percent(value: float | None) -> str:
    return "not recorded" if value is None else f"{value:.2f} %"


def _metric(run: RunFolder) -> tuple[str, str]:
    """The last accuracy there is, and what it is."""
    retraining = run.retraining
    if retraining is None or not retraining.history:
        searched = run.history[-1]
        return _percent(searched.metrics["alpha_top1"]), (
            f"Top-1 accuracy of the supernet on α's half of the training images, epoch {searched.number}. "
            "α was fitted to them: this is no test result, and no network was retrained yet."
        )
    last = retraining.history[-1]
    text = f"Top-1 accuracy of the retrained network on the test images, epoch {last.number}, the last."
    known = [(epoch.metrics["test_top1"] or 0.0, -epoch.number) for epoch in retraining.history]
    best, number = max(known)
    text += f" Best: {_percent(best)} in epoch {-number}, which was chosen by looking at the test images."
    return _percent(last.metrics["test_top1"]), text


def _parameters(run: RunFolder) -> tuple[str, str]:
    if run.retraining and run.retraining.about.get("parameters") is not None:
        return f"{run.retraining.about['parameters']:,}", "retrained network, without auxiliary head"
    if run.about.get("parameters") is None:
        return "not recorded", ""
    architecture = run.about.get("architecture_parameters")
    return f"{run.about['parameters']:,}", "supernet" + (
        "" if architecture is None else f"; {architecture:,} of architecture"
    )


def _macs(retraining: Retraining | None) -> tuple[str, str]:
    macs = retraining.about.get("macs") if retraining else None
    return (
        ("not measured", "retraining measures them") if macs is None else (f"{macs:,}", "retrained network, one image")
    )


def _seed(run: RunFolder) -> tuple[str, str]:
    retrain = run.retraining.settings.get("seed") if run.retraining else None
    return _text(run.settings.get("seed", "not recorded")), "" if retrain is None else f"retraining: {_text(retrain)}"


def _seconds(history: Sequence[Epoch]) -> str:
    total = round(sum(epoch.metrics["seconds"] or 0.0 for epoch in history))
    hours, minutes = divmod(total // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {total % 60} s"


def _notes(run: RunFolder) -> list[str]:
    """What a reader must know before believing the page."""
    notes, last, retraining = [], run.history[-1], run.retraining
    epochs = [*run.history, *(retraining.history if retraining else [])]
    if any(value is not None and not math.isfinite(value) for epoch in epochs for value in epoch.metrics.values()):
        notes.append("A loss was not finite in some epochs: its curve has gaps there.")
    if run.genotype is None:
        notes.append(f"Unfinished: {last.number} of {_text(run.settings.get('epochs', '?'))} epochs of the search.")
    elif run.genotype != last.genotype:
        notes.append("genotype.json is not the genotype of the last epoch: one of the files was changed.")
    if retraining:
        done, planned = len(retraining.history), retraining.settings.get("epochs")
        if done != planned:
            notes.append(f"Unfinished: {done} of {_text(planned or '?')} epochs of the retraining.")
        trained, genotype = retraining.about.get("genotype_sha256"), run.genotype or last.genotype
        if trained is not None and trained != hashlib.sha256(genotype.to_json().encode()).hexdigest():
            notes.append("The retraining was of another genotype than genotype.json.")
    return notes


# --- what the script fills --------------------------------------------------------------------------------------------


def _controls(run: RunFolder, epochs: Sequence[SearchEpoch]) -> str:
    left_out = len(run.history) - len(epochs)
    note = f"{left_out} epochs are left out, evenly, to keep the page small" if left_out else ""
    last = len(epochs) - 1
    return (
        '<nav id="controls" aria-label="Epoch">\n<label for="step">Epoch</label>\n'
        '<button id="back" type="button" aria-label="epoch before">‹</button>\n'
        f'<input id="step" type="range" min="0" max="{last}" value="{last}">\n'
        '<button id="forth" type="button" aria-label="next epoch">›</button>\n'
        f'<output id="epoch" for="step">{epochs[-1].number}</output> of {run.history[-1].number}\n'
        f'<span class="hint">← → step{"; " + note if note else ""}</span>\n</nav>\n'
        "<noscript><p class='note'>Without JavaScript the page shows the last epoch and no charts.</p></noscript>"
    )


def _drawings(epochs: Sequence[SearchEpoch]) -> dict[tuple[str, CellGenotype], int]:
    """Number the different normal and reduction cells."""
    drawings: dict[tuple[str, CellGenotype], int] = {}
    for epoch in epochs:
        for cell in CELLS:
            drawings.setdefault((cell, getattr(epoch.genotype, cell)), len(drawings))
    return drawings


def _cells(drawings: Mapping[tuple[str, CellGenotype], int], last: SearchEpoch) -> str:
    """Every drawing there is, all but the last epoch's hidden."""
    figures = []
    for cell in CELLS:
        shown = getattr(last.genotype, cell)
        svgs = [
            f'<div data-drawing="{number}"{"" if nodes == shown else " hidden"}>{to_svg(nodes, f"{kind} cell")}</div>'
            for (kind, nodes), number in drawings.items()
            if kind == cell
        ]
        figures.append(f'<figure class="scroll"><figcaption>{cell} cell</figcaption>\n{"".join(svgs)}</figure>')
    text = "<p>c<sub>k−2</sub> and c<sub>k−1</sub> are the inputs 0 and 1; a node is the sum of its edges; "
    return _section("cells", "Cells", text + "grey lines are concatenated.</p>", *figures)


def _figures(epochs: Sequence[SearchEpoch]) -> list[str]:
    """Empty figures, which the script fills."""
    curves = _section("curves", "Losses and accuracies", '<div class="charts"></div>')
    counts = _section("counts", "Operations of the genotype by epoch", f"<p>{_skips(epochs)}</p>", _empty("counts"))
    if not epochs[-1].alpha:
        return [_section("alpha", "α", "<p>The strategy has no α.</p>"), counts, curves]
    beta = "β is the edge's softmax(β) (29)." if epochs[-1].beta else "This space has no β."
    explained = (
        "softmax(α) (25) in percent, a row for each edge; framed: what the genotype has. "
        "Entropy: −Σ p ln p of the row. Margin: top-1 minus top-2 of what a genotype can have, which is all but none. "
        + beta
    )
    options = '<label for="mode">Colour shows</label> <select id="mode"></select>'
    return [
        _section("alpha", "α of the epoch", f"<p>{explained}</p>", _empty("alpha", "column")),
        _section("map", "α by edge and epoch", f'<p>{options}</p><p class="legend"></p>', _empty("map")),
        _section("certainty", "Entropy and margin, mean over edges", '<div class="charts"></div>'),
        counts,
        curves,
    ]


def _empty(name: str, arrangement: str = "pair") -> str:
    figures = (
        f'<figure class="scroll" id="{name}-{cell}"><figcaption>{cell} cell</figcaption></figure>' for cell in CELLS
    )
    return f'<div class="{arrangement}">{"".join(figures)}</div>'


def _skips(epochs: Sequence[SearchEpoch]) -> str:
    """How many edges are skip connections at first and at last: their growth is how DARTS collapses."""
    parts = []
    for cell in CELLS:
        counts = [
            sum(edge.operation in SKIPS for node in getattr(epoch.genotype, cell) for edge in node)
            for epoch in (epochs[0], epochs[-1])
        ]
        edges = sum(map(len, getattr(epochs[-1].genotype, cell)))
        parts.append(f"{cell} cell {counts[0]}, then {counts[1]} of {edges} edges")
    return f"skip_connect and neg_skip_connect, first and last epoch: {'; '.join(parts)}."


# --- text -------------------------------------------------------------------------------------------------------------


def _history(epochs: Sequence[SearchEpoch]) -> str:
    """What changed, epoch by epoch; epochs without a change share a row."""
    rows: list[tuple[int, int, list[str]]] = []
    for before, epoch in zip([None, *epochs], epochs):
        lines = changes(before.genotype, epoch.genotype) if before else ["start"]
        if not lines and rows and not rows[-1][2]:
            rows[-1] = (rows[-1][0], epoch.number, [])
        else:
            rows.append((epoch.number, epoch.number, lines))
    cells = [
        f'<tr data-first="{first}" data-last="{last}"><th><a href="#epoch={last}">{first}'
        f"{'' if first == last else f'–{last}'}</a></th><td>{'<br>'.join(lines) or 'no change'}</td></tr>"
        for first, last, lines in rows
    ]
    genotype = escape(epochs[-1].genotype.to_json())
    return _section(
        "history",
        "Genotype by epoch",
        f'<div class="scroll tall"><table>{"".join(cells)}</table></div>',
        f"<details><summary>Genotype of the last epoch as JSON</summary><pre>{genotype}</pre></details>",
    )


def _command(run: RunFolder) -> str:
    data = str(run.settings.get("data", "cifar10"))
    command = shlex.join(["optinspired", "retrain", str(run.folder / "genotype.json"), "--data", data])
    when = "" if run.genotype else "<p>When the search is finished:</p>"
    copied = f'<pre id="retrain-command">{escape(command)}</pre><button id="copy" type="button">Copy</button>'
    return _section("retrain", "Retrain", when, f'<div class="command">{copied}</div>')


def _provenance(run: RunFolder) -> str:
    retraining = run.retraining
    settings = retraining.settings if retraining else {}
    tables = {
        "Settings": run.settings,
        "Versions": {**run.about.get("versions", {}), "optinspired-plugins of this page": __version__},
        "Images": run.about.get("data", {}),
        "Settings of the retraining": {name: value for name, value in settings.items() if name != "genotype"},
        "Versions of the retraining": retraining.about.get("versions", {}) if retraining else {},
        "Images of the retraining": retraining.about.get("data", {}) if retraining else {},
        "SHA-256 of the files": run.hashes,
    }
    parts = [_table(title, rows) for title, rows in tables.items() if rows]
    return _section("provenance", "Versions and hashes", f'<div class="tables">{"".join(parts)}</div>')


def _table(title: str, rows: Mapping[str, Any]) -> str:
    kept = list(rows.items())[:LIMIT_ROWS]
    cells = [f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in kept]
    if len(rows) > len(kept):
        cells.append(f"<tr><th>…</th><td>{len(rows) - len(kept)} more</td></tr>")
    return f"<table><caption>{title}</caption>{''.join(cells)}</table>"
