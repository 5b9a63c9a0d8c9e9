"""Matrices of low rank: what PowerSGD is made of, on batches of matrices of equal shape.

Letters: b matrices of a batch, n rows, m columns, r rank. A matrix is approximated by
left @ right, left float32[n, r] and right float32[r, m].

Some of this every replica computes for itself, and all must find the same bits, whatever the number
of threads each has. A sum over a long axis of a product of matrices is cut among threads, so such
products are made of blocks that are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorflow as tf

from tfqcomm.kernels import numerics

# What is left of a column, of its length, below which it is taken for a combination of those before
# it: a column of M Q in float32 is no better than that.
DEPENDENT = 2.0**-16
_FEW = 8  # columns, for which it is cheaper to subtract one after another than their product
_BLOCK = 128  # rows of one product in `_gram`


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix: all axes but the last, and the last.

    Of Keras' kernels the last axis is what leaves the layer: (inputs, units) of `Dense`, (height,
    width, channels, filters) of `Conv2D`. So a column holds what makes one output, as in the paper
    (which has it in a row). What has no two axes is one row.
    """
    return math.prod(shape[:-1]), math.prod(shape[-1:])


def random_directions(seed: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """Standard normal numbers: int32[2] -> float32[shape], a function of its arguments alone."""
    # Philox by name: the default may differ between devices, and replicas must agree.
    return tf.random.stateless_normal(shape, seed, alg="philox")


def left_factor(matrices: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """M right^T: float32[b, n, m], float32[b, r, m] -> float32[b, n, r]."""
    return tf.matmul(matrices, right, transpose_b=True)


def right_factor(matrices: tf.Tensor, left: tf.Tensor) -> tf.Tensor:
    """left^T M: float32[b, n, m], float32[b, n, r] -> float32[b, r, m]."""
    return tf.matmul(left, matrices, transpose_a=True)


def product(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """float32[b, n, r], float32[b, r, m] -> float32[b, n, m], the same bits on all replicas."""
    return tf.matmul(left, right)


def remainder(matrices: tf.Tensor, left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """M - left right: float32[b, n, m], of a replica by itself; beyond the range its largest.

    So it is finite, without a look at all of it, where M is and `largest_product` is.
    """
    size, rank = matrices.shape.num_elements(), left.shape[-1]
    if size >= numerics.FUSE_FROM and rank <= _FEW:
        return numerics.fuse(_term_by_term, size)(matrices, left, right)
    return _in_range(matrices - product(left, right))


def _term_by_term(matrices, left, right):
    for k in range(left.shape[-1]):
        matrices = matrices - left[:, :, k, None] * right[:, k, None]
    return _in_range(matrices)


def _in_range(x):
    return tf.clip_by_value(x, -tf.float32.max, tf.float32.max)


def largest_product(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """What no entry of left right exceeds, nor any sum on the way to it: float32[b]."""
    columns, rows = tf.reduce_max(tf.abs(left), axis=1), tf.reduce_max(tf.abs(right), axis=2)
    return tf.reduce_sum(columns * rows, axis=1)


def unit_columns(x: tf.Tensor) -> tf.Tensor:
    """Columns divided by their largest magnitude: float32[b, n, r], within [-1, 1].

    Zero, denormal and non-finite columns become zeros.
    """
    largest = tf.reduce_max(tf.abs(x), axis=1, keepdims=True)
    # A maximum may or may not see NaN; so the quotient is looked at, too.
    quotients = numerics.relative(x, largest)
    fine = tf.reduce_all(tf.math.is_finite(quotients), axis=1, keepdims=True)
    return tf.where(fine & tf.math.is_finite(largest), quotients, 0.0)


def orthogonalize(matrices: Sequence[tf.Tensor], spares: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Orthonormal columns that span what the columns of each matrix span, and r dimensions in all.

    Gram-Schmidt, in the order of the columns. A column that depends on those before it (a zero one
    does) is replaced by that of a spare matrix. Otherwise it would be zero from then on, as what is
    multiplied with it is; or, as normalized rounding errors, it might be parallel to another one,
    and what both stand for would be sent twice.

    It is done on inner products of the columns, all matrices at once, in float64. That is as good
    as on the columns themselves: products of float32 are exact there.

    Args:
        matrices: float32[b, n, r] for each batch, all of the same r < n; of any range.
        spares: float32[n, r] for each batch: random directions, of about unit length an entry.

    Returns:
        float32[b, n, r] for each batch, the same bits on all replicas.
    """
    if not matrices:
        return []
    rank = matrices[0].shape[-1]
    columns = [_side_by_side(p, spare) for p, spare in zip(matrices, spares, strict=True)]
    grams = tf.concat([_gram(x) for x in columns], 0)  # of all batches
    chosen = tf.split(_combinations(grams, rank), [p.shape[0] for p in matrices])
    return [
        tf.cast(tf.matmul(x, combination), tf.float32)
        for x, combination in zip(columns, chosen, strict=True)
    ]


def _side_by_side(matrices, spare):
    """float64[b, n, 2r]: the columns, then spare ones."""
    spare = tf.broadcast_to(spare, matrices.shape)
    return tf.cast(tf.concat([unit_columns(matrices), spare], -1), tf.float64)


def _gram(x):
    """Inner products of columns: float64[b, n, k] -> float64[b, k, k]."""
    b, n, k = x.shape
    blocks = tf.reshape(tf.pad(x, [[0, 0], [0, -n % _BLOCK], [0, 0]]), [b, -1, _BLOCK, k])
    return tf.reduce_sum(tf.matmul(blocks, blocks, transpose_a=True), axis=1)


def _combinations(gram, rank):
    """The columns of which each orthonormal column is made.

    Args:
        gram: float64[b, 2r, 2r], inner products of r columns and r spare ones.

    Returns:
        float64[b, 2r, r].
    """
    chosen = tf.zeros([tf.shape(gram)[0], 0, 2 * rank], tf.float64)  # [b, columns so far, 2r]
    for column in range(rank):
        own, length = _perpendicular(gram, chosen, column)
        spare, length_of_spare = _perpendicular(gram, chosen, rank + column)
        independent = length > DEPENDENT**2 * gram[:, column, column]
        next_one = tf.where(independent[:, None], own, spare)
        length = tf.where(independent, length, length_of_spare)
        next_one = tf.math.divide_no_nan(next_one, tf.sqrt(tf.maximum(length, 0.0))[:, None])
        chosen = tf.concat([chosen, next_one[:, None]], axis=1)
    return tf.linalg.matrix_transpose(chosen)


def _perpendicular(gram, chosen, column):
    """A column less its projections on the chosen ones, and the square of its length then.

    Returns:
        float64[b, 2r], of what columns it is made; float64[b].
    """
    projections = tf.reduce_sum(chosen * gram[:, None, column], axis=2)  # [b, columns so far]
    unit = tf.one_hot(column, gram.shape[-1], dtype=tf.float64)
    made_of = unit - tf.reduce_sum(projections[:, :, None] * chosen, axis=1)
    image = tf.reduce_sum(gram * made_of[:, None], axis=2)
    return made_of, tf.reduce_sum(made_of * image, axis=1)
