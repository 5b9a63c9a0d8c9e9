"""Uniform grid: the nearest of equally spaced levels."""

from __future__ import annotations

import dataclasses
import math

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import numerics, rounding, wire

_FIXED_SCALE = 0.5


@register("uniform_grid")
@dataclasses.dataclass(frozen=True)
class UniformGrid(Compressor):
    """s times the nearest of the 2^bits - 1 levels j / L to x / s, L = 2^(bits - 1) - 1.

    Half-way values go to the even j. Made for the weights of a quantized downlink; with
    `range="absmax"` also fit for gradients with error feedback. Entries beyond `range="fixed"`
    saturate, so what is always beyond, such as the scales of a batch normalization, is clipped
    for ever; there is no bound below 1 on its relative error, so `error_feedback="auto"` is off.

    Payload: with "absmax" s as float32; then `bits` bit planes of the signed j. With "fixed" there
    is nothing else, and the one pattern left over stands for what is not finite.

    Differences from the paper: its levels are j / 2^k in k + 2 bits, which leaves almost half of
    the patterns unused.

    Args:
        bits: Per element, 2 to 8.
        range: What s is: "absmax", the largest magnitude of the tensor; or "fixed", 0.5.

    Example:
    >>> uniform_grid = UniformGrid(3)
    >>> uniform_grid.decode(uniform_grid.encode([3.0, -1.2, 0.4, 1.5]), n=4).numpy()
    array([ 3., -1.,  0.,  2.], dtype=float32)

    References:
        Chen, Shen, Huang, Liu, "Quantized Adam with Error Feedback", arXiv 2004.14180 (the
        weight quantization).
    """

    bits: int = 8  # lower => more compression
    _: dataclasses.KW_ONLY
    range: str = "absmax"

    def __post_init__(self):
        checks.integer_between("bits", self.bits, 2, 8)
        checks.one_of("range", self.range, ("absmax", "fixed"))

    def num_words(self, n: int) -> int:
        scales = min(n, 1) if self.range == "absmax" else 0
        return scales + wire.num_level_words(n, self.bits)

    def error_bound(self, n: int) -> float:
        if self.range == "fixed":
            return 1.0  # entries far beyond the range are as good as lost
        return rounding.error_bound(_largest_level(self.bits), n)

    def encode_implementation(self, x, seed):
        n = x.shape[0]
        if n == 0:
            return tf.zeros([0], tf.int32)
        if self.range == "fixed":
            levels = numerics.fuse(_fixed_levels, n)(x, self.bits)
            return numerics.fuse(wire.pack_levels, n)(levels, self.bits)
        scale = numerics.max_magnitude(x[None])  # float32[1]
        levels = numerics.fuse(_levels, n)(x, scale, self.bits)
        planes = numerics.fuse(wire.pack_levels, n)(levels, self.bits)
        return tf.concat([wire.floats_to_words(scale), planes], axis=0)

    def decode_implementation(self, words, n):
        if n == 0:
            return tf.zeros([0])
        decode = _decode_fixed if self.range == "fixed" else _decode
        return numerics.fuse(decode, n)(words, self.bits, n)


def _levels(x, scale, bits):
    levels = tf.round(numerics.relative(x, scale) * _largest_level(bits))
    return tf.cast(tf.cast(levels, tf.int32), tf.int8)


def _fixed_levels(x, bits):
    y = tf.clip_by_value(x, -_FIXED_SCALE, _FIXED_SCALE) / _FIXED_SCALE
    levels = tf.cast(tf.round(y * _largest_level(bits)), tf.int32)
    not_finite = -_largest_level(bits) - 1
    return tf.cast(tf.where(numerics.is_finite(x), levels, not_finite), tf.int8)


def _decode(words, bits, n):
    levels = wire.unpack_levels(words[1:], bits, n)
    return rounding.level_values(levels, _largest_level(bits), wire.words_to_floats(words[:1]))


def _decode_fixed(words, bits, n):
    largest, levels = _largest_level(bits), wire.unpack_levels(words, bits, n)
    values = rounding.level_values(levels, largest, tf.constant(_FIXED_SCALE))
    return tf.where(levels < -largest, math.nan, values)


def _largest_level(bits):
    return (1 << bits - 1) - 1
