"""What the exchange of a step's gradients takes of a worker: run as in a step, without the others.

The real buckets and aggregators, with residuals, on a transport that gives back what it is given.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import tensorflow as tf

from tfqcomm.aggregators import schedule as schedules
from tfqcomm.aggregators.all_gather import AllGatherMean
from tfqcomm.aggregators.dense import DenseMean, PlainMean
from tfqcomm.aggregators.low_rank import LowRankMean
from tfqcomm.aggregators.two_phase import TwoPhaseMean
from tfqcomm.compressors.base import Compressor
from tfqcomm.costs.predict import Bucket, moves
from tfqcomm.costs.simulated import SimulatedTransport
from tfqcomm.costs.timing import median_seconds
from tfqcomm.state.ledger import Ledger
from tfqcomm.step.exchange import GradientExchange
from tfqcomm.step.message import Message
from tfqcomm.step.options import ExchangeOptions

Gradients = Sequence[tf.Tensor | tf.IndexedSlices]

FEW, MORE = 2, 4  # workers whose payloads are decoded, to tell what one more takes
_SCHEDULES = {
    PlainMean: "dense",
    DenseMean: "dense",
    AllGatherMean: "all_gather",
    TwoPhaseMean: "two_phase",
    LowRankMean: "low_rank",
}


def schedules_for(compressor: Compressor) -> tuple[str, ...]:
    """Those a compressor can follow, of which "auto" takes the one with the fewest bytes.

    Raises:
        ValueError: where what is sent depends on the data, or on the number of workers.
    """
    if compressor.adaptive or compressor.integer:
        raise ValueError(
            "Argument `compressors` must name compressors whose payload is of one length: none "
            "that adapts to the data, and none with a scale that all replicas share. "
            f"Received: compressor={compressor}"
        )
    if compressor.lossless or compressor.linear or compressor.low_rank:
        return ("auto",)
    return ("all_gather",) if compressor.sparse else ("all_gather", "two_phase")


def measure(options: ExchangeOptions, gradients: Gradients, seconds: float) -> tuple[Bucket, ...]:
    """The buckets of an exchange, in the order in which they are sent.

    Args:
        options: with a schedule of `schedules_for`.
        gradients: of a step, in the order of the model's variables.
        seconds: for how long each exchange is repeated, at about.
    """
    world = MORE if options.schedule == "two_phase" else FEW
    run = _Run(options, gradients, world)
    taken = median_seconds(run.step, seconds)
    each = 0.0
    if options.schedule == "all_gather":
        more = median_seconds(_Run(options, gradients, MORE).step, seconds)
        each = min(max(0.0, (more - taken) / (MORE - FEW)), taken / FEW)
    return tuple(run.buckets(taken, each))


class _Run:
    """An exchange that can be repeated.

    Attributes:
        step: runs it once.
    """

    def __init__(self, options: ExchangeOptions, gradients: Gradients, world: int):
        self._world, self._gradients = world, list(gradients)
        self._exchange = _Watched(options, Ledger(SimulatedTransport(world)))
        step = tf.function(self._step, autograph=False)
        self.step = functools.partial(step, self._gradients, tf.constant(0))

    def _step(self, gradients, number):
        messages = [
            Message(str(index), [gradient], factor=self._world)
            for index, gradient in enumerate(gradients)
        ]
        reduction = self._exchange.reduce(messages, number)
        healthy = tf.cond(reduction.healthy, lambda: _true(reduction.commit), lambda: False)
        return reduction.means, healthy

    def buckets(self, seconds: float, each: float) -> list[Bucket]:
        """What was sent, with the time of a whole exchange shared out by elements.

        Args:
            seconds: of an exchange.
            each: what of it is for each worker's payload.
        """
        found = [*self._exchange.watched, *self._rows()]
        total = sum(one.elements for one in found) or 1
        fixed = seconds - self._world * each
        buckets = []
        for one in found:
            part = one.elements / total
            if one.schedule == "all_gather" and each:
                before, after = fixed * part, 0.0
            else:
                before = after = (fixed + self._world * each) * part / 2
            each_part = each * part if one.schedule == "all_gather" else 0.0
            ready = self._ready(one.tensors)
            buckets.append(Bucket(one.schedule, one.payload, ready, before, after, each_part))
        return buckets

    def _rows(self):
        """Gradients of embeddings, whose rows travel as they are, behind all others."""
        for index, gradient in enumerate(self._gradients):
            if isinstance(gradient, tf.IndexedSlices):
                values, rows = gradient.values, gradient.indices
                octets = sum(int(tf.size(t)) * t.dtype.size for t in (values, rows))
                yield _Group("all_gather", octets, int(tf.size(values)), (index,))

    def _ready(self, tensors: Sequence[int]) -> float:
        """The share of the backward pass after which the gradients of `tensors` are there.

        Gradients come last layer first, and take time in proportion to their size.
        """
        sizes = [int(tf.size(_floats(gradient))) for gradient in self._gradients]
        return sum(sizes[min(tensors, default=0) :]) / (sum(sizes) or 1)


@dataclasses.dataclass(frozen=True)
class _Group:
    """A bucket as it was sent: its payload in bytes, and which tensors it holds."""

    schedule: str
    payload: float
    elements: int
    tensors: tuple[int, ...]


class _Watched(GradientExchange):
    """An exchange that remembers its buckets."""

    watched: list[_Group]

    def _groups(self, *args):
        self.watched = []
        groups = super()._groups(*args)
        return [(_WatchedMean(a, group, self.watched), group, d) for a, group, d in groups]


class _WatchedMean:
    """An aggregator that notes what it has sent."""

    def __init__(self, aggregator, group, notes):
        self._aggregator, self._group, self._notes = aggregator, group, notes
        self.unpack = aggregator.unpack

    def aggregate(self, *args):
        """See `Aggregator.aggregate`."""
        found = self._aggregator.aggregate(*args)
        schedule = _SCHEDULES[type(self._aggregator)]
        world = self._aggregator.transport.world
        for_one_byte = sum(sent for _, _, sent in moves(schedule, 1.0, world))
        self._notes.append(
            _Group(
                schedule,
                found.bytes_sent / for_one_byte,
                sum(message.size for message in self._group),
                tuple(int(message.key) for message in self._group),
            )
        )
        return found


def _true(do):
    do()
    return True


def _floats(gradient: tf.Tensor | tf.IndexedSlices) -> tf.Tensor:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def chosen(compressor: Compressor, sizes: Sequence[int], world: int) -> str:
    """The schedule that "auto" comes to for tensors of these sizes."""
    return schedules.choose("auto", compressor, list(sizes), world)
