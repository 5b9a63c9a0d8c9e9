"""Ascending positions in few bits, in a length that their number and the vector's fix.

Their number may be known at run time only; then no shape is, and nothing is compiled.

Elias-Fano form of k positions below n, each split in its l = floor(log2(n / k)) low bits and the
rest, its high part:

    positions   5       9       11      30          n = 32, k = 4, so l = 3
    low bits    101     001     011     110         l bits each, in a row
    high parts  0       1       1       3
    bitmap      1 0 1 1 0 0 1                       bit (high part + rank) of each position is set

Both are rounded up to whole words. That is l + 1 + n / (k 2^l) bits a position: 8.6 for one of a
hundred, where the entropy is 8.1, and 16-bit offsets take 16.

References:
    Elias, "Efficient Storage and Retrieval by Content and Address of Static Files", J. ACM 21(2),
    1974. Fano, "On the Number of Bits Required to Implement an Associative Memory", MIT, 1971.
"""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.kernels import compiled_selection, numerics, wire


def num_words(k: int | tf.Tensor, n: int) -> int | tf.Tensor:
    """Words that `k` > 0 positions below `n` take: an int, or an int32 scalar as `k` is."""
    return wire.num_words(k, low_bits(k, n)) + wire.num_words(bitmap_bits(k, n), 1)


def encode(positions: tf.Tensor, n: int) -> tf.Tensor:
    """Words of positions.

    Args:
        positions: int32[k], ascending, all different, k > 0 or not known.
        n: Length of the vector they point into.

    Returns:
        int32[num_words(k, n)]
    """
    (k,) = positions.shape
    pack = numerics.fuse(_pack, n)
    if k is None:
        k, pack = tf.size(positions), _pack
    low = low_bits(k, n)
    ranked = tf.bitwise.right_shift(positions, low) + tf.range(k)
    bitmap = wire.pack_bits(_bitmap(ranked, bitmap_bits(k, n)))
    if isinstance(low, int) and not low:
        return bitmap
    return tf.concat([pack(positions, low), bitmap], 0)


def decode(words: tf.Tensor, k: int | tf.Tensor, n: int) -> tf.Tensor:
    """Inverse of `encode`, of several lists of equal length at once.

    Args:
        words: int32[lists, num_words(k, n)]

    Returns:
        int32[lists, k]
    """
    unpack = numerics.fuse(_unpack, n)
    unpack_bits = numerics.fuse(wire.unpack_bits, n)
    if isinstance(k, tf.Tensor):
        unpack, unpack_bits = _unpack, wire.unpack_bits
    low, bits = low_bits(k, n), bitmap_bits(k, n)
    head = wire.num_words(k, low)
    bitmap = unpack_bits(words[:, head:], bits)
    if numerics.compiling():
        ranked = compiled_selection.first_true(bitmap, k)
    else:
        ranked = tf.reshape(tf.cast(tf.where(bitmap)[:, 1], tf.int32), [words.shape[0], k])
    high = tf.bitwise.left_shift(ranked - tf.range(k), low)
    if isinstance(low, int) and not low:
        return high
    return high + unpack(words[:, :head], k, low)


def low_bits(k: int | tf.Tensor, n: int) -> int | tf.Tensor:
    """L = floor(log2(n / k))."""
    if isinstance(k, int):
        return (n // max(k, 1)).bit_length() - 1
    powers = tf.constant([1 << bit for bit in range(1, 31)])
    return tf.math.count_nonzero(n // tf.maximum(k, 1) >= powers, dtype=tf.int32)


def bitmap_bits(k: int | tf.Tensor, n: int) -> int | tf.Tensor:
    """How long the bitmap is."""
    if isinstance(k, int):
        return (n - 1 >> low_bits(k, n)) + k
    return tf.bitwise.right_shift(n - 1, low_bits(k, n)) + k


def _bitmap(positions, bits):
    """True at these positions: bool[bits]."""
    if numerics.compiling():
        ones = tf.ones([positions.shape[0]], tf.bool)
        return tf.tensor_scatter_nd_update(tf.zeros([bits], tf.bool), positions[:, None], ones)
    return tf.raw_ops.SparseToDense(
        sparse_indices=positions,
        output_shape=[bits],
        sparse_values=True,
        default_value=False,
        validate_indices=False,  # whether they ascend
    )


def _pack(positions: tf.Tensor, low: int | tf.Tensor) -> tf.Tensor:
    """The `low` lowest bits of each, the highest of them first: int32[k] -> words."""
    bits = tf.bitwise.right_shift(positions[:, None], tf.range(low - 1, -1, -1))
    bits = tf.cast(tf.bitwise.bitwise_and(bits, 1), tf.bool)
    return wire.pack_bits(tf.reshape(bits, [-1]))


def _unpack(words, k, low):
    """Inverse of `_pack`: int32[lists, w] -> int32[lists, k]."""
    return unpack_low_bits(words, tf.range(k), low)


def unpack_low_bits(words: tf.Tensor, ranks: tf.Tensor, low: int | tf.Tensor) -> tf.Tensor:
    """The low bits of the positions of these ranks, each out of two words in a row.

    Args:
        words: int32[lists, w] that begin with all positions' low bits.
        ranks: int32[m]
        low: how many bits of a position.

    Returns:
        int32[lists, m]
    """
    first_bits = ranks * low  # below n
    place = first_bits // wire.WORD_BITS
    missing = 2 * wire.WORD_BITS - low - first_bits % wire.WORD_BITS
    words = tf.cast(tf.bitcast(tf.pad(words, [[0, 0], [0, 2]]), tf.uint32), tf.uint64)
    pair = tf.bitwise.left_shift(tf.gather(words, place, axis=1), tf.constant(32, tf.uint64))
    pair = tf.bitwise.bitwise_or(pair, tf.gather(words, place + 1, axis=1))
    values = tf.bitwise.right_shift(pair, tf.cast(missing, tf.uint64))
    mask = tf.cast(tf.bitwise.left_shift(1, low) - 1, tf.uint64)
    return tf.cast(tf.bitwise.bitwise_and(values, mask), tf.int32)
