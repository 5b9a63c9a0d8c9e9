"""Half-width floats against NumPy's and TensorFlow's own rounding."""

import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.compressors import BFloat16, Float16
from tfqcomm.kernels.numerics import FUSE_FROM


def round_trip(codec, x):
    x = np.asarray(x, np.float32)
    return codec.decode(codec.encode(x), len(x)).numpy()


@pytest.mark.parametrize("n", [1003, FUSE_FROM])
def test_float16_rounds_like_numpy(n):
    generator = np.random.default_rng(0)
    x = (generator.normal(size=n) * 10.0 ** generator.integers(-9, 4, size=n)).astype(np.float32)
    np.testing.assert_array_equal(round_trip(Float16(), x), x.astype(np.float16))


@pytest.mark.parametrize("n", [1003, FUSE_FROM])
def test_bfloat16_rounds_to_nearest_even(n):
    x = np.random.default_rng(0).normal(size=n).astype(np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    np.testing.assert_array_equal(
        round_trip(BFloat16(), x), rounded.astype(np.uint32).view(np.float32)
    )


@pytest.mark.parametrize("codec", [Float16(), BFloat16()], ids=str)
@pytest.mark.parametrize("n", [4, FUSE_FROM])
def test_finite_saturates_and_the_rest_stays(codec, n):
    largest = float(codec.sum_dtype.max)
    x = np.zeros(n, np.float32)
    x[:4] = 3.4e38, -3.4e38, np.inf, np.nan
    np.testing.assert_array_equal(round_trip(codec, x)[:4], [largest, -largest, np.inf, np.nan])


def test_float16_saturates_at_65504_not_where_it_rounds_to_infinity():
    x = [65504.0, 65519.0, 65520.0, -65520.0]
    np.testing.assert_array_equal(round_trip(Float16(), x), [65504, 65504, 65504, -65504])


def test_sums_of_words_are_sums_of_halves():
    a, b = np.float32([1, 2, 3]), np.float32([10, 20, 30])
    for codec in (Float16(), BFloat16()):
        bodies = [tf.bitcast(codec.encode(x), codec.sum_dtype) for x in (a, b)]
        words = tf.bitcast(bodies[0] + bodies[1], tf.int32)
        np.testing.assert_array_equal(codec.decode(words, 3), a + b)
