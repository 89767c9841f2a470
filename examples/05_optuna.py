"""Many networks by Optuna on digits: workers share a study, and one that is killed loses no trial.

    python examples/05_optuna.py --out runs/optuna --trials 12   # in as many terminals as there are cores

Each network that a study suggests is trained for some epochs and evaluated on held-out digits; one that is worse than
the median of the others after an epoch is stopped. Several machines need a database server instead of SQLite, or
Optuna's journal in a shared folder.

Needs ``pip install ".[nni,optuna,viz]"``.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import optuna
import torch
from optuna.storages import RDBStorage, RetryFailedTrialCallback
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

from nni_spaces import HBSpace, TrialEvaluator, quiet_hosts, save_study, suggest_sample

SAMPLERS = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}


def open_study(folder: Path, sampler: str) -> optuna.Study:
    """Return the study of a folder; a trial whose worker ended is repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    retry = RetryFailedTrialCallback(max_retry=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = RDBStorage(
            f"sqlite:///{folder / 'study.db'}", heartbeat_interval=20, grace_period=60, failed_trial_callback=retry
        )
    return optuna.create_study(
        storage=storage, study_name="digits", direction="maximize", load_if_exists=True, sampler=SAMPLERS[sampler]()
    )


def main() -> None:
    """Work on a study until it has enough trials, and export it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the study, shared by all workers")
    parser.add_argument("--trials", type=int, default=12, help="networks, by all workers together")
    parser.add_argument("--epochs", type=int, default=2, help="epochs per network")
    parser.add_argument("--limit", type=int, help="number of digits")
    parser.add_argument("--sampler", choices=SAMPLERS, default="tpe", help="how networks are suggested")
    args = parser.parse_args()
    space = HBSpace(channels=8, cells=3, nodes=2, in_chans=1)
    evaluator = TrialEvaluator.from_images("digits", limit=args.limit, batch_size=32, epochs=args.epochs, lr=0.1)

    def objective(trial: optuna.Trial) -> float:
        def report(epoch: int, top1: float) -> None:
            trial.report(top1, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        torch.manual_seed(trial.number)
        return evaluator.evaluate(space.freeze(suggest_sample(trial, space)), report)

    study = open_study(args.out, args.sampler)
    enough = MaxTrialsCallback(args.trials, states=(TrialState.COMPLETE, TrialState.PRUNED))
    with quiet_hosts():
        study.optimize(objective, callbacks=[enough])
    best, *_ = save_study(study, space, args.out)
    print(f"best of {len(study.trials)}: {best.metric:.2f} %, {args.out / 'genotype.json'}")


if __name__ == "__main__":
    main()
