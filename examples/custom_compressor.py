"""A compressor of your own: 8 bits for each entry, the upper half of a float16.

    python -m tfqcomm.launch --workers=2 examples/custom_compressor.py

A codec turns `float32[n]` into words and back. It knows nothing of workers or optimizers.
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

import tfqcomm


@keras.saving.register_keras_serializable()
@dataclasses.dataclass(frozen=True)
class Float8(tfqcomm.compressors.Compressor):
    """s x' where s = max|x| and x' is x / s with 5 bits of exponent and 2 of mantissa."""

    def num_words(self, n):
        return 1 + -(-n // 4)  # s, then four entries to a word; bytes on the wire are 4 times this

    def encode_implementation(self, x, seed):
        scale = tf.maximum(tf.reduce_max(tf.abs(x)), 0.0)  # of no entries, too
        halves = tf.cast(tf.math.divide_no_nan(x, scale), tf.float16)
        octets = tf.bitcast(halves, tf.uint8)[:, 1]  # the upper byte: sign, exponent, 2 bits
        octets = tf.pad(octets, [[0, -x.shape[0] % 4]])
        body = tf.bitcast(tf.reshape(octets, [-1, 4]), tf.int32)
        return tf.concat([tf.bitcast([scale], tf.int32), body], axis=0)

    def decode_implementation(self, words, n):
        octets = tf.reshape(tf.bitcast(words[1:], tf.uint8), [-1])[:n]
        halves = tf.bitcast(tf.stack([tf.zeros_like(octets), octets], axis=1), tf.float16)
        return tf.bitcast(words[0], tf.float32) * tf.cast(halves, tf.float32)

    def error_bound(self, n):  # ||C(x) - x||^2 <= q ||x||^2; below 1: error feedback is on
        return 1 / 8 + n / 2**32  # of entries above s / 2^14, and of those below


def main() -> None:
    """Trains with it."""
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy(Float8())
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([64]), keras.layers.Dense(128, "relu"), keras.layers.Dense(10)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    random = np.random.RandomState(0)
    x = random.randn(4096, 64).astype("float32")
    traffic = tfqcomm.callbacks.TrafficLogger()
    y = (x @ random.randn(64, 10)).argmax(1)
    model.fit(x, y, batch_size=64, epochs=3, callbacks=[traffic], verbose=2)


if __name__ == "__main__":
    main()
