"""Threshold quantization: small entries become zero, the others plus or minus one scale."""

from __future__ import annotations

import dataclasses
import math
import numbers

import tensorflow as tf

from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import least_squares, numerics, wire

_BITS = 2
_SCALED = 0.7
_LARGEST_FINITE = 0x7F7FFFFF  # as a magnitude key


@register("threshold_quantizer")
@dataclasses.dataclass(frozen=True)
class ThresholdQuantizer(Compressor):
    """sign(x) times the mean magnitude of what is kept; zero where |x| is below a threshold.

    2 bits per element and a scale; deterministic, and sparse where x is. The scale is the one of
    least squares for what is kept. ||C(x) - x||^2 <= q ||x||^2 with q = 1 - 1 / h_n and
    h_n = sum (sqrt(k) - sqrt(k - 1))^2 over k <= n, about 1 + ln(n) / 4, for "optimal"; with
    q = 1 - c / n for a threshold t mean|x|, c = min(1, 4 t (1 - t)) if t > 1/2, else 1.

    Payload: the scale as float32, then two bit planes.

    Differences from the paper: its threshold is not restated here. "scaled" is the rule of
    ternary weight networks, "optimal" is our own.

    Args:
        threshold: "scaled" zeroes |x| <= 0.7 mean|x|; "optimal" finds the least-squares ternary
            vector, by sorting a few candidates; a number t in [0, 1) zeroes |x| <= t mean|x|.

    Example:
    >>> threshold_quantizer = ThresholdQuantizer()
    >>> threshold_quantizer.decode(threshold_quantizer.encode([0.1, -3.0, 2.0, 0.2]), 4).numpy()
    array([ 0. , -2.5,  2.5,  0. ], dtype=float32)

    References:
        Xu et al., "Quantized Adaptive Subgradient Algorithms and Their Applications",
        arXiv 2208.05631.
        Li, Zhang, Liu, "Ternary Weight Networks", arXiv 1605.04711, Equation 6 (the 0.7).
    """

    threshold: str | float = "scaled"  # larger numbers => sparser

    def __post_init__(self):
        if self.threshold in ("scaled", "optimal"):
            return
        real = isinstance(self.threshold, numbers.Real) and not isinstance(self.threshold, bool)
        if not real or not 0 <= self.threshold < 1:
            raise ValueError(
                "Argument `threshold` must be 'scaled', 'optimal' or a number in [0, 1). "
                f"Received: threshold={self.threshold!r}"
            )
        object.__setattr__(self, "threshold", float(self.threshold))

    def num_words(self, n: int) -> int:
        return min(n, 1) + wire.num_level_words(n, _BITS)

    def error_bound(self, n: int) -> float:
        if self.threshold == "optimal":
            return 1 - 1 / (1.25 + math.log(n) / 4)  # above h_n, by at most 1/4
        t = _SCALED if self.threshold == "scaled" else float(self.threshold)
        return 1 - (4 * t * (1 - t) if t > 0.5 else 1) / n

    def encode_implementation(self, x, seed):
        n = x.shape[0]
        if n == 0:
            return tf.zeros([0], tf.int32)
        if self.threshold == "optimal":
            bound = least_squares.ternary_bound(x)
        else:
            ratio = _SCALED if self.threshold == "scaled" else self.threshold
            bound = numerics.fuse(_bound_of_mean, n)(x, ratio)
        scale, levels = numerics.fuse(_scale_and_levels, n)(x, bound)
        planes = numerics.fuse(wire.pack_levels, n)(levels, _BITS)
        return tf.concat([wire.floats_to_words(scale), planes], axis=0)

    def decode_implementation(self, words, n):
        if n == 0:
            return tf.zeros([0])
        return numerics.fuse(_decode, n)(words, n)


def _bound_of_mean(x, ratio):
    """The largest magnitude key that becomes zero; never one of infinities or NaN."""
    threshold = ratio * numerics.mean_magnitude(x[None])[0]
    return tf.minimum(numerics.magnitude_keys(threshold), _LARGEST_FINITE)


def _scale_and_levels(x, bound):
    kept = numerics.magnitude_keys(x) > bound
    total = numerics.magnitude_sums(tf.where(kept, x, 0.0)[None])  # float64[1]
    count = tf.maximum(tf.math.count_nonzero(kept, dtype=tf.int32), 1)
    scale = tf.cast(total / tf.cast(count, tf.float64), tf.float32)
    levels = tf.where(kept, tf.where(numerics.is_negative(x), -1, 1), 0)
    return scale, tf.cast(levels, tf.int8)


def _decode(words, n):
    levels = wire.unpack_levels(words[1:], _BITS, n)
    return wire.words_to_floats(words[:1]) * tf.cast(levels, tf.float32)
