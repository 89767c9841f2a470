"""Table 7 at a reduced size: search, retraining and test.

    python examples/reproduce/table7.py --methods darts hb hb-dagger agd --seeds 0 1

All methods have one budget. Each method and seed adds a row to ``table7.csv``. A random search trains ``--trials``
networks of the supernet's width and depth, and takes the best one by held-out images. An interrupted run resumes.
Genotypes are saved as files: ``timm.create_model("cellnet_cifar",
genotype="runs/reproduce/results/genotypes/cifar10_agd_seed0.json")``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from commands import Place, at_least, command_line, common_arguments, not_negative, place_of, run_missing
from nni.nas.strategy import Random
from rows import add_rows, find, provenance

from nni_spaces import AlgorithmInit, HBSpace, quiet_hosts
from nni_spaces.runs.data import read_images
from nni_spaces.runs.retrain import retrain
from nni_spaces.runs.search import make_space, search
from nni_spaces.runs.settings import RetrainSettings, SearchSettings
from nni_spaces.spaces.structure import CellStructure
from nni_spaces.trials.evaluator import TrialEvaluator
from nni_spaces.trials.run import read_trials, run_trials
from optinspired_plugins.cells.genotype import Genotype
from optinspired_plugins.cells.operations import DARTS_OPERATIONS, POOLINGS, TABLE_6
from optinspired_plugins.run_folder import lock_folder, read_history


class Method(NamedTuple):
    """A search space and the initialisation of α."""

    space: str
    initialization: str | None  # None for a random search, which has no α
    warmup: float = 0.0  # fraction of the epochs in which α is frozen
    logit: float | None = 5.0  # of a favoured α; None is the distance that α can travel
    algorithm: str | None = None  # of the space "algorithm"
    operations: Sequence[str] | None = None  # candidates, if not the space's own
    allowed: Mapping[str, Sequence[str]] | None = None  # candidates of single edges


def momentum_edges(structure: CellStructure, nodes: int) -> dict[str, list[str]]:
    """Return each linear edge of an algorithm's cells, by label, with its operation in the algorithm alone."""
    start = AlgorithmInit()
    favoured = {label: start.favoured(edge, TABLE_6) for label, edge in structure.edges(nodes).items()}
    return {label: [name] for label, name in favoured.items() if name is not None}


# Initialisation is random for the plain HB space (§9.1) and zero for the others (§9.3).
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
    "hb-dagger-scaled": Method("hb", "heavy-ball", logit=None),
    "random-hb-dagger": Method("hb", None, allowed=momentum_edges(HBSpace.structure, SearchSettings.nodes)),
    "hb-no-negative": Method("hb", "random", operations=DARTS_OPERATIONS),
    "agd-no-negative": Method("agd", "zero", operations=DARTS_OPERATIONS),
    "admm": Method("algorithm", "algorithm", algorithm="admm"),
    "ogm": Method("algorithm", "algorithm", algorithm="ogm"),
    "random-admm": Method("algorithm", None, algorithm="admm"),
    "random-ogm": Method("algorithm", None, algorithm="ogm"),
}


@dataclass(frozen=True)
class Budget:
    """Budget of every method."""

    images: int = 4096
    search_epochs: int = 4
    alpha_lr: float = 0.02  # larger than the paper's 3e-4, as there are few steps
    cells: int = 5
    channels: int = 8
    trials: int = 8
    trial_epochs: int = 2
    retrain_epochs: int = 8
    retrain_cells: int = 6
    width: int = 16


