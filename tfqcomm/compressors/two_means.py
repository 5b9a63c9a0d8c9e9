"""1-bit SGD: one bit per entry and two values per block, the means of either sign."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.quantizer import Quantizer
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import numerics, wire


@register("two_means")
@dataclasses.dataclass(frozen=True)
class TwoMeans(Quantizer):
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

    scales_per_segment: ClassVar[int] = 2

    def __post_init__(self):
        checks.positive_integer_or_none("block", self.block)

    @property
    def _block(self):
        return self.block

    def num_body_words(self, n: int) -> int:
        return wire.num_words(n, 1)

    def error_bound(self, n: int) -> float:
        # What k entries of one sign lose is ||v||^2 - |v|_1^2 / k, and |v|_1 >= ||v||. The worst is
        # one entry among zeros of its own sign, and so k is all of the block.
        return 1 - 1 / min(self.block or n, n)

    def measure(self, x, layout):
        # Padding is not negative, and adds nothing.
        negative = numerics.is_negative(x)
        below = layout.magnitude_sums(tf.where(negative, x, 0.0))
        above = layout.magnitude_sums(tf.where(negative, 0.0, x))
        number = layout.sums(tf.cast(negative, tf.float32))
        rest = layout.counts - number
        means = [-tf.math.divide_no_nan(below, number), tf.math.divide_no_nan(above, rest)]
        return tf.cast(tf.stack(means), tf.float32)

    def quantize(self, x, scales, layout, seed):
        return wire.pack_bits(numerics.is_negative(x))

    def restore(self, scales, body, layout):
        low, high = (layout.spread(means) for means in tf.unstack(scales))
        negative = layout.rows(wire.unpack_bits(body, layout.size))
        return layout.flat(tf.where(negative, low, high))
