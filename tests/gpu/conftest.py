"""Everything here runs on GPUs; without one it is skipped, and says so."""

import pathlib

import pytest

from tests.gpu.devices import two_devices

HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips, saying why."""
    if item.path.is_relative_to(HERE) and not two_devices():
        pytest.skip("TensorFlow finds no GPU")
