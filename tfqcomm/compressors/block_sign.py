"""Block-sign: one bit per entry and the mean magnitude of its block."""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import numerics, wire


@register("block_sign")
@dataclasses.dataclass(frozen=True)
class BlockSign(Compressor):
    """sign(x) * mean|x|, the mean taken over the whole tensor or over blocks of it.

    1 + 32 / block bits per element. ||C(x) - x||^2 <= (1 - 1/block) ||x||^2: biased, so train
    with error feedback. An all-zero block decodes to zero. One entry that is not finite makes
    its block so.

    Payload: a float32 mean per block, then the sign bits, 32 to a word.

    Args:
        block: Entries per scale, the last block may be shorter; None for one scale in all, as
            in the paper, whose blocks are the tensors.

    Example:
    >>> block_sign = BlockSign()
    >>> block_sign.decode(block_sign.encode([1.0, -2.0, 3.0]), n=3).numpy()
    array([ 2., -2.,  2.], dtype=float32)

    References:
        Li, Karimi, Li, "On Distributed Adaptive Optimization with Gradient Compression",
        arXiv 2205.05632, Definition 3.
    """

    _: dataclasses.KW_ONLY
    block: int | None = None  # larger => more compression; None => one block

    def __post_init__(self):
        checks.positive_integer_or_none("block", self.block)

    def num_words(self, n: int) -> int:
        return self._num_blocks(n) + wire.num_words(n, 1)

    def error_bound(self, n: int) -> float:
        return 1 - 1 / min(self.block or n, n)

    def encode_implementation(self, x, seed):
        n = x.shape[0]
        if n == 0:
            return tf.zeros([0], tf.int32)
        return numerics.fuse(_encode, n)(x, min(self.block or n, n))

    def decode_implementation(self, words, n):
        if n == 0:
            return tf.zeros([0])
        return numerics.fuse(_decode, n)(words, n, min(self.block or n, n))

    def _num_blocks(self, n: int) -> int:
        return -(-n // (self.block or max(n, 1)))


def _encode(x, block):
    n = x.shape[0]
    whole = n // block * block
    scales = numerics.mean_magnitude(tf.reshape(x[:whole], [-1, block]))
    if whole < n:
        scales = tf.concat([scales, numerics.mean_magnitude(x[None, whole:])], axis=0)
    signs = wire.pack_bits(numerics.is_negative(x))
    return tf.concat([wire.floats_to_words(scales), signs], axis=0)


def _decode(words, n, block):
    blocks = -(-n // block)
    scales = wire.words_to_floats(words[:blocks])
    if blocks > 1:
        scales = tf.repeat(scales, block)[:n]
    return tf.where(wire.unpack_bits(words[blocks:], n), -scales, scales)
