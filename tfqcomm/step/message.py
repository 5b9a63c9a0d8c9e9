"""What goes into an exchange, and what comes out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Message:
    """One tensor of a step, on all local replicas.

    Attributes:
        key: names the residual; the same on all processes and in every run.
        values: a tensor or `IndexedSlices` for each local replica.
        compressible: False for what must arrive as it is.
        path: what the tensor is called, for people.
        factor: the message is `values` times this: whoever packs it multiplies.
        part_of: the shape of the tensor of which `values`, flat, are some elements; None where they
            are all of it. By its shape it is decided how they travel.
    """

    key: str
    values: Sequence[tf.Tensor | tf.IndexedSlices]
    compressible: bool = True
    path: str = ""
    factor: int = 1
    part_of: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """What policies and people know it by."""
        return self.path or self.key

    @property
    def shape(self) -> tuple[int, ...]:
        """Static shape, dense."""
        return tuple(self.values[0].shape)

    @property
    def size(self) -> int:
        """Elements, dense."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Static shape of the tensor that this is, or is a part of."""
        return self.shape if self.part_of is None else self.part_of

    @property
    def sparse(self) -> bool:
        """Whether this is the gradient of an embedding."""
        return isinstance(self.values[0], tf.IndexedSlices)

    @property
    def dtype(self) -> tf.DType:
        """What it travels as when nothing compresses it: float64, all other types as float32."""
        return tf.float64 if self.floats(0).dtype == tf.float64 else tf.float32

    def flat(self, replica: int, dtype: tf.DType = tf.float32) -> tf.Tensor:
        """`dtype`[n], without the factor."""
        return tf.cast(tf.reshape(self.values[replica], [self.size]), dtype)

    def floats(self, replica: int) -> tf.Tensor:
        """The numbers there are: all of a dense tensor, the given rows of a sparse one.

        Without the factor.
        """
        value = self.values[replica]
        return value.values if self.sparse else value


@dataclasses.dataclass(frozen=True)
class Reduction:
    """What an exchange found; `commit` makes it so.

    Attributes:
        means: for each message its mean over all replicas, in the message's shape.
        healthy: bool scalar, the same everywhere: every message of every replica was finite.
        commit: assigns the new residuals; to be called in a healthy step only.
        left_out: gives (local replica, key) -> the new residual, in the message's shape; of what
            was compressed with error feedback.
        record: adds the step to the meter.
        bytes_sent: by one worker, a Python number or a scalar tensor.
    """

    means: list[tf.Tensor | tf.IndexedSlices]
    healthy: tf.Tensor
    commit: Callable[[], None]
    left_out: Callable[[], Mapping[tuple[int, str], tf.Tensor]]
    record: Callable[[], None]
    bytes_sent: tf.Tensor | int


def path_of(variable) -> str:
    """What a variable is called, for people."""
    return getattr(variable, "path", variable.name)
