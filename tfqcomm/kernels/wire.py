"""The wire type, a flat int32 vector, and what is packed into it.

Order by definition, whatever the host's byte order: of two 16-bit values in a word the first
stands in the low half; of 32 bits the first is the highest (the word's sign), which makes
unpacking one shift. Legend: n elements, w words.
"""

from __future__ import annotations

import sys

import tensorflow as tf

WORD_BITS = 32
_LITTLE_ENDIAN = sys.byteorder == "little"


def num_words(elements: int | tf.Tensor, bits: int | tf.Tensor) -> int | tf.Tensor:
    """Words that `elements` of `bits` bits each fill."""
    return -(-elements * bits // WORD_BITS)


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
    pairs = tf.reshape(_pad(halves, 2), [-1, 2])
    return tf.bitcast(pairs if _LITTLE_ENDIAN else tf.reverse(pairs, [-1]), tf.int32)


def words_to_halves(words: tf.Tensor, m: int, dtype: tf.DType) -> tf.Tensor:
    """Inverse of `halves_to_words`: the first `m` values, of `dtype`."""
    pairs = tf.bitcast(words, dtype)  # [w, 2]
    return tf.reshape(pairs if _LITTLE_ENDIAN else tf.reverse(pairs, [-1]), [-1])[:m]


def bytes_to_words(octets: tf.Tensor) -> tf.Tensor:
    """8-bit values, four to a word, the first one lowest.

    Args:
        octets: int8[m]

    Returns:
        int32[ceil(m / 4)]; padded with zeros.
    """
    fours = tf.reshape(_pad(octets, 4), [-1, 4])
    return tf.bitcast(fours if _LITTLE_ENDIAN else tf.reverse(fours, [-1]), tf.int32)


def words_to_bytes(words: tf.Tensor, m: int) -> tf.Tensor:
    """Inverse of `bytes_to_words`: the first `m` values, int8[m]."""
    fours = tf.bitcast(words, tf.int8)  # [w, 4]
    return tf.reshape(fours if _LITTLE_ENDIAN else tf.reverse(fours, [-1]), [-1])[:m]


def words_to_summands(words: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """The body of a linear codec's message as the numbers that an all-reduce may sum.

    Args:
        words: int32[w] without the header.
        dtype: The codec's `sum_dtype`.

    Returns:
        `dtype`[w] or, for 16-bit types, `dtype`[2w].
    """
    if dtype.size == 2:
        return words_to_halves(words, 2 * words.shape[0], dtype)
    return tf.bitcast(words, dtype)


def summands_to_words(values: tf.Tensor) -> tf.Tensor:
    """Inverse of `words_to_summands`."""
    return halves_to_words(values) if values.dtype.size == 2 else tf.bitcast(values, tf.int32)


def pack_bits(bits: tf.Tensor) -> tf.Tensor:
    """32 booleans to a word along the last axis; leading axes are planes.

    Args:
        bits: bool[..., n]

    Returns:
        int32[..., ceil(n / 32)]: `numpy.packbits`, read as big-endian words; padded with False.
    """
    return _gather_bits(_lanes(tf.cast(bits, tf.uint8)))


def unpack_bits(words: tf.Tensor, n: int | tf.Tensor) -> tf.Tensor:
    """Inverse of `pack_bits`: int32[..., w] -> bool[..., n]."""
    bits = tf.bitwise.left_shift(words[..., None], tf.range(WORD_BITS)) < 0
    *planes, width = words.shape
    width = tf.shape(words)[-1] if width is None else width
    return tf.reshape(bits, [*planes, width * WORD_BITS])[..., :n]


def num_level_words(n: int, bits: int) -> int:
    """Words that `n` levels of `bits` bits take: planes of whole words."""
    return bits * num_words(n, 1)


def pack_levels(levels: tf.Tensor, bits: int) -> tf.Tensor:
    """Small signed integers as bit planes: exactly `bits` bits each; whole bytes as they are.

    Args:
        levels: int8[n], from -2^(bits - 1) to 2^(bits - 1) - 1.
        bits: 1 to 8.

    Returns:
        int32[num_level_words(n, bits)]: the bits of the two's complement, highest plane first,
        each plane as `pack_bits` packs it; of 8 bits the bytes, as `bytes_to_words` does.
    """
    if bits == 8:
        return bytes_to_words(_pad(levels, WORD_BITS))
    lanes = _lanes(tf.bitcast(levels, tf.uint8))
    planes = []
    for shift in range(bits - 1, -1, -1):
        plane = tf.bitwise.right_shift(lanes, tf.constant(shift, tf.uint64))
        lowest = tf.bitwise.bitwise_and(plane, tf.constant(0x0101010101010101, tf.uint64))
        planes.append(_gather_bits(lowest))
    return tf.concat(planes, axis=0)


def unpack_levels(words: tf.Tensor, bits: int, n: int) -> tf.Tensor:
    """Inverse of `pack_levels`: int32[n]."""
    if bits == 8:
        return tf.cast(words_to_bytes(words, n), tf.int32)
    planes = tf.cast(unpack_bits(tf.reshape(words, [bits, -1]), n), tf.int32)
    weights = [-(1 << bits - 1), *(1 << shift for shift in range(bits - 2, -1, -1))]
    return tf.reduce_sum(planes * tf.constant(weights)[:, None], axis=0)


def num_field_words(n: int, bits: int) -> int:
    """Words that `n` fields of `bits` bits take: as many to a word as there is room for."""
    return -(-n // (WORD_BITS // bits))


def pack_fields(values: tf.Tensor, bits: int) -> tf.Tensor:
    """Small integers, such that sums of words hold the sums of the values.

    Args:
        values: int32[n], not negative, and neither are the sums 2^bits or more.
        bits: of a field, 1 to 32.

    Returns:
        int32[num_field_words(n, bits)]: w words hold the first w values in their lowest fields,
        the next w in the fields above, and so on; padded with zeros.
    """
    n, fields = values.shape[0], WORD_BITS // bits
    padding = num_field_words(n, bits) * fields - n
    rows = tf.reshape(tf.pad(values, [[0, padding]]), [fields, -1])
    return tf.reduce_sum(tf.bitwise.left_shift(rows, _field_shifts(bits)), axis=0)


def unpack_fields(words: tf.Tensor, bits: int, n: int) -> tf.Tensor:
    """Inverse of `pack_fields`: int32[n], not negative."""
    rows = tf.bitwise.right_shift(words, _field_shifts(bits))  # copies of the sign are masked
    return tf.reshape(tf.bitwise.bitwise_and(rows, (1 << bits) - 1), [-1])[:n]


def _field_shifts(bits: int) -> tf.Tensor:
    return tf.range(0, WORD_BITS // bits * bits, bits)[:, None]


def _lanes(octets):
    """uint8[..., n] -> uint64[..., m]: eight to a lane, the first one lowest; m divides by 4."""
    eights = tf.reshape(_pad(octets, WORD_BITS), [*octets.shape[:-1], -1, 8])
    return tf.bitcast(eights if _LITTLE_ENDIAN else tf.reverse(eights, [-1]), tf.uint64)


def _gather_bits(lanes):
    """The lowest bits of all bytes, the others being zero: uint64[..., m] -> int32[..., m / 4]."""
    # One product moves the lowest bits of eight bytes into the top byte, the first one on top.
    gathered = lanes * tf.constant(0x8040201008040201, tf.uint64)
    octets = tf.cast(tf.bitwise.right_shift(gathered, tf.constant(56, tf.uint64)), tf.uint8)
    fours = tf.reshape(octets, [*lanes.shape[:-1], -1, 4])
    return tf.bitcast(tf.reverse(fours, [-1]) if _LITTLE_ENDIAN else fours, tf.int32)


def _pad(x: tf.Tensor, multiple: int) -> tf.Tensor:
    if x.shape[-1] is None:
        return tf.pad(x, [[0, 0]] * (x.shape.rank - 1) + [[0, -tf.shape(x)[-1] % multiple]])
    missing = -x.shape[-1] % multiple
    return tf.pad(x, [[0, 0]] * (x.shape.rank - 1) + [[0, missing]]) if missing else x
