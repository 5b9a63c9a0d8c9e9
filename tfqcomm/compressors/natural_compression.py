"""Natural compression: sign and exponent, the fraction rounded away at random."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import tensorflow as tf

from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import numerics, rounding, wire

_FRACTION_BITS, _LARGEST_EXPONENT = 23, 254  # of a float32; above it are infinities and NaN
_INFINITY = 0x7F800000


@register("natural_compression")
@dataclasses.dataclass(frozen=True)
class NaturalCompression(Compressor):
    """sign(x) 2^e, or twice that with probability |x| / 2^e - 1, where 2^e <= |x| < 2^(e + 1).

    9 bits per element, and no scale: large and small entries keep their size. Unbiased;
    E ||C(x) - x||^2 <= ||x||^2 / 8, so it contracts, and `error_feedback="auto"` is on. Zeros and
    powers of two stay what they are. Random bits: 16 per element, which round without bias to
    2^-17 x.

    At the ends of float32: a denormal becomes 0 or 2^-126, without bias. What is above 2^127 would
    become infinite by rounding up, so it becomes 2^127: there, and only there, it is biased, and
    the error may be up to x / 2. NaN decodes to an infinity.

    Payload: the sign bits, 32 to a word, then the exponents as they stand in a float32, four to a
    word, the first one lowest.

    Example:
    >>> natural = NaturalCompression()
    >>> natural.decode(natural.encode([-4.0, 0.0, 0.125, 3.4e38]), n=4).numpy()
    array([-4.0000000e+00,  0.0000000e+00,  1.2500000e-01,  1.7014118e+38],
          dtype=float32)

    References:
        Horvath et al., "Natural Compression for Distributed Deep Learning", arXiv 1905.10988,
        Section 2.
    """

    elementwise: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    deterministic: ClassVar[bool] = False

    def num_words(self, n: int) -> int:
        return wire.num_words(n, 1) + wire.num_words(n, 8)

    def error_bound(self, n: int) -> float:
        # Of x = 1 + f the variance is f (1 - f), and f (1 - f) / (1 + f)^2 is largest at f = 1/3.
        return 1 / 8

    def encode_implementation(self, x, seed):
        n = x.shape[0]
        return numerics.fuse(_encode, n)(x, rounding.draw(seed, n))

    def decode_implementation(self, words, n):
        return numerics.fuse(_decode, n)(words, n)


def _encode(x, draws):
    exponents = tf.bitcast(tf.cast(_exponents(x, draws), tf.uint8), tf.int8)
    signs = wire.pack_bits(numerics.is_negative(x))
    return tf.concat([signs, wire.bytes_to_words(exponents)], axis=0)


def _exponents(x, draws):
    """Biased exponents: an addition carries into them with the probability of the fraction."""
    keys = tf.minimum(numerics.magnitude_keys(x), _INFINITY)
    # A fraction's 23 bits out of 16: in the middle of 128 each, so a fraction of 0 never carries.
    addends = tf.bitwise.left_shift(tf.cast(draws, tf.int32), _FRACTION_BITS - 16) + 64
    rounded = tf.bitwise.right_shift(keys + addends, _FRACTION_BITS)
    finite = tf.minimum(rounded, _LARGEST_EXPONENT)
    return tf.where(keys < _INFINITY, finite, _LARGEST_EXPONENT + 1)


def _decode(words, n):
    planes = wire.num_words(n, 1)
    octets = tf.cast(wire.words_to_bytes(words[planes:], n), tf.int32)
    exponents = tf.bitwise.bitwise_and(octets, 0xFF)
    powers = tf.bitcast(tf.bitwise.left_shift(exponents, _FRACTION_BITS), tf.float32)
    return tf.where(wire.unpack_bits(words[:planes], n), -powers, powers)
