"""How the values of kept entries travel: as floats, as levels of blocks, or out of tables.

Legend: S segments, of which the i-th keeps `ks[i]` entries, K in all; their values in a row.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfqcomm.kernels import counting, numerics, rounding, wire

BLOCK = 256  # values of a segment that share a scale: an eighth of a bit each


class ValueFormat(abc.ABC):
    """A codec of values, `float32[K] -> int32[w] -> float32[K]`."""

    @abc.abstractmethod
    def num_words(self, ks: Sequence[int]) -> int:
        """Words that the values of all segments take."""

    @abc.abstractmethod
    def encode(self, values: tf.Tensor, ks: Sequence[int]) -> tf.Tensor:
        """Float32[K] -> int32[num_words(ks)]."""

    @abc.abstractmethod
    def decode(self, words: tf.Tensor, ks: Sequence[int]) -> tf.Tensor:
        """Inverse of `encode`."""

    @abc.abstractmethod
    def error_bound(self, k: int) -> float:
        """The q in ||decoded - v||^2 <= q ||v||^2 for any `k` > 0 values v of a segment."""


@dataclasses.dataclass(frozen=True)
class Floats(ValueFormat):
    """Values rounded to nearest even, at most to the largest number of their type."""

    dtype: tf.DType

    def num_words(self, ks):
        return wire.num_words(sum(ks), 8 * self.dtype.size)

    def encode(self, values, ks):
        if self.dtype == tf.float32:
            return wire.floats_to_words(values)
        return wire.halves_to_words(numerics.saturating_cast(values, self.dtype))

    def decode(self, words, ks):
        if self.dtype == tf.float32:
            return wire.words_to_floats(words)
        return tf.cast(wire.words_to_halves(words, sum(ks), self.dtype), tf.float32)

    def error_bound(self, k):
        return 0.0 if self.dtype == tf.float32 else 2.0**-16


@dataclasses.dataclass(frozen=True)
class Levels(ValueFormat):
    """s q / L with q = round(L v / s), half to even; s = max|v| of a block, and L = 2^(bits-1) - 1.

    Payload: a float32 scale per block; no block has values of two segments. Then the levels, as
    bytes, or as fields that are 2^(bits - 1) larger.
    """

    bits: int

    @property
    def largest(self) -> int:
        """The level of the largest value of a block."""
        return 2 ** (self.bits - 1) - 1

    def num_words(self, ks):
        return len(_blocks(ks)) + wire.num_field_words(sum(ks), self.bits)

    def encode(self, values, ks):
        blocks = _blocks(ks)
        owner = _owners(blocks)
        scales = _by_owner(
            tf.math.unsorted_segment_max, numerics.magnitude_keys(values), owner, blocks
        )
        scales = tf.bitcast(scales, tf.float32)
        levels = numerics.relative(values, tf.gather(scales, owner)) * self.largest
        levels = tf.clip_by_value(tf.cast(tf.round(levels), tf.int32), -self.largest, self.largest)
        return tf.concat([wire.floats_to_words(scales), self._pack(levels)], 0)

    def decode(self, words, ks):
        blocks = _blocks(ks)
        scales = wire.words_to_floats(words[: len(blocks)])
        levels = self._unpack(words[len(blocks) :], sum(ks))
        # Looked up: compilers turn a division by L into a product, and then receivers differ.
        shares = np.arange(-self.largest, self.largest + 1, dtype=np.float32) / self.largest
        return tf.gather(scales, _owners(blocks)) * tf.gather(shares, levels + self.largest)

    def error_bound(self, k):
        return rounding.error_bound(self.largest, min(k, BLOCK))

    def _pack(self, levels):
        if self.bits == 8:
            return wire.bytes_to_words(tf.cast(levels, tf.int8))
        return wire.pack_fields(levels + self.largest + 1, self.bits)

    def _unpack(self, words, number):
        if self.bits == 8:
            return tf.cast(wire.words_to_bytes(words, number), tf.int32)
        return wire.unpack_fields(words, self.bits, number) - self.largest - 1


@dataclasses.dataclass(frozen=True)
class Table(ValueFormat):
    """One of four values, those that a segment's table has: 2 bits each.

    Values fall into four bins, from 3 standard deviations below the segment's mean to 3 above; a
    bin's value is the mean of what fell into it, outliers in the outer two included.

    Payload: four float32 a segment, the lowest bin first, then the numbers of the bins.

    References:
        Sarfi, Thérien, Lidin, Belilovsky, "Communication Efficient LLM Pre-training with
        SparseLoCo", arXiv 2508.15706, and the 2-bit quantizer of its implementation.
    """

    def num_words(self, ks):
        return 4 * _filled(ks) + wire.num_field_words(sum(ks), 2)

    def encode(self, values, ks):
        lengths = [k for k in ks if k]
        owner = _owners(lengths)
        number = tf.constant(lengths, tf.float64)
        values = tf.cast(values, tf.float64)  # squares of any float32, and sums of those
        mean = _by_owner(tf.math.unsorted_segment_sum, values, owner, lengths) / number
        off = values - tf.gather(mean, owner)
        variance = _by_owner(tf.math.unsorted_segment_sum, off * off, owner, lengths) / number
        width = tf.gather(1.5 * tf.sqrt(variance), owner)  # of a bin
        bins = sum(tf.cast(off >= edge, tf.int32) for edge in (-width, 0.0, width))
        place = 4 * owner + bins
        sums = tf.math.unsorted_segment_sum(values, place, 4 * len(lengths))
        fell = tf.cast(counting.tally(place, 4 * len(lengths)), tf.float64)
        table = tf.cast(tf.math.divide_no_nan(sums, fell), tf.float32)
        return tf.concat([wire.floats_to_words(table), wire.pack_fields(bins, 2)], 0)

    def decode(self, words, ks):
        lengths = [k for k in ks if k]
        table = wire.words_to_floats(words[: 4 * len(lengths)])
        bins = wire.unpack_fields(words[4 * len(lengths) :], 2, sum(ks))
        return tf.gather(table, 4 * _owners(lengths) + bins)

    def error_bound(self, k):
        # What k values keep is the sum of squares of their bins' means, k m^2 and what lies between
        # the bins, m being the mean of all. The edge at m alone leaves at least D^2 / k between
        # them, D = sum |v - m|; and D^2 >= sum (v - m)^2. So at least 1/k of the squares are kept.
        return 1 - 1 / k


FORMATS = {
    "float32": Floats(tf.float32),
    "bfloat16": Floats(tf.bfloat16),
    "int8": Levels(8),
    "int4": Levels(4),
    "table2": Table(),
}


def _filled(ks):
    return sum(k > 0 for k in ks)


def _blocks(ks):
    """Lengths of the blocks of all segments."""
    return [min(BLOCK, k - start) for k in ks for start in range(0, k, BLOCK)]


def _owners(lengths):
    """The number of the run that each of all values is in: int32[sum(lengths)]."""
    starts = np.cumsum([0, *lengths])[:-1]
    return counting.owners(starts, sum(lengths))


def _by_owner(reduce, values, owner, lengths):
    return reduce(values, owner, len(lengths))
