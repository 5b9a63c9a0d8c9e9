"""A message of a vector's k largest entries, for a k that is known at run time only.

Words of the positions in Elias-Fano form, then the values as they are, float32. On a CPU op by op;
on a GPU one kernel each, which computes as many words as a message of all entries has: what travels
is the beginning of that.
Legend: n elements, W messages, w words.
"""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.kernels import compiled_entries, entries, numerics, positions, selection, wire


def num_words(k: int | tf.Tensor, n: int) -> int | tf.Tensor:
    """Words of a message of `k` > 0 entries, an int32 scalar if `k` is."""
    return positions.num_words(k, n) + k


def encode(x: tf.Tensor, k: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The `k` entries of largest magnitude, ties to the lowest position, and what they leave out.

    Args:
        x: float32[n]
        k: int32 scalar, 1 <= k <= n.

    Returns:
        The words, float32[num_words(k, n)] bit by bit, and float32[n].
    """
    (n,) = x.shape
    words, left_out = numerics.fuse_on_gpu(_encode, n)(x, k)
    return words[: num_words(k, n)], left_out


def decode_mean(words: tf.Tensor, k: tf.Tensor, n: int) -> tf.Tensor:
    """The mean of W messages of `k` entries: float32[W, num_words(k, n)] -> float32[n]."""
    if numerics.on_gpu(words):
        missing = compiled_entries.most_words(n) - tf.shape(words)[1]
        words = tf.pad(words, [[0, 0], [0, missing]])
        words = tf.ensure_shape(words, [None, compiled_entries.most_words(n)])
    return numerics.fuse_on_gpu(_decode_mean, n, n)(words, k)


def kth_largest(x: tf.Tensor, k: int) -> tf.Tensor:
    """The magnitude of the k-th largest entry of float32[n]."""
    return numerics.fuse_on_gpu(_kth_largest, x.shape[0], k)(x)


def _encode(x, k):
    if numerics.compiling():
        return compiled_entries.encode(x, k)
    (n,) = x.shape
    kept, values = selection.largest_of_any_number(x, k)
    words = tf.concat([wire.words_to_floats(positions.encode(kept, n)), values], 0)
    return words, entries.subtract(x, kept, values)


def _decode_mean(n, words, k):
    if numerics.compiling():
        return compiled_entries.decode_mean(words, k, n)
    head = positions.num_words(k, n)
    kept = positions.decode(wire.floats_to_words(words[:, :head]), k, n)
    return entries.mean(kept, words[:, head:], n)


def _kth_largest(k, x):
    keys = numerics.magnitude_keys(x)
    if numerics.compiling():
        return wire.words_to_floats(compiled_entries.kth_largest(keys, k))
    return wire.words_to_floats(selection.kth_largest(keys, k)[0])
