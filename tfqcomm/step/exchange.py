"""The exchange of one optimizer's messages: which tensor travels how, all in one place.

    messages --+-- IndexedSlices ----------------------> gathered as they are
               +-- rank <= 1, small, statistics --fused--> DenseMean(Identity)
               +-- the rest --fused--> AllGatherMean | TwoPhaseMean | DenseMean, by `schedule`;
                                       AdaptiveMean for adaptive top-k,
                                       IntegerMean for a scale that all replicas share;
                                       LowRankMean for factors of matrices;
                                       in a warm-up still DenseMean(Identity)

Each group is cut into buckets of `bucket_mb`, and each of these is one payload: the number of
collectives does not grow with the number of layers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import cast

import tensorflow as tf
from absl import logging

from tfqcomm.aggregators import schedule as schedules
from tfqcomm.aggregators.adaptive import AdaptiveMean
from tfqcomm.aggregators.all_gather import AllGatherMean
from tfqcomm.aggregators.base import Aggregate, Aggregator
from tfqcomm.aggregators.budget import Budget
from tfqcomm.aggregators.dense import DenseMean, PlainMean
from tfqcomm.aggregators.factors import Factors
from tfqcomm.aggregators.integer import IntegerMean
from tfqcomm.aggregators.low_rank import LowRankMean
from tfqcomm.aggregators.two_phase import TwoPhaseMean
from tfqcomm.aggregators.warm_up import WarmUp
from tfqcomm.compressors.adaptive_top_k import AdaptiveTopK
from tfqcomm.compressors.identity import Identity
from tfqcomm.compressors.power_sgd import PowerSGD
from tfqcomm.kernels import low_rank, numerics
from tfqcomm.state.ledger import Ledger
from tfqcomm.state.traffic import Route
from tfqcomm.step.message import Message, Reduction
from tfqcomm.step.options import ExchangeOptions

MOST_PER_PAYLOAD = 2**30  # elements: TensorFlow's slices and splits count in int32

_AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
    "dense": DenseMean,
    "all_gather": AllGatherMean,
    "two_phase": TwoPhaseMean,
    "integer": IntegerMean,
}


class GradientExchange:
    """Averages an optimizer's messages over all replicas.

    Attributes:
        options: the compressor and its circumstances.
        ledger: of the optimizer: what is owed, and what has been sent.
        transport: to all replicas.
        sent: for each payload of the last `reduce`, in order: what it was made of, and its result.
    """

    def __init__(self, options: ExchangeOptions, ledger: Ledger):
        self.options = options
        self.ledger = ledger
        self.transport = ledger.transport
        self.sent: list[tuple[Aggregator | WarmUp, Sequence[Message], Aggregate]] = []

    def reduce(
        self,
        messages: Sequence[Message],
        step: tf.Tensor,
        compresses: Callable[[], tf.Tensor] | None = None,
    ) -> Reduction:
        """Averages messages over all replicas. Nothing is changed until `Reduction.commit`.

        Args:
            messages: the same ones in the same order on all processes.
            step: int scalar, equal on all replicas; seeds stochastic codecs.
            compresses: gives a bool scalar, equal on all replicas, which is false in a warm-up:
                then everything travels dense. None for none.
        """
        sparse = [m for m in messages if m.sparse]
        compressed = [m for m in messages if self._compresses(m)]
        schedule = self._schedule(compressed)
        if self._is_dearer(schedule):
            compressed = []
        dense = [m for m in messages if not m.sparse and m not in compressed]

        means, aggregates, unpacks = {}, [], []
        groups = self._groups(compressed, schedule, dense, compresses)
        for place, (aggregator, group, dtype) in enumerate(groups, start=1):
            vectors = [_vectors(group, replica, dtype) for replica in range(self.transport.local)]
            # Aggregators look at what they encode themselves. The last one, for which the others
            # need not wait, tells of the rows, too.
            health = self._health(sparse if place == len(groups) else [])
            aggregates.append(aggregator.aggregate(vectors, health, step))
            unpacks.append((group, aggregator.unpack))
            for message, mean in zip(group, aggregates[-1].means, strict=True):
                means[message.key] = tf.reshape(mean, message.shape)
        rows = [self._gather_rows(m) for m in sparse]
        means |= {m.key: mean for m, (mean, _) in zip(sparse, rows, strict=True)}

        self.ledger.routes = tuple(self._route(m, m in compressed, schedule) for m in messages)
        healthy = tf.reduce_all([a.healthy for a in aggregates])
        bytes_sent = sum(a.bytes_sent for a in aggregates) + sum(cost for _, cost in rows)
        self.sent = [(g[0], g[1], a) for g, a in zip(groups, aggregates, strict=True)]

        def commit():
            for aggregate in aggregates:
                for variable, value in aggregate.updates:
                    variable.assign(value)

        def left_out():
            found = {}
            for (group, unpack), aggregate in zip(unpacks, aggregates, strict=True):
                for replica, flat in enumerate(aggregate.left_out):
                    for message, rest in zip(group, unpack(flat), strict=True):
                        found[replica, message.key] = tf.reshape(rest, message.shape)
            return found

        def record():
            gradients = [m for m in messages if m.compressible]
            size = sum(m.size * m.dtype.size for m in gradients)
            dense_bytes = self.transport.bytes_all_reduce(size, itemsize=1)
            self.ledger.meter.record(bytes_sent, dense_bytes, healthy, lambda: _norm(gradients))

        ordered = [means[m.key] for m in messages]
        return Reduction(ordered, healthy, commit, left_out, record, bytes_sent)

    def _compresses(self, message: Message) -> bool:
        wanted = message.compressible and not message.sparse
        return wanted and self.options.compresses(message.shape, message.size)

    def _health(self, messages: Sequence[Message]) -> list[tf.Tensor | bool]:
        """For each local replica: all numbers in `messages` are finite."""
        if not messages:
            return [True] * self.transport.local
        health = []
        for replica, device in enumerate(self.transport.devices):
            with tf.device(device):
                health.append(numerics.all_finite([m.floats(replica) for m in messages]))
        return health

    def _groups(self, compressed, schedule, dense, compresses):
        """What travels together: (aggregator, messages, type) for each payload."""
        joint = self.options.granularity == "model"
        if schedule == "low_rank":  # those of one shape side by side
            compressed = sorted(compressed, key=lambda m: low_rank.matrix_shape(m.shape))
        whole = joint or schedule == "adaptive"  # must not be cut: one selection ranges over all
        cut = [compressed] if compressed and whole else self._cut(compressed)
        groups = []
        for index, group in enumerate(cut):
            if joint:
                self.ledger.residuals.declare_joint(
                    _joint_key(group), {m.key: m.size for m in group}
                )
            if any(m.dtype != tf.float32 for m in group):
                _warn_of_rounding(self.options.codec)
            aggregator = self._aggregator(schedule, group, joint, index)
            if compresses is not None:
                aggregator = WarmUp(compresses, aggregator, self._dense_mean(group))
            groups.append((aggregator, group, tf.float32))
        for dtype in (tf.float32, tf.float64):
            for group in self._cut([m for m in dense if m.dtype == dtype]):
                groups.append((self._dense_mean(group), group, dtype))
        # Somebody has to carry the health of the rows.
        return groups or [(self._dense_mean([]), [], tf.float32)]

    def _cut(self, messages: Sequence[Message]) -> list[list[Message]]:
        """Buckets, in the order in which gradients become ready: that of the last layer first.

        So the first bucket travels while the gradients of the others are computed.
        """
        return _cut(messages[::-1], int(self.options.bucket_mb * 2**20 / 4))

    def _aggregator(self, schedule, group, joint, index) -> Aggregator:
        residuals = self.ledger.residuals if self.options.feedback else None
        arguments = (self.options.codec, self.transport, residuals, *_keys_and_sizes(group))
        if schedule == "adaptive":
            budget = self._budget_for(sum(m.size for m in group))
            return AdaptiveMean(*arguments, budget=budget, factor=_factor(group))
        options = {"seed": self.options.seed + index, "factor": _factor(group)}
        if schedule == "low_rank":
            shapes, factors = [m.shape for m in group], self._factors()
            return LowRankMean(*arguments, shapes=shapes, factors=factors, **options)
        return _AGGREGATORS[schedule](*arguments, joint=joint, **options)

    def _dense_mean(self, group) -> Aggregator:
        """One all-reduce for everything that is not compressed."""
        keys, sizes = _keys_and_sizes(group)
        return PlainMean(
            Identity(), self.transport, None, keys, sizes, joint=True, factor=_factor(group)
        )

    def _budget_for(self, n: int) -> Budget:
        compressor = cast(AdaptiveTopK, self.options.compressor)
        budget = self.ledger.keep("budget", lambda: Budget(compressor, n))
        if budget.n != n:
            raise ValueError(
                "An optimizer with adaptive top-k must train the same variables at every step. "
                f"Received: {n} elements after {budget.n}"
            )
        return budget

    def _factors(self) -> Factors:
        rank, seed = cast(PowerSGD, self.options.codec).rank, self.options.seed
        return self.ledger.keep("factors", lambda: Factors(rank, seed, self.transport.device))

    def _schedule(self, messages: Sequence[Message]) -> str:
        options, sizes = self.options, [m.size for m in messages]
        return schedules.choose(options.schedule, options.codec, sizes, self.transport.world)

    def _is_dearer(self, schedule: str) -> bool:
        """Whether compression would send more than no compression: then "auto" is "dense"."""
        return schedule == "dense" and not self.options.codec.linear

    def _gather_rows(self, message: Message) -> tuple[tf.IndexedSlices, tf.Tensor]:
        """The rows of all replicas, and the bytes one worker sent for them.

        A row that occurs twice is meant twice, as in TensorFlow.
        """
        values, value_bytes = self.transport.all_gather_ragged([v.values for v in message.values])
        indices, index_bytes = self.transport.all_gather_ragged([v.indices for v in message.values])
        with tf.device(self.transport.device):
            rows, share = tf.concat(values, 0), message.factor / self.transport.world
            mean = tf.IndexedSlices(
                values=rows if share == 1 else rows * tf.cast(share, rows.dtype),
                indices=tf.concat(indices, 0),
                dense_shape=tf.constant(message.shape, tf.int64),
            )
        return mean, value_bytes + index_bytes

    def _route(self, message: Message, compressed: bool, schedule: str) -> Route:
        path, codec = message.path or message.key, self.options.codec
        if message.sparse:
            return Route(path, message.shape, "all_gather", "rows as they are")
        if compressed and isinstance(codec, PowerSGD) and not codec.reduces(message.shape):
            return Route(path, message.shape, schedule, f"float32 (less than {codec})")
        if compressed:
            return Route(path, message.shape, schedule, str(codec))
        description = message.dtype.name
        if self._is_dearer(schedule) and self._compresses(message):
            description += f" (less than {codec})"
        return Route(path, message.shape, "dense", description)


def _keys_and_sizes(messages: Sequence[Message]) -> tuple[list[str], list[int]]:
    return [m.key for m in messages], [m.size for m in messages]


def _factor(messages: Sequence[Message]) -> int:
    """What all of a group is multiplied by: of gradients the same, of others less."""
    return max((m.factor for m in messages), default=1)


def _vectors(messages: Sequence[Message], replica: int, dtype: tf.DType) -> list[tf.Tensor]:
    """What a group sends, without its factor."""
    factor = _factor(messages)
    flat = [m.flat(replica, dtype) for m in messages]
    return [
        v if m.factor == factor else v * (m.factor / factor)
        for m, v in zip(messages, flat, strict=True)
    ]


def _norm(gradients: Sequence[Message]) -> tf.Tensor:
    """Of what the first local replica sends."""
    norm = numerics.global_norm([m.floats(0) for m in gradients])
    return tf.minimum(norm, tf.float32.max / _factor(gradients)) * _factor(gradients)


def _cut(messages: Sequence[Message], most: int) -> list[list[Message]]:
    """Groups, in order, of no more than so many elements, unless one message has more."""
    most, elements = min(most, MOST_PER_PAYLOAD), 0
    groups: list[list[Message]] = []
    for message in messages:
        if not groups or elements + message.size > most:
            groups.append([])
            elements = 0
        groups[-1].append(message)
        elements += message.size
    return groups


def _warn_of_rounding(codec) -> None:
    text = "Float64 gradients are rounded to float32 for %s; without a compressor they are not."
    logging.log_first_n(logging.WARNING, text, 1, codec)


def _joint_key(messages: Sequence[Message]) -> str:
    """What earlier versions called the one residual of all of `messages`."""
    names = "+".join(m.key for m in messages)
    return f"model/{zlib.crc32(names.encode()):08x}"
