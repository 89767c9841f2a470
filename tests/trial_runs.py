"""What processes of multi-trial searches run, by name or as ``python trial_runs.py FOLDER STRATEGY TRIALS``."""

import os
import signal
import sys

from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.strategy import Random, RegularizedEvolution

from nni_spaces import HBSpace, TrialEvaluator, read_trials, run_trials
from nni_spaces.trials.evaluator import TrialModule

TINY = dict(channels=4, cells=3, nodes=2, in_chans=1)
STRATEGIES = {
    "random": lambda: Random(seed=3),
    "evolution": lambda: RegularizedEvolution(population_size=2, sample_size=2, seed=3),
}


def digits(**kwargs):
    """An evaluator of three batches of digits."""
    return TrialEvaluator.from_images("digits", limit=64, batch_size=16, accelerator="cpu", **{"lr": 0.1, **kwargs})


def count_parameters(model):
    """Report a network's size, without training."""
    import nni

    nni.report_final_result(sum(p.numel() for p in model.parameters()))


def sized(report=count_parameters):
    """An evaluator that calls a function."""
    return FunctionalEvaluator(report)


def run(folder, strategy, trials, kill_at=None):
    """Run trials; end by SIGKILL when the so-manieth is written."""

    def on_trial(trial):
        if trial.index == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    return run_trials(HBSpace(**TINY), STRATEGIES[strategy](), digits(), folder, trials, on_trial=on_trial)


def run_terminated(folder, moment):
    """Run three trials; SIGTERM comes at a moment of the second, or as soon as the first is written."""

    def at(place):
        if place == moment and len(read_trials(folder)[1]) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            return True
        return False

    class Terminated(TrialModule):
        def training_step(self, batch, batch_idx):
            at("batch")
            if at("loader"):
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")
            return super().training_step(batch, batch_idx)

        def on_train_end(self):
            at("end")

    TrialEvaluator._module = lambda self: Terminated(**self.recipe)
    run_trials(HBSpace(**TINY), STRATEGIES["random"](), digits(), folder, 3, on_trial=lambda trial: at("between"))


if __name__ == "__main__":
    bound = []
    sys.addaudithook(lambda event, args: bound.append(args[1]) if event == "socket.bind" else None)
    run(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
    print(f"bound {bound}")
