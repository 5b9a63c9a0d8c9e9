"""Replicas whose variables differ: each one's own copies, alone and as one vector.

Letters: d elements of all variables, L local replicas.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf


def values_of(variables: Sequence[keras.Variable | tf.Variable]) -> list[tf.Variable]:
    """TensorFlow's variables, mirrored or not, inside those of Keras."""
    return [v.value if isinstance(v, keras.Variable) else v for v in variables]


def copies(
    strategy: tf.distribute.Strategy, variables: Sequence[keras.Variable | tf.Variable]
) -> list[tuple[tf.Variable, ...]]:
    """For each local replica its own copy of every variable; plain variables, on its device.

    To be called in cross-replica context. What is assigned to a copy stays on its replica.
    """
    local = [strategy.experimental_local_results(value) for value in values_of(variables)]
    return list(zip(*local, strict=True))


def to_vector(variables: Sequence[tf.Variable]) -> tf.Tensor:
    """float32[d]."""
    return tf.concat([tf.cast(tf.reshape(v, [-1]), tf.float32) for v in variables], 0)


def assign_vector(variables: Sequence[tf.Variable], vector: tf.Tensor) -> None:
    """Inverse of `to_vector`."""
    parts = tf.split(vector, [v.shape.num_elements() for v in variables])
    for variable, part in zip(variables, parts, strict=True):
        variable.assign(tf.cast(tf.reshape(part, variable.shape), variable.dtype))
