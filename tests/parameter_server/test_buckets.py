"""Buckets of a server's pieces: one message that says what those of the pieces would."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from tests.catalogue import COMPRESSORS
from tests.rungs import slow_unless
from tfqcomm.compressors import BlockInt8, LogGrid, UniformGrid
from tfqcomm.parameter_server import buckets
from tfqcomm.parameter_server.partition import Piece

LONG = buckets.FUSE_FROM + 33
SHAPES = [(50, 22), (3, 3, 32, 32), (), (1030, 3), (7,), (300, 100)]
COMPILED = [(250, 200), (300, 100), (33, 101)]  # together
CASES = [case for case in COMPRESSORS if not case.compressor.low_rank]
QUICK = [case for case in CASES if not case.slow]
ALL_CODECS = pytest.mark.parametrize(
    "case", slow_unless(lambda case: not case.slow, CASES), ids=lambda case: str(case.compressor)
)


def pieces_of(shapes):
    return [Piece(i, 0, *(s[:1] or (1,)), s, server=0) for i, s in enumerate(shapes)]


def random_values(pieces, seed=0):
    rng = np.random.default_rng(seed)
    return {
        p: tf.constant(rng.normal(0, 2.0**p.variable, size=p.shape).astype("f4")) for p in pieces
    }


def test_short_pieces_are_together_and_long_ones_alone():
    pieces = pieces_of([(20,), (LONG,), (30, 3), (2 * LONG,)])
    found = buckets.in_buckets(pieces, LogGrid(0))
    assert [bucket.pieces for bucket in found] == [
        (pieces[0], pieces[2]),
        (pieces[1],),
        (pieces[3],),
    ]
    assert [bucket.size for bucket in found] == [32 + 96, LONG, 2 * LONG]


@pytest.mark.parametrize(("codec", "row"), [(UniformGrid(8), 32), (BlockInt8(), 4)], ids=str)
def test_rows_are_as_long_as_the_message_does_not_grow(codec, row):
    (bucket,) = buckets.in_buckets(pieces_of([(300, 100), (300, 101), (20, 9)]), codec)
    assert bucket.layout.row == row


@ALL_CODECS
def test_a_bucket_says_what_its_pieces_would(case):
    codec, pieces = case.compressor, pieces_of(SHAPES)
    values, seed = random_values(pieces), tf.constant([3, 4])
    found = buckets.in_buckets(pieces, codec)
    decoded, words = {}, 0
    for bucket in found:
        message = buckets.encode(codec, bucket, bucket.pack(values), seed)
        assert message.shape == [codec.bucket_words(bucket.layout)]
        decoded |= bucket.unpack(buckets.decode(codec, bucket, message))
        words += len(message)
    assert words <= sum(codec.num_words(p.size) for p in pieces)
    assert list(decoded) == pieces
    for piece, value in decoded.items():
        assert value.shape == piece.shape
        if codec.deterministic:
            alone = codec.decode(codec.encode(tf.reshape(values[piece], [-1])), piece.size)
            np.testing.assert_allclose(value, tf.reshape(alone, piece.shape), rtol=1e-6)


@pytest.mark.parametrize(
    ("case", "shapes"),
    slow_unless(  # those that come together are most of a model
        lambda case, shapes: not case.slow and shapes == COMPILED,
        [
            *((case, COMPILED) for case in CASES),
            *((case, SHAPES) for case in QUICK[::2]),
            *((case, [(LONG,)]) for case in QUICK[1::2]),
        ],
    ),
    ids=str,
)
def test_what_is_sent_and_what_is_left_out_are_all_there_was(case, shapes):
    codec, seed = case.compressor, tf.constant([3, 4])
    pieces = pieces_of(shapes)
    for bucket in buckets.in_buckets(pieces, codec):
        message, residual = (bucket.pack(random_values(pieces, seed)) for seed in (0, 1))
        words, left_out = buckets.encode_with_feedback(codec, bucket, message, residual, seed)
        sent = bucket.unpack(buckets.decode(codec, bucket, words))
        mean = buckets.decode_mean(codec, bucket, tf.stack([words, words, words]))
        rest, target = bucket.unpack(left_out), bucket.unpack(message + residual)
        for piece, value in bucket.unpack(mean).items():
            np.testing.assert_allclose(value, sent[piece], rtol=1e-6)
            scale = np.abs(sent[piece]).max() + np.abs(target[piece]).max()
            given = sent[piece] + rest[piece]
            np.testing.assert_allclose(given, target[piece], rtol=1e-5, atol=1e-6 * scale)
        kept = np.concatenate([np.ravel(rest[piece]) for piece in bucket.pieces])
        assert np.linalg.norm(kept) == pytest.approx(np.linalg.norm(left_out), rel=1e-5)
        expected = codec.encode_bucket(message + residual, bucket.layout, seed)
        expected = bucket.unpack(codec.decode_bucket(expected, bucket.layout))
        for piece, value in expected.items():
            np.testing.assert_allclose(sent[piece], value, rtol=1e-5, atol=1e-6)


def codec_calls(layers):
    """What encodes and decodes, beside shapes and each piece's own placeholder and result."""
    pieces = pieces_of([(32, 33 + i % 3) for i in range(layers)])
    codec = LogGrid(0)

    @functools.partial(tf.function, autograph=False)
    def round_trip(*values):
        found = {}
        for bucket in buckets.in_buckets(pieces, codec):
            message = bucket.pack(dict(zip(pieces, values, strict=True)))
            seed = tf.constant([1, 2])
            words, left_out = buckets.encode_with_feedback(codec, bucket, message, message, seed)
            mean = buckets.decode_mean(codec, bucket, tf.stack([words, words]))
            found |= bucket.unpack(mean + left_out)
        return list(found.values())

    graph = round_trip.get_concrete_function(*random_values(pieces).values()).graph
    shapes = ("Reshape", "Const", "Placeholder", "Identity")
    return sum(op.type not in shapes for op in graph.get_operations())


def test_the_graph_does_not_grow_with_the_number_of_pieces():
    assert codec_calls(50) == codec_calls(5)
