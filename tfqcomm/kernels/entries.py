"""Entries of a long vector, positions with their values, and the vector they stand for.

Legend: n elements of the vector, k entries, W messages.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfqcomm.kernels import numerics


def scatter(positions: tf.Tensor, values: tf.Tensor, n: int) -> tf.Tensor:
    """The vector that is `values` at `positions` and zero elsewhere.

    Args:
        positions: int32[k], all different; k may be known at run time only.
        values: float32[k]
        n: Length of the vector.

    Returns:
        float32[n]
    """
    if numerics.compiling():
        return _scatter(positions, values, n)
    if positions.shape[0] is not None and n >= numerics.FUSE_FROM:
        return numerics.fuse(_scatter, n)(positions, values, n)
    # The oldest op for it is by far the quickest: `tf.scatter_nd` takes eight times as long.
    return tf.raw_ops.SparseToDense(
        sparse_indices=positions,
        output_shape=[n],
        sparse_values=values,
        default_value=0.0,
        validate_indices=False,  # whether they ascend
    )


def mean(positions: tf.Tensor, values: tf.Tensor, n: int) -> tf.Tensor:
    """The mean of W vectors, written once whatever W, to the same bits everywhere.

    Added in the order of the messages. The positions of one message are all different, so the
    order in which its own entries are added does not matter. A sum may be beyond float32 where the
    mean is not: who asks for the sum to be finite looks at the values.

    Args:
        positions: int32[W, k]
        values: float32[W, k]
        n: Length of the vectors.

    Returns:
        float32[n]
    """
    world = positions.shape[0]
    if world == 1:
        return scatter(positions[0], values[0], n)
    if n >= numerics.FUSE_FROM or numerics.compiling():
        return numerics.fuse(_mean, n)(positions, values, n)

    def add(total, message):
        return total + scatter(*message, n)

    # A loop, and not a chain of sums: Grappler would add those up in another order.
    before, after = _shares(world)
    messages = (positions, values * before)
    total = tf.foldl(add, messages, initializer=tf.zeros([n]), parallel_iterations=1)
    return total if after == 1 else total * after


def subtract(x: tf.Tensor, positions: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """`x` less the vector that `scatter` makes: float32[n]."""
    (n,) = x.shape
    if positions.shape[0] is not None and n >= numerics.FUSE_FROM:
        return numerics.fuse(_subtract, n)(x, positions, values)
    return x - scatter(positions, values, n)


def _scatter(positions, values, n):
    return tf.tensor_scatter_nd_update(tf.zeros([n]), positions[:, None], values)


def _mean(positions, values, n):
    world, k = positions.shape
    before, after = _shares(world)
    total = tf.zeros([n])
    for message in range(world):
        places = positions[message][:, None]
        total = tf.tensor_scatter_nd_add(total, places, values[message] * before)
    if after == 1 or world * k > n // 8:
        return total if after == 1 else total * after
    # Only where something was added; of several entries at one place all say the same.
    places = tf.reshape(positions, [-1, 1])
    return tf.tensor_scatter_nd_update(total, places, tf.gather_nd(total, places) * after)


def _shares(world):
    """What entries are multiplied by before and after they are added up.

    A power of two loses nothing before, and saves the second walk. Factors, and no divisors: of
    these compilers make products, or do not, and then bits differ.
    """
    share = np.float32(1 / world)
    return (share, np.float32(1)) if world & (world - 1) == 0 else (np.float32(1), share)


def _subtract(x, positions, values):
    return tf.tensor_scatter_nd_sub(x, positions[:, None], values)
