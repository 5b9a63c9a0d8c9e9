"""Random-k sparsification with a shared seed: no position travels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import entries, numerics, wire
from tfqcomm.kernels.layout import Layout


@register("random_k")
@dataclasses.dataclass(frozen=True)
class RandomK(Compressor):
    """Keeps k = max(1, round(ratio * n)) entries that the shared seed picks.

    All replicas keep the same positions, so messages may be summed on the way, and only values
    travel: 32 bits per kept entry and the seed. E ||C(x) - x||^2 = (1 - k/n) ||x||^2, and
    (n/k - 1) ||x||^2 where values are scaled by n/k.

    Scaled it is unbiased, but then error feedback would let the residual grow without bound for
    k < n/2. So in an exchange values are scaled exactly where there is no error feedback.

    Args:
        ratio: Share of entries kept, in (0, 1].
        scaled: Multiply decoded values by n/k.

    Example:
    >>> random_k = RandomK(0.5)
    >>> int(tf.math.count_nonzero(random_k.decode(random_k.encode(tf.ones([100]), seed=7), 100)))
    50

    References:
        Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", arXiv 1809.07599, Definition 2.1.
    """

    ratio: float = 0.01  # lower => more compression
    _: dataclasses.KW_ONLY
    scaled: bool = False  # True => unbiased, more noise

    linear: ClassVar[bool] = True
    deterministic: ClassVar[bool] = False
    sum_dtype: ClassVar[tf.DType] = tf.float32
    header_words: ClassVar[int] = 2

    def __post_init__(self):
        object.__setattr__(self, "ratio", checks.ratio(self.ratio))
        checks.boolean("scaled", self.scaled)

    @property
    def unbiased(self) -> bool:  # type: ignore[override]  # it depends on an argument
        """Whether the mean of `decode(encode(x, seed))` over seeds is x: scaled."""
        return self.scaled

    def num_kept(self, n: int) -> int:
        """Entries kept of `n`."""
        return checks.num_kept(self.ratio, n)

    def num_words(self, n: int) -> int:
        return self.header_words + self.num_kept(n)

    def error_bound(self, n: int) -> float:
        kept = self.num_kept(n) / n
        return 1 / kept - 1 if self.scaled else 1 - kept

    def without_feedback(self) -> RandomK:
        return dataclasses.replace(self, scaled=True)

    def for_owner(self) -> RandomK:
        # Owners draw the positions that they received: nothing is lost again.
        return dataclasses.replace(self, scaled=False)

    def bucket_words(self, layout):
        return self.header_words + sum(self._kept(layout))

    def encode_bucket(self, x, layout, seed):
        positions = random_positions(seed, layout.sizes, self._kept(layout))
        return tf.concat([seed, wire.floats_to_words(tf.gather(x, positions))], axis=0)

    def decode_bucket(self, words, layout):
        kept = self._kept(layout)
        seed, body = tf.split(words, [self.header_words, sum(kept)])
        positions = random_positions(seed, layout.sizes, kept)
        values = wire.words_to_floats(body)
        if self.scaled:
            factors = np.array(layout.sizes, np.float64) / kept
            values = numerics.saturating_product(values, np.repeat(np.float32(factors), kept))
        return entries.scatter(positions, values, layout.size)

    def encode_implementation(self, x, seed):
        return self.encode_bucket(x, Layout((x.shape[0],)), seed)

    def decode_implementation(self, words, n):
        return self.decode_bucket(words, Layout((n,)))

    def _kept(self, layout):
        return tuple(self.num_kept(n) for n in layout.sizes)


def random_positions(seed: tf.Tensor, sizes: Sequence[int], counts: Sequence[int]) -> tf.Tensor:
    """`k` different positions of each vector of n elements, each with probability k/n.

    Position i is drawn from stratum [floor(i n/k), floor((i+1) n/k)): distinct without a sort.
    Strata differ in size by one, so positions would differ in probability; a rotation of all of a
    vector by the same random amount evens that out. (To within 2^-32: integers are drawn from 32
    bits.)

    Args:
        seed: int32[2]
        sizes: n for each of the vectors, which stand in a row.
        counts: k for each, 0 < k <= n.

    Returns:
        int32[sum of k], of each vector ascending up to one wrap.
    """
    total = sum(counts)
    # Philox by name: the default may differ between devices, and replicas must agree.
    shape = [total + len(sizes)]
    draws = tf.random.stateless_uniform(shape, seed, None, None, tf.int32, alg="philox")
    draws = tf.cast(tf.bitcast(draws, tf.uint32), tf.int64)

    vector_of_pick = np.repeat(np.arange(len(sizes), dtype=np.int32), counts)

    def by_pick(of_vector):
        values = tf.convert_to_tensor(of_vector, tf.int64)
        return values[0] if len(sizes) == 1 else tf.gather(values, vector_of_pick)

    n, k = by_pick(sizes), by_pick(counts)
    places = tf.range(total, dtype=tf.int64) - by_pick(_starts(counts))
    starts, stops = places * n // k, (places + 1) * n // k
    picks = starts + tf.bitwise.right_shift(draws[:total] * (stops - starts), 32)
    rotations = tf.bitwise.right_shift(draws[total:] * np.array(sizes, np.int64), 32)
    rotated = picks + by_pick(rotations)
    inside = tf.where(rotated < n, rotated, rotated - n)
    return tf.cast(inside + by_pick(_starts(sizes)), tf.int32)


def _starts(sizes):
    return np.cumsum([0, *sizes])[:-1]
