"""Stability (§8.2) on the results page."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from claims import Claim, Row, Section, Table, by_seed, grouped, name_seeds, numbers
from comparison import compare, compare_counts, mean_and_spread, pool
from figures import draw_stability
from networks import NETWORKS
from rows import read_rows
from stability import EXPLODED

from timm_models import NETWORK_ALGORITHMS

__all__ = ["stability"]

# One panel per initialisation of γ.
PANELS = {
    "γ from 1": ("resnet110", "hbnet110"),
    "γ from U(0, 1)": ("resnet110-uniform-init", "hbnet110-uniform-init"),
    "γ from 1/√n": ("resnet110-small-init", "hbnet110-small-init"),
    "defaults: γ from 0, and by the rule": ("resnet110-zero-init", "hbnet110-auto"),
}
# Pairs to compare. In the paper, HBNet-110 converges at the first attempt and ResNet-110 does not.
LOSSES = [
    ("hbnet110", "resnet110"),
    ("resnet110-no-last-relu", "resnet110"),
    ("hbnet110-post-act", "resnet110"),
    ("hbnet110-learn-beta", "resnet110"),
    ("hbnet110-small-init", "resnet110"),
    ("resnet110-small-init", "resnet110"),
    ("hbnet110-small-init", "resnet110-small-init"),
    ("hbnet110-uniform-init", "resnet110-uniform-init"),
    ("hbnet110-auto", "resnet110"),
    ("hbnet110-auto", "resnet110-zero-init"),
]
COUNTS = [
    ("hbnet110", "resnet110"),
    ("hbnet110-uniform-init", "resnet110-uniform-init"),
    ("resnet110-no-last-relu", "resnet110"),
    ("hbnet110-post-act", "hbnet110"),
    ("hbnet110-learn-beta", "hbnet110"),
    ("hbnet110-small-init", "hbnet110"),
    ("hbnet110-uniform-init", "hbnet110"),
    ("hbnet110-auto", "hbnet110"),
    ("hbnet152-narrow-auto", "hbnet152-narrow"),
]
# Runs of this length make the map of learning rates, and the table of algorithms.
MAP_STEPS = "100"


def stability(folder: Path) -> Section:
    """Return the section, by number of steps and learning rate."""
    rows, curves = read_rows(folder / "stability.csv"), read_rows(folder / "stability_curves.csv")
    if not rows:
        return Section([], [], {})
    lines: list[str | Table] = [
        "## Stability",
        "",
        "In §8.2, the training of ResNet-110 at learning rate 0.1 without a warm-up was repeated until it converged; "
        "HBNet-110 converged at the first attempt. Here, only the first steps were run, with batches of 64 augmented "
        "images. A run diverges if loss or gradient is not finite, or if the mean loss of the last tenth of the steps "
        f"exceeds {EXPLODED} times the loss of the first step. The last loss is this mean for runs that do not "
        "diverge; guessing has a loss of 2.303. γ is the weight of the last normalisation of each transform and "
        "starts at 1 unless the name says otherwise (n = 18). With γ from U(0, 1), the weight of every normalisation "
        "is drawn, which was torch's default until 1.1.",
        "",
    ]
    counts = []
    for (steps, lr), block in grouped((row for row in rows if row["steps"] != MAP_STEPS), ("steps", "lr")).items():
        groups = {name: group for name in NETWORKS if (group := [row for row in block if row["network"] == name])}
        setting = f"{steps} steps at {lr}"
        losses = _loss_claims(groups, setting)
        lines += [*_block(groups, setting), ""]
        lines += [Table("difference of last loss", losses), ""] if losses else []
        counts += _count_claims(groups, setting)
    short = [row for row in rows if row["steps"] == MAP_STEPS]
    lines += _map([row for row in short if "optnet" not in row["network"]]) + _algorithms(short)
    first = (rows[0]["steps"], rows[0]["lr"])
    budget = [row for row in curves if (row["steps"], row["lr"]) == first]
    panels = {title: [row for row in budget if row["network"] in names] for title, names in PANELS.items()}
    panels = {title: panel for title, panel in panels.items() if panel}
    if not panels:
        return Section(lines, counts, {})
    caption = f"Loss and gradient norm of {first[0]} steps at {first[1]}"
    return Section(lines, counts, {"stability": (caption, draw_stability(panels))})


def _block(groups: dict[str, list[Row]], setting: str) -> list[str]:
    seeds = {row["seed"] for group in groups.values() for row in group}
    lines = [
        f"| {setting}, measured | runs | diverged | last loss | largest gradient norm | seeds |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, group in groups.items():
        last, norms = numbers(group, "last_loss"), numbers(group, "largest_grad_norm")
        diverged = str(sum(int(row["diverged"]) for row in group))
        loss = mean_and_spread(last) if last else ""
        largest = f"{max(norms):.3g}" if norms else ""
        cells = [NETWORKS[name].label, str(len(group)), diverged, loss, largest, name_seeds(group, seeds)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _algorithms(rows: list[Row]) -> list[str]:
    """Return the table of last losses by algorithm and reading of ∇f."""
    by_network = {row["network"]: row for row in rows if row["seed"] == "0"}
    lines = [
        f"The last loss of OptNet-56, after {MAP_STEPS} steps at 0.1 (seed 0), by algorithm and reading of ∇f. With "
        '`reading="residual"` the network ends in a normalisation, which `final_norm=False` leaves out.',
        "",
        f"| {MAP_STEPS} steps, measured | fixed-point | residual | residual, without the final normalisation |",
        "|---|---:|---:|---:|",
    ]
    found = len(lines)
    for name in NETWORK_ALGORITHMS:
        group = [by_network.get(f"optnet56-{name}{form}") for form in ("", "-residual", "-residual-plain")]
        if any(group):
            lines.append(f"| `{name}` | " + " | ".join(_map_entry([row]) if row else "" for row in group) + " |")
    return [*lines, ""] if len(lines) > found else []


def _map(rows: list[Row]) -> list[str]:
    """Return the table of last losses by network and learning rate."""
    if not rows:
        return []
    rates = sorted({row["lr"] for row in rows}, key=float)
    lines = [
        f"The last loss by learning rate, after {MAP_STEPS} steps: the mean over seeds, or the runs that diverge.",
        "",
        f"| {MAP_STEPS} steps, measured | " + " | ".join(f"at {rate}" for rate in rates) + " | seeds |",
        "|---|" + "---:|" * len(rates) + "---|",
    ]
    for name in NETWORKS:
        group = [row for row in rows if row["network"] == name]
        if group:
            cells = [_map_entry([row for row in group if row["lr"] == rate]) for rate in rates]
            lines.append("| " + " | ".join([NETWORKS[name].label, *cells, name_seeds(group, [])]) + " |")
    return [*lines, ""]


def _map_entry(rows: list[Row]) -> str:
    diverged = sum(row["diverged"] == "1" for row in rows)
    if diverged:
        return "diverges" if diverged == len(rows) else f"{diverged} of {len(rows)} diverge"
    return f"{mean(numbers(rows, 'last_loss')):.2f}" if rows else ""


def _loss_claims(groups: dict[str, list[Row]], setting: str) -> tuple[Claim, ...]:
    claims, pooled = [], pool(numbers(group, "last_loss") for group in groups.values())
    for ours, peer in LOSSES:
        last = [by_seed(groups.get(name, []), "last_loss") for name in (ours, peer)]
        if all(last):
            divergence = any(row["diverged"] == "1" for name in (ours, peer) for row in groups[name])
            restricted = setting + ", without runs that diverged" * divergence
            labels = NETWORKS[ours].label, NETWORKS[peer].label
            claims.append(Claim(restricted, *labels, "last loss", compare(*last, pooled)))
    return tuple(claims)


def _count_claims(groups: dict[str, list[Row]], setting: str) -> list[Claim]:
    """Compare the numbers of runs that diverge; in the paper, only ResNet's do."""
    claims = []
    for ours, peer in COUNTS:
        if ours in groups and peer in groups:
            diverged = [[row["diverged"] == "1" for row in groups[name]] for name in (ours, peer)]
            if any(map(any, diverged)):
                paper = -1.0 if ours.startswith("hbnet") and peer.startswith("resnet") else None
                labels = NETWORKS[ours].label, NETWORKS[peer].label
                claims.append(Claim(setting, *labels, "runs that diverge", compare_counts(*diverged), paper))
    return claims
