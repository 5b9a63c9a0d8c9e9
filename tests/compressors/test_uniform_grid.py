"""The uniform grid: its levels, its two ranges, and its half-way rule."""

import numpy as np
import pytest

from tfqcomm.compressors import UniformGrid
from tfqcomm.kernels.numerics import FUSE_FROM


def decoded(codec, x):
    x = np.asarray(x, np.float32)
    return codec.decode(codec.encode(x), len(x)).numpy()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [1, 1000, FUSE_FROM + 3])
def test_error_is_at_most_half_a_step(bits, n):
    x = np.random.default_rng(bits).normal(size=n).astype(np.float32)
    scale, largest = abs(x).max(), 2 ** (bits - 1) - 1
    y = decoded(UniformGrid(bits), x)
    levels = y / scale * largest
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
    assert abs(y - x).max() <= scale / largest / 2 * (1 + 1e-5)
    np.testing.assert_array_equal(y[abs(x).argmax()], x[abs(x).argmax()])


@pytest.mark.parametrize("bits", range(2, 9))
def test_all_levels_but_one_pattern_are_used(bits):
    x = np.linspace(-0.5, 0.5, 10_001)
    for grid in ("absmax", "fixed"):
        levels = np.unique(decoded(UniformGrid(bits, range=grid), x))
        assert len(levels) == 2**bits - 1
        np.testing.assert_allclose(np.diff(levels), 0.5 / (2 ** (bits - 1) - 1), rtol=1e-4)
        np.testing.assert_array_equal(levels, -levels[::-1])


@pytest.mark.parametrize("n", [8, FUSE_FROM])
def test_fixed_saturates_at_a_half(n):
    x = np.zeros(n, np.float32)
    x[:8] = 0.5, -0.5, 0.51, -7, 3e38, -3e38, 1, 0.499
    expected = [0.5, -0.5, 0.5, -0.5, 0.5, -0.5, 0.5, 0.5]
    np.testing.assert_array_equal(decoded(UniformGrid(8, range="fixed"), x)[:8], expected)


def test_fixed_does_not_depend_on_the_other_entries():
    x = np.random.default_rng(0).uniform(-0.7, 0.7, size=100).astype(np.float32)
    codec = UniformGrid(5, range="fixed")
    alone = [decoded(codec, x[i : i + 1])[0] for i in range(100)]
    np.testing.assert_array_equal(decoded(codec, x), alone)
    assert codec.num_words(100) == 5 * 4  # planes and nothing else


def test_fixed_marks_what_is_not_finite():
    x = [0.1, np.nan, np.inf, -np.inf, -0.5]
    y = decoded(UniformGrid(2, range="fixed"), x)
    np.testing.assert_array_equal(np.isnan(y), [False, True, True, True, False])
    np.testing.assert_array_equal(y[[0, 4]], [0, -0.5])


def test_half_way_goes_to_the_even_level():
    halves = np.arange(-2.5, 3)  # of levels up to 3
    expected = [-2, -2, 0, 0, 2, 2]
    np.testing.assert_allclose(decoded(UniformGrid(3), [3, *halves])[1:], expected, rtol=1e-6)
    one = UniformGrid(2, range="fixed")  # levels -0.5, 0, 0.5
    np.testing.assert_array_equal(decoded(one, [0.25, -0.25, 0.2501, -0.2501]), [0, 0, 0.5, -0.5])


@pytest.mark.parametrize("bits", [1, 9, 16, 8.0, True, None])
def test_bits_errors(bits):
    with pytest.raises(ValueError, match="Argument `bits` must be an integer from 2 to 8. Recei"):
        UniformGrid(bits)


@pytest.mark.parametrize("grid", ["auto", None, 0.5])
def test_range_errors(grid):
    expected = r"Argument `range` must be one of \['absmax', 'fixed'\]. Received: range="
    with pytest.raises(ValueError, match=expected):
        UniformGrid(8, range=grid)
    with pytest.raises(TypeError):
        UniformGrid(8, "fixed")
