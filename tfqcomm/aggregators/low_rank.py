"""PowerSGD: all-reduces of the factors of matrices of low rank, 2 (W - 1) / W 4 r (n + m) bytes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Sequence

import tensorflow as tf

from tfqcomm.aggregators.base import Aggregator, BucketMean
from tfqcomm.aggregators.factors import Factors
from tfqcomm.kernels import low_rank, numerics


@dataclasses.dataclass(frozen=True)
class _Run:
    """What lies side by side in a bucket: matrices of one shape, or the rest.

    Attributes:
        keys: the tensors' names.
        sizes: their elements.
        matrix: rows and columns of each, n and m; None of the rest.
    """

    keys: tuple[str, ...]
    sizes: tuple[int, ...]
    matrix: tuple[int, int] | None

    @property
    def factored(self) -> bool:
        """Whether factors stand for it."""
        return self.matrix is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """[b, n, m], or [elements] of the rest."""
        return (sum(self.sizes),) if self.matrix is None else (len(self.keys), *self.matrix)


class LowRankMean(Aggregator):
    """Averages the factors of a bucket's matrices, those of one side in one all-reduce.

        left  = mean of M_w right^T        [left of all matrices] [the rest in full] [health]
        left  = orthonormal columns        on all replicas, the same bits
        right = mean of left^T M_w         [right of all matrices] [health]
        mean  = left right                 on all replicas, the same bits; right is kept

    M_w, n x m, is the message of replica w plus what it owes; `left` is the paper's P, `right` the
    transpose of its Q. What would be no smaller as factors (`PowerSGD.reduces`) is the rest. With
    `alternate` (ACP-SGD) a step has one of the two all-reduces: the other factor is that of the
    step before, with orthonormal columns; the rest goes with either.

    A replica owes what *its own* factor leaves out, M_w - left left^T M_w (Algorithm 2, line 9:
    "memorize local errors"). The authors' code subtracts the mean, left right. Summed over the
    replicas both are the same, and only sums matter: so are all means. Its own is smaller, as less
    of what a replica's message differs from the mean stays; and it is known before the second
    all-reduce, with which travels whether it is finite.

    Matrices of one shape that lie side by side are one batch: the graph grows with the number of
    shapes, and whoever fills a bucket should sort its tensors by shape.

    Nobody looks at all elements to see whether they are finite: a factor of a target that is not is
    not finite either, and factors say what their product cannot exceed.

    Args:
        shapes: of the tensors.
        factors: the warm start of all of them.
    """

    one_round = False

    def __init__(self, *args, shapes: Sequence[Sequence[int]], factors: Factors, **kwargs):
        super().__init__(*args, **kwargs)
        self.factors = factors
        self._runs = _runs(self.keys, shapes, self.compressor)
        self._batches = [run for run in self._runs if run.factored]

    def exchange(self, messages, healthy, step):
        parts = []
        for replica, message in enumerate(messages):
            with tf.device(self.transport.devices[replica]):
                parts.append(self._cut(self.target(replica, message)))
        if self.compressor.alternate and self._batches:
            return self._alternate(parts, healthy, step)
        return self._both(parts, healthy, step)

    def _both(self, parts, healthy, step):
        """PowerSGD: both factors in one step."""
        kept = self._variables("right")
        rights = [tf.convert_to_tensor(right) for right in kept]
        own = self._factors(low_rank.left_factor, parts, rights)
        payloads = [[*f, *rest] for f, (_, rest) in zip(own, parts, strict=True)]
        means, all_healthy, sent = self._mean(payloads, healthy)
        lefts, rest = self._orthonormal(means[: len(kept)], step), means[len(kept) :]
        own = self._factors(low_rank.right_factor, parts, lefts)
        residuals, healthy = self._residuals(parts, [(lefts, f) for f in own], healthy)
        if kept:
            rights, healthy_too, sent_too = self._mean(own, healthy)
            all_healthy, sent = all_healthy & healthy_too, sent + sent_too
        with tf.device(self.transport.device):
            units = [_unit_rows(right) for right in rights]
            mean = self._join(_products(lefts, rights), rest)
            all_healthy &= _finite_products(lefts, rights)
        updates = self._updates(kept, units)
        return BucketMean(mean, all_healthy, updates, sent, residuals)

    def _alternate(self, parts, healthy, step):
        """ACP-SGD: one factor in a step, the left one first."""
        kept = [*self._variables("left"), *self._variables("right")]
        even = self.factors.step % 2 == 0
        if tf.executing_eagerly():
            found = self._one(bool(even), parts, healthy, step)
        else:
            found = tf.cond(
                even,
                lambda: self._one(True, parts, healthy, step),
                lambda: self._one(False, parts, healthy, step),
            )
        mean, all_healthy, residuals, values, sent = found
        updates = self._updates(kept, values)
        return BucketMean(mean, all_healthy, updates, sent, residuals)

    def _one(self, left, parts, healthy, step):
        """A step that sends the left factor, or the right one.

        Returns:
            The mean of all tensors; whether all is well; for each replica its new residuals, if
            any; what is kept of both sides; bytes.
        """
        lefts, rights = [
            [tf.convert_to_tensor(v) for v in self._variables(side)] for side in ("left", "right")
        ]
        if left:
            held = [tf.linalg.matrix_transpose(v) for v in rights]
            held = [tf.linalg.matrix_transpose(v) for v in self._orthonormal(held, step)]
            own = self._factors(low_rank.left_factor, parts, held)
            pairs = [(f, held) for f in own]
        else:
            held = self._orthonormal(lefts, step)
            own = self._factors(low_rank.right_factor, parts, held)
            pairs = [(held, f) for f in own]
        residuals, healthy = self._residuals(parts, pairs, healthy)
        payloads = [[*f, *rest] for f, (_, rest) in zip(own, parts, strict=True)]
        means, all_healthy, sent = self._mean(payloads, healthy)
        found, rest = means[: len(held)], means[len(held) :]
        with tf.device(self.transport.device):
            pair = (found, held) if left else (held, found)
            mean = self._join(_products(*pair), rest)
            all_healthy &= _finite_products(*pair)
            values = [*found, *rights] if left else [*lefts, *found]
        return mean, all_healthy, residuals, values, tf.constant(sent, tf.int64)

    def _variables(self, side) -> list[tf.Variable]:
        """The factors of one side, of each batch."""
        return [
            self.factors.variable(side, run.keys, run.matrix[0 if side == "left" else 1])
            for run in self._batches
            if run.matrix is not None
        ]

    def _cut(self, vector):
        """The matrices of each batch, and the rest: float32[b, n, m] and float32[elements]."""
        pieces = tf.split(vector, [sum(run.sizes) for run in self._runs]) if self._runs else []
        pieces = [
            (run, tf.reshape(piece, run.shape))
            for run, piece in zip(self._runs, pieces, strict=True)
        ]
        matrices = [piece for run, piece in pieces if run.factored]
        return matrices, [piece for run, piece in pieces if not run.factored]

    def _join(self, matrices, rest):
        """Inverse of `_cut`."""
        matrices, rest = iter(matrices), iter(rest)
        pieces = [next(matrices if run.factored else rest) for run in self._runs]
        pieces = [tf.reshape(piece, [-1]) for piece in pieces] or [tf.zeros([0])]
        return tf.concat(pieces, 0) if len(pieces) > 1 else pieces[0]

    def _factors(self, factor, parts, others):
        """For each replica, for each batch: one side's factor, given the other's."""
        found = []
        for replica, (matrices, _) in enumerate(parts):
            with tf.device(self.transport.devices[replica]):
                found.append([factor(m, f) for m, f in zip(matrices, others, strict=True)])
        return found

    def _orthonormal(self, factors, step):
        """Left factors with orthonormal columns."""
        with tf.device(self.transport.device):
            static = zlib.crc32(f"{self.seed}/spare".encode()) & 0x7FFFFFFF
            seed = tf.stack([tf.constant(static, tf.int32), tf.cast(step, tf.int32)])
            longest = max((f.shape[1] for f in factors), default=0)
            spare = low_rank.random_directions(seed, [longest, self.factors.rank])
            return low_rank.orthogonalize(factors, [spare[: f.shape[1]] for f in factors])

    def _mean(self, parts, healthy):
        """Means over all replicas in one all-reduce.

        Args:
            parts: for each local replica: tensors.
            healthy: for each local replica, a bool scalar.

        Returns:
            The means, whether all replicas are healthy, and bytes.
        """
        payloads = []
        for replica, tensors in enumerate(parts):
            with tf.device(self.transport.devices[replica]):
                poison = tf.where(healthy[replica], 0.0, float("nan"))
                flat = [tf.reshape(x, [-1]) for x in tensors]
                payloads.append(tf.concat([*flat, poison[None]], 0) / self.transport.world)
        total = self.transport.all_reduce(payloads)
        with tf.device(self.transport.device):
            *means, flag = tf.split(total, [*(x.shape.num_elements() for x in parts[0]), 1])
            means = [tf.reshape(m, x.shape) for m, x in zip(means, parts[0], strict=True)]
            all_healthy = tf.math.is_finite(flag[0]) & numerics.all_finite(means)
        return means, all_healthy, self.transport.bytes_all_reduce(total.shape[0])

    def _residuals(self, parts, pairs, healthy):
        """What each replica's own factors leave out, and whether they are finite, too.

        Args:
            pairs: for each local replica, the left and the right factors of all batches.
        """
        if self.residuals is None or not self._runs:
            return [], healthy
        residuals, flags = [], []
        for replica, ((matrices, rest), pair) in enumerate(zip(parts, pairs, strict=True)):
            with tf.device(self.transport.devices[replica]):
                left_out = [*map(low_rank.remainder, matrices, *pair)]
                flags.append(healthy[replica] & _finite_products(*pair))
                residuals.append(self._join(left_out, [tf.zeros_like(x) for x in rest]))
        return residuals, flags

    def _updates(self, kept, values):
        """(variable, new value) of the factors."""
        return [*zip(kept, values, strict=True), (self.factors.step, self.factors.step + 1)]


def _products(lefts, rights):
    return [*map(low_rank.product, lefts, rights)]


def _finite_products(lefts, rights):
    return numerics.all_finite([*map(low_rank.largest_product, lefts, rights)])


def _unit_rows(right):
    """What the power method goes on with: of any length, but in the range of float32."""
    transposed = low_rank.unit_columns(tf.linalg.matrix_transpose(right))
    return tf.linalg.matrix_transpose(transposed)


def _runs(keys, shapes, compressor) -> list[_Run]:
    """Neighbours of one shape, and neighbours for which factors are no smaller; none is empty."""

    def kind(item):
        return low_rank.matrix_shape(item[1]) if compressor.reduces(item[1]) else None

    runs = []
    filled = [(key, shape) for key, shape in zip(keys, shapes, strict=True) if math.prod(shape)]
    for matrix, items in itertools.groupby(filled, kind):
        names, of_items = zip(*items, strict=True)
        runs.append(_Run(names, tuple(math.prod(shape) for shape in of_items), matrix))
    return runs
