"""TernGrad's clipping, probabilities and variance, from the paper's formulas."""

import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.compressors import Ternary
from tfqcomm.kernels.layout import Layout
from tfqcomm.kernels.numerics import FUSE_FROM


def normal(n, seed=0):
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)


def decoded(codec, x, seed=0):
    return codec.decode(codec.encode(x, seed), len(x)).numpy()


def clipped(x, clip):
    limit = np.inf if clip is None else clip * x.astype(np.float64).std()
    return np.clip(x.astype(np.float64), -limit, limit)


@pytest.mark.parametrize("clip", [None, 2.5, 1.0, 0.3, 100])
@pytest.mark.parametrize("n", [50, 1000, FUSE_FROM + 3])
def test_scale_is_the_largest_magnitude_after_clipping(n, clip):
    x = normal(n) + np.float32(0.2)
    levels = np.unique(decoded(Ternary(clip=clip), x))
    scale = abs(clipped(x, clip)).max()
    np.testing.assert_allclose(levels, [-scale, 0, scale], rtol=1e-5)


def test_clipping_is_by_the_deviation_around_the_mean():
    """Around zero the deviation would be twice as large."""
    x = np.resize(np.float32([1, 1, 1, 3, 3, 3]), 1000)
    np.testing.assert_allclose(decoded(Ternary(clip=1.25), x).max(), 1.25 * 2, rtol=1e-2)
    y = (x - x.mean()) * np.float32(1e3)
    np.testing.assert_allclose(decoded(Ternary(clip=0.5), y).max(), 0.5 * y.std(), rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 1000])
def test_equal_entries_are_not_clipped_to_nothing(n):
    x = np.full(n, -0.3, np.float32)
    np.testing.assert_allclose(decoded(Ternary(), x), x, rtol=1e-6)


@pytest.mark.parametrize("clip", [None, 2.5, 1.0])
def test_mean_and_variance_of_every_entry(clip):
    """E C(x) = clipped x, Var C(x) = s |clipped x| - (clipped x)^2."""
    x, draws = normal(40), 2000
    drawn = np.stack(
        [decoded(Ternary(clip=clip), x, seed) for seed in range(draws)], dtype=np.float64
    )
    expected = clipped(x, clip)
    scale = abs(expected).max()
    variance = scale * abs(expected) - expected**2
    standard_error = np.sqrt(variance / draws)
    assert (abs(drawn.mean(axis=0) - expected) <= 5 * standard_error + 1e-5 * scale).all()
    # A variance of draws that are 0 or s is off by about as much as their mean.
    assert (abs(drawn.var(axis=0) - variance) <= 5 * scale * standard_error + 1e-4).all()


def test_entries_round_independently():
    """Each pair of neighbours, in one word of random bits, goes up together p^2 of the time."""
    n = 400_000
    x = np.full(n, 0.25, np.float32)
    x[-1] = 1
    ones = decoded(Ternary(clip=None), x) != 0
    for shift in (1, 2, 3, 4):
        together = np.mean(ones[shift:] & ones[:-shift])
        assert abs(together - 1 / 16) <= 5 * np.sqrt(1 / 16 / n)
    again = decoded(Ternary(clip=None), x, seed=1) != 0
    assert abs(np.mean(ones & again) - 1 / 16) <= 5 * np.sqrt(1 / 16 / n)


def test_large_entries_do_not_make_noise_of_the_others():
    x = normal(10_000)
    x[0] = 1000
    errors = {clip: np.square(decoded(Ternary(clip=clip), x) - x)[1:].sum() for clip in (None, 2.5)}
    assert errors[2.5] < errors[None] / 20


def test_is_unbiased_without_clipping_only():
    assert Ternary(clip=None).unbiased
    assert not Ternary().unbiased


def test_alone_a_shared_scale_changes_nothing():
    x = normal(1000)
    np.testing.assert_array_equal(Ternary(shared_scale=True).encode(x, 3), Ternary().encode(x, 3))
    assert Ternary(clip=None, shared_scale=True).unbiased
    assert Ternary(shared_scale=True).integer and not Ternary().integer


def test_levels_of_a_larger_scale():
    """Means x / s, clipped to s; words are these levels."""
    x, codec, layout = normal(2000), Ternary(), Layout((2000,))
    scale = codec.scales(tf.constant(x), layout).numpy()
    np.testing.assert_allclose(scale, [abs(clipped(x, 2.5)).max()], rtol=1e-6)
    seed = tf.constant([3, 0])
    of_own = codec.levels(tf.constant(x), scale, layout, seed)
    np.testing.assert_array_equal(scale * of_own.numpy(), decoded(codec, x, 3))
    of_twice = codec.levels(tf.constant(x), 2 * scale, layout, seed)
    assert of_twice.dtype == tf.int8
    # The same draws: what rounds up at half the probability would have at the whole.
    assert (np.abs(of_twice) <= np.abs(of_own)).all()
    share = np.abs(clipped(x, 2.5)).mean() / (2 * scale[0])
    assert abs(np.abs(of_twice).mean() - share) <= 5 * np.sqrt(share / 2000)


@pytest.mark.parametrize("shared_scale", [None, 1, "yes"])
def test_shared_scale_errors(shared_scale):
    with pytest.raises(ValueError, match="Argument `shared_scale` must be a bool. Received: sh"):
        Ternary(clip=None, shared_scale=shared_scale)


@pytest.mark.parametrize("clip", [0, -1.0, True, "2.5", float("nan"), float("inf")])
def test_clip_errors(clip):
    with pytest.raises(ValueError, match="Argument `clip` must be None or a positive number. Rec"):
        Ternary(clip=clip)
