"""Searches and trainings in two processes (gloo): the same α in both, one genotype, written once."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from extras import needs

needs("nni", "sklearn")

from optinspired_plugins.run_folder import read_history

SETTINGS = dict(
    data="digits", limit=128, epochs=2, channels=2, cells=3, nodes=2, batch_size=16, padding=1, alpha_lr=0.1
)
SCRIPT = Path(__file__).with_name("distributed_search.py")


def run(*command):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = warm.run(command, cwd=Path.cwd(), env=env)  # Lightning starts the second process as it always does
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "strategy"), [("agd", "darts"), ("hb", "gumbel"), ("agd", "darts-second-order")], ids=lambda v: v
)
def test_both_processes_hold_the_same_alpha_and_genotype(space, strategy, tmp_path):
    """They see different images: α agrees because its gradients are averaged."""
    still = int(strategy == "gumbel")  # epochs in which α has no gradients, which the processes would wait for
    run(SCRIPT, tmp_path, json.dumps({**SETTINGS, "space": space, "strategy": strategy, "warmup_epochs": still}))
    first, second = (torch.load(tmp_path / f"alpha-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first) == len(second) > 0
    for a, b in zip(first, second):
        assert torch.equal(a, b)
    assert any(a.std() > 0.01 for a in first), "α has moved"
    returned = {(tmp_path / f"returned-{rank}.json").read_text() for rank in (0, 1)}
    assert returned == {(tmp_path / "genotype.json").read_text()}
    assert (tmp_path / "saved-by-0").exists()
    assert not (tmp_path / "saved-by-1").exists()
    assert [entry["epoch"] for entry in read_history(tmp_path)] == [0, 1]


@pytest.mark.slow
def test_the_command_retrains_in_two_processes(tmp_path):
    options = "--data digits --limit 200 --cells 3 --channels 2 --epochs 2 --batch-size 16 --aux-weight 0 --cutout 0"
    command = ["-m", "optinspired_plugins.cli", "retrain", "darts_v2", *options.split(), "--out", tmp_path]
    done = run(*command, "--devices", "2", "--accelerator", "cpu")
    assert done.stdout.count("Test accuracy after the last epoch") == 1, "the first process speaks"
    history = read_history(tmp_path)
    assert [entry["epoch"] for entry in history] == [0, 1]
    hits = history[-1]["test_top1"] / 100 * 200
    assert hits == pytest.approx(round(hits), abs=1e-3), "an accuracy of all 200 test images, counted once"
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(("per_machine", "expected"), [(None, (8, 1)), ("8", (8, 1)), ("2", (2, 4))])
def test_machines_and_their_processes_are_those_of_torchrun(per_machine, expected, monkeypatch, tmp_path):
    from nni_spaces.runs.callback import trainer_options

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if per_machine:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", per_machine)
    options = trainer_options(SimpleNamespace(folder=tmp_path), 1, "cpu", 8)
    assert (options["devices"], options["num_nodes"]) == expected
    assert options["strategy"] == "ddp"
