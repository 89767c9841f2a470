"""timm's own scripts, unmodified and from another folder, on real digits: no import line, no edit, no copy."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import warm
from extras import needs

from optinspired_plugins import GENOTYPES

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT.parent / "shared" / "timm"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = {
    "hbnet20": ["layers=(2,2,2)", "learn_beta=True"],
    "agdnet40_k12": ["block_config=(2,2,2)"],
}
CELLNET = ["genotype=genotype.json", "cells=3", "channels=4"]
OPTIONS = {**MODELS, "optnet20": ["layers=(2,2,2)", "algorithm="], "cellnet_cifar": CELLNET}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SCRIPTS.exists(), reason="timm's scripts are not beside the repository"),
]


def command(script, *arguments):
    return [sys.executable, str(SCRIPTS / script), *map(str, arguments)]


def run(script, *arguments, folder, cold=False, **variables):
    """``cold``: with the imports of a fresh Python."""
    words, env = command(script, *arguments), {**os.environ, **variables}
    if cold:
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    else:
        done = warm.run(words[1:], cwd=folder, env=env)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout


def data_options(name, digits):
    options = [digits, "--model", name, "--num-classes", 10, "--input-size", 3, 32, 32, "-b", 32, "-j", 0]
    return [*options, "--device", DEVICE, "--model-kwargs", *OPTIONS[name]]


def training_options(name, digits, epochs, experiment="run"):
    schedule = ["--epochs", epochs, "--warmup-epochs", 0, "--lr", 0.1, "--opt", "sgd", "--sched", "step"]
    return [*data_options(name, digits), *schedule, "--no-aug", "--output", "out", "--experiment", experiment]


def accuracies(folder):
    with (folder / "out" / "run" / "summary.csv").open() as file:
        return {int(row["epoch"]): float(row["eval_top1"]) for row in csv.DictReader(file)}


def kill_after_first_checkpoint(arguments, folder, limit=300):
    last = folder / "out" / "run" / "last.pth.tar"
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command("train.py", *arguments), cwd=folder, stdout=log, stderr=log)
        deadline = time.monotonic() + limit
        while not last.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, (folder / "log.txt").read_text()[-3000:]
    return last


@pytest.mark.parametrize("name", MODELS)
def test_train_is_killed_resumed_and_validated(name, digits_folder, tmp_path):
    last = kill_after_first_checkpoint(training_options(name, digits_folder, epochs=40), tmp_path)
    (tmp_path / "killed.pth.tar").write_bytes(last.read_bytes())
    done = torch.load(tmp_path / "killed.pth.tar", weights_only=False)["epoch"]
    (tmp_path / "out" / "run").rename(tmp_path / "out" / "before")

    options = training_options(name, digits_folder, epochs=done + 5)
    run("train.py", *options, "--resume", tmp_path / "killed.pth.tar", folder=tmp_path, cold=name == "hbnet20")
    history = accuracies(tmp_path)
    assert list(history) == list(range(done + 1, done + 5))

    checkpoint = tmp_path / "out" / "run" / "last.pth.tar"
    options = [*data_options(name, digits_folder), "--checkpoint", checkpoint]
    result = json.loads(run("validate.py", *options, folder=tmp_path, cold=name == "hbnet20").split("--result")[1])
    assert result["top1"] == pytest.approx(history[done + 4], abs=1e-3)
    assert result["top1"] > 20, "better than the 10 % of guessing"


@pytest.mark.parametrize("name", MODELS)
def test_grad_checkpointing_and_registration_by_hand(name, digits_folder, tmp_path):
    """--device-modules imports the package where the autoload hook is off."""
    options = [*training_options(name, digits_folder, epochs=1), "--grad-checkpointing"]
    run("train.py", *options, "--device-modules", "timm_models", folder=tmp_path, cold=True, OPTINSPIRED_AUTOLOAD="0")
    assert list(accuracies(tmp_path)) == [0]


def test_the_genotype_that_a_search_leaves_trains_and_is_validated(digits_folder, tmp_path):
    GENOTYPES["p_darts"].save(tmp_path / "genotype.json")
    run("train.py", *training_options("cellnet_cifar", digits_folder, epochs=2), folder=tmp_path)
    checkpoint = tmp_path / "out" / "run" / "last.pth.tar"
    options = [*data_options("cellnet_cifar", digits_folder), "--checkpoint", checkpoint]
    result = json.loads(run("validate.py", *options, folder=tmp_path).split("--result")[1])
    assert result["top1"] == pytest.approx(accuracies(tmp_path)[1], abs=1e-3)


def test_an_auxiliary_head_is_no_hindrance(digits_folder, tmp_path):
    """The script takes a network's output for logits: until the auxiliary ones are asked for, they are."""
    GENOTYPES["p_darts"].save(tmp_path / "genotype.json")
    options = [*training_options("cellnet_cifar", digits_folder, epochs=1), "--model-kwargs", *CELLNET, "aux_head=True"]
    run("train.py", *options, folder=tmp_path)
    assert list(accuracies(tmp_path)) == [0]


