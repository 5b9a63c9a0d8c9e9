"""What the dense quantizers have in common: a few numbers for each tensor, few bits per element."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import tensorflow as tf

from tfqcomm.compressors.base import Compressor
from tfqcomm.kernels import numerics, wire
from tfqcomm.kernels.layout import Layout

_ROW = 128  # elements
_SHORT, _SHORT_ROW = 1 << 16, 32  # with fewer elements there would be much padding
_SHORT_ROW_OF_BLOCKS = 8  # of blocks that are large for so few elements, and for what one owns
_LARGEST_ROW = 512  # a block of more elements takes several rows


@dataclasses.dataclass(frozen=True)
class Quantizer(Compressor):
    """Codec that measures each tensor, or block of it, and rounds its elements by that.

        scales = measure(x, layout)               float32[scales_per_segment, segments]
        body   = quantize(x, scales, layout, seed)
        x      = restore(scales, body, layout)

    A segment of the layout is what one scale ranges over, so the three are written once for a
    vector, a vector in blocks and a bucket of tensors. Payload: the scales, then the body.
    """

    scales_per_segment: ClassVar[int] = 1

    def row(self, elements):
        block, short = self._block, elements <= _SHORT
        if block is None:
            return _SHORT_ROW if short else _ROW
        if short and block > _SHORT_ROW and block % _SHORT_ROW_OF_BLOCKS == 0:
            return _SHORT_ROW_OF_BLOCKS
        return _ROW if block > _LARGEST_ROW and block % _ROW == 0 else block

    @property
    def _block(self) -> int | None:
        """Entries per scale; None for all of a tensor."""
        return None

    @abc.abstractmethod
    def num_body_words(self, n: int) -> int:
        """Words of `n` elements without their scales."""

    @abc.abstractmethod
    def measure(self, x: tf.Tensor, layout: Layout) -> tf.Tensor:
        """float32[scales_per_segment, segments] of x, float32[layout.size]."""

    @abc.abstractmethod
    def quantize(
        self, x: tf.Tensor, scales: tf.Tensor, layout: Layout, seed: tf.Tensor
    ) -> tf.Tensor:
        """int32[num_body_words(layout.size)]."""

    @abc.abstractmethod
    def restore(self, scales: tf.Tensor, body: tf.Tensor, layout: Layout) -> tf.Tensor:
        """float32[layout.size]."""

    def num_words(self, n: int) -> int:
        return self.bucket_words(self._of_vector(n)) if n else 0

    def encode_implementation(self, x, seed):
        return self.encode_bucket(x, self._of_vector(x.shape[0]), seed)

    def decode_implementation(self, words, n):
        return self.decode_bucket(words, self._of_vector(n))

    def bucket_words(self, layout):
        return self._num_scales(layout) + self.num_body_words(layout.size)

    def encode_bucket(self, x, layout, seed):
        layout = layout.blocks(self._block)
        scales = numerics.fuse(_measure, layout.size, self, layout)(x)
        body = numerics.fuse(_quantize, layout.size, self, layout)(x, scales, seed)
        return tf.concat([wire.floats_to_words(tf.reshape(scales, [-1])), body], 0)

    def decode_bucket(self, words, layout):
        layout = layout.blocks(self._block)
        return numerics.fuse(_restore, layout.size, self, layout)(words)

    def encoded_finite(self, x, words, layout):
        if not self.scales_per_segment:
            return super().encoded_finite(x, words, layout)
        # What is measured is not finite unless all elements are.
        return tf.reduce_all(numerics.is_finite(self._scales(words, layout)))

    def mean_finite(self, mean, words, layout):
        if not self.scales_per_segment:
            return super().mean_finite(mean, words, layout)
        # No decoded magnitude is above the scale, and rounding is monotonic.
        scales = tf.abs(self._scales(words, layout))  # [W, scales]
        return tf.reduce_all(numerics.is_finite(tf.reduce_sum(scales, axis=0)))

    def _scales(self, words, layout):
        return wire.words_to_floats(words[..., : self._num_scales(layout)])

    def _num_scales(self, layout):
        return self.scales_per_segment * layout.num_blocks(self._block)

    def _of_vector(self, n: int) -> Layout:
        return Layout((n,), self.row(n), padded=False)


def _measure(codec, layout, x):
    return codec.measure(x, layout)


def _quantize(codec, layout, x, scales, seed):
    return codec.quantize(x, scales, layout, seed)


def _restore(codec, layout, words):
    count = codec.scales_per_segment * len(layout.sizes)
    scales = wire.words_to_floats(words[:count])
    scales = tf.reshape(scales, [codec.scales_per_segment, -1])
    return codec.restore(scales, words[count:], layout)
