"""The reproduction's commands: tables 5 and 7, timm's commands for ImageNet, whole rows, and what is refused."""

import dataclasses
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
from extras import needs
from PIL import Image

needs("nni")

import gradients
import rows
import stability
import table4
import table5
import table7
from architecture_table import ROWS, count
from commands import Place, fingerprint, run_missing
from networks import NETWORKS
from training import Recipe

from nni_spaces.runs.search import make_space, start_logit
from optinspired_plugins.cells import genotype as genotypes
from optinspired_plugins.run_folder import lock_folder, read_history

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "reproduce"
SCRIPTS = ROOT.parent / "shared" / "timm"
RESULTS = ROOT / "docs" / "results"
README = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def data(coloured_images):
    return coloured_images


# --- Table 5 ----------------------------------------------------------------------------------------------------------


def test_table5_counts_every_row(tmp_path):
    table5.main(["--results", str(tmp_path)])
    found = {row["name"]: row for row in rows.read_rows(tmp_path / "table5.csv")}
    expected = {row.paper_name: row for row in ROWS if row.macs}
    assert found.keys() == expected.keys()
    for name in ("HB-Net-34", "AGD-Net-121"):
        counted = int(found[name]["parameters"]), int(found[name]["macs"])
        assert counted == count(expected[name].model, **expected[name].kwargs)
    committed = rows.read_rows(RESULTS / "table5.csv")
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


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradients_of_the_first_step(data, tmp_path, monkeypatch):
    arguments = ["--data", data, "--results", str(tmp_path), "--accelerator", "cpu", "--seeds", "1"]
    for _ in range(2):
        gradients.main([*arguments, "--networks", "hbnet20", "resnet20"])
        monkeypatch.setattr(gradients, "run", lambda *_: pytest.fail("ran again"))
    trained, _ = rows.read_rows(tmp_path / "gradients.csv")
    assert float(trained["smallest_norm"]) <= float(trained["last_norm"]) <= float(trained["largest_norm"])
    assert float(trained["smallest_norm"]) > 0
    assert len(set(gradients.CHOICES)) == 3 * 5
    assert (trained["transforms"], trained["batch_size"]) == ("9", "64")
    assert trained["command"].endswith("gradients.py --data images.npz --networks hbnet20 --seeds 1")


# --- Table 7 ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_searches_are_retrained_kept_and_named(data, tmp_path, monkeypatch):
    sizes = "--images 128 --search-epochs 2 --cells 3 --channels 2 --trials 2 --trial-epochs 1"
    sizes += " --retrain-epochs 1 --retrain-cells 3 --width 2"
    places = ["--out", f"{tmp_path}/runs", "--results", f"{tmp_path}", "--accelerator", "cpu"]
    methods = ["hb-dagger", "agd-warm-up", "random-hb"]
    for _ in range(2):
        table7.main(["--data", data, "--methods", *methods, "--seeds", "3", *sizes.split(), *places])
        monkeypatch.setattr(table7.Experiment, "run", lambda self: pytest.fail("ran again"))
    found = rows.read_rows(tmp_path / "table7.csv")
    assert [row["method"] for row in found] == methods
    monkeypatch.setattr(genotypes, "FOLDER", tmp_path / "genotypes")
    for row, rule in zip(found, ("hb", "agd", "hb")):
        assert genotypes.load_genotype(row["genotype"]).rule == rule
        model = timm.create_model("cellnet_cifar", genotype=row["genotype"], cells=3, channels=2)
        assert sum(p.numel() for p in model.parameters()) == int(row["parameters"])
        assert 0 < float(row["search_seconds"]) < float(row["seconds"])
        words = shlex.split(row["command"])
        assert words[:4] == ["python", "examples/reproduce/table7.py", "--data", "images.npz"]
        again = dict(zip(words[4::2], words[5::2]))
        assert (again.pop("--methods"), again.pop("--seeds")) == (row["method"], "3")
        assert again == {f"--{name.replace('_', '-')}": row[name] for name in table7.asdict(table7.Budget())}
        timed = read_history(tmp_path / "runs" / f"{row['method']}-seed3" / "darts")
        assert float(row["darts_seconds"]) == pytest.approx(2 * timed[1]["seconds"], abs=0.06), "two epochs, all images"
    settings = json.loads((tmp_path / "runs" / "agd-warm-up-seed3" / "settings.json").read_text())
    assert (settings["space"], settings["warmup_epochs"], settings["epochs"]) == ("agd", 1, 2)
    normal = genotypes.load_genotype("cifar10_hb_dagger_seed3").normal
    assert all([edge.operation for edge in node[1:]] == ["skip_connect", "neg_skip_connect"] for node in normal)
    trials = json.loads((tmp_path / "runs" / "random-hb-seed3" / "trials.json").read_text())["trials"]
    assert len(trials) == 2
    with pytest.raises(
        ValueError, match=r"must be a JSON file or one of .*cifar10_agd_warm_up_seed3, cifar10_hb_dagger_seed3"
    ):
        genotypes.load_genotype("cifar10_agd_seed4")


