"""Keeps the moving statistics of layers equal on all replicas.

Keras 3 lets each replica update its own copy of batch normalization's moving mean and variance,
and never brings them together: replicas then predict differently, and a saved model is that of
one replica. The update is linear, so averaging after every step gives exactly the average of what
the replicas would have had on their own. They travel with the small dense tensors of the step.

The rule, in `fit` and in loops of one's own:

what    float state that layers update while they train, of every floating type
whose   of the model that `fit` trains, and of every model or layer that a replica has called and
        that holds one of the optimizer's variables, with all the layers inside
when    in each step of the optimizer, skipped ones too: the forward pass took place
not     of frozen layers; the state of a stateful RNN, which is that of a replica's own sequences;
        what was made outside of the strategy's scope, of which there is one for all replicas;
        under optimizers whose replicas train alone: see `callbacks.AverageReplicas`
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.transport.base import Transport

Moving = list[tuple[tf.Variable, ...]]  # for each statistic, its variable on each local replica


def values_to_average(
    layers: Sequence[keras.layers.Layer], strategy: tf.distribute.Strategy
) -> Moving:
    """The statistics of models or layers, each once."""
    if strategy.num_replicas_in_sync == 1:
        return []
    found = {id(v.value): v.value for layer in layers for v in _tf_private.statistics(layer)}
    return [
        strategy.experimental_local_results(value)
        for value in found.values()
        if strategy.extended.variable_created_in_scope(value)
    ]


def split_by_width(moving: Moving) -> tuple[Moving, Moving]:
    """Those that float32 holds exactly, and those of float64."""
    wide = [variables for variables in moving if variables[0].dtype == tf.float64]
    return [variables for variables in moving if variables[0].dtype != tf.float64], wide


def average(transport: Transport, moving: Moving) -> None:
    """Averages statistics of one width by a collective of their own."""
    if moving:
        unpack(transport.all_reduce(pack(moving)) / transport.world, moving)


def pack(moving: Moving) -> list[tf.Tensor]:
    """For each local replica [s + 1]: its statistics, and 1 if all of them are finite.

    A replica whose forward pass went wrong sends zeros, and takes what the others have. The type
    is float32, or float64 where that of the first statistic is.
    """
    dtype = tf.float64 if moving[0][0].dtype == tf.float64 else tf.float32
    packed = []
    for variables in zip(*moving, strict=True):
        values = tf.concat([tf.cast(tf.reshape(v, [-1]), dtype) for v in variables], 0)
        finite = tf.reduce_all(tf.math.is_finite(values))
        values = tf.where(finite, values, tf.zeros_like(values))
        packed.append(tf.concat([values, tf.cast(finite, dtype)[None]], 0))
    return packed


def unpack(mean: tf.Tensor, moving: Moving) -> None:
    """Assigns the mean over the replicas with finite statistics, [s + 1], to all."""
    share = mean[-1]
    sizes = [tf.size(variables[0]) for variables in moving]
    means = tf.split(mean[:-1] / tf.maximum(share, 1e-6), sizes)
    for variables, value in zip(moving, means, strict=True):
        for variable in variables:
            shaped = tf.cast(tf.reshape(value, variable.shape), variable.dtype)
            variable.assign(tf.where(share > 0, shaped, variable))
