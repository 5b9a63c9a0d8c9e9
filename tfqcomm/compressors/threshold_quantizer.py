"""Threshold quantization: small entries become zero, the others plus or minus one scale."""

from __future__ import annotations

import dataclasses
import math
import numbers

import tensorflow as tf

from tfqcomm.compressors.quantizer import Quantizer
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import least_squares, numerics, wire

_BITS = 2
_SCALED = 0.7
_LARGEST_FINITE = 0x7F7FFFFF  # as a magnitude key


@register("threshold_quantizer")
@dataclasses.dataclass(frozen=True)
class ThresholdQuantizer(Quantizer):
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

    @property
    def compilable(self) -> bool:  # type: ignore[override]  # it depends on an argument
        """Not where candidates are sorted, whose number depends on the data."""
        return self.threshold != "optimal"

    def num_body_words(self, n: int) -> int:
        return wire.num_level_words(n, _BITS)

    def error_bound(self, n: int) -> float:
        if self.threshold == "optimal":
            return 1 - 1 / (1.25 + math.log(n) / 4)  # above h_n, by at most 1/4
        t = _SCALED if self.threshold == "scaled" else float(self.threshold)
        return 1 - (4 * t * (1 - t) if t > 0.5 else 1) / n

    def encode_bucket(self, x, layout, seed):
        if self.threshold != "optimal":
            return super().encode_bucket(x, layout, seed)
        vectors = layout.unpack(x)
        bounds = tf.stack([least_squares.ternary_bound(vector) for vector in vectors])
        return numerics.fuse(_encode, layout.size, layout)(x, bounds)

    def measure(self, x, layout):
        return _scales(x, self._kept(x, layout), layout)[None]

    def quantize(self, x, scales, layout, seed):
        return _planes(x, self._kept(x, layout))

    def restore(self, scales, body, layout):
        levels = layout.rows(wire.unpack_levels(body, _BITS, layout.size))
        return layout.flat(layout.spread(scales[0]) * tf.cast(levels, tf.float32))

    def _kept(self, x, layout):
        """Which entries do not become zero: bool[size]."""
        ratio = _SCALED if self.threshold == "scaled" else self.threshold
        return _above(x, numerics.magnitude_keys(ratio * layout.mean_magnitude(x)), layout)


def _encode(layout, x, bounds):
    kept = _above(x, bounds, layout)
    scales = wire.floats_to_words(_scales(x, kept, layout))
    return tf.concat([scales, _planes(x, kept)], 0)


def _above(x, bounds, layout):
    """Whose magnitude keys are above their tensor's bound; infinities and NaN always are."""
    bounds = tf.minimum(bounds, _LARGEST_FINITE)
    return layout.flat(numerics.magnitude_keys(layout.rows(x)) > layout.spread(bounds))


def _scales(x, kept, layout):
    """Mean magnitudes of the kept entries: float32[tensors]."""
    total = layout.magnitude_sums(tf.where(kept, x, 0.0))
    count = layout.sums(tf.cast(kept, tf.float32))
    return tf.cast(total / tf.maximum(count, 1), tf.float32)


def _planes(x, kept):
    levels = tf.where(kept, tf.where(numerics.is_negative(x), -1, 1), 0)
    return wire.pack_levels(tf.cast(levels, tf.int8), _BITS)
