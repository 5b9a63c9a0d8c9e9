"""Top-k sparsification: the k entries of largest magnitude."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import tensorflow as tf

from tfqcomm import numerics, wire
from tfqcomm.compressors import checks
from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.registry import register

BLOCK = 65536  # entries that a 16-bit offset reaches


@register("top_k")
@dataclasses.dataclass(frozen=True)
class TopK(Compressor):
    """Keeps the k = max(1, round(ratio * n)) entries of largest magnitude, zero elsewhere."""

    ratio: float = 0.01  # lower => more compression
    _: dataclasses.KW_ONLY
    value_dtype: str = "float32"  # "bfloat16" => half the bytes of each value

    sparse: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "ratio", checks.ratio(self.ratio))
        checks.one_of("value_dtype", self.value_dtype, ("float32", "bfloat16"))

    def num_kept(self, n: int) -> int:
        """Entries kept of `n`."""
        return checks.num_kept(self.ratio, n)

    def num_words(self, n: int) -> int:
        k = self.num_kept(n)
        values = k if self.value_dtype == "float32" else (k + 1) // 2
        return _num_blocks(n) + (k + 1) // 2 + values

    def encode_implementation(self, x, seed):
        n = x.shape[0]
        if n == 0:
            return tf.zeros([0], tf.int32)
        k = self.num_kept(n)
        keys = numerics.magnitude_keys(x)
        threshold = numerics.kth_largest(keys, k)
        above, ties = keys > threshold, keys == threshold
        room = k - tf.math.count_nonzero(above, dtype=tf.int32)
        kept = above | (ties & (tf.cumsum(tf.cast(ties, tf.int32)) <= room))
        indices = tf.cast(tf.ensure_shape(tf.where(kept), [k, 1])[:, 0], tf.int32)
        return tf.concat([_pack_indices(indices, n), self._pack_values(tf.gather(x, indices))], 0)

    def decode_implementation(self, words, n):
        if n == 0:
            return tf.zeros([0])
        k = self.num_kept(n)
        head = _num_blocks(n) + (k + 1) // 2
        indices = _unpack_indices(words[:head], k, n)
        values = self._unpack_values(words[head:], k)
        return tf.scatter_nd(indices[:, None], values, [n])

    def _pack_values(self, values):
        if self.value_dtype == "float32":
            return wire.floats_to_words(values)
        return wire.halves_to_words(numerics.saturating_cast(values, tf.bfloat16))

    def _unpack_values(self, words, k):
        if self.value_dtype == "float32":
            return wire.words_to_floats(words)
        return tf.cast(wire.words_to_halves(words, k, tf.bfloat16), tf.float32)


def _num_blocks(n: int) -> int:
    """Count words in front: none where one block holds everything."""
    return -(-n // BLOCK) if n > BLOCK else 0


def _pack_indices(indices: tf.Tensor, n: int) -> tf.Tensor:
    """Ascending int32[k] -> counts per block, then 16-bit offsets inside the blocks."""
    offsets = wire.halves_to_words(tf.cast(tf.bitwise.bitwise_and(indices, 0xFFFF), tf.uint16))
    if n <= BLOCK:
        return offsets
    counts = tf.raw_ops.DenseBincount(
        input=tf.bitwise.right_shift(indices, 16),
        size=_num_blocks(n),
        weights=tf.constant([], tf.int32),
    )
    return tf.concat([counts, offsets], 0)


def _unpack_indices(words: tf.Tensor, k: int, n: int) -> tf.Tensor:
    """Inverse of `_pack_indices`: int32[k]."""
    blocks = _num_blocks(n)
    offsets = tf.cast(wire.words_to_halves(words[blocks:], k, tf.uint16), tf.int32)
    if n <= BLOCK:
        return offsets
    first_entries = tf.cumsum(words[:blocks])[:-1]  # of blocks 1, 2, ...
    steps = tf.raw_ops.DenseBincount(
        input=first_entries, size=k, weights=tf.constant([], tf.int32)
    )
    return tf.cumsum(steps) * BLOCK + offsets
