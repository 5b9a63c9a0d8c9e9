"""QSGD: stochastic rounding to levels between zero and the bucket's norm."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.quantizer import Quantizer
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import numerics, rounding, wire


@register("qsgd")
@dataclasses.dataclass(frozen=True)
class QSGD(Quantizer):
    """||v|| sign(x) l / s in each bucket v, l one of the two integers around s |x| / ||v||.

    The choice between the two is random, without bias. s = 2^(bits - 1) - 1: `bits` per element
    include the sign, and 32 / bucket more are the norm's. E ||C(v) - v||^2 is at most
    omega ||v||^2, omega = min(d / s^2, sqrt(d) / s), in a bucket of d entries. Where omega is 1 or
    more, as with the defaults, error feedback would diverge: `error_feedback="auto"` is off there,
    as in the paper, and True divides what is decoded by 1 + omega.
    Random bits: 16 per element, which round without bias to 2^-17 of a level.

    Payload: a float32 norm per bucket (at most the largest float32: decoded values stay finite),
    then `bits` bit planes, or bytes.

    Differences from the paper: fixed-width levels instead of Elias codes.

    Args:
        bits: Per element, sign included, 2 to 8.
        bucket: Entries per norm, the last bucket may be shorter; None for one norm in all. 512
            with 4 bits is the paper's.

    Example:
    >>> qsgd = QSGD(4)
    >>> qsgd.decode(qsgd.encode([0.0, -3.0, 0.0]), n=3).numpy()
    array([ 0., -3.,  0.], dtype=float32)

    References:
        Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and
        Encoding", arXiv 1610.02132, Section 3.1 and Lemma 3.1.
    """

    bits: int = 4  # lower => more compression
    _: dataclasses.KW_ONLY
    bucket: int | None = 512  # larger => more compression, more noise

    unbiased: ClassVar[bool] = True
    deterministic: ClassVar[bool] = False

    def __post_init__(self):
        checks.integer_between("bits", self.bits, 2, 8)
        checks.positive_integer_or_none("bucket", self.bucket)

    @property
    def _block(self):
        return self.bucket

    def num_body_words(self, n: int) -> int:
        return wire.num_level_words(n, self.bits)

    def error_bound(self, n: int) -> float:
        s, d = _levels_above_zero(self.bits), min(self.bucket or n, n)
        return min(d / s**2, math.sqrt(d) / s)

    def measure(self, x, layout):
        return layout.norms(x)[None]

    def quantize(self, x, scales, layout, seed):
        y = numerics.relative(layout.rows(x), layout.spread(scales[0]))
        y = layout.flat(_levels_above_zero(self.bits) * tf.clip_by_value(y, -1.0, 1.0))
        levels = tf.cast(rounding.stochastic(y, rounding.draw(seed, layout.size)), tf.int8)
        return wire.pack_levels(levels, self.bits)

    def restore(self, scales, body, layout):
        levels = layout.rows(wire.unpack_levels(body, self.bits, layout.size))
        s = _levels_above_zero(self.bits)
        return layout.flat(rounding.level_values(levels, s, layout.spread(scales[0])))


def _levels_above_zero(bits):
    return (1 << bits - 1) - 1
