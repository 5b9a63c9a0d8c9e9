"""Blockwise 8 bit: a byte per entry and a scale per block."""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.quantizer import Quantizer
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import numerics, rounding, wire

_LARGEST = 127


@register("block_int8")
@dataclasses.dataclass(frozen=True)
class BlockInt8(Quantizer):
    """s q / 127 with q = round(127 x / s), half to even, where s = max|x| of the block.

    8 + 32 / block bits per element; every error is at most s / 254. One large entry coarsens its
    block only. Biased, so train with error feedback; a block with an entry that is not finite
    decodes to nothing finite.

    Payload: a float32 scale per block, then the bytes q, four to a word, the first one lowest.

    Args:
        block: Entries per scale, the last block may be shorter; None for one scale in all.

    Example:
    >>> block_int8 = BlockInt8(block=2)
    >>> block_int8.decode(block_int8.encode([127.0, 3.4, 0.0, -2.0]), n=4).numpy()
    array([127.,   3.,   0.,  -2.], dtype=float32)

    References:
        Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", arXiv 1511.04561.
        Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861 (the
        blocks).
    """

    _: dataclasses.KW_ONLY
    block: int | None = 256  # larger => more compression

    def __post_init__(self):
        checks.positive_integer_or_none("block", self.block)

    @property
    def _block(self):
        return self.block

    def num_body_words(self, n: int) -> int:
        return wire.num_words(n, 8)

    def error_bound(self, n: int) -> float:
        return rounding.error_bound(_LARGEST, min(self.block or n, n))

    def measure(self, x, layout):
        return layout.max_magnitude(x)[None]

    def quantize(self, x, scales, layout, seed):
        levels = tf.round(numerics.relative(layout.rows(x), layout.spread(scales[0])) * _LARGEST)
        octets = tf.cast(tf.cast(levels, tf.int32), tf.int8)
        return wire.bytes_to_words(layout.flat(octets))

    def restore(self, scales, body, layout):
        levels = layout.rows(tf.cast(wire.words_to_bytes(body, layout.size), tf.int32))
        return layout.flat(rounding.level_values(levels, _LARGEST, layout.spread(scales[0])))
