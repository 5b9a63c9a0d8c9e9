"""Blockwise 8-bit floats: a byte per entry and a scale per block."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.quantizer import Quantizer
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import numerics, wire

_NAN = 0x7F  # in both formats


class _Format(NamedTuple):
    """Sign, exponent and fraction of a byte."""

    dtype: tf.DType
    fraction_bits: int
    bias: int  # of the exponent
    largest: float  # finite value; 1.75 * 2^e in both formats


_FORMATS = {
    "e4m3": _Format(tf.dtypes.experimental.float8_e4m3fn, 3, 7, 448.0),
    "e5m2": _Format(tf.dtypes.experimental.float8_e5m2, 2, 15, 57344.0),
}


@register("float8")
@dataclasses.dataclass(frozen=True)
class Float8(Quantizer):
    """s q / L with q = float8(L x / s), where s = max|x| of the block and L is float8's largest.

    8 + 32 / block bits per element. q is rounded to the nearest, half to even; nothing overflows,
    and the largest entry is exact. The relative error is at most 1/17 ("e4m3": L = 448) down to
    |x| = s / 28672, or 1/9 ("e5m2": L = 57344) down to s / 9.4e8; of smaller entries the error is
    at most s / 458752, or s / 7.5e9. Where most entries are far smaller than the largest of their
    block float8 is more exact than `BlockInt8`, else less. Biased, so train with error feedback; a
    block with an entry that is not finite decodes to nothing finite.

    Payload: a float32 s per block, then the bytes q, four to a word, the first one lowest.

    Args:
        format: "e4m3" (4 bits of exponent, 3 of fraction) or "e5m2", the paper's choice for
            gradients, with one scale per tensor; in blocks the range of "e4m3" is mostly enough.
        block: Entries per scale, the last block may be shorter; None for one scale in all.

    Example:
    >>> float8 = Float8()
    >>> float8.decode(float8.encode([448.0, 17.0, -7.2, 100.0]), n=4).numpy()
    array([448.,  16.,  -7.,  96.], dtype=float32)

    References:
        Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433, Table 1
        and Section 2 (the scale that moves a tensor into the range).
    """

    format: str = "e4m3"  # "e5m2" => smaller entries survive, all are coarser
    _: dataclasses.KW_ONLY
    block: int | None = 256  # larger => more compression

    def __post_init__(self):
        checks.one_of("format", self.format, list(_FORMATS))
        checks.positive_integer_or_none("block", self.block)

    @property
    def _block(self):
        return self.block

    def num_body_words(self, n: int) -> int:
        return wire.num_words(n, 8)

    def error_bound(self, n: int) -> float:
        # In units of L the largest entry is 1, and exact. The others are worst all alike: they are
        # one y with error e, and q = (d - 1) e^2 / (1 + (d - 1) y^2). Between two values of the
        # format e^2 - q y^2 is convex on both sides of the middle, so y is a middle: that below the
        # smallest value, which is lost (e = y), or, in a binade, the lowest one, 1 + u times a
        # power of two with e = u times it; and of these powers the largest, 1 / 1.75.
        float8, others = _FORMATS[self.format], min(self.block or n, n) - 1
        u = 2.0 ** -(float8.fraction_bits + 1)
        lost = others * (2.0 ** (1 - float8.bias) * u / float8.largest) ** 2
        rounded = others * (u / 1.75) ** 2
        return max(lost / (1 + lost), rounded / (1 + others * ((1 + u) / 1.75) ** 2))

    def measure(self, x, layout):
        return layout.max_magnitude(x)[None]

    def quantize(self, x, scales, layout, seed):
        y = numerics.relative(layout.rows(x), layout.spread(scales[0]))
        y = tf.clip_by_value(y, -1.0, 1.0) * _FORMATS[self.format].largest
        return wire.bytes_to_words(layout.flat(_to_float8(y, self.format)))

    def restore(self, scales, body, layout):
        octets = tf.cast(wire.words_to_bytes(body, layout.size), tf.int32)
        y = tf.gather(_quotients(self.format), tf.bitwise.bitwise_and(octets, 0xFF))
        return layout.flat(layout.rows(y) * layout.spread(scales[0]))


def _to_float8(y, name):
    """The bytes of float8 values nearest to float32 `y`, |y| <= L or NaN: int8 of y's shape.

    By hand: `tf.bitcast` knows no float8.
    """
    _, m, bias, _ = _FORMATS[name]
    keys = numerics.magnitude_keys(y)
    smallest = 127 + 1 - bias  # exponents as in a float32; below this one steps are equal
    exponents = tf.maximum(tf.bitwise.right_shift(keys, 23), smallest)
    # 2^m over the power of two: float8's values in this binade, and the next power, are integers.
    per_step = tf.bitcast(tf.bitwise.left_shift(127 + 127 + m - exponents, 23), tf.float32)
    steps = tf.cast(tf.round(tf.abs(y) * per_step), tf.int32)
    # They follow one another as the bytes do, so a step carries into the exponent.
    octets = steps + tf.bitwise.left_shift(exponents - smallest, m)
    octets = tf.where(numerics.is_finite(y), octets, _NAN)
    return tf.cast(tf.where(numerics.is_negative(y), octets - 128, octets), tf.int8)


def _quotients(name):
    """What each byte stands for, over L: float32[256]."""
    float8 = _FORMATS[name]
    values = np.arange(256, dtype=np.uint8).view(float8.dtype.as_numpy_dtype)
    return tf.constant(values.astype(np.float32) / np.float32(float8.largest))
