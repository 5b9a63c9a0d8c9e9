"""TernGrad: every entry becomes 0 or plus or minus one scale, at random."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import ClassVar

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import numerics, rounding, wire

_BITS = 2


@register("ternary")
@dataclasses.dataclass(frozen=True)
class Ternary(Compressor):
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

    def num_words(self, n: int) -> int:
        return min(n, 1) + wire.num_level_words(n, _BITS)

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

    def encode_implementation(self, x, seed):
        n = x.shape[0]
        if n == 0:
            return tf.zeros([0], tf.int32)
        scale = self.scale(x)
        levels = self.levels(x, scale, seed)
        planes = numerics.fuse(wire.pack_levels, n)(levels, _BITS)
        return tf.concat([wire.floats_to_words(scale), planes], axis=0)

    def scale(self, x: tf.Tensor) -> tf.Tensor:
        """The largest magnitude after clipping, s: float32[n] -> float32[1]."""
        n = x.shape[0]
        if n == 0:
            return tf.zeros([1])
        scale = numerics.max_magnitude(x[None])
        return scale if self.clip is None else numerics.fuse(_clipped, n)(x, scale, self.clip)

    def value_of_one(self, scale: tf.Tensor, n: int) -> tf.Tensor:
        """What a level of 1 decodes to."""
        return scale

    def levels(self, x: tf.Tensor, scale: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """What stands for `x` in units of `scale`: int8[n], each -1, 0 or 1.

        Args:
            x: float32[n], clipped to `scale`.
            scale: float32[1], of `x` or of several vectors.
            seed: int32[2].
        """
        n = x.shape[0]
        return numerics.fuse(_levels, n)(x, scale, rounding.draw(seed, n))

    def decode_implementation(self, words, n):
        if n == 0:
            return tf.zeros([0])
        return numerics.fuse(_decode, n)(words, n)


def _clipped(x, largest, clip):
    """The largest magnitude after clipping: float32[1]."""
    n = x.shape[0]
    y = numerics.relative(x, largest)
    mean = numerics.sums(y[None]) / n
    variance = numerics.sums(tf.square(y)[None]) / n - tf.square(mean)
    deviation = tf.cast(tf.sqrt(tf.maximum(variance, tf.square(mean))), tf.float32)
    return largest * tf.minimum(clip * deviation, 1.0)


def _levels(x, scale, draws):
    probabilities = tf.clip_by_value(numerics.relative(x, scale), -1.0, 1.0)
    return tf.cast(rounding.stochastic(probabilities, draws), tf.int8)


def _decode(words, n):
    levels = wire.unpack_levels(words[1:], _BITS, n)
    return wire.words_to_floats(words[:1]) * tf.cast(levels, tf.float32)
