"""Skips what needs a package that the base installation has not: the one place that says which extra brings it."""

import pytest

EXTRAS = {
    "matplotlib": "viz",
    "mmengine": "mm",
    "mmengine.runner": "mm",
    "nni": "nni",
    "rich": "viz",
    "scipy": "viz",
    "sklearn": "viz",
    "tianshou": "rl",
    "typer": "viz",
}
# These are there and cannot be imported where a library of the system is missing.
INCOMPLETE = {"mmengine.runner": "its OpenCV misses libGL.so.1"}


def needs(*packages: str) -> None:
    """Skip a test, a fixture or a whole file, with the reason, unless these packages can be imported.

    At the top of a file it stands before the imports that need them. Packages that are not in ``EXTRAS`` are those of
    the extra ``dev``.
    """
    for package in packages:
        reason = f"{package} is not installed: the extra '{EXTRAS.get(package, 'dev')}' brings it"
        if package in INCOMPLETE:
            pytest.importorskip(package, reason=f"{reason}, or {INCOMPLETE[package]}", exc_type=ImportError)
        else:
            pytest.importorskip(package, reason=reason)
