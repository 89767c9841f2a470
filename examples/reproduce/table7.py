"""Table 7, reduced: cells searched in the paper's spaces under one budget, retrained, and tested.

    python examples/reproduce/table7.py --methods darts hb hb-dagger agd --seeds 0 1

A row of ``table7.csv`` each method and seed. A random search trains ``--trials`` networks of the supernet's width and
depth, and keeps the best by images held out of training. What is interrupted goes on. A genotype that was found is a
file: ``timm.create_model("cellnet_cifar", genotype="runs/reproduce/results/genotypes/cifar10_agd_seed0.json")``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from commands import Place, at_least, command_line, common_arguments, not_negative, place_of, run_missing
from nni.nas.strategy import Random
from rows import add_rows, find, provenance

from nni_spaces.runs.callback import locked, read_history
from nni_spaces.runs.data import read_images
from nni_spaces.runs.retrain import RetrainSettings, retrain
from nni_spaces.runs.search import SearchSettings, search
from nni_spaces.trials.evaluator import TrialEvaluator
from nni_spaces.trials.run import read_trials, run_trials
from optinspired_plugins.cells.genotype import Genotype
from optinspired_plugins.cli import quiet_hosts


class Method(NamedTuple):
    """A space, the start of α, and the share of the epochs in which α stands still; a random search has no α."""

    space: str
    init: str | None
    warmup: float = 0.0


# §9.1 starts the plain HB space at random, §9.3 the others from zero.
METHODS = {
    "darts": Method("darts", "zero"),
    "hb": Method("hb", "random"),
    "hb-dagger": Method("hb", "heavy-ball"),
    "agd": Method("agd", "zero"),
    "random-darts": Method("darts", None),
    "random-hb": Method("hb", None),
    "random-agd": Method("agd", None),
    "darts-warm-up": Method("darts", "zero", warmup=0.5),
    "agd-warm-up": Method("agd", "zero", warmup=0.5),
}


@dataclass(frozen=True)
class Budget:
    """What every method gets. A search of α has few steps, so they are longer than the paper's 3e-4."""

    images: int = 4096
    search_epochs: int = 4
    alpha_lr: float = 0.02
    cells: int = 5
    channels: int = 8
    trials: int = 8
    trial_epochs: int = 2
    retrain_epochs: int = 8
    retrain_cells: int = 6
    width: int = 16


