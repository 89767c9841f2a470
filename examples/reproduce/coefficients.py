"""Learned coefficients β1, β2 and α by layer.

    python examples/reproduce/coefficients.py

The command reads ``coefficients.csv``, which ``table4.py`` writes, prints means, and draws ``coefficients.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from claims import grouped, name_recipe
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from networks import NETWORKS
from rows import RESULTS, read_rows

from optinspired_plugins.plotting.connections import BLUE, RED

__all__ = ["by_place", "coefficients_of", "draw", "summary"]

COLOURS = {"beta1": BLUE, "beta2": RED}
NAMES = {"beta1": "β1", "beta2": "β2", "alpha": "α"}
STARTS = {"beta1": 1.0, "beta2": -1.0, "alpha": 1.0}
RECIPE = ("network", "train_images", "test_images", "epochs", "augmented")
Rows = Sequence[dict[str, str]]
Places = dict[tuple[str, int], list[float]]  # layer and index -> values over seeds


def coefficients_of(rows: Rows) -> dict[str, Rows]:
    """Group the rows by label, in the order of :data:`NETWORKS`."""
    groups = {}
    for (network, *_), group in grouped(rows, RECIPE).items():
        groups[network, f"{NETWORKS[network].label}: {name_recipe(group[0])}"] = group
    return {label: groups[network, label] for name in NETWORKS for network, label in groups if network == name}


def by_place(rows: Iterable[dict[str, str]]) -> dict[str, Places]:
    """Group the values of each coefficient by layer and index, in the order of depth."""
    places: dict[str, Places] = {}
    for row in rows:
        place = row["layer"], int(row["index"])
        places.setdefault(row["coefficient"], {}).setdefault(place, []).append(float(row["value"]))
    return places


def summary(rows: Rows) -> list[str]:
    """Return a Markdown table of the learned values."""
    lines = [
        "| network | coefficient | starts at | mean, measured | least … greatest | runs |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for label, group in coefficients_of(rows).items():
        runs = len({row["seed"] for row in group})
        for coefficient, places in by_place(group).items():
            start = f"{STARTS[coefficient]:g}"
            for name, values in _parts(coefficient, places).items():
                spread = f"{min(values):.2f} … {max(values):.2f}"
                lines.append(f"| {label} | {name} | {start} | {mean(values):.3f} | {spread} | {runs} |")
    return lines


def _parts(coefficient: str, places: Places) -> dict[str, list[float]]:
    """Group β by stage and α by distance to its source."""
    latest = {layer: max(j for other, j in places if other == layer) for layer, _ in places}
    parts: dict[str, list[float]] = {}
    for (layer, j), values in places.items():
        if coefficient != "alpha":
            place = f"stage {layer.removeprefix('layer')}"
        else:
            place = "the block's input" if j == 0 else "the layer before" if j == latest[layer] else "other layers"
        parts.setdefault(f"{NAMES[coefficient]} of {place}", []).extend(values)
    return parts


def draw(rows: Rows) -> Figure:
    """Draw β by depth, one dot per seed, and α as one map per block."""
    networks = coefficients_of(rows)
    figure = Figure(figsize=(9, 3 * len(networks)), layout="constrained")
    for part, (label, group) in zip(figure.subfigures(len(networks), squeeze=False)[:, 0], networks.items()):
        part.suptitle(label)
        places = by_place(group)
        if "alpha" in places:
            _draw_maps(part, places["alpha"])
        else:
            _draw_depth(part, places)
    return figure


def _draw_depth(figure: SubFigure, coefficients: dict[str, Places]) -> None:
    axes = figure.subplots()
    for coefficient, places in coefficients.items():
        colour = COLOURS[coefficient]
        axes.plot(range(1, len(places) + 1), [mean(v) for v in places.values()], color=colour, label=NAMES[coefficient])
        for x, values in enumerate(places.values(), start=1):
            axes.plot([x] * len(values), values, "o", color=colour, alpha=0.5, markersize=4)
        axes.axhline(STARTS[coefficient], color=colour, linestyle=":", linewidth=1)
    axes.set(xlabel="step, from the first stage to the last; dotted: initial value", ylabel="value")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_maps(figure: SubFigure, places: Places) -> None:
    blocks: dict[str, dict[tuple[str, int], float]] = {}
    for (layer, j), values in places.items():
        blocks.setdefault(layer.partition(".denselayer")[0], {})[layer, j] = mean(values)
    furthest = max(abs(value - 1) for block in blocks.values() for value in block.values())
    scale = TwoSlopeNorm(STARTS["alpha"], 1 - furthest, 1 + furthest)
    panels = figure.subplots(1, len(blocks), squeeze=False)[0]
    for number, (axes, block) in enumerate(zip(panels, blocks.values()), start=1):
        layers = list(dict.fromkeys(layer for layer, _ in block))
        grid = np.full((len(layers), len(layers)), np.nan)
        for (layer, j), value in block.items():
            grid[layers.index(layer), j] = value
        image = axes.imshow(grid, cmap="RdBu_r", norm=scale)
        axes.set(title=f"block {number}", xlabel="source j", xticks=range(len(layers)))
        axes.set_yticks(range(len(layers)), [str(k + 1) for k in range(len(layers))])
    panels[0].set_ylabel("layer k + 1")
    figure.colorbar(image, ax=panels, label="α of layer and source, mean of seeds")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with coefficients.csv")
    args = parser.parse_args(arguments)
    rows = read_rows(args.results / "coefficients.csv")
    if not rows:
        parser.error(
            f"argument --results: {args.results} has no coefficients.csv, run table4.py with learned coefficients"
        )
    draw(rows).savefig(args.results / "coefficients.png", dpi=110)
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main()
