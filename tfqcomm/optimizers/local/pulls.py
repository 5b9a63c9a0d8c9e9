"""What a pull works on: the replicas as vectors, and what all processes know of them.

Letters: d parameters, L local replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import keras
import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.state.ledger import Ledger
from tfqcomm.state.replicas import assign_vector, to_vector
from tfqcomm.step import empty_shares
from tfqcomm.step.refusals import require_replica_context


def own_gradients(optimizer: keras.optimizers.Optimizer, gradients) -> list[tf.Tensor | None]:
    """What each replica's own loss has as gradients, in replica context.

    Keras has divided the loss by the number of replicas; where they train alone each counts by
    itself.
    """
    world = require_replica_context(optimizer, "apply").num_replicas_in_sync
    gradients = empty_shares.without_empty(gradients)
    return [None if g is None else tf.convert_to_tensor(g) * world for g in gradients]


class Pullable:
    """The local replicas in the middle of a step, in cross-replica context.

    Attributes:
        ledger: of the optimizer.
        transport: to all replicas.
        variables: for each local replica its own copies.
        size: d.
    """

    def __init__(self, ledger: Ledger, variables: list[tuple[tf.Variable, ...]]):
        self.ledger = ledger
        self.transport = ledger.transport
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

    They are made before the first step. The ledger keeps them with the optimizer's state.
    """

    def __init__(self):
        self._variables: dict[str, tf.Variable] = {}
        self._saved: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> tf.Variable:
        return self._variables[name]

    def __contains__(self, name: str) -> bool:
        return name in self._variables

    def create(self, name: str, value: Callable[[], tf.Tensor], replicas: Pullable) -> None:
        """Makes one; `value` is called eagerly, on all processes. What was saved of it wins."""
        with tf.init_scope():
            self._variables[name] = _tf_private.local_variable(
                value(), name=name, device=replicas.transport.device
            )
        self._load(name)

    def state(self) -> dict[str, np.ndarray]:
        """What a backup, or a model, keeps."""
        return self._saved | {name: v.numpy() for name, v in self._variables.items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Inverse of `state`."""
        self._saved = dict(state)
        for name in self._variables:
            self._load(name)

    def _load(self, name: str) -> None:
        saved, variable = self._saved.get(name), self._variables[name]
        if saved is not None and saved.shape == tuple(variable.shape):  # counts of W replicas
            with tf.init_scope():
                variable.assign(saved)


def every(period: int, step: tf.Tensor, pull) -> tf.Tensor:
    """Calls `pull`, which returns bytes, in each step that `period` divides; else 0 bytes."""
    return tf.cond(tf.equal(step % period, 0), pull, lambda: tf.constant(0))
