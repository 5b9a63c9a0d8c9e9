"""The same selection as `selection`, for XLA: every shape is known, at the price of a sort.

Counting candidates and then looking at those alone is what makes `selection` quick on a CPU, but
how many there are depends on the data. On a GPU that means op by op, through the host's memory;
there one compiled kernel that sorts all keys stays on the device.
Legend: n elements, S segments, K kept entries of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfqcomm.kernels import counting, numerics

_KEY_BITS = 31


def largest_of_segments(
    x: tf.Tensor, sizes: Sequence[int], ks: Sequence[int]
) -> tuple[tf.Tensor, tf.Tensor]:
    """The entries of largest magnitude of each segment; see `selection.largest_of_segments`.

    Args:
        x: float32[n].
        sizes: of the segments; they add up to n.
        ks: how many entries each keeps, from 1 to its size, or 0 of an empty one.

    Returns:
        Positions in `x` int32[K], ascending, and values float32[K].
    """
    filled = np.greater(sizes, 0)
    lengths, kept = np.compress(filled, sizes), np.compress(filled, ks).astype(np.int32)
    ends = np.cumsum(lengths).astype(np.int32)
    starts = ends - lengths.astype(np.int32)
    owner = counting.owners(starts, int(ends[-1]))
    keys = numerics.magnitude_keys(x)
    thresholds = tf.gather(_kth_largest(keys, owner, starts + kept - 1), owner)
    larger, ties = keys > thresholds, tf.equal(keys, thresholds)
    missing = kept - _counts(larger, starts, ends)  # ties that are kept: the first of each segment
    rank = running(ties)
    before = tf.gather(tf.pad(rank, [[1, 0]]), starts)
    in_time = rank - tf.gather(before, owner) <= tf.gather(missing, owner)
    positions = first_true(larger | (ties & in_time), int(kept.sum()))
    return positions, tf.gather(x, positions)


def first_true(mask: tf.Tensor, k: int) -> tf.Tensor:
    """Positions of the first `k` that are True: bool[..., n] -> int32[..., k].

    Each by bisection among the running counts: `tf.where` would have a shape that depends on data.

    Args:
        mask: with at least `k` that are True.
    """
    n = mask.shape[-1]
    counts = tf.reshape(running(mask), [-1, n])
    wanted = tf.range(1, k + 1)
    below = tf.zeros([counts.shape[0], k], tf.int32)  # how many counts are surely too small
    for step in (1 << bit for bit in reversed(range(n.bit_length()))):
        probe = below + step
        found = tf.gather(counts, tf.minimum(probe, n) - 1, axis=1, batch_dims=1)
        below = tf.where((probe <= n) & (found < wanted), probe, below)
    return tf.reshape(below, [*mask.shape[:-1], k])


def _kth_largest(keys, owner, places):
    """What stands at these places once each segment's keys descend: int32[S]."""
    largest = (1 << _KEY_BITS) - 1
    order = tf.bitwise.left_shift(tf.cast(owner, tf.int64), tf.constant(_KEY_BITS, tf.int64))
    order = tf.sort(order + tf.cast(largest - keys, tf.int64))
    found = tf.bitwise.bitwise_and(tf.gather(order, places), tf.constant(largest, tf.int64))
    return largest - tf.cast(found, tf.int32)


def _counts(mask, starts, ends):
    """How many are True in each segment: int32[S]."""
    before = tf.pad(running(mask), [[1, 0]])
    return tf.gather(before, ends) - tf.gather(before, starts)


def running(mask: tf.Tensor) -> tf.Tensor:
    """How many are True up to each place of the last axis: bool[..., n] -> int32[..., n]."""
    return tf.cumsum(tf.cast(mask, tf.int32), axis=-1)
