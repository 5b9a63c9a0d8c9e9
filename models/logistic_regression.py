"""Logistic regression: the linear classifier of two classes."""

from __future__ import annotations

import keras


def logistic_regression(num_features: int = 123, kernel_initializer="zeros") -> keras.Model:
    """Returns a linear classifier of two classes: 124 parameters with the defaults, logits.

    The logit of class 0 is always zero, that of class 1 is linear in the features. So the softmax
    of both is the logistic function of the second, and whatever trains and scores networks of many
    classes fits this one too.

    Args:
        num_features: Length of one example; LIBSVM's a9a has 123.
        kernel_initializer: Of the weights; the bias starts at zero.

    References:
        Bishop: Pattern Recognition and Machine Learning, 2006, Section 4.3.2.
    """
    features = keras.Input((num_features,))
    logit = keras.layers.Dense(1, kernel_initializer=kernel_initializer)(features)
    logits = keras.ops.pad(logit, [[0, 0], [1, 0]])
    return keras.Model(features, logits, name="logistic_regression")
