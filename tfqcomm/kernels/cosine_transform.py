"""The discrete cosine transform of the chunks of a matrix, by matrix products.

Both axes of a matrix are cut into chunks of equal length, and each block that this makes is
transformed by itself. Frequencies stand block by block:

    [R, C] --cut--> [R / h, C / w, h, w] --transform--> [R / h, C / w, w, h] frequencies

Letters: R rows, C columns, h rows and w columns of a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfqcomm.kernels.low_rank import matrix_shape


def block_shape(shape: Sequence[int], most: int) -> tuple[int, int]:
    """Sides (h, w) of a tensor's blocks: the largest divisors of rows and columns up to `most`.

    As a matrix it has all axes but the last for rows; what has no two axes is one row.
    """
    rows, columns = matrix_shape(shape)
    return _divisor(rows, most), _divisor(columns, most)


def to_frequencies(x: tf.Tensor, most: int) -> tf.Tensor:
    """float32 of any static shape -> frequencies of its blocks, in the same shape.

    The transform is orthonormal: norms stay, and `from_frequencies` is its transpose.
    """
    (rows, columns), (h, w) = matrix_shape(x.shape), block_shape(x.shape, most)
    blocks = tf.transpose(tf.reshape(x, [rows // h, h, columns // w, w]), [0, 2, 1, 3])
    blocks = tf.transpose(_along_last_axis(blocks, _cosines(w)), [0, 1, 3, 2])
    return tf.reshape(_along_last_axis(blocks, _cosines(h)), x.shape)


def from_frequencies(y: tf.Tensor, most: int) -> tf.Tensor:
    """Inverse of `to_frequencies`."""
    (rows, columns), (h, w) = matrix_shape(y.shape), block_shape(y.shape, most)
    blocks = _along_last_axis(
        tf.reshape(y, [rows // h, columns // w, w, h]), np.transpose(_cosines(h))
    )
    blocks = _along_last_axis(tf.transpose(blocks, [0, 1, 3, 2]), np.transpose(_cosines(w)))
    return tf.reshape(tf.transpose(blocks, [0, 2, 1, 3]), y.shape)


def _along_last_axis(x: tf.Tensor, matrix: np.ndarray) -> tf.Tensor:
    """The product of a matrix and every vector that the last axis has.

    As one product of matrices: one that broadcasts reads beyond its operands where TensorFlow 2.21
    leaves it to oneDNN ([2, 1, 64, 10] @ [10, 10]).
    """
    n = len(matrix)
    if n == 1:
        return x
    vectors = tf.reshape(x, [math.prod(x.shape) // n, n])
    return tf.reshape(tf.matmul(vectors, matrix, transpose_b=True), x.shape)


def _divisor(n: int, most: int) -> int:
    return next((d for d in range(min(n, most), 0, -1) if n % d == 0), 1)


@functools.cache
def _cosines(n: int) -> np.ndarray:
    """float32[n, n], row k of frequency k: the orthonormal transform of type II."""
    k, j = np.arange(n)[:, None], np.arange(n)[None, :]
    rows = np.cos(math.pi * (2 * j + 1) * k / (2 * n)) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    rows[(2 * j + 1) * k % (2 * n) == n] = 0  # not a rounding error: somebody may take its sign
    return rows.astype(np.float32)
