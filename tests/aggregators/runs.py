"""Runs an aggregator for a few steps, and restates in NumPy what it should have done."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tests.catalogue import AggregatorCase
from tfqcomm import aggregators
from tfqcomm.aggregators.base import Aggregate, Aggregator
from tfqcomm.state.residuals import Residuals
from tfqcomm.transport.base import Transport
from tfqcomm.transport.local import LocalTransport

Vectors = list[np.ndarray]  # float32[n] for each tensor


def local_transport(world: int) -> LocalTransport:
    """All replicas on one device: TensorFlow prepares every function once for each device."""
    return LocalTransport(["CPU:0"] * world)


def random_messages(
    sizes: Sequence[int], world: int, steps: int = 3, seed: int = 0
) -> list[list[Vectors]]:
    """For each step, for each replica: vectors of all sizes, of very different scales."""
    rng = np.random.default_rng(seed)
    return [
        [[np.float32(10.0**t) * rng.normal(size=n).astype(np.float32) for t, n in enumerate(sizes)]
         for _ in range(world)]
        for _ in range(steps)
    ]  # fmt: skip


@dataclasses.dataclass
class Run:
    """What came out of the steps of `run`."""

    messages: Sequence[Sequence[Vectors]]
    aggregator: Aggregator
    residuals: Residuals
    aggregates: list[Aggregate]
    means: list[Vectors]  # for each step


def run(
    case: AggregatorCase,
    messages: Sequence[Sequence[Vectors]],
    transport: Transport | None = None,
    *,
    error_feedback: bool = True,
    owed: dict[str, np.ndarray] | None = None,
) -> Run:
    """Aggregates step by step, assigning the residuals after each.

    Args:
        messages: for each step, for each replica of all processes.
        transport: of this process.
        owed: by an earlier run.
    """
    transport = transport or local_transport(len(messages[0]))
    residuals = Residuals(transport)
    residuals.load_total(owed or {})
    sizes = [len(vector) for vector in messages[0][0]]
    aggregator = case.aggregator(
        case.compressor,
        transport,
        residuals if error_feedback else None,
        [f"tensor{t}" for t in range(len(sizes))],
        sizes,
    )
    result = Run(messages, aggregator, residuals, [], [])
    for step, of_replicas in enumerate(messages):
        local = [of_replicas[rank] for rank in transport.ranks]
        healthy = [tf.constant(True)] * transport.local
        aggregate = aggregator.aggregate(local, healthy, tf.constant(step))
        for variable, value in aggregate.updates:
            variable.assign(value)
        result.aggregates.append(aggregate)
        result.means.append([mean.numpy() for mean in aggregate.means])
    return result


@functools.cache
def finished_run(case: AggregatorCase, sizes: tuple[int, ...], world: int) -> Run:
    """A run that several tests look at."""
    return run(case, random_messages(sizes, world))


class Restatement:
    """An exchange in NumPy: residuals in plain arrays, every replica and owner in a plain loop."""

    def __init__(self, aggregator: Aggregator, world: int, *, error_feedback: bool = True):
        self.aggregator = aggregator  # for its codec, its seeds and its layout
        self.world = world
        self.layout = aggregator.layout
        self.error_feedback = error_feedback
        self.worker = [np.zeros(self.layout.size, np.float32) for _ in range(world)]
        self.owner = np.zeros(self.layout.size, np.float32)  # of whoever owns the part

    def step(self, messages: Sequence[Vectors], step: int) -> Vectors:
        """The mean of all messages; residuals move on."""
        packed = [self._pack(vectors) for vectors in messages]
        mean = np.zeros(self.layout.size, np.float32)
        for owner, part in self._parts():
            here = slice(part.start, part.stop)
            targets = [m[here] + r[here] for m, r in zip(packed, self.worker, strict=True)]
            decoded = self._round_trips(targets, step, part)
            if self.error_feedback:
                for residual, target, sent in zip(self.worker, targets, decoded, strict=True):
                    residual[here] = target - sent
            # TensorFlow's optimizer turns the division by a constant into this product.
            mean[here] = np.sum(decoded, axis=0, dtype=np.float32) * np.float32(1 / self.world)
            if owner is not None:
                target = mean[here] + self.owner[here]
                mean[here] = self._round_trip(target, step, part, owner, "owner")
                if self.error_feedback:
                    self.owner[here] = target - mean[here]
        return self._unpack(mean)

    def _parts(self):
        """(owner, part): all of the bucket, or what each owner has of it."""
        if not isinstance(self.aggregator, aggregators.TwoPhaseMean):
            return [(None, part) for part in self.layout.cut(1)]
        return [*enumerate(self.layout.cut(self.world))]

    def _round_trips(self, targets, step, part):
        """What arrives of every worker's target."""
        if isinstance(self.aggregator, aggregators.SharedSupportMean):
            return self._at_places_of_one(targets, step)
        if not isinstance(self.aggregator, aggregators.IntegerMean):
            return [
                self._round_trip(x, step, part, rank, "worker") for rank, x in enumerate(targets)
            ]
        codec, seeds = self.aggregator.compressor, self.aggregator.codec_seed
        if not part.layout.size:
            return targets
        scales = np.max([codec.scales(tf.constant(x), part.layout) for x in targets], axis=0)
        units = self._pack([np.full(n, s) for n, s in zip(part.layout.sizes, scales, strict=True)])
        return [
            units * codec.levels(tf.constant(x), scales, part.layout, seeds(step, rank)).numpy()
            for rank, x in enumerate(targets)
        ]

    def _at_places_of_one(self, targets, step):
        """Where the step's leader has the largest magnitudes of each tensor, or chunk of one."""
        codec, leader = self.aggregator.compressor, targets[step % self.world]
        kept = np.zeros(len(leader), bool)
        for start, n in zip(self.layout.starts, self.layout.sizes, strict=True):
            for begin in range(start, start + n, codec.chunk or n):
                chunk = leader[begin : min(begin + (codec.chunk or n), start + n)]
                k = max(1, round(codec.ratio * len(chunk)))
                kept[begin + np.argsort(-np.abs(chunk), kind="stable")[:k]] = True
        shares = [
            tf.cast(x[kept] * np.float32(1 / self.world), codec.summand_dtype) for x in targets
        ]
        decoded = np.zeros([self.world, len(leader)], np.float32)
        decoded[:, kept] = self.world * np.stack([tf.cast(s, tf.float32) for s in shares])
        return list(decoded)

    def _round_trip(self, x, step, part, rank, phase):
        codec, seeds = self.aggregator.compressor, self.aggregator.codec_seed
        if not part.layout.size:
            return x
        # Replicas share one process here, so `codec_seed` takes the global rank.
        seed = seeds(tf.constant(step), rank, start=int(part.start), phase=phase)
        words = codec.encode_bucket(tf.constant(x), part.layout, seed)
        decoded = codec.decode_bucket(words, part.layout).numpy()
        for start, stop in zip(part.layout.starts, [*part.layout.starts[1:], len(x)], strict=True):
            n = part.layout.sizes[part.layout.starts.index(start)]
            decoded[start + n : stop] = 0.0  # padding
        return decoded

    def _pack(self, vectors):
        flat, filled = np.zeros(self.layout.size, np.float32), [v for v in vectors if len(v)]
        for start, vector in zip(self.layout.starts, filled, strict=True):
            flat[start : start + len(vector)] = vector
        return flat

    def _unpack(self, flat):
        starts = iter(self.layout.starts)
        vectors = []
        for n in self.aggregator.sizes:
            start = next(starts) if n else 0
            vectors.append(flat[start : start + n])
        return vectors
