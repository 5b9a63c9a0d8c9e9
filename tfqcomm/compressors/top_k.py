"""Top-k sparsification: the k entries of largest magnitude."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import numerics, selection, wire


@register("top_k")
@dataclasses.dataclass(frozen=True)
class TopK(Compressor):
    """Keeps the k = max(1, round(ratio * n)) entries of largest magnitude, exactly.

    The sparsest codec for a given error: ||C(x) - x||^2 <= (1 - k/n) ||x||^2. It is biased, so
    train with error feedback. Ties go to the lowest position; NaN counts as largest.

    Payload: positions as 16-bit offsets in blocks of 65536 (plus a count per block if there are
    several), then the values: 48 bits per kept entry, or 32 with bfloat16 values.

    Args:
        ratio: Share of entries kept, in (0, 1].
        value_dtype: "float32", or "bfloat16", rounded to nearest even.

    Example:
    >>> top_k = TopK(0.5)
    >>> top_k.decode(top_k.encode([0.1, -3.0, 2.0, 0.2]), n=4).numpy()
    array([ 0., -3.,  2.,  0.], dtype=float32)

    References:
        Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", arXiv 1809.07599, Definition 2.1.
        Li, Karimi, Li, "On Distributed Adaptive Optimization with Gradient Compression",
        arXiv 2205.05632, Definition 2.
    """

    ratio: float = 0.01  # lower => more compression
    _: dataclasses.KW_ONLY
    value_dtype: str = "float32"  # "bfloat16" => more compression

    sparse: ClassVar[bool] = True
    compilable: ClassVar[bool] = False

    def __post_init__(self):
        object.__setattr__(self, "ratio", checks.ratio(self.ratio))
        checks.one_of("value_dtype", self.value_dtype, ("float32", "bfloat16"))

    def num_kept(self, n: int) -> int:
        """Entries kept of `n`."""
        return checks.num_kept(self.ratio, n)

    def num_words(self, n: int) -> int:
        k = self.num_kept(n)
        value_bits = 8 * tf.as_dtype(self.value_dtype).size
        return wire.num_position_words(k, n) + wire.num_words(k, value_bits)

    def error_bound(self, n: int) -> float:
        rounding = 2.0**-16 if self.value_dtype == "bfloat16" else 0.0  # of the kept part
        return 1 - self.num_kept(n) / n * (1 - rounding)

    def encode_implementation(self, x, seed):
        n = x.shape[0]
        positions, values = selection.largest(x, self.num_kept(n))
        if self.value_dtype == "bfloat16":
            values = numerics.saturating_cast(values, tf.bfloat16)
        return tf.concat(
            [wire.positions_to_words(positions, n), wire.summands_to_words(values)], axis=0
        )

    def decode_implementation(self, words, n):
        k = self.num_kept(n)
        head = wire.num_position_words(k, n)
        positions = wire.words_to_positions(words[:head], k, n)
        values = wire.words_to_summands(words[head:], tf.as_dtype(self.value_dtype))[:k]
        return selection.scatter(positions, tf.cast(values, tf.float32), n)
