"""The benchmark of the GPU, small and on the CPU: what it writes, and that faults are seen."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import fake_cuda
import gpu
import numpy as np
import pytest
import torch
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


def test_paired_networks_are_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PAIRED", {"HBNet-20": ("hbnet20", {}), "ResNet-20": ("hbnet20_resnet", {})})
    labels = {"train": np.arange(96) % 2, "test": np.arange(32) % 2}
    images = {
        part: np.broadcast_to(200 * y[:, None, None, None], (len(y), 32, 32, 3)).astype(np.uint8)
        for part, y in labels.items()
    }
    arrays = {f"{x}_{part}": data[part] for x, data in (("x", images), ("y", labels)) for part in labels}
    np.savez(tmp_path / "c.npz", **arrays)
    data = ["--data", str(tmp_path / "c.npz")]
    assert gpu.main([*TINY, *data, "--out", str(tmp_path), "--blocks", "cifar10"]) == 0
    found = rows(tmp_path / "cifar10.csv")
    assert [row["model"] for row in found] == ["HBNet-20", "ResNet-20"]
    assert all(0 <= float(row["value"]) <= 100 for row in found)


def test_images_are_cropped_and_mirrored():
    torch.manual_seed(0)
    x = torch.arange(1.0, 17).reshape(1, 1, 4, 4).expand(64, 3, 4, 4)
    crops = gpu.augmented(x, 1)
    padded = torch.nn.functional.pad(x[0, 0], [1] * 4)
    windows = [padded[i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    seen = {next(i for i, w in enumerate(windows + [w.flip(1) for w in windows]) if w.equal(c)) for c in crops[:, 0]}
    assert len(seen) > 12
    assert torch.equal(crops[:, 0], crops[:, 2])


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
    sizes = ["--batch", "4", "--size", "32", "--out", "t.csv"]
    done = subprocess.run([*command, *sizes], **kwargs)
    assert done.returncode == 0, done.stderr
    default, reversible = rows(tmp_path / "t.csv")
    assert float(reversible["kept_gib"]) <= float(default["kept_gib"])
    assert int(reversible["launches"]) > int(default["launches"])
