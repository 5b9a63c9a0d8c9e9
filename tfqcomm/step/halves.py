"""What an algorithm may bring to a step beside Keras' `update_step`: a worker's half, a warm-up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import keras
import tensorflow as tf


class WorkerHalf(Protocol):
    """What a worker makes of its gradient before it is sent.

    Attributes:
        worker_slots: what it remembers of each tensor: name -> initial value of all elements.
        reads_server: whether it needs more than that, see `server_state`.
    """

    worker_slots: Mapping[str, float]
    reads_server: bool

    def server_state(self, index: int) -> Mapping[str, keras.Variable]:
        """What it reads, and does not change, of the server's half: name -> slot.

        Args:
            index: of the variable, among those the optimizer was built for.
        """

    def worker_step(
        self, gradient: tf.Tensor, state: Mapping[str, tf.Tensor], iteration: tf.Tensor
    ) -> tuple[tf.Tensor, Mapping[str, tf.Tensor]]:
        """A tensor's message and new state, both of the gradient's shape and float32.

        Args:
            state: its own, and that of `server_state`.
            iteration: int scalar, steps taken so far.
        """

    def worker_sent(
        self, state: Mapping[str, tf.Tensor], left_out: tf.Tensor
    ) -> Mapping[str, tf.Tensor]:
        """What of the new state remains once a message was compressed.

        Args:
            left_out: the residual: zero where the entry was sent.
        """


class WarmUp(Protocol):
    """The first steps of a training that does not compress from the beginning on."""

    def compresses(self) -> tf.Tensor:
        """Bool scalar, equal on all replicas and all through a step: whether the warm-up is over.

        A step that is skipped does not change it.
        """

    def step_taken(self) -> None:
        """Called once at the end of a step that is taken, in cross-replica context."""
