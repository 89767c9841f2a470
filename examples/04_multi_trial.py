"""Search by trying networks: random search beside regularized evolution, on NNI's engine and scikit-learn's digits.

    python examples/04_multi_trial.py --out runs/trials

Every network of Search space-HB that a strategy samples is trained from scratch for an epoch and judged by digits that
are held out. A run that is stopped goes on where it was: run the command again.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from nni.nas.strategy import Random, RegularizedEvolution

from nni_spaces import HBSpace, Trial, TrialEvaluator, run_trials


def show(trial: Trial) -> None:
    """Print a trial as it ends."""
    result = trial.error if trial.metric is None else f"{trial.metric:6.2f} %"
    print(f"  trial {trial.index:>2}: {result}  ({trial.seconds:.1f} s)", flush=True)


def main() -> None:
    """Run both strategies for as many networks each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the trials of both strategies")
    parser.add_argument("--trials", type=int, default=12, help="networks a strategy")
    parser.add_argument("--epochs", type=int, default=1, help="epochs a network")
    parser.add_argument("--limit", type=int, help="use this many digits")
    parser.add_argument("--seed", type=int, default=0, help="seed of strategies, weights and split")
    args = parser.parse_args()
    for name in ("pytorch_lightning.utilities.rank_zero", "nni"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a dozen lines a network
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
