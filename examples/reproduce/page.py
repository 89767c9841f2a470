"""Write the results page and its figures.

    python examples/reproduce/page.py
    python examples/reproduce/page.py --results docs/results --readme README.md --gpu benchmarks/results/gpu

The second command also writes the summary in a document, and the starts that ``benchmarks/gpu.sh`` compared.

All figures come from the CSV files of the commands. Experiments without rows are left out. A claim is made only if its
p-value survives the correction for the number of claims (:mod:`claims`).
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

import coefficients
from architecture_table import ROWS
from claims import NOISE, ONE_SEED, Adjusted, Claim, Section, adjusted_p_values, sign, verdict
from comparison import Counts
from matplotlib.figure import Figure
from paper_figures import TABLE5
from rows import RESULTS, read_rows
from section_gradients import gradients
from section_stability import stability
from section_starts import starts
from section_table4 import table4
from section_table7 import table7

from optinspired_plugins._files import write_atomically

BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"
HEAD = """\
# The paper's claims, measured

This page tests the claims of sections 8 and 9 of the paper on CIFAR-10, at a size that two processor cores can run.

- "Paper" columns have the paper's figures, "measured" columns ours.
- ± after a mean is the standard deviation over seeds; [a, b] after a difference is its 95 % interval.
- Two networks with one seed see the same batches, and start from the same convolutions, except pre-activation ResNet.
  With three common seeds or more, the difference is the mean of the paired differences, with Student's interval. With
  two, the interval is made of the variance over seeds of all networks in the table. Counts of runs are compared by
  Fisher's exact test.
- A difference is called lower or higher, fewer or more, only if its p-value is at most 5 % after the correction of
  Benjamini and Hochberg for all comparisons on this page. "Before correction": only its own p-value is. All others are
  not decided.
- Agreement with the paper is agreement in sign, since the paper prints no spread.

