"""Packing into words, against NumPy."""

import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.kernels import wire

SIZES = (0, 1, 2, 7, 8, 9, 31, 32, 33, 1000, 65537)


def test_num_words():
    assert [wire.num_words(n, 1) for n in (0, 1, 32, 33)] == [0, 1, 1, 2]
    assert [wire.num_words(n, 16) for n in (0, 1, 2, 3)] == [0, 1, 1, 2]


@pytest.mark.parametrize("n", SIZES)
def test_bits_are_numpy_packbits_as_big_endian_words(n):
    bits = np.random.default_rng(n).random((3, n)) < 0.5  # three planes
    words = wire.pack_bits(tf.constant(bits)).numpy()
    padded = np.pad(bits, [(0, 0), (0, -n % 32)])
    np.testing.assert_array_equal(words, np.packbits(padded, axis=1).view(">i4"))
    np.testing.assert_array_equal(wire.unpack_bits(tf.constant(words), n), bits)
    if n:
        np.testing.assert_array_equal(wire.pack_bits(tf.constant(bits[1])), words[1])
        np.testing.assert_array_equal(wire.unpack_bits(tf.constant(words[1]), n), bits[1])


def test_first_bit_is_the_sign_of_the_word():
    bits = tf.constant([True] + 31 * [False] + [False, True])
    np.testing.assert_array_equal(wire.pack_bits(bits), [-(2**31), 2**30])


@pytest.mark.parametrize("bits", [1, 2, 3, 7])
@pytest.mark.parametrize("n", SIZES)
def test_levels_are_planes_of_the_twos_complement(n, bits):
    low = -(2 ** (bits - 1))
    levels = np.random.default_rng(n).integers(low, -low, size=n)
    levels[:2] = [low, -low - 1][:n]
    words = wire.pack_levels(tf.constant(levels, tf.int8), bits)
    assert words.shape == [wire.num_level_words(n, bits)]
    planes = [levels >> shift & 1 == 1 for shift in range(bits - 1, -1, -1)]  # highest first
    np.testing.assert_array_equal(words, tf.reshape(wire.pack_bits(tf.constant(planes)), [-1]))
    np.testing.assert_array_equal(wire.unpack_levels(words, bits, n), levels)


@pytest.mark.parametrize("n", SIZES)
def test_levels_of_8_bits_are_bytes(n):
    levels = np.random.default_rng(n).integers(-128, 128, size=n).astype("int8")
    levels[:2] = [-128, 127][:n]
    words = wire.pack_levels(tf.constant(levels), 8)
    assert words.shape == [wire.num_level_words(n, 8)]
    padded = np.pad(levels, [0, -n % 32])
    np.testing.assert_array_equal(words, padded.view("<i4"))
    np.testing.assert_array_equal(wire.unpack_levels(words, 8, n), levels)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 8, 16, 17, 31])
@pytest.mark.parametrize("n", SIZES)
def test_fields_fill_words_from_below(n, bits):
    values = np.random.default_rng(n).integers(0, 2**bits, size=n)
    words = wire.pack_fields(tf.constant(values, tf.int32), bits)
    fields = 32 // bits
    assert words.shape == [wire.num_field_words(n, bits)] == [-(-n // fields)]
    rows = np.pad(values, (0, -n % fields)).reshape(fields, -1)
    expected = sum(row << bits * i for i, row in enumerate(rows))
    np.testing.assert_array_equal(words.numpy().view(np.uint32), expected)
    np.testing.assert_array_equal(wire.unpack_fields(words, bits, n), values)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 64, 100])
@pytest.mark.parametrize("n", SIZES)
def test_sums_of_fields_are_fields_of_sums(n, world):
    """Also where the sum reaches the sign bit: with 4 and 64, whose fields fill a word."""
    bits = (2 * world).bit_length()
    values = np.random.default_rng(n).integers(0, 3, size=[world, n])
    values[:, ::3] = 2  # the largest sum
    words = [wire.pack_fields(tf.constant(of_one, tf.int32), bits) for of_one in values]
    total = wire.unpack_fields(tf.add_n(words), bits, n)
    np.testing.assert_array_equal(total, values.sum(axis=0))


@pytest.mark.parametrize("n", SIZES)
def test_bytes_first_is_lowest(n):
    octets = np.random.default_rng(n).integers(-128, 128, size=n).astype(np.int8)
    words = wire.bytes_to_words(tf.constant(octets))
    np.testing.assert_array_equal(words, np.pad(octets, (0, -n % 4)).view("<i4"))
    np.testing.assert_array_equal(wire.words_to_bytes(words, n), octets)


@pytest.mark.parametrize("dtype", [tf.uint16, tf.float16, tf.bfloat16])
@pytest.mark.parametrize("n", SIZES)
def test_halves_first_is_low(n, dtype):
    halves = np.random.default_rng(n).integers(0, 0x7C00, size=n).astype(np.uint16)
    words = wire.halves_to_words(tf.bitcast(tf.constant(halves), dtype)).numpy()
    padded = np.pad(halves, (0, n % 2)).astype(np.int64)
    np.testing.assert_array_equal(words, padded[::2] | padded[1::2] << 16)
    back = wire.words_to_halves(tf.constant(words), n, dtype)
    assert back.dtype == dtype
    np.testing.assert_array_equal(tf.bitcast(back, tf.uint16), halves)


def test_floats_are_bitcast():
    x = tf.constant([1.0, -0.0, np.nan, np.inf, 1e-45])
    words = wire.floats_to_words(x).numpy()
    assert list(words[:2]) == [0x3F800000, -(2**31)]
    np.testing.assert_array_equal(wire.words_to_floats(tf.constant(words)).numpy(), x)


@pytest.mark.parametrize("dtype", [tf.float32, tf.float16, tf.bfloat16])
def test_summands_round_trip(dtype):
    words = tf.constant([0x3F803F80, 0x40004000, 0])
    summands = wire.words_to_summands(words, dtype)
    assert summands.dtype == dtype
    assert summands.shape == [12 // dtype.size]
    np.testing.assert_array_equal(wire.summands_to_words(summands), words)
