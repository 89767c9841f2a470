"""Sections of the results page: lines, figures and claims."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Union

from comparison import Counts, Difference
from matplotlib.figure import Figure
from scipy.stats import false_discovery_control

__all__ = [
    "NOISE",
    "ONE_SEED",
    "Claim",
    "Row",
    "Section",
    "Table",
    "adjusted_p_values",
    "by_seed",
    "claims_table",
    "grouped",
    "name_images",
    "name_recipe",
    "name_seeds",
    "numbers",
    "sign",
    "verdict",
]

NOISE, ONE_SEED, UNCORRECTED = "not decided", "one seed", "before correction"
LEVEL = 0.05

Row = dict[str, str]


class Claim(NamedTuple):
    """A comparison of two networks in an experiment."""

    setting: str
    ours: str
    peer: str
    quantity: str
    result: Union[Difference, Counts]
    paper: float | None = None  # its difference; −1 or 1 if it says fewer or more without a number

    @property
    def difference(self) -> str:
        """The difference with two digits, of losses with three."""
        return self.result.to_text(3 if "loss" in self.quantity else 2)


Adjusted = Mapping[Claim, float]


class Table(NamedTuple):
    """A table of claims; the page writes it, since verdicts depend on all its claims."""

    unit: str
    claims: tuple[Claim, ...]


class Section(NamedTuple):
    """Lines and tables, claims without a table, and figures of a section."""

    content: list[Union[str, Table]]
    others: list[Claim]
    figures: dict[str, tuple[str, Figure]]  # name of the file -> caption and figure

    def claims(self) -> Iterator[Claim]:
        """Yield all claims."""
        yield from self.others
        for item in self.content:
            if isinstance(item, Table):
                yield from item.claims

    def lines(self, adjusted: Adjusted) -> list[str]:
        """Return the section's text."""
        parts = (claims_table(item, adjusted) if isinstance(item, Table) else [item] for item in self.content)
        return [line for part in parts for line in part]


def adjusted_p_values(claims: Iterable[Claim]) -> Adjusted:
    """Return the p-values of Benjamini and Hochberg, by claim with several seeds.

    If all claims with a value up to q are reported, the expected share of false ones among them is at most q.
    """
    tested = [claim for claim in claims if claim.result.p is not None]
    if not tested:
        return {}
    return dict(zip(tested, map(float, false_discovery_control([claim.result.p for claim in tested]))))


def verdict(claim: Claim, adjusted: Adjusted) -> str:
    """Return the direction of a difference, with a mark if it does not survive the correction, or NOISE or ONE_SEED."""
    result = claim.result
    if result.p is None:
        return ONE_SEED
    if result.p > LEVEL:
        return NOISE
    direction = result.directions[result.value > 0]
    return direction if adjusted[claim] <= LEVEL else f"{direction}, {UNCORRECTED}"


def sign(claim: Claim, adjusted: Adjusted) -> str:
    """Return agreement with the paper's sign; empty without a sign or with one seed."""
    word = verdict(claim, adjusted)
    if claim.paper is None or word == ONE_SEED:
        return ""
    if word not in claim.result.directions:
        return NOISE
    return "agrees" if (claim.result.value < 0) == (claim.paper < 0) else "does not agree"


def grouped(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    """Group rows by some fields, sorted by seed, as processes add them in any order."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def name_images(number: str, kind: str = "") -> str:
    """Return a number of images as text; ``"all"`` is allowed."""
    return f"{number if number == 'all' else f'{int(number):,}'} {kind}images"


def name_recipe(row: Row) -> str:
    """Return the training recipe of a row as text."""
    recipe = f"{name_images(row['train_images'])}, {row['epochs']} epochs" + ", augmented" * (row["augmented"] == "1")
    return recipe + f", {name_images(row['test_images'], 'test ')}" * (row["test_images"] != "all")


def name_seeds(rows: Iterable[Row], expected: Iterable[str]) -> str:
    """Return present and missing seeds as text."""
    seeds = {row["seed"] for row in rows}
    missing = sorted(set(expected) - seeds, key=int)
    return ", ".join(sorted(seeds, key=int)) + (f" (not run: {', '.join(missing)})" if missing else "")


def numbers(rows: Iterable[Row], quantity: str) -> list[float]:
    """Return the values of a field that are not empty."""
    return [float(row[quantity]) for row in rows if row[quantity]]


def by_seed(rows: Iterable[Row], quantity: str) -> dict[str, float]:
    """Return the values of a field that are not empty, by seed."""
    return {row["seed"]: float(row[quantity]) for row in rows if row[quantity]}


def claims_table(table: Table, adjusted: Adjusted) -> list[str]:
    """Return a Markdown table; the paper has columns if it prints any difference."""
    claims = table.claims
    if not claims:
        return []
    paper = any(claim.paper is not None for claim in claims)
    heads = [f"{table.unit}, paper"] * paper + [f"{table.unit}, measured", "p", "verdict"] + ["paper's sign"] * paper
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * (2 + paper) + "---|" * (1 + paper)]
    for claim in claims:
        difference = ["" if claim.paper is None else f"{claim.paper:+.2f}"] * paper
        p = "" if claim.result.p is None else f"{claim.result.p:.2g}"
        cells = [f"{claim.ours} − {claim.peer}", *difference, claim.difference, p, verdict(claim, adjusted)]
        lines.append("| " + " | ".join([*cells, *[sign(claim, adjusted)] * paper]) + " |")
    return lines
