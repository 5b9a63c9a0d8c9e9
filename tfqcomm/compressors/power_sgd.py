"""PowerSGD: a matrix as the product of two thin ones, found by one step of the power method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import low_rank, numerics, wire

MOST = 256  # rank: each column is a part of the graph


@register("power_sgd")
@dataclasses.dataclass(frozen=True)
class PowerSGD(Compressor):
    """Sends r (n + m) numbers of an n x m matrix: the factors of an approximation of rank r.

        P = mean of M_w Q;  P orthonormal by Gram-Schmidt;  Q = mean of M_w^T P;  M = P Q^T

    Both means are all-reduces: see `tfqcomm.aggregators.LowRankMean`. Q is that of the step before
    (the warm start), so that over the steps the power method finds the largest singular vectors of
    the mean gradient. A kernel is a matrix of all its axes but the last, and the last; a tensor for
    which the factors would be no smaller than itself is sent as it is.

    A vector by itself has no shape. `encode` makes of it the matrix that is nearest to a square,
    filled up with zeros, draws Q with its seed, and sends one scale and both factors, or the vector
    where that is no longer: 32 (1 + r (n' + m')) bits, n' m' >= n. Then E ||C(x) - x||^2 <=
    (1 - r / min(n', m')) ||x||^2: of equal singular values it captures r of min(n', m'), of others
    it prefers the larger ones.

    Args:
        rank: r; at most 256.
        alternate: send P in one step and Q in the next, one all-reduce a step and half of the
            bytes (ACP-SGD).

    Example:
    >>> PowerSGD(4).num_floats((3, 3, 64, 128))  # of 73,728
    2816

    References:
        Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for
        Distributed Optimization", arXiv 1905.13727, Algorithms 1 and 2.
        Zhang et al., "Evaluation and Optimization of Gradient Compression for Distributed Deep
        Learning", arXiv 2306.08881: ACP-SGD.
    """

    rank: int = 4  # lower => more compression
    _: dataclasses.KW_ONLY
    alternate: bool = False  # True => half of the bytes; the other factor is one step older

    low_rank: ClassVar[bool] = True
    deterministic: ClassVar[bool] = False

    def __post_init__(self):
        checks.integer_between("rank", self.rank, 1, MOST)
        checks.boolean("alternate", self.alternate)

    def reduces(self, shape: Sequence[int]) -> bool:
        """Whether both factors of a tensor of this shape together are smaller than itself."""
        rows, columns = low_rank.matrix_shape(shape)
        return self.rank * (rows + columns) < rows * columns

    def num_floats(self, shape: Sequence[int]) -> int:
        """Numbers sent for a tensor of this shape: in one step, or in two with `alternate`."""
        if not self.reduces(shape):
            return math.prod(shape) * (2 if self.alternate else 1)
        return self.rank * sum(low_rank.matrix_shape(shape))

    def num_words(self, n: int) -> int:
        return min(n, 1 + self.rank * sum(_square_shape(n)))

    def error_bound(self, n: int) -> float:
        return 0.0 if self.num_words(n) == n else 1 - self.rank / min(_square_shape(n))

    def encode_implementation(self, x, seed):
        n = x.shape[0]
        if self.num_words(n) == n:
            return wire.floats_to_words(x)
        rows, columns = _square_shape(n)
        scale = numerics.max_magnitude(x[None])
        matrix = tf.pad(numerics.relative(x, scale), [[0, rows * columns - n]])
        matrix = tf.reshape(matrix, [1, rows, columns])
        right = low_rank.random_directions(seed, [1, self.rank, columns])
        spare = low_rank.random_directions(seed + 1, [rows, self.rank])
        (left,) = low_rank.orthogonalize([low_rank.left_factor(matrix, right)], [spare])
        right = low_rank.right_factor(matrix, left)
        floats = [scale, tf.reshape(left, [-1]), tf.reshape(right, [-1])]
        return wire.floats_to_words(tf.concat(floats, 0))

    def decode_implementation(self, words, n):
        floats = wire.words_to_floats(words)
        if self.num_words(n) == n:
            return floats
        rows, columns = _square_shape(n)
        scale, left, right = tf.split(floats, [1, rows * self.rank, columns * self.rank])
        left = tf.reshape(left, [1, rows, self.rank])
        right = tf.reshape(right, [1, self.rank, columns])
        values = scale * tf.reshape(low_rank.product(left, right), [-1])[:n]
        # The approximation may have a larger entry than the vector: beyond the range the largest.
        return tf.clip_by_value(values, -tf.float32.max, tf.float32.max)


def _square_shape(n: int) -> tuple[int, int]:
    """Rows and columns of the smallest matrix for `n` entries among those nearest to a square."""
    columns = math.isqrt(max(n - 1, 0)) + 1
    return -(-n // columns), columns
