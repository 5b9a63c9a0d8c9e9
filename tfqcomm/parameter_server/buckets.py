"""Buckets: pieces of a server that go through a codec together.

    pieces    a a a | b b b b b | c c c c ... c
    buckets   a a a 0 b b b b b 0 0 0 | c c c c ... c     short ones side by side, a long one alone

Scales and selections stay each piece's own. So a codec is called as often for 5 short pieces as for
500, and nobody copies a long one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import tensorflow as tf

from tfqcomm.aggregators import error_feedback
from tfqcomm.compressors.base import Compressor
from tfqcomm.kernels import wire
from tfqcomm.kernels.layout import Layout
from tfqcomm.parameter_server.partition import ALONE_FROM, Piece

# Elements from which on a codec is one kernel of XLA's, which takes a compile. Elsewhere that pays
# from `numerics.FUSE_FROM` on; here few vectors are encoded and decoded, in every step.
FUSE_FROM = 1 << 16


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Pieces side by side in one flat vector, float32[size].

    Attributes:
        pieces: of one server.
        layout: of their elements.
    """

    pieces: tuple[Piece, ...]
    layout: Layout

    @property
    def size(self) -> int:
        """Elements, with what pads pieces to whole rows."""
        return self.layout.size

    @property
    def name(self) -> str:
        """That of the first piece: the same in every run, and no other bucket's."""
        return self.pieces[0].name

    @property
    def slices(self) -> dict[Piece, slice]:
        """Where each piece lies."""
        starts = zip(self.pieces, self.layout.starts, strict=True)
        return {piece: slice(start, start + piece.size) for piece, start in starts}

    def pack(self, values: Mapping[Piece, tf.Tensor]) -> tf.Tensor:
        """The vector, out of tensors of any shapes."""
        return self.layout.pack([tf.reshape(values[piece], [-1]) for piece in self.pieces])

    def unpack(self, flat: tf.Tensor) -> dict[Piece, tf.Tensor]:
        """Inverse of `pack`: tensors in the pieces' shapes."""
        found = zip(self.pieces, self.layout.unpack(flat), strict=True)
        return {piece: tf.reshape(values, piece.shape) for piece, values in found}


def in_buckets(pieces: Iterable[Piece], codec: Compressor) -> list[Bucket]:
    """All pieces: short ones in one bucket, long ones in one each.

    Rows are shorter than the codec would have them where padding would lengthen the message. If
    it is longer than those of the pieces even without, each has a bucket of its own.
    """
    pieces = list(pieces)
    short = [piece for piece in pieces if piece.size < ALONE_FROM]
    long = [piece for piece in pieces if piece.size >= ALONE_FROM]
    together = _together(short, codec)
    return [*together, *(alone(piece, codec.row(piece.size)) for piece in long)]


def alone(piece: Piece, row: int = 1) -> Bucket:
    """A bucket of one piece, which needs no padding."""
    return Bucket((piece,), Layout((piece.size,), row, padded=False))


def _together(pieces: Sequence[Piece], codec: Compressor) -> list[Bucket]:
    if len(pieces) > 1:
        sizes = tuple(piece.size for piece in pieces)
        most, row = sum(codec.num_words(size) for size in sizes), codec.row(sum(sizes))
        for shorter in (n for n in range(row, 0, -1) if row % n == 0):
            layout = Layout(sizes, shorter)
            if codec.bucket_words(layout) <= most:
                return [Bucket(tuple(pieces), layout)]
    return [alone(piece, codec.row(piece.size)) for piece in pieces]


def encode(codec: Compressor, bucket: Bucket, x: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """int32[w] words of float32[size]."""
    return encode_with_feedback(codec, bucket, x, None, seed)[0]


def encode_with_feedback(
    codec: Compressor, bucket: Bucket, message: tf.Tensor, residual: tf.Tensor | None, seed
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Encodes `message` plus what is owed from before.

    Args:
        message: float32[size].
        residual: the same, or None for no error feedback.
        seed: int32[2].

    Returns:
        int32[w] words and the new residual (None without error feedback). Whether they are finite
        the norms of messages and residuals tell.
    """
    layout = bucket.layout
    encoded = error_feedback.encode_with_feedback(
        codec, layout, message, residual, seed, check=False, fuse_from=FUSE_FROM
    )
    (left_out,) = encoded.left_out() or [None]
    words = tf.ensure_shape(wire.floats_to_words(encoded.words), [codec.bucket_words(layout)])
    return words, left_out


def decode(codec: Compressor, bucket: Bucket, words: tf.Tensor) -> tf.Tensor:
    """float32[size] of int32[w] words; what stands in the padding has no meaning."""
    layout = bucket.layout
    return codec.kernel(_decode, layout.size, codec, layout, fuse_from=FUSE_FROM)(words)


def decode_mean(codec: Compressor, bucket: Bucket, words: tf.Tensor) -> tf.Tensor:
    """Mean of all workers' decoded words, added in rank order: int32[W, w] -> float32[size]."""
    # Not a loop of TensorFlow's: of one that runs on another task, parts would run on the chief.
    return mean_of(decode(codec, bucket, one) for one in tf.unstack(words))


def mean_of(values: Iterable[tf.Tensor]) -> tf.Tensor:
    """The mean of tensors, added in their order."""
    first, *others = values
    return sum(others, first) / (1 + len(others)) if others else first


def _decode(codec, layout, words):
    return codec.decode_bucket(words, layout)
