"""What a worker's half of an optimizer remembers: variables that differ from replica to replica.

QAdam's moments, or a momentum that is corrected before compression, belong to the worker that
computed them and never travel. They are an optimizer's state all the same: `BackupAndRestore`
keeps their mean over all replicas, and what can be saved by one process alone, a model or a
`tf.train.Checkpoint`, their mean over its replicas. One worker resumes exactly from either.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.transport.base import Transport


class WorkerState:
    """The slots of one optimizer's worker half, for all replicas of this process."""

    def __init__(self, transport: Transport):
        self._transport = transport
        self._variables: dict[tuple[int, str], tf.Variable] = {}
        self._pending: dict[str, np.ndarray] = {}

    def variable(
        self, replica: int, slot: str, key: str, shape, initial: float, dtype=tf.float32
    ) -> tf.Variable:
        """A local replica's slot of the tensor `key`, created as `initial` everywhere.

        Args:
            slot: its name, such as "momentum".
            shape: of the tensor, static.
            dtype: of the variable; what is saved of it is float32.
        """
        name = f"{slot}/{key}"
        if (replica, name) not in self._variables:
            value = self._pending.get(name, np.full(tuple(shape), initial, np.float32))
            self._variables[replica, name] = _tf_private.local_variable(
                value.astype(dtype.as_numpy_dtype),
                name=f"worker/{name}",
                device=self._transport.devices[replica],
            )
        return self._variables[replica, name]

    def adopt(self, replica: int, slot: str, key: str, variable: tf.Variable) -> None:
        """Makes a variable that exists already one of a local replica's slots.

        It is given what was saved of the slot, and keeps its own type.
        """
        name = f"{slot}/{key}"
        self._variables[replica, name] = variable
        self._give(name, variable)

    def mean(self) -> dict[str, np.ndarray]:
        """Each slot's mean over all replicas: a collective, to be called on all processes."""
        total = self._transport.add_up(self._local_sum())
        return self._pending | {n: v / self._transport.world for n, v in total.items()}

    def local_mean(self) -> dict[str, np.ndarray]:
        """Each slot's mean over the replicas of this process: nothing is communicated."""
        total = self._local_sum()
        return self._pending | {n: v / self._transport.local for n, v in total.items()}

    def _local_sum(self) -> dict[str, np.ndarray]:
        names = dict.fromkeys(name for _, name in self._variables)
        return {
            name: sum(
                v.numpy().astype(np.float32) for (_, n), v in self._variables.items() if n == name
            )
            for name in names
        }

    def load_mean(self, mean: dict[str, np.ndarray]) -> None:
        """Gives a saved `mean()` to every replica there is now, or will be."""
        self._pending = {name: value.astype(np.float32) for name, value in mean.items()}
        for (_, name), variable in self._variables.items():
            self._give(name, variable)

    def _give(self, name, variable):
        if name in self._pending:
            variable.assign(tf.cast(self._pending[name], variable.dtype))
