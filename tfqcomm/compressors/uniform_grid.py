"""Uniform grid: the nearest of equally spaced levels."""

from __future__ import annotations

import dataclasses
import math

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.quantizer import Quantizer
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import numerics, rounding, wire

_FIXED_SCALE = 0.5


@register("uniform_grid")
@dataclasses.dataclass(frozen=True)
class UniformGrid(Quantizer):
    """s times the nearest of the 2^bits - 1 levels j / L to x / s, L = 2^(bits - 1) - 1.

    Half-way values go to the even j. Made for the weights of a quantized downlink; with
    `range="absmax"` also fit for gradients with error feedback. Entries beyond `range="fixed"`
    saturate, so what is always beyond, such as the scales of a batch normalization, is clipped
    for ever; there is no bound below 1 on its relative error, so `error_feedback="auto"` is off.

    Payload: with "absmax" s as float32; then `bits` bit planes, or bytes, of the signed j. With
    "fixed" there is nothing else, and the one pattern left over stands for what is not finite.

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

    @property
    def scales_per_segment(self) -> int:  # type: ignore[override]  # it depends on an argument
        """One, or none where the range is fixed."""
        return 1 if self.range == "absmax" else 0

    def num_body_words(self, n: int) -> int:
        return wire.num_level_words(n, self.bits)

    def error_bound(self, n: int) -> float:
        if self.range == "fixed":
            return 1.0  # entries far beyond the range are as good as lost
        return rounding.error_bound(_largest_level(self.bits), n)

    def measure(self, x, layout):
        if self.range == "fixed":
            return tf.zeros([0, len(layout.sizes)])
        return layout.max_magnitude(x)[None]

    def quantize(self, x, scales, layout, seed):
        if self.range == "fixed":
            return wire.pack_levels(_fixed_levels(x, self.bits), self.bits)
        y = numerics.relative(layout.rows(x), layout.spread(scales[0]))
        levels = tf.cast(tf.round(y * _largest_level(self.bits)), tf.int32)
        return wire.pack_levels(layout.flat(tf.cast(levels, tf.int8)), self.bits)

    def restore(self, scales, body, layout):
        largest, levels = (
            _largest_level(self.bits),
            wire.unpack_levels(body, self.bits, layout.size),
        )
        if self.range == "fixed":
            values = rounding.level_values(levels, largest, tf.constant(_FIXED_SCALE))
            return tf.where(levels < -largest, math.nan, values)
        scale = layout.spread(scales[0])
        return layout.flat(rounding.level_values(layout.rows(levels), largest, scale))


def _fixed_levels(x, bits):
    y = tf.clip_by_value(x, -_FIXED_SCALE, _FIXED_SCALE) / _FIXED_SCALE
    levels = tf.cast(tf.round(y * _largest_level(bits)), tf.int32)
    not_finite = -_largest_level(bits) - 1
    return tf.cast(tf.where(numerics.is_finite(x), levels, not_finite), tf.int8)


def _largest_level(bits):
    return (1 << bits - 1) - 1
