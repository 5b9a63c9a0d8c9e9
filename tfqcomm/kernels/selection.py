"""Which entries of a vector are its largest, exactly, in a few passes instead of a sort.

`tf.math.top_k` of a whole tensor takes many times as long as reading it. A vector may consist of
segments, each with a number of its own to keep: the graph is the same for one and for hundreds.
Legend: n elements, S segments, c candidates; keys are `numerics.magnitude_keys`, so 31 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfqcomm.kernels import compiled_selection, counting, numerics

SORT_UP_TO = 32768  # elements of one segment; below, sorting beats counting
_KEY_BITS = 31
_FOLDS = (1, 2, 4, 8)
_COARSER = 2  # groups that are counted as one
_ROW = 512  # elements that share a bound
_MOST_BINS = 1 << 20  # of all segments together: counts that stay in the cache
_ROUND_BITS = 11  # of a key, counted at a time where candidates are trimmed


@dataclasses.dataclass(frozen=True)
class _Segments:
    """Where segments that are not empty begin and end, and how many entries each keeps.

    Attributes:
        starts, ends: int[S]
        ks: int32[S], known when traced or not
        n: elements of all
        fold: elements of a group, of which the largest stands for all
    """

    starts: np.ndarray
    ends: np.ndarray
    ks: tf.Tensor
    n: int
    fold: int

    @property
    def number(self) -> int:
        return len(self.starts)

    @property
    def rows(self) -> int:
        return self.n // _ROW


def largest(x: tf.Tensor, k: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The `k` entries of largest magnitude, ties to the lowest position.

    Args:
        x: float32[n]
        k: 1 <= k <= n

    Returns:
        Positions int32[k], ascending, and values float32[k].
    """
    return largest_of_segments(x, (x.shape[0],), (k,))


def largest_of_segments(
    x: tf.Tensor, sizes: Sequence[int], ks: Sequence[int]
) -> tuple[tf.Tensor, tf.Tensor]:
    """The entries of largest magnitude of each segment, ties to the lowest position.

    A lower bound of a segment's k-th largest magnitude leaves few candidates, and those are
    trimmed to exactly k by counting. NaN and infinities are larger than everything.

    Args:
        x: float32[n], the segments side by side.
        sizes: of the segments; they add up to n.
        ks: how many entries each keeps, from 1 to its size, or 0 of an empty one.

    Returns:
        Positions in `x` int32[sum(ks)], ascending, and values float32[sum(ks)].
    """
    n, kept = sum(sizes), sum(ks)
    if kept == n:
        return tf.range(n), x
    if numerics.compiling():
        return compiled_selection.largest_of_segments(x, sizes, ks)
    if n <= SORT_UP_TO and len(sizes) == 1:
        # Of equal keys it takes the first.
        positions = tf.sort(tf.math.top_k(numerics.magnitude_keys(x), kept, sorted=False).indices)
        return positions, tf.gather(x, positions)
    positions, values = _select(x, sizes, ks, _fold(n, kept))
    return tf.ensure_shape(positions, [kept]), tf.ensure_shape(values, [kept])


