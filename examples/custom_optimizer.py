"""An optimizer of your own that brings compression: Lion on the mean of compressed gradients.

    python -m tfqcomm.launch --workers=2 examples/custom_optimizer.py

The base class exchanges the messages; what is written here is what any Keras optimizer has.
"""

import keras
import numpy as np
import tensorflow as tf

import tfqcomm


@keras.saving.register_keras_serializable()
class CompressedLion(tfqcomm.optimizers.CompressedOptimizer):
    """variable -= learning_rate * sign(beta_1 m + (1 - beta_1) g), g the mean of all messages."""

    def __init__(
        self, learning_rate=1e-3, beta_1=0.9, beta_2=0.99, *, compressor="top_k", **options
    ):
        super().__init__(learning_rate, compressor=compressor, **options)
        self.beta_1, self.beta_2 = beta_1, beta_2

    def build(self, variables):
        if not self.built:
            super().build(variables)
            (self.momenta,) = self.add_optimizer_variables(variables, ["momentum"])

    def update_step(self, gradient, variable, learning_rate):
        slot, g = self.momenta[self.index_of(variable)], tf.convert_to_tensor(gradient)
        m = tf.convert_to_tensor(slot)
        step = tf.sign(self.beta_1 * m + (1 - self.beta_1) * g)
        self.assign(slot, self.beta_2 * m + (1 - self.beta_2) * g)
        self.assign_sub(variable, tf.cast(learning_rate, step.dtype) * step)

    def get_config(self):
        return {**super().get_config(), "beta_1": self.beta_1, "beta_2": self.beta_2}


def main() -> None:
    """Trains with it."""
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy()
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([64]), keras.layers.Dense(128, "relu"), keras.layers.Dense(10)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(CompressedLion(1e-3), loss, metrics=["accuracy"])
    random = np.random.RandomState(0)
    x = random.randn(4096, 64).astype("float32")
    model.fit(x, (x @ random.randn(64, 10)).argmax(1), batch_size=64, epochs=3, verbose=2)


if __name__ == "__main__":
    main()
