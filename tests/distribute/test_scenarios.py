"""Whatever Keras users do: two real worker processes against one process with two devices.

Replicas see the same data in both, so the arithmetic is the same; workers must agree to the bit.
"""

from __future__ import annotations

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.distribute import scenarios
from tests.distribute.scenarios.tools import classification
from tests.distribute.test_multi_worker import Found, weights
from tests.multi_process import run_workers
from tfqcomm.distribute import CompressedAllReduce

# Much waits for one pair of workers.
pytestmark = [pytest.mark.multi_process, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("of-two-workers")


@pytest.fixture(scope="module")
def two(directory):
    """Found by two workers."""
    args = {"names": list(scenarios.SCENARIOS), "directory": str(directory)}
    return Found(run_workers(scenarios.on_two_workers, args=args, timeout=850))


@pytest.fixture
def one(mirrored_strategy, tmp_path):
    """Returns a function: the same scenario in this process."""

    def run(name):
        if name in scenarios.ON_ONE_DEVICE:
            strategy = tf.distribute.OneDeviceStrategy("CPU:0")
        else:
            strategy = mirrored_strategy(2, CompressedAllReduce("identity"))
        return scenarios.SCENARIOS[name](strategy, str(tmp_path))

    return run


def assert_alike(first, second, compare, path=""):
    """Compares nested dicts and lists of numbers and arrays; what is a worker's own is left out."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            if not key.startswith("own "):
                assert_alike(first[key], second[key], compare, f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_alike(*pair, compare, f"{path}/{index}")
    else:
        compare(np.asarray(first), np.asarray(second), err_msg=path)


@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_two_workers_do_as_one_process(two, one, name):
    found = two[name]
    weights(found)
    assert_alike(found[0], found[1], np.testing.assert_array_equal)
    first, expected = found[0], one(name)
    first = {**first, "weights": first["weights"][0]}
    expected = {**expected, "weights": expected["weights"][0]}

    def close(actual, desired, err_msg):
        np.testing.assert_allclose(actual, desired, rtol=1e-6, atol=1e-6, err_msg=err_msg)

    assert_alike(first, expected, close)


# ------------------------------------------- files, of callbacks that all workers gave one path to


def names_in(path):
    return sorted(file.name for file in path.iterdir())


def test_checkpoints_at_one_path_can_be_read(two, directory):
    found = two["model_checkpoint"]
    assert names_in(directory / "checkpoints") == [
        "best.weights.h5",
        "epoch-1.keras",
        "epoch-2.keras",
    ]
    x = classification()[0][:32]
    model = keras.models.load_model(directory / "checkpoints" / "epoch-2.keras")
    np.testing.assert_allclose(model.predict(x, verbose=0), found[0]["predicted"], atol=1e-5)
    model.load_weights(directory / "checkpoints" / "best.weights.h5")


def test_a_csv_log_at_one_path_has_a_line_for_each_epoch(two, directory):
    losses = two["csv_logger"][0]["history"]["loss"]
    with open(directory / "log.csv", newline="") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == losses


def test_tensorboard_at_one_path_has_a_run_for_each_worker(two, directory):
    assert two["tensorboard_with_histograms"]
    runs = {str(p.parent.relative_to(directory / "board")) for p in directory.rglob("events.out*")}
    assert runs == {"train", "validation", "worker_1/train", "worker_1/validation"}


def test_a_backup_at_one_path_was_resumed_by_both_and_removed(two, directory):
    for worker in two["backup_and_restore_of_keras"]:
        assert worker["epochs"] == [2, 3]
    assert not (directory / "backup").exists()
