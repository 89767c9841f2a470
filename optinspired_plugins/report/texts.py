"""The sentences of the reports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape

from .findings import KINDS, TOLERANCE, Findings

LIMIT_TEXT = 300

NO_EPOCH = "The training has not finished its first epoch."
NOT_FINITE = "A loss was not finite in some epochs: its curve has gaps there."
CHANGED_GENOTYPE = "genotype.json is not the genotype of the last epoch: one of the files was changed."
OTHER_GENOTYPE = "The retraining was of another genotype than genotype.json."
RETRAIN_LATER = "<p>When the search is finished:</p>"
KIND_WORDS = {"found": "found", "open": "open", "tie": "tied", "start": "as at the start"}
KINDS_EXPLAINED = (
    "Found: α has decided the operation. Open: one more epoch could reverse it. Tied: the best two are equal. "
    "As at the start: the initialisation has decided it, and α has moved less than its lead."
)
KINDS_LEGEND = (
    f'<p class="legend kinds"><span class="found">found</span><span class="start">as at the start</span>'
    f'<span class="open">open or tied</span></p><p>{KINDS_EXPLAINED}</p>'
)
KINDS_IN_FILES = "solid: found; dashed: as at the start; dotted: open or tied"
OF_CIFAR = "cellnet_cifar with 20 cells of 36 channels and 10 classes (§9.3), without auxiliary head."
UNTRAINED = "<p>Its weights are not trained.</p>"
NO_RESULT = "No trial has a result."
FRONT = (
    '<p class="legend"><span class="sep">best at their size (Pareto front)</span>'
    '<span class="none">exceeded by a network of at most their size</span></p>'
)
FRONT_IN_FILES = "blue: no network of at most this size has a better result"
NOT_COMPARABLE = "They have other rules or numbers of nodes, so that an edge of one has no counterpart in another."
MEASURES = {"test": "on test images, after retraining", "supernet": "of the supernet, on α's half", "": ""}
SHARED_LEGEND = (
    f'<p class="legend kinds"><span class="shared">in all runs</span><span class="found">found</span>'
    f'<span class="start">as at the start</span><span class="open">open or tied</span></p><p>{KINDS_EXPLAINED} '
    "Where the kinds are not known, all lines are solid.</p>"
)
SHARED_IN_FILES = "thick: in all runs; solid: found; dashed: as at the start; dotted: open or tied"
EDGES = "<p>The operations of each node and their sources; ✓ marks edges that all runs have.</p>"
CERTAINTY = "<p>Edges that still are as at the start are apart: their entropy is that of the initialisation.</p>"
NO_ALPHA = "<p>The strategy has no α.</p>"
NO_SCRIPT = "<noscript><p class='note'>Without JavaScript the page shows the last epoch and no charts.</p></noscript>"
CELLS_LEGEND = (
    "<p>c<sub>k−2</sub> and c<sub>k−1</sub> are the inputs 0 and 1; a node is the sum of its edges; grey lines are "
    "concatenated.</p>"
)


def text(value: object) -> str:
    """Escape a value of a file for HTML, and cut a long one."""
    content = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return escape(content if len(content) <= LIMIT_TEXT else content[:LIMIT_TEXT] + "…")


def supernet_accuracy(epoch: int) -> str:
    """Explain the accuracy of a search without retraining."""
    return (
        f"Top-1 accuracy of the supernet on α's half of the training images, epoch {epoch}. "
        "α was fitted to them: this is no test result, and no network was retrained yet."
    )


def loss_of(network: str, epoch: int) -> str:
    """Explain the loss of a run without accuracy, for labels that are real numbers."""
    return f"Loss of {network}, epoch {epoch}, the last; labels are real numbers."


def retrained_accuracy(epoch: int, best: str, best_epoch: int) -> str:
    """Explain the accuracy of a retraining."""
    meaning = f"Top-1 accuracy of the retrained network on the test images, epoch {epoch}, the last."
    return meaning + f" Best: {best} in epoch {best_epoch}, which was chosen by looking at the test images."


def unfinished(done: int, planned: object, run: str) -> str:
    """Note that epochs are missing."""
    return f"Unfinished: {done} of {text(planned)} epochs of the {run}."


def of_stage(stage: str) -> str:
    """Note that a page shows one stage of a search in stages."""
    return f"A search in stages: α and curves are those of {stage}, the last that has finished an epoch."


def left_out(epochs: int) -> str:
    """Note that a page does not show all epochs."""
    return f"{epochs} epochs are left out, evenly, to keep the page small" if epochs else ""


def best_trial(index: int, trials: int) -> str:
    """Explain the result of the best trial."""
    return (
        f"Result of trial {index}, the best of {trials:,}. It was chosen by this number, which therefore is too good: "
        "the network has to be trained and tested once more."
    )


def agreement(runs: int, chance: float, as_at_the_start: int | None) -> str:
    """Explain the number of edges that several runs have in common."""
    text = f"Edges of both cells that all {runs} runs have; as many random cells share {chance:.2g} on average."
    if as_at_the_start:
        text += f" {as_at_the_start} of them are as at the start in every run: the initialisation has decided them."
    return text


def explain_front(count: int) -> str:
    """Explain the figure of parameters and results."""
    return f"<p>Of all networks, {count:,} have a better result than every network of at most their size.</p>"


def counted(kinds: Mapping[str, int]) -> str:
    """List the number of edges of each kind."""
    return ", ".join(f"{kinds[kind]} {KIND_WORDS[kind]}" for kind in KINDS if kinds[kind])


def moved(found: Findings) -> str:
    """Say how far α has moved and how far it could."""
    text = f"α has moved by at most {found.farthest:.2g} (median {found.median:.2g})"
    return text if found.reach is None else f"{text}; it could move by about {found.reach:.2g} in {found.steps:,} steps"


def reach(found: Findings) -> str:
    """Note how far α could move, beside the distance that it has."""
    text = f"largest; median {found.median:.2g}"
    return text if found.reach is None else f"{text}; about {found.reach:.2g} was possible"


def nothing_found(found: Findings) -> str:
    """Say that no edge of the cells is a finding; empty if there is one."""
    counts = found.counts()
    if counts["found"]:
        return ""
    if found.farthest <= TOLERANCE:
        return "α has not moved: this cell is the start of the search, not a result."
    return (
        f"This search has found nothing: of {counts.total()} edges, {counted(counts)}. "
        "The cell follows from the start of the search and from chance."
    )


def explain_alpha(has_beta: bool) -> str:
    """Explain the table of α."""
    return (
        "softmax(α) (25) in percent, a row for each edge; framed: what the genotype has. "
        "Entropy: −Σ p ln p of the row. Margin: top-1 minus top-2 of what a genotype can have, which is all but none. "
        "Moved: the largest distance of an α from its start. "
        + ("β is the edge's softmax(β) (29)." if has_beta else "This space has no β.")
    )


def skips(cells: list[str], are_kinds_known: bool) -> str:
    """Describe the number of skip connections in the first and the last epoch."""
    chosen = ", of the edges that are not as at the start" if are_kinds_known else ""
    return f"skip_connect and neg_skip_connect, first and last epoch{chosen}: {'; '.join(cells)}."


def normalisation(mean: str, std: str) -> str:
    """Explain the normalisation of the images of a retrained network."""
    return f"<p>Its images, from 0 to 1, are normalised by the mean {mean} and the deviation {std}.</p>"
