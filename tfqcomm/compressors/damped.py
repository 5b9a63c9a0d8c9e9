"""Codecs as an exchange uses them: with error feedback they contract, without they are unbiased."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from tfqcomm.compressors.base import Compressor
from tfqcomm.kernels.layout import Layout

_DECLARED = (
    "linear",
    "deterministic",
    "sparse",
    "integer",
    "compilable",
    "compiled_on_gpu",
    "elementwise",
    "sum_dtype",
    "header_words",
)


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
        for name in _DECLARED:
            object.__setattr__(self, name, getattr(self.codec, name))

    def num_words(self, n: int) -> int:
        return self.codec.num_words(n)

    def error_bound(self, n: int) -> float | None:
        return self.codec.damped_error_bound(n)

    @property
    def fusable(self) -> bool:
        """As of C."""
        return self.codec.fusable

    def row(self, elements):
        return self.codec.row(elements)

    def bucket_words(self, layout):
        return self.codec.bucket_words(layout)

    def encode_bucket(self, x, layout, seed):
        return self.codec.encode_bucket(x, layout, seed)

    def decode_bucket(self, words, layout):
        return self._damp(self.codec.decode_bucket(words, layout), layout)

    def encoded_finite(self, x, words, layout):
        return self.codec.encoded_finite(x, words, layout)

    def mean_finite(self, mean, words, layout):
        return self.codec.mean_finite(mean, words, layout)

    def encode_implementation(self, x, seed):
        return self.codec.encode(x, seed)

    def decode_implementation(self, words, n):
        return self._damp(self.codec.decode(words, n), Layout((n,)))

    @property
    def _levels(self) -> Any:
        """C, where it is `integer`: its levels may share a scale."""
        return self.codec

    def scales(self, x: tf.Tensor, layout: Layout) -> tf.Tensor:
        """Those of C, if it is a codec whose scales replicas may share."""
        return self._levels.scales(x, layout)

    def levels(self, x: tf.Tensor, scales: tf.Tensor, layout: Layout, seed: tf.Tensor) -> tf.Tensor:
        """Those of C."""
        return self._levels.levels(x, scales, layout, seed)

    def values_of_one(self, scales: tf.Tensor, layout: Layout) -> tf.Tensor:
        """What a level of 1 decodes to."""
        return self._levels.values_of_one(scales, layout) * self._factors(layout)

    def _damp(self, x, layout):
        factors = self._factors(layout)
        if len(set(factors)) == 1:
            return x * tf.constant(factors[0])
        return layout.flat(layout.rows(x) * layout.spread(tf.constant(factors)))

    def _factors(self, layout):
        return np.array([self.codec.damping(n) for n in layout.sizes], np.float32)
