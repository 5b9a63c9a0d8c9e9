"""Natural compression's two powers of two, and how often either is taken."""

import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.compressors import NaturalCompression, natural_compression
from tfqcomm.kernels.numerics import FUSE_FROM

POWERS = np.float32(2.0) ** np.arange(-126, 128, dtype=np.float32)
LARGEST = np.finfo(np.float32).max
EVERY_DRAW = tf.constant(np.arange(65536, dtype=np.uint16))


def decoded(x, seed=0):
    x = np.asarray(x, np.float32)
    return NaturalCompression().decode(NaturalCompression().encode(x, seed), len(x)).numpy()


def over_all_draws(x):
    """|x| rounded by each number that may be drawn: float64[65536]."""
    exponents = natural_compression._exponents(tf.fill([65536], np.float32(x)), EVERY_DRAW)
    return np.where(exponents, 2.0 ** (exponents.numpy().astype(np.float64) - 127), 0.0)


@pytest.mark.parametrize("n", [1, 1000, FUSE_FROM + 77])
def test_decodes_to_one_of_the_two_powers_around(n):
    x = (np.random.default_rng(n).standard_cauchy(size=n) ** 3).astype(np.float32)
    below = 2.0 ** np.floor(np.log2(abs(x.astype(np.float64))))
    y = decoded(x)
    np.testing.assert_array_equal(np.sign(y), np.sign(x))
    assert ((abs(y) == below) | (abs(y) == 2 * below)).all()


@pytest.mark.parametrize("x", [1.0, 1.25, 4 / 3, 1.9999999, -0.3, 1e-30, 1.2e38])
def test_mean_and_variance_over_all_draws_are_the_papers(x):
    drawn, x = over_all_draws(x), abs(np.float64(np.float32(x)))
    below = 2.0 ** np.floor(np.log2(x))
    fraction = x / below - 1
    assert drawn.mean() == pytest.approx(x, rel=2.0**-17)
    assert np.square(drawn - x).mean() == pytest.approx(
        below**2 * fraction * (1 - fraction), abs=2.0**-16 * x**2
    )
    assert np.square(drawn - x).mean() <= (1 / 8 + 2.0**-16) * x**2


def test_the_variance_bound_is_reached():
    x = np.float32(4 / 3)
    assert np.square(over_all_draws(x) - x).mean() == pytest.approx(x**2 / 8, rel=1e-4)


def test_denormals_become_zero_or_the_smallest_normal_number_without_bias():
    for x in (1e-39, 7e-39, 1.1e-38):
        drawn = over_all_draws(x)
        assert set(drawn) == {0, 2.0**-126}
        assert drawn.mean() == pytest.approx(x, abs=2.0**-142)


def test_powers_of_two_and_zeros_are_never_rounded_up():
    x = np.concatenate([POWERS, -POWERS, [0.0, -0.0]]).astype(np.float32)
    for seed in range(50):
        np.testing.assert_array_equal(decoded(x, seed).view(np.int32), x.view(np.int32))
    for power in POWERS[::23]:
        assert (over_all_draws(power) == power).all()


@pytest.mark.parametrize("n", [1000, FUSE_FROM])
def test_the_largest_numbers_do_not_become_infinite(n):
    x = np.resize([LARGEST, -LARGEST, 1.8e38], n).astype(np.float32)
    np.testing.assert_array_equal(decoded(x), np.sign(x) * np.float32(2.0**127))


def test_what_is_not_finite_stays_so_and_spoils_nothing_else():
    x = np.float32([1, np.nan, -4, np.inf, -np.inf, -np.nan, 0.5])
    for seed in range(20):
        np.testing.assert_array_equal(
            decoded(x, seed), [1, np.inf, -4, np.inf, -np.inf, -np.inf, 0.5]
        )
