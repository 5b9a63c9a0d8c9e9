"""Variables' values side by side in one vector."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf


def flat_values(variables: Sequence[keras.Variable], dtype=np.float32) -> np.ndarray:
    """The variables' values in a row."""
    flat = [np.asarray(v, dtype).ravel() for v in variables]
    return np.concatenate([np.zeros([0], dtype), *flat])


def assign_flat(variables: Sequence[keras.Variable], values: np.ndarray) -> None:
    """Inverse of `flat_values`."""
    start = 0
    for variable in variables:
        size = int(np.prod(variable.shape))
        variable.assign(values[start : start + size].reshape(variable.shape))
        start += size


def split_like(vector: tf.Tensor, variables: Sequence[keras.Variable]) -> list[tf.Tensor]:
    """Cuts a vector into tensors of the variables' shapes and dtypes."""
    sizes = [int(np.prod(v.shape)) for v in variables]
    return [
        tf.cast(tf.reshape(part, v.shape), v.dtype)
        for part, v in zip(tf.split(vector, sizes) if sizes else [], variables, strict=True)
    ]


def join(variables: Sequence[keras.Variable], scope: keras.StatelessScope, dtype) -> tf.Tensor:
    """The variables' values in a scope as one vector."""
    flat = [tf.cast(tf.reshape(scope.get_current_value(v), [-1]), dtype) for v in variables]
    return tf.concat([tf.zeros([0], dtype), *flat], 0)
