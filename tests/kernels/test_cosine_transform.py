"""The cosine transform of blocks, by matrix products."""

import numpy as np
import pytest

from tfqcomm.kernels import cosine_transform


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((128, 10), (64, 10)),
        ((65, 127), (13, 1)),
        ((3, 3, 8, 6), (36, 6)),
        ((100,), (1, 50)),
        ((), (1, 1)),
        ((0, 3), (1, 3)),
    ],
)
def test_blocks_are_the_largest_that_divide(shape, block):
    assert cosine_transform.block_shape(shape, 64) == block


@pytest.mark.parametrize("shape", [(8, 6), (2, 2, 3), (12,), (5,), ()])
def test_the_inverse_gives_it_back_and_norms_stay(shape):
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    y = cosine_transform.to_frequencies(x, 4)
    assert y.shape == shape
    np.testing.assert_allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-6)
    np.testing.assert_allclose(cosine_transform.from_frequencies(y, 4), x, atol=1e-6)


def test_each_block_is_transformed_by_itself():
    """What is constant in a block has one frequency there, and blocks stand one by one."""
    x = np.kron(np.float32([[1, 2], [3, 4], [5, 6]]), np.ones([2, 4], "float32"))
    y = cosine_transform.to_frequencies(x, 4)  # [6, 8]: three times two blocks of 3 x 4
    assert cosine_transform.block_shape(x.shape, 4) == (3, 4)
    x = np.kron(np.float32([[1, 2], [3, 4]]), np.ones([3, 4], "float32"))
    y = np.reshape(cosine_transform.to_frequencies(x, 4), [4, 12])
    np.testing.assert_allclose(y[:, 0], np.sqrt(12) * np.float32([1, 2, 3, 4]), rtol=1e-6)
    np.testing.assert_allclose(y[:, 1:], 0, atol=1e-6)


def test_what_is_zero_is_so_to_the_bit():
    """The middle of three entries has no part in the second frequency, whatever that is."""
    x = cosine_transform.from_frequencies(np.float32([0, 0.7, 0, 0, -1e9, 0]), 3)
    np.testing.assert_array_equal(np.sign(x), [1, 0, -1, -1, 0, 1])


def test_frequencies_are_those_of_the_cosines():
    n = 8
    x = np.cos(np.pi * (np.arange(n) + 0.5) * 3 / n).astype("float32")
    y = cosine_transform.to_frequencies(x, n)
    np.testing.assert_allclose(y, 2.0 * (np.arange(n) == 3), atol=1e-6)
