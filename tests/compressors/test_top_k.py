"""Top-k against a stable sort, over data made to upset thresholds and samples."""

import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.compressors import TopK
from tfqcomm.kernels import numerics, selection

LARGE = numerics.FUSE_FROM + 12345


def reference(x, k):
    """Positions of the k largest magnitudes, ties to the lowest, by sorting."""
    magnitudes = np.where(np.isnan(x), np.inf, np.abs(x))
    order = np.lexsort([np.arange(len(x)), ~np.isnan(x), -magnitudes])
    return np.sort(order[:k])


def rng(n):
    return np.random.default_rng(n)


PATTERNS = {  # name -> n -> float32[n]
    "normal": lambda n: rng(n).normal(size=n),
    "all equal": lambda n: np.full(n, -2.5),
    "all zero": lambda n: np.zeros(n),
    "signs": lambda n: rng(n).choice([-1.0, 1.0], size=n),
    "many ties": lambda n: rng(n).integers(-3, 4, size=n),
    "few non-zeros": lambda n: np.where(rng(n).random(n) < 0.002, rng(n).normal(size=n), 0),
    "one non-zero at the end": lambda n: np.arange(n) == n - 1,
    "ascending": lambda n: np.arange(n),
    "descending": lambda n: -np.arange(n, 0, -1.0),
    "period of 64": lambda n: (np.arange(n) % 64 == 63) * (1 + rng(n).random(n)),
    "period of 100": lambda n: (np.arange(n) % 100 == 0) * 9 + rng(n).random(n),
    "period of a fold": lambda n: np.resize(rng(n).normal(size=max(n // 8, 1)) ** 9, n),
    "one block holds all": lambda n: (np.arange(n) < n // 100) * (1 + rng(n).random(n)),
    "the rest of a fold holds all": lambda n: np.arange(n) >= n - 7,
    "denormal": lambda n: rng(n).normal(size=n) * 1e-41,
    "smallest denormals": lambda n: rng(n).integers(0, 3, size=n) * 1.4e-45,
    "huge": lambda n: rng(n).choice([3.4e38, -1e38, 1.0], size=n),
    "NaN and inf": lambda n: rng(n).choice([np.nan, -np.inf, np.inf, 1], n, p=[0.01] * 3 + [0.97]),
}


def check(x, k):
    x = np.asarray(x, np.float32)
    positions, values = selection.largest(tf.constant(x), k)
    np.testing.assert_array_equal(positions, reference(x, k))
    np.testing.assert_array_equal(values, x[reference(x, k)])


@pytest.mark.parametrize("name", PATTERNS)
def test_equals_a_stable_sort(name):
    for n in (1, 33, 1000, selection.SORT_UP_TO, selection.SORT_UP_TO + 1, 100003):
        x = PATTERNS[name](n)
        for ratio in (1e-4, 0.01, 0.2, 0.7, 1.0):
            check(x, max(1, round(ratio * n)))


@pytest.mark.parametrize("name", PATTERNS)
def test_equals_a_stable_sort_where_kernels_are_fused(name):
    check(PATTERNS[name](LARGE), LARGE // 100)


def test_three_million():
    check(PATTERNS["normal"](3_000_000), 30_000)


@pytest.mark.parametrize("name", ["normal", "period of 64", "few non-zeros", "signs", "all zero"])
def test_never_sorts_a_large_tensor(name, monkeypatch):
    """An exact sort is twenty times slower than everything else."""
    sorted_sizes = []

    def spy(values, *args, **kwargs):
        sorted_sizes.append(int(tf.size(values)))
        return top_k(values, *args, **kwargs)

    top_k = tf.math.top_k
    monkeypatch.setattr(tf.math, "top_k", spy)
    monkeypatch.setattr(tf, "sort", lambda values, **kwargs: spy(values, len(values)))
    n = 300_000
    TopK(0.01).encode_implementation(tf.constant(PATTERNS[name](n), tf.float32), None)
    assert max(sorted_sizes, default=0) <= n // 2


@pytest.mark.parametrize(
    "name", ["normal", "ascending", "period of 64", "one block holds all", "all zero"]
)
def test_few_candidates_are_left_to_trim(name, monkeypatch):
    """Little more than k, however the data is arranged; only ties may be more."""
    n, k = 1_000_000, 10_000
    left = []

    def spy(keys, *args):
        left.append(len(keys))
        return exact(keys, *args)

    exact = selection._exact
    monkeypatch.setattr(selection, "_exact", spy)
    selection.largest(tf.constant(PATTERNS[name](n), tf.float32), k)
    assert k <= left[0] <= 1.1 * k


def test_error_is_the_best_that_k_entries_allow():
    for n in (1, 2, 31, 1000, 65537, 100003):
        x = rng(n).normal(size=n).astype(np.float32)
        codec = TopK(0.1)
        error = np.square(x - codec.decode(codec.encode(x), n).numpy()).sum(dtype=np.float64)
        left = np.sort(np.square(x.astype(np.float64)))[: n - codec.num_kept(n)]
        np.testing.assert_allclose(error, left.sum(), rtol=1e-6)


def test_keeps_at_least_one_and_rounds():
    assert [TopK(0.01).num_kept(n) for n in (0, 1, 99, 149, 151, 10**6)] == [0, 1, 1, 1, 2, 10**4]


@pytest.mark.parametrize("n", [1000, 65536, 65537, 3 * 65536 + 1])
def test_bfloat16_values_are_rounded_float32_values(n):
    x = rng(n).normal(size=n).astype(np.float32)
    exact = TopK(0.02).decode(TopK(0.02).encode(x), n)
    codec = TopK(0.02, value_dtype="bfloat16")
    rounded = tf.cast(tf.cast(exact, tf.bfloat16), tf.float32)
    np.testing.assert_array_equal(codec.decode(codec.encode(x), n), rounded)


def test_bfloat16_values_stay_finite():
    codec = TopK(1.0, value_dtype="bfloat16")
    assert np.isfinite(codec.decode(codec.encode([3.4e38, -3.4e38]), 2)).all()


def test_kth_largest_of_all_bit_patterns():
    keys = np.random.default_rng(0).integers(0, 2**31, size=5000).astype(np.int32)
    keys[:2000] = keys[0]
    for k in (1, 2, 1999, 2500, 5000):
        value, above = selection.kth_largest(tf.constant(keys), k)
        expected = np.sort(keys)[-k]
        assert (value, above) == (expected, (keys > expected).sum())
