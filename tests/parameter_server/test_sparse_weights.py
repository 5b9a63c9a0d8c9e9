"""Sparse weights: exact, and never longer than the shortest of the three forms."""

import numpy as np
import pytest
import tensorflow as tf

from tests.catalogue import elias_fano
from tfqcomm.parameter_server import SparseWeights


def vector(n, nonzero, seed=0):
    rng = np.random.default_rng(seed)
    x = np.zeros([n], np.float32)
    x[rng.choice(n, nonzero, replace=False)] = rng.normal(size=nonzero)
    return x


def expected_words(n, k):
    positions = elias_fano(k, n) if k else n & (n - 1) > 0  # at most an empty bitmap
    return 2 + min(n, -(-n // 32) + k, positions + k)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 1000, 65536, 65537, 200_000])
@pytest.mark.parametrize("share", [0, 0.001, 0.05, 0.0626, 0.5, 0.97, 1])
def test_round_trip_and_length(n, share):
    k = round(share * n)
    x = vector(n, k)
    codec = SparseWeights()
    words = codec.encode(tf.constant(x))
    assert words.dtype == tf.int32
    assert len(words) == expected_words(n, k) <= codec.most_words(n)
    np.testing.assert_array_equal(codec.decode(words, n), x)


def test_keeps_what_is_not_finite_and_denormal():
    x = np.float32([0, np.nan, -np.inf, 1e-40, 0, -2])
    decoded = SparseWeights().decode(SparseWeights().encode(tf.constant(x)), 6)
    np.testing.assert_array_equal(decoded, x)


def test_works_in_a_graph():
    @tf.function
    def there_and_back(x):
        return SparseWeights().decode(SparseWeights().encode(x), 100)

    for k in (0, 3, 90):
        x = vector(100, k)
        np.testing.assert_array_equal(there_and_back(tf.constant(x)), x)


def test_empty():
    words = SparseWeights().encode(tf.zeros([0]))
    assert SparseWeights().decode(words, 0).shape == [0]
