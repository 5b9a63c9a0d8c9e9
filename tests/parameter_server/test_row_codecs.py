"""How rows are encoded, and what a push to one server is made of."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.parameter_server.embeddings import RowFormat, codecs, find_tables
from tfqcomm.parameter_server.partition import Piece

NAMES = ("float32", "bfloat16", "int8")


def rows_of(count, width):
    scale = 10.0 ** np.arange(-count // 2, count - count // 2)[:count, None]
    return (np.random.default_rng(0).normal(size=[count, width]) * scale).astype("float32")


def there_and_back(name, rows):
    codec, width = codecs.get(name), rows.shape[1]

    @tf.function(input_signature=[tf.TensorSpec([None, width])], autograph=False)
    def encode_and_decode(rows):
        words = codec.encode(rows)
        return words, codec.decode(words, width)

    words, decoded = encode_and_decode(rows)
    assert words.dtype == tf.int32
    assert words.shape == [len(rows), codec.num_words(width)]
    assert decoded.shape == rows.shape
    return decoded.numpy()


@pytest.mark.parametrize("count", [0, 1, 6])
@pytest.mark.parametrize("width", [1, 3, 4, 33])
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_those_of_the_row(name, width, count):
    rows = rows_of(count, width)
    largest = np.abs(rows).max(1, keepdims=True)
    bound = {"float32": 0.0, "bfloat16": np.abs(rows) / 256, "int8": largest / 253.9}[name]
    assert (np.abs(there_and_back(name, rows) - rows) <= bound).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_zeros_stays_one_and_a_row_that_is_not_finite_harms_no_other(name):
    rows = rows_of(4, 5)
    rows[1], rows[2, 3] = 0, np.nan
    decoded = there_and_back(name, rows)
    assert (decoded[1] == 0).all()
    assert np.isnan(decoded[2, 3])
    assert np.isfinite(decoded[[0, 3]]).all()


def test_widths_say_how_many_words():
    assert [codecs.get(name).num_words(33) for name in NAMES] == [33, 17, 10]


def test_unknown_codecs_are_refused():
    with pytest.raises(ValueError, match=r"`row_codec` must be .*float32.*row_codec='int4'"):
        codecs.get("int4")


@pytest.mark.parametrize("name", NAMES)
def test_a_push_is_unpacked_as_it_was_packed(name):
    parts = (Piece(0, 5, 10, (5, 3), 1), Piece(2, 40, 80, (40, 6), 1), Piece(3, 1, 2, (1, 1), 1))
    codec = codecs.get(name)
    row_format = RowFormat(parts, codec)
    pushed = {
        parts[0]: (tf.constant([4, 0]), tf.constant(rows_of(2, 3))),
        parts[1]: (tf.constant([], tf.int32), tf.zeros([0, 6])),
        parts[2]: (tf.constant([0]), tf.constant([[7.0]])),
    }
    words = row_format.pack(pushed)
    per_row = [codec.num_words(part.shape[1]) for part in parts]
    assert words.shape == [3 + 3 + 2 * per_row[0] + per_row[2]]
    unpacked = row_format.unpack(words)
    assert list(unpacked) == list(parts)
    for part, (places, rows) in pushed.items():
        np.testing.assert_array_equal(unpacked[part][0], places)
        expected = codec.decode(codec.encode(rows), part.shape[1])
        np.testing.assert_array_equal(unpacked[part][1], expected)


def model_of(*layers):
    model = keras.Sequential([keras.Input([3], dtype="int32"), *layers])
    model.compile("sgd")
    return model


def test_tables_are_spread_over_all_servers_in_ranges():
    model = model_of(keras.layers.Embedding(10, 4), keras.layers.Dense(2))
    (table,) = find_tables(model, 40, servers=3)
    assert [(p.start, p.stop, p.server) for p in table.parts] == [(0, 3, 0), (3, 6, 1), (6, 10, 2)]
    (few,) = find_tables(model_of(keras.layers.Embedding(2, 4)), 1, servers=3)
    assert [(p.start, p.stop, p.server) for p in few.parts] == [(0, 1, 0), (1, 2, 1)]


def test_small_frozen_and_other_tables_are_left_alone():
    class Doubled(keras.layers.Embedding):
        def call(self, ids):
            return 2 * super().call(ids)

    table = keras.layers.Embedding(10, 4)
    assert find_tables(model_of(table), None, 1) == find_tables(model_of(table), 41, 1) == []
    assert len(find_tables(model_of(table), 40, 1)) == 1
    assert find_tables(model_of(Doubled(10, 4)), 1, 1) == []
    assert find_tables(model_of(keras.layers.Embedding(10, 4, trainable=False)), 1, 1) == []
    assert find_tables(model_of(keras.layers.Embedding(10, 4, lora_rank=2)), 1, 1) == []
