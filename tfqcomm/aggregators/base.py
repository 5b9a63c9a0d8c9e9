"""What every aggregator is: a bucket of messages of all replicas in, its mean out."""

from __future__ import annotations

import abc
import dataclasses
import zlib
from collections.abc import Sequence
from typing import ClassVar

import tensorflow as tf

from tfqcomm.aggregators.error_feedback import Encoded, encode_with_feedback, target_of
from tfqcomm.compressors.base import Compressor
from tfqcomm.kernels.layout import Layout, Part
from tfqcomm.state.residuals import Residuals, Slot
from tfqcomm.transport.base import Transport

Updates = list[tuple[tf.Variable, tf.Tensor]]


@dataclasses.dataclass(frozen=True)
class Aggregate:
    """The result of one exchange; nothing has changed yet.

    Attributes:
        means: float32[n] for each tensor, the same bits on all replicas.
        healthy: bool scalar: what all replicas encoded was finite, messages plus residuals, and
            so are the means. Where it is false, `updates` must not be applied.
        updates: (variable, new value) pairs: the residuals after this step, and what else is kept.
        bytes_sent: by one worker.
        left_out: for each local replica its new residual, float32[layout.size]; empty without
            error feedback. `Aggregator.unpack` makes tensors of it.
    """

    means: list[tf.Tensor]
    healthy: tf.Tensor
    updates: Updates
    bytes_sent: int | tf.Tensor
    left_out: Sequence[tf.Tensor] = ()


@dataclasses.dataclass(frozen=True)
class BucketMean:
    """What an exchange has found out about a bucket.

    Attributes:
        mean: float32[layout.size].
        healthy, bytes_sent, left_out: as in `Aggregate`.
        updates: (variable, new value) pairs of all that is kept beside what `left_out` says.
    """

    mean: tf.Tensor
    healthy: tf.Tensor
    updates: Updates
    bytes_sent: int | tf.Tensor
    left_out: Sequence[tf.Tensor] = ()