def largest_of_any_number(x: tf.Tensor, k: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Like `largest`, for a `k` that is known at run time only; quick where that is a few %."""
    n = x.shape[0]
    return _select(x, (n,), tf.reshape(k, [1]), _fold(n, n // 64))


def _fold(n, k):
    """The more elements in a group, the fewer maxima there are, but the more candidates."""
    return max(f for f in _FOLDS if f * f * k <= n or f == 1)


def _select(x, sizes, ks, fold):
    ends = np.cumsum(sizes, dtype=np.int64)
    starts = ends - sizes
    if not isinstance(ks, tf.Tensor):
        filled = np.greater(sizes, 0)
        starts, ends = starts[filled], ends[filled]
        ks = tf.constant(np.compress(filled, ks), tf.int32)
    segments = _Segments(starts, ends, ks, int(sum(sizes)), fold)
    chosen, found = _candidates(x, segments)
    return _trim(chosen, found, segments)


def _candidates(x, segments):
    """Groups with the largest entries of all segments: int32[g], ascending, float32[g, fold].

        x         | ........ ........ | ..[..... ........ | ....].[. ........ | ... | [ a segment
        maxima    | m        m        | m        m        | m        m        |     | of groups
        bounds    | b                 | min of two        | min of three      |     | of rows

    A group is chosen if it reaches its row's bound, and so are those after the last whole row,
    the very last of which is padded with zeros.
    """
    fold, whole = segments.fold, segments.rows * _ROW
    maxima = numerics.fuse(_maxima, segments.n)(x[:whole], fold)
    digits = numerics.fuse(_digits, segments.n)(maxima, _digit_shift(segments))
    bounds = _row_bounds(_lower_bounds(digits, segments), segments)  # int32[rows]
    chosen = _positions(tf.reshape(maxima >= bounds[:, None], [-1]))
    found = tf.gather(tf.reshape(x[:whole], [-1, fold]), chosen)
    if whole == segments.n:
        return chosen, found
    rest = tf.range(whole // fold, -(-segments.n // fold))
    padded = tf.pad(x[whole:], [[0, -segments.n % fold]])
    return tf.concat([chosen, rest], 0), tf.concat([found, tf.reshape(padded, [-1, fold])], 0)


def _maxima(x, fold):
    """Largest keys of groups: int32[rows, groups of a row]."""
    # Whole rows: XLA takes twice as long where it cannot cut the groups into equal parts.
    groups = tf.reshape(numerics.magnitude_keys(x), [-1, _ROW // fold, fold])
    return tf.reduce_max(groups, axis=2)


def _digits(maxima, shift):
    """The upper bits of the maxima of what is counted as one."""
    maxima = tf.reduce_max(tf.reshape(maxima, [-1, _COARSER]), axis=1)
    return tf.bitwise.right_shift(maxima, shift)


def _digit_shift(segments):
    """Lower bits of a key that are not counted at first: 15 for one segment, 20 at most.

    Then a bound is below what it could be by an eighth at most, and by less on average.
    """
    upper = int(np.log2(_MOST_BINS / segments.number))
    return _KEY_BITS - min(max(upper, _ROUND_BITS), 16)


def _lower_bounds(digits, segments):
    """Lower bounds of the segments' k-th largest keys: int32[S].

    If k disjoint parts hold a magnitude of at least b, so do k entries: the k-th largest of the
    maxima is a bound that cannot fail, however the data is arranged. The last part that counts
    for a segment may belong to the next one, too: then one more has to reach the bound.
    """
    part, parts = _COARSER * segments.fold, digits.shape[0]
    edges = np.minimum(-(-np.append(0, segments.ends) // part), parts)
    shared = (segments.ends % part > 0) & (segments.ends // part < parts)
    shift = _digit_shift(segments)
    counts = counting.tally_segments(digits, edges, 1 << _KEY_BITS - shift)
    digit, _ = counting.kth_digits(counts, segments.ks + tf.constant(shared.astype(np.int32)))
    return tf.bitwise.left_shift(digit, shift)


def _row_bounds(bounds, segments):
    """The least bound of the segments that a row touches: int32[rows].

    Where a segment's is zero its entries other than zero are too few, or in too few groups. They
    are all candidates, and with them as many of its first positions as it may need.
    """
    rows, starts = segments.rows, segments.starts
    start_rows = tf.constant(starts // _ROW, tf.int32)
    if segments.number == 1:
        least = tf.fill([rows + 1], bounds[0])
    else:
        begun = tf.cumsum(counting.tally(tf.constant(-(-starts // _ROW), tf.int32), rows + 1))
        least = tf.minimum(
            tf.gather(bounds, begun - 1),  # of the segment of its first element
            tf.math.unsorted_segment_min(bounds, start_rows, rows + 1),
        )
    sparse = tf.cast(tf.equal(bounds, 0), tf.int32)
    last_rows = (tf.constant(starts, tf.int32) + segments.ks - 1) // _ROW
    first = tf.math.unsorted_segment_sum(sparse, start_rows, rows + 2)
    after = tf.math.unsorted_segment_sum(sparse, last_rows + 1, rows + 2)
    needed = tf.cumsum(first - after)[:-1] > 0
    return tf.where(needed, 0, tf.maximum(least, 1))[:rows]


def _trim(chosen, found, segments):
    """Positions and values of the k largest entries of each segment, among those found.

    First by the upper bits of all that were found, then by the others of the few that are left.
    """
    fold, shift = segments.fold, _digit_shift(segments)
    keys = numerics.magnitude_keys(found)
    upper = tf.reshape(tf.bitwise.right_shift(keys, shift), [-1])
    edges = _edges_of_groups(chosen, segments)
    counts = counting.tally_segments(upper, edges, 1 << _KEY_BITS - shift)
    digits, above = counting.kth_digits(counts, segments.ks)
    bounds = _row_bounds(tf.bitwise.left_shift(digits, shift), segments)
    bounds = tf.concat([bounds, [0]], 0)  # of the entries after the last whole row
    of_group = tf.gather(bounds, chosen // (_ROW // fold))
    hits = _positions(tf.reshape(keys >= of_group[:, None], [-1]))
    positions = tf.gather(chosen, hits // fold) * fold + hits % fold
    if segments.n % fold:
        positions = positions[: _edges(positions, [segments.n])[0]]  # without padding
        hits = hits[: tf.size(positions)]
    keys = tf.gather(tf.reshape(keys, [-1]), hits)
    kept = _exact(keys, positions, digits, above, segments)
    return tf.gather(positions, kept), tf.gather(tf.reshape(found, [-1]), tf.gather(hits, kept))


def _edges_of_groups(chosen, segments):
    """Where the first entry of each segment stands, or would, among those of the chosen groups."""
    groups, lanes = np.divmod(segments.starts, segments.fold)
    place = _edges(chosen, tf.constant(groups, tf.int32))
    there = tf.equal(tf.gather(tf.concat([chosen, [-1]], 0), place), groups.astype(np.int32))
    inside = tf.where(there, tf.constant(lanes, tf.int32), 0)
    return tf.concat([place, [tf.size(chosen)]], 0) * segments.fold + tf.concat([inside, [0]], 0)


def _exact(keys, positions, digits, above, segments):
    """Indices of each segment's k largest of int32[c] keys, the first of those that tie.

    Args:
        digits: int32[S], upper bits of the k-th largest keys.
        above: int32[S], how many keys have larger ones.
    """
    starts = tf.constant(segments.starts, tf.int32)
    edges = tf.concat([_edges(positions, starts), [tf.size(positions)]], 0)
    many = segments.number > 1
    owner = tf.cumsum(counting.tally(edges[1:-1], tf.size(keys))) if many else None  # of each key
    low = _digit_shift(segments)
    thresholds = digits
    while low:
        high, low = low, max(low - (_ROUND_BITS if many else 15), 0)
        size = 1 << high - low
        lower = tf.bitwise.bitwise_and(tf.bitwise.right_shift(keys, low), size - 1)
        matches = tf.equal(tf.bitwise.right_shift(keys, high), _of_owner(thresholds, owner))
        lower = tf.where(matches, lower, size)  # out of range: not counted
        counts = counting.tally_segments(lower, edges, size)
        digit, larger = counting.kth_digits(counts, segments.ks - above)
        thresholds, above = thresholds * size + digit, above + larger
    threshold = _of_owner(thresholds, owner)
    ties = tf.gather(positions, _positions(tf.equal(keys, threshold)))
    last_ties = tf.gather(ties, _edges(ties, starts) + segments.ks - above - 1)  # positions
    in_time = positions <= _of_owner(last_ties, owner)
    return _positions((keys > threshold) | (tf.equal(keys, threshold) & in_time))


def _of_owner(values, owner):
    return values[0] if owner is None else tf.gather(values, owner)


def kth_largest(keys: tf.Tensor, k: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The `k`-th largest of int32[c] keys, and how many are larger, by counting digits."""
    prefix, above = tf.constant([0]), tf.constant([0])
    for low, size in ((15, 1 << 16), (0, 1 << 15)):
        digits = tf.bitwise.bitwise_and(tf.bitwise.right_shift(keys, low), size - 1)
        if not low:
            matches = tf.equal(tf.bitwise.right_shift(keys, 15), prefix)
            digits = tf.where(matches, digits, size)  # out of range: not counted
        digit, larger = counting.kth_digits(counting.tally(digits, size)[None], k - above)
        prefix, above = prefix * size + digit, above + larger
    return prefix[0], above[0]


def _edges(positions, starts):
    return tf.searchsorted(positions, starts)  # where they would stand


def _positions(mask):
    return tf.cast(tf.where(mask)[:, 0], tf.int32)
