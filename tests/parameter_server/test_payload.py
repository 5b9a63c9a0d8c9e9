"""What one server and its workers exchange: what travels in a row, and what alone."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from tfqcomm import compressors
from tfqcomm.parameter_server.partition import Piece
from tfqcomm.parameter_server.payload import Format
from tfqcomm.parameter_server.sparse_weights import SparseWeights
from tfqcomm.step.options import ExchangeOptions

STATISTICS = 3


def piece(variable, *shape):
    return Piece(variable, 0, shape[0], shape, server=0)


KERNEL, SHORT_KERNEL, BIAS, LONG_BIAS = PIECES = (
    piece(0, 20, 10),
    piece(1, 10, 10),
    piece(2, 10),
    piece(3, 150),
)


def make(up, down, alone_from=150):
    options = ExchangeOptions(compressor=up, min_size=50)
    weights = down if isinstance(down, SparseWeights) else compressors.get(down)
    return Format(PIECES, STATISTICS, options, weights, alone_from=alone_from)


@pytest.mark.parametrize(
    ("codec", "alone"),
    [
        (None, [KERNEL, LONG_BIAS]),
        ("float16", [LONG_BIAS]),  # what a codec shortens goes through it
    ],
)
def test_long_tensors_that_no_codec_shortens_travel_alone(codec, alone):
    format = make(codec, codec)
    for way in (format.up, format.down):
        assert way.alone == alone
        encoded = [p for bucket in way.encoded for p in bucket.pieces]
        assert sorted([*encoded, *way.rest, *way.alone], key=PIECES.index) == list(PIECES)
    assert make(codec, codec, alone_from=None).up.alone == []


def test_each_direction_has_its_own():
    format = make("float16", None)
    assert format.up.alone == [LONG_BIAS]
    assert format.down.alone == [KERNEL, LONG_BIAS]
    assert make(None, SparseWeights()).down.alone == [LONG_BIAS]


@pytest.mark.parametrize("down", [None, "float16", SparseWeights()], ids=str)
@pytest.mark.parametrize("alone_from", [150, None])
def test_a_pull_holds_all_weights(down, alone_from):
    format = make(None, down, alone_from)
    values = {p: np.random.RandomState(p.variable).randn(*p.shape).astype("f2") for p in PIECES}
    values = {p: tf.constant(value, tf.float32) for p, value in values.items()}
    statistics = tf.constant([1.0, 2.0, 3.0])
    words = format.pack_weights(values, statistics, tf.constant(7))
    assert len(words) == words[0] <= format.most_pull_words
    got, moving, version = format.unpack_weights(words)
    assert set(got) | set(format.down.alone) == set(PIECES)
    assert not set(got) & set(format.down.alone)
    for p, value in got.items():
        np.testing.assert_array_equal(value, values[p])
    np.testing.assert_array_equal(moving, statistics)
    assert version == 7


@pytest.mark.parametrize("alone_from", [150, None])
def test_a_dense_push_has_a_word_for_each_number(alone_from):
    sizes = sum(p.size for p in PIECES)
    assert make(None, None, alone_from).push_words == sizes + STATISTICS


def ops_of_a_pull(layers):
    """What packs and unpacks, beside shapes and each layer's own placeholder and result."""
    pieces = tuple(piece(i, 32, 33 + i % 3) for i in range(layers))
    codec = compressors.get("uniform_grid")
    format = Format(pieces, STATISTICS, ExchangeOptions(None), codec)

    @functools.partial(tf.function, autograph=False)
    def pull(*values):
        weights = dict(zip(pieces, values, strict=True))
        words = format.pack_weights(weights, tf.zeros([STATISTICS]), tf.constant(1))
        found = format.unpack_weights(words)[0]
        return [found[p] for p in pieces]

    graph = pull.get_concrete_function(*(tf.zeros(p.shape) for p in pieces)).graph
    shapes = ("Reshape", "Const", "Placeholder", "Identity")
    return sum(op.type not in shapes for op in graph.get_operations())


def test_the_graph_of_a_pull_is_as_large_for_many_layers_as_for_few():
    assert ops_of_a_pull(50) == ops_of_a_pull(5)
