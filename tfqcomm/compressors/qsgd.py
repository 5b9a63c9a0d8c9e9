"""QSGD: stochastic rounding to levels between zero and the bucket's norm."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import numerics, rounding, wire


@register("qsgd")
@dataclasses.dataclass(frozen=True)
class QSGD(Compressor):
    """||v|| sign(x) l / s in each bucket v, l one of the two integers around s |x| / ||v||.

    The choice between the two is random, without bias. s = 2^(bits - 1) - 1: `bits` per element
    include the sign, and 32 / bucket more are the norm's. E ||C(v) - v||^2 is at most
    omega ||v||^2, omega = min(d / s^2, sqrt(d) / s), in a bucket of d entries. Where omega is 1 or
    more, as with the defaults, error feedback would diverge: `error_feedback="auto"` is off there,
    as in the paper, and True divides what is decoded by 1 + omega.
    Random bits: 16 per element, which round without bias to 2^-17 of a level.

    Payload: a float32 norm per bucket (at most the largest float32: decoded values stay finite),
    then `bits` bit planes.

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

    def num_words(self, n: int) -> int:
        buckets = -(-n // (self.bucket or max(n, 1)))
        return buckets + wire.num_level_words(n, self.bits)

    def error_bound(self, n: int) -> float:
        s, d = _levels_above_zero(self.bits), min(self.bucket or n, n)
        return min(d / s**2, math.sqrt(d) / s)

    def encode_implementation(self, x, seed):
        n = x.shape[0]
        if n == 0:
            return tf.zeros([0], tf.int32)
        bucket = min(self.bucket or n, n)
        v = tf.reshape(tf.pad(x, [[0, -n % bucket]]), [-1, bucket])
        norms = numerics.fuse(numerics.norm, n)(v, numerics.max_magnitude(v))
        levels = numerics.fuse(_levels, n)(v, norms, rounding.draw(seed, n), self.bits)
        planes = numerics.fuse(wire.pack_levels, n)(levels, self.bits)
        return tf.concat([wire.floats_to_words(norms), planes], axis=0)

    def decode_implementation(self, words, n):
        if n == 0:
            return tf.zeros([0])
        return numerics.fuse(_decode, n)(words, n, self.bits, min(self.bucket or n, n))


def _levels(v, norms, draws, bits):
    s = _levels_above_zero(bits)
    y = s * tf.clip_by_value(numerics.relative(v, norms[:, None]), -1.0, 1.0)
    y = tf.reshape(y, [-1])[: draws.shape[0]]
    return tf.cast(rounding.stochastic(y, draws), tf.int8)


def _decode(words, n, bits, bucket):
    s = _levels_above_zero(bits)
    buckets = -(-n // bucket)
    norms = wire.words_to_floats(words[:buckets])
    levels = wire.unpack_levels(words[buckets:], bits, n)
    v = tf.reshape(tf.pad(levels, [[0, -n % bucket]]), [-1, bucket])
    return tf.reshape(rounding.level_values(v, s, norms[:, None]), [-1])[:n]


def _levels_above_zero(bits):
    return (1 << bits - 1) - 1
