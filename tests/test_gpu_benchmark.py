"""The benchmark of the GPU, small and on the CPU: what it writes, and that faults are seen."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import fake_cuda
import gpu
import gpu_training
import numpy as np
import pytest
import torch
from extras import needs
from speed_and_memory import Form

ROOT = Path(__file__).parents[1]
TINY = ["--device", "cpu", "--tiny"]


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def small(monkeypatch):
    """One network of each kind."""
    monkeypatch.setattr(gpu, "FORMS", [("hbnet20", {"drop_path_rate": 0.3}, "default", ("reversible",))])
    monkeypatch.setattr(gpu, "TRAINING", [(Form("hbnet20", "reversible"), Form("hbnet20_resnet"))])


def test_correctness_and_training_are_written(small, tmp_path):
    assert gpu.main([*TINY, "--out", str(tmp_path), "--blocks", "correctness,training"]) == 0
    (error,) = rows(tmp_path / "correctness.csv")
    assert float(error["value"]) < 1e-10
    assert error["note"] == ""
    time, memory = rows(tmp_path / "training.csv")
    assert (time["quantity"], memory["quantity"]) == ("time", "peak memory")
    assert float(memory["ratio"]) < 1


def test_a_wrong_gradient_is_seen(small, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "FORMS", [("hbnet20", {}, "default", ("reversible",))])
    build = Form.build

    def other(form, **options):
        return build(form, **options, beta1=0.9) if form.form == "reversible" else build(form, **options)

    monkeypatch.setattr(Form, "build", other)
    assert gpu.main([*TINY, "--out", str(tmp_path), "--blocks", "correctness"]) == 1
    assert rows(tmp_path / "correctness.csv")[0]["note"] == "WRONG"


def test_a_form_that_fails_is_a_row_and_the_next_one_runs(small, tmp_path, monkeypatch):
    pairs = [(Form("no_such_net"), Form("hbnet20_resnet")), (Form("hbnet20"), Form("hbnet20_resnet"))]
    monkeypatch.setattr(gpu, "TRAINING", pairs)
    assert gpu.main([*TINY, "--out", str(tmp_path), "--blocks", "training"]) == 1
    first, *others = rows(tmp_path / "training.csv")
    assert (first["quantity"], first["model"]) == ("error", "no_such_net")
    assert [row["quantity"] for row in others] == ["time", "peak memory"]


def test_what_there_is_no_time_for_is_named(small, tmp_path):
    assert gpu.main([*TINY, "--out", str(tmp_path), "--blocks", "training", "--minutes", "0"]) == 0
    (row,) = rows(tmp_path / "training.csv")
    assert (row["quantity"], row["note"]) == ("left out", "no time left")


@pytest.mark.parametrize("packed", [False, True])
def test_paired_networks_are_trained(tmp_path, monkeypatch, packed):
    small = {"layers": (1, 1, 1), "channels": (4, 8, 8)}
    networks = {"HBNet": ("hbnet20", small, ("rule", "0.1")), "No such net": ("no_such_net", {}, ("1",))}
    monkeypatch.setattr(gpu_training, "NETWORKS", networks)
    labels = {"train": np.arange(96) % 2, "test": np.arange(32) % 2}
    images = {
        part: np.broadcast_to(200 * y[:, None, None, None], (len(y), 32, 32, 3)).astype(np.uint8)
        for part, y in labels.items()
    }
    arrays = {f"{x}_{part}": data[part] for x, data in (("x", images), ("y", labels)) for part in labels}
    data = tmp_path / "c.npz"
    np.savez(data, **arrays)
    if packed:
        gpu_training.pack(tmp_path / "c", data, 96, 32)
        data = tmp_path / "c"
    sizes = ["--epochs", "12", "--seeds", "2", "--jobs", "3", "--warm-up", "3"]
    assert gpu.main([*TINY, "--data", str(data), *sizes, "--out", str(tmp_path), "--blocks", "cifar10"]) == 1
    found = rows(tmp_path / "cifar10.csv")
    errors = [row for row in found if row["quantity"] == "error"]
    assert [(row["model"], row["seed"]) for row in errors] == [("No such net", "0"), ("No such net", "1")]
    trained = sorted((row["start"], row["seed"]) for row in found if row["quantity"] == "test error")
    assert trained == [("0.1", "0"), ("0.1", "1"), ("rule", "0"), ("rule", "1")]
    for row in found:
        if row["quantity"] == "test error":
            assert (row["value"], row["finite"], row["form"], row["unit"]) == ("0", "True", "eager", "%")
            assert float(row["loss"]) < 0.5


def test_a_compiled_step_is_compiled_for_its_instance(tmp_path, monkeypatch):
    """The budget of a second instance would have no effect on a graph that exists."""
    budgets, compile_model = [], torch.compile

    def backend(graph, inputs):
        budgets.append(torch._functorch.config.activation_memory_budget)
        return graph

    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_model(model, backend=backend))
    run = gpu.Run(gpu.parser().parse_args([*TINY, "--out", str(tmp_path)]))
    for form in ("default", "budget"):
        gpu.step_of(run, Form("hbnet20", form), compiled=True)
    assert {1.0, 0.4} == set(budgets)


def test_an_error_says_which_quantity_it_cost(tmp_path):
    run = gpu.Run(gpu.parser().parse_args([*TINY, "--out", str(tmp_path)]))
    run.fail("training", RuntimeError("no capture\nmore"), "time in a CUDA graph", model="hbnet20")
    (row,) = rows(tmp_path / "training.csv")
    assert (row["quantity"], row["note"]) == ("error", "time in a CUDA graph: RuntimeError: no capture")
    assert run.errors == 1


@pytest.mark.slow
def test_the_script_runs_from_anywhere(tmp_path):
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *TINY, "--blocks", "cifar10"]
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "out" / "cifar10.csv")[0]["quantity"] == "left out"


@pytest.mark.slow
@pytest.mark.skipif(fake_cuda.missing() is not None, reason=f"needs {fake_cuda.missing()}")
def test_the_roofline_predicts_a_step(tmp_path):
    """A convolution of known size, and a table of two forms."""
    code = """
        import fake_cuda
        fake_cuda.install()
        import torch, roofline
        from speed_and_memory import Form
        Form.build = lambda form: torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1, bias=False), torch.nn.Flatten())
        step = roofline.run_step(Form("one"), 2, 4, torch.float32)
        first = next(k for k in step.kernels if k.name == "convolution")
        print(first.bytes, first.flops, first.launches)
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    script = "\n".join(line.strip() for line in code.splitlines())
    kwargs = dict(env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    done = subprocess.run([sys.executable, "-c", script], **kwargs)
    assert done.returncode == 0, done.stderr
    pixels = 2 * 4 * 4
    assert done.stdout.split() == [str(4 * (3 * pixels + 8 * 3 + 8 * pixels)), str(2 * 8 * 3 * pixels), "1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "roofline.py"), "hbnet20", "hbnet20:reversible"]
    sizes = ["--batch", "64", "--size", "32", "--out", "t.csv"]
    done = subprocess.run([*command, *sizes], **kwargs)
    assert done.returncode == 0, done.stderr
    default, reversible = rows(tmp_path / "t.csv")
    assert float(default["kept_ratio"]) == 1.0
    assert float(reversible["kept_ratio"]) < 0.5
    # The kernels of a GPU are logged, and recomputation pays for them even though fewer are launched.
    assert int(reversible["launches"]) < int(default["launches"])
    assert float(reversible["teraflops"]) >= float(default["teraflops"])


@pytest.mark.slow
@pytest.mark.skipif(fake_cuda.missing() is not None, reason=f"needs {fake_cuda.missing()}")
def test_the_roofline_counts_a_search_step(tmp_path):
    """On fake CUDA tensors; operations that run one by one need more launches."""
    needs("nni")
    code = """
        import fake_cuda
        fake_cuda.install()
        import roofline
        from nni_spaces.spaces import mixed_op
        def launches():
            return sum(kernel.launches for kernel in roofline.run_search_step("hb", 2, 16, 4, 3).kernels)
        together = launches()
        mixed_op._launches_are_slow = lambda x: False
        print(together, launches())
    """
    script = "\n".join(line[8:] for line in code.splitlines())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    kwargs = dict(capture_output=True, text=True, timeout=300, cwd=tmp_path)
    done = subprocess.run([sys.executable, "-c", script], env=environment, **kwargs)
    assert done.returncode == 0, done.stderr
    together, one_by_one = map(int, done.stdout.split()[-2:])
    assert together < 0.65 * one_by_one
