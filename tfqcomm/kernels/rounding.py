"""Rounding to levels, at random, and from levels back to numbers."""

from __future__ import annotations

import tensorflow as tf

_STEPS = 1 << 16
_GOLDEN = 0x9E3779B9


def draw(seed: tf.Tensor, n: int) -> tf.Tensor:
    """`n` random integers below 2^16, from a counter and a key: int32[2] -> int32[n].

    A hash of each element's number instead of a stream: compilers draw where the number is used,
    on every device the same, and at a sixth of Philox' price. 16 bits round without bias to 2^-17.
    """
    first, second = tf.unstack(tf.bitcast(seed, tf.uint32))
    key = _mix(first + tf.constant(_GOLDEN, tf.uint32))
    start = _mix(tf.bitwise.bitwise_xor(second, key))
    counter = tf.bitcast(tf.range(n), tf.uint32)
    words = _mix(tf.bitwise.bitwise_xor(_mix(counter + start), key))
    return tf.bitcast(_shift(words, 16), tf.int32)


def _mix(x):
    """A bijection of uint32 in which every bit depends on all: the finalizer "lowbias32"."""
    x = tf.bitwise.bitwise_xor(x, _shift(x, 16)) * tf.constant(0x7FEB352D, tf.uint32)
    x = tf.bitwise.bitwise_xor(x, _shift(x, 15)) * tf.constant(0x846CA68B, tf.uint32)
    return tf.bitwise.bitwise_xor(x, _shift(x, 16))


def _shift(x, bits):
    return tf.bitwise.right_shift(x, tf.constant(bits, tf.uint32))


def stochastic(y: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """Rounds to one of the two integers around y, so that the mean over draws is y.

    Up with the probability of the fraction, rounded to a multiple of 2^-16. So integers stay what
    they are, and the mean differs from y by at most 2^-17.

    Args:
        y: float32 tensor, |y| < 2^23.
        draws: integers of the same shape, at least 0 and below 2^16.

    Returns:
        int32 tensor
    """
    magnitude = tf.abs(y)
    below = tf.floor(magnitude)
    up = (magnitude - below) * _STEPS > tf.cast(draws, tf.float32) + 0.5
    rounded = tf.cast(below, tf.int32) + tf.cast(up, tf.int32)
    return tf.where(y < 0, -rounded, rounded)


def level_values(levels: tf.Tensor, largest: int, scale: tf.Tensor) -> tf.Tensor:
    """Numbers scale * levels / largest, at the ends exactly +-scale.

    Compilers reorder products, and then the ends are off by a unit in the last place, or beyond
    the range of float32.

    Args:
        levels: integers from -largest to largest.
        scale: float32 tensor that broadcasts to `levels`.

    Returns:
        float32 tensor
    """
    inner = tf.cast(levels, tf.float32) / largest
    ends = tf.where(levels < 0, -1.0, 1.0)
    return scale * tf.where(tf.abs(levels) < largest, inner, ends)


def error_bound(largest: int, n: int) -> float:
    """The q of rounding to the levels -largest ... largest of the largest of `n` magnitudes.

    That entry is exact; all others are at worst half a step off, and no larger than that.
    """
    others = (n - 1) / (2 * largest) ** 2
    return others / (1 + others)
