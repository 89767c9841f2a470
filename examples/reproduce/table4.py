"""Table 4 on CIFAR-10: test error and training loss.

    python examples/reproduce/table4.py --networks resnet20 hbnet20 --epochs 20 --train-images 20000
    python examples/reproduce/table4.py --networks resnet56 hbnet56 --full          # the paper's recipe

Each run adds a row to ``table4.csv``, and learned coefficients to ``coefficients.csv``. An interrupted run resumes
after its last finished epoch, and a run that has a row is skipped. Several processes may run at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from commands import Place, at_least, command_line, common_arguments, place_of, run_missing
from networks import NETWORKS, count_network, learned_coefficients
from rows import add_rows, find, provenance
from training import Recipe, train

from nni_spaces import quiet_hosts
from nni_spaces.runs.data import read_images

MEASURED = ("train_loss", "fit_loss", "fit_error", "test_loss", "test_error", "seconds")


def run(recipe: Recipe, place: Place) -> str:
    """Train, add the row, and return a message."""

    def show(entry: dict[str, Any]) -> None:
        print(f"  {name(recipe)} epoch {entry['epoch'] + 1}: loss {entry['train_loss']:.4f}", flush=True)

    try:
        measured, state = train(recipe, place.out / name(recipe), place.accelerator, show)
    except FloatingPointError:  # divergence is a result, too
        measured, state = {}, {}
    key = identity(recipe)
    coefficients = [{**key, **row} for row in learned_coefficients(state)]
    if coefficients:
        add_rows(place.results.with_name("coefficients.csv"), coefficients, list(key))
    add_rows(place.results, [make_row(recipe, measured, place)], list(key))
    return f"test error {measured['test_error']:.2f} %" if measured else "diverged"


def make_row(recipe: Recipe, measured: dict[str, Any], place: Place) -> dict[str, Any]:
    """Return the row of a run; a divergent one has no measurements."""
    network, classes = NETWORKS[recipe.network], read_images(recipe.data, split="test").classes
    parameters, macs = count_network(network, classes)
    options = dict(networks=recipe.network, seeds=recipe.seed, augmentation="with" if recipe.augment else "without")
    if (recipe.epochs, recipe.train_images, recipe.test_images) == (Recipe.epochs, None, None):
        options["full"] = True
    else:
        options.update(epochs=recipe.epochs, train_images=recipe.train_images, test_images=recipe.test_images)
    return {
        **identity(recipe),
        **place.shared,
        "model": network.model,
        "options": json.dumps(network.kwargs),
        **{field: getattr(recipe, field) for field in ("batch_size", "lr", "weight_decay")},
        "classes": classes,
        "parameters": parameters,
        "macs": macs,
        **{field: measured.get(field, "") for field in MEASURED},
        "diverged": int(not measured),
        **provenance(command_line("table4", recipe.data, **options), place.device),
    }


def identity(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that identify a run."""
    return dict(
        network=recipe.network,
        augmented=int(recipe.augment),
        seed=recipe.seed,
        epochs=recipe.epochs,
        train_images=recipe.train_images or "all",
        test_images=recipe.test_images or "all",
    )


def name(recipe: Recipe) -> str:
    """Return the name of a run's folder."""
    images = recipe.train_images or "all"
    augmented = "augmented" if recipe.augment else "plain"
    return f"{recipe.network}-{augmented}-{images}x{recipe.epochs}-seed{recipe.seed}"


def parse_args(arguments: Sequence[str] | None) -> tuple[list[Recipe], Place]:
    """Return the recipes, ordered by seed, and the destination."""
    parser = common_arguments(__doc__.splitlines()[0], "table4", seeds=range(3))
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, required=True, metavar="NETWORK", help="networks to train"
    )
    parser.add_argument("--augmentation", nargs="+", choices=("with", "without"), default=["with"])
    parser.add_argument("--epochs", type=at_least(1), help="length of the schedule; 300 in the paper")
    parser.add_argument("--train-images", type=at_least(64), help="number of training images; all by default")
    parser.add_argument("--test-images", type=at_least(64), help="number of test images; all by default")
    parser.add_argument("--full", action="store_true", help="the paper's recipe (§8.1): 300 epochs of all images")
    args = parser.parse_args(arguments)
    if args.full and (args.epochs or args.train_images or args.test_images):
        parser.error("argument --full: is the paper's recipe, must be without --epochs, --train-images, --test-images")
    if not args.full and args.epochs is None:
        parser.error("argument --epochs: must be given, or --full for the paper's 300")
    shortened = {} if args.full else {n: getattr(args, n) for n in ("epochs", "train_images", "test_images")}
    recipes = [
        Recipe(network, data=args.data, augment=augmentation == "with", seed=seed, **shortened)
        for seed in args.seeds
        for augmentation in args.augmentation
        for network in args.networks
    ]
    return recipes, place_of(parser, args, "table4")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every recipe that has no row yet."""
    quiet_hosts()
    recipes, place = parse_args(arguments)
    run_missing(
        recipes,
        name,
        lambda recipe: find(place.results, identity(recipe)) is not None,
        lambda recipe: run(recipe, place),
    )


if __name__ == "__main__":
    main()
