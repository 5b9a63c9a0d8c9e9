"""1-bit SGD's means and signs."""

import numpy as np
import pytest

from tfqcomm.compressors import BlockSign, TwoMeans
from tfqcomm.kernels.numerics import FUSE_FROM


def reference(x, block):
    """The mean of the block's entries of the same sign; the sign of a zero is its sign bit."""
    decoded = np.empty(len(x))
    for start in range(0, len(x), block):
        part = x[start : start + block].astype(np.float64)
        values = decoded[start : start + block]
        for group in (np.signbit(part), ~np.signbit(part)):
            if group.any():
                values[group] = part[group].mean()
    return decoded


def round_trip(codec, x):
    return codec.decode(codec.encode(x), len(x)).numpy()


def squared_error(codec, x):
    return np.square(round_trip(codec, x).astype(np.float64) - x).sum()


@pytest.mark.parametrize("block", [None, 1, 32, 100, 129, 10**6])
@pytest.mark.parametrize("n", [1, 33, 100, 1000, 10001])
def test_equals_the_definition(n, block):
    x = np.random.default_rng(n).normal(size=n, loc=0.3).astype(np.float32)
    expected = reference(x, block or n)
    np.testing.assert_allclose(round_trip(TwoMeans(block=block), x), expected, rtol=2e-6)


@pytest.mark.parametrize("block", [None, 1000])
def test_equals_the_definition_where_kernels_are_fused(block):
    x = np.random.default_rng(0).standard_cauchy(size=FUSE_FROM + 77).astype(np.float32)
    expected = reference(x, block or len(x))
    np.testing.assert_allclose(round_trip(TwoMeans(block=block), x), expected, rtol=2e-6)


def test_nearer_than_one_magnitude_for_both_signs():
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    for factor, gain in ((1, 0), (0.1, 0.3)):
        x = np.where(x < 0, factor * x, x).astype(np.float32)
        for block in (None, 32):
            one, two = (squared_error(codec(block=block), x) for codec in (BlockSign, TwoMeans))
            assert two <= (1 - gain) * one * (1 + 1e-6)


def test_the_error_bound_is_reached():
    x = np.eye(1, 100, dtype=np.float32)[0]
    assert squared_error(TwoMeans(), x) == pytest.approx(1 - 1 / 100)
    assert TwoMeans().error_bound(100) == 1 - 1 / 100


def test_a_sign_that_does_not_occur_has_a_mean_of_zero_and_not_nan():
    for x in (np.full(50, 0.1, np.float32), np.full(50, -0.1, np.float32)):
        np.testing.assert_allclose(round_trip(TwoMeans(), x), x, rtol=1e-6)
        means = TwoMeans().encode(x).numpy()[:2].view(np.float32)
        assert sorted(abs(means)) == [0, pytest.approx(0.1)]


def test_padding_of_the_last_block_counts_for_no_mean():
    x = np.float32([3, 3, 3, 3, 3, -7, 5])
    y = round_trip(TwoMeans(block=4), x)
    np.testing.assert_array_equal(y, [3, 3, 3, 3, 4, -7, 4])


def test_zeros_keep_their_sign_and_so_their_group():
    x = np.float32([-0.0, 1.0, 0.0, -0.0])
    once = round_trip(TwoMeans(), x)
    np.testing.assert_array_equal(once, [0, 0.5, 0.5, 0])
    np.testing.assert_array_equal(round_trip(TwoMeans(), once), once)


def test_one_zero_block_among_others():
    x = np.concatenate([np.ones(40), np.zeros(40), -np.ones(20)]).astype(np.float32)
    np.testing.assert_array_equal(round_trip(TwoMeans(block=40), x), x)


@pytest.mark.parametrize("n", [2, 1000, FUSE_FROM])
@pytest.mark.parametrize("value", [3e38, np.finfo(np.float32).max])
def test_mean_of_huge_values_does_not_overflow(n, value):
    x = np.full(n, value, np.float32)
    x[::2] *= -1
    np.testing.assert_allclose(round_trip(TwoMeans(), x), x, rtol=1e-6)


@pytest.mark.parametrize("n", [1_000_000, FUSE_FROM + 1])
def test_mean_of_many_equal_values_is_exact(n):
    """Added up one by one in float32, 0.1 a million times is off by a percent."""
    x = np.full(n, 0.1, np.float32)
    np.testing.assert_allclose(round_trip(TwoMeans(), x), x, rtol=1e-6)


def test_a_bad_entry_spoils_its_sign_in_its_block_only():
    x = np.float32([1, -1] * 50)
    for bad in (np.nan, np.inf):
        x[4] = bad
        y = round_trip(TwoMeans(block=10), x)
        assert not np.isfinite(y[:10:2]).any()
        np.testing.assert_array_equal(y[1:10:2], -1)
        np.testing.assert_array_equal(y[10:], x[10:])


@pytest.mark.parametrize("block", [0, -1, 2.0, True, "8"])
def test_block_errors(block):
    with pytest.raises(ValueError, match="Argument `block` must be None or a positive integer"):
        TwoMeans(block=block)
    with pytest.raises(TypeError):
        TwoMeans(256)
