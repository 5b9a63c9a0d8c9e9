"""Two optimizers of one program, of one name and for variables of the same shapes, never mix."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.replicas import assert_weights_close, compressing, copies, train
from tests.rungs import slow_unless
from tfqcomm.compressors import TopK
from tfqcomm.optimizers import CompAMS
from tfqcomm.state.ledger import ledger_of

STEPS = 12
X = np.random.default_rng(0).normal(size=[STEPS, 2, 4, 6]).astype("float32")


def twin(strategy, make):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential([keras.Input([6]), keras.layers.Dense(8, name="same")])
        optimizer = make()
        optimizer.build(model.trainable_variables)
    return model, optimizer


def loss(index, model, x):
    """Another one for each twin."""
    target = x[:, :1] if index == 0 else tf.sin(3 * x[:, 1:2])
    return tf.reduce_mean(tf.square(model(x) - target))


def second_loss(index, model, x):
    return loss(1, model, x)


def alone(strategy, make, which):
    pair = twin(strategy, make)
    train(strategy, [pair], loss if which == 0 else second_loss, [X])
    return pair


def adam():
    return keras.optimizers.Adam(0.01, name="twin")


def comp_ams():
    return CompAMS(0.01, compressor=TopK(0.1), min_size=0, name="twin")


@pytest.mark.parametrize(
    "make",
    slow_unless(
        lambda make: make is comp_ams,
        [adam, comp_ams],
    ),
    ids=["Adam", "CompAMS"],
)
@pytest.mark.parametrize(
    "together",
    slow_unless(lambda together: together, [True, False]),
    ids=["one function", "functions in turn"],
)
def test_twins_are_as_if_they_were_alone(make, together):
    strategy = compressing(2, TopK(0.1))
    first, second = twin(strategy, make), twin(strategy, make)
    if together:  # as a GAN's train step
        train(strategy, [first, second], loss, [X])
    else:  # every call traces a new function, which finds the residuals of the one before
        for part in (X[:5], X[5:]):
            train(strategy, [first], loss, [part])
            train(strategy, [second], second_loss, [part])
    for which, (model, optimizer) in enumerate([first, second]):
        expected, its_optimizer = alone(strategy, make, which)
        assert_weights_close(model, expected)
        owed = ledger_of(optimizer).residuals.total()
        right = ledger_of(its_optimizer).residuals.total()
        for a, b in zip(owed.values(), right.values(), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
            assert a.any()
    assert not np.array_equal(
        *(copies(strategy, model.weights)[0][0] for model, _ in (first, second))
    )
