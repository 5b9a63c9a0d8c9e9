"""What travels between a worker and a server: one vector of words in each direction.

down   total, version, length of each message | messages of large weights | the rest, float32
up                                             messages of large gradients | the rest, float32

A message is that of a bucket: of all large tensors but the longest, which have one each. The rest:
small and rank <= 1 tensors, then the moving statistics of layers. So one step takes one transfer
per server and direction, however many layers there are. Where a `Format` says so, long tensors that
no codec shortens travel beside it, each alone: nobody copies them into a row, and they go while
others are still computed.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from tfqcomm import compressors
from tfqcomm.compressors.base import Compressor
from tfqcomm.kernels import wire
from tfqcomm.parameter_server import buckets
from tfqcomm.parameter_server.buckets import Bucket
from tfqcomm.parameter_server.partition import Piece
from tfqcomm.parameter_server.sparse_weights import SparseWeights
from tfqcomm.step.options import ExchangeOptions


class Way(NamedTuple):
    """How the pieces of a server travel in one direction.

    Attributes:
        encoded: a message for each bucket, one behind the other.
        rest: as numbers, behind these.
        alone: as they are, in a transfer each.
    """

    encoded: list[Bucket]
    rest: list[Piece]
    alone: list[Piece]


@dataclasses.dataclass(frozen=True)
class Format:
    """What one server and its workers exchange.

    Attributes:
        pieces: what lives on the server.
        statistics: how many numbers of moving statistics do.
        options: how gradients are compressed.
        weight_codec: how weights are.
        elsewhere: elements of tables on the server, whose rows travel by themselves.
        alone_from: elements from which on what is not compressed travels alone; None: never.
    """

    pieces: tuple[Piece, ...]
    statistics: int
    options: ExchangeOptions
    weight_codec: Compressor | SparseWeights
    elsewhere: int = 0
    alone_from: int | None = None

    @property
    def large(self) -> list[Piece]:
        """Compressed in both directions, as far as there is a codec."""
        return [p for p in self.pieces if self.options.reaches(p.shape, p.size)]

    @functools.cached_property
    def up(self) -> Way:
        """What is pushed."""
        return self._way(self.options.one_compressor)

    @functools.cached_property
    def down(self) -> Way:
        """What is pulled."""
        return self._way(self.weight_codec)

    def _way(self, codec: Compressor | SparseWeights) -> Way:
        """A codec that leaves numbers as they are is not asked: it would copy them."""
        way, encoded = Way([], [], []), []
        numbers = isinstance(codec, Compressor) and codec.lossless
        for piece in self.pieces:
            if not numbers and piece.size and self.options.reaches(piece.shape, piece.size):
                encoded.append(piece)
            else:
                long = self.alone_from and piece.size >= self.alone_from
                (way.alone if long else way.rest).append(piece)
        if isinstance(codec, SparseWeights):  # a message's length follows the data
            return way._replace(encoded=[buckets.alone(piece) for piece in encoded])
        return way._replace(encoded=buckets.in_buckets(encoded, codec))

    @property
    def push_lengths(self) -> list[int]:
        """Words of each part of the vector that is pushed."""
        codec = self.options.one_compressor
        return [*(codec.bucket_words(b.layout) for b in self.up.encoded), self._rest(self.up)]

    @property
    def push_words(self) -> int:
        """Words of a push: with what travels alone."""
        return sum(self.push_lengths) + sum(p.size for p in self.up.alone)

    @property
    def most_pull_words(self) -> int:
        """Words of the vector that is pulled, at most."""
        messages = [self._most_words(bucket) for bucket in self.down.encoded]
        return 2 + len(messages) + sum(messages) + self._rest(self.down)

    @property
    def pulls_alike(self) -> bool:
        """Whether all pulls have the same number of words."""
        return not (self.down.encoded and isinstance(self.weight_codec, SparseWeights))

    @property
    def dense_words(self) -> int:
        """What a pull, or a push, would take without compression, and of whole tables."""
        return sum(p.size for p in self.pieces) + self.statistics + self.elsewhere

    def _rest(self, way: Way) -> int:
        return sum(p.size for p in way.rest) + self.statistics

    def pack_weights(self, values: dict[Piece, tf.Tensor], statistics, version) -> tf.Tensor:
        """The words of a pull, without what travels alone.

        Args:
            values: float32 tensors.
            statistics: float32[s].
            version: int scalar, steps the server has taken.
        """
        seed = tf.cast(version, tf.int32)
        parts = [
            self._encode(bucket, bucket.pack(values), tf.stack([_crc(bucket.name), seed]))
            for bucket in self.down.encoded
        ]
        lengths = [tf.size(part) for part in parts]
        parts.append(pack_rest(self.down, values, statistics))
        total = 2 + len(lengths) + sum(lengths) + self._rest(self.down)
        header = tf.stack([total, tf.cast(version, tf.int32), *lengths])
        return tf.concat([header, *parts], 0)

    def unpack_weights(self, words) -> tuple[dict[Piece, tf.Tensor], tf.Tensor, tf.Tensor]:
        """Inverse of `pack_weights`: tensors in the pieces' shapes, statistics and version."""
        start = 2 + len(self.down.encoded)
        values: dict[Piece, tf.Tensor] = {}
        for index, bucket in enumerate(self.down.encoded):
            stop = start + words[2 + index]
            values |= bucket.unpack(self._decode(bucket, words[start:stop]))
            start = stop
        rest = tf.ensure_shape(words[start:], [self._rest(self.down)])
        dense, statistics = unpack_rest(self.down, wire.words_to_floats(rest))
        return values | dense, statistics, words[1]

    def _most_words(self, bucket) -> int:
        codec = self.weight_codec
        if isinstance(codec, SparseWeights):
            return codec.most_words(bucket.size)
        return codec.bucket_words(bucket.layout)

    def _encode(self, bucket, x, seed) -> tf.Tensor:
        codec = self.weight_codec
        if isinstance(codec, SparseWeights):
            return codec.encode(x, seed)
        return buckets.encode(codec, bucket, x, seed)

    def _decode(self, bucket, words) -> tf.Tensor:
        codec = self.weight_codec
        if isinstance(codec, SparseWeights):
            return codec.decode(words, bucket.size)
        words = tf.ensure_shape(words, [self._most_words(bucket)])
        return buckets.decode(codec, bucket, words)


