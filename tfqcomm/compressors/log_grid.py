"""Logarithmic grid: the nearest of 0 and a few powers of two times the largest entry."""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.quantizer import Quantizer
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import numerics, wire

_FRACTION_BITS, _BIAS = 23, 127  # of a float32


@register("log_grid")
@dataclasses.dataclass(frozen=True)
class LogGrid(Quantizer):
    """s times the nearest of 0, +-2^-k, ..., +-1/2, +-1 to x / s, where s = max|x|.

    2k + 3 levels, so ceil(log2(2k + 3)) bits per element: 2 for k = 0 (ternary), 3 for k = 1
    and 2, 4 up to k = 6. Nearest in value, not in the logarithm: levels change at 2^-(k + 1) and
    at 0.75 * 2^-j, and whoever is there goes up. C(c x) = c C(x) for c = 2^i, to the bit, and
    C(C(x)) = C(x). Biased, so train with error feedback.

    Payload: s as float32, then the bit planes of the signed levels, 1 to k + 1 from the smallest.

    Args:
        k: Number of halvings, 0 to 125.

    Example:
    >>> log_grid = LogGrid(1)
    >>> log_grid.decode(log_grid.encode([4.0, -3.0, 2.9, 1.0, 0.9]), n=5).numpy()
    array([ 4., -4.,  2.,  2.,  0.], dtype=float32)

    References:
        Chen, Shen, Huang, Liu, "Quantized Adam with Error Feedback", arXiv 2004.14180.
    """

    k: int = 0  # lower => more compression

    def __post_init__(self):
        checks.integer_between("k", self.k, 0, 125)

    @property
    def bits(self) -> int:
        """Per element: the logarithm of 2k + 3, rounded up."""
        return (2 * self.k + 2).bit_length()

    def num_body_words(self, n: int) -> int:
        return wire.num_level_words(n, self.bits)

    def error_bound(self, n: int) -> float:
        # The largest entry is exact. All others are worst just below the smallest level's half, or
        # in the middle between 1/2 and 1: an error of 1/4 on 3/4.
        below, between = (n - 1) / 4.0 ** (self.k + 1), (n - 1) / 16 if self.k else 0.0
        return max(below / (1 + below), between / (1 + 9 * between))

    def measure(self, x, layout):
        return layout.max_magnitude(x)[None]

    def quantize(self, x, scales, layout, seed):
        y = numerics.relative(layout.rows(x), layout.spread(scales[0]))
        return wire.pack_levels(layout.flat(_levels(y, self.k)), self.bits)

    def restore(self, scales, body, layout):
        levels = layout.rows(wire.unpack_levels(body, self.bits, layout.size))
        exponents = tf.abs(levels) + (_BIAS - self.k) - 1
        powers = tf.bitcast(tf.bitwise.left_shift(exponents, _FRACTION_BITS), tf.float32)
        signs = tf.cast(tf.sign(levels), tf.float32)
        return layout.flat(layout.spread(scales[0]) * (signs * powers))


def _levels(y, k):
    """The signed number of the level nearest to each of `y`, |y| <= 1: int8."""
    keys = numerics.magnitude_keys(y)
    # Adding half a fraction carries into the exponent from 1.5 * 2^j on.
    exponents = tf.bitwise.right_shift(keys + (1 << _FRACTION_BITS - 1), _FRACTION_BITS)
    smallest = (_BIAS - k - 1) << _FRACTION_BITS  # of 2^-(k + 1), half of the smallest level
    magnitudes = tf.maximum(exponents - (_BIAS - k) + 1, 1)
    magnitudes = tf.where(keys >= smallest, magnitudes, 0)
    return tf.cast(tf.where(numerics.is_negative(y), -magnitudes, magnitudes), tf.int8)
