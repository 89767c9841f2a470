"""Gradients of the first step by depth.

    python examples/reproduce/gradients.py --networks hbnet110 hbnet110-auto --seeds 0 1 2

Each network and seed adds a row to ``gradients.csv``: the gradient norms of the first convolution of each transform,
for the cross entropy of the first 64 images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from commands import Place, command_line, common_arguments, place_of, run_missing
from networks import NETWORKS
from rows import add_rows, find, provenance
from training import Recipe

from nni_spaces import quiet_hosts
from nni_spaces.runs.data import read_images

# Not with γ = 0 in the last normalisation: a convolution before it has no gradient.
CHOICES = [
    name
    for depth in (20, 56, 110)
    for network in (f"resnet{depth}", f"resnet{depth}-no-last-relu", f"hbnet{depth}")
    for name in (network, f"{network}-auto")
    if name in NETWORKS
]


def gradient_norms(recipe: Recipe, device: torch.device) -> list[float]:
    """Return the norms from the first transform to the last."""
    images, labels, classes = read_images(recipe.data, recipe.batch_size)
    mean, std = (getattr(torch, name)(images / 255, dim=(0, 2, 3), keepdim=True) for name in ("mean", "std"))
    torch.manual_seed(recipe.seed)
    model = NETWORKS[recipe.network].build(classes).to(device)
    F.cross_entropy(model(((images / 255 - mean) / std).to(device)), labels.to(device)).backward()
    transforms = [transform for stage in model.stages() for transform in stage.transforms()]  # type: ignore[operator]
    return [transform.conv1.weight.grad.norm().item() for transform in transforms]


def run(recipe: Recipe, place: Place) -> str:
    """Add the row of a network and return a message."""
    norms = gradient_norms(recipe, place.device)
    command = command_line("gradients", recipe.data, networks=recipe.network, seeds=recipe.seed)
    row = {
        **identity(recipe),
        **place.shared,
        "batch_size": recipe.batch_size,
        "transforms": len(norms),
        "first_norm": f"{norms[0]:.4g}",
        "last_norm": f"{norms[-1]:.4g}",
        "largest_norm": f"{max(norms):.4g}",
        "smallest_norm": f"{min(norms):.4g}",
        **provenance(command, place.device),
    }
    add_rows(place.results, [row], list(identity(recipe)))
    return f"first to last {norms[0] / norms[-1]:.1f}, largest to smallest {max(norms) / min(norms):.1f}"


def identity(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that identify a row."""
    return dict(network=recipe.network, seed=recipe.seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything that has no row yet."""
    parser = common_arguments(__doc__.splitlines()[0], "gradients", seeds=range(3))
    parser.add_argument("--networks", nargs="+", choices=CHOICES, metavar="NETWORK", default=CHOICES)
    args = parser.parse_args(arguments)
    quiet_hosts()
    place = place_of(parser, args, "gradients")
    run_missing(
        [Recipe(network, args.data, seed=seed) for network in args.networks for seed in args.seeds],
        lambda recipe: f"{recipe.network}, seed {recipe.seed}",
        lambda recipe: find(place.results, identity(recipe)) is not None,
        lambda recipe: run(recipe, place),
    )


if __name__ == "__main__":
    main()
