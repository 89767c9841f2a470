"""Table 4 on the results page."""

from __future__ import annotations

from pathlib import Path

from claims import Claim, Row, Section, claims_table, grouped, name_images, name_recipe, name_seeds, numbers
from comparison import compare, mean_and_spread
from figures import draw_dots
from networks import NETWORKS
from paper_figures import TABLE4
from rows import read_rows

__all__ = ["summary", "table4"]


ABOUT = (
    "Networks are tested once, after the last epoch, on all test images unless a number is given. Training error and "
    "training loss are measured in evaluation mode on the same number of training images, the first ones, without "
    "augmentation. The paper trains for 300 epochs on all images: where the training error is high, a difference shows "
    "how fast a network learns, and not how well it does in the end. γ, the weight of the last normalisation of each "
    "transform, starts at 1 (`init_last=1.0`) unless the name says otherwise; the default of HBNet is smaller (Starts)."
)
RECIPE = ("epochs", "train_images", "test_images", "augmented")
HEAVY_BALL = [(f"hbnet{depth}", f"resnet{depth}") for depth in (20, 56, 110)]
SMALL_INIT = [(f"{hb}-small-init", f"{resnet}-small-init") for hb, resnet in HEAVY_BALL]
NESTEROV = [(f"agdnet{layers}", f"densenet{layers}") for layers in (22, 40, 52)]


def _pairs() -> list[tuple[str, str]]:
    """Pair each family with its special case, then with the controls."""
    pairs = []
    for (hb, resnet), small in zip(HEAVY_BALL, SMALL_INIT):
        pairs += [(hb, resnet), (f"{resnet}-no-last-relu", resnet), (hb, f"{resnet}-no-last-relu")]
        pairs += [*zip(small, (hb, resnet)), small]
        pairs += [(f"{hb}-uniform-init", f"{resnet}-uniform-init"), (hb, f"{resnet}-preact")]
        pairs += [(f"{hb}-post-act", hb), (f"{hb}-learn-beta", hb)]
    for agd, dense in NESTEROV:
        pairs += [(agd, dense), (agd, f"{agd}-alpha-1"), (agd, f"{agd}-beta-0")]
    return pairs


def table4(folder: Path) -> Section:
    """Return the section about Table 4, by recipe."""
    rows, claims, panels = read_rows(folder / "table4.csv"), [], {}
    lines = ["## Table 4: CIFAR-10", "", ABOUT, ""] if rows else []
    for (epochs, images, tested, augmented), block in grouped(rows, RECIPE).items():
        groups = {network: group for network in NETWORKS if (group := [r for r in block if r["network"] == network])}
        title = f"{name_images(images)}, {epochs} epochs, {'with' if augmented == '1' else 'without'} augmentation"
        title += f", {name_images(tested, 'test ')}" * (tested != "all")
        lines += [f"### {title}", "", *_table4_block(groups, augmented == "1"), ""]
        block_claims = _table4_claims(groups, title, augmented == "1")
        for quantity, unit in (
            ("test error", "difference of test error, points"),
            ("training loss", "difference of training loss"),
        ):
            group = [claim for claim in block_claims if claim.quantity == quantity]
            lines += [*claims_table(group, unit), ""] if group else []
        claims += block_claims
        errors = {NETWORKS[name].label: numbers(group, "test_error") for name, group in groups.items()}
        panels[title] = {label: values for label, values in errors.items() if values}
    panels = {title: lines for title, lines in panels.items() if lines}
    figure = {"table4": ("Test errors of all seeds", draw_dots(panels, "test error (%)"))} if panels else {}
    return Section(lines, claims, figure)


def summary(folder: Path) -> list[str]:
    """Return the table for README.md: each family against its special case."""
    lines = [
        "± is the standard deviation over seeds for an error, and half of the 95 % interval for a difference. Without "
        "a γ in the name, `init_last=1.0`.",
        "",
        "| CIFAR-10, test error in % | ours, measured | special case, measured | seeds | difference, measured | "
        "verdict | ours, paper | special case, paper |",
        "|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for (*_, augmented), block in grouped(read_rows(folder / "table4.csv"), RECIPE).items():
        for names in [*HEAVY_BALL, *SMALL_INIT, *NESTEROV]:
            errors = [numbers((row for row in block if row["network"] == name), "test_error") for name in names]
            if all(errors):
                verdict = compare(*errors)
                labels = " against ".join(NETWORKS[name].label for name in names)
                seeds = " and ".join(dict.fromkeys(str(len(values)) for values in errors))
                columns = [*map(mean_and_spread, errors), seeds, verdict.to_text(2), verdict.word]
                paper = [f"{TABLE4[name][augmented == '1']:.2f}" if name in TABLE4 else "" for name in names]
                lines.append("| " + " | ".join([f"{labels}: {name_recipe(block[0])}", *columns, *paper]) + " |")
    return lines


def _table4_block(groups: dict[str, list[Row]], augmented: bool) -> list[str]:
    seeds = {row["seed"] for group in groups.values() for row in group}
    lines = [
        "| network | parameters | test error, paper | test error, measured | training error | training loss | seeds |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, group in groups.items():
        finite = [row for row in group if row["diverged"] == "0"]
        paper = f"{TABLE4[name][augmented]:.2f}" if name in TABLE4 else ""
        columns = [("test_error", 2), ("fit_error", 2), ("fit_loss", 3)]
        cells = [mean_and_spread(numbers(finite, c), d) if finite else "" for c, d in columns]
        diverged = [row["seed"] for row in group if row["diverged"] == "1"]
        note = name_seeds(group, seeds) + (f" (diverged: {', '.join(diverged)})" if diverged else "")
        start = f"| {NETWORKS[name].label} | {int(group[0]['parameters']):,} | {paper} | "
        lines.append(start + " | ".join([*cells, note]) + " |")
    return lines


def _table4_claims(groups: dict[str, list[Row]], setting: str, augmented: bool) -> list[Claim]:
    claims = []
    for column, quantity in (("test_error", "test error"), ("fit_loss", "training loss")):
        for ours, peer in _pairs():
            values = [numbers(groups.get(name, []), column) for name in (ours, peer)]
            if not all(values):
                continue
            paper = None
            if column == "test_error" and ours in TABLE4 and peer in TABLE4:
                paper = TABLE4[ours][augmented] - TABLE4[peer][augmented]
            labels = NETWORKS[ours].label, NETWORKS[peer].label
            divergence = any(row["diverged"] == "1" for name in (ours, peer) for row in groups[name])
            restricted = setting + ", without runs that diverged" * divergence
            claims.append(Claim(restricted, *labels, quantity, compare(*values), paper))
    return claims
