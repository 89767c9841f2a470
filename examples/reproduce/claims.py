"""What a section of the results page is made of: lines, figures, and the comparisons that it makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from comparison import NOISE, ONE_SEED, Counts, Verdict
from matplotlib.figure import Figure

__all__ = ["Claim", "Row", "Section", "claims_table", "grouped", "name_images", "name_recipe", "name_seeds", "numbers"]

Row = dict[str, str]


class Claim(NamedTuple):
    """A comparison that was made: where, of what, its verdict, and the paper's difference if it has one.

    Where the paper says fewer or more and prints no number, ``printed`` is −1 or 1.
    """

    where: str
    ours: str
    peer: str
    quantity: str
    verdict: Verdict | Counts
    printed: float | None = None

    def to_text(self) -> str:
        """Return the comparison as a sentence, with the paper's difference where it prints a number."""
        word = "" if self.verdict.word == NOISE else f"{self.verdict.word}, "
        paper = "" if self.printed is None or isinstance(self.verdict, Counts) else f"; paper {self.printed:+.2f}"
        return f"{self.ours} against {self.peer}, {self.quantity} ({self.where}): {word}{self.difference}{paper}"

    @property
    def difference(self) -> str:
        """The difference, in points with two digits, of losses with three."""
        return self.verdict.to_text(3 if "loss" in self.quantity else 2)

    @property
    def sign(self) -> str:
        """Whether the paper's sign agrees: "" where there is none, or no claim of ours."""
        if self.printed is None or self.verdict.word == ONE_SEED:
            return ""
        if self.verdict.word == NOISE:
            return NOISE
        return "agrees" if (self.verdict.difference < 0) == (self.printed < 0) else "does not agree"


class Section(NamedTuple):
    """Lines of the page, the claims in them, and figures that end it, by name, with what they show."""

    lines: list[str]
    claims: list[Claim]
    figures: dict[str, tuple[str, Figure]]


def grouped(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    """Return the rows by their values of some fields, in the order of their seeds: processes add them in any."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def name_images(number: str, kind: str = "") -> str:
    """Name a number of images: ``"all"`` is one."""
    return f"{number if number == 'all' else f'{int(number):,}'} {kind}images"


def name_recipe(row: Row) -> str:
    """Name the recipe of a row of Table 4, or of coefficients learned there."""
    recipe = f"{name_images(row['train_images'])}, {row['epochs']} epochs" + ", augmented" * (row["augmented"] == "1")
    return recipe + f", {name_images(row['test_images'], 'test ')}" * (row["test_images"] != "all")


def name_seeds(rows: Iterable[Row], every: Iterable[str]) -> str:
    """Name the seeds of some rows, and those that others have and these have not."""
    there = {row["seed"] for row in rows}
    missing = sorted(set(every) - there, key=int)
    return ", ".join(sorted(there, key=int)) + (f" (not run: {', '.join(missing)})" if missing else "")


def numbers(rows: Iterable[Row], quantity: str) -> list[float]:
    """Return a field of the rows that have one."""
    return [float(row[quantity]) for row in rows if row[quantity]]


def claims_table(claims: Sequence[Claim], unit: str) -> list[str]:
    """Return the comparisons as a table, with a column for the paper's where it prints any."""
    printed = any(claim.printed is not None for claim in claims)
    heads = [f"{unit}, paper"] * printed + [f"{unit}, measured", "so it is"] + ["paper's sign"] * printed
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * (1 + printed) + "---|" * (1 + printed)]
    for claim in claims:
        paper = ["" if claim.printed is None else f"{claim.printed:+.2f}"] * printed
        sign = [claim.sign] * printed
        cells = [f"{claim.ours} − {claim.peer}", *paper, claim.difference, claim.verdict.word, *sign]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
