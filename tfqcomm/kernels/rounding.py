"""Rounding to levels, at random, and from levels back to numbers."""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.kernels import wire

_STEPS = 1 << 16


def draw(seed: tf.Tensor, n: int) -> tf.Tensor:
    """`n` random integers below 2^16, two from each word of Philox: int32[2] -> uint16[n].

    Random words are dear; 16 bits round without bias to 2^-17.
    """
    # Philox by name: the default may differ between devices.
    words = tf.random.stateless_uniform(
        [wire.num_words(n, 16)], seed, None, None, tf.int32, alg="philox"
    )
    return wire.words_to_halves(words, n, tf.uint16)


def stochastic(y: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """Rounds to one of the two integers around y, so that the mean over draws is y.

    Up with the probability of the fraction, rounded to a multiple of 2^-16. So integers stay what
    they are, and the mean differs from y by at most 2^-17.

    Args:
        y: float32 tensor, |y| < 2^23.
        draws: uint16 tensor of the same shape.

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
