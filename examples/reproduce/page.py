"""Write a page and its figures from the CSV files of this folder's commands, whichever there are.

    python examples/reproduce/page.py
    python examples/reproduce/page.py --results docs/results --readme README.md    # and the summary in a document

Nothing is typed by hand: what was not run is not printed, and a claim is made only where a difference exceeds the
spread over seeds (:mod:`comparison`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import coefficients
from claims import Claim, Section
from comparison import NOISE, ONE_SEED
from matplotlib.figure import Figure
from networks import ROWS
from paper_figures import TABLE5
from rows import RESULTS, read_rows
from section_stability import stability
from section_table4 import summary, table4
from section_table7 import table7

from optinspired_plugins._files import write_atomically

BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"
HEAD = """\
# The paper's claims, measured

What sections 8 and 9 of the paper claim, on real CIFAR-10 and at a size that two processor cores can run. "paper"
columns are the paper's figures, "measured" ones ours. ± behind a mean is the standard deviation over seeds; behind a
difference, half of its 95 % confidence interval (Welch's). A difference is called lower or higher only where it is
larger than that, counts of runs are called fewer or more only where Fisher's exact test says so at 5 %, and agreement
is about the sign; the paper prints no spread. Each row of `table4.csv`, `stability.csv` and `table7.csv` in
[`{name}/`]({results}) has the command that made it, its seed, versions, threads and seconds;
[`examples/reproduce`]({code}) has the plan, and `page.py` there writes this page.
"""


def learned(folder: Path) -> Section:
    """Return where learned coefficients went."""
    rows = read_rows(folder / "coefficients.csv")
    if not rows:
        return Section([], [], {})
    lines = [
        "## Learned coefficients",
        "",
        "β1 and β2 of each step and α of each pair of layers, after the trainings of Table 4; whether learning them "
        "helps is in the comparisons there (β learned; α = 1).",
        "",
        *coefficients.summary(rows),
        "",
    ]
    return Section(lines, [], {"coefficients": ("Learned coefficients by depth", coefficients.draw(rows))})


def table5(folder: Path) -> Section:
    """Return what was counted beside the paper's figures."""
    rows = {row["name"]: row for row in read_rows(folder / "table5.csv")}
    lines = [
        "## Table 5: ImageNet",
        "",
        "**ImageNet was not run**: errors are the paper's alone, parameters and multiply-accumulates are counted. Ours "
        "are those of convolutions and classifier; AGDNet's transitions pool before they convolve, which saves some.",
        "",
        "| the paper's model | here | parameters, paper | parameters, measured | FLOPs, paper | MACs, measured | "
        "top-1 error, paper | top-5 error, paper |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in ROWS:
        if row.paper_name in rows:
            counted = rows[row.paper_name]
            options = f" with `{counted['options']}`" if counted["options"] != "{}" else ""
            sizes = f"{row.params} | {int(counted['parameters']):,} | {row.macs} | {int(counted['macs']) / 1e9:.3f}G"
            errors = " | ".join(f"{error:.2f}" for error in TABLE5[row.paper_name])
            lines.append(f"| {row.paper_name} | `{counted['model']}`{options} | {sizes} | {errors} |")
    return Section([*lines, ""] if rows else [], [], {})


SECTIONS: list[Callable[[Path], Section]] = [table4, stability, learned, table7, table5]


def conclusions(claims: Sequence[Claim]) -> list[str]:
    """Return what agrees with the paper, what does not, what else was found, and what is too noisy to say."""

    def lines(title: str, some: Iterable[Claim]) -> list[str]:
        made = [f"- {claim.to_text()}" for claim in some]
        return [f"**{title}**", "", *made, ""] if made else []

    compared = [claim for claim in claims if claim.verdict.word != ONE_SEED]
    found = [claim for claim in compared if claim.verdict.word != NOISE]
    alone = len(claims) - len(compared)
    left_out = f", {alone} of them of a single seed and left out here" if alone else ""
    return [
        "## What can be said",
        "",
        f"{len(claims)} comparisons{left_out}. Where there is no difference, one in twenty would come out as one by "
        "chance.",
        "",
        *lines("Agrees with the paper's sign", (c for c in compared if c.sign == "agrees")),
        *lines("Does not agree with the paper's sign", (c for c in compared if c.sign == "does not agree")),
        *lines("Found, where the paper prints nothing to compare", (c for c in found if c.printed is None)),
        *lines("Too noisy to say", (c for c in compared if c.verdict.word == NOISE)),
    ]


def compose(results: Path, page: Path) -> tuple[str, dict[str, Figure]]:
    """Return the text of the page, with links from where it will be, and its figures by name."""
    sections = [section(results) for section in SECTIONS]
    claims = [claim for section in sections for claim in section.claims]
    lines = conclusions(claims) if claims else []
    folder, code = (Path(os.path.relpath(path, page.parent)).as_posix() for path in (results, Path(__file__).parent))
    for section in sections:
        lines += section.lines
        for name, (shown, _) in section.figures.items():
            lines += [f"![{shown}]({folder}/{name}.png)", ""]
    head = HEAD.format(name=results.name, results=folder, code=code)
    figures = {name: figure for section in sections for name, (_, figure) in section.figures.items()}
    return head + "\n" + "\n".join(lines).rstrip() + "\n", figures


def write(results: Path, page: Path) -> None:
    """Write the page, and the figures beside the results."""
    text, figures = compose(results, page)
    for name, figure in figures.items():
        figure.savefig(results / f"{name}.png", dpi=110)
    write_atomically(page, text)


def write_summary(results: Path, readme: Path) -> None:
    """Replace what is between the marks of a document.

    Raises:
        ValueError: the document has not the two marks.
    """
    text = readme.read_text(encoding="utf-8")
    if not text.count(BEGIN) == text.count(END) == 1:
        raise ValueError(f"{readme}: must have {BEGIN.strip()} and {END.strip()} once")
    before, rest = text.split(BEGIN)
    table = "".join(f"{line}\n" for line in summary(results))
    write_atomically(readme, before + BEGIN + table + END + rest.split(END)[1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files and the figures")
    parser.add_argument("--page", type=Path, help="the page, by default beside that folder and named like it")
    parser.add_argument("--readme", type=Path, help="a document with the marks of the summary")
    args = parser.parse_args(arguments)
    if not any((args.results / f"{name}.csv").exists() for name in ("table4", "stability", "table5", "table7")):
        parser.error(f"argument --results: {args.results} holds no results")
    page = args.page or args.results.with_name(f"{args.results.name}.md")
    write(args.results, page)
    print(page)
    if args.readme is not None:
        write_summary(args.results, args.readme)
        print(args.readme)


if __name__ == "__main__":
    main()
