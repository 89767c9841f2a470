"""The command line in this process: errors, choices, texts of strangers and default folders."""

import inspect
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import torch
from extras import needs

needs("typer", "rich", "matplotlib")

from report_runs import make_history, make_retrain, write_run

from nni_spaces import cli as nni_cli
from nni_spaces.runs.settings import RetrainSettings, SearchSettings
from optinspired_plugins import __version__, cli, next_steps
from optinspired_plugins.cells.genotype import GENOTYPES

ROOT = Path(__file__).parents[1]
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Return a function that runs a command in an empty folder and gives status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.app([str(argument) for argument in arguments])
        return ended.value.code, *capsys.readouterr()

    return run


# --- errors -----------------------------------------------------------------------------------------------------------

DIGITS = ["--out", "run", "--data", "digits", "--limit", "40", "--batch-size", "8", "--epochs", "1"]
SEARCH = ["search", *DIGITS, "--cells", "3", "--channels", "2", "--nodes", "1"]
RETRAIN = ["retrain", "darts_v2", *DIGITS, "--cells", "3", "--channels", "2"]
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([*SEARCH, "--accelerator", "gpu"], "No supported gpu backend found", marks=WITHOUT_GPU),
        pytest.param([*RETRAIN, "--accelerator", "gpu"], "No supported gpu backend found", marks=WITHOUT_GPU),
        ([*SEARCH, "--devices", "0"], "devices=0: must be"),
        ([*RETRAIN, "--devices", "0"], "devices=0: must be"),
        ([*SEARCH, "--init", "json:dumps"], "has no method alpha: must have alpha(rule, slot, names)"),
        ([*SEARCH, "--init", "one"], "initialization='one': must be one of heavy-ball, zero, random, algorithm, or"),
        ([*SEARCH, "--data", "nothing"], "data='nothing': must be 'digits', 'cifar10'"),
        ([*SEARCH, "--batch-size", "30"], "batch_size=30: must be at most 20"),
        ([*SEARCH, "--out", "file/run"], "file/run"),
        ([*RETRAIN, "--out", "file/run"], "file/run"),
        ([*SEARCH, "--data", "cifar10"], "no network here"),
        (["retrain", "nothing.json"], "genotype='nothing.json': must be a JSON file or one of darts_v1"),
        (["retrain", "file"], "file: genotype is not JSON"),
        (["report", "nothing"], "source='nothing': must be the folder of a run, a genotype's file, or one of darts_v1"),
        (["report", "trials", "darts_v2"], "trials.json: settings is a NoneType: must be a JSON object"),
        (["report", "file"], "file"),
        (["simulate", "--lr", "-1"], "lr=-1.0: must be a positive number"),
        (
            ["simulate", "--out", "file/run", "--depths", "1", "--steps", "1", "--pairs", "2", "--batch-size", "2"],
            "file/run",
        ),
        (["plot", "algorithm", "newton"], "newton"),
        (["plot", "algorithm", "nothing:Newton"], "nothing"),
        (["plot", "algorithm", "json:dumps"], "has no method init"),
        (["plot", "cells", "darts_v2", "--out", "cells.xyz"], "xyz"),
        (["plot", "convergence", "--steps", "3", "--out", "file/a.png"], "file"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_what_a_user_can_cause_is_a_line_on_stderr(call, arguments, message, monkeypatch):
    if arguments[0] in ("search", "retrain"):
        needs("nni", "sklearn")
    Path("file").write_text("no JSON")
    Path("trials").mkdir()
    Path("trials", "trials.json").write_text("{}")

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    status, stdout, stderr = call(*arguments)
    assert status == 1
    assert "rror" not in stdout
    assert re.fullmatch(r"error \w+: .*\n", stderr)
    assert message in stderr


def missing_key():
    return {}["key"]


def no_attribute():
    return None.shape


@pytest.mark.parametrize("bug", [missing_key, no_attribute])
def test_a_bug_keeps_its_traceback(bug, monkeypatch):
    monkeypatch.setattr(cli, "write_report", lambda *_: bug())
    with pytest.raises((KeyError, AttributeError)):
        cli.app(["report", "run"])


@pytest.mark.parametrize(
    "error", [ValueError("a\n  b"), RuntimeError("a b"), TypeError("a b"), torch.OutOfMemoryError("a b")], ids=repr
)
def test_what_is_raised_for_a_reader_is_one_line(call, error, monkeypatch):
    def raising(*_):
        raise error

    monkeypatch.setattr(cli, "write_report", raising)
    assert call("report", "run") == (1, "", f"error {type(error).__name__}: a b\n")


# --- choices, version -------------------------------------------------------------------------------------------------


def choices_of(settings, name):
    return next(field.metadata["choices"] for field in fields(settings) if field.name == name)


CHOICES = {
    ("search", "--space"): choices_of(SearchSettings, "space"),
    ("search", "--strategy"): choices_of(SearchSettings, "strategy"),
    ("search", "--accelerator"): get_args(nni_cli.Accelerator),
    ("retrain", "--model"): choices_of(RetrainSettings, "model"),
    ("retrain", "--accelerator"): get_args(nni_cli.Accelerator),
    ("retrain", "--precision"): get_args(nni_cli.Precision),
}


@pytest.mark.parametrize(("command", "option"), CHOICES)
def test_a_wrong_choice_is_a_usage_error_that_names_them(call, command, option):
    needed = ["darts_v2"] if command == "retrain" else ["--out", "run"]
    status, stdout, stderr = call(command, *needed, option, "of a kind")
    assert (status, stdout) == (2, "")
    for name in CHOICES[command, option]:
        assert f"'{name}'" in re.sub(r"[│\s]+", " ", stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "hb,newton"], "network='newton': must be one of gd, hb, agd, agd2, admm"),
        (["--depths", "ten"], "'ten': must be integers separated by commas"),
        (["--seeds", "1,"], "'1,': must be integers separated by commas"),
    ],
)
def test_a_wrong_list_is_a_usage_error(call, arguments, message):
    status, _, stderr = call("simulate", *arguments)
    assert status == 2
    assert message in re.sub(r"[│\s]+", " ", stderr)


