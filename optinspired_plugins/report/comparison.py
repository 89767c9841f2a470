"""The report of several runs beside each other: results, cells, and the edges in which they agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from ..cells.drawing import LOOKS, to_svg
from ..cells.genotype import CHOICES, Edge, Genotype
from . import texts
from .data import CELLS, curves_data, kinds_of
from .figures import download
from .findings import Findings, findings
from .parts import document, number, percent, section, tables, verdict
from .retraining import PAGE
from .runs import NamedGenotype, Retraining, SearchRun, Trials
from .texts import text

__all__ = ["Candidate", "agreement", "by_chance", "candidate_of", "render_comparison"]

LIMIT_RUNS = 24
TEST, SUPERNET = "test", "supernet"


@dataclass(frozen=True)
class Candidate:
    """A run as the comparison shows it; ``measure`` is the kind of its result."""

    name: str
    kind: str
    genotype: Genotype
    found: Findings | None
    result: float | None
    measure: str
    parameters: int | None
    settings: Mapping[str, Any]


def candidate_of(run: SearchRun | Retraining | Trials | NamedGenotype) -> Candidate:
    """Return a run as the comparison shows it.

    Raises:
        ValueError: it holds trials.
    """
    if isinstance(run, NamedGenotype):
        return Candidate(run.name, "genotype", run.genotype, None, None, "", None, {})
    name = str(run.folder)
    if isinstance(run, Trials):
        raise ValueError(f"source={name!r}: holds trials, which have a page of their own")
    settings = {key: value for key, value in run.settings.items() if key != "genotype"}
    if isinstance(run, Retraining):
        assert run.genotype is not None, "its settings hold it"
        return Candidate(name, "retraining", run.genotype, None, *_tested(run), run.about.get("parameters"), settings)
    last, retraining = run.history[-1], run.retraining
    genotype = run.genotype or last.genotype
    found = findings(run)[-1] if genotype == last.genotype else None
    result, measure = last.metrics["alpha_top1"], SUPERNET
    if retraining is not None and retraining.history:
        result, measure = _tested(retraining)
    parameters = retraining.about.get("parameters") if retraining else None
    return Candidate(name, "search", genotype, found, result, measure, parameters, settings)


def _tested(run: Retraining) -> tuple[float | None, str]:
    return (run.history[-1].metrics["test_top1"] if run.history else None), TEST


# --- agreement --------------------------------------------------------------------------------------------------------


def agreement(genotypes: Sequence[Genotype]) -> list[dict[str, list[bool]]]:
    """Return for each genotype and cell which edges, in the order of its nodes, all genotypes have.

    Edges have a place in their node where the rule fixes the sources, and otherwise none.

    Args:
        genotypes: two or more, with one rule and one number of nodes.
    """
    marks: list[dict[str, list[bool]]] = [{cell: [] for cell in CELLS} for _ in genotypes]
    for cell in CELLS:
        for nodes in zip(*(getattr(genotype, cell) for genotype in genotypes)):
            for mark, node in zip(marks, _agreeing(nodes, _has_places(genotypes))):
                mark[cell] += node
    return marks


def _has_places(genotypes: Sequence[Genotype]) -> bool:
    """Return True if the sources of all edges are equal, and no rule chooses them."""
    sources = {tuple(edge.source for cell in CELLS for node in getattr(g, cell) for edge in node) for g in genotypes}
    return len(sources) == 1 and genotypes[0].rule != "agd"


def _agreeing(nodes: Sequence[Sequence[Edge]], has_places: bool) -> list[list[bool]]:
    if has_places:
        same = [len(set(edges)) == 1 for edges in zip(*nodes)]
        return [same for _ in nodes]
    common = Counter(nodes[0])
    for node in nodes[1:]:
        common &= Counter(node)
    marks: list[list[bool]] = []
    for node in nodes:
        left = Counter(common)
        marks.append([])
        for edge in node:
            marks[-1].append(left[edge] > 0)
            left[edge] -= 1
    return marks


def by_chance(genotypes: Sequence[Genotype]) -> float:
    """Return the expected number of edges that as many random genotypes of this rule share.

    Every operation has the same probability, and so has every set of different sources of a node.
    """
    count, total = len(genotypes), 0.0
    for cell in CELLS:
        for t, node in enumerate(getattr(genotypes[0], cell), start=2):
            options = len(CHOICES) if _has_places(genotypes) else len(CHOICES) * t
            places = len(node) if _has_places(genotypes) else 1
            chosen = 1 if _has_places(genotypes) else min(len(node), t)
            total += places * options * (chosen / options) ** count
    return total


# --- page -------------------------------------------------------------------------------------------------------------


def render_comparison(runs: Sequence[SearchRun | Retraining | Trials | NamedGenotype]) -> str:
    """Return the page of several runs.

    Raises:
        ValueError: there are more than ``LIMIT_RUNS``, or one holds trials.
    """
    if len(runs) > LIMIT_RUNS:
        raise ValueError(f"sources has {len(runs)} runs: must be at most {LIMIT_RUNS}")
    candidates = [candidate_of(run) for run in runs]
    genotypes = [each.genotype for each in candidates]
    comparable = len({(genotype.rule, genotype.nodes) for genotype in genotypes}) == 1
    marks = agreement(genotypes) if comparable else [{cell: [] for cell in CELLS} for _ in genotypes]
    hashes = {
        f"{run.folder}/{name}": value
        for run in runs
        if not isinstance(run, NamedGenotype)
        for name, value in run.hashes.items()
    }
    body = [
        _verdict(candidates, marks, comparable),
        _runs(candidates),
        _cells(candidates, marks),
        _edges(candidates, marks) if comparable else "",
        _differences(candidates),
        tables({"Versions": PAGE, "SHA-256 of the files": hashes}),
    ]
    return document("Comparison", f"{len(runs)} runs", body, curves_data())


def _verdict(candidates: Sequence[Candidate], marks: list[dict[str, list[bool]]], comparable: bool) -> str:
    tiles = {"Runs": (str(len(candidates)), ""), **_spread(candidates)}
    if not comparable:
        return verdict(f"{len(candidates)} runs", texts.NOT_COMPARABLE, tiles, [])
    genotypes = [each.genotype for each in candidates]
    flags = [flag for cell in CELLS for flag in marks[0][cell]]
    started = _as_at_the_start(candidates, marks)
    meaning = texts.agreement(len(candidates), by_chance(genotypes), started)
    return verdict(f"{sum(flags)} of {len(flags)} edges agree", meaning, tiles, [])


def _as_at_the_start(candidates: Sequence[Candidate], marks: list[dict[str, list[bool]]]) -> int | None:
    """Return the number of shared edges that are as at the start in every run; ``None`` if the kinds are unknown."""
    if not all(each.found for each in candidates):
        return None
    return min(
        sum(flag and kind == "start" for cell in CELLS for flag, kind in zip(mark[cell], kinds_of(each.found, cell)))
        for each, mark in zip(candidates, marks)
    )


def _spread(candidates: Sequence[Candidate]) -> dict[str, tuple[str, str]]:
    """Return a tile of mean and standard deviation, if all runs have results of one kind."""
    results = [each.result for each in candidates if each.result is not None]
    measures = {each.measure for each in candidates}
    if len(results) < len(candidates) or len(measures) > 1:
        return {}
    differing = text(", ".join(_differing(candidates))) or "nothing"
    note = f"{texts.MEASURES[measures.pop()]}; the runs differ in {differing}"
    return {"Mean result": (f"{mean(results):.2f} ± {stdev(results):.2f} %", note)}


def _runs(candidates: Sequence[Candidate]) -> str:
    names = ("run", "kind", "result", "parameters", "seed", "epochs", "edges", "α moved")
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = []
    for each in candidates:
        result = "" if each.result is None else f"{percent(each.result)} ({each.measure})"
        found = each.found
        values = [
            each.kind,
            result,
            "" if each.parameters is None else number(each.parameters),
            *(text(each.settings.get(name, "")) for name in ("seed", "epochs")),
            f'<span class="wide">{texts.counted(found.counts())}</span>' if found else "",
            "" if found is None else f"{found.farthest:.2g}" + (f" of {found.reach:.2g}" if found.reach else ""),
        ]
        cells = "".join(f"<td>{value}</td>" for value in values)
        rows.append(f'<tr><th class="name">{text(each.name)}</th>{cells}</tr>')
    table = f'<div class="scroll"><table class="lined"><tr>{head}</tr>{"".join(rows)}</table></div>'
    return section("runs", "Runs", table)


def _cells(candidates: Sequence[Candidate], marks: list[dict[str, list[bool]]]) -> str:
    parts = [texts.CELLS_LEGEND, texts.SHARED_LEGEND]
    for cell in CELLS:
        figures = []
        for i, (each, mark) in enumerate(zip(candidates, marks), start=1):
            nodes = getattr(each.genotype, cell)
            kinds = kinds_of(each.found, cell) or [""] * sum(map(len, nodes))
            flags = mark[cell] or [False] * len(kinds)
            looks = [f"{kind} shared".strip() if flag else kind for kind, flag in zip(kinds, flags)]
            svg = to_svg(nodes, f"{cell} cell of run {i}", looks)
            link = download(svg, f"run-{i}-{cell}.svg", texts.SHARED_IN_FILES)
            caption = f"<figcaption>{text(each.name)}, {cell} cell {link}</figcaption>"
            figures.append(f'<figure class="scroll">{caption}\n{svg}</figure>')
        parts += figures
    return section("cells", "Cells", *parts)


def _edges(candidates: Sequence[Candidate], marks: list[dict[str, list[bool]]]) -> str:
    """Return the table of each node's edges in each run; edges that all runs have are marked."""
    head = "".join(f"<th>{text(each.name)}</th>" for each in candidates)
    rows = []
    for cell in CELLS:
        flags = [iter(mark[cell]) for mark in marks]
        for t, nodes in enumerate(zip(*(getattr(each.genotype, cell) for each in candidates)), start=2):
            columns = "".join(f"<td>{_listed(node, flag)}</td>" for node, flag in zip(nodes, flags))
            rows.append(f"<tr><th>{cell} {t}</th>{columns}</tr>")
    table = f'<table class="lined"><tr><th>node</th>{head}</tr>{"".join(rows)}</table>'
    return section("edges", "Edges that agree", texts.EDGES, f'<div class="scroll">{table}</div>')


def _listed(node: Sequence[Edge], flags: Any) -> str:
    names = [f"{LOOKS[edge.operation].label} ({edge.source})" for edge in node]
    return "<br>".join(f"<b>{name} ✓</b>" if next(flags) else name for name in names)


def _differing(candidates: Sequence[Candidate]) -> list[str]:
    """Return the names of the settings in which runs differ."""
    names = dict.fromkeys(name for each in candidates for name in each.settings)
    return [name for name in names if len({repr(each.settings.get(name)) for each in candidates if each.settings}) > 1]


def _differences(candidates: Sequence[Candidate]) -> str:
    head = "".join(f"<th>{text(each.name)}</th>" for each in candidates)
    rows = [
        f"<tr><th>{text(name)}</th>"
        + "".join(f"<td>{text(each.settings.get(name, ''))}</td>" for each in candidates)
        + "</tr>"
        for name in _differing(candidates)[:LIMIT_RUNS]
    ]
    if not rows:
        return ""
    table = f'<table class="lined"><tr><th>setting</th>{head}</tr>{"".join(rows)}</table>'
    return section("differences", "Settings that differ", f'<div class="scroll">{table}</div>')
