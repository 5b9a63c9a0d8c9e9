"""Random-k sparsification with a shared seed: no index travels."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import tensorflow as tf

from tfqcomm import wire
from tfqcomm.compressors import checks
from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.registry import register


@register("random_k")
@dataclasses.dataclass(frozen=True)
class RandomK(Compressor):
    """Keeps k = max(1, round(ratio * n)) entries that the shared seed picks, zero elsewhere."""

    ratio: float = 0.01  # lower => more compression

    linear: ClassVar[bool] = True
    deterministic: ClassVar[bool] = False
    sum_dtype: ClassVar[tf.DType] = tf.float32
    header_words: ClassVar[int] = 2

    def __post_init__(self):
        object.__setattr__(self, "ratio", checks.ratio(self.ratio))

    def num_kept(self, n: int) -> int:
        """Entries kept of `n`."""
        return checks.num_kept(self.ratio, n)

    def num_words(self, n: int) -> int:
        return self.header_words + self.num_kept(n)

    def encode_implementation(self, x, seed):
        indices = random_indices(seed, x.shape[0], self.num_kept(x.shape[0]))
        return tf.concat([seed, wire.floats_to_words(tf.gather(x, indices))], 0)

    def decode_implementation(self, words, n):
        indices = random_indices(words[:2], n, self.num_kept(n))
        return tf.scatter_nd(indices[:, None], wire.words_to_floats(words[2:]), [n])


def random_indices(seed: tf.Tensor, n: int, k: int) -> tf.Tensor:
    """`k` different positions below `n`, each position with probability exactly k/n."""
    if n == 0:
        return tf.zeros([0], tf.int32)
    bits = tf.random.stateless_uniform([k + 1], seed, None, None, tf.int32)
    bits = tf.cast(tf.bitcast(bits, tf.uint32), tf.int64)
    bounds = tf.range(k + 1, dtype=tf.int64) * n // k
    starts, sizes = bounds[:-1], bounds[1:] - bounds[:-1]
    picks = starts + tf.bitwise.right_shift(bits[:-1] * sizes, 32)
    rotation = tf.bitwise.right_shift(bits[-1] * n, 32)
    return tf.cast((picks + rotation) % n, tf.int32)
