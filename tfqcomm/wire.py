"""The wire type, a flat int32 vector, and what is packed into it.

Order by definition, whatever the host's byte order: of two 16-bit values in a word the first
stands in the low half; bits fill bytes from the top (as `numpy.packbits`) and bytes fill words
from the bottom.
"""

from __future__ import annotations

import sys

import numpy as np
import tensorflow as tf

WORD_BITS = 32
_BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)  # [256, 8]


def _first_low(parts: tf.Tensor) -> tf.Tensor:
    """Puts the parts of a word ([..., 2] halves or [..., 4] bytes) into this host's order."""
    return parts if sys.byteorder == "little" else tf.reverse(parts, axis=[-1])


def _pad_last(x: tf.Tensor, multiple: int) -> tf.Tensor:
    missing = -x.shape[-1] % multiple
    return tf.pad(x, [[0, 0]] * (x.shape.rank - 1) + [[0, missing]]) if missing else x


def floats_to_words(x: tf.Tensor) -> tf.Tensor:
    """float32[n] -> int32[n], bit by bit."""
    return tf.bitcast(x, tf.int32)


def words_to_floats(words: tf.Tensor) -> tf.Tensor:
    """Inverse of `floats_to_words`."""
    return tf.bitcast(words, tf.float32)


def halves_to_words(halves: tf.Tensor) -> tf.Tensor:
    """16-bit values, two to a word.

    Args:
        halves: uint16, float16 or bfloat16 [m]

    Returns:
        int32[ceil(m / 2)]; the last half is zero if m is odd.
    """
    pairs = tf.reshape(_pad_last(halves, 2), [-1, 2])
    return tf.bitcast(_first_low(pairs), tf.int32)


def words_to_halves(words: tf.Tensor, m: int, dtype: tf.DType) -> tf.Tensor:
    """Inverse of `halves_to_words`: the first `m` values of `dtype`."""
    return tf.reshape(_first_low(tf.bitcast(words, dtype)), [-1])[:m]


def words_to_summands(words: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """The body of a linear codec's message as the numbers an all-reduce may sum."""
    if dtype.size == 4:
        return tf.bitcast(words, dtype)
    return tf.reshape(_first_low(tf.bitcast(words, dtype)), [-1])


def summands_to_words(values: tf.Tensor) -> tf.Tensor:
    """Inverse of `words_to_summands`."""
    return tf.bitcast(values, tf.int32) if values.dtype.size == 4 else halves_to_words(values)


def pack_bits(bits: tf.Tensor) -> tf.Tensor:
    """32 booleans to a word, along the last axis: a plane per row.

    Args:
        bits: bool[..., n]

    Returns:
        int32[..., ceil(n / 32)], the same bytes as `numpy.packbits`; padded with False.
    """
    bits = _pad_last(tf.cast(bits, tf.uint8), WORD_BITS)
    lead = bits.shape[:-1].as_list()
    eight = tf.reshape(bits, [*lead, bits.shape[-1] // 8, 8])
    # One multiplication gathers the low bits of eight bytes, the first of them on top.
    if sys.byteorder == "big":
        eight = tf.reverse(eight, axis=[-1])
    lanes = tf.bitcast(eight, tf.uint64) * tf.constant(0x8040201008040201, tf.uint64)
    octets = tf.cast(tf.bitwise.right_shift(lanes, tf.constant(56, tf.uint64)), tf.uint8)
    return tf.bitcast(_first_low(tf.reshape(octets, [*lead, bits.shape[-1] // 32, 4])), tf.int32)


def unpack_bits(words: tf.Tensor, n: int) -> tf.Tensor:
    """Inverse of `pack_bits`: int32[..., w] -> bool[..., n]."""
    octets = tf.cast(_first_low(tf.bitcast(words, tf.uint8)), tf.int32)  # [..., w, 4]
    bits = tf.gather(tf.constant(_BITS_OF_BYTE.astype(bool)), octets)  # [..., w, 4, 8]
    lead = words.shape[:-1].as_list()
    return tf.reshape(bits, [*lead, words.shape[-1] * WORD_BITS])[..., :n]
