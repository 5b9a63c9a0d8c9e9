"""Elias-Fano lists, against a Python string of bits."""

import functools
import math

import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.kernels import numerics, positions


def reference(chosen, n):
    """The words, built bit by bit as the module's drawing has it."""
    k = len(chosen)
    low = math.floor(math.log2(n / k))
    lower = "".join(f"{p & (1 << low) - 1:0{low}b}" for p in chosen) if low else ""
    bitmap = ["0"] * ((n - 1 >> low) + k)
    for rank, p in enumerate(chosen):
        bitmap[(p >> low) + rank] = "1"
    words = []
    for bits in (lower, "".join(bitmap)):
        bits += "0" * (-len(bits) % 32)
        words += [int(bits[i : i + 32], 2) for i in range(0, len(bits), 32)]
    return np.array(words, np.uint32).view(np.int32)


def choose(n, k, where):
    if where == "first":
        return np.arange(k, dtype=np.int32)
    if where == "last":
        return np.arange(n - k, n, dtype=np.int32)
    chosen = np.random.default_rng(n + k).choice(n, k, replace=False)
    return np.sort(chosen).astype(np.int32)


def check(chosen, n):
    k = len(chosen)
    words = positions.encode(tf.constant(chosen), n)
    assert words.shape == [positions.num_words(k, n)]
    np.testing.assert_array_equal(positions.decode(words[None], k, n)[0], chosen)
    return words


@pytest.mark.parametrize("where", ["first", "last", "random"])
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 100, 1000, 4099, 65_537])
def test_words_are_those_of_a_string_of_bits(n, where):
    for k in sorted({1, 2, 3, n // 100, n // 20, n // 3, n - 1, n} & set(range(1, n + 1))):
        chosen = choose(n, k, where)
        np.testing.assert_array_equal(check(chosen, n), reference(chosen, n))


@pytest.mark.parametrize("n", [1, 2, 33, 1000, 65_537])
def test_a_number_known_at_run_time_only_gives_the_same_words(n):
    encode = tf.function(
        functools.partial(positions.encode, n=n), input_signature=[tf.TensorSpec([None], tf.int32)]
    )
    signature = [tf.TensorSpec([2, None], tf.int32), tf.TensorSpec([], tf.int32)]
    decode = tf.function(functools.partial(positions.decode, n=n), input_signature=signature)
    for k in sorted({1, 2, 3, n // 100, n // 4 + 1, n // 3, n - 1, n} & set(range(1, n + 1))):
        assert positions.num_words(tf.constant(k), n) == positions.num_words(k, n)
        lists = [choose(n, k, "random"), choose(n, k, "last")]
        words = tf.stack([encode(chosen) for chosen in lists])
        np.testing.assert_array_equal(words[0], reference(lists[0], n))
        np.testing.assert_array_equal(decode(words, k), lists)


def test_the_drawing():
    words = positions.encode(tf.constant([5, 9, 11, 30]), 32)
    bits = "".join(f"{word & 0xFFFFFFFF:032b}" for word in words.numpy().tolist())
    assert bits == "101001011110".ljust(32, "0") + "1011001".ljust(32, "0")


@pytest.mark.parametrize("n", [2**31 - 1, 2**31 - 2**20, 2**30, 2**30 + 1])
def test_the_longest_vectors(n):
    for chosen in ([0], [n - 1], [0, n - 1], [n - 3, n - 2, n - 1]):
        check(np.array(chosen, np.int32), n)


@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.1])
def test_where_kernels_are_fused(ratio):
    n = numerics.FUSE_FROM + 12_347
    chosen = choose(n, round(ratio * n), "random")
    np.testing.assert_array_equal(check(chosen, n), reference(chosen, n))


def test_several_lists_at_once():
    n, k = 3001, 37
    lists = [choose(n, k, "first"), choose(n, k, "last"), choose(n, k, "random")]
    words = tf.stack([positions.encode(tf.constant(chosen), n) for chosen in lists])
    np.testing.assert_array_equal(positions.decode(words, k, n), lists)


def test_bits_a_position():
    """The third column is what no code can be below on average."""
    n = 10**7
    for ratio, bits, entropy in ((0.001, 11.955, 11.41), (0.01, 8.5625, 8.08), (0.05, 6.25, 5.73)):
        k = round(ratio * n)
        assert 32 * positions.num_words(k, n) / k == pytest.approx(bits, abs=1e-3)
        share = -(ratio * math.log2(ratio) + (1 - ratio) * math.log2(1 - ratio)) / ratio
        assert share == pytest.approx(entropy, abs=0.01)
