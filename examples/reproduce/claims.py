"""Sections of the results page: lines, figures and claims."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from comparison import NOISE, ONE_SEED, Counts, Verdict
from matplotlib.figure import Figure

__all__ = ["Claim", "Row", "Section", "claims_table", "grouped", "name_images", "name_recipe", "name_seeds", "numbers"]

Row = dict[str, str]


class Claim(NamedTuple):
    """A comparison of two networks in an experiment."""

    setting: str
    ours: str
    peer: str
    quantity: str
    verdict: Verdict | Counts
    paper: float | None = None  # its difference; −1 or 1 if it says fewer or more without a number

    def to_text(self) -> str:
        """Return the comparison as a sentence."""
        word = "" if self.verdict.word == NOISE else f"{self.verdict.word}, "
        paper = "" if self.paper is None or isinstance(self.verdict, Counts) else f"; paper {self.paper:+.2f}"
        return f"{self.ours} against {self.peer}, {self.quantity} ({self.setting}): {word}{self.difference}{paper}"

    @property
    def difference(self) -> str:
        """The difference with two digits, of losses with three."""
        return self.verdict.to_text(3 if "loss" in self.quantity else 2)

    @property
    def sign(self) -> str:
        """Agreement with the paper's sign; empty without a sign or with one seed."""
        if self.paper is None or self.verdict.word == ONE_SEED:
            return ""
        if self.verdict.word == NOISE:
            return NOISE
        return "agrees" if (self.verdict.difference < 0) == (self.paper < 0) else "does not agree"


class Section(NamedTuple):
    """Lines, claims and figures of a section."""

    lines: list[str]
    claims: list[Claim]
    figures: dict[str, tuple[str, Figure]]  # name of the file -> caption and figure


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


def claims_table(claims: Sequence[Claim], unit: str) -> list[str]:
    """Return a Markdown table; the paper has columns if it prints any difference."""
    paper = any(claim.paper is not None for claim in claims)
    heads = [f"{unit}, paper"] * paper + [f"{unit}, measured", "verdict"] + ["paper's sign"] * paper
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * (1 + paper) + "---|" * (1 + paper)]
    for claim in claims:
        difference = ["" if claim.paper is None else f"{claim.paper:+.2f}"] * paper
        sign = [claim.sign] * paper
        cells = [f"{claim.ours} − {claim.peer}", *difference, claim.difference, claim.verdict.word, *sign]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
