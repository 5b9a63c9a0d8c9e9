"""The shared positions of random-k."""

import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.compressors import RandomK
from tfqcomm.compressors.random_k import random_positions


def positions(seed, n, k):
    return random_positions(tf.constant([seed, 0]), (n,), (k,)).numpy()


@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (2, 1), (7, 3), (7, 6), (7, 7), (1000, 10), (1000, 333), (100003, 99999)]
)
def test_positions_are_distinct_and_in_range(n, k):
    for seed in range(20):
        drawn = positions(seed, n, k)
        assert drawn.min() >= 0
        assert drawn.max() < n
        assert len(set(drawn)) == k


@pytest.mark.parametrize(("n", "k"), [(7, 3), (33, 10), (11, 10)])
def test_every_position_is_kept_equally_often(n, k):
    """Strata of different sizes alone would not do: the rotation evens them out."""
    draws = 1500
    seeds = tf.stack([tf.range(draws), tf.fill([draws], 17)], axis=1)

    @tf.function  # all of it: in a process with thousands of functions a call takes long
    def draw_all():
        return tf.map_fn(lambda seed: random_positions(seed, (n,), (k,)), seeds)

    counts = np.bincount(draw_all().numpy().ravel(), minlength=n)
    expected = draws * k / n
    standard_error = np.sqrt(draws * (k / n) * (1 - k / n))
    assert abs(counts - expected).max() <= 5 * standard_error


def test_positions_spread_over_the_vector():
    drawn = np.sort(positions(3, 1_000_000, 1000))
    assert np.diff(drawn).max() <= 2000


def test_products_do_not_overflow():
    """The product n * k is beyond 32 bits, and so are the products of draws and strata."""
    n = 3_000_000
    for k in (1, 2, 700_000):
        drawn = positions(5, n, k)
        assert len(np.unique(drawn)) == k
        assert 0 <= drawn.min() <= drawn.max() < n


def test_kept_values_are_exact_and_unscaled():
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    codec = RandomK(0.1)
    decoded = codec.decode(codec.encode(x, seed=5), 1000).numpy()
    kept = positions(5, 1000, 100)
    np.testing.assert_array_equal(decoded[kept], x[kept])
    assert np.count_nonzero(decoded) == 100


def test_header_is_the_seed():
    words = RandomK(0.5).encode(tf.zeros([10]), seed=tf.constant([-7, 9])).numpy()
    np.testing.assert_array_equal(words[: RandomK.header_words], [-7, 9])


def test_positions_are_the_same_when_compiled():
    compiled = tf.function(random_positions, jit_compile=True)
    seed = tf.constant([5, 6])
    np.testing.assert_array_equal(
        compiled(seed, (1000,), (10,)), random_positions(seed, (1000,), (10,))
    )
