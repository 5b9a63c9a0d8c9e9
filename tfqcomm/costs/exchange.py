"""What the exchange of a step's gradients takes of a worker: run as in a step, without the others.

The real buckets and aggregators, with residuals, on a transport that gives back what it is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import tensorflow as tf

from tfqcomm.aggregators import schedule as schedules
from tfqcomm.aggregators.all_gather import AllGatherMean
from tfqcomm.aggregators.dense import DenseMean, PlainMean
from tfqcomm.aggregators.low_rank import LowRankMean
from tfqcomm.aggregators.majority_vote import MajorityVoteMean
from tfqcomm.aggregators.shared_support import SharedSupportMean
from tfqcomm.aggregators.two_phase import TwoPhaseMean
from tfqcomm.compressors.base import Compressor
from tfqcomm.costs.prediction import Bucket, moves
from tfqcomm.costs.simulated import SimulatedTransport
from tfqcomm.costs.timing import best_seconds
from tfqcomm.state.ledger import Ledger
from tfqcomm.step.exchange import GradientExchange
from tfqcomm.step.message import Message
from tfqcomm.step.options import ExchangeOptions

Gradients = Sequence[tf.Tensor | tf.IndexedSlices]

FEW, MORE = 2, 4  # workers whose payloads are decoded, to tell what one more takes
_SCHEDULES: dict[type, str] = {
    PlainMean: "dense",
    DenseMean: "dense",
    AllGatherMean: "all_gather",
    TwoPhaseMean: "two_phase",
    MajorityVoteMean: "two_phase",
    LowRankMean: "low_rank",
    SharedSupportMean: "shared_support",
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
    own = compressor.low_rank or compressor.shared_support
    if compressor.lossless or compressor.linear or own:
        return ("auto",)
    return ("all_gather",) if compressor.sparse else ("all_gather", "two_phase")


def measure(options: ExchangeOptions, gradients: Gradients, seconds: float) -> tuple[Bucket, ...]:
    """The buckets of an exchange, in the order in which they are sent.

    Args:
        options: with a schedule of `schedules_for`.
        gradients: of a step, in the order of the model's variables.
        seconds: for how long each exchange is repeated, at about.
    """
    world = MORE if options.schedule in ("two_phase", "majority_vote") else FEW
    run = _Run(options, gradients, world)
    taken = best_seconds(run.step, seconds)
    each = 0.0
    if options.schedule == "all_gather":
        longer = _Run(options, gradients, MORE)  # which keeps the residuals
        more = best_seconds(longer.step, seconds)
        each = min(max(0.0, (more - taken) / (MORE - FEW)), taken / FEW)
    return tuple(run.buckets(taken, each))


class _Run:
    """An exchange that can be repeated.

    Attributes:
        step: runs it once.
    """

    def __init__(self, options: ExchangeOptions, gradients: Gradients, world: int):
        self._world, self._gradients = world, list(gradients)
        self._exchange = GradientExchange(options, Ledger(SimulatedTransport(world)))
        self._number = tf.constant(0)  # captured, so that no graph knows it
        self.step = tf.function(self._step, autograph=False).get_concrete_function()

    def _step(self):
        messages = [
            Message(str(index), [gradient], factor=self._world)
            for index, gradient in enumerate(self._gradients)
        ]
        reduction = self._exchange.reduce(messages, self._number)
        healthy = tf.cond(reduction.healthy, lambda: _true(reduction.commit), lambda: False)
        return reduction.means, healthy

    def buckets(self, seconds: float, each: float) -> list[Bucket]:
        """What was sent, with the time of a whole exchange shared out by elements.

        Args:
            seconds: of an exchange.
            each: what of it is for each worker's payload.
        """
        found = [*map(_group_of, self._exchange.sent), *self._rows()]
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


def _group_of(sent) -> _Group:
    """A payload as the exchange tells it."""
    aggregator, messages, result = sent
    schedule = _SCHEDULES[type(aggregator)]
    of_one_byte = sum(b for _, _, b in moves(schedule, 1.0, aggregator.transport.world))
    return _Group(
        schedule,
        result.bytes_sent / of_one_byte,
        sum(message.size for message in messages),
        tuple(int(message.key) for message in messages),
    )


def _true(do):
    do()
    return True


def _floats(gradient: tf.Tensor | tf.IndexedSlices) -> tf.Tensor:
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def chosen(compressor: Compressor, sizes: Sequence[int], world: int) -> str:
    """The schedule that "auto" comes to for tensors of these sizes."""
    return schedules.choose("auto", compressor, list(sizes), world)
