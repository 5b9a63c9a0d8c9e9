"""What the workers of `test_automatic.py` do: train with a compressor that they choose together."""

from __future__ import annotations

import keras
import numpy as np

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
