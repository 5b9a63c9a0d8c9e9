"""Multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

import keras


def mlp(
    input_shape: Sequence[int] = (28, 28, 1),
    num_classes: int = 10,
    hidden_units: Sequence[int] = (128,),
) -> keras.Model:
    """Returns a perceptron with ReLU units: 101,770 parameters with the defaults, logits.

    Each layer from `n` to `m` units has `(n + 1) * m` parameters, so its size is easy to set: a
    `(1000, 1000)` network on 784 inputs has 1,796,010.

    Args:
        input_shape: Shape of one example; it is flattened.
        num_classes: Number of logits.
        hidden_units: Width of each hidden layer. Empty: softmax regression.

    References:
        Learning Representations by Back-Propagating Errors (Rumelhart, Hinton, Williams, 1986).
    """
    layers = keras.layers
    hidden = [layers.Dense(units, activation="relu") for units in hidden_units]
    return keras.Sequential(
        [keras.Input(tuple(input_shape)), layers.Flatten(), *hidden, layers.Dense(num_classes)],
        name="mlp",
    )
