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

# With the kernels of a GPU, which fake tensors can only allocate.
FUSED = [
    *(("hbnet20", {"fused": True, **more}) for more in ({}, {"learn_beta": True, "checkpointing": True})),
    *(("hbnet50", {"fused": True, **more}) for more in ({"checkpointing": True}, {"memory": "reversible"})),
    *(("agdnet121", {"block_config": [2, 2], "fused": True, **more}) for more in ({}, {"checkpointing": True})),
    ("agdnet40_k12", {"block_config": [2, 2, 2], "fused": True, "proj_drop_rate": 0.1}),
]
CASES = [
    *FUSED,
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


KINDS = ["bfloat16-channels_last", "float16-contiguous_format", "float32-channels_last"]


@pytest.fixture(scope="module")
def sweep(once):
    """The results of the steps of all cases, of every dtype and layout: by one process for all workers."""

    def run(folder):
        given = [text for name, options in CASES for text in (name, json.dumps(options))]
        folders = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        command = [sys.executable, str(ROOT / "tests" / "fake_cuda_sweep.py"), ",".join(KINDS), *given]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        (folder / "rows").write_text(done.stdout)

    rows = [json.loads(line) for line in (once("fake_cuda", run) / "rows").read_text().splitlines()]
    return {(row["kind"], row["name"], row["options"]): row for row in rows}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_a_step_on_cuda(sweep, case, kind):
    row, (dtype, layout) = sweep[kind, case[0], json.dumps(case[1])], kind.split("-")
    assert "error" not in row, row["where"]
    assert row["missing"] == []
    assert row["logits"] == [dtype, dtype, [2, 7], [2, 7]]
    assert row["stages"] in ([dtype], [])
    assert row["gradients"] in ([dtype], [])
    assert row["layouts"] in ([layout], [])
    assert row["input"] == ["float32", layout]
    fused = "fused" in case[1] and layout == "channels_last"
    assert bool(row["kernels"]) == fused
    # Without these kernels AGDNet is the plain form by default.
    assert row["dense_block"] == (case[0].startswith("agdnet") and "checkpointing" in case[1] and not fused)
