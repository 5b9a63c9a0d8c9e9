"""The mean of what learners have found, which keeps its length: Decoupled DiLoCo's merge."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf


def merged(deltas: Sequence[tf.Tensor], weights: tf.Tensor, *, keep_norm: bool) -> tf.Tensor:
    """The outer gradient of one tensor (arXiv 2604.21428).

    What learners find by themselves is nearly orthogonal, and so a plain mean of M shrinks like
    1 / sqrt(M). This one has the mean of their lengths, and the mean of their directions:

        phi(v) = v / |v|, phi(0) = 0
        mean   = (sum_m w_m |v_m| / sum_m w_m) phi(sum_m w_m phi(v_m) / sum_m w_m)

    Args:
        deltas: v, for each learner its difference, float32 of one shape.
        weights: w, float32[learners]; 0 for one whose difference does not count, whatever it holds.
        keep_norm: False for the plain mean sum_m w_m v_m / sum_m w_m, of embeddings: many of their
            rows are those of one learner alone.

    Returns:
        float32 of the same shape.
    """
    shares = tf.math.divide_no_nan(weights, tf.reduce_sum(weights))
    parts = [
        (share, tf.where(share > 0, delta, tf.zeros_like(delta)))
        for share, delta in zip(tf.unstack(shares, len(deltas)), deltas, strict=True)
    ]
    if not keep_norm:
        return tf.add_n([share * v for share, v in parts])
    length = tf.add_n([share * _norm(v) for share, v in parts])
    return length * _direction(tf.add_n([share * _direction(v) for share, v in parts]))


def _norm(v: tf.Tensor) -> tf.Tensor:
    """Euclidean, float32 scalar; of numbers whose squares float32 does not hold as well."""
    largest = tf.reduce_max(tf.abs(v))
    return largest * tf.norm(tf.math.divide_no_nan(v, largest))


def _direction(v: tf.Tensor) -> tf.Tensor:
    """phi: of length one, or zero."""
    scaled = tf.math.divide_no_nan(v, tf.reduce_max(tf.abs(v)))
    return tf.math.divide_no_nan(scaled, tf.norm(scaled))
