"""What a worker pushes of tables to one server.

rows of each table, int32[tables] | for each table: places of rows, int32[r] | their words, [r * w]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import tensorflow as tf

from tfqcomm.parameter_server.embeddings.codecs import RowCodec
from tfqcomm.parameter_server.partition import Piece


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """What one server and its workers exchange of tables.

    Attributes:
        parts: of tables, that live on the server.
        codec: of rows, in both directions.
    """

    parts: tuple[Piece, ...]
    codec: RowCodec

    def pack(self, pushed: Mapping[Piece, tuple[tf.Tensor, tf.Tensor]]) -> tf.Tensor:
        """The words of a push.

        Args:
            pushed: for each part the places of rows in it, int32[r], and float32[r, d].
        """
        counts = [tf.size(pushed[part][0]) for part in self.parts]
        words = [tf.stack(counts) if counts else tf.zeros([0], tf.int32)]
        for part in self.parts:
            places, rows = pushed[part]
            words += [places, tf.reshape(self.codec.encode(rows), [-1])]
        return tf.concat(words, 0)

    def unpack(self, words) -> dict[Piece, tuple[tf.Tensor, tf.Tensor]]:
        """Inverse of `pack`."""
        words = tf.ensure_shape(words, [None])
        counts, start, pushed = words[: len(self.parts)], len(self.parts), {}
        for index, part in enumerate(self.parts):
            width = part.shape[1]
            per_row = self.codec.num_words(width)
            middle = start + counts[index]
            stop = middle + counts[index] * per_row
            rows = tf.reshape(words[middle:stop], [counts[index], per_row])
            pushed[part] = words[start:middle], self.codec.decode(rows, width)
            start = stop
        return pushed
