"""Batch normalization's moving statistics: the same on all replicas, and the average of them."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.replicas import assert_replicas_equal, compressing, copies, plain
from tfqcomm import statistics
from tfqcomm.aggregators.exchange import exchange_of
from tfqcomm.optimizers import CompAMS

FEATURES, STEPS, BATCH, MOMENTUM = 4, 5, 12, 0.9


def compiled(strategy, optimizer=keras.optimizers.SGD, trainable=True):
    with strategy.scope():
        normalization = keras.layers.BatchNormalization(momentum=MOMENTUM)
        normalization.trainable = trainable
        model = keras.Sequential([keras.Input([FEATURES]), normalization, keras.layers.Dense(1)])
        model.compile(optimizer(), loss="mse")
    return model


def fit(model, x):
    model.fit(x, x[:, :1], batch_size=BATCH, shuffle=False, verbose=0)


def inputs(steps=STEPS):
    """Every row of another scale, so that every replica sees others."""
    x = np.random.default_rng(0).normal(size=[steps * BATCH, FEATURES])
    return (x * np.arange(1, len(x) + 1)[:, None] / 10).astype("float32")


def moving(batches, world):
    """The average over replicas that each keep their own: mean, variance."""
    means, variances = np.zeros([world, FEATURES]), np.ones([world, FEATURES])
    for batch in batches.reshape([-1, world, BATCH // world, FEATURES]):
        means = MOMENTUM * means + (1 - MOMENTUM) * batch.mean(axis=1)
        variances = MOMENTUM * variances + (1 - MOMENTUM) * batch.var(axis=1)
    return means.mean(axis=0), variances.mean(axis=0)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("optimizer", [CompAMS, keras.optimizers.SGD])
def test_statistics_are_the_average_of_independent_ones(world, optimizer):
    strategy = plain(world) if optimizer is CompAMS else compressing(world, "top_k")
    model = compiled(strategy, optimizer)
    fit(model, inputs())
    assert_replicas_equal(strategy, model.weights)
    mean, variance = moving(inputs(), world)
    layer = model.layers[0]
    np.testing.assert_allclose(layer.moving_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance.numpy(), variance, rtol=1e-5)


def test_a_sick_replica_does_not_poison_the_others():
    """Its forward pass made NaN of its own statistics; it takes over what the others have."""
    strategy = compressing(3, "block_sign")
    model = compiled(strategy)
    x = inputs(steps=1)
    x[5] = np.nan  # in the part of the second replica
    before = model.get_weights()
    fit(model, x)
    assert exchange_of(model.optimizer).meter.read().skipped_steps == 1
    assert_replicas_equal(strategy, model.weights)
    healthy = [x[:4], x[8:]]
    layer = model.layers[0]
    expected = (1 - MOMENTUM) * np.mean([part.mean(axis=0) for part in healthy], axis=0)
    np.testing.assert_allclose(layer.moving_mean.numpy(), expected, rtol=1e-5)
    expected = MOMENTUM + (1 - MOMENTUM) * np.mean([part.var(axis=0) for part in healthy], axis=0)
    np.testing.assert_allclose(layer.moving_variance.numpy(), expected, rtol=1e-5)
    np.testing.assert_array_equal(model.layers[1].kernel.numpy(), before[4])

    fit(model, inputs())  # and goes on
    assert exchange_of(model.optimizer).meter.read().skipped_steps == 1
    assert_replicas_equal(strategy, model.weights)


def test_frozen_statistics_stay_to_the_bit():
    strategy = compressing(3, "top_k")
    model = compiled(strategy, trainable=False)
    layer = model.layers[0]
    layer.moving_mean.assign(np.float32([0.1, 1 / 3, 1e-30, 7]))
    before = layer.moving_mean.numpy()
    fit(model, inputs())
    for (replica,) in copies(strategy, [layer.moving_mean]):
        np.testing.assert_array_equal(replica, before)


def test_what_is_nowhere_finite_stays():
    """A constant of infinity, say: then there is nothing to average, and nothing is changed."""
    moving = [
        tuple(tf.Variable([1.0, np.inf]) for _ in range(2)),
        (tf.Variable(1.0), tf.Variable(3.0)),
    ]
    packed = statistics.pack(moving)
    np.testing.assert_array_equal(packed, np.zeros([2, 4]))
    statistics.unpack(sum(packed) / 2, moving)
    np.testing.assert_array_equal([v.numpy() for v in moving[0]], [[1.0, np.inf]] * 2)
    assert [v.numpy() for v in moving[1]] == [1.0, 3.0]


class TwoOptimizers(keras.Model):
    """As a GAN: two parts, each with batch normalization and an optimizer of its own."""

    def __init__(self):
        super().__init__()
        for name in ("first", "second"):
            layers = [keras.layers.BatchNormalization(), keras.layers.Dense(FEATURES)]
            setattr(self, name, keras.Sequential([keras.Input([FEATURES]), *layers]))

    def compile(self):
        super().compile()
        self.first_optimizer, self.second_optimizer = (keras.optimizers.SGD() for _ in range(2))

    def call(self, x):
        return self.second(self.first(x))

    def train_step(self, x):
        parts = [(self.first, self.first_optimizer), (self.second, self.second_optimizer)]
        for part, optimizer in parts:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(part(x, training=True))) / 2
            variables = part.trainable_variables
            optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


def test_a_model_with_several_optimizers_counts_as_well():
    strategy = compressing(2, "top_k")
    with strategy.scope():
        model = TwoOptimizers()
        model.compile()
    model.fit(tf.data.Dataset.from_tensor_slices(inputs()).batch(BATCH), verbose=0)
    assert_replicas_equal(strategy, model.variables)
