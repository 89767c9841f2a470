"""Fixtures shared by the tests, and their order: fast theorems first, whatever takes seconds last."""

import numpy as np
import pytest
from extras import needs
from wheels import build_wheel, make_environment


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: (
            item.get_closest_marker("every_model") is not None,
            item.get_closest_marker("slow") is not None,
        )
    )


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory):
    """320 real digits to train on and 100 to validate on, as an image folder."""
    needs("sklearn")
    from digits import write_digits

    return write_digits(tmp_path_factory.mktemp("digits") / "digits", 320, 100)


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
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def wheel_python(wheel, tmp_path_factory):
    """The interpreter of an environment that has the wheel and not the repository."""
    return make_environment(wheel, tmp_path_factory.mktemp("fresh"))
