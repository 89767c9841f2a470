"""Stability (§8.2): the first steps of deep networks at learning rate 0.1 without warm-up, several seeds.

    python examples/reproduce/stability.py --networks resnet110 hbnet110 --steps 200 --seeds 0 1 2 3 4

A row of ``stability.csv`` each run, and a line a step of ``stability_curves.csv``: loss, and norm of the gradient. A
run takes a few minutes; one that is interrupted begins again. A run diverges where loss or gradient is not finite, or
the mean loss of its last tenth is many times its first.
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

from nni_spaces.runs.callback import locked
from nni_spaces.runs.data import read_images
from optinspired_plugins.cli import quiet_hosts


class Step(NamedTuple):
    """Loss and norm of the gradient, before the step is made."""

    loss: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether training can go on."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


# A run whose last loss is so many times its first has diverged, though it is finite.
EXPLODED = 10


def first_steps(recipe: Recipe, steps: int, device: torch.device) -> tuple[list[Step], int]:
    """Train for so many steps, fewer if one is not finite, and return them with the number of classes."""
    data = read_images(recipe.data, steps * recipe.batch_size)
    torch.manual_seed(recipe.seed)
    model = NETWORKS[recipe.network].build(data.classes).to(device, memory_format=torch.channels_last)
    optimizer, _ = make_optimizer(model, recipe)
    made: list[Step] = []
    epoch = 0
    while len(made) < steps:
        loader, _ = make_loaders(data, data, recipe)
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for images, labels in loader:
            images = images.to(device, memory_format=torch.channels_last)
            loss = F.cross_entropy(model(images), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)  # measures, clips nothing
            made.append(Step(loss.item(), norm.item()))
            if len(made) == steps or not made[-1].is_finite:
                return made, data.classes
            optimizer.step()
        epoch += 1
    return made, data.classes


def summarise(made: Sequence[Step], steps: int) -> dict[str, Any]:
    """Return what a row says of a run."""
    last = made[-max(steps // 10, 1) :]
    final = mean(step.loss for step in last)
    diverged = not made[-1].is_finite or final > EXPLODED * made[0].loss
    finite = [step for step in made if step.is_finite]
    return dict(
        steps_made=len(made),
        first_loss=f"{made[0].loss:.4f}",
        largest_loss=f"{max(step.loss for step in finite):.4f}" if finite else "",
        last_loss="" if diverged else f"{final:.4f}",
        first_grad_norm=f"{made[0].grad_norm:.4g}",
        largest_grad_norm=f"{max(step.grad_norm for step in finite):.4g}" if finite else "",
        diverged=int(diverged),
    )


def run(recipe: Recipe, steps: int, place: Place) -> str:
    """Make the steps, add curve and row, and say what came out."""
    key = identity(recipe, steps)
    with locked(place.out / "-".join(map(str, key.values()))):
        began = time.perf_counter()
        made, classes = first_steps(recipe, steps, place.device)
        seconds = round(time.perf_counter() - began, 1)
        curve = [
            {**key, "step": i, "loss": f"{s.loss:.5g}", "grad_norm": f"{s.grad_norm:.5g}"} for i, s in enumerate(made)
        ]
        add_rows(place.results.with_name(f"{place.results.stem}_curves.csv"), curve, list(key))
        found = summarise(made, steps)
        options = dict(networks=recipe.network, seeds=recipe.seed, steps=steps, lr=recipe.lr)
        made_by = provenance(command_line("stability", recipe.data, **options), place.device)
        settings = dict(place.shared, batch_size=recipe.batch_size, classes=classes)
        add_rows(place.results, [{**key, **settings, **found, "seconds": seconds, **made_by}], list(key))
    return f"diverged after {len(made)} steps" if found["diverged"] else f"last loss {found['last_loss']}"


def identity(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Return what tells a run from another."""
    return dict(network=recipe.network, seed=recipe.seed, steps=steps, lr=recipe.lr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs that have no row yet."""
    parser = common_arguments(__doc__.splitlines()[0], "stability", seeds=range(5))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, metavar="NETWORK", default=["resnet110", "hbnet110"])
    parser.add_argument("--steps", type=at_least(2), default=200, help="steps of 64 images")
    parser.add_argument("--lr", type=not_negative, default=Recipe.lr, help="learning rate, the paper's by default")
    args = parser.parse_args(arguments)
    with quiet_hosts():
        place = place_of(parser, args, "stability")
        run_missing(
            [Recipe(network, args.data, seed=seed, lr=args.lr) for seed in args.seeds for network in args.networks],
            lambda recipe: f"{recipe.network}, seed {recipe.seed}",
            lambda recipe: find(place.results, identity(recipe, args.steps)) is not None,
            lambda recipe: run(recipe, args.steps, place),
        )


if __name__ == "__main__":
    main()
