"""Counts what an optimizer's exchange of gradients sends, step by step, inside the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private


@dataclasses.dataclass(frozen=True)
class Route:
    """How one tensor travels.

    Attributes:
        path: the variable's path, or what the tensor is.
        shape: of the variable.
        schedule: "dense", "all_gather", "two_phase", "majority_vote", "adaptive", "integer",
            "low_rank" or "shared_support".
        codec: the compressor's description.
    """

    path: str
    shape: tuple[int, ...]
    schedule: str
    codec: str

    def __str__(self) -> str:
        return f"{self.path} {list(self.shape)}: {self.codec}, {self.schedule}"


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Totals since the start of training, of one worker.

    Attributes:
        steps: steps seen, skipped ones included.
        skipped_steps: steps in which a replica's message was not finite.
        bytes_sent: bytes one worker sent in exchanges of gradients.
        dense_bytes: bytes it would have sent in float32 ring all-reduces.
        gradient_norm: norm of the first local replica's message in the last step, if somebody
            watches.
        bytes_pulled: bytes of weights one worker received from parameter servers; then
            `bytes_sent` is what it pushed, and `dense_bytes` counts both directions.
    """

    steps: int
    skipped_steps: int
    bytes_sent: int
    dense_bytes: int
    gradient_norm: float
    bytes_pulled: int = 0

    def since(self, earlier: Traffic) -> Traffic:
        """What came after `earlier`."""
        counts = ("steps", "skipped_steps", "bytes_sent", "dense_bytes", "bytes_pulled")
        new = {name: getattr(self, name) - getattr(earlier, name) for name in counts}
        return dataclasses.replace(self, **new)


class Meter:
    """In-graph counters; exact in int64."""

    def __init__(self):
        def counter(name, dtype=np.int64):
            return _tf_private.local_variable(dtype(0), name=name, device="CPU:0")

        self._steps = counter("steps")
        self._skipped = counter("skipped_steps")
        self._sent = counter("bytes_sent")
        self._dense = counter("dense_bytes")
        self._norm = counter("gradient_norm", np.float32)
        self._pulled = counter("bytes_pulled")
        self._watched = counter("watched", np.bool_)

    def watch(self) -> None:
        """From now on somebody reads norms: they cost a pass over all gradients."""
        with tf.init_scope():  # now, also where a step is being traced
            self._watched.assign(True)

    def record(
        self, bytes_sent, dense_bytes, healthy: tf.Tensor, gradient_norm: Callable[[], tf.Tensor]
    ) -> None:
        """Adds one step.

        Args:
            bytes_sent, dense_bytes: Python numbers or scalar tensors.
            healthy: bool scalar.
            gradient_norm: called for where somebody watches.
        """
        self._steps.assign_add(1)
        self._skipped.assign_add(tf.cast(~healthy, tf.int64))
        self._sent.assign_add(tf.cast(bytes_sent, tf.int64))
        self._dense.assign_add(tf.cast(dense_bytes, tf.int64))
        self._norm.assign(tf.cond(self._watched, gradient_norm, self._norm.read_value))

    def add(self, traffic: Traffic) -> None:
        """Adds what was counted elsewhere (eager)."""
        self._steps.assign_add(traffic.steps)
        self._skipped.assign_add(traffic.skipped_steps)
        self._sent.assign_add(traffic.bytes_sent)
        self._dense.assign_add(traffic.dense_bytes)
        self._norm.assign(traffic.gradient_norm)
        self._pulled.assign_add(traffic.bytes_pulled)

    def read(self) -> Traffic:
        """The totals so far (eager)."""
        return Traffic(
            steps=int(self._steps),
            skipped_steps=int(self._skipped),
            bytes_sent=int(self._sent),
            dense_bytes=int(self._dense),
            gradient_norm=float(self._norm),
            bytes_pulled=int(self._pulled),
        )
