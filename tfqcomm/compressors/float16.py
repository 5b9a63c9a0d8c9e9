"""Half-width floats: two elements to a word."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import tensorflow as tf

from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import numerics, wire


@register("float16")
@dataclasses.dataclass(frozen=True)
class Float16(Compressor):
    """IEEE half precision, 16 bits per element.

    Relative error at most 2^-11 for 6.1e-5 <= |x| <= 65504; absolute error 2^-25 below, and
    larger finite values become 65504. Sums over replicas are kept in range by who adds them up.

    Example:
    >>> Float16().decode(Float16().encode([2049.0, 1e6]), n=2).numpy()
    array([ 2048., 65504.], dtype=float32)
    """

    elementwise: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    sum_dtype: ClassVar[tf.DType] = tf.float16

    def num_words(self, n: int) -> int:
        return (n + 1) // 2

    def error_bound(self, n: int) -> float:
        return 2.0**-22  # where magnitudes are in the range above

    def encode_implementation(self, x, seed):
        return wire.halves_to_words(_cast(x, tf.float16))

    def decode_implementation(self, words, n):
        return tf.cast(wire.words_to_halves(words, n, tf.float16), tf.float32)


@register("bfloat16")
@dataclasses.dataclass(frozen=True)
class BFloat16(Compressor):
    """The upper half of a float32, 16 bits per element.

    Relative error at most 2^-8 over the whole range of float32: nothing over- or underflows.

    Example:
    >>> BFloat16().decode(BFloat16().encode([257.0, 1e5]), n=2).numpy()
    array([  256., 99840.], dtype=float32)
    """

    elementwise: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    sum_dtype: ClassVar[tf.DType] = tf.bfloat16

    def num_words(self, n: int) -> int:
        return (n + 1) // 2

    def error_bound(self, n: int) -> float:
        return 2.0**-16

    def encode_implementation(self, x, seed):
        return wire.halves_to_words(_cast(x, tf.bfloat16))

    def decode_implementation(self, words, n):
        return tf.cast(wire.words_to_halves(words, n, tf.bfloat16), tf.float32)


def _cast(x, dtype):
    return numerics.fuse(numerics.saturating_cast, x.shape[0])(x, dtype)
