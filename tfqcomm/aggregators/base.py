"""What every aggregator is: local messages of all replicas in, their mean out."""

from __future__ import annotations

import abc
import dataclasses
import zlib
from collections.abc import Callable, Sequence

import tensorflow as tf

from tfqcomm.compressors.base import Compressor
from tfqcomm.kernels import numerics
from tfqcomm.state.residuals import Residuals, Slot
from tfqcomm.transport.base import Transport


@dataclasses.dataclass(frozen=True)
class Aggregate:
    """The result of one exchange; nothing has changed yet.

    Attributes:
        means: float32[n] for each tensor, the same bits on all replicas.
        healthy: bool scalar: what all replicas encoded was finite, messages plus residuals, and
            so are the means. Where it is false, `updates` must not be applied.
        updates: (variable, new value) pairs: the residuals after this step.
        bytes_sent: by one worker.
    """

    means: list[tf.Tensor]
    healthy: tf.Tensor
    updates: list[tuple[tf.Variable, tf.Tensor]]
    bytes_sent: int | tf.Tensor


class Aggregator(abc.ABC):
    """Averages lists of vectors over replicas.

        message + residual = target --> finite? --> `exchange` --> means --> finite?
                                                       +--> what is left out: new residuals

    Error feedback, and what makes a step healthy, stand here, once; a subclass moves targets.

    Args:
        compressor: the codec of the messages.
        transport: moves the words.
        residuals: where error feedback is kept; None for none.
        keys: the tensors' names.
        sizes: their elements.
        joint: make one vector of all tensors, for scales and selections that range over all.
        seed: base of the seeds of stochastic codecs.

    Attributes:
        sizes: elements of the vectors that are exchanged, one for each tensor unless `joint`.
    """

    def __init__(
        self,
        compressor: Compressor,
        transport: Transport,
        residuals: Residuals | None,
        keys: Sequence[str],
        sizes: Sequence[int],
        *,
        joint: bool = False,
        seed: int = 0,
    ):
        self.compressor = compressor
        self.transport = transport
        self.residuals = None if compressor.lossless else residuals
        self.keys = tuple(keys)
        self.tensor_sizes = tuple(sizes)
        self.sizes = (sum(sizes),) if joint else self.tensor_sizes
        self.joint = joint
        self.seed = seed
        for key, size in zip(self.keys, self.tensor_sizes, strict=True):
            if self.residuals is not None:
                self.residuals.declare(key, size)

    def aggregate(
        self, messages: Sequence[Sequence[tf.Tensor]], healthy: Sequence[tf.Tensor], step: tf.Tensor
    ) -> Aggregate:
        """Averages the messages of all replicas.

        Args:
            messages: for each local replica, for each tensor: float32[n].
            healthy: for each local replica, a bool scalar: what else it sends is finite.
            step: int scalar; together with tensor and replica it seeds stochastic codecs.
        """
        targets, flags = [], []
        for replica, tensors in enumerate(messages):
            with tf.device(self.transport.devices[replica]):
                tensors = self._targets(replica, tensors)
                flags.append(healthy[replica] & numerics.all_finite(tensors))
                targets.append([_concat(tensors)] if self.joint else tensors)
        found = self.exchange(targets, flags, step)
        with tf.device(self.transport.device):
            # All hold the same bits, so they come to the same conclusion without asking.
            finite = numerics.all_finite(found.means)
            means = split_words(found.means[0], self.tensor_sizes) if self.joint else found.means
            return dataclasses.replace(found, means=means, healthy=found.healthy & finite)

    @abc.abstractmethod
    def exchange(
        self, targets: Sequence[Sequence[tf.Tensor]], healthy: Sequence[tf.Tensor], step: tf.Tensor
    ) -> Aggregate:
        """Averages what the replicas encode, and says what they have left out.

        Args:
            targets: for each local replica, for each vector: messages plus what is owed.
            healthy: for each local replica, a bool scalar: all of it is finite. The flags travel
                with the payload, so that all replicas know of each other.
            step: as in `aggregate`.
        """

    def worker_residual(self, replica: int, tensor: int) -> tf.Variable | None:
        """The residual of a local replica's message."""
        if self.residuals is None:
            return None
        size = self.tensor_sizes[tensor]
        return self.residuals.variable(replica, Slot("worker", self.keys[tensor], size, 0, size))

    def _targets(self, replica, tensors):
        """The messages of a local replica plus what is owed from before."""
        residuals = [self.worker_residual(replica, index) for index in range(len(tensors))]
        return [
            tf.convert_to_tensor(t) if r is None else t + r
            for t, r in zip(tensors, residuals, strict=True)
        ]

    def slots(self, kind: str, vector: int, start: int = 0, stop: int | None = None) -> list[Slot]:
        """The residuals of the part [start, stop) of a vector: in each tensor that it touches."""
        stop = self.sizes[vector] if stop is None else stop
        tensors = range(len(self.keys)) if self.joint else [vector]
        slots, begin = [], 0
        for tensor in tensors:
            size = self.tensor_sizes[tensor]
            low, high = max(start - begin, 0), min(stop - begin, size)
            if low < high or not self.joint:
                slots.append(Slot(kind, self.keys[tensor], size, low, high))
            begin += size
        return slots

    def owed(self, replica: int, slots: Sequence[Slot]) -> tf.Tensor | float:
        """What the residuals of `slots` hold, in a row; 0 without error feedback."""
        if self.residuals is None:
            return 0.0
        return tf.concat([self.residuals.variable(replica, slot) for slot in slots], 0)

    def left_out(
        self, replica: int, slots: Sequence[Slot], target: tf.Tensor, sent: Callable[[], tf.Tensor]
    ) -> list[tuple[tf.Variable, tf.Tensor]]:
        """Updates of the residuals of `slots` where `sent()` has been decoded of `target`."""
        if self.residuals is None or not slots:
            return []
        parts = tf.split(target - sent(), [slot.stop - slot.start for slot in slots])
        variables = [self.residuals.variable(replica, slot) for slot in slots]
        return list(zip(variables, parts, strict=True))

    def codec_seed(
        self, step: tf.Tensor, tensor: int, replica: int, *, start: int = 0, phase: str = "worker"
    ) -> tf.Tensor:
        """int32[2]; codecs whose words are summed must draw the same on all replicas.

        The tensor counts by its place: generated names may differ between processes.

        Args:
            start: of what is encoded in the tensor: its parts draw independently.
            phase: what is encoded, a "worker"'s message or, again, an "owner"'s mean, whose
                rounding must not depend on that of the owner's own message.
        """
        sender = "all" if self.compressor.linear else f"{phase}{self.transport.ranks[replica]}"
        place = f"{sender}/{start}" if start else sender
        static = zlib.crc32(f"{self.seed}/{tensor}/{place}".encode()) & 0x7FFFFFFF
        return tf.stack([tf.constant(static, tf.int32), tf.cast(step, tf.int32)])


def _concat(vectors):
    return tf.concat(vectors, 0) if vectors else tf.zeros([0])


def health_word(healthy: tf.Tensor) -> tf.Tensor:
    """int32[1]: the header of a payload, 0 when its sender's message is finite."""
    return tf.reshape(tf.cast(~healthy, tf.int32), [1])


@tf.function
def decode_mean(compressor: Compressor, words: tf.Tensor, size: int) -> tf.Tensor:
    """Mean of all replicas' decoded words, added in rank order: int32[W, w] -> float32[n].

    The fixed order is what keeps replicas on different machines equal to the bit.
    """
    total = compressor.decode(words[0], size)
    if words.shape[0] == 1:
        return total
    total = tf.foldl(
        lambda total, one: total + compressor.decode(one, size),
        words[1:],
        initializer=total,
        parallel_iterations=1,
    )
    return total / words.shape[0]


def split_words(words: tf.Tensor, lengths: Sequence[int], *, start: int = 0) -> list[tf.Tensor]:
    """Cuts the last axis into pieces of the given lengths, from `start` on."""
    pieces = []
    for length in lengths:
        pieces.append(words[..., start : start + length])
        start += length
    return pieces
