"""The chief's script of `test_traffic_on_the_wire.py`: trains, and prints both counts of bytes.

python -m tfqcomm.launch --workers=2 --parameter_servers=2 -m tests.parameter_server.wire_script
"""

from __future__ import annotations

import json
import sys

import keras
import tensorflow as tf

import tfqcomm
from tests.network import interface_bytes

STEPS = 60
RESULT = "RESULT "


class Interface(keras.callbacks.Callback):
    """Counts what passes the loopback interface in the steps of each epoch."""

    def __init__(self):
        super().__init__()
        self.history: list[int] = []

    def on_epoch_begin(self, epoch, logs=None):
        self._before = interface_bytes("lo").sent

    def on_train_batch_end(self, batch, logs=None):
        if batch == STEPS - 1:
            self.history.append(interface_bytes("lo").sent - self._before)


def build_model() -> keras.Model:
    """A perceptron of 1,003,690 parameters."""
    return keras.Sequential(
        [
            keras.Input([784]),
            keras.layers.Dense(680, activation="relu"),
            keras.layers.Dense(680, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def build_embedding() -> keras.Model:
    """Nothing but a table of 6,400,000 parameters and a sum."""
    ids = keras.Input([256], dtype="int32")
    return keras.Model(ids, keras.ops.sum(keras.layers.Embedding(200_000, 32)(ids), [1, 2]))


def random_ids(context: tf.distribute.InputContext) -> tf.data.Dataset:
    seed = [2, context.input_pipeline_id]
    ids = tf.random.stateless_uniform([64, 256], seed, 0, 200_000, tf.int32)
    return tf.data.Dataset.from_tensor_slices((ids, tf.ones([64]))).batch(16)


def noise(context: tf.distribute.InputContext) -> tf.data.Dataset:
    x = tf.random.stateless_normal([64, 784], [0, context.input_pipeline_id])
    y = tf.random.stateless_uniform([64], [1, context.input_pipeline_id], 0, 10, tf.int32)
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(16)


def make_trainer(mode: str, compressed: str) -> tfqcomm.parameter_server.Trainer:
    quantized = {
        "optimizer": tfqcomm.optimizers.QAdam(1e-4, compressor=tfqcomm.compressors.LogGrid(0)),
        "weight_compressor": tfqcomm.compressors.UniformGrid(8),
    }
    if compressed.startswith("rows"):
        return tfqcomm.parameter_server.Trainer(
            build_embedding,
            optimizer=keras.optimizers.Adagrad(0.01),
            loss="mse",
            mode=mode,
            row_codec=compressed.partition(" ")[2],
        )
    return tfqcomm.parameter_server.Trainer(
        build_model,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        mode=mode,
        **(quantized if compressed == "compressed" else {"optimizer": "sgd"}),
    )


def main(mode: str, compressed: str) -> None:
    trainer = make_trainer(mode, compressed)
    data = random_ids if compressed.startswith("rows") else noise
    interface, traffic = Interface(), tfqcomm.callbacks.TrafficLogger(verbose=0)
    trainer.fit(data, epochs=2, steps_per_epoch=STEPS, callbacks=[interface, traffic], verbose=0)
    result = {
        "parameters": trainer.model.count_params(),
        "workers": len(trainer.workers),
        "passed": interface.history[1],
        "counted": traffic.history[1],
    }
    print(RESULT + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
