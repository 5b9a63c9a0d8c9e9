"""Batches of any size and type on two real workers, and workers that do not do the same.

The yardstick is the same in one process, under MirroredStrategy with two devices.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.distribute import batch_functions as functions
from tests.multi_process import run_workers
from tfqcomm.distribute import CompressedAllReduce

pytestmark = [pytest.mark.multi_process, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def results():
    return run_workers(functions.on_two_workers, timeout=800)


@pytest.fixture
def found(results):
    """Returns a function: what both workers found, by name; what failed fails."""

    def get(name):
        pair = [result[name] for result in results]
        for one in pair:
            if isinstance(one, str) and "Traceback" in one:
                pytest.fail(f"{name} failed:\n{one}", pytrace=False)
        return pair

    return get


@pytest.fixture
def alone(mirrored_strategy):
    """Returns a function: the same in this process."""

    def get(name):
        strategy = mirrored_strategy(2, CompressedAllReduce("identity"))
        job, *args = functions.SAME_ANYWHERE[name]
        return job(strategy, *args)

    return get


def assert_history(found, expected):
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "name",
    ["101 rows", "5 rows, one a batch", "one row", "uint8", "bool"],
)
def test_a_batch_that_does_not_split_evenly_trains_as_in_one_process(found, alone, name):
    expected = alone(name)
    for worker in found(name):
        assert_history(worker["history"], expected["history"])
        np.testing.assert_allclose(worker["evaluate"], expected["evaluate"], rtol=1e-6)
        np.testing.assert_allclose(worker["predict"], expected["predict"], rtol=1e-5, atol=1e-6)
        for one, two in zip(worker["weights"][0], expected["weights"][0], strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)


def test_a_replica_without_rows_does_not_spoil_batch_normalization(found):
    first, second = found("5 rows with batch norm")
    for one, two in zip(first["weights"][0], second["weights"][0], strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", ["validation_split", "strings", "ragged"])
def test_shapes_of_a_first_batch_need_not_travel(found, alone, name):
    expected = alone(name)
    for worker in found(name):
        assert_history(worker, expected)


def test_texts_that_each_worker_pads_to_a_length_of_its_own(found):
    first, second = found("padded texts")
    assert_history(first["history"], second["history"])
    for one, two in zip(first["weights"][0], second["weights"][0], strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", ["outputs of 9 rows", "outputs of one row"])
def test_predictions_of_any_type_arrive_bit_for_bit(found, name):
    for predicted, expected in found(name):
        assert predicted.keys() == expected.keys()
        for kind, value in predicted.items():
            np.testing.assert_array_equal(value, np.array(expected[kind]), err_msg=kind)


def test_a_variable_made_in_a_function_is_the_chiefs(found):
    first, second = found("variable in a function")
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", ["out of data", "fewer steps"])
def test_an_epoch_ends_for_all_when_the_first_worker_runs_out_of_data(found, name):
    first, second = found(name)
    assert first["batches"] == second["batches"] == [0, 1, 2] * 2
    assert first["loss"] == second["loss"]
    np.testing.assert_allclose(first["evaluate"], second["evaluate"], rtol=1e-6)


@pytest.mark.parametrize("when", ["batch", "epoch"])
@pytest.mark.parametrize("who", ["chief", "other"])
def test_all_stop_when_one_stops(found, when, who):
    assert found(f"stop, {when}, {who}") == [[0, 1], [0, 1]]


def test_a_rate_that_is_set_on_one_worker_alone_is_an_error_of_all(found):
    for message in found("rates"):
        assert "learning_rate:\n    worker 0 (127.0.0.1:" in message
        assert "0.1" in message
        assert "must be given to `fit` on all workers" in message


def test_local_methods_exchange_nothing_between_pulls(found):
    assert found("local methods") == [0, 0]
