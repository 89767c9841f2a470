"""What a worker of a study runs, imported by name from a fork server."""

import os
import signal
import time

import optuna
from optuna.storages import RDBStorage, RetryFailedTrialCallback
from optuna.trial import TrialState
from trial_runs import TINY

from nni_spaces import HBSpace, suggest_sample


def open_study(url):
    """The study of a database, in which a trial without a sign of life for a second is repeated."""
    retry = RetryFailedTrialCallback()
    storage = RDBStorage(url, heartbeat_interval=1, grace_period=1, failed_trial_callback=retry)
    return optuna.create_study(storage=storage, study_name="shared", direction="maximize", load_if_exists=True)


def work(url, trials, killed=None):
    """Run trials until enough are complete and none is left over; end by SIGKILL in the so-manieth."""
    study, space, calls = open_study(url), HBSpace(**TINY), []

    def objective(trial):
        sample = suggest_sample(trial, space)
        calls.append(trial.number)
        if len(calls) == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return space.count(sample, 8).parameters

    def left_over():
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        return states.count(TrialState.COMPLETE) < trials or {TrialState.RUNNING, TrialState.WAITING} & {*states}

    while left_over():
        study.optimize(objective, n_trials=1)
        time.sleep(0.1)
