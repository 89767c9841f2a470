"""Stability (§8.2) on the results page: how the first steps of deep networks went."""

from __future__ import annotations

from pathlib import Path

from claims import Claim, Row, Section, claims_table, grouped, name_seeds, numbers
from comparison import compare, compare_counts, mean_and_spread
from figures import draw_stability
from networks import NETWORKS
from rows import read_rows
from stability import EXPLODED

__all__ = ["stability"]

# A panel each start of γ.
DRAWN = {
    "γ from 1": ("resnet110", "hbnet110"),
    "γ from U(0, 1)": ("resnet110-uniform-init", "hbnet110-uniform-init"),
    "γ from 1/√n": ("resnet110-small-init", "hbnet110-small-init"),
}
# What is compared. The paper has HBNet-110 converge at once, and ResNet-110 not.
LOSSES = [
    ("hbnet110", "resnet110"),
    ("resnet110-no-last-relu", "resnet110"),
    ("hbnet110-post-act", "resnet110"),
    ("hbnet110-learn-beta", "resnet110"),
    ("hbnet110-small-init", "resnet110"),
    ("resnet110-small-init", "resnet110"),
    ("hbnet110-small-init", "resnet110-small-init"),
    ("hbnet110-uniform-init", "resnet110-uniform-init"),
]
COUNTS = [
    ("hbnet110", "resnet110"),
    ("hbnet110-uniform-init", "resnet110-uniform-init"),
    ("resnet110-no-last-relu", "resnet110"),
    ("hbnet110-post-act", "hbnet110"),
    ("hbnet110-learn-beta", "hbnet110"),
    ("hbnet110-small-init", "hbnet110"),
    ("hbnet110-uniform-init", "hbnet110"),
]


def stability(folder: Path) -> Section:
    """Return how the first steps went, a block for each number of steps and learning rate."""
    rows, curves = read_rows(folder / "stability.csv"), read_rows(folder / "stability_curves.csv")
    if not rows:
        return Section([], [], {})
    lines = [
        "## Stability",
        "",
        "§8.2: ResNet-110 at learning rate 0.1 without a warm-up was repeated until it converged, HBNet-110 converged "
        "at once. Here: the first steps of 64 images, augmented. Diverged: loss or gradient not finite, or the mean "
        f"loss of the last tenth of the steps over {EXPLODED} times the first step's. The last loss is that mean where "
        "a run has not diverged; guessing has 2.303. γ is the weight of each transform's last normalisation, which "
        "starts at 1 unless said, n = 18; γ from U(0, 1) is that of every normalisation, as torch's own was until 1.1.",
        "",
    ]
    claims = []
    for (steps, lr), block in grouped(rows, ("steps", "lr")).items():
        found = {name: group for name in NETWORKS if (group := [row for row in block if row["network"] == name])}
        place = f"{steps} steps at {lr}"
        losses = _loss_claims(found, place)
        lines += [*_block(found, place), ""]
        lines += [*claims_table(losses, "difference of last loss"), ""] if losses else []
        claims += [*_count_claims(found, place), *losses]
    first = (rows[0]["steps"], rows[0]["lr"])
    budget = [row for row in curves if (row["steps"], row["lr"]) == first]
    panels = {title: [row for row in budget if row["network"] in names] for title, names in DRAWN.items()}
    panels = {title: shown for title, shown in panels.items() if shown}
    if not panels:
        return Section(lines, claims, {})
    shown = f"Loss and gradient norm of {first[0]} steps at {first[1]}"
    return Section(lines, claims, {"stability": (shown, draw_stability(panels))})


def _block(found: dict[str, list[Row]], place: str) -> list[str]:
    every = {row["seed"] for group in found.values() for row in group}
    lines = [
        f"| {place}, measured | runs | diverged | last loss | largest gradient norm | seeds |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, group in found.items():
        last, norms = numbers(group, "last_loss"), numbers(group, "largest_grad_norm")
        diverged = str(sum(int(row["diverged"]) for row in group))
        loss = mean_and_spread(last) if last else ""
        largest = f"{max(norms):.3g}" if norms else ""
        cells = [NETWORKS[name].label, str(len(group)), diverged, loss, largest, name_seeds(group, every)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _loss_claims(found: dict[str, list[Row]], place: str) -> list[Claim]:
    claims = []
    for ours, peer in LOSSES:
        last = [numbers(found.get(name, []), "last_loss") for name in (ours, peer)]
        if all(last):
            lost = any(row["diverged"] == "1" for name in (ours, peer) for row in found[name])
            where = place + ", without runs that diverged" * lost
            labels = NETWORKS[ours].label, NETWORKS[peer].label
            claims.append(Claim(where, *labels, "last loss", compare(*last)))
    return claims


def _count_claims(found: dict[str, list[Row]], place: str) -> list[Claim]:
    """Compare how many runs diverged; the paper has ResNet's fail and not HBNet's."""
    claims = []
    for ours, peer in COUNTS:
        if ours in found and peer in found:
            diverged = [[row["diverged"] == "1" for row in found[name]] for name in (ours, peer)]
            if any(map(any, diverged)):
                printed = -1.0 if ours.startswith("hbnet") and peer.startswith("resnet") else None
                labels = NETWORKS[ours].label, NETWORKS[peer].label
                claims.append(Claim(place, *labels, "runs that diverge", compare_counts(*diverged), printed))
    return claims