class Aggregator(abc.ABC):
    """Averages a bucket of tensors over replicas.

        tensors --pack--> message + residual = target --> finite? --> exchange --> mean --unpack-->
                                                             +--> what is left out: new residual

    Args:
        compressor: the codec of the messages.
        transport: moves the words.
        residuals: where error feedback is kept; None for none.
        keys: the tensors' names.
        sizes: their elements.
        joint: make one vector of all tensors, for scales and selections that range over all.
        seed: base of the seeds of stochastic codecs.
        factor: a message is what is given times this.
        residual_scale: number, or scalar, by which what is owed is multiplied; None for 1.

    Attributes:
        layout: of the bucket; tensors without elements are left out.
        one_round: whether all that is sent is known before anything has arrived.
    """

    one_round: ClassVar[bool] = True

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
        factor: int = 1,
        residual_scale: tf.Tensor | float | None = None,
    ):
        self.compressor = compressor
        self.transport = transport
        self.residuals = None if compressor.lossless else residuals
        self.keys = tuple(keys)
        self.sizes = tuple(sizes)
        self.seed = seed
        self.factor = factor
        self.residual_scale = residual_scale
        filled = tuple(n for n in sizes if n)
        row = compressor.row(sum(filled))
        self._tensors = Layout(filled, 1 if joint else row)
        self.layout = Layout((sum(filled),), row) if joint and filled else self._tensors
        if self.residuals is not None:
            for key, size in zip(self.keys, self.sizes, strict=True):
                self.residuals.declare(key, size)

    def aggregate(
        self, messages: Sequence[Sequence[tf.Tensor]], healthy: Sequence[tf.Tensor], step: tf.Tensor
    ) -> Aggregate:
        """Averages the messages of all replicas.

        Args:
            messages: for each local replica, for each tensor: float32[n].
            healthy: for each local replica, a bool scalar: what else it sends is finite; True where
                there is nothing else.
            step: int scalar, which counts exchanges; together with bucket and replica it seeds
                stochastic codecs.
        """
        packed = []
        for replica, tensors in enumerate(messages):
            with tf.device(self.transport.devices[replica]):
                packed.append(self._pack(tensors))
        found = self.exchange(packed, healthy, step)
        with tf.device(self.transport.device):
            means = self.unpack(found.mean)
        own = [(self.residual(replica), rest) for replica, rest in enumerate(found.left_out)]
        updates = [*found.updates, *own]
        return Aggregate(means, found.healthy, updates, found.bytes_sent, found.left_out)

    @abc.abstractmethod
    def exchange(
        self, messages: Sequence[tf.Tensor], healthy: Sequence[tf.Tensor], step: tf.Tensor
    ) -> BucketMean:
        """Averages what the replicas encode, and says what they have left out.

        Args:
            messages: for each local replica: float32[layout.size], to be multiplied by `factor`.
            healthy: for each local replica, a bool scalar: what else it sends is finite. The flags
                travel with the payload, so that all replicas know of each other.
            step: as in `aggregate`.
        """

    def residual(self, replica: int) -> tf.Variable | None:
        """What a local replica owes of its own messages: float32[layout.size]."""
        (whole,) = self.layout.cut(1)
        return self._kept(replica, self.transport.member, whole, self.layout)

    def owners_residual(self, replica: int, part: Part) -> tf.Variable | None:
        """What a local replica owes of the means that it has encoded, as the owner of `part`."""
        return self._kept(replica, "owner", part, part.layout)

    def owed(self) -> list[tf.Tensor]:
        """For each local replica its residual now, float32[layout.size]; empty without feedback."""
        if self.residuals is None or not self.layout.size:
            return []
        found = [self.residual(replica) for replica in range(self.transport.local)]
        return [residual.read_value() for residual in found if residual is not None]

    def value_owed(self, residual: tf.Variable | None) -> tf.Tensor | None:
        """What a residual adds to the message of this step."""
        if residual is None:
            return None
        value = tf.convert_to_tensor(residual)
        return value if self.residual_scale is None else value * self.residual_scale

    def target(self, replica: int, message: tf.Tensor) -> tf.Tensor:
        """The message of a local replica plus what is owed from before."""
        return target_of(self.factor, *self.given(replica, message))

    def given(self, replica: int, message: tf.Tensor) -> list[tf.Tensor]:
        """What a kernel makes the target of: the message, and the residual if there is one."""
        owed = self.value_owed(self.residual(replica))
        return [message] if owed is None else [message, owed]

    def encode(self, replica: int, message: tf.Tensor, step: tf.Tensor) -> Encoded:
        """The words of a local replica's message, and what they leave out."""
        seed = self.codec_seed(step, replica)
        owed = self.value_owed(self.residual(replica))
        return encode_with_feedback(
            self.compressor, self.layout, message, owed, seed, factor=self.factor
        )

    def codec_seed(
        self, step: tf.Tensor, replica: int, *, start: int = 0, phase: str = "worker"
    ) -> tf.Tensor:
        """int32[2]; codecs whose words are summed must draw the same on all replicas.

        Args:
            start: of what is encoded of the bucket: its parts draw independently.
            phase: what is encoded, a "worker"'s message or, again, an "owner"'s mean, whose
                rounding must not depend on that of the owner's own message.
        """
        sender = "all" if self.compressor.linear else f"{phase}{self.transport.ranks[replica]}"
        static = zlib.crc32(f"{self.seed}/{sender}/{start}".encode()) & 0x7FFFFFFF
        return tf.stack([tf.constant(static, tf.int32), tf.cast(step, tf.int32)])

    def _kept(self, replica, kind, part, layout):
        if self.residuals is None or not part.segments:
            return None
        slots = []
        for segment in part.segments:
            slots += self._slots(kind, segment)
        return self.residuals.vector(replica, tuple(slots), layout)

    def _slots(self, kind, segment):
        """The residuals of a part of a vector of the layout: more than one where that is joint."""
        filled = [(key, n) for key, n in zip(self.keys, self.sizes, strict=True) if n]
        if self.layout is self._tensors:
            key, n = filled[segment.vector]
            return [Slot(kind, key, n, segment.start, segment.stop)]
        slots, begin = [], 0
        for key, n in filled:
            low, high = max(segment.start - begin, 0), min(segment.stop - begin, n)
            if low < high:
                slots.append(Slot(kind, key, n, low, high))
            begin += n
        return slots

    def _pack(self, tensors):
        tensors = [tf.convert_to_tensor(t) for t, n in zip(tensors, self.sizes, strict=True) if n]
        packed = self._tensors.pack(tensors)
        return packed if self.layout is self._tensors else self.layout.pack([packed])

    def unpack(self, flat: tf.Tensor) -> list[tf.Tensor]:
        """The tensors [n] of a bucket: inverse of how messages are packed."""
        if self.layout is not self._tensors:
            (flat,) = self.layout.unpack(flat)
        vectors = iter(self._tensors.unpack(flat) if self._tensors.sizes else [])
        return [next(vectors) if n else tf.zeros([0], flat.dtype) for n in self.sizes]
