"""The baselines of Leader SGD: elastic and periodic averaging."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest

from tests.optimizers.local_runs import SHAPES, follow, run
from tests.optimizers.local_sgd_reference import AverageReference, ElasticReference
from tests.replicas import assert_replicas_equal, build, plain, random_gradients
from tfqcomm.optimizers import ElasticAveragingSGD, PeriodicAveragingSGD
from tfqcomm.optimizers.local.elastic_averaging_sgd import elastic_averaging_pull
from tfqcomm.state.ledger import ledger_of

MODEL = 4 * 17  # bytes of the parameters


@pytest.mark.parametrize("world", [2, 3, 4])
def test_elastic_averaging_follows_the_paper(world):
    optimizer, _, expected = follow(
        functools.partial(ElasticAveragingSGD, 0.1, 0.9, beta=0.43, period=3),
        functools.partial(ElasticReference, alpha=0.43 / world, tau=3, momentum=0.9),
        world,
    )
    np.testing.assert_allclose(optimizer.shared["center"].numpy(), expected.c, atol=2e-5)
    traffic = ledger_of(optimizer).meter.read()
    assert traffic.bytes_sent == 33 * (2 * (world - 1) * MODEL // world)
    assert traffic.dense_bytes == 100 * (2 * (world - 1) * MODEL // world)


@pytest.mark.parametrize("nesterov", [False, True])
def test_periodic_averaging_follows_the_paper(nesterov):
    optimizer, history, _ = follow(
        functools.partial(PeriodicAveragingSGD, 0.1, 0.9, period=4, nesterov=nesterov),
        functools.partial(AverageReference, tau=4, momentum=0.9, nesterov=nesterov),
        3,
    )
    np.testing.assert_array_equal(history[3::4, 0], history[3::4, 2])
    assert not np.allclose(history[2::4, 0], history[2::4, 2])
    assert ledger_of(optimizer).meter.read().bytes_sent == 25 * (2 * 2 * MODEL // 3)


def test_two_elastic_pulls_by_hand():
    """Two workers at 1, rate 0.1, a = 0.25: the centre starts at 1."""
    gradients = [np.float32([[[1.0], [-3.0]], [[0.0], [0.0]]])]
    strategy = plain(2)
    make = functools.partial(ElasticAveragingSGD, 0.1, alpha=0.25, period=1)
    optimizer, variables = build(strategy, make, [(1,)])
    variables[0].assign([1.0])
    (history,) = run(strategy, optimizer, variables, gradients)
    # 0.9 and 1.3, both pulled towards 1; then the centre is 1 + 0.25 (-0.1 + 0.3) = 1.05
    np.testing.assert_allclose(history[0], [[0.925], [1.225]], rtol=1e-6)
    np.testing.assert_allclose(history[1], [[0.95625], [1.18125]], rtol=1e-6)
    # 1.05 + 0.25 (-0.125 + 0.175)
    np.testing.assert_allclose(optimizer.shared["center"].numpy(), [1.0625], rtol=1e-6)


def test_an_elastic_pull_keeps_the_sum_of_workers_and_centre():
    """Where all workers are at hand: what they lose the centre gains."""
    x = np.random.default_rng(0).normal(size=[4, 5])
    moved, center = elastic_averaging_pull(list(x), x.mean(axis=0), np.ones(5), 0.2, 4)
    np.testing.assert_allclose(np.sum(moved, axis=0) + center, x.sum(axis=0) + 1)


def test_averaging_at_every_step_is_synchronous_sgd():
    gradients = random_gradients(30, 4, SHAPES)
    strategy = plain(4)
    optimizer, variables = build(
        strategy, functools.partial(PeriodicAveragingSGD, 0.1, 0.9, period=1), SHAPES
    )
    run(strategy, optimizer, variables, gradients)
    assert_replicas_equal(strategy, variables)
    sgd, expected = build(plain(), lambda: keras.optimizers.SGD(0.1, momentum=0.9), SHAPES)
    for step in range(30):
        sgd.apply([keras.ops.convert_to_tensor(g[step].mean(axis=0)) for g in gradients], expected)
    for variable, right in zip(variables, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), right.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "arguments", "text"),
    [
        (ElasticAveragingSGD, {"alpha": 0}, "`alpha` must be a positive float. Received: alpha=0"),
        (ElasticAveragingSGD, {"beta": -1.0}, "`beta` must be a positive float. .*beta=-1.0"),
        (ElasticAveragingSGD, {"period": 0}, "`period` must be a positive integer. .*period=0"),
        (PeriodicAveragingSGD, {"period": "a"}, "`period` must be a positive integer. .*='a'"),
        (PeriodicAveragingSGD, {"momentum": -1}, r"`momentum` must be a float in \[0, 1\). .*=-1"),
    ],
    ids=str,
)
def test_arguments_are_checked_at_construction(make, arguments, text):
    with pytest.raises(ValueError, match=f"Argument {text}"):
        make(**arguments)


@pytest.mark.parametrize(
    "optimizer",
    [
        ElasticAveragingSGD(0.1, 0.5, alpha=0.3, period=7, clipnorm=1.0, name="mine"),
        PeriodicAveragingSGD(0.1, 0.5, period=7, nesterov=True, weight_decay=0.1),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_config_round_trip(optimizer):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert type(again) is type(optimizer)
    assert again.get_config() == optimizer.get_config()
    assert again.period == 7
