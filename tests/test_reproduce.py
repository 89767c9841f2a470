"""The reproduction's trainings: the paper's recipe, resumed as if uninterrupted, and whole rows of results."""

import json
import math
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

pytest.importorskip("nni", reason="the extra 'nni' is not installed")

import rows
import stability
import table4
import table5
import table7
from architecture_table import ROWS, count
from commands import run_missing
from networks import NETWORKS, count_network, learned_coefficients
from training import Recipe, make_loaders, make_optimizer, train

from nni_spaces.data import read_images
from nni_spaces.run_folder import locked, read_history
from optinspired_plugins import genotype as genotypes

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "reproduce"
SCRIPTS = ROOT.parent / "shared" / "timm"
README = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise around a colour a class: 160 images to train on and 64 to test on."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (10, 1, 1, 3))
    path = tmp_path_factory.mktemp("data") / "images.npz"
    arrays = {}
    for split, size in (("train", 160), ("test", 64)):
        labels = np.arange(size) % 10
        images = colours[labels] + rng.integers(-40, 40, (size, 32, 32, 3))
        arrays |= {f"x_{split}": images.astype(np.uint8), f"y_{split}": labels.astype(np.int64)}
    np.savez(path, **arrays)
    return str(path)


def tiny(data, network="hbnet20", **kwargs):
    return Recipe(network, data, **{"train_images": 96, "test_images": 64, "epochs": 2, "batch_size": 32, **kwargs})


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["hbnet56-learn-beta", "agdnet40"])
def test_full_is_the_papers_recipe(network, data):
    """§8.1: 300 epochs of batches of 64, 0.1 divided by 10 at 50 % and 75 %, Nesterov momentum 0.9, decay 1e-4."""
    _, (recipe,) = table4.parse_args(["--networks", network, "--full", "--seeds", "0", "--data", data])
    model = NETWORKS[network].build(10)
    optimizer, schedule = make_optimizer(model, recipe)
    rates = []
    for epoch in range(recipe.epochs):
        schedule.step(epoch)
        rates.append({group["lr"] for group in optimizer.param_groups})
    expected = [0.1] * 150 + [0.01] * 75 + [0.001] * 75
    assert [rate for (rate,) in rates] == pytest.approx(expected)
    assert type(optimizer) is torch.optim.SGD
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    for group in optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.9, True, 0)
        for parameter in group["params"]:
            spared = names[parameter].rpartition(".")[2] in ("alpha", "beta1", "beta2")
            assert group["weight_decay"] == (0 if spared else 1e-4), names[parameter]
    assert (recipe.batch_size, recipe.train_images, recipe.test_images) == (64, None, None)
    assert (recipe.augment, recipe.padding) == (True, 4)


@pytest.mark.parametrize(("epochs", "expected"), [(10, [5, 8]), (12, [6, 9]), (300, [150, 225])])
def test_a_shortened_schedule_falls_at_the_same_shares(epochs, expected):
    recipe = Recipe("hbnet20", epochs=epochs)
    optimizer, schedule = make_optimizer(torch.nn.Linear(1, 1), recipe)
    rates = [0.1]
    for epoch in range(epochs):
        schedule.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    falls = [epoch for epoch in range(epochs) if rates[epoch + 1] < 0.5 * rates[epoch]]
    assert falls == expected == recipe.milestones


