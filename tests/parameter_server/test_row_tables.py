"""Which embedding tables travel by rows."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfqcomm import _tf_private, parameter_server
from tfqcomm.parameter_server import Trainer, embeddings


@pytest.mark.parametrize(
    ("optimizer", "by_rows"), [("adam", {1 << 18}), ("nadam", set())], ids=["lazy", "not lazy"]
)
def test_by_default_large_tables_travel_by_rows_where_that_is_possible(optimizer, by_rows):
    layers = [keras.layers.Embedding(1 << n, 1) for n in (17, 18)]
    model = keras.Sequential([keras.Input([3]), layers[1]])
    model.compile(optimizer, "mse")
    assert {t.rows for t in embeddings.find_tables(model, "auto", 2)} == by_rows
    small = keras.Sequential([keras.Input([3]), layers[0]])
    small.compile(optimizer, "mse")
    assert embeddings.find_tables(small, "auto", 2) == []


@pytest.mark.parametrize("value", [0, True, 2.5, "automatic"])
def test_embedding_rows_from_is_checked(value):
    words = "`embedding_rows_from` must be 'auto', None or a positive integer. Received: .*"
    with pytest.raises(ValueError, match=words + repr(value)):
        Trainer(lambda: None, embedding_rows_from=value)


class Table(keras.layers.Layer):
    """A matrix under a name that is not its attribute's."""

    def build(self, _):
        self.own = self.add_weight(shape=(7, 2), name="matrix")
        self.bias = self.add_weight(shape=(2,), name="bias")

    def call(self, ids):
        return keras.ops.take(self.own, ids, axis=0) + self.bias


@pytest.mark.parametrize("weight", ["own", "matrix"])
def test_rows_names_a_table_of_any_size_by_attribute_or_name(weight):
    layer = Table()
    assert parameter_server.rows(layer, weight) is layer
    config = layer.get_config()
    large = keras.layers.Embedding(1 << 18, 1)
    ids = keras.Input([3], dtype="int32")
    model = keras.Model(ids, [layer(ids), large(ids), Table()(ids)])
    model.compile("sgd", "mse")
    (named,) = embeddings.find_tables(model, None, 2)
    assert named.weights is layer.own
    assert (named.rows, named.width) == (7, 2)
    assert [part.stop for part in named.parts] == [3, 7]
    both = embeddings.find_tables(model, "auto", 2)
    assert {table.name for table in both} == {large.embeddings.path, layer.own.path}
    assert layer.get_config() == config and set(config) == set(Table().get_config())
    model.compile("nadam", "mse")
    with pytest.raises(ValueError, match=r"a step of Nadam .* Do not give its layer to .*rows`"):
        embeddings.find_tables(model, "auto", 2)


def test_rows_is_told_of_a_table_of_floats():
    built = Table()
    built.build(None)
    with pytest.raises(ValueError, match=r"one weight of layer `table.*bias.*weight='embeddings'"):
        parameter_server.rows(built)
    with pytest.raises(ValueError, match=r"one weight of layer `table.*weight='bias'"):
        parameter_server.rows(built, "bias")
    with pytest.raises(ValueError, match="`layer` must be a Keras layer. Received: layer='table'"):
        parameter_server.rows("table")
    with pytest.raises(ValueError, match=r"`weight` must be the name .* Received: weight=3"):
        parameter_server.rows(built, 3)
    late = parameter_server.rows(Table(), "embeddings")
    model = keras.Sequential([keras.Input([3], dtype="int32"), late])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="`weight` of `rows` must name one weight"):
        embeddings.find_tables(model, None, 2)
    pulled = parameter_server.rows(keras.layers.Embedding(7, 2, embeddings_regularizer="l2"))
    model = keras.Sequential([keras.Input([3], dtype="int32"), pulled])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"`embeddings_regularizer` .* Do not give .*=L2"):
        embeddings.find_tables(model, None, 2)


def test_readers_answer_for_a_variable_until_they_are_gone():
    variable, other = (keras.Variable(np.ones([3, 2])) for _ in range(2))
    asked = []

    def reader(ids, name=None):
        asked.append(np.array(ids))
        return tf.zeros([len(ids), 2])

    ways = [
        lambda v: keras.ops.take(v, [1, 2], axis=0),
        lambda v: tf.gather(v, [1, 2]),
        lambda v: tf.nn.embedding_lookup(v, [1, 2]),
    ]
    with _tf_private.answering(variable, reader):
        for way in ways:
            np.testing.assert_array_equal(way(variable), np.zeros([2, 2]))
            np.testing.assert_array_equal(way(other), np.ones([2, 2]))
        np.testing.assert_array_equal(keras.ops.take(variable, [1], axis=1), np.ones([3, 1]))
        bounded = tf.nn.embedding_lookup(variable, [1], max_norm=1.0)
        np.testing.assert_allclose(bounded, np.full([1, 2], 0.5**0.5), rtol=1e-6)
    assert [list(ids) for ids in asked] == [[1, 2]] * 3
    for way in ways:
        np.testing.assert_array_equal(way(variable), np.ones([2, 2]))
