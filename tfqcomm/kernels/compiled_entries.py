"""The same messages as `largest_entries`, for XLA: all shapes are those of the longest message.

    words       | low bits | bitmap | values | anything |
                0          h        h + m    h + m + k  most_words(n)

Where its parts begin depends on k, so each word is looked up in the part that it belongs to.
Legend: n elements, k entries, W messages; l low bits of a position.
"""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.kernels import entries, numerics, positions, wire
from tfqcomm.kernels.compiled_selection import running


def most_words(n: int) -> int:
    """Words of the longest message, that of all `n` entries."""
    return positions.num_words(n, n) + n


def encode(x: tf.Tensor, k: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """See `largest_entries.encode`.

    Returns:
        float32[most_words(n)], of which the message is the beginning, and float32[n].
    """
    (n,) = x.shape
    mask = _largest(numerics.magnitude_keys(x), k)
    kept = _first_places(mask, n)
    lower, bitmap = wire.pack_bits(_low_bits(kept, k, n)), wire.pack_bits(_bitmap(kept, k, n))
    head, body = _borders(k, n)
    place = tf.range(most_words(n))
    values = wire.floats_to_words(_at(x, _at(kept, place - body)))
    parts = tf.where(place < body, _at(bitmap, place - head), values)
    words = tf.where(place < head, _at(lower, place), parts)
    return wire.words_to_floats(words), tf.where(mask, 0.0, x)


def decode_mean(words: tf.Tensor, k: tf.Tensor, n: int) -> tf.Tensor:
    """See `largest_entries.decode_mean`; `words` are float32[W, most_words(n)], however padded."""
    _, body = _borders(k, n)
    rank = tf.range(n)
    there = rank < k
    kept, values = [], []
    for message in tf.unstack(words):
        positions_of_all = _decode_positions(wire.floats_to_words(message), k, n)
        kept.append(tf.where(there, positions_of_all, n))
        values.append(tf.where(there, _at(message, body + rank), 0.0))
    return entries.mean(tf.stack(kept), tf.stack(values), n + 1)[:n]


def kth_largest(keys: tf.Tensor, k: int | tf.Tensor) -> tf.Tensor:
    """The k-th largest of int32[n] keys."""
    return tf.sort(keys)[keys.shape[0] - k]


def _largest(keys, k):
    """Where the k largest stand, of equal ones the first: bool[n]."""
    threshold = kth_largest(keys, k)
    larger, ties = keys > threshold, tf.equal(keys, threshold)
    return larger | (ties & (running(ties) <= k - running(larger)[-1]))


def _first_places(mask, size):
    """Places that are True, ascending, and then anything: int32[size]."""
    rank = tf.where(mask, running(mask) - 1, size)
    found = tf.zeros([size + mask.shape[0]], tf.int32)
    return tf.tensor_scatter_nd_update(found, rank[:, None], tf.range(mask.shape[0]))[:size]


def _low_bits(kept, k, n):
    """Of one position after the other: bool[n], since k low(k) is at most n / 2."""
    low = positions.low_bits(k, n)
    place, width = tf.range(n), tf.maximum(low, 1)
    shift = width - 1 - place % width
    bits = tf.bitwise.bitwise_and(tf.bitwise.right_shift(_at(kept, place // width), shift), 1)
    return tf.cast(bits, tf.bool) & (place < k * low)


def _bitmap(kept, k, n):
    """Bool[2n], since n / 2^low and k are at most n."""
    rank = tf.range(n)
    place = tf.bitwise.right_shift(kept, positions.low_bits(k, n)) + rank
    place = tf.where(rank < k, place, 2 * n)
    bits = tf.zeros([2 * n + 1], tf.bool)
    return tf.tensor_scatter_nd_update(bits, place[:, None], tf.ones([n], tf.bool))[: 2 * n]


def _borders(k, n):
    """Where the bitmap and the values begin."""
    head = wire.num_words(k, positions.low_bits(k, n))
    return head, head + wire.num_words(positions.bitmap_bits(k, n), 1)


def _decode_positions(words, k, n):
    """The first k are right: int32[w] -> int32[n]."""
    head, _ = _borders(k, n)
    low, rank = positions.low_bits(k, n), tf.range(n)
    bitmap = wire.unpack_bits(_at(words, head + tf.range(wire.num_words(2 * n, 1))), 2 * n)
    bitmap &= tf.range(2 * n) < positions.bitmap_bits(k, n)
    high = tf.bitwise.left_shift(_first_places(bitmap, n) - rank, low)
    lower = positions.unpack_low_bits(words[None], tf.minimum(rank, k - 1), low)[0]
    return high + lower


def _at(values, places):
    """Looked up, at the ends where places are beyond them."""
    return tf.gather(values, tf.clip_by_value(places, 0, values.shape[0] - 1))
