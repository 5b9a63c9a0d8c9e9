"""Softmax regression: the linear classifier of several classes."""

from __future__ import annotations

from collections.abc import Sequence

import keras


def softmax_regression(
    input_shape: Sequence[int] = (28, 28, 1),
    num_classes: int = 10,
    kernel_initializer="zeros",
) -> keras.Model:
    """Returns a linear classifier: 7,850 parameters with the defaults, logits.

    A convex problem, so that it may start anywhere; at zero a method that makes weights exactly
    zero keeps those that the data never ask for.

    Args:
        input_shape: Shape of one example; it is flattened.
        num_classes: Number of logits.
        kernel_initializer: Of the weights; the biases start at zero.

    References:
        Bishop: Pattern Recognition and Machine Learning, 2006, Section 4.3.4.
    """
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(tuple(input_shape)),
            layers.Flatten(),
            layers.Dense(num_classes, kernel_initializer=kernel_initializer),
        ],
        name="softmax_regression",
    )
