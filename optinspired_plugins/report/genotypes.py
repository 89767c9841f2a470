"""The report of a genotype, from its file or published: size, cells, operations, and how to use it."""

from __future__ import annotations

from collections import Counter
from html import escape

from ..cells.drawing import LOOKS
from ..cells.genotype import SKIPS, Genotype
from ..cells.plan import count_parameters
from ..next_steps import genotype_call, retrain_command
from . import texts
from .data import CELLS, curves_data
from .parts import cells, copied, document, drawings_of, number, section, verdict
from .runs import NamedGenotype
from .texts import text

__all__ = ["edges_of", "render_genotype"]

# cells, channels, classes and stem of §9.3's networks
CIFAR, IMAGENET = (20, 36, 10, "cifar"), (14, 48, 1000, "imagenet")


def render_genotype(named: NamedGenotype) -> str:
    """Return the page of a genotype."""
    genotype, name = named.genotype, named.name.rpartition("/")[2]
    edges = edges_of(genotype)
    tiles = {
        "ImageNet": (_parameters(genotype, *IMAGENET), "parameters of 14 cells of 48 channels, 1,000 classes"),
        "Rule": (text(genotype.rule), f"genotype of version {genotype.version}"),
        "Nodes": (str(genotype.nodes), "of each cell"),
        "Edges": (str(len(edges)), f"{sum(operation in SKIPS for operation in edges)} skip connections"),
    }
    body = [
        verdict(f"{_parameters(genotype, *CIFAR)} parameters", texts.OF_CIFAR, tiles, []),
        cells(drawings_of([genotype]), genotype, name=f"{name.removesuffix('.json')}-"),
        _operations(genotype),
        section("usage", "Use the network in Python", copied("timm-call", _call(named.name)), texts.UNTRAINED),
        section("retrain", "Train it", copied("retrain-command", retrain_command(named.name, {}))),
        section("json", "Genotype as JSON", f"<pre>{escape(genotype.to_json())}</pre>"),
    ]
    return document("Genotype", name, body, curves_data())


def edges_of(genotype: Genotype) -> list[str]:
    """Return the operations of all edges of both cells."""
    return [edge.operation for cell in CELLS for node in getattr(genotype, cell) for edge in node]


def _parameters(genotype: Genotype, cells: int, channels: int, classes: int, stem: str) -> str:
    return number(count_parameters(genotype, cells, channels, classes, stem=stem))


def _call(name: str) -> str:
    return f"import timm\n\nmodel = {genotype_call(name)}"


def _operations(genotype: Genotype) -> str:
    """Return the table of the number of each operation in each cell."""
    counts = [Counter(e.operation for node in getattr(genotype, cell) for e in node) for cell in CELLS]
    used = [operation for operation in LOOKS if any(count[operation] for count in counts)]
    head = "".join(f"<th>{cell} cell</th>" for cell in CELLS)
    rows = [
        f'<tr class="{LOOKS[name].family}"><th class="key">{name}</th>'
        + "".join(f"<td>{count[name] or ''}</td>" for count in counts)
        + "</tr>"
        for name in used
    ]
    table = f"<table><tr><th>operation</th>{head}</tr>{''.join(rows)}</table>"
    return section("operations", "Operations", f'<div class="scroll">{table}</div>')
