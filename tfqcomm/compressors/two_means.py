"""1-bit SGD: one bit per entry and two values per block, the means of either sign."""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import numerics, wire


@register("two_means")
@dataclasses.dataclass(frozen=True)
class TwoMeans(Compressor):
    """The mean of the block's negative entries for each of them, the mean of the rest for the rest.

    1 + 64 / block bits per element. Given the signs, no two values are nearer to x; so the error is
    at most that of `BlockSign`, and less where negative entries are larger or smaller than others.
    ||C(x) - x||^2 <= (1 - 1/block) ||x||^2: biased, so train with error feedback, as the paper
    does. An all-zero block decodes to zero, and -0.0 counts as negative. One entry that is not
    finite makes those of its sign, in its block, so.

    Payload: a float32 mean of the negatives per block, then that of the rest per block, then the
    sign bits, 32 to a word.

    Differences from the paper: blocks in place of a matrix's columns.

    Args:
        block: Entries per pair of means, the last block may be shorter; None for one pair in all.

    Example:
    >>> two_means = TwoMeans()
    >>> two_means.decode(two_means.encode([1.0, -2.0, 3.0, -6.0]), n=4).numpy()
    array([ 2., -4.,  2., -4.], dtype=float32)

    References:
        Seide, Fu, Droppo, Li, Yu, "1-Bit Stochastic Gradient Descent and its Application to
        Data-Parallel Distributed Training of Speech DNNs", Interspeech 2014, Section 3.
    """

    _: dataclasses.KW_ONLY
    block: int | None = None  # larger => more compression; None => one block

    def __post_init__(self):
        checks.positive_integer_or_none("block", self.block)

    def num_words(self, n: int) -> int:
        return 2 * self._num_blocks(n) + wire.num_words(n, 1)

    def error_bound(self, n: int) -> float:
        # What k entries of one sign lose is ||v||^2 - |v|_1^2 / k, and |v|_1 >= ||v||. The worst is
        # one entry among zeros of its own sign, and so k is all of the block.
        return 1 - 1 / min(self.block or n, n)

    def encode_implementation(self, x, seed):
        n = x.shape[0]
        if n == 0:
            return tf.zeros([0], tf.int32)
        return numerics.fuse(_encode, n)(x, min(self.block or n, n))

    def decode_implementation(self, words, n):
        if n == 0:
            return tf.zeros([0])
        return numerics.fuse(_decode, n)(words, n, min(self.block or n, n))

    def _num_blocks(self, n: int) -> int:
        return -(-n // (self.block or max(n, 1)))


def _encode(x, block):
    means = _means(x, block)  # float32[2, blocks]
    signs = wire.pack_bits(numerics.is_negative(x))
    return tf.concat([wire.floats_to_words(tf.reshape(means, [-1])), signs], axis=0)


def _means(x, block):
    """Those of negative entries, and those of the others; 0 where there is none."""
    padding = -x.shape[0] % block
    v = tf.reshape(tf.pad(x, [[0, padding]]), [-1, block])  # padded with what is not negative
    sizes = [block] * (v.shape[0] - 1) + [block - padding]
    negative = numerics.is_negative(v)
    below = numerics.magnitude_sums(tf.where(negative, v, 0.0))
    above = numerics.magnitude_sums(tf.where(negative, 0.0, v))
    number = numerics.sums(tf.cast(negative, tf.float32))
    rest = tf.constant(sizes, tf.float64) - number
    means = [-tf.math.divide_no_nan(below, number), tf.math.divide_no_nan(above, rest)]
    return tf.cast(tf.stack(means), tf.float32)


def _decode(words, n, block):
    blocks = -(-n // block)
    low, high = tf.unstack(tf.reshape(wire.words_to_floats(words[: 2 * blocks]), [2, blocks]))
    if blocks > 1:
        low, high = (tf.repeat(means, block)[:n] for means in (low, high))
    return tf.where(wire.unpack_bits(words[2 * blocks :], n), low, high)
