"""The suite is there with the base installation alone: what needs more is skipped, and the reason names the extra."""

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


@pytest.mark.slow
def test_every_file_is_collected_without_the_extras(tmp_path):
    plugin = f"""
        import sys

        class Without:
            def __init__(self, finder):
                self.finder = finder

            def find_spec(self, name, *args):
                return None if name.partition(".")[0] in {OPTIONAL} else self.finder.find_spec(name, *args)

            def __getattr__(self, name):
                return getattr(self.finder, name)

        sys.meta_path[:] = map(Without, sys.meta_path)
    """
    (tmp_path / "without_extras.py").write_text(textwrap.dedent(plugin))
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
