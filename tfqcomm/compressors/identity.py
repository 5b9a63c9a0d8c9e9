"""No compression: the baseline that runs the same code path."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import tensorflow as tf

from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import wire


@register("identity")
@dataclasses.dataclass(frozen=True)
class Identity(Compressor):
    """Sends float32 as it is, 32 bits per element.

    Example:
    >>> Identity().decode(Identity().encode([1.5, -2.0]), n=2).numpy()
    array([ 1.5, -2. ], dtype=float32)
    """

    lossless: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    sum_dtype: ClassVar[tf.DType] = tf.float32

    def num_words(self, n: int) -> int:
        return n

    def error_bound(self, n: int) -> float:
        return 0.0

    def encode_implementation(self, x, seed):
        return wire.floats_to_words(x)

    def decode_implementation(self, words, n):
        return wire.words_to_floats(words)