@dataclass(frozen=True)
class Experiment:
    """A method, a seed and the budget; where runs and genotypes go."""

    method: str
    seed: int
    budget: Budget
    data: str
    place: Place
    genotypes: Path

    @property
    def folder(self) -> Path:
        """The folder of the search; that of the retraining is inside."""
        return self.place.out / f"{self.method}-seed{self.seed}"

    @property
    def identity(self) -> dict[str, Any]:
        """What tells a run from another."""
        return dict(method=self.method, seed=self.seed)

    @property
    def settings(self) -> SearchSettings:
        """The search, or the supernet that a random search draws from."""
        method, b = METHODS[self.method], self.budget
        return SearchSettings(
            space=method.space,
            init=method.init or "zero",
            data=self.data,
            limit=b.images,
            epochs=b.search_epochs,
            channels=b.channels,
            cells=b.cells,
            alpha_lr=b.alpha_lr,
            warmup_epochs=int(method.warmup * b.search_epochs),
            seed=self.seed,
        )

    def search(self) -> tuple[Genotype, float]:
        """Return what the method finds, and the seconds that took."""
        settings, b = self.settings, self.budget
        if METHODS[self.method].init:
            show = partial(_show, self.method)
            found = search(settings, self.folder, accelerator=self.place.accelerator, on_epoch=show)
            return found, sum(entry["seconds"] for entry in read_history(self.folder))
        classes = read_images(self.data, b.images).classes
        evaluator = TrialEvaluator.from_images(
            self.data,
            limit=b.images,
            padding=settings.padding,
            seed=self.seed,
            epochs=b.trial_epochs,
            accelerator=self.place.accelerator,
        )
        model_space = settings.make_space(classes, in_chans=3)
        best, *_ = run_trials(model_space, Random(seed=self.seed), evaluator, self.folder, b.trials, self.seed)
        return best.genotype, sum(trial.seconds for trial in read_trials(self.folder)[1])

    def time_darts(self) -> float:
        """Return the seconds that the DARTS space's search takes here: rows come from machines of different speed.

        From the second epoch of a search with a quarter of the images.
        """
        images = max(self.budget.images // 4, 128)
        settings = replace(self.settings, space="darts", init="zero", limit=images, epochs=2, warmup_epochs=0)
        search(settings, self.folder / "darts", accelerator=self.place.accelerator)
        seconds = read_history(self.folder / "darts")[-1]["seconds"]
        return seconds * self.budget.search_epochs * self.budget.images / images

    def run(self) -> str:
        """Run, unless another process does."""
        with locked(self.folder / "run"):
            return self.search_and_retrain()

    def search_and_retrain(self) -> str:
        """Search, retrain, keep the genotype, add the row, and say what came out."""
        genotype, search_seconds = self.search()
        darts_seconds = search_seconds if self.method == "darts" else self.time_darts()
        b = self.budget
        settings = RetrainSettings(
            genotype=json.loads(genotype.to_json()),
            data=self.data,
            limit=b.images,
            epochs=b.retrain_epochs,
            batch_size=64,
            cells=b.retrain_cells,
            width=b.width,
            drop_path=0.0,  # of a training too short to overfit
            cutout=0,
            seed=self.seed,
        )
        again = self.folder / "retrain"
        test_top1 = retrain(settings, again, accelerator=self.place.accelerator, on_epoch=partial(_show, self.method))
        history, facts = read_history(again), json.loads((again / "run.json").read_text(encoding="utf-8"))
        self.genotypes.mkdir(parents=True, exist_ok=True)
        name = f"cifar10_{self.method.replace('-', '_')}_seed{self.seed}"
        genotype.save(self.genotypes / f"{name}.json")
        options = dict(methods=self.method, seeds=self.seed, **asdict(b))
        row = {
            **self.identity,
            **self.place.shared,
            "test_images": len(read_images(self.data, b.images, "test").labels),
            "genotype": name,
            "parameters": facts["parameters"],
            "macs": facts["macs"],
            "train_loss": history[-1]["train_loss"],
            "test_error": round(100 - test_top1, 4),
            "search_seconds": round(search_seconds, 1),
            "darts_seconds": round(darts_seconds, 1),
            "seconds": round(search_seconds + sum(entry["seconds"] for entry in history), 1),
            **provenance(command_line("table7", self.data, **options), self.place.device),
        }
        add_rows(self.place.results, [row], list(self.identity))
        return f"test error {row['test_error']:.2f} %"


def _show(method: str, entry: dict[str, Any]) -> None:
    print(f"  {method} epoch {entry['epoch'] + 1}: loss {entry['train_loss']:.4f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what has no row yet."""
    parser = common_arguments(__doc__.splitlines()[0], "table7", seeds=range(2))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="spaces and starts of α")
    parser.add_argument("--genotypes", type=Path, help="folder of the genotypes, default: in that of the results")
    for name, default in asdict(Budget()).items():
        kind = not_negative if isinstance(default, float) else at_least(128 if name == "images" else 1)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help="budget of a method")
    args = parser.parse_args(arguments)
    budget = Budget(**{field.name: getattr(args, field.name) for field in fields(Budget)})
    with quiet_hosts():
        place = place_of(parser, args, "table7", **asdict(budget))
        where = (args.data, place, args.genotypes or args.results / "genotypes")
        experiments = [Experiment(method, seed, budget, *where) for seed in args.seeds for method in args.methods]
        run_missing(
            experiments,
            lambda experiment: f"{experiment.method}, seed {experiment.seed}",
            lambda experiment: find(place.results, experiment.identity) is not None,
            Experiment.run,
        )


if __name__ == "__main__":
    main()
