"""Skips what an installation has not: an optional package, whose extra is named here, or a later timm or torch."""

from importlib.metadata import version

import pytest
from packaging.version import Version

EXTRAS = {
    "furo": "docs",
    "matplotlib": "viz",
    "mmengine": "mm",
    "mmengine.runner": "mm",
    "myst_parser": "docs",
    "nbclient": "docs",
    "nbformat": "docs",
    "nni": "nni",
    "optuna": "optuna",
    "rich": "viz",
    "scipy": "viz",
    "segmentation_models_pytorch": "smp",
    "sklearn": "viz",
    "sphinx": "docs",
    "sphinx_copybutton": "docs",
    "sphinx_gallery": "docs",
    "typer": "viz",
}
# docs/guide/strategies.md names the version.
WITHOUT_EXTRA = ("tianshou",)
# These are there and cannot be imported where a library of the system is missing.
INCOMPLETE = {"mmengine.runner": "its OpenCV misses libGL.so.1"}


def needs(*packages: str) -> None:
    """Skip a test, a fixture or a whole file, with the reason, unless these packages can be imported.

    At the top of a file it stands before the imports that need them. Packages that are not in ``EXTRAS`` are those of
    the extra ``dev``.
    """
    for package in packages:
        extra = "no extra" if package in WITHOUT_EXTRA else f"the extra '{EXTRAS.get(package, 'dev')}'"
        reason = f"{package} is not installed: {extra} brings it"
        if package in INCOMPLETE:
            pytest.importorskip(package, reason=f"{reason}, or {INCOMPLETE[package]}", exc_type=ImportError)
        else:
            pytest.importorskip(package, reason=reason)


def needs_version(package: str, oldest: str, why: str) -> pytest.MarkDecorator:
    """Mark a test that an older version, which pyproject.toml allows, cannot pass. ``why`` names what it lacks.

    ``oldest`` is the oldest version that the test was seen to pass with: between it and the lower bound none was tried.
    """
    found = version(package)
    return pytest.mark.skipif(Version(found) < Version(oldest), reason=f"{package} {found} {why}: {oldest} has it")


DROP_BLOCK = needs_version("timm", "1.0.31", "divides by zero in drop block on maps smaller than the block")