def test_help_names_choices_and_loads_no_host():
    code = """
        import sys
        from optinspired_plugins import cli
        for command in ("search", "retrain"):
            try:
                cli.app([command, "--help"])
            except SystemExit as end:
                assert end.code == 0
        print("loaded", {"nni", "nni_spaces._nni", "pytorch_lightning", "timm"} & set(sys.modules))
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    done = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(code)], env=env, capture_output=True, text=True, check=True
    )
    for choices in CHOICES.values():
        assert "|".join(choices) in done.stdout
    assert "loaded set()" in done.stdout
    assert "Sequence" not in done.stdout, "a list of names is typed as a text"


def test_choices_are_the_names_of_the_tables():
    needs("nni")
    from lightning_fabric.plugins.precision.precision import _PRECISION_INPUT_STR
    from pytorch_lightning.accelerators import AcceleratorRegistry

    from nni_spaces.runs.search import SPACES, STRATEGIES

    for name, table in (("space", SPACES), ("strategy", STRATEGIES)):
        assert choices_of(SearchSettings, name) == tuple(table)
    assert {*get_args(nni_cli.Accelerator)} == {"auto", "gpu", *AcceleratorRegistry.available_accelerators()}
    others = {"transformer-engine", "transformer-engine-float16"}  # of linear layers, and there is one
    assert {*get_args(nni_cli.Precision)} == {*get_args(_PRECISION_INPUT_STR)} - others


def test_the_version(call):
    assert call("--version") == (0, f"optinspired-plugins {__version__}\n", "")


# --- texts of strangers -----------------------------------------------------------------------------------------------

ESCAPES = "\x1b]0;owned\x07\x1b[31m\x9b2J\r\nTrain it: rm"


def a_damaged_report(folder):
    write_run(folder / "run", make_history("hb", 1), about={"parameters": ESCAPES})
    return ["report", "run"]


def a_damaged_genotype(folder):
    data = json.loads(GENOTYPES["darts_v2"].to_json())
    (folder / "a.json").write_text(json.dumps({**data, ESCAPES: 1}))
    return ["plot", "cells", "a.json"]


def another_run(folder):
    needs("nni", "sklearn")
    write_run(folder / "run", make_history("hb", 1))
    settings = {**SearchSettings(data="digits").__dict__, "space": ESCAPES}
    (folder / "run" / "settings.json").write_text(json.dumps(settings))
    return SEARCH


def a_folders_name(folder):
    write_run(folder / ESCAPES, make_history("hb", 1))
    return ["report", ESCAPES]


def a_name_of_bytes(folder):
    return ["report", os.fsdecode(b"\xff\x1b")]


@pytest.mark.parametrize(
    "make",
    [a_damaged_report, a_damaged_genotype, another_run, a_folders_name, a_name_of_bytes],
    ids=lambda f: f.__name__,
)
def test_no_escape_reaches_the_terminal(call, make, tmp_path):
    _, stdout, stderr = call(*make(tmp_path))
    text = stdout + stderr
    assert not CONTROL.search(text)
    assert r"\x1b" in text
    assert "\nTrain it" not in text
    text.encode()


def test_a_path_is_printed_as_it_is(call, tmp_path):
    name = "a [red]b[/red]  :cat: [0] ü"
    write_run(tmp_path / name, make_history("hb", 1))
    assert call("report", name) == (0, f"Report: {name}/report.html\n", "")
    status, stdout, _ = call("plot", "cells", f"{name}/genotype.json", "--out", f"{name}/a.svg")
    assert (status, stdout) == (0, f"{name}/a.svg\n")


# --- defaults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "existing", "folder"),
    [
        ("genotype.json", None, "retrain"),
        ("genotype.json", "p_darts", "retrain"),
        ("hb.json", None, "retrain-hb"),
        ("hb.json", "p_darts", "retrain-hb"),
        ("hb.json", "darts_v2", "retrain"),
        ("hb.v2", None, "retrain-hb.v2"),
    ],
)
def test_every_genotype_of_a_folder_has_a_retraining_of_its_own(name, existing, folder, tmp_path):
    if existing is not None:
        (tmp_path / "retrain").mkdir()
        settings = make_retrain()["settings"] | {"genotype": json.loads(GENOTYPES[existing].to_json())}
        (tmp_path / "retrain" / "settings.json").write_text(json.dumps(settings))
    assert nni_cli.retraining_folder(str(tmp_path / name), GENOTYPES["darts_v2"]) == tmp_path / folder
    assert nni_cli.retraining_folder("darts_v2", GENOTYPES["darts_v2"]) == Path("runs/darts_v2")


def test_what_search_and_retrain_share_is_carried_with_the_defaults_of_retrain():
    search, retrain = (inspect.signature(command).parameters for command in (nni_cli.search, nni_cli.retrain))
    own = {"out", "start_from", "epochs", "batch_size", "cells", "channels", "lr"}
    assert (search.keys() & retrain.keys()) - own == next_steps.SHARED.keys()
    defaults = {name: retrain[name].default for name in next_steps.SHARED}
    assert {**defaults, "devices": 1} == next_steps.SHARED
    assert defaults["devices"] is None, "which is 1 outside of torchrun"
    assert retrain["batch_size"].default == next_steps.BATCH_SIZE