@pytest.mark.parametrize("augment", [True, False])
def test_every_image_once_an_epoch_as_the_paper_augments_it(data, augment):
    """Normalised, padded by 4 with 0, cropped to 32 × 32, mirrored or not."""
    images, test = read_images(data, 8), read_images(data, 4, "test")
    loader, (test_loader, seen) = make_loaders(images, test, tiny(data, augment=augment, batch_size=3))
    assert len(loader) == 3  # the last, smaller batch is kept
    pixels = images.images.double()
    deviation = pixels.std((0, 2, 3), keepdim=True)
    normalised = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / deviation
    padded = F.pad(normalised, [4] * 4).float()
    crops = padded.unfold(2, 32, 1).unfold(3, 32, 1).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    crops = torch.cat([crops, crops.flip(-1)], 1)  # (image, way, channel, 32, 32)
    seen_ways = set()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        labels = []
        for batch, batch_labels in loader:
            labels += batch_labels.tolist()
            for image, label in zip(batch, batch_labels):  # a class an image here
                ways = (crops[label] - image).abs().amax((1, 2, 3)) < 1e-4
                assert ways.sum() == 1
                seen_ways.add(int(ways.nonzero()))
        assert sorted(labels) == sorted(images.labels.tolist())
    middle = 4 * 9 + 4
    assert (seen_ways == {middle}) == (not augment)
    assert ({way >= 81 for way in seen_ways} == {True, False}) == augment
    again = torch.cat([batch for batch, _ in seen])
    torch.testing.assert_close(again, normalised[:4].float(), rtol=0, atol=1e-4)
    expected = (test.images.double() - pixels.mean((0, 2, 3), keepdim=True)) / deviation
    torch.testing.assert_close(torch.cat([b for b, _ in test_loader]), expected.float(), rtol=0, atol=1e-4)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [20, 56])
