"""The sentences of the reports."""

from __future__ import annotations

import json
from html import escape

LIMIT_TEXT = 300

NO_EPOCH = "The training has not finished its first epoch."
NOT_FINITE = "A loss was not finite in some epochs: its curve has gaps there."
CHANGED_GENOTYPE = "genotype.json is not the genotype of the last epoch: one of the files was changed."
OTHER_GENOTYPE = "The retraining was of another genotype than genotype.json."
RETRAIN_LATER = "<p>When the search is finished:</p>"
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


def explain_alpha(has_beta: bool) -> str:
    """Explain the table of α."""
    return (
        "softmax(α) (25) in percent, a row for each edge; framed: what the genotype has. "
        "Entropy: −Σ p ln p of the row. Margin: top-1 minus top-2 of what a genotype can have, which is all but none. "
        + ("β is the edge's softmax(β) (29)." if has_beta else "This space has no β.")
    )


def skips(cells: list[str]) -> str:
    """Describe the number of skip connections in the first and the last epoch."""
    return f"skip_connect and neg_skip_connect, first and last epoch: {'; '.join(cells)}."


def normalisation(mean: str, std: str) -> str:
    """Explain the normalisation of the images of a retrained network."""
    return f"<p>Its images, from 0 to 1, are normalised by the mean {mean} and the deviation {std}.</p>"
