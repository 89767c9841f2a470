"""Builds the wheel, and runs what a user of it runs: nothing of the repository can be imported there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = "env/bin/python"  # of an environment's folder
HIDDEN = {"PYTHONPATH", "OPTINSPIRED_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"}


def execute(*args, folder):
    """Run a program to its end and return what it printed."""
    env = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    done = subprocess.run(list(map(str, args)), cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(folder):
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ".")
    execute(sys.executable, *build, folder=ROOT)
    (file,) = folder.glob("*.whl")
    return file


def make_environment(wheel, folder):
    """Install a wheel in a fresh environment with this environment's folders behind it; return its interpreter."""
    execute(sys.executable, "-m", "venv", "env", folder=folder)
    python = folder / PYTHON
    execute(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, folder=folder)
    site = Path(execute(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip())
    # Python does not read the .pth files of a folder that a .pth file names, so an editable install stays unseen.
    hosts = {str(Path(importlib.util.find_spec(name).origin).parents[1]) for name in ("torch", "timm")}
    (site / "hosts.pth").write_text("\n".join(sorted(hosts)) + "\n")
    return python
