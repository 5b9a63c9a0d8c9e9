"""Which entries of a vector are its largest, exactly, in a few passes instead of a sort.

`tf.math.top_k` of a whole tensor takes many times as long as reading it. Legend: n elements,
k of them wanted, c candidates; keys are `numerics.magnitude_keys`, so 31 bits.
"""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.kernels import numerics

SORT_UP_TO = 32768  # elements; below, sorting the maxima and the candidates beats counting them
_LOW_BITS = 15  # of a key: counted in the second round, the upper 16 in the first
_UPPER_SIZE, _LOWER_SIZE = 1 << 16, 1 << _LOW_BITS
_FOLDS = (1, 2, 4, 8)


def largest(x: tf.Tensor, k: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The `k` entries of largest magnitude, ties to the lowest position.

    A lower bound of the k-th largest magnitude leaves few candidates, and those are trimmed to
    exactly k, by counting if they are many. NaN and infinities are larger than everything.

    Args:
        x: float32[n]
        k: 1 <= k <= n

    Returns:
        Positions int32[k], ascending, and values float32[k].
    """
    n = x.shape[0]
    if k == n:
        return tf.range(n), x
    positions, values = _candidates(x, k)  # [c] each
    keys = numerics.magnitude_keys(values)
    if n <= SORT_UP_TO and _fold(n, k) > 1:
        kept = tf.sort(tf.math.top_k(keys, k, sorted=False).indices)
    else:
        kept = tf.ensure_shape(_trim(keys, k), [k])
    return tf.gather(positions, kept), tf.gather(values, kept)


def largest_of_any_number(x: tf.Tensor, k: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Like `largest`, for a `k` that is known at run time only: two more passes over `x`."""
    kept = _trim(numerics.magnitude_keys(x), k)
    return kept, tf.gather(x, kept)


def _fold(n, k):
    """Into how many rows the vector is folded: the more, the fewer maxima, but more candidates."""
    return max(f for f in _FOLDS if f * f * k <= n or f == 1)


def _trim(keys, k):
    """Positions of the `k` largest keys, the first of those that tie at the end."""
    threshold, above = kth_largest(keys, k)
    ties = tf.equal(keys, threshold)
    last_tie = tf.gather(_positions(ties), k - above - 1)
    in_time = tf.range(tf.size(keys)) <= last_tie
    return _positions((keys > threshold) | (ties & in_time))


def kth_largest(keys: tf.Tensor, k: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The `k`-th largest of int32[c] keys, and how many are larger, by counting digits."""
    upper = tf.bitwise.right_shift(keys, _LOW_BITS)
    digit, above = _kth_digit(upper, k, _UPPER_SIZE)
    lower = tf.bitwise.bitwise_and(keys, _LOWER_SIZE - 1)
    lower = tf.where(tf.equal(upper, digit), lower, _LOWER_SIZE)  # out of range: not counted
    low_digit, above_within = _kth_digit(lower, k - above, _LOWER_SIZE)
    return digit * _LOWER_SIZE + low_digit, above + above_within


def _kth_digit(digits, k, size):
    """The `k`-th largest of the integers below `size`, and how many are larger."""
    counts = tf.raw_ops.DenseBincount(input=digits, size=size, weights=tf.constant([], tf.int32))
    # Two short searches: `tf.cumsum` over all the counts would take longer than counting.
    counts = tf.reshape(counts, [-1, 256])
    row, above = _kth_bin(tf.reduce_sum(counts, axis=1), k)
    column, above_within = _kth_bin(tf.gather(counts, row), k - above)
    return row * 256 + column, above + above_within


def _kth_bin(counts, k):
    at_least = tf.cumsum(counts, reverse=True)
    found = tf.math.count_nonzero(at_least >= k, dtype=tf.int32) - 1
    return found, tf.gather(at_least, found) - tf.gather(counts, found)


def _candidates(x, k):
    """Ascending positions and their values, the k largest among them; seldom many more than k.

    The vector is folded into rows. If k columns hold a magnitude of at least b, so do k entries:
    the k-th largest of the columns' maxima is a bound that cannot fail, however the data is
    arranged. Of the columns that reach it there are k, unless many tie.
    """
    n = x.shape[0]
    fold = _fold(n, k)
    columns = n // fold
    maxima = numerics.fuse(_column_maxima, n)(x, fold)  # int32[columns]
    if n <= SORT_UP_TO and fold > 1:
        bound = tf.math.top_k(maxima, k).values[k - 1]
    else:
        upper = tf.bitwise.right_shift(maxima, _LOW_BITS)
        bound = _kth_digit(upper, k, _UPPER_SIZE)[0] * _LOWER_SIZE
    # Fewer than k columns are non-zero: the first k positions hold all zeros that may be needed.
    sparse = tf.equal(bound, 0)
    bound = tf.maximum(bound, 1)
    chosen = _positions((maxima >= bound) | (sparse & (tf.range(columns) < k)))
    found = tf.gather(tf.reshape(x[: fold * columns], [fold, columns]), chosen, axis=1)
    rows = tf.range(fold)[:, None]
    positions = rows * columns + chosen  # [fold, chosen], ascending row by row
    reaching = (numerics.magnitude_keys(found) >= bound) | (sparse & tf.equal(rows, 0))
    kept = _positions(tf.reshape(reaching, [-1]))
    rest = tf.range(fold * columns, n)  # after the last whole column
    return (
        tf.concat([tf.gather(tf.reshape(positions, [-1]), kept), rest], 0),
        tf.concat([tf.gather(tf.reshape(found, [-1]), kept), x[fold * columns :]], 0),
    )


def _column_maxima(x, fold):
    columns = x.shape[0] // fold
    keys = numerics.magnitude_keys(x[: fold * columns])
    return tf.reduce_max(tf.reshape(keys, [fold, columns]), axis=0)


def _positions(mask):
    return tf.cast(tf.where(mask)[:, 0], tf.int32)


def scatter(positions: tf.Tensor, values: tf.Tensor, n: int) -> tf.Tensor:
    """float32[n] that is `values` at `positions` (all different) and zero elsewhere.

    The oldest op for it is by far the quickest: `tf.scatter_nd` takes eight times as long.
    """
    return tf.raw_ops.SparseToDense(
        sparse_indices=positions,
        output_shape=[n],
        sparse_values=values,
        default_value=0.0,
        validate_indices=False,  # whether they ascend
    )
