"""The reports: one HTML page from the JSON files of a run, without other resources."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .._files import write_atomically
from ..cells.genotype import SKIPS, Genotype
from ..next_steps import retrain_command
from ..run_folder import GENOTYPE
from . import texts
from .comparison import render_comparison
from .data import CELLS, changes, page_data, thinned
from .files import read_source
from .findings import Findings, findings
from .genotypes import render_genotype
from .parts import (
    CURVES,
    cells,
    copied,
    diverged,
    document,
    drawings_of,
    embedded,
    percent,
    seconds,
    section,
    tables,
    usage,
    verdict,
)
from .retraining import PAGE, facts, measured, render_retraining, retrained_metric, unfinished
from .runs import NamedGenotype, Retraining, SearchEpoch, SearchRun, Trials
from .texts import text
from .trials import render_trials

__all__ = ["embedded", "render", "write_report"]

LIMIT_PAGE = 2_000_000


def write_report(source: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of a run, finished or not, of a genotype, or of several beside each other.

    Args:
        source: the folder of a search, a retraining or trials; of a search in stages, the one that holds them, or a
            stage. Also a genotype's file, or the name of one of the package. Several are compared.
        out: the page; ``None`` for ``report.html`` in a folder, ``NAME.html`` beside a file or, for a name, in the
            current folder, and ``comparison.html`` there for several.

    Returns:
        The page's path.

    Raises:
        OSError: a file cannot be read or written; the message names it.
        ValueError: there is no such source; or a file is damaged, and the message names it and the field.
    """
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    if len(sources) == 1:
        page = render(read_source(sources[0]))
    else:
        page = render_comparison([read_source(each) for each in sources])
    path = _default_path(sources) if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def _default_path(sources: Sequence[str | Path]) -> Path:
    if len(sources) > 1:
        return Path("comparison.html")
    path = Path(sources[0])
    return path / "report.html" if path.is_dir() else path.with_name(f"{path.name.removesuffix('.json')}.html")