@pytest.mark.parametrize("algorithm", ["OptimizedGradient", "LearnedHeavyBall"])
def test_a_users_algorithm_trains_and_is_validated(algorithm, digits_folder, tmp_path):
    """A file of the user's on PYTHONPATH is all there is."""
    (tmp_path / "mine.py").write_text((ROOT / "examples" / "my_algorithms.py").read_text(encoding="utf-8"))
    options = training_options("optnet20", digits_folder, epochs=12)
    options[options.index("algorithm=")] += f"mine:{algorithm}"
    run("train.py", *options, folder=tmp_path, PYTHONPATH=str(tmp_path))
    history = accuracies(tmp_path)
    options = [
        o if o != "algorithm=" else f"algorithm=mine:{algorithm}" for o in data_options("optnet20", digits_folder)
    ]
    checkpoint = ["--checkpoint", tmp_path / "out" / "run" / "last.pth.tar"]
    result = json.loads(
        run("validate.py", *options, *checkpoint, folder=tmp_path, PYTHONPATH=str(tmp_path)).split("--result")[1]
    )
    assert result["top1"] == pytest.approx(history[11], abs=1e-3)
    assert result["top1"] > 60


@pytest.mark.parametrize("name", ["hbnet50", "agdnet121"])
def test_benchmark_runs(name, tmp_path):
    options = ["--model", name, "--bench", "both", "-b", 2, "--img-size", 64, "--device", DEVICE]
    counts = ["--num-warm-iter", 1, "--num-bench-iter", 5]
    output = run(
        "benchmark.py", *options, *counts, "--results-file", "results.json", folder=tmp_path, cold=name == "hbnet50"
    )
    result = json.loads(output.split("--result")[1])
    result = result[0] if isinstance(result, list) else result
    assert result["model"] == name
    assert result["infer_samples_per_sec"] > 0
    assert result["train_samples_per_sec"] > 0
    expected = sum(p.numel() for p in timm.create_model(name, device="meta").parameters())
    assert result["param_count"] == pytest.approx(expected / 1e6, abs=0.01)


@pytest.mark.parametrize("name", ["hbnet20", "agdnet40_k12"])
def test_onnx_export_runs_and_onnxruntime_agrees(name, tmp_path):
    needs("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    model = timm.create_model(name).eval()
    for module in model.modules():  # α away from 1, so that its folding shows
        if hasattr(module, "alpha"):
            torch.nn.init.uniform_(module.alpha, 0.5, 1.5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    options = ["model.onnx", "--model", name, "--num-classes", 10, "--checkpoint", "weights.pth", "-b", 2]
    run("onnx_export.py", *options, folder=tmp_path, cold=name == "hbnet20")
    image = torch.randn(2, 3, 32, 32)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    np.testing.assert_allclose(got, model(image).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_a_wrong_option_on_the_command_line_is_named(digits_folder, tmp_path):
    options = training_options("hbnet20", digits_folder, epochs=1)
    options[options.index("learn_beta=True")] = "beta1=nope"
    done = subprocess.run(command("train.py", *options), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert re.search(r"ValueError: beta1='nope': must be a finite number", done.stderr)
