"""The IMDB network of COMP-AMS."""

import keras


def comp_ams_imdb_lstm() -> keras.Model:
    """Returns the LSTM of COMP-AMS for 500 word numbers below 2000: 93,122 parameters, logits.

    embedding(32) - LSTM(64) - fc(64) - relu - fc(2). The number 0 is padding, which the LSTM skips.
    The paper gives everything but the width of the first fully connected layer.

    References:
        Li, Karimi, Li: On Distributed Adaptive Optimization with Gradient Compression, ICLR 2022,
        Section 5, https://arxiv.org/abs/2205.05632
    """
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((500,), dtype="int32"),
            DenseEmbedding(2000, 32, mask_zero=True),
            layers.LSTM(64),
            layers.Dense(64, activation="relu"),
            layers.Dense(2),
        ],
        name="comp_ams_imdb_lstm",
    )


@keras.saving.register_keras_serializable(package="models")
class DenseEmbedding(keras.layers.Embedding):
    """An embedding with a dense gradient, which is compressed as one tensor like any other.

    The gradient of `keras.layers.Embedding` is a row for every word of the batch. With 500 words
    an example those are more floats than the whole table, and no compressor of the paper applies.
    """

    def call(self, inputs):
        """Looks the words up; the gradient of the product is dense."""
        return keras.ops.take(1.0 * self.embeddings, inputs, axis=0)