@dataclass(frozen=True)
class Experiment:
    """A method and seed with budget and destinations."""

    method: str
    seed: int
    budget: Budget
    data: str
    place: Place
    genotypes: Path

    @property
    def folder(self) -> Path:
        """The folder of the search and the retraining."""
        return self.place.out / f"{self.method}-seed{self.seed}"

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that identify a run."""
        return dict(method=self.method, seed=self.seed)

    @property
    def settings(self) -> SearchSettings:
        """Settings of the search, or of a random search's supernet."""
        method, b = METHODS[self.method], self.budget
        return SearchSettings(
            space=method.space,
            algorithm=method.algorithm,
            operations=method.operations,
            allowed=method.allowed,
            initialization=method.initialization or "zero",
            data=self.data,
            limit=b.images,
            epochs=b.search_epochs,
            channels=b.channels,
            cells=b.cells,
            alpha_lr=b.alpha_lr,
            logit=method.logit,
            warmup_epochs=int(method.warmup * b.search_epochs),
            seed=self.seed,
        )

    def search(self) -> tuple[Genotype, float]:
        """Return the genotype and the duration of the search in seconds."""
        settings, b = self.settings, self.budget
        if METHODS[self.method].initialization:
            show = partial(_show, self.method)
            genotype = search(settings, self.folder, accelerator=self.place.accelerator, on_epoch=show)
            return genotype, sum(entry["seconds"] for entry in read_history(self.folder))
        classes = read_images(self.data, b.images).classes
        evaluator = TrialEvaluator.from_images(
            self.data,
            limit=b.images,
            padding=settings.padding,
            seed=self.seed,
            epochs=b.trial_epochs,
            accelerator=self.place.accelerator,
        )
        model_space = make_space(settings, classes, in_chans=3)
        best, *_ = run_trials(model_space, Random(seed=self.seed), evaluator, self.folder, b.trials, self.seed)
        return best.genotype, sum(trial.seconds for trial in read_trials(self.folder)[1])

    def time_darts(self) -> float:
        """Estimate the seconds of a DARTS search.

        Rows may come from machines of different speed, so this is their unit. The estimate is extrapolated from the
        second epoch of a search in the DARTS space with a quarter of the images.
        """
        images = max(self.budget.images // 4, 128)
        settings = replace(replace(self, method="darts").settings, limit=images, epochs=2)
        search(settings, self.folder / "darts", accelerator=self.place.accelerator)
        seconds = read_history(self.folder / "darts")[-1]["seconds"]
        return seconds * self.budget.search_epochs * self.budget.images / images

    def run(self) -> str:
        """Run, unless another process already does."""
        with lock_folder(self.folder / "run"):
            return self.search_and_retrain()

    def search_and_retrain(self) -> str:
        """Search, retrain, save genotype and row, and return a message."""
        genotype, search_seconds = self.search()
        darts_seconds = search_seconds if self.method == "darts" else self.time_darts()
        measurements = self.retrain(genotype)
        self.genotypes.mkdir(parents=True, exist_ok=True)
        name = f"cifar10_{self.method.replace('-', '_')}_seed{self.seed}"
        genotype.save(self.genotypes / f"{name}.json")
        options = dict(methods=self.method, seeds=self.seed, **asdict(self.budget))
        row = {
            **self.identity,
            **self.place.shared,
            "test_images": len(read_images(self.data, self.budget.images, "test").labels),
            "genotype": name,
            **count_poolings(genotype),
            **measurements,
            "search_seconds": round(search_seconds, 1),
            "darts_seconds": round(darts_seconds, 1),
            "seconds": round(search_seconds + measurements["seconds"], 1),
            **provenance(command_line("table7", self.data, **options), self.place.device),
        }
        add_rows(self.place.results, [row], list(self.identity))
        return f"test error {row['test_error']:.2f} %"

    def retrain(self, genotype: Genotype) -> dict[str, Any]:
        """Retrain a genotype and return the measurements."""
        b = self.budget
        settings = RetrainSettings(
            genotype=json.loads(genotype.to_json()),
            data=self.data,
            limit=b.images,
            epochs=b.retrain_epochs,
            batch_size=64,
            cells=b.retrain_cells,
            channels=b.width,
            drop_path_rate=0.0,  # a short training does not overfit
            cutout=0,
            seed=self.seed,
        )
        folder = self.folder / "retrain"
        test_top1 = retrain(settings, folder, accelerator=self.place.accelerator, on_epoch=partial(_show, self.method))
        history, facts = read_history(folder), json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return {
            "parameters": facts["parameters"],
            "macs": facts["macs"],
            "train_loss": history[-1]["train_loss"],
            "test_error": round(100 - test_top1, 4),
            "seconds": sum(entry["seconds"] for entry in history),
        }


def count_poolings(genotype: Genotype) -> dict[str, int]:
    """Count the edges of the normal cell, and those that are poolings."""
    names = [edge.operation for node in genotype.normal for edge in node]
    return {"normal_edges": len(names), "normal_poolings": sum(name in POOLINGS for name in names)}


def _show(method: str, entry: dict[str, Any]) -> None:
    print(f"  {method} epoch {entry['epoch'] + 1}: loss {entry['train_loss']:.4f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything that has no row yet."""
    parser = common_arguments(__doc__.splitlines()[0], "table7", seeds=range(2))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="search methods")
    parser.add_argument("--genotypes", type=Path, help="folder of the genotypes; RESULTS/genotypes by default")
    for name, default in asdict(Budget()).items():
        kind = not_negative if isinstance(default, float) else at_least(128 if name == "images" else 1)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help="budget of a method")
    args = parser.parse_args(arguments)
    budget = Budget(**{field.name: getattr(args, field.name) for field in fields(Budget)})
    quiet_hosts()
    place = place_of(parser, args, "table7", **asdict(budget))
    shared = (args.data, place, args.genotypes or args.results / "genotypes")
    experiments = [Experiment(method, seed, budget, *shared) for seed in args.seeds for method in args.methods]
    run_missing(
        experiments,
        lambda experiment: f"{experiment.method}, seed {experiment.seed}",
        lambda experiment: find(place.results, experiment.identity) is not None,
        Experiment.run,
    )


if __name__ == "__main__":
    main()
