"""Every command that the program prints runs as it is printed, from another folder."""

import ast
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import warm
from extras import needs

needs("nni", "typer", "rich", "matplotlib")

from test_cli import environment, run
from test_report import Page

from nni_spaces import SearchSettings
from nni_spaces import cli as nni_cli
from optinspired_plugins import next_steps
from optinspired_plugins.cells.genotype import GENOTYPES
from optinspired_plugins.report.page import write_report

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
TINY = ["--epochs", "1", "--cells", "3", "--accelerator", "cpu"]


def shell(text, folder):
    """Run a line as a shell does, in a folder that is made for it."""
    folder.mkdir(exist_ok=True)
    script = f'optinspired() {{ printf "%s\\0" "$@"; }}; {text}'
    words = subprocess.run(["sh", "-c", script], cwd=folder, capture_output=True, text=True, check=True).stdout
    return run(*words.split("\0")[:-1], folder=folder).stdout


def after(label, text):
    """The rest of the line that begins with a label."""
    (found,) = re.findall(f"^{label}: (.*)$", text, flags=re.MULTILINE)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A search of own images by a relative path, and what it and the training that it names have printed."""
    folder = tmp_path_factory.mktemp("it's $HOME")
    rng = np.random.default_rng(0)
    parts = {"train": 40, "test": 12}
    arrays = {f"x_{part}": rng.integers(0, 256, (n, 12, 12, 1), np.uint8) for part, n in parts.items()}
    np.savez(folder / "my images.npz", **arrays, **{f"y_{part}": np.arange(n) % 2 for part, n in parts.items()})
    given = ["--data", "my images.npz", "--limit", "36", "--padding", "1", "--seed", "3"]
    small = ["--batch-size", "8", "--channels", "2", "--nodes", "1"]
    searched = run("search", "--out", "runs/[0] :cat:", *given, *small, *TINY, folder=folder).stdout
    out = folder / "runs" / "[0] :cat:"
    command = after("Train it", searched)
    retrained = shell(f"{command} {shlex.join([*TINY, '--channels', '2'])}", folder / "elsewhere")
    return out, command, retrained


def test_the_command_after_a_search_trains_on_the_same_images(trained):
    out, command, _ = trained
    given = ["--data", f"{out.parents[1]}/my images.npz", "--limit", "36", "--padding", "1", "--seed", "3"]
    machine = ["--accelerator", "cpu"]
    words = ["optinspired", "retrain", f"{out}/genotype.json", *given, *machine, "--batch-size", "36"]
    assert shlex.split(command) == words
    settings = json.loads((out / "retrain" / "settings.json").read_text())
    assert (settings["limit"], settings["padding"], settings["seed"], settings["batch_size"]) == (36, 1, 3, 36)
    about = [json.loads((folder / "run.json").read_text())["data"] for folder in (out, out / "retrain")]
    assert about[0] == about[1]


def page(folder, out):
    return Page(write_report(folder, out).read_text(encoding="utf-8"))


def test_the_command_of_the_report_does_so_too(trained, tmp_path, monkeypatch):
    out, command, _ = trained
    monkeypatch.chdir(tmp_path)
    printed = page(os.path.relpath(out), "a.html").texts["retrain-command"]
    # settings.json does not hold what only the machine of a search decided.
    assert shlex.split(printed) == shlex.split(command.replace("--accelerator cpu ", ""))
    assert "Test accuracy" in shell(f"{printed} {shlex.join([*TINY, '--channels', '2'])}", tmp_path / "elsewhere")


def test_the_expressions_for_timm_build_the_network(trained, tmp_path):
    out, _, retrained = trained
    call = after("In Python", retrained)
    for folder in (out, out / "retrain"):
        shown = page(folder, tmp_path / "a.html").texts["timm-call"]
        assert shown == f"import timm\n\nmodel = {call}"
    code = f"{shown}\nprint(sum(p.numel() for p in model.parameters()))"
    env = environment()
    done = warm.run(["-c", code], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    about = json.loads((out / "retrain" / "run.json").read_text())
    assert int(done.stdout.splitlines()[-1]) == about["parameters"]


def test_the_expression_of_a_genotype_builds_its_network(tmp_path):
    GENOTYPES["p_darts"].save(tmp_path / "it's.json")
    for source, name in (("darts_v2", "darts_v2"), (tmp_path / "it's.json", "p_darts")):
        with torch.device("meta"):
            assert eval(next_steps.genotype_call(source), {"timm": timm}).genotype == GENOTYPES[name]


def test_without_test_images_no_command_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", x_train=np.zeros((4, 8, 8, 1), np.uint8), y_train=np.arange(4) % 2)
    step = nni_cli._training_step(tmp_path, SearchSettings(data="a.npz"), {"on_disk": False})
    assert step == (
        "To train it, give images that have a test part: data='a.npz': has no array x_test, "
        "must have x_test and y_test and y_train"
    )


def commands_in(source):
    """List what looks like a command of ours, in string constants that are no docstrings."""
    nodes = [*ast.walk(ast.parse(source))]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings]
    command = re.compile(r"optinspired|.*\boptinspired (search|retrain|report|plot)\b.*", re.DOTALL)
    return [text for text in texts if isinstance(text, str) and command.fullmatch(text)]


def test_one_module_composes_what_is_printed_and_all_of_it_is_tried_here():
    assert commands_in("print(f'Next: optinspired plot {x}')") == ["Next: optinspired plot "]
    folders = ("optinspired_plugins", "nni_spaces", "timm_models", "examples")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    found = {file.name for file in files if commands_in(file.read_text(encoding="utf-8"))}
    assert found == {"next_steps.py"}
    assert "optinspired " not in (ROOT / "optinspired_plugins" / "report" / "report.js").read_text(encoding="utf-8")
    assert {*next_steps.__all__} - {"absolute_source"} == {"genotype_call", "retrain_command", "timm_call"}


@pytest.mark.parametrize(
    ("settings", "images", "rest"),
    [
        ({}, None, ""),
        ({"data": "cifar10", "limit": None, "padding": 4, "seed": 0, "devices": 1}, 50_000, ""),
        ({"data": "digits", "epochs": 3, "lr": 0.1, "cells": 8}, None, "--data digits"),
        ({"limit": 60, "devices": 2, "workers": 3}, 60, "--limit 60 --workers 3 --devices 2 --batch-size 30"),
        ({"padding": 0, "seed": [1], "limit": True}, None, "--padding 0"),
        ({"data": -1, "accelerator": 2, "workers": "3", "limit": "4"}, None, ""),
    ],
)
def test_settings_that_differ_from_the_defaults_are_carried(settings, images, rest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(next_steps.retrain_command("run/genotype.json", settings, images))
    assert words == ["optinspired", "retrain", f"{tmp_path}/run/genotype.json", *rest.split()]
