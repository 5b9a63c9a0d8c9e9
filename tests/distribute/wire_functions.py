"""What the workers of `test_traffic_on_the_wire.py` do: train, and count."""

from __future__ import annotations

import keras
import numpy as np

import tfqcomm
from tests.network import interface_bytes


def train(compressor: str | None, width: int, steps: int) -> dict[str, float]:
    """Trains a perceptron of 784 x width + width x width weights; what was sent, by both counts."""
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy(compressor=compressor)
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([784]),
                keras.layers.Dense(width, activation="relu"),
                keras.layers.Dense(width, activation="relu"),
                keras.layers.Dense(10),
            ]
        )
        model.compile(
            optimizer="adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
    rng = np.random.default_rng(0)
    x = rng.normal(size=[16 * steps, 784]).astype(np.float32)
    y = rng.integers(0, 10, size=16 * steps)
    traffic = tfqcomm.callbacks.TrafficLogger(verbose=0)
    before = interface_bytes()
    model.fit(x, y, batch_size=16, shuffle=False, verbose=0, callbacks=[traffic])
    after = interface_bytes()
    (epoch,) = traffic.history
    return {
        "parameters": model.count_params(),
        "counted": epoch["bytes_sent"],
        "dense": epoch["dense_bytes"],
        "sent": after[0] - before[0],
        "received": after[1] - before[1],
    }