def test_controls_leave_out_what_their_names_say(tmp_path):
    def candidates(method):
        place = Place(tmp_path, tmp_path / "table7.csv", {}, "cpu")
        settings = table7.Experiment(method, 3, table7.Budget(channels=2), "cifar10", place, tmp_path).settings
        return {label: choice.values for label, choice in make_space(settings, 10, 3).simplify().items()}

    for method in ("hb", "agd"):
        plain, control = candidates(method), candidates(f"{method}-no-negative")
        for label, names in plain.items():
            assert [name for name in names if name != "neg_skip_connect"] == control[label]
    assert "neg_skip_connect" in candidates("random-hb")["normal/op_2_0"]
    plain, control = candidates("random-hb"), candidates("random-hb-dagger")
    fixed = {"1": ["skip_connect"], "2": ["neg_skip_connect"]}
    assert {label: fixed.get(label[-1], names) for label, names in plain.items()} == control


def test_hb_dagger_starts_5_ahead_or_as_far_as_alpha_travels(tmp_path):
    place = Place(tmp_path, tmp_path / "table7.csv", {}, "cpu")
    for method, logit in (("hb-dagger", 5.0), ("hb-dagger-scaled", 2.56)):
        settings = table7.Experiment(method, 3, table7.Budget(), "cifar10", place, tmp_path).settings
        assert start_logit(settings, 128) == pytest.approx(logit)


@pytest.mark.parametrize(("images", "timed", "times"), [(4096, 1024, 16), (256, 128, 8)])
def test_the_unit_of_cost_is_the_darts_search_of_that_machine(images, timed, times, tmp_path, monkeypatch):
    """Whatever is searched: the second epoch of a quarter of the images, times the quarters and the epochs."""
    found = []
    monkeypatch.setattr(table7, "search", lambda settings, *_, **__: found.append(settings))
    monkeypatch.setattr(table7, "read_history", lambda folder: [{"seconds": 9.0}, {"seconds": 3.0}])
    budget, place = table7.Budget(images=images), Place(tmp_path, tmp_path / "table7.csv", {}, "cpu")
    methods = ("agd-warm-up", "hb-dagger", "random-hb", "random-hb-dagger", "agd-no-negative", "ogm")
    for method in methods:
        experiment = table7.Experiment(method, 3, budget, "cifar10", place, tmp_path)
        assert experiment.time_darts() == 3.0 * times
    darts = table7.Experiment("darts", 3, budget, "cifar10", place, tmp_path).settings
    assert found == [dataclasses.replace(darts, limit=timed, epochs=2)] * len(methods)


def test_the_genotypes_of_the_package_are_those_of_the_results():
    found = {row["genotype"]: row for row in rows.read_rows(RESULTS / "table7.csv")}
    assert set(genotypes.genotype_names()) - genotypes.GENOTYPES.keys() == found.keys() != set()
    for name, row in found.items():
        sizes = dict(cells=int(row["retrain_cells"]), channels=int(row["width"]))
        model = timm.create_model("cellnet_cifar", genotype=name, device="meta", **sizes)
        assert sum(p.numel() for p in model.parameters()) == int(row["parameters"])
        counts = {field: int(row[field]) for field in ("normal_edges", "normal_poolings")}
        assert table7.count_poolings(genotypes.load_genotype(name)) == counts


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


def test_a_row_takes_the_place_of_that_with_its_key(tmp_path):
    path = tmp_path / "rows.csv"
    rows.add_rows(path, [dict(a=1, b=2, c=3), dict(a=1, b=3, c=4)], ["a", "b"])
    rows.add_rows(path, [dict(a=1, b=3, c=5), dict(a=2, b=3, c=6)], ["a", "b"])
    assert [list(row.values()) for row in rows.read_rows(path)] == [["1", "2", "3"], ["1", "3", "5"], ["2", "3", "6"]]


def test_the_fingerprint_is_of_the_images_and_not_of_the_file(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"x_{split}": rng.integers(0, 255, (8, 32, 32, 3), dtype=np.uint8) for split in ("train", "test")}
    labels = {f"y_{split}": np.arange(8) % 4 for split in ("train", "test")}
    np.savez(tmp_path / "a.npz", **arrays, **labels)
    np.savez_compressed(tmp_path / "b.npz", **labels, **arrays)
    arrays["x_test"][0, 0, 0, 0] += 1
    np.savez(tmp_path / "c.npz", **arrays, **labels)
    first, same, other = (fingerprint(str(tmp_path / f"{name}.npz")) for name in "abc")
    assert first == same != other


