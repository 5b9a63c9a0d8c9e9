"""Orthonormal columns of any matrices, the same bits whoever computes them."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tests.multi_process import ROOT
from tfqcomm.kernels import low_rank


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def orthogonalize(matrices, seed=9):
    spare = low_rank.random_directions(tf.constant([seed, 0]), matrices.shape[1:])
    return low_rank.orthogonalize([tf.constant(matrices)], [spare])[0].numpy()


def assert_orthonormal(columns, tolerance=1e-5):
    grams = np.einsum("bnr,bns->brs", columns.astype(np.float64), columns)
    np.testing.assert_allclose(grams - np.eye(grams.shape[1]), 0, atol=tolerance)


def gram_schmidt(matrix):
    """As in the textbook, one column after another, in float64."""
    columns = []
    for column in matrix.astype(np.float64).T:
        for earlier in columns:
            column = column - (earlier @ column) * earlier
        columns.append(column / np.linalg.norm(column))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((), (1, 1)),
        ((7,), (1, 7)),
        ((3, 5), (3, 5)),
        ((3, 3, 64, 128), (576, 128)),
        ((0, 5), (0, 5)),
    ],
)
def test_last_axis_and_all_others(shape, matrix):
    assert low_rank.matrix_shape(shape) == matrix


@pytest.mark.parametrize(("n", "rank"), [(2, 1), (5, 4), (127, 3), (128, 4), (1000, 8)])
def test_it_is_gram_schmidt(n, rank):
    matrices = normal(3, n, rank)
    found = orthogonalize(matrices)
    assert found.dtype == np.float32
    assert_orthonormal(found)
    for columns, matrix in zip(found, matrices, strict=True):
        np.testing.assert_allclose(columns, gram_schmidt(matrix), atol=1e-5)


def test_several_batches_at_once_are_each_by_itself():
    batches = [normal(2, 50, 3), normal(1, 300, 3, seed=1), normal(4, 50, 3, seed=2)]
    spare = low_rank.random_directions(tf.constant([9, 0]), [300, 3])
    found = low_rank.orthogonalize(
        [tf.constant(x) for x in batches], [spare[: x.shape[1]] for x in batches]
    )
    for together, alone in zip(found, batches, strict=True):
        (expected,) = low_rank.orthogonalize([tf.constant(alone)], [spare[: alone.shape[1]]])
        np.testing.assert_array_equal(together, expected)


def test_nearly_parallel_columns_are_told_apart():
    """Classical Gram-Schmidt in float32 ends with columns that are not orthogonal."""
    matrices = normal(1, 400, 4)
    matrices[..., 1:] = matrices[..., :1] + 1e-3 * matrices[..., 1:]
    found = orthogonalize(matrices)
    assert_orthonormal(found)
    np.testing.assert_allclose(found[0], gram_schmidt(matrices[0]), atol=1e-4)


DEGENERATE = {
    "zeros": lambda x: np.zeros_like(x),
    "negative zeros": lambda x: -np.zeros_like(x),
    "a zero column": lambda x: x * np.float32([1, 0, 1, 1]),
    "equal columns": lambda x: np.repeat(x[..., :1], 4, axis=-1),
    "two dimensions": lambda x: x[..., :2] @ normal(2, 4),
    "one row": lambda x: np.where(np.arange(x.shape[1])[:, None] == 3, x, np.float32(0)),
    "denormal": lambda x: x * np.float32(1e-40),
    "infinite": lambda x: np.where(x > 1, np.float32(np.inf), x),
    "not a number": lambda x: x * np.float32([1, np.nan, 1, 1]),
}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_there_are_always_as_many_orthonormal_columns(kind):
    """Of zeros one gets NaN without an epsilon, and with one zeros, in all later steps."""
    matrices = DEGENERATE[kind](normal(2, 60, 4)).astype(np.float32)
    assert_orthonormal(orthogonalize(matrices))


@pytest.mark.parametrize("kind", ["zeros", "a zero column", "equal columns", "two dimensions"])
def test_they_span_all_that_was_there(kind):
    matrices = DEGENERATE[kind](normal(2, 60, 4)).astype(np.float32)
    found = orthogonalize(matrices)
    projected = found @ (found.transpose(0, 2, 1) @ matrices)
    np.testing.assert_allclose(projected, matrices, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_scale_does_not_matter(scale):
    matrices = normal(1, 60, 4)
    expected = orthogonalize(matrices)
    np.testing.assert_allclose(orthogonalize(matrices * np.float32(scale)), expected, atol=1e-5)
    mixed = matrices * np.float32([1, scale, 1 / scale, 1])
    np.testing.assert_allclose(orthogonalize(mixed), expected, atol=1e-5)


HASH = """
import hashlib, sys
import numpy as np, tensorflow as tf
from tfqcomm.kernels import low_rank
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
for b, n, m, rank in [(1, 3072, 1500, 4), (7, 37, 61, 4), (1, 20000, 300, 16)]:
    generator = np.random.default_rng(0)
    left, right = generator.normal(size=[b, n, rank]), generator.normal(size=[b, rank, m])
    left, right = tf.constant(left, tf.float32), tf.constant(right, tf.float32)
    spare = low_rank.random_directions(tf.constant([1, 2]), [n, rank])
    (columns,) = low_rank.orthogonalize([left], [spare])
    for x in (columns, low_rank.product(columns, right), low_rank.unit_columns(left)):
        print(hashlib.sha256(x.numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_the_number_of_threads_does_not_matter():
    """Replicas on machines with more cores and with fewer: their weights would drift apart."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    found = {
        subprocess.run(
            [sys.executable, "-c", HASH, str(threads)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=True,
        ).stdout
        for threads in (1, 2, 5)
    }
    assert len(found) == 1
    assert len(found.pop().split()) == 9


@pytest.mark.parametrize("rank", [3, 9])
def test_large_remainders_are_those_of_the_product(rank):
    """From `FUSE_FROM` elements on XLA subtracts one column after another, if they are few."""
    matrices, left, right = normal(1, 1200, 1100), normal(1, 1200, rank), normal(1, rank, 1100)
    found = low_rank.remainder(*map(tf.constant, (matrices, left, right)))
    np.testing.assert_allclose(found, matrices - left @ right, atol=1e-4)


def test_a_remainder_beyond_the_range_is_the_largest_number():
    largest = np.finfo(np.float32).max
    matrices = np.full([1, 2, 2], largest)
    left, right = np.float32([[[1], [-1]]]), np.full([1, 1, 2], largest / 2)
    assert low_rank.largest_product(left, right) == largest / 2
    found = low_rank.remainder(*map(tf.constant, (matrices, left, right)))
    np.testing.assert_array_equal(found[0], [[largest / 2] * 2, [largest] * 2])
