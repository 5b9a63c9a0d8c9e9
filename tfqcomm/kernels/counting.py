"""How often digits occur, and from that which of them is the k-th largest, in many segments.

Legend: S segments, m digits; digits are integers from 0 to size - 1, and size is a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf


def tally(digits: tf.Tensor, size: int | tf.Tensor) -> tf.Tensor:
    """How often each of 0 ... size - 1 occurs: int32[m] -> int32[size]; others are ignored."""
    no_weights = tf.constant([], tf.int32)
    return tf.raw_ops.DenseBincount(input=digits, size=size, weights=no_weights)


def tally_segments(digits: tf.Tensor, edges: tf.Tensor, size: int) -> tf.Tensor:
    """The same for each segment.

    Args:
        digits: int32[m], not negative; those of `size` or more are ignored.
        edges: int32[S + 1], where the segments begin, and the last one ends; all of `digits` are
            between the first and the last edge if there is only one segment.
        size: one more than the largest digit that counts.

    Returns:
        int32[S, size]
    """
    segments = edges.shape[0] - 1
    if segments == 1:
        return tally(digits, size)[None]
    counts = tf.raw_ops.RaggedBincount(
        splits=tf.cast(edges, tf.int64), values=digits, size=size, weights=tf.constant([], tf.int32)
    )
    return tf.ensure_shape(counts, [segments, size])


def owners(starts: Sequence[int] | np.ndarray, n: int) -> tf.Tensor:
    """The number of the run that each of `n` elements is in: int32[n].

    Args:
        starts: where the runs begin, ascending, all different; the first one at 0.
    """
    if len(starts) < 2:
        return tf.zeros([n], tf.int32)
    return tf.cumsum(tally(tf.constant(starts[1:], tf.int32), n))


def kth_digits(counts: tf.Tensor, ks: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The k-th largest digit of each segment, and how many are larger.

    Args:
        counts: int32[S, size]
        ks: int32[S], from 1 on.

    Returns:
        int32[S] each; of a segment with fewer than k digits the first is 0.
    """
    # Two short searches: `tf.cumsum` over all the counts would take longer than counting.
    segments, size = counts.shape
    width = 1 << (size.bit_length() - 1) // 2
    counts = tf.reshape(counts, [segments, -1, width])
    row, above = _kth_bin(tf.reduce_sum(counts, axis=2), ks)
    column, above_within = _kth_bin(tf.gather(counts, row, batch_dims=1), ks - above)
    return row * width + column, above + above_within


def _kth_bin(counts, ks):
    at_least = tf.cumsum(counts, axis=1, reverse=True)
    found = tf.math.count_nonzero(at_least >= ks[:, None], axis=1, dtype=tf.int32) - 1
    found = tf.maximum(found, 0)
    return found, tf.gather(at_least - counts, found, batch_dims=1)
