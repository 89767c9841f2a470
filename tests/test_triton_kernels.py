"""The Triton kernels give what their plain forms give: in Triton's interpreter, and on a GPU where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("triton_checks.py")
# Sums keep float32's digits in every precision. Triton's interpreter cuts digits of bfloat16 off instead of rounding.
EXACT = {"float32": 1e-5, "float16": 1e-4, "bfloat16": 1e-4}
ROUNDED = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}


def check(device, **environment):
    path = os.pathsep.join(p for p in (str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")) if p)
    kwargs = dict(env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=600)
    done = subprocess.run([sys.executable, str(SCRIPT), device], **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 6
    for row in rows:
        assert len(row["errors"]) == 16
        for name, error in row["errors"].items():
            images = name in ("add", "rectified") or "input" in name
            assert error < (ROUNDED if images else EXACT)[row["dtype"]], (row["dtype"], row["shape"], name, error)


def test_in_the_interpreter():
    pytest.importorskip("triton", "3.2", reason="needs Triton 3.2, which torch 2.6 for CUDA brings")
    check("cpu", TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    check("cuda")
