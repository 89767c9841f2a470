"""Trials on NNI's training service: an evaluator is sent as its arguments, and trials run side by side."""

import json
import os
import socket
import subprocess
import sys

import pytest
from extras import needs

needs("nni", "sklearn")

import nni
from nni.nas.space import SimplifiedModelSpace
from trial_runs import TINY, digits

from nni_spaces import AGDSpace, HBSpace, TrialEvaluator

EXPERIMENT = """
import sys
from nni.nas.experiment import NasExperiment
from nni.nas.strategy import Random
from nni_spaces import HBSpace
from trial_runs import TINY, digits

experiment = NasExperiment(HBSpace(**TINY), digits(), Random(seed=0))
experiment.config.experiment_working_directory = sys.argv[1]
experiment.config.trial_concurrency = 2
experiment.config.max_trial_number = 2
experiment.run(port=int(sys.argv[2]))
trials = [trial.status for trial in experiment.list_trial_jobs()]
metrics = [model.metric for model in experiment.strategy.list_models()]
experiment.stop()
import json
print("RESULT", json.dumps([trials, metrics]))
"""


@pytest.mark.parametrize("kind", [HBSpace, AGDSpace])
def test_a_trial_is_sent_without_its_loaders_and_pickles(kind):
    evaluator = digits()
    space = SimplifiedModelSpace.from_model(kind(**TINY), evaluator)
    sample = {label: choice.default() for label, choice in space.mutables.items()}
    text = nni.dump(space.freeze(sample), pickle_size_limit=1)
    assert "nni_obj" not in text
    assert "bytes:" not in text
    received = nni.load(text)
    assert received.evaluator.evaluator is None, "nothing is read before the trial"
    top1 = received.evaluator.evaluate(received.executable_model())
    assert received.evaluator.evaluator.source == evaluator.source
    assert 0 <= top1 <= 100


def test_loaders_of_the_user_are_refused_when_they_would_be_sent():
    evaluator = digits()
    evaluator = TrialEvaluator(evaluator.train_dataloaders, evaluator.val_dataloaders, accelerator="cpu")
    space = SimplifiedModelSpace.from_model(HBSpace(**TINY), evaluator)
    frozen = space.freeze({label: choice.default() for label, choice in space.mutables.items()})
    with pytest.raises(RuntimeError, match=r"loaders cannot be sent .* must be TrialEvaluator\.from_images"):
        nni.dump(frozen)


@pytest.mark.slow
@pytest.mark.every_model  # NNI's manager and a process for each trial take a minute
def test_trials_run_side_by_side_on_the_training_service(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", EXPERIMENT, str(tmp_path / "nni"), str(port)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    assert line is not None, done.stdout + done.stderr
    statuses, metrics = json.loads(line.removeprefix("RESULT"))
    assert statuses == ["SUCCEEDED"] * 2
    assert len(metrics) == 2
    assert all(0 <= metric <= 100 for metric in metrics)
