"""Keeps the moving statistics of layers equal on all replicas.

Keras 3 lets each replica update its own copy of batch normalization's moving mean and variance,
and never brings them together: replicas then predict differently, and a saved model is that of
one replica. The update is linear, so averaging after every step gives exactly the average of what
the replicas would have had on their own. They travel with the small dense tensors of the step.
"""

from __future__ import annotations

import tensorflow as tf

from tfqcomm import _tf_private


def values_to_average(model, strategy: tf.distribute.Strategy) -> list[tuple[tf.Variable, ...]]:
    """For each statistic of `model`, its variable on each local replica."""
    if model is None or strategy.num_replicas_in_sync == 1:
        return []
    return [
        strategy.experimental_local_results(variable.value)
        for variable in _tf_private.statistics(model)
    ]


def pack(moving: list[tuple[tf.Variable, ...]]) -> list[tf.Tensor]:
    """For each local replica float32[s + 1]: its statistics, and 1 if all of them are finite.

    A replica whose forward pass went wrong sends zeros, and takes what the others have.
    """
    packed = []
    for variables in zip(*moving, strict=True):
        values = tf.concat([tf.cast(tf.reshape(v, [-1]), tf.float32) for v in variables], 0)
        finite = tf.reduce_all(tf.math.is_finite(values))
        values = tf.where(finite, values, tf.zeros_like(values))
        packed.append(tf.concat([values, tf.cast(finite, tf.float32)[None]], 0))
    return packed


def unpack(mean: tf.Tensor, moving: list[tuple[tf.Variable, ...]]) -> None:
    """Assigns the mean over the replicas with finite statistics, float32[s + 1], to all."""
    share = mean[-1]
    sizes = [tf.size(variables[0]) for variables in moving]
    means = tf.split(mean[:-1] / tf.maximum(share, 1e-6), sizes)
    for variables, value in zip(moving, means, strict=True):
        for variable in variables:
            shaped = tf.cast(tf.reshape(value, variable.shape), variable.dtype)
            variable.assign(tf.where(share > 0, shaped, variable))
