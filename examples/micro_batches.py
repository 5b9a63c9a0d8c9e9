"""Gradients of several micro-batches summed within one step: for batches too large for memory.

    python -m tfqcomm.launch --workers=2 examples/micro_batches.py

Keras' `gradient_accumulation_steps` does not work under a strategy. Nor does an `apply` in
`tf.cond`, every few steps: "merge_call called while defining a new graph or a tf.function". An
`apply` in each step, after several gradients, does.
"""

import keras
import numpy as np
import tensorflow as tf

import tfqcomm

PARTS = 4  # of a replica's share of a batch, whose rows must be a multiple of this


class MicroBatches(keras.Model):
    """A functional model that holds the activations of one part of a batch at a time."""

    def train_step(self, data):
        x, y = data
        sums = [tf.zeros(v.shape, v.dtype) for v in self.trainable_weights]
        for part, labels in zip(tf.split(x, PARTS), tf.split(y, PARTS), strict=True):
            with tf.GradientTape() as tape:
                predicted = self(part, training=True)
                loss = self.compute_loss(x=part, y=labels, y_pred=predicted) / PARTS
                loss = self.optimizer.scale_loss(loss)
            gradients = tape.gradient(loss, self.trainable_weights)
            sums = [a + b for a, b in zip(sums, gradients, strict=True)]
            logs = self.compute_metrics(part, labels, predicted)
        self.optimizer.apply(sums, self.trainable_weights)
        return {name: value for name, value in logs.items() if name != "loss"}


def main() -> None:
    """Trains with it."""
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy("block_sign")
    keras.utils.set_random_seed(0)
    with strategy.scope():
        inputs = keras.Input([64])
        outputs = keras.layers.Dense(10)(keras.layers.Dense(128, "relu")(inputs))
        model = MicroBatches(inputs, outputs)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    random = np.random.RandomState(0)
    x = random.randn(4096, 64).astype("float32")
    model.fit(x, (x @ random.randn(64, 10)).argmax(1), batch_size=64, epochs=3, verbose=2)


if __name__ == "__main__":
    main()
