"""QSGD's levels and variance, from the paper's formulas."""

import numpy as np
import pytest

from tfqcomm.compressors import QSGD
from tfqcomm.kernels.numerics import FUSE_FROM


def normal(n, seed=0):
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)


def decoded(codec, x, seed=0):
    return codec.decode(codec.encode(x, seed), len(x)).numpy()


def steps(x, bits, bucket):
    """||v|| / s of the bucket of every entry."""
    s = 2 ** (bits - 1) - 1
    sizes = [slice(start, start + bucket) for start in range(0, len(x), bucket)]
    norms = [np.full(len(x[part]), np.linalg.norm(x[part].astype(np.float64))) for part in sizes]
    return np.concatenate(norms) / s


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("n", "bucket"), [(7, 512), (1000, 300), (1000, None), (1000, 1)])
def test_decodes_to_one_of_the_two_levels_around(bits, n, bucket):
    x = normal(n)
    step = steps(x, bits, bucket or n)
    levels = decoded(QSGD(bits, bucket=bucket), x) / step
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
    assert (abs(levels - x / step) < 1 + 1e-4).all()


def test_levels_where_kernels_are_fused():
    x = normal(FUSE_FROM + 77)
    step = steps(x, 4, 512)
    levels = decoded(QSGD(4), x) / step
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
    assert (abs(levels - x / step) < 1 + 1e-4).all()


@pytest.mark.parametrize(("bits", "bucket"), [(2, 8), (4, 40), (4, 7), (8, 40)])
def test_mean_and_variance_of_every_entry(bits, bucket):
    """E C(x) = x, Var C(x) = step^2 f (1 - f), f the fraction of |x| / step."""
    x, draws = normal(40), 2000
    drawn = np.stack(
        [decoded(QSGD(bits, bucket=bucket), x, seed) for seed in range(draws)], dtype=np.float64
    )
    step = steps(x, bits, bucket)
    fraction = abs(x) / step % 1
    variance = step**2 * fraction * (1 - fraction)
    standard_error = np.sqrt(variance / draws)
    assert (abs(drawn.mean(axis=0) - x) <= 5 * standard_error + 1e-4 * step).all()
    assert (abs(drawn.var(axis=0) - variance) <= 5 * step * standard_error + 1e-3 * step**2).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("d", [1, 16, 512, 4096])
def test_variance_is_within_the_papers_bound(bits, d):
    s = 2 ** (bits - 1) - 1
    for x in (normal(d), np.ones(d, np.float32), np.eye(1, d, dtype=np.float32)[0]):
        errors = [np.square(decoded(QSGD(bits, bucket=d), x, seed) - x).sum() for seed in range(40)]
        bound = min(d / s**2, np.sqrt(d) / s) * np.square(x).sum()
        assert np.mean(errors) <= bound + 5 * np.std(errors) / np.sqrt(40)


def test_bits_include_the_sign():
    x = np.float32([1, -1] * 5000)
    for bits in (2, 4, 8):
        assert len(np.unique(decoded(QSGD(bits, bucket=1), x))) == 2
        grid = decoded(QSGD(bits, bucket=None), np.linspace(-1, 1, 10000, dtype=np.float32) ** 51)
        step = np.unique(np.abs(np.diff(np.unique(grid))).round(5))
        assert len(step) == 1
        assert len(np.unique(grid)) <= 2**bits - 1


def test_a_norm_beyond_float32_saturates_and_stays_unbiased():
    x = np.full(512, 3e38, np.float32)
    mean = np.mean([decoded(QSGD(4), x, seed).astype(np.float64) for seed in range(20)])
    np.testing.assert_allclose(mean, 3e38, rtol=0.01)


def test_one_zero_bucket_among_others():
    x = np.concatenate([[1.0], np.zeros(9), [-2.0], np.zeros(3)]).astype(np.float32)
    np.testing.assert_array_equal(decoded(QSGD(2, bucket=5), x), x)


@pytest.mark.parametrize("bits", [1, 9, 4.0, True, None, "4"])
def test_bits_errors(bits):
    with pytest.raises(ValueError, match="Argument `bits` must be an integer from 2 to 8. Recei"):
        QSGD(bits)


@pytest.mark.parametrize("bucket", [0, -1, 2.0, True, "8"])
def test_bucket_errors(bucket):
    with pytest.raises(ValueError, match="Argument `bucket` must be None or a positive integer"):
        QSGD(bucket=bucket)
    with pytest.raises(TypeError):
        QSGD(4, 512)
