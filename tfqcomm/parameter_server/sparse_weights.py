"""Weights that are mostly zero, as short as they can be said exactly."""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from tfqcomm.kernels import entries, numerics, wire

_HEADER_WORDS = 2  # the form, and how many entries are not zero
_DENSE, _BITMAP, _POSITIONS = range(3)


@dataclasses.dataclass(frozen=True)
class SparseWeights:
    """The non-zero entries, with a bitmap or positions; or all entries, where that is shorter.

    Made for the pull of QCMD and QRDA Adagrad, whose weights are exactly zero where l1 says so.
    Lossless but for the sign of a zero. Not a `Compressor`: its length follows the data.

    Payload of n entries, k of them not zero: 2 words, then the shortest of

        n words                                     every entry
        ceil(n / 32) + k words                      one bit for each entry, then the values
        ceil(k / 2) + k words, + 1 per 65536 of n   16-bit offsets, then the values

    Example:
    >>> sparse_weights = SparseWeights()
    >>> words = sparse_weights.encode(tf.constant([0.0, 0.0, 1.5, 0.0, 0.0]))
    >>> len(words), sparse_weights.decode(words, n=5).numpy().tolist()
    (4, [0.0, 0.0, 1.5, 0.0, 0.0])

    References:
        Xu et al., "Quantized Adaptive Subgradient Algorithms and Their Applications",
        arXiv 2208.05631: the server sends the non-zeros.
    """

    lossless = True

    def most_words(self, n: int) -> int:
        """What `n` entries take at most."""
        return _HEADER_WORDS + n

    def encode(self, x: tf.Tensor, seed=0) -> tf.Tensor:
        """float32[n] -> int32[w], w known at run time only."""
        n = x.shape[0]
        nonzero = numerics.magnitude_keys(x) > 0
        positions = tf.cast(tf.where(nonzero)[:, 0], tf.int32)
        k = tf.size(positions)
        values = wire.floats_to_words(tf.gather(x, positions))
        offsets = wire.num_position_words(0, n) + (k + 1) // 2
        costs = [n, wire.num_words(n, 1) + k, offsets + k]  # in the order of the forms
        form = tf.argmin(tf.stack(costs), output_type=tf.int32)
        body = tf.switch_case(
            form,
            [
                lambda: wire.floats_to_words(x),
                lambda: tf.concat([wire.pack_bits(nonzero), values], 0),
                lambda: tf.concat([wire.positions_to_words(positions, n), values], 0),
            ],
        )
        return tf.concat([tf.stack([form, k]), body], 0)

    def decode(self, words: tf.Tensor, n: int) -> tf.Tensor:
        """Inverse of `encode`: float32[n]."""
        form, k, body = words[0], words[1], words[_HEADER_WORDS:]
        values = wire.words_to_floats(body[tf.size(body) - k :])

        def from_bitmap():
            width = wire.num_words(n, 1)
            mask = wire.unpack_bits(tf.ensure_shape(body[:width], [width]), n)
            return entries.scatter(tf.cast(tf.where(mask)[:, 0], tf.int32), values, n)

        def from_positions():
            return entries.scatter(wire.words_to_positions(body, k, n), values, n)

        decoded = tf.switch_case(
            form, [lambda: wire.words_to_floats(body), from_bitmap, from_positions]
        )
        return tf.ensure_shape(decoded, [n])
