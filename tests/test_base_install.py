"""What is there without the extras: the whole suite, with skips that name an extra, as errors and documents do."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from extras import EXTRAS, needs

ROOT = Path(__file__).parents[1]
# What the extras bring, by the names that files import.
OPTIONAL = {name.partition(".")[0] for name in EXTRAS} | {
    *("cv2", "gym", "mmcv", "mmdet", "mmpretrain", "mmseg"),
    *("numba", "onnx", "onnxruntime", "onnxscript", "pandas", "pytorch_lightning", "torchmetrics"),
}


# The extras that bring a package.
BROUGHT = {
    **{package: {extra} for package, extra in EXTRAS.items()},
    **{"matplotlib": {"mm", "viz"}, "pytorch_lightning": {"nni"}, "rich": {"mm", "viz"}, "torchmetrics": {"nni"}},
}
WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        return None if name.partition(".")[0] in {} else self.finder.find_spec(name, *args)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
EXAMPLES = {
    file.relative_to(ROOT).as_posix(): file
    for file in [*ROOT.glob("examples/*.py"), *ROOT.glob("examples/mm/train.py")]
}
PAGES = {
    file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
    for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("guide/*.md")]
}


def advised(text):
    """The extras in commands of pip."""
    return {extra for names in re.findall(r'pip install [^\n]*"\.\[([\w,]+)\]"', text) for extra in names.split(",")}


def run_without(packages, code, **kwargs):
    code = WITHOUT.format(packages) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_names_the_extras_that_it_needs(name):
    extras = advised(EXAMPLES[name].read_text(encoding="utf-8").split('"""')[1])
    needs(*(package for package, extra in EXTRAS.items() if extra in extras))
    blocked = {package for package, brought_by in BROUGHT.items() if not brought_by & extras}
    folder = str(EXAMPLES[name].parent)  # where Python looks first for imports of a script
    done = run_without(blocked, f"import runpy; sys.path.insert(0, {folder!r}); runpy.run_path({name!r})", cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_a_page_that_runs_an_example_says_what_to_install(page):
    text = PAGES[page]
    for name in re.findall(r"python (examples/\S+\.py)", text):
        if name in EXAMPLES:
            wanted = advised(EXAMPLES[name].read_text(encoding="utf-8").split('"""')[1])
            assert wanted <= advised(text), f"{name} needs {wanted}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "package", "extra"),
    [
        ("import optinspired_plugins.mm", "mmengine", "mm"),
        ("import optinspired_plugins.plotting", "matplotlib", "viz"),
        ("from nni_spaces import HBSpace", "pytorch_lightning", "nni"),
        ("from nni_spaces import TrialEvaluator; TrialEvaluator.from_images('digits')", "sklearn", "viz"),
    ],
)
def test_the_error_of_a_missing_package_names_its_extra(statement, package, extra):
    if package != "mmengine":
        needs("nni", "sklearn")
    done = run_without({package}, statement)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"no module named '{package}': needs the extra '{extra}', pip install '.[{extra}]' in a clone" in last


@pytest.mark.slow
def test_every_file_is_collected_without_the_extras(tmp_path):
    (tmp_path / "without_extras.py").write_text(WITHOUT.format(OPTIONAL))
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-p", "without_extras", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert "tests/test_hbnet.py::" in done.stdout
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)", done.stdout, re.MULTILINE)
    assert reasons
    for reason in reasons:
        assert re.match(r"[\w.]+ is not installed: the extra '\w+' brings it", reason), reason


def test_a_package_that_is_missing_skips_and_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(pytest.skip.Exception, match="sklearn is not installed: the extra 'viz' brings it"):
        needs("torch", "sklearn")


def test_every_extra_that_is_named_exists():
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in {*EXTRAS.values(), "dev"}:
        assert re.search(rf"^{extra} = \[", declared, re.MULTILINE), extra
