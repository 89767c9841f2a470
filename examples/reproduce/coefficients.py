"""Learned coefficients: where training takes β1, β2 and α, layer by layer, and what learning them changes.

    python examples/reproduce/coefficients.py

reads ``coefficients.csv``, which ``table4.py`` writes, prints means, and draws ``coefficients.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from networks import NETWORKS
from rows import RESULTS, read_rows

from optinspired_plugins.plotting import BLUE, GREEN, RED

__all__ = ["by_place", "coefficients_of", "draw", "summary"]

COLOURS = {"beta1": BLUE, "beta2": RED, "alpha": GREEN}
NAMES = {"beta1": "β1", "beta2": "β2", "alpha": "α"}
STARTS = {"beta1": 1.0, "beta2": -1.0, "alpha": 1.0}
Rows = Sequence[dict[str, str]]


def coefficients_of(rows: Rows) -> dict[str, Rows]:
    """Return the rows of each network that has any, in the order of the networks."""
    return {network: found for network in NETWORKS if (found := [row for row in rows if row["network"] == network])}


def by_place(rows: Iterable[dict[str, str]]) -> dict[str, list[list[float]]]:
    """Return for each coefficient the values at each place in depth: over seeds for β, over sources too for α."""
    places: dict[str, dict[tuple[str, ...], list[float]]] = {}
    for row in rows:
        place = (row["layer"],) if row["coefficient"] == "alpha" else (row["layer"], row["index"])
        places.setdefault(row["coefficient"], {}).setdefault(place, []).append(float(row["value"]))
    return {coefficient: list(values.values()) for coefficient, values in places.items()}


def summary(rows: Rows) -> list[str]:
    """Return a Markdown table: how far each coefficient went."""
    lines = [
        "| network | coefficient | starts at | mean, measured | least … greatest | runs |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for network, found in coefficients_of(rows).items():
        runs = len({tuple(row[name] for name in ("augmented", "seed", "epochs", "train_images")) for row in found})
        for coefficient, places in by_place(found).items():
            values = [value for place in places for value in place]
            spread = f"{min(values):.2f} … {max(values):.2f}"
            start = f"{STARTS[coefficient]:g}"
            what = f"{NETWORKS[network].label} | {NAMES[coefficient]} | {start}"
            lines.append(f"| {what} | {mean(values):.3f} | {spread} | {runs} |")
    return lines


def draw(rows: Rows) -> Figure:
    """Draw mean and range of the coefficients of each network against depth; dotted is where they start."""
    networks = coefficients_of(rows)
    figure = Figure(figsize=(9, 1 + 2.4 * len(networks)), layout="constrained")
    for axes, (network, found) in zip(figure.subplots(len(networks), squeeze=False)[:, 0], networks.items()):
        for coefficient, places in by_place(found).items():
            x = range(1, len(places) + 1)
            low, middle, high = ([f(values) for values in places] for f in (min, mean, max))
            axes.fill_between(x, low, high, color=COLOURS[coefficient], alpha=0.2, linewidth=0)
            axes.plot(x, middle, color=COLOURS[coefficient], marker="o", markersize=3, label=NAMES[coefficient])
            axes.axhline(STARTS[coefficient], color=COLOURS[coefficient], linestyle=":", linewidth=1)
        axes.set(title=NETWORKS[network].label, xlabel="place in depth", ylabel="value")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Print and draw what there is."""
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
