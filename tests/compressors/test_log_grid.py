"""The logarithmic grid against a search over all its levels."""

import numpy as np
import pytest

from tfqcomm.compressors import LogGrid
from tfqcomm.kernels.numerics import FUSE_FROM


def decoded(k, x):
    x = np.asarray(x, np.float32)
    return LogGrid(k).decode(LogGrid(k).encode(x), len(x)).numpy()


def levels(k):
    return np.array([0.0] + [2.0**-j for j in range(k, -1, -1)])


def nearest(k, x):
    """Of the levels nearest to |x| / s the larger one, times s, with the sign of x."""
    x = x.astype(np.float64)
    scale = abs(x).max()
    distances = abs(abs(x)[:, None] / scale - levels(k)[::-1])
    return np.sign(x) * scale * levels(k)[::-1][distances.argmin(axis=1)]


@pytest.mark.parametrize("k", [0, 1, 2, 3, 6, 20])
def test_is_the_nearest_level(k):
    for n in (1, 50, 10_000):
        x = np.random.default_rng(n).normal(size=n) ** 5
        np.testing.assert_allclose(decoded(k, x), nearest(k, np.float32(x)), rtol=1e-6)


@pytest.mark.parametrize("k", [0, 2])
def test_is_the_nearest_level_where_kernels_are_fused(k):
    x = np.random.default_rng(0).normal(size=FUSE_FROM + 5).astype(np.float32)
    np.testing.assert_allclose(decoded(k, x), nearest(k, x), rtol=1e-6)


@pytest.mark.parametrize("k", [0, 1, 2, 5, 125])
def test_breakpoints_are_the_midpoints(k):
    """And not where the logarithm is half-way, at 0.707 of a level."""
    midpoints = (levels(k)[1:] + levels(k)[:-1]) / 2
    assert midpoints[0] == 2.0 ** -(k + 1)
    assert all(midpoint in 0.75 * levels(k) for midpoint in midpoints[1:])
    for index, midpoint in enumerate(np.float32(midpoints)):
        at, below = decoded(k, [1, midpoint, -midpoint]), np.nextafter(midpoint, np.float32(0))
        np.testing.assert_array_equal(at[1:], levels(k)[index + 1] * np.array([1, -1]))
        np.testing.assert_array_equal(
            decoded(k, [1, below, -below])[1:], levels(k)[index] * np.array([1, -1])
        )


@pytest.mark.parametrize("k", [0, 1, 6])
def test_commutes_with_powers_of_two(k):
    x = np.random.default_rng(k).normal(size=1000).astype(np.float32)
    for factor in np.float32(2.0) ** np.array([-60, -3, 1, 7, 90], np.float32):
        np.testing.assert_array_equal(decoded(k, factor * x), factor * decoded(k, x))
    np.testing.assert_allclose(decoded(k, 3 * x), 3 * decoded(k, x), rtol=1e-6)
    np.testing.assert_array_equal(decoded(k, -x), -decoded(k, x))


@pytest.mark.parametrize("k", [0, 1, 6, 125])
def test_is_idempotent_to_the_bit(k):
    once = decoded(k, np.random.default_rng(k).normal(size=1000))
    np.testing.assert_array_equal(decoded(k, once), once)


@pytest.mark.parametrize(
    ("k", "bits"), [(0, 2), (1, 3), (2, 3), (3, 4), (6, 4), (7, 5), (14, 5), (125, 8)]
)
def test_bits_are_the_logarithm_of_the_levels(k, bits):
    assert LogGrid(k).bits == bits == int(np.ceil(np.log2(2 * k + 3)))
    every = np.concatenate([levels(k), -levels(k)[1:]])
    assert len(np.unique(decoded(k, every))) == 2 * k + 3


@pytest.mark.parametrize("k", [-1, 126, 1.0, True, None, "1"])
def test_k_errors(k):
    with pytest.raises(ValueError, match="Argument `k` must be an integer from 0 to 125. Received"):
        LogGrid(k)
