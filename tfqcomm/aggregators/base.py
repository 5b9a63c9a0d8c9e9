"""What every aggregator is: local messages of all replicas in, their mean out."""

from __future__ import annotations

import abc
import dataclasses
import zlib
from collections.abc import Sequence

import tensorflow as tf

from tfqcomm.compressors.base import Compressor
from tfqcomm.error_feedback import Residuals, Slot
from tfqcomm.transport import Transport


@dataclasses.dataclass(frozen=True)
class Aggregate:
    """The result of one exchange; nothing has changed yet.

    Attributes:
        means: float32[n] for each tensor, the same bits on all replicas.
        healthy: bool scalar: all messages of all replicas were finite. Where it is false the
            means are meaningless, and `updates` must not be applied.
        updates: (variable, new value) pairs: the residuals after this step.
        bytes_sent: by one worker.
    """

    means: list[tf.Tensor]
    healthy: tf.Tensor
    updates: list[tuple[tf.Variable, tf.Tensor]]
    bytes_sent: int | tf.Tensor


class Aggregator(abc.ABC):
    """Averages lists of vectors over replicas.

    Args:
        compressor: the codec of the messages.
        transport: moves the words.
        residuals: where error feedback is kept; None for none.
        keys: the tensors' names.
        sizes: their elements.
        seed: base of the seeds of stochastic codecs.
    """

    def __init__(
        self,
        compressor: Compressor,
        transport: Transport,
        residuals: Residuals | None,
        keys: Sequence[str],
        sizes: Sequence[int],
        *,
        seed: int = 0,
    ):
        self.compressor = compressor
        self.transport = transport
        self.residuals = None if compressor.lossless else residuals
        self.keys = tuple(keys)
        self.sizes = tuple(sizes)
        self.seed = seed
        for key, size in zip(self.keys, self.sizes, strict=True):
            if self.residuals is not None:
                self.residuals.declare(key, size)

    @abc.abstractmethod
    def aggregate(
        self, messages: Sequence[Sequence[tf.Tensor]], healthy: Sequence[tf.Tensor], step: tf.Tensor
    ) -> Aggregate:
        """Averages the messages of all replicas.

        Args:
            messages: for each local replica, for each tensor: float32[n].
            healthy: for each local replica, a bool scalar: its message is finite. The flags
                travel with the payload, so that all replicas know of each other.
            step: int scalar; together with tensor and replica it seeds stochastic codecs.
        """

    def worker_residual(self, replica: int, tensor: int) -> tf.Variable | None:
        """The residual of a local replica's message."""
        if self.residuals is None:
            return None
        size = self.sizes[tensor]
        return self.residuals.variable(replica, Slot("worker", self.keys[tensor], size, 0, size))

    def targets(self, replica: int, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The messages of a local replica plus what is owed from before."""
        residuals = [self.worker_residual(replica, index) for index in range(len(tensors))]
        return [t if r is None else t + r for t, r in zip(tensors, residuals, strict=True)]

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
