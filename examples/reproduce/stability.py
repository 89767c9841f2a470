"""Stability (§8.2): first steps of deep networks.

    python examples/reproduce/stability.py --networks resnet110 hbnet110 --steps 200 --seeds 0 1 2 3 4

The learning rate is 0.1, without a warm-up. Each run adds a row to ``stability.csv``, and loss and gradient norm per
step to ``stability_curves.csv``. It takes a few minutes, and an interrupted run restarts from its first step. A run
diverges if loss or gradient is not finite, or if the mean loss of the last tenth of its steps exceeds :data:`EXPLODED`
times its first loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from commands import Place, at_least, command_line, common_arguments, not_negative, place_of, run_missing
from networks import NETWORKS
from rows import add_rows, find, provenance
from training import Recipe, make_loaders, make_optimizer

from nni_spaces import quiet_hosts
from nni_spaces.runs.data import read_images
from optinspired_plugins.run_folder import lock_folder


class Step(NamedTuple):
    """Loss and gradient norm before the update of a step."""

    loss: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        """True if training can continue."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


# Ratio of last to first loss above which a finite run counts as divergent.
EXPLODED = 10


def first_steps(recipe: Recipe, steps: int, device: torch.device) -> tuple[list[Step], int]:
    """Return the steps, up to the first that is not finite, and the number of classes."""
    data = read_images(recipe.data, steps * recipe.batch_size)
    torch.manual_seed(recipe.seed)
    model = NETWORKS[recipe.network].build(data.classes).to(device, memory_format=torch.channels_last)
    optimizer, _ = make_optimizer(model, recipe)
    curve: list[Step] = []
    epoch = 0
    while len(curve) < steps:
        loader, _ = make_loaders(data, data, recipe)
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for images, labels in loader:
            images = images.to(device, memory_format=torch.channels_last)
            loss = F.cross_entropy(model(images), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)  # no clipping: returns the norm
            curve.append(Step(loss.item(), norm.item()))
            if len(curve) == steps or not curve[-1].is_finite:
                return curve, data.classes
            optimizer.step()
        epoch += 1
    return curve, data.classes


def summarise(curve: Sequence[Step], steps: int) -> dict[str, Any]:
    """Return the measurements of a run for its row."""
    last = curve[-max(steps // 10, 1) :]
    final = mean(step.loss for step in last)
    diverged = not curve[-1].is_finite or final > EXPLODED * curve[0].loss
    finite = [step for step in curve if step.is_finite]
    return dict(
        steps_made=len(curve),
        first_loss=f"{curve[0].loss:.4f}",
        largest_loss=f"{max(step.loss for step in finite):.4f}" if finite else "",
        last_loss="" if diverged else f"{final:.4f}",
        first_grad_norm=f"{curve[0].grad_norm:.4g}",
        largest_grad_norm=f"{max(step.grad_norm for step in finite):.4g}" if finite else "",
        diverged=int(diverged),
    )


def run(recipe: Recipe, steps: int, place: Place) -> str:
    """Run the steps, add curve and row, and return a message."""
    key = identity(recipe, steps)
    with lock_folder(place.out / "-".join(map(str, key.values()))):
        start = time.perf_counter()
        curve, classes = first_steps(recipe, steps, place.device)
        seconds = round(time.perf_counter() - start, 1)
        points = [
            {**key, "step": i, "loss": f"{s.loss:.5g}", "grad_norm": f"{s.grad_norm:.5g}"} for i, s in enumerate(curve)
        ]
        add_rows(place.results.with_name(f"{place.results.stem}_curves.csv"), points, list(key))
        summary = summarise(curve, steps)
        options = dict(networks=recipe.network, seeds=recipe.seed, steps=steps, lr=recipe.lr)
        origin = provenance(command_line("stability", recipe.data, **options), place.device)
        settings = dict(place.shared, batch_size=recipe.batch_size, classes=classes)
        add_rows(place.results, [{**key, **settings, **summary, "seconds": seconds, **origin}], list(key))
    return f"diverged after {len(curve)} steps" if summary["diverged"] else f"last loss {summary['last_loss']}"


def identity(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Return the fields that identify a run."""
    return dict(network=recipe.network, seed=recipe.seed, steps=steps, lr=recipe.lr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything that has no row yet."""
    parser = common_arguments(__doc__.splitlines()[0], "stability", seeds=range(5))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, metavar="NETWORK", default=["resnet110", "hbnet110"])
    parser.add_argument("--steps", type=at_least(2), default=200, help="steps of 64 images")
    parser.add_argument("--lr", type=not_negative, default=Recipe.lr, help="learning rate")
    args = parser.parse_args(arguments)
    quiet_hosts()
    place = place_of(parser, args, "stability")
    run_missing(
        [Recipe(network, args.data, seed=seed, lr=args.lr) for seed in args.seeds for network in args.networks],
        lambda recipe: f"{recipe.network}, seed {recipe.seed}",
        lambda recipe: find(place.results, identity(recipe, args.steps)) is not None,
        lambda recipe: run(recipe, args.steps, place),
    )


if __name__ == "__main__":
    main()
