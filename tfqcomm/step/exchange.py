"""The exchange of one optimizer's messages: which tensor travels how, all in one place.

    messages --+-- IndexedSlices ----------------------> gathered, by `embedding_rows`
               +-- rank <= 1, small, statistics --fused--> DenseMean(Identity)
               +-- the rest --fused--> AllGatherMean | TwoPhaseMean | MajorityVoteMean | DenseMean,
               |                                       by `schedule`;
                                       AdaptiveMean for adaptive top-k,
                                       IntegerMean for a scale that all replicas share;
                                       SharedSupportMean for entries that one replica chooses;
                                       LowRankMean for factors of matrices;
                                       in a warm-up still DenseMean(Identity)

The rest is a group for each codec. Each group is cut into buckets of `bucket_mb`, and each of these
is one payload: the number of collectives does not grow with the number of layers.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import tensorflow as tf

from tfqcomm.aggregators import rows
from tfqcomm.aggregators.adaptive import AdaptiveMean
from tfqcomm.aggregators.all_gather import AllGatherMean
from tfqcomm.aggregators.base import Aggregate, Aggregator
from tfqcomm.aggregators.budget import Budget
from tfqcomm.aggregators.dense import DenseMean, PlainMean
from tfqcomm.aggregators.factors import Factors
from tfqcomm.aggregators.integer import IntegerMean
from tfqcomm.aggregators.low_rank import LowRankMean
from tfqcomm.aggregators.majority_vote import MajorityVoteMean
from tfqcomm.aggregators.shared_support import SharedSupportMean
from tfqcomm.aggregators.two_phase import TwoPhaseMean
from tfqcomm.aggregators.warm_up import WarmUp
from tfqcomm.compressors.adaptive_top_k import AdaptiveTopK
from tfqcomm.compressors.identity import Identity
from tfqcomm.compressors.power_sgd import PowerSGD
from tfqcomm.kernels import numerics
from tfqcomm.state.ledger import Ledger
from tfqcomm.step import hierarchy, routing
from tfqcomm.step.message import Message, Reduction
from tfqcomm.step.options import ExchangeOptions
from tfqcomm.transport.base import Transport

_AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
    "dense": DenseMean,
    "all_gather": AllGatherMean,
    "two_phase": TwoPhaseMean,
    "majority_vote": MajorityVoteMean,
    "integer": IntegerMean,
    "shared_support": SharedSupportMean,
}


class GradientExchange:
    """Averages an optimizer's messages over all replicas.

    Attributes:
        options: the compressor and its circumstances.
        ledger: of the optimizer: what is owed, and what has been sent.
        transport: to all replicas.
        participants: the transport between those whose messages are compressed.
        aggregators: for schedules, in place of those that are usual.
        sent: for each payload of the last `reduce`, in order: what it was made of, and its result.
    """

    def __init__(
        self,
        options: ExchangeOptions,
        ledger: Ledger,
        aggregators: Mapping[str, Callable[..., Aggregator]] | None = None,
        transport: Transport | None = None,
    ):
        self.ledger = ledger
        self.transport = transport or ledger.transport
        self.options = hierarchy.between(options, self.transport.processes)
        self.participants = hierarchy.participants(self.options, self.transport)
        self.aggregators = {**_AGGREGATORS, **(aggregators or {})}
        self.sent: list[tuple[Aggregator | WarmUp, Sequence[Message], Aggregate]] = []

    def reduce(
        self,
        messages: Sequence[Message],
        step: tf.Tensor,
        compresses: Callable[[], tf.Tensor] | None = None,
        residual_scale: tf.Tensor | None = None,
    ) -> Reduction:
        """Averages messages over all replicas. Nothing is changed until `Reduction.commit`.

        Args:
            messages: the same ones in the same order on all processes.
            step: int scalar, equal on all replicas, which counts exchanges; it seeds stochastic
                codecs, and says whose turn it is.
            compresses: gives a bool scalar, equal on all replicas, which is false in a warm-up:
                then everything travels dense. None for none.
            residual_scale: scalar by which what is owed is multiplied first; None for 1.
        """
        if self.options.hierarchical:
            messages = [hierarchy.of_process(m, self.transport.device) for m in messages]
        sorting = routing.sort(messages, self.options, self.participants.world)
        sparse = [self._rows_to_send(m) for m in sorting.sparse]
        payloads = self._payloads(sorting, compresses, residual_scale)
        aggregates = self._aggregate(payloads, sparse, step)
        sent = [(p[0], p[1], a) for p, a in zip(payloads, aggregates, strict=True)]
        self.sent, means = sent, {}
        for _, bucket, aggregate in sent:
            for message, mean in zip(bucket, aggregate.means, strict=True):
                means[message.key] = tf.reshape(mean, message.shape)
        gathered = [self._gather_rows(m) for m in sparse]
        means |= {m.key: mean for m, (mean, _) in zip(sparse, gathered, strict=True)}

        self.ledger.routes = sorting.routes
        healthy = tf.reduce_all([a.healthy for a in aggregates])
        bytes_sent = sum(a.bytes_sent for a in aggregates) + sum(cost for _, cost in gathered)

        def commit():
            for aggregate in aggregates:
                for variable, value in aggregate.updates:
                    variable.assign(value)

        def left_out():
            found = {}
            for aggregator, bucket, aggregate in sent:
                # What a process leaves out is told to each of its replicas.
                each = self.transport.local // self.participants.local
                for replica, flat in enumerate(each * list(aggregate.left_out)):
                    for message, rest in zip(bucket, aggregator.unpack(flat), strict=True):
                        found[replica, message.key] = tf.reshape(rest, message.shape)
            return found

        def record():
            gradients = [m for m in messages if m.compressible]
            size = sum(m.size * m.dtype.size for m in gradients)
            dense_bytes = self.transport.bytes_all_reduce(size, itemsize=1)
            self.ledger.meter.record(bytes_sent, dense_bytes, healthy, lambda: _norm(gradients))

        ordered = [means[m.key] for m in messages]
        return Reduction(ordered, healthy, commit, left_out, record, bytes_sent)

    def one_round(self, messages: Sequence[Message]) -> bool:
        """Whether all that `reduce` sends of them is known before anything has arrived."""
        sorting = routing.sort(messages, self.options, self.participants.world)
        payloads = self._payloads(sorting, None, None)
        return not sorting.sparse and all(aggregator.one_round for aggregator, _, _ in payloads)

    def _aggregate(self, payloads, sparse, step) -> list[Aggregate]:
        """Exchanges the buckets, each of which may travel while the others are encoded."""
        found = []
        with self.transport.together():
            for place, (aggregator, bucket, dtype) in enumerate(payloads, start=1):
                local = range(self.participants.local)
                vectors = [_vectors(bucket, replica, dtype) for replica in local]
                # Aggregators look at what they encode themselves. The last one, for which the
                # others need not wait, tells of the rows, too.
                health = self._health(sparse if place == len(payloads) else [])
                found.append(aggregator.aggregate(vectors, health, step))
        return found

    def _health(self, messages: Sequence[Message]) -> list[tf.Tensor | bool]:
        """For each local participant: all numbers in `messages` are finite."""
        if not messages:
            return [True] * self.participants.local
        health = []
        for replica, device in enumerate(self.participants.devices):
            with tf.device(device):
                health.append(numerics.all_finite([m.floats(replica) for m in messages]))
        return health

    def _payloads(self, sorting, compresses, residual_scale):
        """What travels together: (aggregator, messages, type) for each payload."""
        payloads = []
        for group in sorting.compressed:
            routing.warn_of_rounding(group)
            for bucket in group.buckets():
                aggregator = self._aggregator(group, bucket, len(payloads), residual_scale)
                if compresses is not None:
                    aggregator = WarmUp(compresses, aggregator, self._dense_mean(bucket))
                payloads.append((aggregator, bucket, tf.float32))
        for dtype in (tf.float32, tf.float64):
            found = [m for m in sorting.dense if m.dtype == dtype]
            for bucket in routing.in_buckets(found, self.options):
                payloads.append((self._dense_mean(bucket), bucket, dtype))
        # Somebody has to carry the health of the rows.
        return payloads or [(self._dense_mean([]), [], tf.float32)]

    def _aggregator(self, group: routing.Group, bucket, index, residual_scale) -> Aggregator:
        options = group.options
        joint = options.granularity == "model"
        if joint:
            self.ledger.residuals.declare_joint(_joint_key(bucket), {m.key: m.size for m in bucket})
        residuals = self.ledger.residuals if options.feedback else None
        arguments = (options.codec, self.participants, residuals, *_keys_and_sizes(bucket))
        more = {"factor": _factor(bucket), "residual_scale": _decayed(residual_scale, options)}
        if group.schedule == "adaptive":
            budget = self._budget_for(options, sum(m.size for m in bucket))
            return AdaptiveMean(*arguments, budget=budget, **more)
        more["seed"] = options.seed + index
        if group.schedule == "low_rank":
            shapes, factors = [m.shape for m in bucket], self._factors(options)
            return LowRankMean(*arguments, shapes=shapes, factors=factors, **more)
        return self.aggregators[group.schedule](*arguments, joint=joint, **more)

    def _dense_mean(self, group) -> Aggregator:
        """One all-reduce for everything that is not compressed."""
        keys, sizes = _keys_and_sizes(group)
        return PlainMean(
            Identity(), self.participants, None, keys, sizes, joint=True, factor=_factor(group)
        )

    def _budget_for(self, options: ExchangeOptions, n: int) -> Budget:
        compressor = cast(AdaptiveTopK, options.compressor)
        budget = self.ledger.keep("budget", lambda: Budget(compressor, n))
        if budget.n != n:
            raise ValueError(
                "An optimizer with adaptive top-k must train the same variables at every step. "
                f"Received: {n} elements after {budget.n}"
            )
        return budget

    def _factors(self, options: ExchangeOptions) -> Factors:
        rank, seed = cast(PowerSGD, options.codec).rank, options.seed
        return self.ledger.keep("factors", lambda: Factors(rank, seed, self.transport.device))

    def _gather_rows(self, message: Message) -> tuple[tf.IndexedSlices, tf.Tensor]:
        """The rows of all replicas, and the bytes one worker sent for them."""
        found = self.participants, message.values, message.shape, message.factor
        options = self.options.for_path(message.name)
        if not options.rows_each_once:
            return rows.gather_as_they_are(*found)
        return rows.gather_each_once(*found, options.embedding_rows)

    def _rows_to_send(self, message: Message) -> Message:
        if not self.options.for_path(message.name).rows_each_once:
            return message
        values = []
        for value, device in zip(message.values, self.participants.devices, strict=True):
            with tf.device(device):
                values.append(rows.each_once(cast(tf.IndexedSlices, value)))
        return dataclasses.replace(message, values=values)


def _decayed(scale: tf.Tensor | None, options: ExchangeOptions) -> tf.Tensor | float | None:
    """What residuals are multiplied by; None for 1."""
    decay = options.residual_decay
    if decay == 1:
        return scale
    return decay if scale is None else scale * decay


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


def _joint_key(messages: Sequence[Message]) -> str:
    """What earlier versions called the one residual of all of `messages`."""
    names = "+".join(m.key for m in messages)
    return f"model/{zlib.crc32(names.encode()):08x}"
