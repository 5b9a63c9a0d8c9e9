"""A learner's inner step is the step of the optimizer of Keras."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.rungs import slow_unless
from tfqcomm.parameter_server.diloco.inner import InnerStep

OPTIMIZERS = {
    "SGD": functools.partial(keras.optimizers.SGD, momentum=0.9, nesterov=True),
    "Adam": functools.partial(keras.optimizers.Adam, clipnorm=1.0),
    "AdamW": functools.partial(keras.optimizers.AdamW, weight_decay=0.1, amsgrad=True),
    "Adagrad": keras.optimizers.Adagrad,
    "Adadelta": keras.optimizers.Adadelta,
    "Adamax": keras.optimizers.Adamax,
    "RMSprop": functools.partial(keras.optimizers.RMSprop, centered=True, momentum=0.5),
    "Nadam": keras.optimizers.Nadam,
    "Lion": keras.optimizers.Lion,
    "Lamb": keras.optimizers.Lamb,
    "Adafactor": keras.optimizers.Adafactor,
    "Muon": functools.partial(keras.optimizers.Muon, adam_lr_ratio=0.5),
}
QUICK = {"Adam", "AdamW", "Muon"}


@pytest.mark.parametrize("name", slow_unless(QUICK.__contains__, list(OPTIMIZERS)))
def test_steps_are_those_of_keras(name):
    rng = np.random.default_rng(0)
    shapes = [[4, 3], [3], [2, 2]]
    optimizer = OPTIMIZERS[name](0.05)
    variables = [keras.Variable(rng.normal(size=s), dtype="float32", name="kernel") for s in shapes]
    inner = InnerStep(optimizer, variables)
    own = [tf.Variable(v.numpy()) for v in variables]
    state = [tf.Variable(value) for value in inner.state]
    optimizer.build(variables)

    @tf.function(autograph=False)
    def step(gradients):
        # The last one has no gradient: it stays as it is.
        def take():
            inner(own, state, [*gradients, None], tf.constant(0.05))
            return tf.constant(True)

        return tf.cond(tf.reduce_sum(gradients[0]) < 1e9, take, lambda: tf.constant(False))

    for number in range(10):
        gradients = [tf.constant(rng.normal(size=shape), tf.float32) for shape in shapes[:2]]
        assert step(gradients)
        optimizer.apply(gradients, variables[:2])
        for found, expected in zip(own, variables, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=f"step {number}")
    assert int(state[0]) == 10


def test_excluded_variables_do_not_decay():
    variables = [keras.Variable([1.0], name=name) for name in ("kernel", "bias")]
    optimizer = keras.optimizers.SGD(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=variables[1:])
    inner = InnerStep(optimizer, variables)
    own = [tf.Variable([1.0]), tf.Variable([1.0])]
    state = [tf.Variable(value) for value in inner.state]
    tf.function(lambda: inner(own, state, [tf.zeros([1])] * 2, tf.constant(0.1)))()
    np.testing.assert_allclose([v.numpy().item() for v in own], [0.95, 1.0], rtol=1e-6)
