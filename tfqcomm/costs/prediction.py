"""The time of a step from what its parts take: arithmetic alone, nothing is run.

    processor   forward | backward | encode 1 | backward | encode 2 | decode 1 | decode 2 | update
    link                                      |---- bucket 1 ----|---- bucket 2 ----|

A bucket travels while the gradients of the next are computed, and only then: encoding and decoding
are work of the same processor as the backward pass and hide behind nothing, and so is what sending
itself takes of it. Collectives follow one another.

Letters: W workers, p bytes of one worker's payload.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

FRAMING = 1514 / 1448  # bytes on the wire to each byte sent: TCP over Ethernet, 1500 bytes a packet
SHORT = 2**20  # bytes: a sum of two workers that is shorter is sent as a gather, in one round
LOGS = 64  # bytes that `fit` sums at the end of every step


@dataclasses.dataclass(frozen=True)
class Line:
    """What one kind of collective takes.

    Attributes:
        round_seconds: for each round of messages, whatever their length.
        byte_seconds: for each byte that one worker sends.
    """

    round_seconds: float
    byte_seconds: float


@dataclasses.dataclass(frozen=True)
class Link:
    """What collectives take between the workers, by kind.

    Attributes:
        all_reduce, all_gather, all_to_all: wall time.
        processor_seconds: of a worker's processor for each byte that it sends, and receives.
    """

    all_reduce: Line
    all_gather: Line
    all_to_all: Line
    processor_seconds: float = 0.0

    @classmethod
    def of_network(cls, bandwidth: float, latency: float) -> Link:
        """A link that takes what its network takes, and no processor.

        Args:
            bandwidth: bits per second that a worker sends, and at the same time receives.
            latency: seconds a message takes beside that.
        """
        line = Line(latency, 8 * FRAMING / bandwidth)
        return cls(line, line, line)

    def behind(self, bandwidth: float, latency: float) -> Link:
        """This link, measured where the network takes no time, on a network that does.

        The times add up: TensorFlow's rings do not copy while they send.
        """
        network = Link.of_network(bandwidth, latency)
        reduce, gather, to_all = (
            Line(own.round_seconds + far.round_seconds, own.byte_seconds + far.byte_seconds)
            for own, far in zip(self.lines, network.lines, strict=True)
        )
        return Link(reduce, gather, to_all, self.processor_seconds)

    @property
    def lines(self) -> tuple[Line, Line, Line]:
        """All three, in the order of the constructor."""
        return self.all_reduce, self.all_gather, self.all_to_all

    def seconds(self, schedule: str, payload: float, world: int) -> float:
        """Wall time of one payload's exchange."""
        return sum(
            rounds * getattr(self, kind).round_seconds + sent * getattr(self, kind).byte_seconds
            for kind, rounds, sent in moves(schedule, payload, world)
        )


def moves(schedule: str, payload: float, world: int) -> list[tuple[str, int, float]]:
    """The collectives of one payload: kind, rounds of messages, bytes that one worker sends.

    Args:
        schedule: "dense", "all_gather", "two_phase", "low_rank" or "shared_support".
        payload: p bytes; of "low_rank" both factors together, of "shared_support" the values and
            half of the positions, which are not summed but broadcast.
        world: W.
    """
    others, share = world - 1, (world - 1) / world * payload
    if schedule == "all_gather":
        return [("all_gather", others, others * payload)]
    if schedule == "two_phase":
        return [("all_to_all", min(1, others), share), ("all_gather", others, share)]
    if schedule == "low_rank":
        return 2 * moves("dense", payload / 2, world)
    if schedule == "shared_support":  # a tree, then a ring
        return [("all_gather", others.bit_length(), 0.0), *moves("dense", payload, world)]
    if world == 2 and payload < SHORT:
        return [("all_gather", 1, payload)]
    return [("all_reduce", 2 * others, 2 * share)]


@dataclasses.dataclass(frozen=True)
class Compute:
    """Seconds of a step of one worker alone.

    Attributes:
        forward: until the first gradient can be computed.
        backward: from there until all gradients are.
        update: of the weights.
    """

    forward: float
    backward: float
    update: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.forward + self.backward + self.update

    def scaled_to(self, seconds: float) -> Compute:
        """A step that takes so long in all, with the same shares of its parts."""
        factor = seconds / self.seconds
        return Compute(factor * self.forward, factor * self.backward, factor * self.update)


@dataclasses.dataclass(frozen=True)
class Bucket:
    """What travels together: see `moves` for what of it does.

    Attributes:
        schedule, payload: as `moves` takes them.
        ready: share of the backward pass after which its gradients are there, in [0, 1].
        before: processor seconds until it can be sent: packing, encoding, the new residual.
        after: processor seconds once it has arrived: decoding, the mean, unpacking.
        after_each: the same for each worker's payload, where all are decoded.
    """

    schedule: str
    payload: float
    ready: float = 1.0
    before: float = 0.0
    after: float = 0.0
    after_each: float = 0.0

    def bytes_sent(self, world: int) -> float:
        """By one worker."""
        return sum(sent for _, _, sent in moves(self.schedule, self.payload, world))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A step of `world` workers.

    Attributes:
        world: W.
        seconds: of the step.
        bytes_sent: by one worker.
        link_seconds: while something is on its way.
        codec_seconds: of the processor, for encoding and decoding.
        processor_seconds: of the processor in all: for the step, the codec, and for sending.
        hidden_seconds: of `link_seconds`, while the processor had other work to do.
    """

    world: int
    seconds: float
    bytes_sent: float
    link_seconds: float
    codec_seconds: float
    processor_seconds: float
    hidden_seconds: float


def predict(compute: Compute, buckets: Sequence[Bucket], link: Link, world: int) -> Prediction:
    """A step of `world` workers, each with a processor of its own.

    Args:
        buckets: in the order in which they are sent.
    """
    if world == 1:
        return Prediction(1, compute.seconds, 0.0, 0.0, 0.0, compute.seconds, 0.0)
    on_link = [link.seconds(b.schedule, b.payload, world) for b in buckets]
    done = _pipeline(compute, buckets, on_link, world)
    sent = sum(b.bytes_sent(world) for b in buckets)
    codec = sum(b.before + b.after + world * b.after_each for b in buckets)
    busy = compute.seconds + codec
    # The processor cannot do more at a time because a bucket is on its way.
    processor = busy + sent * link.processor_seconds
    done = max(done + compute.update, processor)
    logs = link.seconds("dense", LOGS, world)
    return Prediction(
        world=world,
        seconds=done + logs,
        bytes_sent=sent,
        link_seconds=sum(on_link) + logs,
        codec_seconds=codec,
        processor_seconds=processor,
        hidden_seconds=max(0.0, busy + sum(on_link) - done),
    )


def _pipeline(compute, buckets, on_link, world) -> float:
    """When the last bucket is decoded, in seconds from the beginning of the step."""
    processor, free, computed, arrivals = compute.forward, 0.0, 0.0, []
    for bucket, seconds in zip(buckets, on_link, strict=True):
        ready = max(computed, bucket.ready)
        processor += compute.backward * (ready - computed) + bucket.before
        computed = ready
        free = max(free, processor) + seconds
        arrivals.append(free)
    processor += compute.backward * (1 - computed)
    for bucket, arrival in zip(buckets, arrivals, strict=True):
        processor = max(processor, arrival) + bucket.after + world * bucket.after_each
    return processor
