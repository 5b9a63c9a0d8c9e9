"""Messages of any number of entries: op by op as by NumPy, and compiled the same to the bit."""

import numpy as np
import pytest
import tensorflow as tf

from tests.catalogue import elias_fano
from tfqcomm.kernels import compiled_entries, largest_entries, numerics


def vector(n, seed):
    """With ties, both zeros, and what is not finite."""
    x = np.random.default_rng(seed).normal(size=n).astype(np.float32)
    x[::7] = np.round(x[::7])
    x[3::50] = -0.0
    x[5::211] = np.inf
    x[8::307] = np.nan
    return x


def ks(n):
    some = {1, 2, n // 100, n // 8 - 1, n // 8, n // 3, n // 2, n - 1, n}
    return sorted(k for k in some if 1 <= k <= n)


@pytest.mark.parametrize("n", [1, 2, 37, 1024, 5003])
def test_compiled_messages_are_the_same_to_the_bit(n, monkeypatch):
    x = tf.constant(vector(n, n))
    for k in map(tf.constant, ks(n)):
        words, left_out = largest_entries.encode(x, k)
        other, _ = largest_entries.encode(x[::-1], k)
        mean = largest_entries.decode_mean(tf.stack([words, other, words]), k, n)
        with monkeypatch.context() as as_on_a_gpu:
            as_on_a_gpu.setattr(numerics, "on_gpu", lambda tensor: True)
            compiled_words, compiled_left_out = largest_entries.encode(x, k)
            compiled_mean = largest_entries.decode_mean(tf.stack([words, other, words]), k, n)
        assert len(words) == elias_fano(int(k), n) + int(k)
        np.testing.assert_array_equal(as_bits(words), as_bits(compiled_words))
        finite = np.isfinite(x)  # another step is skipped
        np.testing.assert_array_equal(left_out[finite], compiled_left_out[finite])
        np.testing.assert_array_equal(mean, compiled_mean)


def as_bits(words):
    return tf.bitcast(words, tf.int32)


def test_an_entry_of_each_of_several_messages():
    n, k = 300, tf.constant(20)
    vectors = [vector(n, seed) for seed in range(3)]
    vectors = [np.where(np.isfinite(x), x, 1) for x in vectors]
    words = tf.stack([largest_entries.encode(tf.constant(x), k)[0] for x in vectors])
    kept = [np.argsort(-np.abs(x), kind="stable")[:20] for x in vectors]
    expected = [
        np.where(np.isin(np.arange(n), rows), x, 0) for rows, x in zip(kept, vectors, strict=True)
    ]
    mean = largest_entries.decode_mean(words, k, n)
    np.testing.assert_allclose(mean, np.mean(expected, axis=0), rtol=1e-6)


@pytest.mark.parametrize("n", [1, 63, 64, 1000])
def test_no_message_is_longer_than_that_of_all_entries(n):
    longest = max(largest_entries.num_words(k, n) for k in range(1, n + 1))
    assert longest == compiled_entries.most_words(n)
