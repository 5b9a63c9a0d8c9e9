"""A causal convolutional network that predicts the next character."""

from __future__ import annotations

import keras

from models.comp_ams_imdb_lstm import DenseEmbedding


def character_cnn(num_characters: int = 96) -> keras.Model:
    """Returns a CNN for texts of any length: 224,256 parameters for 96 characters, logits.

    embedding(32) - causal conv8(256) - relu - norm - causal conv2(256) with dilation 8 - relu -
    shortcut - norm - fc: at each position logits of the character after it, from the 16 up to it.
    Neither biases nor scales, as in many of today's language models: all is in four matrices. The
    convolutions are products with characters side by side, which on CPUs are faster than `Conv1D`
    with a dilation.

    Args:
        num_characters: how many there are, int32[batch, length] below it.

    References:
        van den Oord et al.: WaveNet: A Generative Model for Raw Audio, 2016, Section 2.1,
        https://arxiv.org/abs/1609.03499
    """
    texts = keras.Input((None,), dtype="int32")
    x = DenseEmbedding(num_characters, 32)(texts)
    x = _norm(_causal_conv(x, 256, 8))
    x = _norm(x + _causal_conv(x, 256, 2, dilation=8))
    logits = keras.layers.Dense(num_characters, use_bias=False)(x)
    return keras.Model(texts, logits, name="character_cnn")


def _causal_conv(x, filters: int, taps: int, dilation: int = 1):
    earlier = [_delayed(x, tap * dilation) for tap in range(1, taps)]
    side_by_side = keras.layers.Concatenate()([x, *earlier])
    return keras.layers.Dense(filters, activation="relu", use_bias=False)(side_by_side)


def _delayed(x, steps: int):
    return keras.ops.pad(x, [[0, 0], [steps, 0], [0, 0]])[:, :-steps]


def _norm(x):
    return keras.layers.LayerNormalization(center=False, scale=False)(x)
