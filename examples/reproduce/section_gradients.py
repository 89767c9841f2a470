"""Gradients of the first step on the results page."""

from __future__ import annotations

from pathlib import Path

from claims import Section, grouped, name_seeds
from comparison import mean_and_spread
from networks import NETWORKS
from rows import read_rows

__all__ = ["gradients"]


def gradients(folder: Path) -> Section:
    """Return the section."""
    rows = read_rows(folder / "gradients.csv")
    if not rows:
        return Section([], [], {})
    lines = [
        "## Gradients at the start",
        "",
        f"Gradient norms of the first convolution of each transform in the first step, for {rows[0]['batch_size']} "
        "images (`python examples/reproduce/gradients.py`). 1 would be the same norm at every depth. With γ = 0, "
        "timm's start of ResNets, these gradients are 0.",
        "",
        "| network | transforms | first / last, measured | largest / smallest, measured | seeds |",
        "|---|---:|---:|---:|---|",
    ]
    for (network,), group in grouped(rows, ["network"]).items():
        ratios = []
        for numerator, denominator in (("first", "last"), ("largest", "smallest")):
            values = [float(row[f"{numerator}_norm"]) / float(row[f"{denominator}_norm"]) for row in group]
            ratios.append(mean_and_spread(values, digits=1))
        label, count = NETWORKS[network].label, group[0]["transforms"]
        lines.append(f"| {label} | {count} | {ratios[0]} | {ratios[1]} | {name_seeds(group, [])} |")
    return Section([*lines, ""], [], {})
