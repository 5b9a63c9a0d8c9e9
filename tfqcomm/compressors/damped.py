"""Codecs as an exchange uses them: with error feedback they contract, without they are unbiased."""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf

from tfqcomm.compressors.base import Compressor


def for_exchange(compressor: Compressor, error_feedback: bool) -> Compressor:
    """The codec that stands for `compressor` where there is error feedback, or none."""
    if not error_feedback:
        return compressor.without_feedback()
    return compressor if compressor.damping(2) == 1 else Damped(compressor)


@dataclasses.dataclass(frozen=True)
class Damped(Compressor):
    """a C(x), with the factor a = `damping(n)` of a codec C that does not contract by itself.

    Error feedback needs a contraction. An unbiased C with E ||C(x) - x||^2 <= omega ||x||^2 and
    a = 1 / (1 + omega) is one: E ||a C(x) - x||^2 <= omega / (1 + omega) ||x||^2. What the factor
    takes away comes with later messages. The words are those of C.

    Args:
        codec: C.

    References:
        Beznosikov, Horvath, Richtarik, Safaryan, "On Biased Compression for Distributed Learning",
        arXiv 2002.12410 (from unbiased to biased by scaling).
    """

    codec: Compressor

    def __post_init__(self):
        for name in ("linear", "deterministic", "sparse", "integer", "sum_dtype", "header_words"):
            object.__setattr__(self, name, getattr(self.codec, name))

    def num_words(self, n: int) -> int:
        return self.codec.num_words(n)

    def error_bound(self, n: int) -> float | None:
        return self.codec.damped_error_bound(n)

    def encode_implementation(self, x, seed):
        return self.codec.encode(x, seed)

    def decode_implementation(self, words, n):
        return self.codec.decode(words, n) * tf.constant(self._factor(n))

    @property
    def _levels(self) -> Any:
        """C, where it is `integer`: its levels may share a scale."""
        return self.codec

    def scale(self, x: tf.Tensor) -> tf.Tensor:
        """That of C, if it is a codec whose scale replicas may share."""
        return self._levels.scale(x)

    def levels(self, x: tf.Tensor, scale: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Those of C."""
        return self._levels.levels(x, scale, seed)

    def value_of_one(self, scale: tf.Tensor, n: int) -> tf.Tensor:
        """What a level of 1 decodes to."""
        return self._levels.value_of_one(scale, n) * tf.constant(self._factor(n))

    def _factor(self, n):
        return self.codec.damping(n) if n else 1.0
