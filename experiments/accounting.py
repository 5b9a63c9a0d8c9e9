"""Bits as the papers count them, beside the bytes that are really sent."""

from __future__ import annotations

from collections.abc import Sequence

from tfqcomm.compressors import BlockSign, Compressor, Ternary, ThresholdQuantizer, TopK


def paper_bits(codec: Compressor, sizes: Sequence[int]) -> int:
    """Bits of one message as the paper counts them, for tensors of `sizes` entries.

    Top-k: 32 for each entry kept, without positions. Block-Sign: one for each entry, without
    scales. Ternary and threshold quantization: two for each entry and a float for each scale. The
    others: their payload.
    """
    if isinstance(codec, TopK):
        return 32 * sum(codec.num_kept(n) for n in sizes)
    if isinstance(codec, BlockSign):
        return sum(sizes)
    if isinstance(codec, (Ternary, ThresholdQuantizer)):
        return sum(2 * n + 32 for n in sizes)
    return 32 * sum(codec.num_words(n) for n in sizes)
