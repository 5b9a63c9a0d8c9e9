"""The logs of a step, averaged over all replicas in one collective, however many they are.

Letters: L local replicas, P processes, n numbers of all logs.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.transport.base import Transport


def mean(transport: Transport, strategy: tf.distribute.Strategy, logs):
    """The mean over all replicas of each leaf of `logs`: scalars or arrays, of any number type."""
    with _tf_private.doing("the logs of a step"):
        return mean_and_flags(transport, strategy, logs, tf.constant([False]))[0]


def mean_and_flags(
    transport: Transport, strategy: tf.distribute.Strategy, logs, flags: tf.Tensor
) -> tuple:
    """Likewise, and every worker's `flags` beside it.

    Args:
        logs: structure of what each replica returned.
        flags: bool[f] of this process.

    Returns:
        A structure of tensors, and int32[P, f].
    """
    leaves = [strategy.experimental_local_results(leaf) for leaf in tf.nest.flatten(logs)]
    leaves = [[tf.convert_to_tensor(value) for value in leaf] for leaf in leaves]
    numbers = [leaf for leaf in leaves if leaf[0].dtype.is_floating or leaf[0].dtype.is_integer]
    dtype = _sum_type(numbers)
    with tf.device(transport.device):
        totals = [_total(leaf, dtype) for leaf in numbers]
        vector = tf.concat([*totals, tf.cast(flags, dtype)], 0)
        gathered = transport.gather_vectors(vector)  # [P, n + f]
        sizes = [tf.size(leaf[0]) for leaf in numbers]
        total = tf.reduce_sum(gathered, axis=0) / transport.world
        parts = iter(tf.split(total, [*sizes, flags.shape[0]])[:-1])
        means = [
            _like(next(parts), leaf[0]) if any(leaf is n for n in numbers) else leaf[0]
            for leaf in leaves
        ]
        return tf.nest.pack_sequence_as(logs, means), tf.cast(
            gathered[:, -flags.shape[0] :], tf.int32
        )


def agreed(transport: Transport, results):
    """Results of an evaluation that are the same on all workers; else their mean (eager).

    Metrics are summed over all replicas where they are read, and are equal. What a `test_step` of
    one's own returns beside them is each worker's.
    """
    leaves = [np.asarray(value, np.float64) for value in tf.nest.flatten(results)]
    own = np.concatenate([np.zeros([0]), *(leaf.ravel() for leaf in leaves)])
    if not own.size:
        return results
    with _tf_private.doing("the results of evaluate"):
        found = transport.gather_vectors(tf.constant(own)).numpy()
    if (found == found[0]).all() or np.isnan(found).any():
        return results
    parts = np.split(found.mean(axis=0), np.cumsum([leaf.size for leaf in leaves])[:-1])
    means = [
        part.reshape(leaf.shape) if leaf.ndim else float(part[0])
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return tf.nest.pack_sequence_as(results, means)


def _sum_type(numbers) -> tf.DType:
    """One in which all of them are exact."""
    narrow = all(leaf[0].dtype in (tf.float32, tf.float16, tf.bfloat16) for leaf in numbers)
    return tf.float32 if narrow else tf.float64


def _total(leaf, dtype):
    """[n], the sum over local replicas."""
    values = [tf.cast(tf.reshape(value, [-1]), dtype) for value in leaf]
    return tf.add_n(values) if len(values) > 1 else values[0]


def _like(part, value):
    part = tf.reshape(part, tf.shape(value))
    part.set_shape(value.shape)
    return tf.cast(part, value.dtype)
