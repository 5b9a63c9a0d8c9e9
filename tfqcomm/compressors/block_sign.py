"""Block-sign: one bit per entry and the mean magnitude of its block."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import tensorflow as tf

from tfqcomm import numerics, wire
from tfqcomm.compressors import checks
from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.registry import register


@register("block_sign")
@dataclasses.dataclass(frozen=True)
class BlockSign(Compressor):
    """sign(x) * mean|x|, the mean over blocks of the tensor: 1 + 32 / block bits per element."""

    _: dataclasses.KW_ONLY
    block: int | None = None  # larger => more compression; None => the whole tensor is one block

    sparse: ClassVar[bool] = False

    def __post_init__(self):
        checks.positive_integer_or_none("block", self.block)

    def num_words(self, n: int) -> int:
        return self._num_blocks(n) + -(-n // 32)

    def encode_implementation(self, x, seed):
        if x.shape[0] == 0:
            return tf.zeros([0], tf.int32)
        negative = tf.bitcast(x, tf.int32) < 0
        return tf.concat([wire.floats_to_words(self._scales(x)), wire.pack_bits(negative)], 0)

    def decode_implementation(self, words, n):
        if n == 0:
            return tf.zeros([0])
        blocks = self._num_blocks(n)
        scales = wire.words_to_floats(words[:blocks])
        if blocks > 1:
            scales = tf.repeat(scales, self.block)[:n]
        return tf.where(wire.unpack_bits(words[blocks:], n), -scales, scales)

    def _num_blocks(self, n: int) -> int:
        return -(-n // (self.block or max(n, 1)))

    def _scales(self, x):
        n = x.shape[0]
        block = min(self.block or n, n)
        whole = n // block * block
        scales = numerics.mean_magnitude(tf.reshape(x[:whole], [-1, block]))
        if whole == n:
            return scales
        return tf.concat([scales, numerics.mean_magnitude(x[whole:])[None]], 0)