Each row of `table4.csv`, `stability.csv` and `table7.csv` in [`{name}/`]({results}) has its command, seed, versions,
threads and seconds. [`examples/reproduce`]({code}) has the plan; `page.py` there writes this page.
"""


def coefficients_section(folder: Path) -> Section:
    """Return the section about learned coefficients."""
    rows = read_rows(folder / "coefficients.csv")
    if not rows:
        return Section([], [], {})
    lines = [
        "## Learned coefficients",
        "",
        "β1 and β2 of each step and α of each pair of layers after the trainings of Table 4. The comparisons there "
        "show if learning them helps (β learned; α = 1).",
        "",
        *coefficients.summary(rows),
        "",
    ]
    return Section(lines, [], {"coefficients": ("Learned coefficients by depth", coefficients.draw(rows))})


def table5(folder: Path) -> Section:
    """Return the section about Table 5."""
    rows = {row["name"]: row for row in read_rows(folder / "table5.csv")}
    lines = [
        "## Table 5: ImageNet",
        "",
        "**ImageNet was not run**: all errors are the paper's. Parameters and multiply-accumulates are counted; the "
        "latter include convolutions and classifier. AGDNet needs fewer, as its transitions pool before they convolve.",
        "",
        "| the paper's model | here | parameters, paper | parameters, measured | FLOPs, paper | MACs, measured | "
        "top-1 error, paper | top-5 error, paper |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in ROWS:
        if row.paper_name in rows:
            count = rows[row.paper_name]
            options = f" with `{count['options']}`" if count["options"] != "{}" else ""
            sizes = f"{row.params} | {int(count['parameters']):,} | {row.macs} | {int(count['macs']) / 1e9:.3f}G"
            errors = " | ".join(f"{error:.2f}" for error in TABLE5[row.paper_name])
            lines.append(f"| {row.paper_name} | `{count['model']}`{options} | {sizes} | {errors} |")
    return Section([*lines, ""] if rows else [], [], {})


SECTIONS: list[Callable[[Path], Section]] = [table4, stability, gradients, coefficients_section, table7, table5]


def decided(claims: Iterable[Claim], adjusted: Adjusted) -> tuple[list[Claim], list[Claim]]:
    """Return the claims with several seeds, and which of these survive the correction."""
    several = [claim for claim in claims if verdict(claim, adjusted) != ONE_SEED]
    return several, [claim for claim in several if verdict(claim, adjusted) in claim.result.directions]


def summary(claims: Iterable[Claim], adjusted: Adjusted) -> list[str]:
    """Return the decided claims about the paper, and about errors of HBNet's default start, for README.md.

    Claims about one quantity in one setting have it as their heading.
    """
    several, survivors = decided(claims, adjusted)
    default = [c for c in survivors if "error" in c.quantity and re.fullmatch("HBNet.*γ = rule", c.ours)]
    parts = {
        "With a figure in the paper (γ = 1)": [c for c in survivors if c.paper is not None],
        "HBNet's default start at learning rate 0.1 (γ by the rule if none is named)": default,
    }
    lines = [
        f"Comparisons with several seeds: {len(several)}; decided, after the correction for their number: "
        f"{len(survivors)}."
    ]
    for title, shown in parts.items():
        lines += ["", f"{title}:" if shown else f"{title}: none.", *[""] * bool(shown)]
        for (quantity, setting), group in groupby(shown, lambda claim: (claim.quantity, claim.setting)):
            texts = (_outcome(claim, adjusted).replace(", γ = rule", "") for claim in group)
            lines += [f"- {quantity} ({setting}):", *(f"  - {text}" for text in texts)]
    return lines


def conclusions(claims: Sequence[Claim], adjusted: Adjusted) -> list[str]:
    """Return the claims, sorted by agreement with the paper."""

    def lines(title: str, group: Iterable[Claim]) -> list[str]:
        items = [f"- {_sentence(claim, adjusted)}" for claim in group]
        return [f"**{title}**", "", *items, ""] if items else []

    several, survivors = decided(claims, adjusted)
    others = [claim for claim in several if claim not in survivors]
    single = len(claims) - len(several)
    omission = f" Left out with a single seed: {single}." if single else ""
    return [
        "## Conclusions",
        "",
        f"Comparisons with several seeds: {len(several)}. After the correction for their number, {len(survivors)} are "
        f"decided.{omission}",
        "",
        *lines("Agrees with the paper's sign", (c for c in several if sign(c, adjusted) == "agrees")),
        *lines("Does not agree with the paper's sign", (c for c in several if sign(c, adjusted) == "does not agree")),
        *lines("Decided, where the paper prints nothing to compare", (c for c in survivors if c.paper is None)),
        *lines(
            "Significant alone, but not among so many comparisons",
            (c for c in others if verdict(c, adjusted) != NOISE),
        ),
        *lines("Not decided", (c for c in others if verdict(c, adjusted) == NOISE)),
    ]


def _sentence(claim: Claim, adjusted: Adjusted) -> str:
    return _outcome(claim, adjusted, f", {claim.quantity} ({claim.setting})")


def _outcome(claim: Claim, adjusted: Adjusted, about: str = "") -> str:
    word = verdict(claim, adjusted).partition(",")[0]  # the title says "before correction"
    word = "" if word == NOISE else f"{word}, "
    return f"{claim.ours} against {claim.peer}{about}: {word}{claim.difference}{_paper(claim)}"


def _paper(claim: Claim) -> str:
    if claim.paper is None:
        return ""
    value = claim.result.directions[claim.paper > 0] if isinstance(claim.result, Counts) else f"{claim.paper:+.2f}"
    return f"; paper: {value}"


def read_sections(results: Path, gpu: Path | None) -> tuple[list[Section], Adjusted]:
    """Return all sections, and the p-values corrected for the number of their claims."""
    sections = [*(section(results) for section in SECTIONS), starts(gpu)]
    return sections, adjusted_p_values(claim for section in sections for claim in section.claims())


def compose(results: Path, page: Path, gpu: Path | None = None) -> tuple[str, dict[str, Figure]]:
    """Return the text of the page, with relative links, and its figures by name."""
    sections, adjusted = read_sections(results, gpu)
    claims = [claim for section in sections for claim in section.claims()]
    lines = conclusions(claims, adjusted) if claims else []
    folder, code = (Path(os.path.relpath(path, page.parent)).as_posix() for path in (results, Path(__file__).parent))
    for section in sections:
        lines += section.lines(adjusted)
        for name, (caption, _) in section.figures.items():
            lines += [f"![{caption}]({folder}/{name}.png)", ""]
    head = HEAD.format(name=results.name, results=folder, code=code)
    figures = {name: figure for section in sections for name, (_, figure) in section.figures.items()}
    return head + "\n" + "\n".join(lines).rstrip() + "\n", figures


def write(results: Path, page: Path, gpu: Path | None = None) -> None:
    """Write the page, and the figures next to the results."""
    text, figures = compose(results, page, gpu)
    for name, figure in figures.items():
        figure.savefig(results / f"{name}.png", dpi=110)
    write_atomically(page, text)


def write_summary(results: Path, readme: Path, gpu: Path | None = None) -> None:
    """Replace the summary between the marks of a document.

    Raises:
        ValueError: the document does not have both marks once.
    """
    text = readme.read_text(encoding="utf-8")
    if not text.count(BEGIN) == text.count(END) == 1:
        raise ValueError(f"{readme}: must have {BEGIN.strip()} and {END.strip()} once")
    before, rest = text.split(BEGIN)
    sections, adjusted = read_sections(results, gpu)
    lines = summary([claim for section in sections for claim in section.claims()], adjusted)
    write_atomically(readme, before + BEGIN + "".join(f"{line}\n" for line in lines) + END + rest.split(END)[1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files and the figures")
    parser.add_argument("--page", type=Path, help="the page; RESULTS.md by default")
    parser.add_argument("--readme", type=Path, help="document in which to replace the summary")
    parser.add_argument("--gpu", type=Path, help="folder of results of benchmarks/gpu.sh")
    args = parser.parse_args(arguments)
    if not any((args.results / f"{name}.csv").exists() for name in ("table4", "stability", "table5", "table7")):
        parser.error(f"argument --results: {args.results} holds no results")
    page = args.page or args.results.with_name(f"{args.results.name}.md")
    write(args.results, page, args.gpu)
    print(page)
    if args.readme is not None:
        write_summary(args.results, args.readme, args.gpu)
        print(args.readme)


if __name__ == "__main__":
    main()