def pack_rest(way: Way, values: dict[Piece, tf.Tensor], statistics) -> tf.Tensor:
    """The words of what is not encoded, and does not travel alone, and the statistics."""
    flat = [tf.reshape(values[p], [-1]) for p in way.rest]
    return wire.floats_to_words(tf.concat([*flat, statistics], 0))


def unpack_rest(way: Way, floats) -> tuple[dict[Piece, tf.Tensor], tf.Tensor]:
    """Inverse of `pack_rest`, after `wire.words_to_floats`."""
    sizes = [p.size for p in way.rest]
    *flat, statistics = tf.split(floats, [*sizes, floats.shape[0] - sum(sizes)])
    return {p: tf.reshape(v, p.shape) for p, v in zip(way.rest, flat, strict=True)}, statistics


def weight_codec(weight_compressor, optimizer):
    """What pulls are encoded with: what was asked for, or what suits the optimizer."""
    if isinstance(weight_compressor, SparseWeights):
        return weight_compressor
    if weight_compressor is None and getattr(optimizer, "l1", 0):
        return SparseWeights()
    if weight_compressor is None:
        return getattr(optimizer, "weight_compressor", compressors.get(None))
    try:
        return compressors.get(weight_compressor)
    except ValueError as error:
        raise ValueError(
            "Argument `weight_compressor` must be None, `SparseWeights()`, or a compressor. "
            f"Received: weight_compressor={weight_compressor!r}"
        ) from error


def _crc(text: str) -> int:
    return zlib.crc32(text.encode()) & 0x7FFFFFFF


def gradient_seeds(buckets: Sequence[Bucket], options: ExchangeOptions, worker: int) -> list[int]:
    """One number for each of all buckets: the first half of a stochastic codec's seed."""
    sender = "all" if options.one_compressor.linear else f"worker{worker}"
    return [_crc(f"{options.seed}/{bucket.name}/{sender}") for bucket in buckets]
