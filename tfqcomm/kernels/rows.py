"""Rows of a table as words: numbers of fewer bits, and the row's place in the table.

    bfloat16   d numbers of 2 bytes  |                                   | place | padding
    int8       d levels of 1 byte    | scale: bfloat16, the row's own    | place | padding

A place takes 2 bytes in tables of up to 65536 rows, else 4; padding makes whole words. Letters: m
rows of d elements, w words of a row.
"""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.kernels import numerics

ROW_TYPES = ("float32", "bfloat16", "int8")

_LEVELS = 127
_HALF = 0xFFFF


def words_of_row(row_type: str, width: int, height: int) -> int:
    """Words that a row takes, w, of a table of `height` rows of `width` elements."""
    numbers = 2 * width if row_type == "bfloat16" else width + 2
    return -(-(numbers + (2 if height <= _HALF + 1 else 4)) // 4)


def encode(row_type: str, values: tf.Tensor, places: tf.Tensor, height: int) -> tf.Tensor:
    """Words, bit by bit in float32: float32[m, d] and int[m] -> float32[m, w].

    Args:
        row_type: "bfloat16" or "int8".
        values: finite; levels are those nearest, the largest of a row is exact to 2^-7 of itself.
        height: rows of the table.
    """
    place = tf.uint16 if height <= _HALF + 1 else tf.int32
    parts = [*_numbers(row_type, values), tf.bitcast(tf.cast(places, place), tf.uint8)]
    row = tf.concat(parts, 1)
    words = words_of_row(row_type, values.shape[1], height)
    row = tf.pad(row, [[0, 0], [0, 4 * words - row.shape[1]]])
    return tf.bitcast(tf.reshape(row, [-1, words, 4]), tf.float32)


def decode(row_type: str, words: tf.Tensor, width: int, height: int):
    """Inverse of `encode`: float32[m, d] and int64[m]."""
    row = tf.reshape(tf.bitcast(words, tf.uint8), [-1, 4 * words.shape[1]])
    numbers = 2 * width if row_type == "bfloat16" else width
    values = _values(row_type, row[:, :numbers], width)
    if row_type == "int8":
        scale = tf.bitcast(row[:, width : width + 2], tf.bfloat16)
        values = values * tf.cast(scale, tf.float32)[:, None]
        values = tf.clip_by_value(values, -tf.float32.max, tf.float32.max)
        numbers = width + 2
    if height <= _HALF + 1:
        places = tf.bitcast(row[:, numbers : numbers + 2], tf.uint16)
    else:
        places = tf.bitcast(row[:, numbers : numbers + 4], tf.int32)
    return values, tf.cast(places, tf.int64)


def _numbers(row_type, values):
    """The parts of rows that stand before their places: uint8[m, bytes]."""
    if row_type == "bfloat16":
        halves = tf.bitcast(numerics.saturating_cast(values, tf.bfloat16), tf.uint8)  # [m, d, 2]
        return [tf.reshape(halves, [-1, 2 * values.shape[1]])]
    scale = _rounded_up(tf.reduce_max(tf.abs(values), axis=1) / _LEVELS)
    levels = tf.math.divide_no_nan(values, tf.cast(scale, tf.float32)[:, None])
    levels = tf.cast(tf.clip_by_value(tf.round(levels), -_LEVELS, _LEVELS), tf.int8)
    return [tf.bitcast(levels, tf.uint8), tf.bitcast(scale, tf.uint8)]


def _rounded_up(scale):
    """The next bfloat16, so that no level is cut off: float32[m], not negative."""
    bits = tf.bitcast(scale, tf.int32)
    high = tf.bitwise.right_shift(bits + _HALF, 16)
    return tf.bitcast(tf.cast(high, tf.uint16), tf.bfloat16)


def _values(row_type, numbers, width):
    if row_type == "bfloat16":
        halves = tf.bitcast(tf.reshape(numbers, [-1, width, 2]), tf.bfloat16)
        return tf.cast(halves, tf.float32)
    return tf.cast(tf.bitcast(numbers, tf.int8), tf.float32)
