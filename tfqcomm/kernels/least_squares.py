"""Which entries the ternary vector nearest to a given one keeps, without sorting all of it.

Of the multiples s t of ternary vectors t in {-1, 0, 1}^n that keep the k largest magnitudes, with
the sum S_k, the nearest to x has s = S_k / k and ||x - s t||^2 = ||x||^2 - S_k^2 / k. So the best k
maximises the gain S_k^2 / k. Gains are exact (float64) where magnitudes change their upper 16 bits;
between two such bounds, upper bounds of the gain leave few entries to sort.
"""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.kernels import numerics

SORT_UP_TO = 8192  # elements; below, sorting all of them beats counting them
_LOW_BITS = 15  # of a key; the upper 16 number its bin
_BINS, _WIDTH = 1 << 16, 1 << _LOW_BITS
_LARGEST_FINITE = 0x7F7FFFFF
_SLACK = 1 + 1e-12  # relative, for rounding


def ternary_bound(x: tf.Tensor) -> tf.Tensor:
    """The bound above which the nearest multiple of a ternary vector keeps magnitudes.

    Args:
        x: float32[n], n > 0. Entries that are not finite are always kept.

    Returns:
        int32 scalar, to be compared with `numerics.magnitude_keys(x)`.
    """
    n = x.shape[0]
    if n <= SORT_UP_TO:
        nothing = (0, tf.constant(0.0, tf.float64))
        return _best_bound(numerics.magnitude_keys(x), *nothing, tf.constant(-1.0, tf.float64), 0)
    keys, bins, magnitudes = numerics.fuse(_keys_bins_magnitudes, n)(x)
    counts = tf.raw_ops.DenseBincount(input=bins, size=_BINS, weights=tf.constant([], tf.int32))
    sums = tf.raw_ops.DenseBincount(input=bins, size=_BINS, weights=magnitudes)
    least, largest, *others = _candidates(counts, sums)
    return _best_bound(tf.boolean_mask(keys, (keys >= least) & (keys <= largest)), *others)


def _keys_bins_magnitudes(x):
    keys = numerics.magnitude_keys(x)
    finite = tf.where(numerics.is_finite(x), tf.abs(x), 0.0)
    return keys, tf.bitwise.right_shift(keys, _LOW_BITS), tf.cast(finite, tf.float64)


def _candidates(counts, sums):
    """Where the best bound may lie, given how many magnitudes each bin holds and their sums.

    Returns:
        The least and the largest key of the candidates; how many entries are above these, and
        their sum; the best gain that keeps whole bins, and its bound.
    """
    counts, sums = tf.reverse(counts, [0]), tf.reverse(sums, [0])  # from large magnitudes down
    lowest_keys = tf.bitwise.left_shift(tf.range(_BINS - 1, -1, -1), _LOW_BITS)
    above, sum_above = tf.cumsum(counts, exclusive=True), tf.cumsum(sums, exclusive=True)
    gains = _gain(sum_above + sums, above + counts)
    best = tf.argmax(gains)
    # S_k is at most what it is with the first entries of a bin as large and the others as small
    # as can be: convex gains on both sides, so they are largest at the ends or where these meet.
    low, high = _value(lowest_keys), _value(lowest_keys + _WIDTH - 1)
    excess = sums - tf.cast(counts, tf.float64) * low
    large = tf.math.divide_no_nan(excess, high - low)
    meeting = _gain(sum_above + large * high, tf.cast(above, tf.float64) + large)
    inside = (excess > 0) & (meeting * _SLACK >= tf.gather(gains, best))
    order = tf.range(_BINS)
    first = tf.reduce_min(tf.where(inside, order, _BINS - 1))
    last = tf.reduce_max(tf.where(inside, order, 0))  # before `first`, and no key fits, if none is
    return (
        tf.gather(lowest_keys, last),
        tf.gather(lowest_keys, first) + _WIDTH - 1,
        tf.gather(above, first),
        tf.gather(sum_above, first),
        tf.gather(gains, best),
        tf.gather(lowest_keys, best) - 1,
    )


def _best_bound(keys, above, sum_above, gain, bound):
    """The best of the bounds just below each of `keys`, and of `bound`, whose gain is known."""
    keys = tf.sort(keys, direction="DESCENDING")
    gains = _gain(sum_above + tf.cumsum(_value(keys)), above + 1 + tf.range(tf.size(keys)))
    best = tf.argmax(tf.concat([[gain], gains], 0))
    bound = tf.gather(tf.concat([[bound], keys - 1], 0), best)
    return tf.clip_by_value(bound, 0, _LARGEST_FINITE)


def _gain(total, count):
    return tf.math.divide_no_nan(tf.square(total), tf.cast(count, tf.float64))


def _value(keys):
    finite = tf.minimum(keys, _LARGEST_FINITE)
    return tf.cast(tf.bitcast(finite, tf.float32), tf.float64)
