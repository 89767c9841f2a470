"""Table 4 on the results page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from claims import (
    Claim,
    Row,
    Section,
    Table,
    by_seed,
    grouped,
    name_images,
    name_seeds,
    numbers,
)
from comparison import compare, mean_and_spread, pool
from figures import draw_dots
from networks import NETWORKS
from paper_figures import TABLE4
from rows import read_rows

__all__ = ["table4"]


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
DEFAULTS = [(f"{hb}-auto", f"{resnet}-zero-init") for hb, resnet in HEAVY_BALL]
NESTEROV = [(f"agdnet{layers}", f"densenet{layers}") for layers in (22, 40, 52)]


def _pairs() -> list[tuple[str, str]]:
    """Pair each family with its special case, then with the controls."""
    pairs = []
    for (hb, resnet), small in zip(HEAVY_BALL, SMALL_INIT):
        pairs += [(hb, resnet), (f"{resnet}-no-last-relu", resnet), (hb, f"{resnet}-no-last-relu")]
        pairs += [*zip(small, (hb, resnet)), small]
        pairs += [(f"{hb}-auto", hb), (f"{hb}-auto", f"{resnet}-zero-init"), (f"{resnet}-zero-init", resnet)]
        pairs += [(f"{hb}-auto", f"{resnet}-no-last-relu-auto")]
        pairs += [(f"{hb}-uniform-init", f"{resnet}-uniform-init"), (hb, f"{resnet}-preact")]
        pairs += [(f"{hb}-post-act", hb), (f"{hb}-learn-beta", hb)]
    for agd, dense in NESTEROV:
        pairs += [(agd, dense), (agd, f"{agd}-alpha-1"), (agd, f"{agd}-beta-0")]
    return pairs


def table4(folder: Path) -> Section:
    """Return the section about Table 4, by recipe."""
    content: list[str | Table] = []
    panels = {}
    for recipe, groups in _blocks(folder):
        content += [f"### {_title(recipe)}", "", *_table4_block(groups, recipe["augmented"] == "1"), ""]
        content += [Table("difference of test error, points", tuple(_claims(groups, recipe, _pairs()).values())), ""]
        errors = {NETWORKS[name].label: numbers(group, "test_error") for name, group in groups.items()}
        panels[_title(recipe)] = {label: values for label, values in errors.items() if values}
    panels = {title: lines for title, lines in panels.items() if lines}
    figure = {"table4": ("Test errors of all seeds", draw_dots(panels, "test error (%)"))} if panels else {}
    return Section(["## Table 4: CIFAR-10", "", ABOUT, "", *content] if content else [], [], figure)


def _blocks(folder: Path) -> Iterator[tuple[Row, dict[str, list[Row]]]]:
    """Yield the first row of each recipe, and its rows by network."""
    for block in grouped(read_rows(folder / "table4.csv"), RECIPE).values():
        groups = {network: [row for row in block if row["network"] == network] for network in NETWORKS}
        yield block[0], {network: group for network, group in groups.items() if group}


def _title(recipe: Row) -> str:
    augmentation = f"{'with' if recipe['augmented'] == '1' else 'without'} augmentation"
    title = f"{name_images(recipe['train_images'])}, {recipe['epochs']} epochs, {augmentation}"
    return title + f", {name_images(recipe['test_images'], 'test ')}" * (recipe["test_images"] != "all")


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


def _claims(
    groups: dict[str, list[Row]], recipe: Row, pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Claim]:
    """Return the comparisons of pairs that have values."""
    claims, pooled = {}, pool(numbers(group, "test_error") for group in groups.values())
    for ours, peer in pairs:
        values = [by_seed(groups.get(name, []), "test_error") for name in (ours, peer)]
        if all(values):
            paper = None
            if ours in TABLE4 and peer in TABLE4:
                augmented = recipe["augmented"] == "1"
                paper = TABLE4[ours][augmented] - TABLE4[peer][augmented]
            labels = NETWORKS[ours].label, NETWORKS[peer].label
            divergence = any(row["diverged"] == "1" for name in (ours, peer) for row in groups[name])
            setting = _title(recipe) + ", without runs that diverged" * divergence
            claims[ours, peer] = Claim(setting, *labels, "test error", compare(*values, pooled), paper)
    return claims
