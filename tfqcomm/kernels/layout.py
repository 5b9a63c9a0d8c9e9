"""Layouts: several vectors side by side in one, what a scale ranges over, and where to cut.

    vectors    a a a a a | b b b
    rows       [a a a a] [a 0 0 0] [b b b 0]        row = 4: each vector begins a row of its own
    segments    0         0         1

All that walks over the elements of a bucket walks over rows, whatever number of vectors these are
of; only what a row comes to is sorted by vector. So the graph has one size for 5 vectors and 500.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfqcomm.kernels import numerics


@dataclasses.dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of a vector."""

    vector: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Elements."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Part:
    """What one of several owners has of a flat vector: its elements [start, stop).

    Attributes:
        layout: of these elements.
        segments: the parts of vectors that they are, in the order of `layout`.
    """

    start: int
    stop: int
    layout: Layout
    segments: tuple[Segment, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Vectors in a row in one flat vector, each padded with zeros to whole rows.

    Attributes:
        sizes: elements of each vector, none of them 0.
        row: elements of a row.
        padded: whether the last row is whole. A vector on its own needs no padding.
    """

    sizes: tuple[int, ...]
    row: int = 1
    padded: bool = True

    @functools.cached_property
    def row_counts(self) -> tuple[int, ...]:
        """Rows of each vector."""
        return tuple(-(-n // self.row) for n in self.sizes)

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """Where in the flat vector each vector begins."""
        ends = np.cumsum([0, *self.row_counts], dtype=np.int64)[:-1] * self.row
        return tuple(int(start) for start in ends)

    @functools.cached_property
    def size(self) -> int:
        """Elements of the flat vector."""
        if not self.sizes:
            return 0
        return sum(self.row_counts) * self.row if self.padded else self.starts[-1] + self.sizes[-1]

    @property
    def has_padding(self) -> bool:
        """Whether there are elements that belong to no vector."""
        return self.size != sum(self.sizes)

    def pack(self, vectors: Sequence[tf.Tensor]) -> tf.Tensor:
        """float32[size] of vectors [n]."""
        if not vectors:
            return tf.zeros([0])
        parts, zeros = [], {}
        for vector, n, rows in zip(vectors, self.sizes, self.row_counts, strict=True):
            parts.append(vector)
            if padding := rows * self.row - n:
                if padding not in zeros:
                    zeros[padding] = tf.zeros([padding], vector.dtype)
                parts.append(zeros[padding])
        flat = tf.concat(parts, 0) if len(parts) > 1 else parts[0]
        return flat[: self.size]

    def unpack(self, flat: tf.Tensor) -> list[tf.Tensor]:
        """The vectors [n] of `flat`, [size]."""
        if len(self.sizes) == 1:
            return [flat if self.sizes[0] == self.size else flat[: self.sizes[0]]]
        if self.row == 1:
            return tf.split(flat, self.sizes)
        # Of whole rows TensorFlow makes slices, not copies.
        parts = tf.split(self.rows(flat), self.row_counts)
        vectors = [tf.reshape(part, [-1]) for part in parts]
        return [
            vector if vector.shape[0] == n else vector[:n]
            for vector, n in zip(vectors, self.sizes, strict=True)
        ]

    def without_padding(self, x: tf.Tensor) -> tf.Tensor:
        """`x` with zeros where no vector is: [size] -> [size]."""
        if not self.has_padding:
            return x
        if len(self.sizes) == 1:
            (n,) = self.sizes
            return tf.concat([x[:n], tf.zeros([self.size - n], x.dtype)], 0)
        filled = []
        for n, rows in zip(self.sizes, self.row_counts, strict=True):
            filled += [self.row] * (rows - 1) + [n - (rows - 1) * self.row]
        kept = tf.range(self.row) < tf.constant(filled, tf.int32)[:, None]
        return self.flat(tf.where(kept, self.rows(x), tf.zeros([], x.dtype)))

    def blocks(self, block: int | None) -> Layout:
        """The same elements with `block` of them to a segment, the last of a vector shorter.

        Args:
            block: elements, whole rows; None for one segment per vector.
        """
        if block is None or (len(self.sizes) == 1 and block >= self.sizes[0]):
            return self
        sizes = []
        for n in self.sizes:
            whole, rest = divmod(n, block)
            sizes += [block] * whole + [rest] * (rest > 0)
        return dataclasses.replace(self, sizes=tuple(sizes))

    def num_blocks(self, block: int | None) -> int:
        """Segments of `blocks`."""
        return len(self.sizes) if block is None else sum(-(-n // block) for n in self.sizes)

    def rows(self, x: tf.Tensor) -> tf.Tensor:
        """[size] -> [rows, elements]: one row if there is one vector, or else `row` elements."""
        if len(self.sizes) == 1:
            return x[None]
        missing = sum(self.row_counts) * self.row - self.size
        return tf.reshape(tf.pad(x, [[0, missing]]) if missing else x, [-1, self.row])

    def flat(self, rows: tf.Tensor) -> tf.Tensor:
        """Inverse of `rows`."""
        flat = tf.reshape(rows, [-1])
        return flat if flat.shape[0] == self.size else flat[: self.size]

    def spread(self, values: tf.Tensor) -> tf.Tensor:
        """A number for each vector, to be broadcast to `rows`: [vectors] -> [rows, 1]."""
        return (values if self._one_row_each else tf.gather(values, self._vector_of_row))[:, None]

    def sums(self, x: tf.Tensor) -> tf.Tensor:
        """Sums of float32 `x` by vector, see `numerics.sums`: [size] -> float64[vectors]."""
        return self._by_vector(tf.math.unsorted_segment_sum, numerics.sums(self.rows(x)))

    def magnitude_sums(self, x: tf.Tensor) -> tf.Tensor:
        """Sums of |x|, also where they are beyond float32: [size] -> float64[vectors]."""
        return self._by_vector(tf.math.unsorted_segment_sum, numerics.magnitude_sums(self.rows(x)))

    def mean_magnitude(self, x: tf.Tensor) -> tf.Tensor:
        """Means of |x|: [size] -> float32[vectors]."""
        return tf.cast(self.magnitude_sums(x) / self.counts, tf.float32)

    def max_magnitude(self, x: tf.Tensor) -> tf.Tensor:
        """The largest |x|, NaN above all: [size] -> float32[vectors]."""
        keys = numerics.max_key(self.rows(x))
        return tf.bitcast(self._by_vector(tf.math.unsorted_segment_max, keys), tf.float32)

    def norms(self, x: tf.Tensor) -> tf.Tensor:
        """Euclidean norms, at most the largest float32: [size] -> float32[vectors]."""
        largest = self.max_magnitude(x)
        squares = self.sums(
            tf.square(self.flat(numerics.relative(self.rows(x), self.spread(largest))))
        )
        return numerics.norm_of(largest, squares)

    @property
    def counts(self) -> tf.Tensor:
        """Elements by vector: float64[vectors]."""
        return tf.constant(self.sizes, tf.float64)

    def cut(self, owners: int) -> list[Part]:
        """Cuts the rows into equal parts; vectors across a boundary become one in each part."""
        total, parts = sum(self.row_counts), []
        for owner in range(owners):
            start = total * owner // owners * self.row
            stop = min(total * (owner + 1) // owners * self.row, self.size)
            segments = []
            for vector, (begin, n) in enumerate(zip(self.starts, self.sizes, strict=True)):
                low, high = max(start - begin, 0), min(stop - begin, n)
                if low < high:
                    segments.append(Segment(vector, low, high))
            layout = Layout(tuple(segment.size for segment in segments), self.row, self.padded)
            parts.append(Part(start, stop, layout, tuple(segments)))
        return parts

    @property
    def _one_row_each(self) -> bool:
        return len(self.sizes) == 1 or len(self.sizes) == sum(self.row_counts)

    @property
    def _vector_of_row(self) -> tf.Tensor:
        vectors = np.arange(len(self.sizes), dtype=np.int32)
        return tf.constant(np.repeat(vectors, self.row_counts))

    def _by_vector(self, reduce, values):
        if self._one_row_each:
            return values
        return reduce(values, self._vector_of_row, len(self.sizes))
