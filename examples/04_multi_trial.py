"""Multi-trial search on digits: random search and evolution.

    python examples/04_multi_trial.py --out runs/trials

Both strategies run on NNI's engine. Each network of Search space-HB that a strategy samples is trained from scratch for
an epoch and evaluated on held-out digits. Repeating the command resumes an interrupted run.

Needs ``pip install ".[nni,viz]"``.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from nni.nas.strategy import Random, RegularizedEvolution

from nni_spaces import HBSpace, Trial, TrialEvaluator, run_trials


def show(trial: Trial) -> None:
    """Print the result of a trial."""
    result = trial.error if trial.metric is None else f"{trial.metric:6.2f} %"
    print(f"  trial {trial.index:>2}: {result}  ({trial.seconds:.1f} s)", flush=True)


def main() -> None:
    """Run both strategies with the same number of networks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the trials of both strategies")
    parser.add_argument("--trials", type=int, default=12, help="networks per strategy")
    parser.add_argument("--epochs", type=int, default=1, help="epochs per network")
    parser.add_argument("--limit", type=int, help="number of digits")
    parser.add_argument("--seed", type=int, default=0, help="seed of strategies, weights and split")
    args = parser.parse_args()
    for name in ("pytorch_lightning.utilities.rank_zero", "nni"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a dozen lines per network
    strategies = {
        "random": Random(seed=args.seed),
        "evolution": RegularizedEvolution(population_size=4, sample_size=2, mutation_prob=0.2, seed=args.seed),
    }
    evaluator = TrialEvaluator.from_images("digits", limit=args.limit, batch_size=32, epochs=args.epochs, lr=0.1)
    for name, strategy in strategies.items():
        print(name)
        space = HBSpace(channels=8, cells=3, nodes=2, in_chans=1)
        best, *_ = run_trials(space, strategy, evaluator, args.out / name, args.trials, args.seed, on_trial=show)
        print(f"  best: trial {best.index} with {best.metric:.2f} %, {args.out / name / 'genotype.json'}")
    held_out = len(evaluator.val_dataloaders.dataset)
    print(f"One seed and {held_out} held-out digits, {100 / held_out:.2f} points each: no evidence of which is better.")


if __name__ == "__main__":
    main()
