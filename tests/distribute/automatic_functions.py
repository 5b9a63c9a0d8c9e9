"""What the workers of `test_automatic.py` do: train with a compressor that they choose together."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

import tfqcomm
from tfqcomm.state.ledger import ledger_of


def train(units: int) -> dict:
    """How the kernel travels, and what comes of two steps."""
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy("auto")
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input([units]), keras.layers.Dense(units)])
        model.compile("sgd", "mse")
    x = np.random.RandomState(0).randn(16, units).astype("float32")
    model.fit(x, x, batch_size=8, epochs=1, verbose=0, shuffle=False)
    routes = [str(route) for route in ledger_of(model.optimizer).routes]
    return {"routes": routes, "sum": float(np.sum(model.get_weights()[0]))}


def train_in_a_loop(units: int, devices: int) -> dict:
    """Likewise between processes of several devices, in a loop that AutoGraph converts."""
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy(
        "auto", hierarchical=True, devices_per_worker=devices
    )
    with strategy.scope():
        variable = keras.Variable(np.ones([units, units], "float32"), name="kernel")
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build([variable])

    def replica_step():
        rank = tf.distribute.get_replica_context().replica_id_in_sync_group
        optimizer.apply([tf.cast(rank, tf.float32) * tf.ones([units, units])], [variable])

    @tf.function
    def step():
        strategy.run(replica_step)

    step()
    local = strategy.experimental_local_results(variable.value)
    routes = [str(route) for route in ledger_of(optimizer).routes]
    return {"routes": routes, "values": [float(np.mean(value)) for value in local]}
