"""What a pull works on: the replicas as vectors, and what all processes know of them.

Letters: d parameters, L local replicas.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.aggregators.exchange import GradientExchange
from tfqcomm.replicas import assign_vector, to_vector


class Pullable:
    """The local replicas in the middle of a step, in cross-replica context.

    Attributes:
        exchange: of the optimizer.
        transport: to all replicas.
        variables: for each local replica its own copies.
        size: d.
    """

    def __init__(self, exchange: GradientExchange, variables: list[tuple[tf.Variable, ...]]):
        self.exchange = exchange
        self.transport = exchange.transport
        self.variables = variables
        self.size = sum(v.shape.num_elements() for v in variables[0])

    def vectors(self) -> list[tf.Tensor]:
        """L times float32[d]."""
        vectors = []
        for device, variables in zip(self.transport.devices, self.variables, strict=True):
            with tf.device(device):
                vectors.append(to_vector(variables))
        return vectors

    def assign(self, vectors: list[tf.Tensor]) -> None:
        """Gives each local replica its vector."""
        for device, variables, vector in zip(
            self.transport.devices, self.variables, vectors, strict=True
        ):
            with tf.device(device):
                assign_vector(variables, vector)

    def mean(self) -> tf.Tensor:
        """float32[d], the mean of all replicas: a ring all-reduce."""
        return self.transport.all_reduce(self.vectors()) / self.transport.world


class SharedState:
    """Variables of this process that all processes treat alike, so that they are equal.

    They are made before the first step, and no checkpoint keeps them.
    """

    def __init__(self):
        self._variables: dict[str, tf.Variable] = {}

    def __getitem__(self, name: str) -> tf.Variable:
        return self._variables[name]

    def __contains__(self, name: str) -> bool:
        return name in self._variables

    def create(self, name: str, value: Callable[[], tf.Tensor], replicas: Pullable) -> None:
        """Makes one; `value` is called eagerly."""
        with tf.init_scope():
            self._variables[name] = _tf_private.local_variable(
                value(), name=name, device=replicas.transport.device
            )


def every(period: int, step: tf.Tensor, pull) -> tf.Tensor:
    """Calls `pull`, which returns bytes, in each step that `period` divides; else 0 bytes."""
    return tf.cond(tf.equal(step % period, 0), pull, lambda: tf.constant(0))
