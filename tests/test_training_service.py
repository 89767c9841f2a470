"""Trials on NNI's training service: an evaluator is sent as its arguments, and trials run side by side."""

import getpass
import json
import os
import shutil
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

PATH = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))  # what this process can import
EXPERIMENT = """
import json, sys
from nni.experiment import RemoteMachineConfig
from nni.nas.experiment import NasExperiment, NasExperimentConfig
from nni.nas.strategy import Random
from nni_spaces import HBSpace
from trial_runs import TINY, digits

config = None
if len(sys.argv) > 3:
    config = NasExperimentConfig("ts", "simplified", "remote")
    config.training_service.machine_list = [RemoteMachineConfig(**json.loads(sys.argv[3]))]
    config.nni_manager_ip = "127.0.0.1"
experiment = NasExperiment(HBSpace(**TINY), digits(), Random(seed=0), config=config)
experiment.config.experiment_working_directory = sys.argv[1]
experiment.config.trial_concurrency = 2
experiment.config.max_trial_number = 2
experiment.run(port=int(sys.argv[2]))
trials = [trial.status for trial in experiment.list_trial_jobs()]
metrics = [model.metric for model in experiment.strategy.list_models()]
experiment.stop()
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


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_experiment(folder, *machine):
    """Run two trials, and check that both gave an accuracy."""
    folder.joinpath("code").mkdir()
    folder.joinpath("code", "file").touch()  # NNI sends the working folder to the machines, and fails if it is empty
    env = {**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}
    command = [sys.executable, "-c", EXPERIMENT, str(folder / "nni"), str(free_port()), *map(json.dumps, machine)]
    done = subprocess.run(command, cwd=folder / "code", env=env, capture_output=True, text=True, timeout=600)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    assert line is not None, done.stdout + done.stderr
    statuses, metrics = json.loads(line.removeprefix("RESULT"))
    assert statuses == ["SUCCEEDED"] * 2
    assert len(metrics) == 2
    assert all(0 <= metric <= 100 for metric in metrics)


@pytest.mark.slow
@pytest.mark.every_model  # NNI's manager and a process for each trial take a minute
def test_trials_run_side_by_side_on_the_training_service(tmp_path):
    run_experiment(tmp_path)


SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")


@pytest.fixture
def ssh_server(tmp_path):
    """An SSH server on the loopback, as NNI's machine; its user's home is a temporary folder."""
    for name, kind in (("host", "ed25519"), ("user", "rsa")):
        key = ["ssh-keygen", "-q", "-t", kind, "-m", "PEM", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(key, check=True)
    (tmp_path / "home").mkdir()
    port = free_port()
    settings = [
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {tmp_path}/host",
        f"AuthorizedKeysFile {tmp_path}/user.pub",
        "PasswordAuthentication no",
        "StrictModes no",
        f"PidFile {tmp_path}/sshd.pid",
        "Subsystem sftp internal-sftp",
        f"SetEnv HOME={tmp_path}/home OMP_NUM_THREADS=1 PYTHONPATH={PATH}",
    ]
    (tmp_path / "sshd_config").write_text("\n".join(settings) + "\n")
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(tmp_path / "sshd_config")], stderr=subprocess.DEVNULL)
    yield dict(
        host="127.0.0.1",
        port=port,
        user=getpass.getuser(),
        ssh_key_file=str(tmp_path / "user"),
        python_path=os.path.dirname(sys.executable),
    )
    server.terminate()
    server.wait()


@pytest.mark.slow
@pytest.mark.every_model  # as above
@pytest.mark.skipif(SSHD is None, reason="needs an SSH server, sshd")
@pytest.mark.skipif(not os.path.isdir("/run/sshd"), reason="an SSH server needs the folder /run/sshd")
def test_trials_run_on_a_machine_that_is_reached_by_ssh(ssh_server, tmp_path):
    run_experiment(tmp_path, ssh_server)
    assert list(tmp_path.glob("home/nni-experiments/*/environments/*/trials/*/trial.log"))
