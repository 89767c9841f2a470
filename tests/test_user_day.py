"""A day of a user, from the wheel: own images, a search killed and resumed elsewhere, a network that others load."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from functools import partial

import numpy as np
import pytest
import warm
from extras import needs, needs_version
from PIL import Image
from wheels import HIDDEN, execute

needs("nni", "typer", "rich", "matplotlib")
pytestmark = [pytest.mark.slow, needs_version("timm", "1.0.31", "keeps no record of a model's arguments")]
PARTS = {"train": 24, "test": 6}
EPOCHS = 8
SEARCH = f"--out run --batch-size 8 --channels 2 --cells 3 --nodes 1 --padding 1 --accelerator cpu --epochs {EPOCHS}"
TRAIN = "--epochs 1 --cells 3 --channels 2"
PUBLISH = """
import sys, timm, torch
model = {call}.eval()
torch.save((x := torch.rand(2, {channels}, 12, 12), model(x)), sys.argv[1] + "/seen.pt")
timm.models.save_for_hf(model, sys.argv[1], safe_serialization=True)
"""
LOAD = """
import sys, timm, torch
model = timm.create_model("local-dir:.", pretrained=True).eval()
x, seen = torch.load("seen.pt")
assert torch.equal(model(x), seen)
assert "nni_spaces" not in sys.modules
"""


def noise(n, channels, dtype=np.uint8):
    return np.random.default_rng(n).integers(0, np.iinfo(dtype).max, (n, 12, 12, *channels), dtype)


def write_folder(path, suffix, channels, dtype):
    for part, n in PARTS.items():
        for i, image in enumerate(noise(n, channels, dtype)):
            folder = path / part / ("cat", "dog")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}{suffix}")


def write_arrays(path):
    images = {f"x_{part}": noise(n, [3]) for part, n in PARTS.items()}
    np.savez(path, **images, **{f"y_{part}": np.arange(n) % 2 for part, n in PARTS.items()})


WRITE = {
    "photos": lambda path: write_folder(path, ".jpg", [3], np.uint8),
    "scans": lambda path: write_folder(path, ".tiff", [], np.uint16),
    "arrays.npz": write_arrays,
}


def environment():
    return {name: value for name, value in os.environ.items() if name not in HIDDEN} | {"COLUMNS": "120"}


def kill_after_an_epoch(command, folder, run):
    """Start a command and end it by SIGKILL once its run has a checkpoint."""
    process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (run / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def server(wheel_python):
    return warm.Server(wheel_python, environment())


def rest_of_line(label, text):
    return re.search(f"^{label}: (.*)$", text, flags=re.MULTILINE)[1]


@pytest.mark.parametrize(("name", "channels"), [("photos", 3), ("scans", 1), ("arrays.npz", 3)])
def test_a_day(name, channels, wheel_python, server, tmp_path):
    optinspired = wheel_python.with_name("optinspired")

    def python(*args, folder):
        done = server.run(args, cwd=folder, env=environment())
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run = partial(python, "-m", "optinspired_plugins.cli")

    home, cluster, friend = (tmp_path / folder for folder in ("at home", "the cluster", "at a friend's"))
    for folder in (home, cluster, friend):
        folder.mkdir()
    WRITE[name](home / name)

    search = ["search", "--data", name, *SEARCH.split()]
    kill_after_an_epoch([optinspired, *search], home, home / "run")
    for moved in (name, "run"):
        shutil.move(home / moved, cluster / moved)
    searched = run(*search, folder=cluster)
    done = int(re.search(r"Going on after epoch (\d+) of run", searched)[1])
    assert len(re.findall(r"^epoch ", searched, flags=re.MULTILINE)) == EPOCHS - done < EPOCHS

    _, *train = shlex.split(rest_of_line("Train it", searched))
    trained = run(*train, *TRAIN.split(), folder=home)
    for trained_or_searched in ("run", "run/retrain"):
        report = rest_of_line("Report", run("report", trained_or_searched, folder=cluster))
        assert (cluster / report).stat().st_size > 20_000

    call = rest_of_line("In Python", trained)
    python("-c", PUBLISH.format(call=call, channels=channels), friend, folder=home)
    shutil.rmtree(cluster)
    execute(wheel_python, "-c", LOAD, folder=friend)
