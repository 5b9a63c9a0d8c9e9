"""Batch normalization's moving statistics: the same on all replicas, and the average of them."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.replicas import assert_replicas_equal, compressing, copies, plain
from tfqcomm.optimizers import CompAMS
from tfqcomm.state import moving_statistics as statistics
from tfqcomm.state.ledger import ledger_of

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
    assert ledger_of(model.optimizer).meter.read().skipped_steps == 1
    assert_replicas_equal(strategy, model.weights)
    healthy = [x[:4], x[8:]]
    layer = model.layers[0]
    expected = (1 - MOMENTUM) * np.mean([part.mean(axis=0) for part in healthy], axis=0)
    np.testing.assert_allclose(layer.moving_mean.numpy(), expected, rtol=1e-5)
    expected = MOMENTUM + (1 - MOMENTUM) * np.mean([part.var(axis=0) for part in healthy], axis=0)
    np.testing.assert_allclose(layer.moving_variance.numpy(), expected, rtol=1e-5)
    np.testing.assert_array_equal(model.layers[1].kernel.numpy(), before[4])

    fit(model, inputs())  # and goes on
    assert ledger_of(model.optimizer).meter.read().skipped_steps == 1
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

    def both(self):
        return self.first_optimizer, self.second_optimizer

    def train_step(self, x):
        for part, optimizer in zip((self.first, self.second), self.both(), strict=True):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(part(x, training=True))) / 2
            variables = part.trainable_variables
            optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


class InContainers(TwoOptimizers):
    """Its optimizers are in a dictionary and a list."""

    def compile(self):
        super().compile()
        self.held = {"first": self.first_optimizer, "others": [self.second_optimizer]}
        del self.first_optimizer, self.second_optimizer

    def both(self):
        return self.held["first"], self.held["others"][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [TwoOptimizers, pytest.param(InContainers, marks=pytest.mark.slow)]
)
def test_a_model_with_several_optimizers_counts_as_well(kind):
    strategy = compressing(2, "top_k")
    with strategy.scope():
        model = kind()
        model.compile()
    model.fit(tf.data.Dataset.from_tensor_slices(inputs()).batch(BATCH), verbose=0)
    assert_replicas_equal(strategy, model.variables)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_statistics_of_other_types_do_not_drift_apart_or_lose_digits(dtype):
    """Those of bfloat16 were not averaged at all, and those of float64 rounded to float32."""
    strategy = compressing(2, "top_k")
    keras.config.set_dtype_policy(dtype)
    model = compiled(strategy)
    layer = model.layers[0]
    fit(model, inputs())
    assert_replicas_equal(strategy, [layer.moving_mean, layer.moving_variance])
    if dtype == "float64":
        mean, variance = moving(inputs().astype("float64"), 2)
        np.testing.assert_allclose(layer.moving_mean.numpy(), mean, rtol=1e-13)
        np.testing.assert_allclose(layer.moving_variance.numpy(), variance, rtol=1e-13)


def train_by_hand(strategy, call, optimizer, variables, x):
    """A loop of one's own: `call` is the forward pass of a replica."""
    world = strategy.num_replicas_in_sync

    def replica_step(x):
        start = tf.distribute.get_replica_context().replica_id_in_sync_group * (BATCH // world)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(call(x[start : start + BATCH // world]))) / world
        optimizer.apply(tape.gradient(loss, variables), variables)

    @tf.function
    def step(x):
        strategy.run(replica_step, args=(x,))

    for batch in x.reshape([-1, BATCH, FEATURES]):
        step(tf.constant(batch))


@pytest.mark.slow
@pytest.mark.parametrize("affine", [True, False])
def test_a_loop_of_ones_own_averages_statistics_as_fit_does(affine):
    """They were never averaged there: only `fit` said which model it trains."""
    strategy = compressing(2, "top_k")
    with strategy.scope():
        normalization = keras.layers.BatchNormalization(
            momentum=MOMENTUM, center=affine, scale=affine
        )
        model = keras.Sequential([keras.Input([FEATURES]), normalization, keras.layers.Dense(1)])
        other = keras.Sequential([keras.Input([FEATURES]), keras.layers.BatchNormalization()])
        optimizer = keras.optimizers.SGD()
        optimizer.build(model.trainable_variables)

    def call(x):
        other(x, training=True)  # which nobody trains: each replica keeps its own
        return model(x, training=True)

    train_by_hand(strategy, call, optimizer, model.trainable_variables, inputs())
    mean, variance = moving(inputs(), 2)
    np.testing.assert_allclose(normalization.moving_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(normalization.moving_variance.numpy(), variance, rtol=1e-5)
    assert_replicas_equal(strategy, model.variables)
    one, two = copies(strategy, [other.layers[0].moving_mean])
    assert not np.array_equal(one, two)


def test_layers_of_a_loop_need_no_model():
    strategy = compressing(2, "top_k")
    with strategy.scope():
        normalization, dense = keras.layers.BatchNormalization(), keras.layers.Dense(1)
        normalization.build([None, FEATURES])
        dense.build([None, FEATURES])
        optimizer = keras.optimizers.SGD()
    variables = [*normalization.trainable_variables, *dense.trainable_variables]
    with strategy.scope():
        optimizer.build(variables)
    train_by_hand(
        strategy, lambda x: dense(normalization(x, training=True)), optimizer, variables, inputs()
    )
    assert_replicas_equal(strategy, normalization.variables)


def test_a_layer_adapted_before_the_scope_does_not_end_in_an_index_error():
    """There is one `Normalization` for all replicas, and TensorFlow's own strategies train it."""
    adapted = keras.layers.Normalization()
    adapted.adapt(inputs())
    strategy = compressing(2, "top_k")
    with strategy.scope():
        normalization = keras.layers.BatchNormalization(momentum=MOMENTUM)
        layers = [adapted, normalization, keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input([FEATURES]), *layers])
        model.compile("sgd", "mse")
    before = [v.numpy() for v in adapted.variables]
    fit(model, inputs())
    assert_replicas_equal(strategy, normalization.variables)
    np.testing.assert_equal([v.numpy() for v in adapted.variables], before)


@pytest.mark.slow
def test_the_state_of_a_stateful_rnn_stays_with_its_replica():
    """It belongs to the sequences that the replica is reading; Keras calls it no weight."""
    strategy = compressing(2, "top_k")
    with strategy.scope():
        rnn = keras.layers.SimpleRNN(3, stateful=True)
        model = keras.Sequential(
            [keras.Input([2, 2], batch_size=BATCH // 2), rnn, keras.layers.BatchNormalization()]
        )
        model.compile(keras.optimizers.SGD(0.0), "mse")
    x = inputs(1).reshape([BATCH, 2, 2])
    data = tf.data.Dataset.from_tensor_slices((x, x[:, 0, :1])).batch(BATCH, drop_remainder=True)
    model.fit(data, verbose=0)
    states = copies(strategy, rnn.states)
    for replica, part in zip(states, np.split(x, 2), strict=True):
        rnn.reset_states()
        state = np.zeros([BATCH // 2, 3])
        kernel, recurrent, bias = rnn.get_weights()
        for step in range(2):
            state = np.tanh(part[:, step] @ kernel + state @ recurrent + bias)
        np.testing.assert_allclose(replica[0], state, atol=1e-5)
    assert_replicas_equal(strategy, model.layers[1].variables)
