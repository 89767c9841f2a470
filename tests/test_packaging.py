"""What is installed is what was tested: the built distributions hold the packages, and the wheel works on its own."""

import ast
import re
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest
from wheels import execute

import optinspired_plugins

ROOT = Path(__file__).parents[1]
PACKAGES = {"optinspired_plugins", "timm_models", "nni_spaces"}
VERSION = optinspired_plugins.__version__
INFO = f"optinspired_plugins-{VERSION}.dist-info"


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_one():
    assert re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)[1] == VERSION
    assert re.search(r"^version: [\"']?([^\"'\n]+)", read("CITATION.cff"), re.MULTILINE)[1] == VERSION
    assert re.search(rf"^## \[?v?{re.escape(VERSION)}\b", read("CHANGELOG.md"), re.MULTILINE)


# Distributions by import name, where these differ. torch's builds for GPUs bring triton.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "pytorch_lightning": "pytorch-lightning",
    "sklearn": "scikit-learn",
    "triton": "torch",
}
EXTRAS = {
    "timm_models": (),
    "optinspired_plugins": ("mm", "viz"),
    "nni_spaces": ("nni", "viz"),
    "examples": ("nni", "mm", "viz", "optuna", "dev"),
}


def imports(folder):
    """Return the top-level names of the packages that the files of a folder import."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
@pytest.mark.parametrize("folder", EXTRAS)
def test_every_import_is_declared(folder):
    import tomllib

    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    needs = [*project["dependencies"], *(need for extra in EXTRAS[folder] for need in extras[extra])]
    declared = {re.split(r"[<>=\[]", need)[0] for need in needs}
    own = {*PACKAGES, *(path.stem for path in (ROOT / "examples").rglob("*.py"))}
    found = {DISTRIBUTIONS.get(name, name) for name in imports(folder) - own - sys.stdlib_module_names}
    assert "torch" in found
    assert found <= declared


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {*PACKAGES, INFO}
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    modules = {name for name in names if name.endswith(".py")}
    assert modules == {f.relative_to(ROOT).as_posix() for p in PACKAGES for f in (ROOT / p).rglob("*.py")}
    assert {"optinspired_plugins/report/report.css", "optinspired_plugins/report/report.js"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.slow
def test_the_wheel_declares_licence_and_entry_point(wheel):
    with zipfile.ZipFile(wheel) as file:
        assert file.read(f"{INFO}/licenses/LICENSE").decode() == read("LICENSE")
        metadata = Parser().parsestr(file.read(f"{INFO}/METADATA").decode())
        entry_points = ConfigParser()
        entry_points.read_string(file.read(f"{INFO}/entry_points.txt").decode())
    assert (metadata["Name"], metadata["Version"]) == ("optinspired-plugins", VERSION)
    assert metadata["License-Expression"] == "Apache-2.0"
    base = {re.split(r"[<>=]", need)[0] for need in metadata.get_all("Requires-Dist") if "extra ==" not in need}
    assert base == {"torch", "torchvision", "timm"}
    assert dict(entry_points["torch.backends"]) == {"optinspired_plugins": "optinspired_plugins._autoload:install"}


@pytest.mark.slow
def test_the_wheel_works_without_the_source(wheel_python, tmp_path):
    code = (
        "import timm, torch; net = timm.create_model('hbnet20.cifar10', pretrained=True)\n"
        "print(*net(torch.zeros(2, 3, 32, 32)).shape)\n"
        "import optinspired_plugins, timm_models, nni_spaces\n"
        "for package in (optinspired_plugins, timm_models, nni_spaces): print(package.__file__)"
    )
    shape, *files = execute(wheel_python, "-c", code, folder=tmp_path).splitlines()
    assert shape == "2 10"
    environment = wheel_python.parents[1]
    assert [Path(file).is_relative_to(environment) for file in files] == [True, True, True]


@pytest.mark.slow
def test_the_source_distribution_can_be_tested(tmp_path):
    execute(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, folder=ROOT)
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {test.relative_to(ROOT).as_posix() for test in (ROOT / "tests").glob("*.py")}
    assert tests | {"pyproject.toml", "README.md", "LICENSE", "Makefile", "timm_models/py.typed"} <= names
    assert not {name for name in names if name.startswith("runs/")}
    unwanted = {"__pycache__", ".venv", ".git", ".ci", "dist", "build", "shared"}
    parts = {part for name in names for part in name.split("/")}
    assert not parts & unwanted
    assert not [part for part in parts if part.endswith(("_cache", ".pyc"))]
