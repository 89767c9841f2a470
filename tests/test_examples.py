"""The examples do what they say, run as a user runs them: from another folder, in a process of their own."""

from __future__ import annotations

import csv
import importlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import numpy as np
import pytest
import torch
import warm
from extras import needs
from PIL import Image

needs("sklearn", "matplotlib", "rich")

import digits

ROOT = Path(__file__).parents[1]


def run_script(name: str, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # One thread: two that wait for each other on a busy machine can take ten times as long.
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return warm.run([ROOT / "examples" / name, *args], cwd=cwd, env=env, timeout=600)


def run_example(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_script("01_train_on_digits.py", *args, cwd=cwd)


def read_rows(path: Path) -> List[Dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(root: Path) -> Dict[Path, bytes]:
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# --- digits.py --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits.write_digits(tmp_path_factory.mktemp("data") / "new" / "digits")


def test_every_digit_is_written_once(digits_folder: Path) -> None:
    indices = sorted(int(path.stem) for path in contents(digits_folder))
    assert indices == list(range(1797))


@pytest.mark.parametrize(("split", "share"), [("train", 0.8), ("val", 0.2)])
def test_split_is_stratified(digits_folder: Path, split: str, share: float) -> None:
    from sklearn.datasets import load_digits

    total = np.bincount(load_digits().target)
    counts = [len(list((digits_folder / split / str(label)).glob("*.png"))) for label in range(10)]
    assert np.abs(counts - share * total).max() < 1
    assert sorted(path.name for path in (digits_folder / split).iterdir()) == [str(label) for label in range(10)]


def test_images_are_the_scans(digits_folder: Path) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    for path in [*digits_folder.rglob("00*.png")]:
        image = Image.open(path)
        assert (image.mode, image.size, image.format) == ("L", (8, 8), "PNG")
        np.testing.assert_allclose(np.asarray(image) * (16 / 255), data.images[int(path.stem)], atol=0.04)
        assert int(path.parent.name) == data.target[int(path.stem)]


def test_second_call_writes_nothing(digits_folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in digits_folder.rglob("*")}
    digits.write_digits(digits_folder)
    assert {path: path.stat().st_mtime_ns for path in digits_folder.rglob("*")} == before


def test_interrupted_write_is_completed(digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(path: Path, data: bytes, write: object = Path.write_bytes) -> int:
        if path.name == "0100.png":
            write(path, data[:20])  # type: ignore[operator]
            raise KeyboardInterrupt
        return write(path, data)  # type: ignore[operator]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_half)
        with pytest.raises(KeyboardInterrupt):
            digits.write_digits(tmp_path)
    assert 0 < len(contents(tmp_path)) < 1797
    digits.write_digits(tmp_path)
    assert contents(tmp_path) == contents(digits_folder)


def test_limit_keeps_classes_balanced_and_can_be_lifted(digits_folder: Path, tmp_path: Path) -> None:
    for train, val in ((64, 16), (20, 10)):
        written = contents(digits.write_digits(tmp_path, train, val))
        assert written.items() <= contents(digits_folder).items()
        for split, limit in (("train", train), ("val", val)):
            classes = [path.parts[1] for path in written if path.parts[0] == split]
            assert len(classes) == limit
            assert {classes.count(str(label)) for label in range(10)} <= {limit // 10, -(-limit // 10)}
    assert contents(digits.write_digits(tmp_path)) == contents(digits_folder)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    note = tmp_path / "train" / "3" / "note.txt"
    note.parent.mkdir(parents=True)
    note.write_text("mine")
    digits.write_digits(tmp_path, 10, 10)
    assert note.read_text() == "mine"


@pytest.mark.parametrize("limits", [{"limit_train": 9}, {"limit_val": 0}])
def test_limit_below_one_image_a_class_is_refused(tmp_path: Path, limits: Dict[str, int]) -> None:
    (name, value) = next(iter(limits.items()))
    with pytest.raises(ValueError, match=rf"{name}={value}: must be None or at least 10"):
        digits.write_digits(tmp_path / "digits", **limits)
    assert not (tmp_path / "digits").exists()


def test_digits_command(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "digits.py"), "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "train: 1442 images" in result.stdout
    assert "val: 355 images" in result.stdout


# --- 01_train_on_digits.py --------------------------------------------------------------------------------------------

LABELS = ["hbnet20", "hbnet20_resnet", "agdnet k=12 L=22", "densenet k=12 L=22"]
PARAMETERS = [269_434, 269_434, 270_481, 270_418]  # the Nesterov pair differs by its 63 α


@pytest.mark.slow
def test_every_model_trains_and_is_reported(tmp_path: Path) -> None:
    result = run_example("--out", "runs/demo", "--epochs", "1", "--limit", "64", cwd=tmp_path)
    assert result.returncode == 0, result.stderr

    rows = read_rows(tmp_path / "runs" / "demo" / "results.csv")
    assert list(rows[0]) == ["model", "parameters", "epoch", "train_loss", "val_accuracy", "seconds"]
    assert [row["model"] for row in rows] == LABELS
    assert [int(row["parameters"]) for row in rows] == PARAMETERS
    assert [int(row["epoch"]) for row in rows] == [1] * 4
    for row in rows:
        assert 0 < float(row["train_loss"]) < 20
        assert float(row["val_accuracy"]) * 16 / 100 == pytest.approx(round(float(row["val_accuracy"]) * 16 / 100))
        assert float(row["seconds"]) > 0

    table = result.stdout[result.stdout.index("accuracy %") :]
    for row in rows:
        line = next(line for line in table.splitlines() if line.strip().startswith(row["model"] + "  "))
        assert f"{int(row['parameters']):,}" in line
        assert f"{float(row['train_loss']):.4f}" in line
        assert f"{float(row['val_accuracy']):.2f}" in line
    assert "16 validation images, 6.25 points each: no evidence of which is better" in table


@pytest.mark.slow
def test_learning_works_and_is_drawn(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_example("--out", str(out), "--epochs", "3", "--models", "resnet", "hbnet", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = read_rows(out / "results.csv")
    assert [(row["model"], int(row["epoch"])) for row in rows] == [
        (model, epoch) for model in ("hbnet20_resnet", "hbnet20") for epoch in range(1, 4)
    ]
    for model in ("hbnet20_resnet", "hbnet20"):
        first, *_, last = [row for row in rows if row["model"] == model]
        assert float(last["val_accuracy"]) >= 90
        assert float(last["train_loss"]) < float(first["train_loss"]) / 5
        assert f"{model:<18} epoch  3/3" in result.stdout  # a line an epoch where the output is no terminal

    image = Image.open(out / "curves.png")
    image.load()
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert image.format == "PNG"
    assert min(image.size) >= 600
    for colour in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)):
        assert (pixels == colour).all(1).sum() > 500  # the curve of each model


@pytest.fixture
def main_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Run the example's main in this process, in an empty folder; the random states are put back."""
    module = importlib.import_module("01_train_on_digits")
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> None:
        monkeypatch.setattr(sys, "argv", ["01_train_on_digits.py", "--out", "out", *args])
        module.main()

    yield run
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def test_same_seed_gives_same_numbers(main_in: Callable[..., None]) -> None:
    losses = []
    for seed in ("1", "1", "2"):
        main_in("--epochs", "1", "--limit", "256", "--models", "hbnet", "--seed", seed)
        losses.append(float(read_rows(Path("out/results.csv"))[0]["train_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


@pytest.mark.parametrize("pair", [("hbnet", "resnet"), ("agdnet", "densenet")])
def test_a_pair_sees_the_same_images_from_the_same_weights(
    main_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch, pair: Tuple[str, str]
) -> None:
    module = sys.modules["01_train_on_digits"]
    weights, images = [], []

    def record(model: torch.nn.Module, loader: Any, *_: Any) -> float:
        weights.append({name: value.clone() for name, value in model.named_parameters()})
        images.append(torch.cat([batch for batch, _ in loader]))
        return 1.0

    monkeypatch.setattr(module, "train_epoch", record)
    main_in("--epochs", "1", "--limit", "256", "--models", *pair)
    assert weights[0].keys() >= weights[1].keys()  # AGDNet has α besides
    # HBNet's start is another one by default: the weights of the last normalisation of each transform.
    differ = {name for name, value in weights[1].items() if not torch.equal(weights[0][name], value)}
    assert differ == ({name for name in weights[1] if name.endswith("bn2.weight")} if pair[0] == "hbnet" else set())
    assert images[0].shape == (256, 1, 16, 16)
    assert torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("--epochs", "0", "must be at least 1"),
        ("--epochs", "two", "invalid integer value: 'two'"),
        ("--limit", "63", "must be at least 64"),
        ("--image-size", "7", "must be at least 8"),
        ("--models", "vgg", "invalid choice: 'vgg'"),
    ],
)
def test_bad_arguments_are_named(
    main_in: Callable[..., None], capsys: pytest.CaptureFixture[str], argument: str, value: str, message: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main_in(argument, value)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {argument}" in error
    assert message in error
    assert not Path("out").exists()


# --- 02_your_own_algorithm.py -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_own_algorithms_minimise_are_drawn_and_train(tmp_path: Path) -> None:
    done = run_script("02_your_own_algorithm.py", "--out", "own", "--epochs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    values = {name: float(value) for name, value in re.findall(r"(\w+) +f after 100 steps ([\d.e-]+)", done.stdout)}
    # The optimised method halves Nesterov's worst case, which a quadratic of small curvature comes close to.
    assert 2 * values["OptimizedGradient"] < values["Nesterov"] < values["GradientDescent"]
    assert (tmp_path / "own" / "algorithm.png").stat().st_size > 5_000
    reached = [float(value) for value in re.findall(r"optnet20 of \w+: ([\d.]+) %", done.stdout)]
    assert len(reached) == 2
    assert min(reached) > 40
    betas = [float(value) for value in re.findall(r"layer\d.algorithm.beta = ([\d.]+)", done.stdout)]
    assert len(betas) == 3
    assert all(beta != 1 for beta in betas)


# --- 03_search_on_digits.py -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_spaces_are_searched_retrained_reported_and_resumed(tmp_path: Path) -> None:
    needs("nni")
    options = ["--out", "out", "--limit", "96", "--epochs", "1", "--retrain-epochs", "1"]
    runs = []
    for _ in range(2):
        done = run_script("03_search_on_digits.py", *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        runs.append(done.stdout)
    assert len(re.findall(r"epoch +\d", runs[0])) == 4
    assert "epoch" not in runs[1]  # all was done
    for space in ("hb", "agd"):
        pattern = rf"{space} +test accuracy ([\d.]+) %  cells (\S+)  report (\S+)"
        (top1, cells, page), again = re.search(pattern, runs[0]).groups(), re.search(pattern, runs[1]).groups()
        assert again == (top1, cells, page)
        history = json.loads((tmp_path / "out" / space / "retrain" / "history.json").read_text())
        assert float(top1) == round(history[-1]["test_top1"], 1)
        assert (tmp_path / cells).stat().st_size > 5_000
        assert "<svg" in (tmp_path / page).read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_users_algorithm_is_searched_retrained_and_reported(tmp_path: Path) -> None:
    needs("nni")
    options = ["--out", "out", "--limit", "96", "--epochs", "1", "--retrain-epochs", "1"]
    own = ["--algorithm", "my_algorithms:OptimizedGradient"]
    done = run_script("03_search_on_digits.py", *options, *own, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"OptimizedGradient test accuracy [\d.]+ %  cells \S+  report \S+", done.stdout)
    found = json.loads((tmp_path / "out" / "OptimizedGradient" / "genotype.json").read_text())
    assert (found["version"], found["rule"]) == (2, "my_algorithms:OptimizedGradient")
    assert (tmp_path / "out" / "pattern.png").stat().st_size > 5_000


# --- 04_multi_trial.py ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_strategies_try_networks_and_go_on(tmp_path: Path) -> None:
    needs("nni")
    for trials, expected in (("2", [0, 1] * 2), ("5", [2, 3, 4] * 2)):
        done = run_script("04_multi_trial.py", "--out", "out", "--limit", "80", "--trials", trials, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert [int(index) for index in re.findall(r"trial +(\d+): +[\d.]+ %", done.stdout)] == expected
        assert "One seed and 16 held-out digits, 6.25 points each" in done.stdout
    for name in ("random", "evolution"):
        best = re.search(rf"best: trial (\d+) with ([\d.]+) %, .*{name}", done.stdout)
        assert best is not None
        trials_found = json.loads((tmp_path / "out" / name / "trials.json").read_text())["trials"]
        assert len(trials_found) == 5
        assert float(best[2]) == max(trial["metric"] for trial in trials_found) == trials_found[int(best[1])]["metric"]
        found = json.loads((tmp_path / "out" / name / "genotype.json").read_text())
        assert found == trials_found[int(best[1])]["genotype"]


# --- 06_fine_tune.py --------------------------------------------------------------------------------------------------


def test_weights_help_on_other_images(tmp_path: Path) -> None:
    done = run_script("06_fine_tune.py", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trained, random = map(float, re.findall(r"1 epoch\(s\): ([\d.]+) %", done.stdout))
    assert trained > random + 5
