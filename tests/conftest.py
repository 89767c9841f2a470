"""Fixtures shared by the tests, and their order: fast theorems first, whatever takes seconds last."""

import pytest
from digits import write_digits


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
    return write_digits(tmp_path_factory.mktemp("digits") / "digits", 320, 100)
