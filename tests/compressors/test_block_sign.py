"""Block-sign's scales and signs."""

import numpy as np
import pytest

from tfqcomm.compressors import BlockSign
from tfqcomm.kernels.numerics import FUSE_FROM


def reference(x, block):
    """sign(x) * mean|x| of the block; the sign of a zero is its sign bit."""
    decoded = np.empty(len(x))
    for start in range(0, len(x), block):
        part = x[start : start + block].astype(np.float64)
        decoded[start : start + block] = np.where(np.signbit(part), -1, 1) * abs(part).mean()
    return decoded


def round_trip(codec, x):
    return codec.decode(codec.encode(x), len(x)).numpy()


@pytest.mark.parametrize("block", [None, 1, 32, 100, 129, 10**6])
def test_equals_the_definition(block):
    for n in (1, 33, 100, 1000, 10001):
        x = np.random.default_rng(n).normal(size=n).astype(np.float32)
        expected = reference(x, block or n)
        np.testing.assert_allclose(round_trip(BlockSign(block=block), x), expected, rtol=2e-6)


@pytest.mark.parametrize("block", [None, 4096, 1000, 100_003])
def test_equals_the_definition_where_kernels_are_fused(block):
    x = np.random.default_rng(0).standard_cauchy(size=FUSE_FROM + 77).astype(np.float32)
    expected = reference(x, block or len(x))
    np.testing.assert_allclose(round_trip(BlockSign(block=block), x), expected, rtol=2e-6)


def test_one_zero_block_among_others():
    x = np.concatenate([np.ones(40), np.zeros(40), -np.ones(20)]).astype(np.float32)
    np.testing.assert_array_equal(round_trip(BlockSign(block=40), x), x)


def test_mean_of_huge_values_does_not_overflow():
    for n in (2, 1000, FUSE_FROM):
        x = np.full(n, 3e38, np.float32)
        x[::2] *= -1
        np.testing.assert_allclose(round_trip(BlockSign(), x), x, rtol=1e-6)


def test_mean_of_many_equal_values_is_exact():
    """Added up one by one in float32, 0.1 a million times is off by a percent."""
    for n in (1_000_000, FUSE_FROM + 1):
        x = np.full(n, 0.1, np.float32)
        np.testing.assert_allclose(round_trip(BlockSign(), x), x, rtol=1e-6)


def test_a_bad_entry_spoils_its_block_only():
    x = np.ones(100, np.float32)
    x[5] = np.nan
    decoded = round_trip(BlockSign(block=10), x)
    assert np.isnan(decoded[:10]).all()
    np.testing.assert_array_equal(decoded[10:], x[10:])
