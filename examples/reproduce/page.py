"""Write ``docs/results.md`` and its figures from the CSV files of this folder's commands, whichever there are.

    python examples/reproduce/page.py

Nothing is typed by hand: what was not run is not printed, and a claim is made only where a difference exceeds the
spread over seeds (:mod:`comparison`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import coefficients
from comparison import NOISE, ONE_SEED, Verdict, compare, mean_and_spread
from figures import draw_dots, draw_stability
from matplotlib.figure import Figure
from networks import NETWORKS, ROWS
from paper_figures import TABLE4, TABLE5, TABLE7
from rows import RESULTS, read_rows
from stability import EXPLODED

from optinspired_plugins._files import write_atomically

Row = dict[str, str]

HEAD = """\
# The paper's claims, measured

What sections 8 and 9 of the paper claim, on real CIFAR-10 and at a size that two processor cores can run. "paper"
columns are the paper's figures, "measured" ones ours. ± behind a mean is the standard deviation over seeds; behind a
difference, half of its 95 % confidence interval (Welch's). A difference is called lower or higher only where it is
larger than that, and agreement is about its sign. Each row of [`docs/results/`](results) has the command that made it,
its seed, versions, threads and seconds; [`examples/reproduce`](../examples/reproduce) has the plan, and this page is
what `python examples/reproduce/page.py` writes.
"""


class Claim(NamedTuple):
    """A comparison that was made: where, of what, its verdict, and the paper's difference if it prints one."""

    where: str
    ours: str
    peer: str
    quantity: str
    verdict: Verdict
    printed: float | None = None

    @property
    def difference(self) -> str:
        """The difference, in points with two digits, of losses with three."""
        return self.verdict.to_text(3 if "loss" in self.quantity else 2)


class Section(NamedTuple):
    """Lines of the page, the claims in them, and figures by name."""

    lines: list[str]
    claims: list[Claim]
    figures: dict[str, Figure]


def _groups(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def _seeds(rows: Iterable[Row], every: Iterable[str]) -> str:
    """Name the seeds of some rows, and those that others have and these have not."""
    there = {row["seed"] for row in rows}
    missing = sorted(set(every) - there, key=int)
    return ", ".join(sorted(there, key=int)) + (f" (not run: {', '.join(missing)})" if missing else "")


def _values(rows: Iterable[Row], quantity: str) -> list[float]:
    return [float(row[quantity]) for row in rows if row[quantity]]


def _claims_table(claims: Sequence[Claim], unit: str) -> list[str]:
    """Return the comparisons as a table, with a column for the paper's where it prints any."""
    printed = any(claim.printed is not None for claim in claims)
    heads = [f"{unit}, paper"] * printed + [f"{unit}, measured", "so it is"] + ["paper's sign"] * printed
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * (1 + printed) + "---|" * (1 + printed)]
    for claim in claims:
        paper = ["" if claim.printed is None else f"{claim.printed:+.2f}"] * printed
        sign = [claim.verdict.against(claim.printed)] * printed
        cells = [f"{claim.ours} − {claim.peer}", *paper, claim.difference, claim.verdict.word, *sign]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


# --- Table 4 ----------------------------------------------------------------------------------------------------------


def _pairs() -> list[tuple[str, str]]:
    """What is compared: each family with its special case, then with each control."""
    pairs = []
    for n in (20, 56, 110):
        hb, resnet = f"hbnet{n}", f"resnet{n}"
        pairs += [(hb, resnet), (f"{resnet}-no-last-relu", resnet), (hb, f"{resnet}-no-last-relu")]
        pairs += [(hb, f"{resnet}-preact"), (f"{hb}-post-act", hb), (f"{hb}-learn-beta", hb)]
    for layers in (22, 40, 52):
        agd, dense = f"agdnet{layers}", f"densenet{layers}"
        pairs += [(agd, dense), (agd, f"{agd}-alpha-1"), (agd, f"{agd}-beta-0")]
    return pairs


def table4(folder: Path) -> Section:
    """Return errors and losses of the networks, a block for each recipe."""
    rows, claims, panels = read_rows(folder / "table4.csv"), [], {}
    lines = ["## Table 4: CIFAR-10", ""] if rows else []
    for (epochs, images, augmented), block in _groups(rows, ("epochs", "train_images", "augmented")).items():
        found = {network: group for network in NETWORKS if (group := [r for r in block if r["network"] == network])}
        title = f"{images} images, {epochs} epochs, {'with' if augmented == '1' else 'without'} augmentation"
        lines += [f"### {title}", "", *_table4_block(found, augmented == "1"), ""]
        here = _table4_claims(found, title, augmented == "1")
        for quantity, unit in (
            ("test error", "difference of test error, points"),
            ("training loss", "difference of training loss"),
        ):
            some = [claim for claim in here if claim.quantity == quantity]
            lines += [*_claims_table(some, unit), ""] if some else []
        claims += here
        errors = {NETWORKS[name].label: _values(group, "test_error") for name, group in found.items()}
        panels[title] = {label: values for label, values in errors.items() if values}
    panels = {title: lines for title, lines in panels.items() if lines}
    if panels:
        lines += ["![Test errors of all seeds](results/table4.png)", ""]
    return Section(lines, claims, {"table4": draw_dots(panels, "test error (%)")} if panels else {})


def _table4_block(found: dict[str, list[Row]], augmented: bool) -> list[str]:
    first = next(iter(found.values()))[0]
    every = {row["seed"] for group in found.values() for row in group}
    lines = [
        f"Tested once, after the last epoch, on {int(first['test_images']):,} images; the loss and error of training "
        "images are those of the first so many, not augmented and in evaluation. The paper's are 300 epochs of all.",
        "",
        "| network | parameters | test error, paper | test error, measured | training error | training loss | seeds |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, group in found.items():
        done = [row for row in group if row["diverged"] == "0"]
        printed = f"{TABLE4[name][augmented]:.2f}" if name in TABLE4 else ""
        columns = [("test_error", 2), ("fit_error", 2), ("fit_loss", 3)]
        cells = [mean_and_spread(_values(done, c), d) if done else "" for c, d in columns]
        seeds = _seeds(group, every)
        lost = [row["seed"] for row in group if row["diverged"] == "1"]
        seeds += f" (diverged: {', '.join(lost)})" if lost else ""
        start = f"| {NETWORKS[name].label} | {int(group[0]['parameters']):,} | {printed} | "
        lines.append(start + " | ".join([*cells, seeds]) + " |")
    return lines


def _table4_claims(found: dict[str, list[Row]], where: str, augmented: bool) -> list[Claim]:
    claims = []
    for column, quantity in (("test_error", "test error"), ("fit_loss", "training loss")):
        for ours, peer in _pairs():
            values = [_values(found.get(name, []), column) for name in (ours, peer)]
            if not all(values):
                continue
            printed = None
            if column == "test_error" and ours in TABLE4 and peer in TABLE4:
                printed = TABLE4[ours][augmented] - TABLE4[peer][augmented]
            labels = NETWORKS[ours].label, NETWORKS[peer].label
            lost = any(row["diverged"] == "1" for name in (ours, peer) for row in found[name])
            place = where + ", without runs that diverged" * lost
            claims.append(Claim(place, *labels, quantity, compare(*values), printed))
    return claims


# --- stability --------------------------------------------------------------------------------------------------------


DRAWN = ("resnet110", "hbnet110", "hbnet110-post-act")


def stability(folder: Path) -> Section:
    """Return how the first steps went."""
    rows, curves = read_rows(folder / "stability.csv"), read_rows(folder / "stability_curves.csv")
    if not rows:
        return Section([], [], {})
    claims: list[Claim] = []
    lines = [
        "## Stability",
        "",
        "§8.2: ResNet-110 at learning rate 0.1 without a warm-up was repeated until it converged, HBNet-110 converged "
        "at once. Here: the first steps of 64 images, augmented. Diverged: loss or gradient not finite, or the mean "
        f"loss of the last tenth of the steps over {EXPLODED} times the first step's. Stalled: that mean is no better "
        "than guessing's. The last loss is that mean where a run has not diverged.",
        "",
    ]
    for (steps, lr), block in _groups(rows, ("steps", "lr")).items():
        every = {row["seed"] for row in block}
        lines += [
            f"| {steps} steps at {lr}, measured | runs | diverged | stalled | steps until better than guessing | "
            "last loss | largest gradient norm | seeds |",
            "|---|---:|---:|---:|---:|---:|---:|---|",
        ]
        last = {}
        for name, group in {n: [r for r in block if r["network"] == n] for n in NETWORKS}.items():
            if not group:
                continue
            last[name] = _values(group, "last_loss")
            counts = [str(sum(int(row[c]) for row in group)) for c in ("diverged", "stalled")]
            until = ", ".join(row["steps_to_better_than_guessing"] or "never" for row in group)
            loss = mean_and_spread(last[name]) if last[name] else ""
            norms = _values(group, "largest_grad_norm")
            largest = f"{max(norms):.3g}" if norms else ""
            cells = [NETWORKS[name].label, str(len(group)), *counts, until, loss, largest, _seeds(group, every)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        for ours in ("hbnet110", "resnet110-no-last-relu", "hbnet110-post-act", "hbnet110-learn-beta"):
            peer = "resnet110"
            if last.get(ours) and last.get(peer):
                labels = NETWORKS[ours].label, NETWORKS[peer].label
                verdict = compare(last[ours], last[peer])
                claims.append(Claim(f"{steps} steps at {lr}", *labels, "last loss", verdict))
    lines += [*_claims_table(claims, "difference of last loss"), ""] if claims else []
    # One budget and as many networks as there are colours.
    first = (rows[0]["steps"], rows[0]["lr"])
    shown = [row for row in curves if (row["steps"], row["lr"]) == first and row["network"] in DRAWN]
    figures = {"stability": draw_stability(shown)} if shown else {}
    lines += (
        [f"![Loss and gradient norm of {first[0]} steps at {first[1]}](results/stability.png)", ""] if shown else []
    )
    return Section(lines, claims, figures)


# --- coefficients, Table 5 --------------------------------------------------------------------------------------------


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
        "![Learned coefficients by depth](results/coefficients.png)",
        "",
    ]
    return Section(lines, [], {"coefficients": coefficients.draw(rows)})


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


# --- Table 7 ----------------------------------------------------------------------------------------------------------

METHODS = {
    "darts": "DARTS space",
    "hb": "HB space",
    "hb-dagger": "HB space, HB†",
    "agd": "AGD space",
    "random-darts": "DARTS space, random search",
    "random-hb": "HB space, random search",
    "random-agd": "AGD space, random search",
}
SEARCH_PAIRS = [
    ("hb", "darts"),
    ("hb-dagger", "hb"),
    ("agd", "darts"),
    ("darts", "random-darts"),
    ("hb", "random-hb"),
    ("hb-dagger", "random-hb"),
    ("agd", "random-agd"),
]
BUDGET = ("images", "search_epochs", "alpha_lr", "cells", "channels", "trials", "trial_epochs")
BUDGET += ("retrain_epochs", "retrain_cells", "width")


def table7(folder: Path) -> Section:
    """Return what was searched and retrained, a block for each budget."""
    rows, claims, panels = read_rows(folder / "table7.csv"), [], {}
    lines = ["## Table 7: searches", ""] if rows else []
    for budget, block in _groups(rows, BUDGET).items():
        found = {method: group for method in METHODS if (group := [r for r in block if r["method"] == method])}
        title = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in zip(BUDGET, budget))
        lines += [*_table7_block(found, title), ""]
        here = []
        for ours, peer in SEARCH_PAIRS:
            if ours in found and peer in found:
                printed = TABLE7[ours][0] - TABLE7[peer][0] if peer in TABLE7 else None
                verdict = compare(*(_values(found[name], "test_error") for name in (ours, peer)))
                here.append(Claim("searches", METHODS[ours], METHODS[peer], "test error", verdict, printed))
        lines += [*_claims_table(here, "difference of test error, points"), ""] if here else []
        claims += here
        panel = f"{budget[0]} images, {budget[1]} + {budget[7]} epochs"
        panels[panel] = {METHODS[method]: _values(group, "test_error") for method, group in found.items()}
    if panels:
        lines += ["![Test errors of the networks that were found](results/table7.png)", ""]
    return Section(lines, claims, {"table7": draw_dots(panels, "test error (%)")} if panels else {})


def _table7_block(found: dict[str, list[Row]], budget: str) -> list[str]:
    every = {row["seed"] for group in found.values() for row in group}
    darts = {row["seed"]: float(row["search_seconds"]) for row in found.get("darts", [])}
    lines = [
        f"One budget for all: {budget}. Costs are the search's alone, in units of the DARTS space's with the same "
        "seed, the paper's likewise. The networks are `cellnet_cifar` with the genotypes named.",
        "",
        "| | test error, paper | test error, measured | parameters, paper | parameters, measured | cost, paper | "
        "cost, measured | seeds | genotypes |",
        "|---|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for method, group in found.items():
        paper = ("", "", "")
        if method in TABLE7:
            error, size, days = TABLE7[method]
            paper = (f"{error:.2f}", f"{size:.2f}M", f"{days / TABLE7['darts'][2]:.2f}")
        error = mean_and_spread(_values(group, "test_error"))
        size = ", ".join(f"{int(row['parameters']):,}" for row in group)
        ratios = [float(row["search_seconds"]) / darts[row["seed"]] for row in group if darts.get(row["seed"])]
        cost = f"{mean(ratios):.2f}" if ratios else ""
        names = ", ".join(f"`{row['genotype']}`" for row in group)
        cells = [METHODS[method], paper[0], error, paper[1], size, paper[2], cost, _seeds(group, every), names]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


# --- the page ---------------------------------------------------------------------------------------------------------

SECTIONS: list[Callable[[Path], Section]] = [table4, stability, learned, table7, table5]


def conclusions(claims: Sequence[Claim]) -> list[str]:
    """Return what agrees with the paper, what does not, what else was found, and what is too noisy to say."""

    def lines(title: str, some: Iterable[Claim]) -> list[str]:
        made = [
            f"- {c.ours} against {c.peer}, {c.quantity} ({c.where}): {c.verdict.word}, {c.difference}" for c in some
        ]
        return [f"**{title}**", "", *made, ""] if made else []

    compared = [claim for claim in claims if claim.verdict.word != ONE_SEED]
    signs = {claim: claim.verdict.against(claim.printed) for claim in compared}
    found = [claim for claim in compared if claim.verdict.word != NOISE]
    return [
        "## What can be said",
        "",
        f"{len(claims)} comparisons, {len(claims) - len(compared)} of them of a single seed and left out here. Where "
        "there is no difference, one in twenty would come out as one by chance.",
        "",
        *lines("Agrees with the paper's sign", (c for c in compared if signs[c] == "agrees")),
        *lines("Does not agree", (c for c in compared if signs[c] == "does not agree")),
        *lines("Found, where the paper prints nothing to compare", (c for c in found if c.printed is None)),
        *lines("Too noisy to say", (c for c in compared if c.verdict.word == NOISE)),
    ]


def write(results: Path, page: Path) -> None:
    """Write the page, and the figures beside the results."""
    sections = [section(results) for section in SECTIONS]
    claims = [claim for section in sections for claim in section.claims]
    for section in sections:
        for name, figure in section.figures.items():
            figure.savefig(results / f"{name}.png", dpi=110)
    parts = [*(conclusions(claims) if claims else []), *(line for section in sections for line in section.lines)]
    write_atomically(page, HEAD + "\n" + "\n".join(parts).rstrip() + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files and the figures")
    parser.add_argument("--page", type=Path, default=RESULTS.parent / "results.md", help="the page")
    args = parser.parse_args(arguments)
    if not any((args.results / f"{name}.csv").exists() for name in ("table4", "stability", "table5", "table7")):
        parser.error(f"argument --results: {args.results} holds no results")
    write(args.results, args.page)
    print(args.page)


if __name__ == "__main__":
    main()
