"""Block-sign: one bit per entry and the mean magnitude of its block."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.quantizer import Quantizer
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import numerics, wire


@register("block_sign")
@dataclasses.dataclass(frozen=True)
class BlockSign(Quantizer):
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

    signs: ClassVar[bool] = True

    def __post_init__(self):
        checks.positive_integer_or_none("block", self.block)

    @property
    def _block(self):
        return self.block

    def num_body_words(self, n: int) -> int:
        return wire.num_words(n, 1)

    def error_bound(self, n: int) -> float:
        return 1 - 1 / min(self.block or n, n)

    def measure(self, x, layout):
        return layout.mean_magnitude(x)[None]

    def quantize(self, x, scales, layout, seed):
        return wire.pack_bits(numerics.is_negative(x))

    def restore(self, scales, body, layout):
        (means,) = tf.unstack(scales)
        negative = layout.rows(wire.unpack_bits(body, layout.size))
        means = layout.spread(means)
        return layout.flat(tf.where(negative, -means, means))
