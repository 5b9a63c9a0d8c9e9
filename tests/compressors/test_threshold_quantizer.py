"""Threshold quantization against its rules, and the optimal one against trying everything."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from tests.compressors.test_laws import TENSORS, tensor
from tfqcomm.compressors import ThresholdQuantizer
from tfqcomm.kernels import least_squares, numerics

OPTIMAL, SCALED = ThresholdQuantizer("optimal"), ThresholdQuantizer("scaled")
LARGE = least_squares.SORT_UP_TO + 1


def decoded(codec, x):
    x = np.asarray(x, np.float32)
    return codec.decode(codec.encode(x), len(x)).numpy()


def error(x, y):
    """Squared, relative, from values that are first scaled into the range of float64's squares."""
    return np.square((y.astype(np.float64) - x) / max(float(abs(x).max()), 1e-300)).sum()


def smallest_error(x):
    """By a sort and exact sums: |x|^2 - max over k of (sum of the k largest)^2 / k."""
    magnitudes = np.sort(abs(x.astype(np.float64)) / max(float(abs(x).max()), 1e-300))[::-1]
    gains = np.square(np.cumsum(magnitudes)) / np.arange(1, len(x) + 1)
    return np.square(magnitudes).sum() - gains.max(initial=0)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("n", [1, 100, 5000, numerics.FUSE_FROM + 3])
def test_threshold_is_a_multiple_of_the_mean(n, ratio):
    x = np.random.default_rng(n).standard_cauchy(size=n).astype(np.float32)
    magnitudes = abs(x.astype(np.float64))
    kept = magnitudes > ratio * magnitudes.mean()
    expected = np.where(kept, np.sign(x) * magnitudes[kept].mean(), 0)
    np.testing.assert_allclose(decoded(ThresholdQuantizer(ratio), x), expected, rtol=1e-5)
    if ratio == 0.7:
        np.testing.assert_array_equal(decoded(SCALED, x), decoded(ThresholdQuantizer(0.7), x))


def test_optimal_is_the_best_of_all_ternary_vectors():
    for seed, n in itertools.product(range(8), (1, 2, 3, 6)):
        x = np.random.default_rng(seed).normal(size=n).astype(np.float32) ** (1 + 2 * (seed % 2))
        best = np.inf
        for signs in itertools.product((-1, 0, 1), repeat=n):
            t = np.array(signs)
            scale = max(x.astype(np.float64) @ t / max(t @ t, 1), 0)
            best = min(best, np.square(x - scale * t).sum())
        np.testing.assert_allclose(np.square(decoded(OPTIMAL, x) - x).sum(), best, atol=1e-6)


MORE_TENSORS = {
    "signs": lambda n: np.random.default_rng(n).choice([-1.0, 1.0], size=n),
    "many ties": lambda n: np.random.default_rng(n).integers(-3, 4, size=n),
    "ties and zeros": lambda n: np.random.default_rng(n).choice([0.3, 0.0], size=n, p=[0.1, 0.9]),
    "two scales": lambda n: np.where(np.arange(n) % 100 == 0, 9.5, 1) * (1 + np.arange(n) / n),
    "within one bin": lambda n: 1 + np.arange(n) / n / 300,
    # Every number of entries gains about as much: (sum of k)^2 / k is constant.
    "equally good": lambda n: np.sqrt(np.arange(1, n + 1)) - np.sqrt(np.arange(n)),
    "uniform": lambda n: np.random.default_rng(n).uniform(-1, 1, size=n),
    "tiny": lambda n: np.random.default_rng(n).normal(size=n) * 1e-30,
}


@pytest.mark.parametrize("name", [*TENSORS, *MORE_TENSORS])
def test_optimal_is_optimal_and_never_worse_than_scaled(name):
    for n in (1, 2, 100, LARGE - 1, LARGE, 100_003):
        x = np.float32(MORE_TENSORS[name](n)) if name in MORE_TENSORS else tensor(name, n)
        optimal = error(x, decoded(OPTIMAL, x))
        if abs(x).max(initial=0) >= np.finfo(np.float32).tiny:  # denormals may count as zero
            np.testing.assert_allclose(optimal, smallest_error(x), rtol=1e-5, atol=1e-6 * n)
        assert optimal <= error(x, decoded(SCALED, x)) * (1 + 1e-6) + 1e-6 * n


@pytest.mark.parametrize("name", [*TENSORS, *MORE_TENSORS])
def test_few_candidates_are_as_good_as_all(name, monkeypatch):
    """The bound is the same to the bit as that of sorting everything, ties aside."""
    n = 50_000
    x = np.float32(MORE_TENSORS[name](n)) if name in MORE_TENSORS else tensor(name, n)
    bound = int(least_squares.ternary_bound(tf.constant(x)))
    monkeypatch.setattr(least_squares, "SORT_UP_TO", n)
    of_all = int(least_squares.ternary_bound(tf.constant(x)))
    keys = numerics.magnitude_keys(x).numpy()
    # Rounding decides in the one, and whether the host flushes denormals in the other.
    if name not in ("equally good", "denormal"):
        np.testing.assert_array_equal(keys > bound, keys > of_all)


def test_few_candidates_are_sorted(monkeypatch):
    """On a gradient-like tensor the bounds leave a few percent."""
    sizes = []
    sort = tf.sort
    monkeypatch.setattr(tf, "sort", lambda x, **kwargs: sizes.append(len(x)) or sort(x, **kwargs))
    for power in (1, 3):
        least_squares.ternary_bound(tf.constant(tensor("normal", 500_000) ** power))
    assert max(sizes) <= 25_000


def test_optimal_where_kernels_are_fused():
    x = tensor("heavy tail", numerics.FUSE_FROM + 7)
    np.testing.assert_allclose(error(x, decoded(OPTIMAL, x)), smallest_error(x), rtol=1e-5)


def test_relative_errors_of_a_normal_tensor():
    """1 - 2 phi(t)^2 / Q(t): at most 0.810 is kept (t = 0.61), 0.809 at the threshold 0.7 E|x|."""
    x = tensor("normal", 100_003)
    scaled, optimal = (error(x, decoded(c, x)) / error(x, 0 * x) for c in (SCALED, OPTIMAL))
    assert 0.185 < optimal < scaled < 0.2


def test_sparsity_is_kept():
    x = tensor("mostly zeros", 10_000)
    for codec in (SCALED, OPTIMAL, ThresholdQuantizer(0.0)):
        assert not decoded(codec, x)[x == 0].any()


@pytest.mark.parametrize("threshold", [1, 1.5, -0.1, True, None, "best", float("nan")])
def test_threshold_errors(threshold):
    expected = r"Argument `threshold` must be 'scaled', 'optimal' or a number in \[0, 1\). Received"
    with pytest.raises(ValueError, match=expected):
        ThresholdQuantizer(threshold)
