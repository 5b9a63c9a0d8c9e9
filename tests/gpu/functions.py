"""What the workers of `test_training.py` do: train with each compressor, joined by NCCL."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

import tfqcomm
from tests.gpu.devices import KIND


def compiled() -> keras.Model:
    """64-128-4."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(128, activation="relu"), keras.layers.Dense(4)]
    model = keras.Sequential([keras.Input([64]), *layers])
    model.compile("adam", "mse")
    return model


def fit(model: keras.Model) -> None:
    """Six steps."""
    x = np.random.default_rng(0).normal(size=[96, 64]).astype("float32")
    model.fit(x, x[:, :4], batch_size=32, epochs=2, verbose=0)


def train(schedules: Sequence[tuple[str, str]]) -> list[tuple[str, bytes]]:
    """After a few steps with each (compressor, schedule): the device, and the weights' bytes."""
    if KIND == "GPU":
        index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        tf.config.set_visible_devices(tf.config.list_physical_devices("GPU")[index], "GPU")
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=tf.distribute.experimental.CommunicationImplementation.NCCL
    )
    trained = []
    for compressor, schedule in schedules:
        strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy(
            compressor, schedule=schedule, min_size=0, communication_options=options
        )
        with strategy.scope():
            model = compiled()
        fit(model)
        weights = b"".join(weight.tobytes() for weight in model.get_weights())
        trained.append((strategy.extended.worker_devices[0], weights))
    return trained
