"""Fixtures shared by the tests, and their order: fast theorems first, whatever takes seconds last."""

import fcntl
import os
import shutil

import numpy as np
import pytest
from extras import needs
from wheels import PYTHON, build_wheel, make_environment


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: (
            item.get_closest_marker("every_model") is not None,
            item.get_closest_marker("slow") is not None,
        )
    )


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """``once(name, make)``: a folder that ``make(folder)`` has filled, in one of the workers for all of them."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name, make):
        folder, done = base / name, base / f"{name}.done"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker in which it failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def digits_folder(once):
    """320 real digits to train on and 100 to validate on, as an image folder."""
    needs("sklearn")
    from digits import write_digits

    return once("digits", lambda folder: write_digits(folder / "digits", 320, 100)) / "digits"


@pytest.fixture(scope="session")
def coloured_images(tmp_path_factory):
    """Noise around a colour a class: 160 images to train on and 64 to test on."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (10, 1, 1, 3))
    path = tmp_path_factory.mktemp("data") / "images.npz"
    arrays = {}
    for split, size in (("train", 160), ("test", 64)):
        labels = np.arange(size) % 10
        images = colours[labels] + rng.integers(-40, 40, (size, 32, 32, 3))
        arrays |= {f"x_{split}": images.astype(np.uint8), f"y_{split}": labels.astype(np.int64)}
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture(scope="session")
def wheel(once):
    (file,) = once("wheel", build_wheel).glob("*.whl")
    return file


@pytest.fixture(scope="session")
def wheel_python(wheel, once):
    """The interpreter of an environment that has the wheel and not the repository."""
    return once("fresh", lambda folder: make_environment(wheel, folder)) / PYTHON


@pytest.fixture(autouse=True)
def _fused_kernels(request):
    """Use the kernels of a GPU in their plain form for a parameter ``form`` that names them."""
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and "fused" in str(parameters.params.get("form")):
        import forms

        with forms.fused_kernels():
            yield
    else:
        yield
