"""Every family, form and option on fake CUDA tensors: dtypes under autocast, layouts, and no wait for the device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_cuda
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(fake_cuda.missing() is not None, reason=f"needs {fake_cuda.missing()}"),
]

CASES = [
    *(("hbnet20", options) for options in ({}, {"checkpointing": True}, {"memory": "reversible"})),
    *(("hbnet20", {"learn_beta": True, **more}) for more in ({}, {"checkpointing": True}, {"memory": "reversible"})),
    ("hbnet20", {"post_act": True}),
    ("hbnet20", {"drop_path_rate": 0.1, "memory": "reversible"}),
    ("hbnet20_resnet", {}),
    *(("hbnet18", options) for options in ({}, {"checkpointing": True}, {"drop_block_rate": 0.1})),
    *(("hbnet50", options) for options in ({}, {"checkpointing": True}, {"memory": "reversible"})),
    ("hbnet50", {"learn_beta": True, "checkpointing": True}),
    *(("agdnet40_k12", {"block_config": [2, 2, 2], **more}) for more in ({}, {"checkpointing": True})),
    *(("agdnet121", {"block_config": [2, 2, 2, 2], **more}) for more in ({}, {"checkpointing": True})),
    ("agdnet121", {"block_config": [2, 2], "proj_drop_rate": 0.1}),
    *(("optnet20", {"algorithm": name}) for name in ("gd", "hb", "agd", "agd2", "admm", "dmrnet")),
    ("optnet20", {"algorithm": "agd", "checkpointing": True}),
    ("optnet50", {}),
    *(
        ("cellnet_cifar", {"genotype": "darts_v2", "cells": 3, "channels": 8, **more})
        for more in ({}, {"checkpointing": True})
    ),
]


@pytest.fixture(
    scope="module",
    params=[("bfloat16", "channels_last"), ("float16", "contiguous_format"), ("float32", "channels_last")],
    ids="-".join,
)
def sweep(request):
    """What the steps of all cases gave, of one dtype and layout."""
    dtype, layout = request.param
    given = [text for name, options in CASES for text in (name, json.dumps(options))]
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / "fake_cuda_sweep.py"), dtype, layout, *given]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return dtype, layout, {(row["name"], row["options"]): row for row in rows}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_a_step_on_cuda(sweep, case):
    dtype, layout, rows = sweep
    row = rows[case[0], json.dumps(case[1])]
    assert "error" not in row, row["where"]
    assert row["missing"] == []
    assert row["logits"] == [dtype, dtype, [2, 7], [2, 7]]
    assert row["stages"] in ([dtype], [])
    assert row["gradients"] in ([dtype], [])
    assert row["layouts"] in ([layout], [])
    assert row["input"] == ["float32", layout]
    # By default AGDNet is the plain form.
    assert row["dense_block"] == (case[0].startswith("agdnet") and "checkpointing" in case[1])
