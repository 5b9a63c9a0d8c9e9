"""Several devices of one machine: TensorFlow's own MirroredStrategy, with compressed gradients.

    python examples/one_machine.py

Here on two logical CPU devices; with GPUs leave the first lines of `main` out, and the devices.
Between devices of one machine bytes are seldom what is short: this is to try compressors, and what
they do to a model, before a run on several machines.
"""

import keras
import numpy as np
import tensorflow as tf

import tfqcomm


def make_data():
    """Random points, and which of ten random directions each is closest to."""
    random = np.random.RandomState(0)
    x = random.randn(4096, 64).astype("float32")
    return x, (x @ random.randn(64, 10)).argmax(1)


def train(compressor: str) -> str:
    """Trains with a compressor; returns what came of it."""
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tfqcomm.distribute.CompressedAllReduce(compressor)
    )
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([64]), keras.layers.Dense(128, "relu"), keras.layers.Dense(10)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    traffic = tfqcomm.callbacks.TrafficLogger(verbose=0)
    history = model.fit(*make_data(), batch_size=64, epochs=3, callbacks=[traffic], verbose=0)
    accuracy, ratio = history.history["accuracy"][-1], traffic.history[-1]["ratio"]
    return f"{compressor:12} accuracy {accuracy:.3f}, {ratio:5.1f} times fewer bytes"


def main() -> None:
    """Compares compressors."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    for compressor in ("identity", "block_sign", "top_k"):
        print(train(compressor), flush=True)


if __name__ == "__main__":
    main()