def test_controls_have_resnets_size(depth):
    sizes = {name: count_network(NETWORKS[name], 10) for name in NETWORKS if f"net{depth}" in name}
    assert len(sizes) == 6
    learned = sizes.pop(f"hbnet{depth}-learn-beta")
    assert set(sizes.values()) == {sizes[f"resnet{depth}"]}
    assert learned[0] - sizes[f"resnet{depth}"][0] == 2 * 3 * ((depth - 2) // 6 - 1)


def test_pre_activation_resnet_is_that_of_its_paper():
    """T is conv(relu(bn(conv(relu(bn(x)))))), the shortcut padded with zeros, one normalisation more at the end."""
    model = timm.create_model("preact20", num_classes=7).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
    x = image = torch.randn(2, 3, 32, 32)
    weights = dict(model.named_parameters()) | dict(model.named_buffers())

    def activated(x, name):
        parts = (weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts).relu()

    x = F.conv2d(x, weights["stem.conv.weight"], padding=1)
    for stage in range(3):
        for block in range(3):
            name, stride = f"stages.{stage}.blocks.{block}", 2 if stage and not block else 1
            t = F.conv2d(activated(x, f"{name}.norm1"), weights[f"{name}.conv1.weight"], padding=1, stride=stride)
            t = F.conv2d(activated(t, f"{name}.norm2"), weights[f"{name}.conv2.weight"], padding=1)
            # The shortcut of a block that changes the shape takes the activated input, as in timm.
            x = x if stride == 1 else activated(x, f"{name}.norm1")[:, :, ::2, ::2]
            missing = t.shape[1] - x.shape[1]
            x = t + F.pad(x, [0, 0, 0, 0, missing // 2, missing - missing // 2])
    features = activated(x, "norm").mean((2, 3))
    expected = features @ weights["head.fc.weight"].flatten(1).T + weights["head.fc.bias"]
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-4)


def test_learned_coefficients_are_all_of_them():
    for network, expected in (("hbnet20-learn-beta", 12), ("agdnet22", 63), ("resnet20", 0)):
        found = learned_coefficients(NETWORKS[network].build(10).state_dict())
        assert len(found) == expected
        assert len({(row["layer"], row["coefficient"], row["index"]) for row in found}) == expected
        assert {float(row["value"]) for row in found} <= {1.0, -1.0}


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_training_that_goes_on_gives_what_an_uninterrupted_one_gives(data, tmp_path):
    recipe = tiny(data, "hbnet20-learn-beta", epochs=3)
    expected, state = train(recipe, tmp_path / "whole", "cpu")

    batches = []

    def interrupt():
        batches.append(1)
        if len(batches) == 5:  # in the second epoch
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        train(recipe, tmp_path / "parts", "cpu", on_batch=interrupt)
    epochs = []
    measured, resumed = train(recipe, tmp_path / "parts", "cpu", on_epoch=lambda entry: epochs.append(entry["epoch"]))
    assert epochs == [1, 2]
    rates = [entry["lr"] for entry in read_history(tmp_path / "parts")]
    assert rates == pytest.approx([0.1, 0.1, 0.01])
    assert all(torch.equal(state[name], value) for name, value in resumed.items())
    times = {"seconds", "resumed"}
    assert {k: v for k, v in measured.items() if k not in times} == {
        k: v for k, v in expected.items() if k not in times
    }
    with pytest.raises(ValueError, match="holds a run with network='hbnet20-learn-beta'"):
        train(tiny(data, "hbnet20", epochs=3), tmp_path / "parts", "cpu")


def test_what_is_measured_is_what_the_trained_network_does(data, tmp_path):
    recipe = tiny(data, augment=False)
    measured, state = train(recipe, tmp_path, "cpu")
    model = NETWORKS["hbnet20"].build(10)
    model.load_state_dict(state)
    model.eval()
    images, test = read_images(data, 96), read_images(data, 64, "test")
    for name, loader in zip(("test", "fit"), make_loaders(images, test, recipe)[1]):
        x, y = (torch.cat(parts) for parts in zip(*loader))
        with torch.no_grad():
            logits = model(x)
        assert len(y) == 64
        assert measured[f"{name}_loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-3)
        assert measured[f"{name}_error"] == pytest.approx(100 * (logits.argmax(1) != y).float().mean().item(), abs=1e-3)


def run_table4(data, folder, *more):
    options = ["--networks", "hbnet20", "agdnet22", "--epochs", "1", "--train-images", "64", "--test-images", "64"]
    places = ["--out", f"{folder}/runs", "--results", f"{folder}/results/table4.csv", "--accelerator", "cpu"]
    table4.main(["--data", data, "--seeds", "0", *options, *places, *more])
    return rows.read_rows(folder / "results" / "table4.csv")


def test_table4_writes_whole_rows_and_repeats_none(data, tmp_path, monkeypatch, capsys):
    found = run_table4(data, tmp_path)
    assert [row["network"] for row in found] == ["hbnet20", "agdnet22"]
    for row in found:
        assert 0 <= float(row["test_error"]) <= 100
        assert float(row["seconds"]) > 0
        assert (row["test_images"], row["diverged"], row["threads"]) == ("64", "0", str(torch.get_num_threads()))
        assert row["torch"] == torch.__version__.split("+")[0]
    assert (int(found[0]["parameters"]), int(found[0]["macs"])) == count("hbnet20")
    # The command of a row makes that row.
    words = shlex.split(found[1]["command"])
    assert words[:2] == ["python", "examples/reproduce/table4.py"]
    again = [data if word == "images.npz" else word for word in words[2:]]
    _, (recipe,) = table4.parse_args(again)
    assert {k: str(v) for k, v in table4.identity(recipe).items()}.items() <= found[1].items()

    learned = rows.read_rows(tmp_path / "results" / "coefficients.csv")
    assert {(row["network"], row["coefficient"]) for row in learned} == {("agdnet22", "alpha")}
    assert len(learned) == 63

    monkeypatch.setattr(table4, "train", lambda *_: pytest.fail("trained again"))
    assert run_table4(data, tmp_path) == found
    assert capsys.readouterr().out.count("has its row") == 2


def test_a_run_that_diverges_is_a_row(data, tmp_path):
    recipe = tiny(data, lr=1e12)
    with pytest.raises(FloatingPointError, match="must be finite"):
        train(recipe, tmp_path / "alone", "cpu")
    table = table4.Table(tmp_path / "runs", tmp_path / "table4.csv", "cpu")
    assert table.run(recipe) == "diverged"
    (row,) = rows.read_rows(table.results)
    assert (row["diverged"], row["test_error"], row["train_loss"]) == ("1", "", "")


# --- stability --------------------------------------------------------------------------------------------------------


def test_first_steps_are_written_by_run_and_by_step(data, tmp_path):
    places = ["--out", f"{tmp_path}/runs", "--results", f"{tmp_path}/stability.csv"]
    options = ["--networks", "hbnet20", "resnet20", "--seeds", "0", "--steps", "4"]
    for _ in range(2):
        stability.main(["--data", data, *options, *places])
    summary, curves = (rows.read_rows(tmp_path / f"stability{name}.csv") for name in ("", "_curves"))
    assert [row["network"] for row in summary] == ["hbnet20", "resnet20"]
    assert [(row["network"], row["step"]) for row in curves] == [
        (network, str(step)) for network in ("hbnet20", "resnet20") for step in range(4)
    ]
    for row in summary:
        steps = [step for step in curves if step["network"] == row["network"]]
        assert float(row["first_loss"]) == pytest.approx(float(steps[0]["loss"]), rel=1e-3)
        norms = [float(step["grad_norm"]) for step in steps]
        assert float(row["largest_grad_norm"]) == pytest.approx(max(norms), rel=1e-3)


def test_the_gradient_is_measured_and_not_clipped(data):
    """Two steps of plain SGD by hand, from the same weights and images."""
    recipe = Recipe("hbnet20", data, batch_size=32)
    made, _ = stability.first_steps(recipe, 2)
    torch.manual_seed(0)
    model = NETWORKS["hbnet20"].build(10).to(memory_format=torch.channels_last)
    images = read_images(data, 64)
    loader, _ = make_loaders(images, images, recipe)
    optimizer, _ = make_optimizer(model, recipe)
    for (x, y), step in zip(loader, made):
        loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        optimizer.step()
        assert step == pytest.approx((loss.item(), norm), rel=1e-4)


def test_a_run_that_is_not_finite_ends(data):
    made, classes = stability.first_steps(Recipe("resnet20", data, lr=1e12), 8)
    assert len(made) < 8
    row = stability.summarise(made, 8, classes)
    assert (row["diverged"], row["stalled"], row["last_loss"]) == (1, 0, "")


def test_stalled_is_no_better_than_guessing():
    guess = math.log(10)
    steps = [stability.Step(guess + 0.1, 1.0)] * 19 + [stability.Step(guess - 0.01, 1.0)]
    assert stability.summarise(steps, 20, 10)["stalled"] == 1
    assert stability.summarise([*steps[:18], *steps[-1:] * 2], 20, 10)["stalled"] == 0
    assert stability.summarise(steps, 20, 10)["steps_to_better_than_guessing"] == 19


# --- Table 5 ----------------------------------------------------------------------------------------------------------


def test_table5_counts_every_row(tmp_path):
    table5.main(["--results", str(tmp_path / "table5.csv")])
    found = {row["name"]: row for row in rows.read_rows(tmp_path / "table5.csv")}
    expected = {row.paper_name: row for row in ROWS if row.macs}
    assert found.keys() == expected.keys()
    for name in ("HB-Net-34", "AGD-Net-121"):
        counted = int(found[name]["parameters"]), int(found[name]["macs"])
        assert counted == count(expected[name].model, **expected[name].kwargs)
    committed = rows.read_rows(rows.RESULTS / "table5.csv")
    assert {(r["name"], r["parameters"], r["macs"]) for r in committed} == {
        (r["name"], r["parameters"], r["macs"]) for r in found.values()
    }


IMAGENET = re.findall(r"^((?:torchrun --nproc-per-node 4|python) train\.py imagenet .*)$", README, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPTS.exists(), reason="timm's scripts are not beside the repository")
@pytest.mark.parametrize("command", IMAGENET, ids=["torchrun", "python"])
def test_the_imagenet_commands_run_on_100_images(command, tmp_path):
    """One process where there are no GPUs: timm's script shares the work of none but those."""
    rng = np.random.default_rng(0)
    for split, size in (("train", 80), ("val", 20)):
        for i in range(size):
            path = tmp_path / "imagenet" / split / f"class{i % 10}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    processes, device = max(torch.cuda.device_count(), 1), "cuda" if torch.cuda.is_available() else "cpu"
    launcher = f"-m torch.distributed.run --nproc-per-node {processes}" if "torchrun" in command else ""
    command = f"{sys.executable} {launcher} {SCRIPTS}/{command[command.index('train.py') :]}"
    small = f"--epochs 1 -b 10 -j 0 --img-size 64 --device {device} --output out --experiment run"
    done = subprocess.run(
        shlex.split(f"{command} {small}"),
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert (tmp_path / "out" / "run" / "summary.csv").read_text().count("\n") == 2
    arguments = (tmp_path / "out" / "run" / "args.yaml").read_text()
    for line in ("lr: 0.1", "weight_decay: 0.0001", "decay_epochs: 30", "smoothing: 0.0", "warmup_epochs: 0"):
        assert line in arguments


# --- Table 7 ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_searches_are_retrained_kept_and_named(data, tmp_path, monkeypatch):
    sizes = "--images 128 --search-epochs 1 --cells 3 --channels 2 --trials 2 --trial-epochs 1"
    sizes += " --retrain-epochs 1 --retrain-cells 3 --width 2"
    places = ["--out", f"{tmp_path}/runs", "--results", f"{tmp_path}/table7.csv", "--accelerator", "cpu"]
    places += ["--genotypes", f"{tmp_path}/genotypes"]
    methods = ["hb-dagger", "agd", "random-hb"]
    for _ in range(2):
        table7.main(["--data", data, "--methods", *methods, "--seeds", "3", *sizes.split(), *places])
        monkeypatch.setattr(table7.Experiment, "run", lambda self: pytest.fail("ran again"))
    found = rows.read_rows(tmp_path / "table7.csv")
    assert [row["method"] for row in found] == methods
    monkeypatch.setattr(genotypes, "FOUND", tmp_path / "genotypes")
    for row, rule in zip(found, ("hb", "agd", "hb")):
        assert genotypes.load_genotype(row["genotype"]).rule == rule
        model = timm.create_model("cellnet_cifar", genotype=row["genotype"], cells=3, channels=2)
        assert sum(p.numel() for p in model.parameters()) == int(row["parameters"])
        assert 0 < float(row["search_seconds"]) < float(row["seconds"])
    normal = genotypes.load_genotype("cifar10_hb_dagger_seed3").normal
    assert all([edge.operation for edge in node[1:]] == ["skip_connect", "neg_skip_connect"] for node in normal)
    trials = json.loads((tmp_path / "runs" / "random-hb-seed3" / "trials.json").read_text())["trials"]
    assert len(trials) == 2
    with pytest.raises(ValueError, match=r"must be a JSON file or one of .*cifar10_agd_seed3, cifar10_hb_dagger_seed3"):
        genotypes.load_genotype("cifar10_agd_seed4")


def test_every_found_genotype_of_the_package_makes_a_network():
    for name in genotypes.found_names():
        timm.create_model("cellnet_cifar", genotype=name, device="meta")


# --- rows and commands ------------------------------------------------------------------------------------------------


def _add(path, start, barrier):
    barrier.wait(60)
    for i in range(start, start + 20):
        rows.add_rows(path, [dict(key=i, value=f"of {i}")], ["key"])


def test_several_processes_lose_no_row(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    workers = [context.Process(target=_add, args=(path, start, barrier)) for start in (0, 20, 40)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sorted(int(row["key"]) for row in rows.read_rows(path)) == list(range(60))


def test_rows_of_other_fields_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    rows.add_rows(path, [dict(a=1, b=2)], ["a"])
    with pytest.raises(ValueError, match="has rows of other fields than a, c"):
        rows.add_rows(path, [dict(a=2, c=3)], ["a"])
    path.write_text("a,b\n1\n")
    with pytest.raises(ValueError, match="row 1: has not the fields of the first line"):
        rows.read_rows(path)


def test_a_run_of_another_process_is_left_to_it(tmp_path, capsys):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()

    def hold():
        with locked(tmp_path / "a"):
            held.set()
            done.wait(60)

    process = context.Process(target=hold)
    process.start()
    held.wait(60)

    def run(name):
        with locked(tmp_path / name):
            return "ran"

    run_missing(["a", "b"], str, lambda name: False, run)
    done.set()
    process.join(60)
    output = capsys.readouterr()
    assert output.out == "b: ran\n"
    assert "another process is running there" in output.err


def test_other_errors_end_the_command():
    def fail(job):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run_missing(["a"], str, lambda name: False, fail)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (table4.main, ["--networks", "vgg", "--epochs", "1"], "invalid choice: 'vgg'"),
        (table4.main, ["--networks", "hbnet20"], "argument --epochs: must be given, or --full"),
        (table4.main, ["--networks", "hbnet20", "--full", "--epochs", "2"], "argument --full: is the paper's recipe"),
        (table4.main, ["--networks", "hbnet20", "--epochs", "0"], "0: must be at least 1"),
        (
            table4.main,
            ["--networks", "hbnet20", "--epochs", "1", "--data", "none"],
            "data='none': must be 'digits', 'cifar10'",
        ),
        (stability.main, ["--data", "none.npz"], "data='none.npz': must be"),
        (stability.main, ["--steps", "1"], "1: must be at least 2"),
        (table7.main, ["--methods", "enas"], "invalid choice: 'enas'"),
        (table7.main, ["--data", "none"], "data='none': must be"),
        (table7.main, ["--images", "100"], "100: must be at least 128"),
    ],
)
def test_bad_arguments_are_named(main, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("network", "vgg", "network='vgg': must be one of resnet20"),
        ("epochs", 0, "epochs=0: must be an integer ≥ 1"),
        ("lr", math.nan, "lr=nan: must be ≥ 0"),
        ("train_images", 1, "train_images=1: must be an integer ≥ 2"),
    ],
)
def test_bad_settings_are_named(setting, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe(**{"network": "hbnet20", setting: value})


def test_the_plan_is_made_of_commands_that_are_understood(data, tmp_path, monkeypatch):
    """run.sh with a python that writes down what it is asked to do; then the commands' own parsers read it."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$OMP_NUM_THREADS $*" >> {tmp_path}/log\n')
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", str(FOLDER / "run.sh")]
    parts = re.findall(r"^\| `([\w-]+)`", README, re.MULTILINE)
    subprocess.run([*script, data, *parts], env=env, check=True)
    lines = [shlex.split(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {words[0] for words in lines} == {"1"}
    assert sum(words[1].endswith("page.py") for words in lines) == len(parts) == 14
    ran = {Path(words[1]).stem: [] for words in lines}
    for words in lines:
        ran[Path(words[1]).stem].append(words[2:])
    assert ran.keys() == {"table4", "table5", "table7", "stability", "page"}
    planned = [recipe for words in ran["table4"] for recipe in table4.parse_args(words)[1]]
    assert len(set(planned)) == len(planned) == 12 + 6 + 6 + 12 + 3 + 6 + 3 + 6 + 12 + 4
    assert {(recipe.epochs, recipe.train_images) for recipe in planned} == {(10, 16_000)}
    methods = [method for words in ran["table7"] for method in words[words.index("--methods") + 1 :]]
    assert sorted(methods) == sorted(table7.METHODS)

    done = subprocess.run([*script, data, "table6"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no part table6" in done.stderr
    assert subprocess.run(script, env=env, capture_output=True).returncode != 0
