"""Rows of embeddings as words: their bytes, what rounding takes away, and places of any table."""

import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.kernels import rows

LARGEST = np.finfo(np.float32).max


def there_and_back(row_type, values, places, height):
    values = np.asarray(values, np.float32)
    words = rows.encode(row_type, tf.constant(values), tf.constant(places), height)
    assert words.dtype == tf.float32
    assert words.shape == (len(values), rows.words_of_row(row_type, values.shape[1], height))
    decoded, found = rows.decode(row_type, words, values.shape[1], height)
    assert found.dtype == tf.int64
    return decoded.numpy(), found.numpy()


@pytest.mark.parametrize(
    ("row_type", "width", "height", "size"),
    [
        ("int8", 64, 65536, 68),
        ("int8", 64, 65537, 72),
        ("int8", 1, 3, 8),
        ("bfloat16", 64, 65536, 132),
        ("bfloat16", 3, 10**6, 12),
    ],
)
def test_bytes_of_a_row(row_type, width, height, size):
    assert 4 * rows.words_of_row(row_type, width, height) == size


@pytest.mark.parametrize("height", [1, 65536, 65537, 2**31 - 1])
@pytest.mark.parametrize("row_type", ["int8", "bfloat16"])
@pytest.mark.parametrize("width", [1, 2, 5, 64])
def test_places_arrive_and_rows_nearly(row_type, width, height):
    random = np.random.default_rng(0)
    values = random.normal(size=[7, width]) * 10.0 ** random.integers(-30, 30, [7, 1])
    places = np.concatenate([[height - 1], random.integers(0, height, 6)])
    found, found_places = there_and_back(row_type, values, places, height)
    np.testing.assert_array_equal(found_places, places)
    if row_type == "bfloat16":
        np.testing.assert_allclose(found, values, rtol=2.0**-8)
    else:
        largest = np.abs(values).max(axis=1, keepdims=True)
        assert (np.abs(found - values) <= largest / 252).all()


def test_words_are_literally_these():
    words = rows.encode("int8", tf.constant([[127.0, -1.0, 63.6]]), tf.constant([258]), 1000)
    data = words.numpy().tobytes()
    assert data == bytes([127, 255, 64]) + b"\x80\x3f" + b"\x02\x01" + b"\x00"
    words = rows.encode("bfloat16", tf.constant([[1.0, -2.0]]), tf.constant([258]), 10**5)
    assert words.numpy().tobytes() == b"\x80\x3f\x00\xc0" + b"\x02\x01\x00\x00"


@pytest.mark.parametrize("row_type", ["int8", "bfloat16"])
@pytest.mark.parametrize("value", [0.0, LARGEST, 1e-38, 1e-42])
def test_numbers_at_the_ends_of_their_range(row_type, value):
    found, _ = there_and_back(row_type, [[value, -value, 0.0, value / 2]], [0], 2)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], [value, -value, 0, value / 2], rtol=0.02, atol=2e-38)


@pytest.mark.parametrize("row_type", ["int8", "bfloat16"])
def test_no_rows_are_no_words(row_type):
    found, places = there_and_back(row_type, np.zeros([0, 5]), np.zeros([0], np.int64), 9)
    assert found.shape == (0, 5) and places.shape == (0,)
