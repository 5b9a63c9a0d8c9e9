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
        self.aggregator = aggregator  # for its codec and its seeds
        self.world = world
        self.sizes = aggregator.sizes
        self.error_feedback = error_feedback
        self.worker = [[np.zeros(n, np.float32) for n in self.sizes] for _ in range(world)]
        self.owner = [np.zeros(n, np.float32) for n in self.sizes]  # of whoever owns the part

    def step(self, messages: Sequence[Vectors], step: int) -> Vectors:
        """The mean of all messages; residuals move on."""
        means = [np.zeros(n, np.float32) for n in self.sizes]
        for tensor, owner, part in self._parts():
            residuals = [of_rank[tensor][part] for of_rank in self.worker]
            targets = [m[tensor][part] + r for m, r in zip(messages, residuals, strict=True)]
            decoded = self._round_trips(targets, step, tensor, part.start)
            if self.error_feedback:
                for residual, target, sent in zip(residuals, targets, decoded, strict=True):
                    residual[:] = target - sent
            # TensorFlow's optimizer turns the division by a constant into this product.
            mean = np.sum(decoded, axis=0, dtype=np.float32) * np.float32(1 / self.world)
            if owner is not None:
                target = mean + self.owner[tensor][part]
                mean = self._round_trip(target, step, tensor, part.start, owner, "owner")
                if self.error_feedback:
                    self.owner[tensor][part] = target - mean
            means[tensor][part] = mean
        return means

    def _parts(self):
        """(tensor, owner, slice): whole tensors, or what each owner has of them."""
        starts = np.cumsum([0, *self.sizes])
        for tensor, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
            if not isinstance(self.aggregator, aggregators.TwoPhaseMean):
                yield tensor, None, slice(0, stop - start)
                continue
            for owner in range(self.world):
                low = max(start, starts[-1] * owner // self.world)
                high = min(stop, starts[-1] * (owner + 1) // self.world)
                if low < high:
                    yield tensor, owner, slice(low - start, high - start)

    def _round_trips(self, targets, step, tensor, start):
        """What arrives of every worker's target."""
        if not isinstance(self.aggregator, aggregators.IntegerMean):
            return [
                self._round_trip(x, step, tensor, start, rank, "worker")
                for rank, x in enumerate(targets)
            ]
        codec, seeds = self.aggregator.compressor, self.aggregator.codec_seed
        scale = np.max([codec.scale(tf.constant(x)) for x in targets], axis=0)
        return [
            scale * codec.levels(tf.constant(x), scale, seeds(step, tensor, rank)).numpy()
            for rank, x in enumerate(targets)
        ]

    def _round_trip(self, x, step, tensor, start, rank, phase):
        codec, seeds = self.aggregator.compressor, self.aggregator.codec_seed
        # Replicas share one process here, so `codec_seed` takes the global rank.
        seed = seeds(tf.constant(step), tensor, rank, start=int(start), phase=phase)
        words = codec.encode(x, seed)
        return codec.decode(words, len(x)).numpy()
