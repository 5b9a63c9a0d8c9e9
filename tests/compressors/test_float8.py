"""8-bit floats against the formats' own conversion, that of ml_dtypes."""

import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.compressors import BlockInt8, Float8, float8
from tfqcomm.kernels.numerics import FUSE_FROM

TYPES = {
    "e4m3": tf.dtypes.experimental.float8_e4m3fn.as_numpy_dtype,
    "e5m2": tf.dtypes.experimental.float8_e5m2.as_numpy_dtype,
}
LARGEST = {"e4m3": 448, "e5m2": 57344}
over_formats = pytest.mark.parametrize("name", TYPES)


def decoded(codec, x):
    x = np.asarray(x, np.float32)
    return codec.decode(codec.encode(x), len(x)).numpy()


def values(name):
    """Of all 256 bytes."""
    return np.arange(256, dtype=np.uint8).view(TYPES[name]).astype(np.float32)


def critical(name):
    """Every value of the format, every middle between two, and the float32s beside those."""
    grid = np.unique(values(name)[np.isfinite(values(name))])
    middles = (grid[1:] + grid[:-1]) / 2
    beside = [np.nextafter(middles, np.float32(end)) for end in (-np.inf, np.inf)]
    special = np.float32([-0.0, 1e-40, -1e-40])
    return np.concatenate([grid, middles, *beside, special])


def cast(x, name):
    """Multiples of s = max|x| by the format's definition, in float64."""
    scale = np.float64(abs(x).max())
    y = (x / scale * LARGEST[name]).astype(np.float32)
    return y.astype(TYPES[name]).astype(np.float64) * scale / LARGEST[name]


@over_formats
@pytest.mark.parametrize("compiled", [False, True])
def test_every_rounding_decision_is_that_of_the_format(name, compiled):
    every_bfloat16 = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
    y = np.concatenate([critical(name), every_bfloat16])
    y = np.append(y[abs(y) <= LARGEST[name]], np.float32(np.nan))
    octets = tf.function(lambda y: float8._to_float8(y, name), jit_compile=compiled)(y).numpy()
    np.testing.assert_array_equal(octets[:-1], y[:-1].astype(TYPES[name]).view(np.int8))
    assert np.isnan(octets[-1:].view(TYPES[name]).astype(np.float32))


@over_formats
@pytest.mark.parametrize("n", [0, FUSE_FROM])
def test_every_value_of_the_format_survives(name, n):
    finite = values(name)[np.isfinite(values(name))]
    x = np.resize(finite, n or len(finite))
    for scale in (1, 2.0**-90, 2.0**100):
        y = decoded(Float8(name, block=None), x * np.float32(scale)) / np.float32(scale)
        np.testing.assert_allclose(y, x, rtol=2e-7)
        np.testing.assert_array_equal(np.signbit(y), np.signbit(x))


@over_formats
@pytest.mark.parametrize(
    ("n", "block"),
    [
        (1, None),
        (1000, None),
        (1000, 1),
        (1000, 100),
        (FUSE_FROM + 77, None),
        (FUSE_FROM + 77, 256),
    ],
)
def test_equals_the_definition(name, n, block):
    x = (np.random.default_rng(n).standard_cauchy(size=n) ** 3).astype(np.float32)
    y, block = decoded(Float8(name, block=block), x), block or n
    for start in range(0, n, block * (n // block // 20 + 1)):  # twenty blocks
        part = x[start : start + block]
        expected = cast(part, name)
        found = y[start : start + block]
        # Rounding in float32 may decide an entry in the middle between two values otherwise.
        different = abs(found - expected) > 3e-7 * abs(expected)
        assert np.mean(different) <= 1e-3
        assert found[abs(part).argmax()] == part[abs(part).argmax()]


@over_formats
def test_the_error_bound_is_reached(name):
    one = LARGEST[name] / 1.75  # the largest power of two; the next value is `step` above
    step = one / {"e4m3": 8, "e5m2": 4}[name]
    x = np.full(256, one + step / 2, np.float32)
    x[100] = LARGEST[name]
    error = np.square(decoded(Float8(name), x) - x).sum() / np.square(x).sum()
    assert error == pytest.approx(Float8(name).error_bound(256), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "relative", "reach", "lost"),
    [("e4m3", 1 / 17, 28672, 458752), ("e5m2", 1 / 9, 57344 * 2**14, 57344 * 2**17)],
)
def test_error_is_as_documented_from_the_largest_entry_to_the_smallest(name, relative, reach, lost):
    x = (2.0 ** np.linspace(0, -40, 100_003)).astype(np.float32)
    error = abs(decoded(Float8(name, block=None), x) - x)
    assert (error <= np.where(x >= 1 / reach, relative * x, 1 / lost) * (1 + 1e-4)).all()


def test_more_exact_than_integers_where_most_entries_are_small():
    x = np.random.default_rng(0).lognormal(sigma=2, size=2560).astype(np.float32)
    typical = [np.median(abs(decoded(c, x) - x) / x) for c in (Float8(), BlockInt8())]
    assert typical[0] < 0.03
    assert typical[1] > 0.3


def test_one_zero_block_among_others_and_one_bad_entry():
    x = np.concatenate([np.ones(40), np.zeros(40), -np.ones(20)]).astype(np.float32)
    for name, bad in ((name, bad) for name in TYPES for bad in (np.nan, -np.inf)):
        codec = Float8(name, block=40)
        np.testing.assert_array_equal(decoded(codec, x), x)
        y = decoded(codec, np.where(np.arange(100) == 5, bad, x))
        assert not np.isfinite(y[:40]).any()
        np.testing.assert_array_equal(y[40:], x[40:])


@pytest.mark.parametrize("name", ["e4m3fn", None, 8])
def test_format_errors(name):
    expected = r"Argument `format` must be one of \['e4m3', 'e5m2'\]. Received: format="
    with pytest.raises(ValueError, match=expected):
        Float8(name)


@pytest.mark.parametrize("block", [0, -1, 2.0, True, "8"])
def test_block_errors(block):
    with pytest.raises(ValueError, match="Argument `block` must be None or a positive integer"):
        Float8(block=block)
    with pytest.raises(TypeError):
        Float8("e4m3", 256)
