"""timm's own tests/test_models.py, unmodified, from its source distribution, on our names."""

import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm

HERE = Path(__file__).resolve().parent
REQUIRES = (HERE.parent / "pyproject.toml").read_text(encoding="utf-8")
OLDEST = re.search(r'"timm>=([\d.]+)"', REQUIRES)[1]
KINDS = {
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs",
    "test_model_forward_torchscript",
    "test_model_forward_features",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_model_forward_fx_torchscript",
}


def pip(*args):
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip {args[0]} failed, no package index in reach? {done.stderr.strip().splitlines()[-1]}")


def source_of(version, folder):
    """Unpack timm's source distribution, which holds its tests; the wheel does not."""
    pip("download", "--quiet", "--no-deps", "--no-binary=timm", "-d", folder, f"timm=={version}")
    (archive,) = folder.glob("timm-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / f"timm-{version}"


def run_suite(source, names, report, search_path=(), options=()):
    """Run the file; return how many of each test passed, and the messages of the rest."""
    env = dict(os.environ, SUITE_MODELS=" ".join(names), SUITE_OPTIONS=json.dumps(dict(options)))
    env["PYTHONPATH"] = os.pathsep.join([*map(str, search_path), str(HERE / "timm_suite")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "select_models", "-p", "no:cacheprovider", "-W", "ignore"]
    # Not from the source's own folder, which would put its timm before the installed one.
    files = ["-c", source / "pyproject.toml", "--import-mode=importlib", f"--junitxml={report}"]
    done = subprocess.run(
        [*command, *map(str, files), str(source / "tests" / "test_models.py")],
        cwd=report.parent,
        env=env,
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    passed, others = Counter(), []
    for case in ElementTree.parse(report).iter("testcase"):
        if len(case) == 0 or case[0].tag == "system-out":
            passed[case.get("name").split("[")[0]] += 1
        else:
            others.append(f"{case.get('name')}: {case[0].tag} {case[0].get('message')}")
    return passed, others


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return source_of(timm.__version__, tmp_path_factory.mktemp("timm"))


# torch.fx takes a second for a hundred layers; test_every_model has all of them.
SHALLOW = {
    "agdnet40_k12": {"block_config": [3, 2, 2]},
    "agdnet121": {"block_config": [3, 2, 2, 2]},
    "cellnet_cifar": {"cells": 6},
}


def assert_all_pass(passed, others, names, kinds=KINDS):
    assert not others, "\n".join(others)
    for kind in kinds:
        assert passed[kind] == len(names), f"{kind} ran on {passed[kind]} of {len(names)} models"


@pytest.mark.slow
def test_a_small_and_a_flagship_model_of_each_family(source, tmp_path):
    names = ["hbnet20", "hbnet50", "optnet20", "agdnet40_k12", "agdnet121", "cellnet_cifar"]
    passed, others = run_suite(source, names, tmp_path / "report.xml", options=SHALLOW)
    assert_all_pass(passed, others, names, KINDS | {"test_prune_intermediate_layers_contract"})


@pytest.mark.slow
def test_the_oldest_supported_timm_passes_its_own_file(tmp_path):
    """DenseNet has no forward_intermediates in timm 1.0.22, so its file does not test AGDNet's."""
    pip("install", "--quiet", "--no-deps", "--target", tmp_path / "site", f"timm=={OLDEST}")
    names = ["hbnet20", "hbnet18", "agdnet40_k12"]
    source = source_of(OLDEST, tmp_path / "source")
    passed, others = run_suite(source, names, tmp_path / "report.xml", [tmp_path / "site"], SHALLOW)
    assert_all_pass(passed, others, names, {kind for kind in KINDS if "intermediates" not in kind})
    assert passed["test_model_forward_intermediates"] == 2


@pytest.mark.every_model
def test_every_model(source, tmp_path):
    names = [name for module in ("hbnet", "optnet", "agdnet", "cellnet") for name in timm.list_models(module=module)]
    passed, others = run_suite(source, names, tmp_path / "report.xml")
    assert_all_pass(passed, others, names, KINDS | {"test_prune_intermediate_layers_contract"})
