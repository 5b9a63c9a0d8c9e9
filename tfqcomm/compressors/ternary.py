"""TernGrad: every entry becomes 0 or plus or minus one scale, at random."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import ClassVar

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.quantizer import Quantizer
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import numerics, rounding, wire
from tfqcomm.kernels.layout import Layout

_BITS = 2


@register("ternary")
@dataclasses.dataclass(frozen=True)
class Ternary(Quantizer):
    """Clips, then sends s sign(x) with probability |x| / s, else 0; s is the largest magnitude.

    2 bits per element and a scale. Clipping to `clip` standard deviations keeps a single large
    entry from making all others noise. Unbiased for what is left after clipping, so for x itself
    with `clip=None` only. E ||C(x) - x||^2 <= (1 + clip^2 / 8) ||x||^2, and for `clip=None`
    (sqrt(n) - 1) / 2 ||x||^2: the error may be larger than x. Random bits: 16 per element, which
    round without bias to 2^-17 s.

    So `error_feedback="auto"` is off, as in the paper. True multiplies what is decoded by a factor
    a for which it contracts: 2 / (1 + sqrt(n)) for `clip=None`, where that is 1 / (1 + omega), and
    a = min(1 / (2 + clip^2 / 8), 2 / sqrt(clip sqrt(n))) otherwise, with which the error is at most
    (1 - a min(1, clip / sqrt(2 n))) ||x||^2.

    Payload: s as float32, then two bit planes.

    With `shared_scale=True` all replicas of an exchange take the largest of their scales, the
    paper's "scaler sharing". Levels are then summed as integers, in one ring all-reduce. On W
    workers it takes b = ceil(log2(2 W + 1)) bits per element, room for the sum, so that each sends
    2 (W - 1) / W b bits where an all-gather sends 2 (W - 1): less from 5 workers on. "two_phase",
    for which no scale is shared, sends less still, but rounds twice. Used alone, `encode` and
    `decode` share with nobody: nothing changes.

    The larger the scale, the more noise. Without the factor residuals of normal messages grow to
    15 times the message with 2.5 and a scale of their own, with the largest scale of 4 or 16
    workers to 30 or 60 times; with `clip=2` to 1.4 and 1.5.

    Differences from the paper: where |mean| exceeds the standard deviation, it takes its place;
    the paper's rule would clip a tensor of equal entries, or of one entry, to nothing. Where the
    scale is shared, entries are clipped to it alone, not to the replica's own limit before.

    Args:
        clip: Limit of magnitudes in standard deviations of the tensor; None for no limit. 2.5 is
            the paper's.
        shared_scale: Sum the replicas' levels; see above. Needs `schedule="auto"`.

    Example:
    >>> ternary = Ternary(clip=None)
    >>> ternary.decode(ternary.encode([2.0, -2.0, 0.0]), n=3).numpy()
    array([ 2., -2.,  0.], dtype=float32)

    References:
        Wen et al., "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep
        Learning", arXiv 1705.07878, Equations 1 to 3 and Section 4.
    """

    _: dataclasses.KW_ONLY
    clip: float | None = 2.5  # lower => less noise, more bias
    shared_scale: bool = False  # True => cheaper on many workers, more noise

    deterministic: ClassVar[bool] = False

    def __post_init__(self):
        checks.boolean("shared_scale", self.shared_scale)
        if self.clip is None:
            return
        real = isinstance(self.clip, numbers.Real) and not isinstance(self.clip, bool)
        if not real or not 0 < self.clip < math.inf:
            raise ValueError(
                f"Argument `clip` must be None or a positive number. Received: clip={self.clip!r}"
            )
        object.__setattr__(self, "clip", float(self.clip))

    @property
    def unbiased(self) -> bool:  # type: ignore[override]  # it depends on an argument
        """Whether the mean of `decode(encode(x, seed))` over seeds is x: without clipping."""
        return self.clip is None

    @property
    def integer(self) -> bool:  # type: ignore[override]  # it depends on an argument
        """Whether replicas of an exchange share the scale and sum their levels."""
        return self.shared_scale

    def num_body_words(self, n: int) -> int:
        return wire.num_level_words(n, _BITS)

    def error_bound(self, n: int) -> float:
        # The mean of (C(x) - x)^2 is s|x| - x^2 <= s^2 / 8 + x^2, and clipping makes s^2 at most
        # clip^2 times the mean of x^2. Without it s |x|_1 / |x|_2^2 is largest for a large entry
        # among equals.
        return (math.sqrt(n) - 1) / 2 if self.clip is None else 1 + self.clip**2 / 8

    def damping(self, n: int) -> float:
        if self.clip is None:
            return super().damping(n)
        # Half of the least 2 <clipped x, x> / (s |clipped x|_1): one large entry among n - 1 equal
        # ones of about sqrt(clip / sqrt(n)) times the root of the mean square.
        return min(1 / (1 + self.error_bound(n)), 2 / math.sqrt(self.clip * math.sqrt(n)))

    def damped_error_bound(self, n: int) -> float | None:
        if self.clip is None:
            return super().damped_error_bound(n)
        return 1 - self.damping(n) * min(1.0, self.clip / math.sqrt(2 * n))

    def measure(self, x, layout):
        return self.scales(x, layout)[None]

    def quantize(self, x, scales, layout, seed):
        return wire.pack_levels(self.levels(x, scales[0], layout, seed), _BITS)

    def restore(self, scales, body, layout):
        levels = wire.unpack_levels(body, _BITS, layout.size)
        return layout.flat(layout.spread(scales[0]) * tf.cast(layout.rows(levels), tf.float32))

    def scales(self, x: tf.Tensor, layout: Layout) -> tf.Tensor:
        """The largest magnitudes after clipping: float32[size] -> float32[tensors]."""
        scales = layout.max_magnitude(x)
        return scales if self.clip is None else _clipped(x, scales, layout, self.clip)

    def values_of_one(self, scales: tf.Tensor, layout: Layout) -> tf.Tensor:
        """What a level of 1 decodes to: float32[tensors]."""
        return scales

    def levels(self, x: tf.Tensor, scales: tf.Tensor, layout: Layout, seed: tf.Tensor) -> tf.Tensor:
        """What stands for `x` in units of its tensor's scale: int8[size], each -1, 0 or 1.

        Args:
            x: float32[size], clipped to the scales.
            scales: float32[tensors], of `x` or of several replicas.
            seed: int32[2].
        """
        y = numerics.relative(layout.rows(x), layout.spread(scales))
        y = layout.flat(tf.clip_by_value(y, -1.0, 1.0))
        return tf.cast(rounding.stochastic(y, rounding.draw(seed, layout.size)), tf.int8)


def _clipped(x, largest, layout, clip):
    """The largest magnitudes after clipping: float32[tensors]."""
    y = layout.flat(numerics.relative(layout.rows(x), layout.spread(largest)))
    mean = layout.sums(y) / layout.counts
    variance = layout.sums(tf.square(y)) / layout.counts - tf.square(mean)
    deviation = tf.cast(tf.sqrt(tf.maximum(variance, tf.square(mean))), tf.float32)
    return largest * tf.minimum(clip * deviation, 1.0)
