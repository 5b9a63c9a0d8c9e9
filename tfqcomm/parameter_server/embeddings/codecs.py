"""How a row travels: float32, bfloat16, or a byte per entry with a scale of the row's own.

Legend: r rows of d entries, w words each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.kernels import numerics, rounding, wire

_LARGEST = 127


@dataclasses.dataclass(frozen=True)
class RowCodec:
    """A stateless codec of rows; unlike a `Compressor` it takes any number of them.

    Without error feedback on the way down; on the way up with it where `RowFeedback` is asked for,
    by default without: a residual per row is a table on every worker, and what a rare row is owed
    waits until it is looked up again. What it buys is measured in docs/parameter_servers.md.

    Attributes:
        name: what `row_codec` calls it.
        num_words: d -> w.
        encode: float32[r, d] -> int32[r, w].
        decode: int32[r, w] and d -> float32[r, d].
        lossless: whether nothing is left out.
    """

    name: str
    num_words: Callable[[int], int]
    encode: Callable[[tf.Tensor], tf.Tensor]
    decode: Callable[[tf.Tensor, int], tf.Tensor]
    lossless: bool = False


def get(name: str) -> RowCodec:
    """The codec of this name.

    Raises:
        ValueError: if there is none.
    """
    checks.one_of("row_codec", name, tuple(_CODECS))
    return _CODECS[name]


def _encode_bfloat16(rows):
    halves = tf.cast(_pad(rows, 2), tf.bfloat16)
    return tf.reshape(wire.halves_to_words(tf.reshape(halves, [-1])), _shape(rows, 2))


def _decode_bfloat16(words, width):
    halves = wire.words_to_halves(tf.reshape(words, [-1]), 2 * tf.size(words), tf.bfloat16)
    rows = tf.reshape(tf.cast(halves, tf.float32), [-1, 2 * words.shape[1]])
    return rows[:, :width]


def _encode_int8(rows):
    """round(127 x / s), half to even, after s = max|x| of the row."""
    scale = tf.reduce_max(tf.abs(rows), 1, keepdims=True)
    levels = tf.round(numerics.relative(rows, scale) * _LARGEST)
    octets = tf.cast(tf.cast(_pad(levels, 4), tf.int32), tf.int8)
    body = tf.reshape(wire.bytes_to_words(tf.reshape(octets, [-1])), _shape(rows, 4))
    return tf.concat([wire.floats_to_words(scale), body], 1)


def _decode_int8(words, width):
    scale, body = wire.words_to_floats(words[:, :1]), words[:, 1:]
    octets = wire.words_to_bytes(tf.reshape(body, [-1]), 4 * tf.size(body))
    levels = tf.reshape(tf.cast(octets, tf.float32), [-1, 4 * body.shape[1]])[:, :width]
    return rounding.level_values(levels, _LARGEST, scale)


def _pad(rows, multiple: int) -> tf.Tensor:
    """Rows whose entries fill whole words."""
    return tf.pad(rows, [[0, 0], [0, -rows.shape[1] % multiple]])


def _shape(rows, per_word: int) -> list:
    """Of the words; said in full, since of no rows nothing could be inferred."""
    return [tf.shape(rows)[0], -(-rows.shape[1] // per_word)]


_CODECS = {
    codec.name: codec
    for codec in (
        RowCodec(
            "float32",
            lambda d: d,
            wire.floats_to_words,
            lambda w, d: wire.words_to_floats(w),
            lossless=True,
        ),
        RowCodec("bfloat16", lambda d: -(-d // 2), _encode_bfloat16, _decode_bfloat16),
        RowCodec("int8", lambda d: 1 + -(-d // 4), _encode_int8, _decode_int8),
    )
}
