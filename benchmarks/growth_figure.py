"""Figure of memory against depth and resolution, from ``growth.csv`` of speed_and_memory.py.

python benchmarks/growth_figure.py            # writes docs/figures/memory.png
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
Row = dict[str, str]
# Form of our network, or family of timm's -> label and colour.
HBNET = {
    "resnet": ("ResNet", "0.45"),
    "default": ("HBNet", "C0"),
    "checkpointing": ("HBNet, checkpointing", "C1"),
    "reversible": ("HBNet, reversible", "C2"),
}
AGDNET = {
    "densenet": ("DenseNet-121", "0.45"),
    "default": ("AGDNet-121", "C0"),
    "checkpointing": ("AGDNet-121, checkpointing", "C1"),
}


def points(rows: list[Row], x: Callable[[Row], float]) -> dict[str, list[tuple[float, float]]]:
    """Return (x, MiB) by form of ours, and by family of timm's."""
    memory: dict[str, dict[float, float]] = {}
    for row in rows:
        family = re.sub(r"\d+", "", row["peer"])
        memory.setdefault(row["form"], {})[x(row)] = float(row["ours"])
        memory.setdefault(family, {})[x(row)] = float(row["peers"])
    return {form: sorted(values.items()) for form, values in memory.items()}


def draw(axes: Any, rows: list[Row], x: Callable[[Row], float], labels: dict[str, tuple[str, str]], title: str) -> None:
    """Draw one panel."""
    curves = points(rows, x)
    for form, (label, colour) in labels.items():
        if len(curves.get(form, [])) > 1:
            axes.plot(*zip(*curves[form]), "o-", color=colour, label=label, markersize=4)
    axes.set_xlabel(title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def figure(rows: list[Row], target: Path) -> None:
    """Write the figure."""
    default = next(row for row in rows if row["model"] == "hbnet50")
    batch, size = default["batch"], default["size"]
    same = [row for row in rows if (row["batch"], row["size"]) == (batch, size) and row["model"].startswith("hbnet")]
    sides = [row for row in rows if row["batch"] == batch]
    fig, (depth, side, dense) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    draw(depth, same, lambda row: float(row["model"].removeprefix("hbnet")), HBNET, f"layers (batch {batch}, {size}²)")
    of_50 = [row for row in sides if row["model"] == "hbnet50"]
    draw(side, of_50, lambda row: float(row["size"]), HBNET, f"side of the image (50 layers, batch {batch})")
    of_121 = [row for row in sides if row["model"] == "agdnet121"]
    draw(dense, of_121, lambda row: float(row["size"]), AGDNET, f"side of the image (batch {batch})")
    depth.set_ylabel("peak of a training step, MiB")
    depth.legend(fontsize=8)
    dense.legend(fontsize=8)
    fig.savefig(target, dpi=120)
    plt.close(fig)


def main() -> None:
    """Write docs/figures/memory.png."""
    with open(ROOT / "benchmarks" / "results" / "growth.csv", newline="", encoding="utf-8") as file:
        figure(list(csv.DictReader(file)), ROOT / "docs" / "figures" / "memory.png")


if __name__ == "__main__":
    main()
