"""What was made outside of `strategy.scope()` is named, with the line to move."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfqcomm
from tfqcomm.distribute import CompressedAllReduce

X, Y = np.ones([8, 4], "float32"), np.ones([8, 2], "float32")


@pytest.fixture
def strategy(mirrored_strategy):
    return mirrored_strategy(2, CompressedAllReduce("block_sign"))


def build(layer=None):
    return keras.Sequential([keras.Input([4]), layer or keras.layers.Dense(2)], name="mine")


def model_made_outside(strategy):
    model = build()
    with strategy.scope():
        model.compile("adam", "mse")


def model_made_and_compiled_outside(strategy):
    model = build()
    model.compile("adam", "mse")
    with strategy.scope():
        model.fit(X, Y, verbose=0)


def own_optimizer_with_a_model_made_outside(strategy):
    model = build()
    with strategy.scope():
        model.compile(tfqcomm.optimizers.CompAMS(1e-3), "mse")


def layer_made_outside(strategy):
    layer = keras.layers.Dense(3, name="shared")
    layer.build([None, 4])
    with strategy.scope():
        model = keras.Sequential([keras.Input([4]), layer, keras.layers.Dense(2)], name="mine")
        model.compile("adam", "mse")


def compiled_outside(strategy):
    with strategy.scope():
        model = build()
    model.compile("adam", "mse")


def optimizer_made_outside(strategy):
    optimizer = keras.optimizers.Adam(name="sent")
    with strategy.scope():
        model = build()
        model.compile(optimizer, "mse")


def model_of_another_strategy(strategy):
    with tf.distribute.MirroredStrategy(["CPU:2", "CPU:3"]).scope():
        model = build()
    with strategy.scope():
        model.compile("adam", "mse")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (model_made_outside, "The model 'mine' was made outside of `strategy.scope"),
        (model_made_and_compiled_outside, "The model 'mine' was made outside of `strategy.sco"),
        (own_optimizer_with_a_model_made_outside, "`with strategy.scope(): model = ...; model.com"),
        (layer_made_outside, "The weight 'shared/kernel' of the model 'mine' was made outside of"),
        (compiled_outside, "The model 'mine' must be compiled in the scope in which it was made"),
        (optimizer_made_outside, "The optimizer 'sent' of the model 'mine' was made outside of"),
        (model_of_another_strategy, "The model 'mine' belongs to another strategy"),
    ],
)
def test_the_mistake_is_named(strategy, mistake, message):
    with pytest.raises(ValueError) as caught:
        mistake(strategy)
    assert message in str(caught.value)
    assert "MirroredStrategy" in str(caught.value)


def test_what_works_is_let_through(strategy):
    metric = keras.metrics.MeanSquaredError()  # made outside, and may be
    with strategy.scope():
        model, optimizer = build(), keras.optimizers.SGD()
    model.compile(optimizer, "mse", metrics=[metric])  # outside, with an optimizer made inside
    model.fit(X, Y, verbose=0)
    alone = build()
    alone.compile("adam", "mse")
    alone.fit(X, Y, verbose=0)
    with strategy.scope():
        unbuilt = keras.Sequential([keras.layers.Dense(2)])
        unbuilt.compile({"class_name": "Adam", "config": {}}, "mse")
    unbuilt.fit(X, Y, verbose=0)
