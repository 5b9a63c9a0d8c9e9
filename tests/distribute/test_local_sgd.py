"""Replicas that train alone, in two real processes: bit for bit what one process does."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tests.distribute import local_sgd_functions as functions
from tests.distribute.multi_worker_functions import classification
from tests.distribute.test_multi_worker import Found, all_replicas, assert_same
from tests.multi_process import run_workers
from tests.network import network
from tests.replicas import plain

pytestmark = [pytest.mark.multi_process, pytest.mark.timeout(600), pytest.mark.slow]

PARAMETERS = 64 * 32 + 32 + 2 * 32 + 32 * 10 + 10


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def two(directory):
    """Found by two workers of one device each."""
    return Found(
        run_workers(functions.on_two_workers, args={"directory": str(directory)}, timeout=500)
    )


@pytest.mark.parametrize("name", functions.OPTIMIZERS)
def test_two_workers_do_what_two_devices_do(two, name):
    found = two[name]
    expected = functions.train(plain(2), name)
    own = [replica for worker in found for replica in worker["own"]]
    for one, other in zip(own, expected["own"], strict=True):
        assert_same(one, other)
    assert not np.array_equal(own[0][0], own[1][0])
    assert_same(all_replicas([worker["weights"] for worker in found]), expected["weights"][0])
    for worker in found:
        np.testing.assert_array_equal(worker["predict"], expected["predict"])
        np.testing.assert_array_equal(worker["times_led"], expected["times_led"])
        assert worker["traffic"] == expected["traffic"]
        assert worker["evaluate"] == pytest.approx(expected["evaluate"], rel=1e-5)
        assert worker["evaluate"][0] == worker["history"]["val_loss"][-1]
    assert found[0]["history"] == found[1]["history"]


def test_bytes_of_six_pulls(two):
    for worker in two["leader_sgd"]:
        assert sum(epoch["bytes_sent"] for epoch in worker["traffic"]) == 6 * (12 + 2 * PARAMETERS)


def test_a_bad_gradient_on_one_worker_is_its_own_affair(two):
    found = two["nan"]
    assert [[e["skipped_steps"] for e in w["traffic"]] for w in found] == [[0, 0], [1, 1]]
    assert all(np.isfinite(w).all() for w in all_replicas([w["weights"] for w in found]))


def test_who_trains_alone_asks_nobody_where_data_suffice(two):
    """What is asked would wait behind a model that is under way."""
    assert two["sure"] == [[True, True, False]] * 2


def test_saved_by_the_chief_alone(two, directory):
    predictions = two["save"]
    np.testing.assert_array_equal(*predictions)
    loaded = keras.models.load_model(directory / "leader.keras")
    x, _ = classification()
    np.testing.assert_allclose(
        loaded.predict(x[:64], verbose=0), predictions[0], rtol=1e-4, atol=1e-5
    )


def test_workers_must_agree_on_the_period(two):
    for message in two["other_periods"]:
        assert "global_period:" in message
        assert "worker 0" in message and "worker 1" in message


@pytest.mark.parametrize("name", functions.OPTIMIZERS)
def test_four_replicas_on_two_workers_train_and_agree(four, name):
    """Groups are machines here: what local pulls send does not leave them."""
    found = four[name]
    all_replicas([worker["weights"] for worker in found])
    np.testing.assert_array_equal(found[0]["predict"], found[1]["predict"])
    assert found[0]["history"]["loss"][-1] < found[0]["history"]["loss"][0]
    if name == "leader_sgd groups":
        # Pulls at the 16 even steps and at 5, 15 and 25, with a vote of two replicas per worker;
        # global ones at 6 of them, with half of a model per worker on average.
        sent = sum(epoch["bytes_sent"] for epoch in found[0]["traffic"])
        assert sent == 19 * 2 * 12 + 6 * 2 * PARAMETERS


@pytest.fixture(scope="module")
def four():
    return Found(run_workers(functions.with_two_devices_each, devices=2, timeout=500))


@pytest.mark.network
@pytest.mark.parametrize(("compressor", "bytes_each"), [(None, 4), ("bfloat16", 2)])
def test_a_pull_sends_one_model_and_no_more(compressor, bytes_each):
    """By the counters of the network interfaces of both workers, whoever leads."""
    args = {"compressor": compressor}
    with network(2) as net:
        found = run_workers(functions.count_on_the_wire, args=args, network=net, timeout=280)
    models = 10 * bytes_each * found[0]["parameters"]
    assert sum(worker["counted"] for worker in found) == pytest.approx(models, rel=1e-3)
    assert sum(worker["sent"] for worker in found) == pytest.approx(models, rel=0.05)
    assert all(found[0]["times_led"] > 0)
