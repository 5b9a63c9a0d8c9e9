"""Weights that are mostly zero, as short as they can be said exactly."""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from tfqcomm.kernels import entries, numerics, positions, wire

_HEADER_WORDS = 2  # the form, and how many entries are not zero
_DENSE, _BITMAP, _POSITIONS = range(3)


@dataclasses.dataclass(frozen=True)
class SparseWeights:
    """The non-zero entries, with a bitmap or positions; or all entries, where that is shorter.

    Made for the pull of QCMD and QRDA Adagrad, whose weights are exactly zero where l1 says so.
    Lossless but for the sign of a zero. Not a `Compressor`: its length follows the data.

    Payload of n entries, k of them not zero: 2 words, then the shortest of

        n words                     every entry
        ceil(n / 32) + k words      one bit for each entry, then the values
        8.6 / 32 k + k words        positions in Elias-Fano form, then the values; with 1% of them,
                                    12 / 32 k with 0.1%

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
        kept = tf.cast(tf.where(nonzero)[:, 0], tf.int32)
        k = tf.size(kept)
        values = wire.floats_to_words(tf.gather(x, kept))
        # In the order of the forms.
        costs = [n, wire.num_words(n, 1) + k, positions.num_words(k, n) + k]
        form = tf.argmin(tf.stack(costs), output_type=tf.int32)
        body = tf.switch_case(
            form,
            [
                lambda: wire.floats_to_words(x),
                lambda: tf.concat([wire.pack_bits(nonzero), values], 0),
                lambda: tf.concat([positions.encode(kept, n), values], 0),
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
            kept = positions.decode(body[None, : tf.size(body) - k], k, n)[0]
            return entries.scatter(kept, values, n)

        decoded = tf.switch_case(
            form, [lambda: wire.words_to_floats(body), from_bitmap, from_positions]
        )
        return tf.ensure_shape(decoded, [n])