@pytest.mark.parametrize(
    ("main", "table", "arguments", "shared", "message"),
    [
        (table4.main, "table4", ["--networks", "hbnet20", "--epochs", "1"], {}, "rows of data_sha256=0123"),
        (stability.main, "stability", [], {}, "rows of data_sha256=0123"),
        (table7.main, "table7", [], {"images": 128}, "rows of images=128, must be another folder for 4096"),
    ],
)
def test_a_folder_of_results_has_one_set_of_images_and_one_budget(
    main, table, arguments, shared, message, data, tmp_path, capsys
):
    budget = table7.asdict(table7.Budget()) if table == "table7" else {}
    rows.add_rows(tmp_path / f"{table}.csv", [{**budget, **shared, "data_sha256": "0123"}], ["data_sha256"])
    with pytest.raises(SystemExit):
        main(["--data", data, "--results", str(tmp_path), "--out", str(tmp_path / "runs"), *arguments])
    assert f"{table}.csv: has {message}" in capsys.readouterr().err
    assert [path.suffix for path in tmp_path.iterdir() if path.name != f".{table}.csv.lock"] == [".csv"]


def test_rows_of_other_fields_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    rows.add_rows(path, [dict(a=1, b=2)], ["a"])
    with pytest.raises(ValueError, match="has rows of other fields than a, c"):
        rows.add_rows(path, [dict(a=2, c=3)], ["a"])
    rows.add_rows(path, [dict(b=3, a=2)], ["a"])
    assert path.read_text() == "a,b\n1,2\n2,3\n", "the order of the fields is the file's"
    path.write_text("a,b\n1\n")
    with pytest.raises(ValueError, match="line 2: does not have the fields of the first line"):
        rows.read_rows(path)


def test_a_run_of_another_process_is_left_to_it(tmp_path, capsys):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()

    def hold():
        with lock_folder(tmp_path / "a"):
            held.set()
            done.wait(60)

    process = context.Process(target=hold)
    process.start()
    held.wait(60)

    def run(name):
        with lock_folder(tmp_path / name):
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
        (stability.main, ["--lr=-0.1"], "argument --lr: -0.1: must be at least 0, and finite"),
        (stability.main, ["--lr", "nan"], "argument --lr: nan: must be at least 0, and finite"),
        (table7.main, ["--methods", "enas"], "invalid choice: 'enas'"),
        (table7.main, ["--data", "none"], "data='none': must be"),
        (table7.main, ["--images", "100"], "100: must be at least 128"),
        (table7.main, ["--alpha-lr", "inf"], "argument --alpha-lr: inf: must be at least 0, and finite"),
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
    assert sum(words[1].endswith("page.py") for words in lines) == len(parts) == 23
    ran = {Path(words[1]).stem: [] for words in lines}
    for words in lines:
        ran[Path(words[1]).stem].append(words[2:])
    assert ran.keys() == {"table4", "table5", "table7", "stability", "gradients", "page"}
    assert {words[words.index("--results") + 1] for words in lines} == {"runs/reproduce/results"}
    planned = [recipe for words in ran["table4"] for recipe in table4.parse_args(words)[0]]
    assert len(set(planned)) == len(planned) == 12 + 6 + 6 + 12 + 3 + 6 + 6 + 3 + 6 + 18 + 4 + 20
    assert {(recipe.epochs, recipe.train_images) for recipe in planned} == {(10, 16_000)}
    assert len(ran["stability"]) == 4 + 1 + 12 + 11
    steps = [words[words.index("--networks") + 1 :] for words in ran["stability"] if "--networks" in words]
    optnets = {name for name in NETWORKS if name.startswith("optnet")}
    assert {name for names in steps for name in names} & optnets == optnets
    methods = [method for words in ran["table7"] for method in words[words.index("--methods") + 1 :]]
    assert sorted(methods) == sorted(table7.METHODS)
    assert {words[words.index("--genotypes") + 1] for words in ran["table7"]} == {"runs/reproduce/results/genotypes"}

    (tmp_path / "log").unlink()
    subprocess.run([*script, data], env=env, check=True)
    pages = (tmp_path / "log").read_text().count("page.py")
    assert pages == len(parts) - README.count(", not by default |") == 16, "the README says what runs by default"

    (tmp_path / "log").unlink()
    subprocess.run([*script, data, "search"], env={**env, "RESULTS": "a", "GENOTYPES": "b"}, check=True)
    assert re.findall(r"--(?:results|genotypes) (\w+)", (tmp_path / "log").read_text()) == ["a", "b", "a"]

    done = subprocess.run([*script, data, "table6"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no part table6" in done.stderr
    assert subprocess.run(script, env=env, capture_output=True).returncode != 0
