"""Table 7 on the results page: searches and retrainings."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from claims import Claim, Row, Section, Table, by_seed, grouped, name_images, name_seeds, numbers
from comparison import compare, mean_and_spread, pool
from figures import draw_dots
from paper_figures import TABLE7
from rows import read_rows
from table7 import Budget

__all__ = ["BUDGET", "table7"]

METHODS = {
    "darts": "DARTS space",
    "hb": "HB space",
    "hb-dagger": "HB space, HB†",
    "agd": "AGD space",
    "random-darts": "DARTS space, random search",
    "random-hb": "HB space, random search",
    "random-agd": "AGD space, random search",
    "darts-warm-up": "DARTS space, α frozen at first",
    "agd-warm-up": "AGD space, α frozen at first",
    "hb-dagger-scaled": "HB space, HB† from a smaller α",
    "random-hb-dagger": "HB space, momentum fixed, random search",
    "hb-no-negative": "HB space without the negative identity",
    "agd-no-negative": "AGD space without the negative identity",
    "admm": "ADMM space, from the algorithm",
    "ogm": "OGM space, from the algorithm",
    "random-admm": "ADMM space, random search",
    "random-ogm": "OGM space, random search",
}
SEARCH_PAIRS = [
    ("hb", "darts"),
    ("hb-dagger", "hb"),
    ("agd", "darts"),
    ("darts", "random-darts"),
    ("hb", "random-hb"),
    ("hb-dagger", "random-hb"),
    ("agd", "random-agd"),
    ("random-hb", "random-darts"),
    ("random-agd", "random-darts"),
    ("darts-warm-up", "darts"),
    ("agd-warm-up", "agd"),
    ("agd-warm-up", "darts"),
    ("agd-warm-up", "darts-warm-up"),
    ("hb-dagger-scaled", "hb-dagger"),
    ("hb-dagger-scaled", "random-hb"),
    ("hb-dagger", "random-hb-dagger"),
    ("random-hb-dagger", "random-hb"),
    ("hb-no-negative", "hb"),
    ("agd-no-negative", "agd"),
    ("admm", "darts"),
    ("ogm", "darts"),
    ("admm", "random-admm"),
    ("ogm", "random-ogm"),
]
BUDGET = tuple(field.name for field in fields(Budget))


def table7(folder: Path) -> Section:
    """Return the section about Table 7; all rows have one budget."""
    rows = read_rows(folder / "table7.csv")
    if not rows:
        return Section([], [], {})
    groups = {method: group for (method,), group in grouped(rows, ["method"]).items()}
    groups = {method: groups[method] for method in METHODS if method in groups}
    claims = Table("difference of test error, points", _claims(groups))
    content = ["## Table 7: searches", "", *_table7_block(groups), "", claims, ""]
    first = rows[0]
    panel = f"{name_images(first['images'])}, {first['search_epochs']} + {first['retrain_epochs']} epochs"
    errors = {METHODS[method]: numbers(group, "test_error") for method, group in groups.items()}
    caption = "Test errors of the networks from the searches"
    return Section(content, [], {"table7": (caption, draw_dots({panel: errors}, "test error (%)"))})


def _claims(groups: dict[str, list[Row]]) -> tuple[Claim, ...]:
    claims, pooled = [], pool(numbers(group, "test_error") for group in groups.values())
    for ours, peer in SEARCH_PAIRS:
        if ours in groups and peer in groups:
            paper = TABLE7[ours][0] - TABLE7[peer][0] if {ours, peer} <= TABLE7.keys() else None
            difference = compare(*(by_seed(groups[name], "test_error") for name in (ours, peer)), pooled)
            claims.append(Claim("searches", METHODS[ours], METHODS[peer], "test error", difference, paper))
    return tuple(claims)


def _table7_block(groups: dict[str, list[Row]]) -> list[str]:
    seeds = {row["seed"] for group in groups.values() for row in group}
    first = next(iter(groups.values()))[0]
    budget = "; ".join(f"{name.replace('_', ' ')} {first[name]}" for name in BUDGET)
    lines = [
        f"All methods have one budget: {budget}; {int(first['test_images']):,} test images. The paper searches 8 cells "
        "for 50 epochs and trains 20 cells for 600 epochs on all images. A cost is the search time divided by the "
        "search time of the DARTS space on the same machine; the paper's costs are divided by its cost of DARTS. "
        "Other work on the machine disturbs a measured cost; `docs/speed.md` has the cost of a step on a quiet "
        "machine. In HB†, α of a favoured operation begins at 5; the smaller α is the distance that α can travel, "
        "steps times its learning rate. Poolings are counted among the edges of the normal cells. The networks are "
        "`cellnet_cifar` with the genotypes in the last column.",
        "",
        "| | test error, paper | test error, measured | parameters, paper | parameters, measured | cost, paper | "
        "cost, measured | poolings, measured | seeds | genotypes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for method, group in groups.items():
        paper = ("", "", "")
        if method in TABLE7:
            error, size, days = TABLE7[method]
            paper = (f"{error:.2f}", f"{size:.2f}M", f"{days / TABLE7['darts'][2]:.2f}")
        error = mean_and_spread(numbers(group, "test_error"))
        size = ", ".join(f"{int(row['parameters']):,}" for row in group)
        cost = mean_and_spread([float(row["search_seconds"]) / float(row["darts_seconds"]) for row in group])
        poolings, edges = (sum(int(row[f"normal_{kind}"]) for row in group) for kind in ("poolings", "edges"))
        names = name_seeds(group, seeds), ", ".join(f"`{row['genotype']}`" for row in group)
        cells = [METHODS[method], paper[0], error, paper[1], size, paper[2], cost, f"{poolings} of {edges}", *names]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