def render(run: SearchRun | Retraining | Trials | NamedGenotype, limit: int = LIMIT_PAGE) -> str:
    """Return the page.

    Args:
        run: the subject.
        limit: largest number of bytes; epochs of a search are left out evenly until the page fits.

    Raises:
        ValueError: the first and the last epoch do not fit.
    """
    if isinstance(run, Retraining):
        return render_retraining(run)
    if isinstance(run, Trials):
        return render_trials(run)
    if isinstance(run, NamedGenotype):
        return render_genotype(run)
    steps = len(run.history)
    while len((page := _page(run, thinned(run.history, steps))).encode()) > limit:
        if steps <= 2:
            raise ValueError(f"{run.folder}: its first and last epoch need more than limit={limit} bytes")
        steps = max(2, steps // 2)
    return page


def _page(run: SearchRun, epochs: Sequence[SearchEpoch]) -> str:
    drawings = drawings_of([epoch.genotype for epoch in epochs])
    found = findings(run)
    body = [
        _verdict(run, found[-1]),
        _controls(run, epochs),
        cells(drawings, epochs[-1].genotype, found[-1]),
        *_figures(epochs, found),
        _history(epochs),
        _command(run),
        usage(run.retraining) if run.retraining else "",
        _provenance(run),
    ]
    return document("Search report", run.folder.resolve().name, body, page_data(run, epochs, drawings))


# --- verdict ----------------------------------------------------------------------------------------------------------


def _verdict(run: SearchRun, found: Findings | None) -> str:
    metric, meaning = _metric(run)
    tiles = {
        "Parameters": _parameters(run),
        "MACs": _macs(run.retraining),
        "Seed": _seed(run),
        "Search": (f"{run.history[-1].number} epoch{'s' * (len(run.history) > 1)}", seconds(run.history)),
    }
    if found is None:
        return verdict(metric, meaning, tiles, _notes(run))
    counts = found.counts()
    tiles["Edges found"] = f"{counts['found']} of {counts.total()}", texts.counted(counts)
    tiles["α moved"] = f"{found.farthest:.2g}", texts.reach(found)
    return verdict(metric, meaning, tiles, _notes(run), first=texts.nothing_found(found))


def _metric(run: SearchRun) -> tuple[str, str]:
    """Return the last accuracy and its explanation."""
    if run.retraining is not None and run.retraining.history:
        return retrained_metric(run.retraining)
    searched = run.history[-1]
    if searched.metrics["alpha_top1"] is None and (loss := searched.metrics["alpha_loss"]) is not None:
        return f"{loss:.4g}", texts.loss_of("the supernet on α's half of the training images", searched.number)
    return percent(searched.metrics["alpha_top1"]), texts.supernet_accuracy(searched.number)


def _parameters(run: SearchRun) -> tuple[str, str]:
    if run.retraining and run.retraining.about.get("parameters") is not None:
        return measured(run.retraining, "parameters", "retrained network, without auxiliary head")
    if run.about.get("parameters") is None:
        return "not recorded", ""
    architecture = run.about.get("architecture_parameters")
    return f"{run.about['parameters']:,}", "supernet" + (
        "" if architecture is None else f"; {architecture:,} of architecture"
    )


def _macs(retraining: Retraining | None) -> tuple[str, str]:
    if retraining is None or retraining.about.get("macs") is None:
        return "not measured", "retraining measures them"
    return measured(retraining, "macs", "retrained network, one image")


def _seed(run: SearchRun) -> tuple[str, str]:
    retrain = run.retraining.settings.get("seed") if run.retraining else None
    return text(run.settings.get("seed", "not recorded")), "" if retrain is None else f"retraining: {text(retrain)}"


def _notes(run: SearchRun) -> list[str]:
    """Return the warnings of the page."""
    notes, last, retraining = [], run.history[-1], run.retraining
    if diverged(run.history) or (retraining and diverged(retraining.history)):
        notes.append(texts.NOT_FINITE)
    if run.stage is not None:
        notes.append(texts.of_stage(run.stage))
    if run.genotype is None:
        notes.append(texts.unfinished(last.number, run.settings.get("epochs", "?"), "search"))
    elif run.stage is None and run.genotype not in _derivable(run):
        notes.append(texts.CHANGED_GENOTYPE)
    if retraining:
        notes += unfinished(retraining)
        trained, genotype = retraining.about.get("genotype_sha256"), run.genotype or last.genotype
        if trained is not None and trained != hashlib.sha256(genotype.to_json().encode()).hexdigest():
            notes.append(texts.OTHER_GENOTYPE)
    return notes


def _derivable(run: SearchRun) -> list[Genotype]:
    """Return the genotypes that a search can end with: the last one, or an earlier one where it ended early."""
    early = run.settings.get("early_stop") == "eigenvalue"
    return [epoch.genotype for epoch in (run.history if early else run.history[-1:])]


# --- controls and figures, which the script fills ---------------------------------------------------------------------


def _controls(run: SearchRun, epochs: Sequence[SearchEpoch]) -> str:
    note = texts.left_out(len(run.history) - len(epochs))
    last = len(epochs) - 1
    return (
        '<nav id="controls" aria-label="Epoch">\n<label for="step">Epoch</label>\n'
        '<button id="back" type="button" aria-label="epoch before">‹</button>\n'
        f'<input id="step" type="range" min="0" max="{last}" value="{last}">\n'
        '<button id="forth" type="button" aria-label="next epoch">›</button>\n'
        f'<output id="epoch" for="step">{epochs[-1].number}</output> of {run.history[-1].number}\n'
        f'<span class="hint">← → step{"; " + note if note else ""}</span>\n</nav>\n' + texts.NO_SCRIPT
    )


def _figures(epochs: Sequence[SearchEpoch], found: Sequence[Findings | None]) -> list[str]:
    """Return the empty figures, which the script fills."""
    skips = f"<p>{_skips(epochs, found)}</p>"
    counts = section("counts", "Operations of the genotype by epoch", skips, _empty("counts"))
    if not epochs[-1].alpha:
        return [section("alpha", "α", texts.NO_ALPHA), counts, CURVES]
    explanation = texts.explain_alpha(bool(epochs[-1].beta))
    options = '<label for="mode">Colour shows</label> <select id="mode"></select>'
    return [
        section("alpha", "α of the epoch", f"<p>{explanation}</p>", _empty("alpha", "column")),
        section("map", "α by edge and epoch", f'<p>{options}</p><p class="legend"></p>', _empty("map")),
        section("certainty", "Entropy and margin, mean over edges", texts.CERTAINTY, '<div class="charts"></div>'),
        counts,
        CURVES,
    ]


def _empty(name: str, arrangement: str = "pair") -> str:
    figures = (
        f'<figure class="scroll" id="{name}-{cell}"><figcaption>{cell} cell</figcaption></figure>' for cell in CELLS
    )
    return f'<div class="{arrangement}">{"".join(figures)}</div>'


def _skips(epochs: Sequence[SearchEpoch], found: Sequence[Findings | None]) -> str:
    """Describe the number of skip connections in the first and the last epoch; it grows where DARTS collapses.

    Edges that the start has decided do not count: a search that begins at the heavy ball begins with skip connections.
    """
    first, last = next((each for each in found if each is not None), None), found[-1]
    parts = []
    for cell in CELLS:
        if first is None or last is None:
            (before, _), (after, edges) = (_all_skips(epoch, cell) for epoch in (epochs[0], epochs[-1]))
        else:
            (before, _), (after, edges) = first.skips(cell), last.skips(cell)
        parts.append(f"{cell} cell {before}, then {after} of {edges} edges")
    return texts.skips(parts, last is not None)


def _all_skips(epoch: SearchEpoch, cell: str) -> tuple[int, int]:
    operations = [edge.operation for node in getattr(epoch.genotype, cell) for edge in node]
    return sum(operation in SKIPS for operation in operations), len(operations)


# --- text -------------------------------------------------------------------------------------------------------------


def _history(epochs: Sequence[SearchEpoch]) -> str:
    """Return the table of changes of the genotype by epoch; epochs without a change share a row."""
    rows: list[tuple[int, int, list[str]]] = []
    for before, epoch in zip([None, *epochs], epochs):
        lines = changes(before.genotype, epoch.genotype) if before else ["start"]
        if not lines and rows and not rows[-1][2]:
            rows[-1] = (rows[-1][0], epoch.number, [])
        else:
            rows.append((epoch.number, epoch.number, lines))
    table_rows = [
        f'<tr data-first="{first}" data-last="{last}"><th><a href="#epoch={last}">{first}'
        f"{'' if first == last else f'–{last}'}</a></th><td>{'<br>'.join(lines) or 'no change'}</td></tr>"
        for first, last, lines in rows
    ]
    genotype = escape(epochs[-1].genotype.to_json())
    return section(
        "history",
        "Genotype by epoch",
        f'<div class="scroll tall"><table>{"".join(table_rows)}</table></div>',
        f"<details><summary>Genotype of the last epoch as JSON</summary><pre>{genotype}</pre></details>",
    )


def _command(run: SearchRun) -> str:
    data = run.about.get("data", {})
    images = data.get("images")
    command = retrain_command(run.folder / GENOTYPE, run.settings, images if type(images) is int else None)
    when = "" if run.genotype else texts.RETRAIN_LATER
    return section("retrain", "Retrain", when, copied("retrain-command", command))


def _provenance(run: SearchRun) -> str:
    retraining = facts(run.retraining) if run.retraining else {}
    of_retraining = {f"{title} of the retraining": rows for title, rows in retraining.items()}
    return tables({**facts(run, PAGE), **of_retraining, "SHA-256 of the files": run.hashes})
