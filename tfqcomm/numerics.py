"""Guarded numerics: every place where zero, overflow, denormals or NaN need thought."""

from __future__ import annotations

import tensorflow as tf


def is_finite(x: tf.Tensor) -> tf.Tensor:
    """True where `x` is neither NaN nor infinite."""
    return magnitude_keys(x) < 0x7F800000


def magnitude_keys(x: tf.Tensor) -> tf.Tensor:
    """Integers that order float32 values by magnitude.

    The bits of |x| read as an integer grow with |x|. Unlike a comparison of floats this tells
    denormals from zero whatever the host's flush mode is, and it puts infinities and then NaN
    on top, so that whoever keeps the largest entries keeps those visible.

    Args:
        x: float32 tensor.

    Returns:
        int32 tensor, non-negative; 0 for both zeros.
    """
    return tf.bitwise.bitwise_and(tf.bitcast(x, tf.int32), 0x7FFFFFFF)


def mean_magnitude(x: tf.Tensor) -> tf.Tensor:
    """Mean of |x| over the last axis, also where the sum alone would overflow.

    Args:
        x: float32[..., n] with n > 0.

    Returns:
        float32[...]; finite if all of `x` is.
    """
    magnitudes = tf.abs(x)
    return tf.reduce_sum(magnitudes / x.shape[-1], axis=-1)


def saturating_cast(x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Rounds to nearest even, finite values to the largest finite one; NaN and inf stay."""
    limit = float(dtype.max)
    return tf.cast(tf.where(is_finite(x), tf.clip_by_value(x, -limit, limit), x), dtype)


def kth_largest(keys: tf.Tensor, k: int) -> tf.Tensor:
    """The `k`-th largest of many non-negative integers, exactly and without sorting them.

    Three rounds of counting fix 11, 10 and 10 bits. A sort of a tensor takes twenty times as
    long as a few passes over it.

    Args:
        keys: int32[c], non-negative, c >= k.
        k: At least 1.

    Returns:
        int32 scalar.
    """
    found = tf.constant(0)
    remaining = tf.constant(k)
    for shift, bits in ((20, 11), (10, 10), (0, 10)):
        digits = tf.bitwise.right_shift(keys, shift) - tf.bitwise.left_shift(found, bits)
        digits = tf.where(digits < 0, 1 << bits, digits)  # another prefix: not counted
        counts = tf.raw_ops.DenseBincount(
            input=digits, size=1 << bits, weights=tf.constant([], tf.int32)
        )
        at_least = tf.cumsum(counts, reverse=True)
        digit = tf.math.count_nonzero(at_least >= remaining, dtype=tf.int32) - 1
        remaining -= at_least[digit] - counts[digit]
        found = tf.bitwise.left_shift(found, bits) + digit
    return found
