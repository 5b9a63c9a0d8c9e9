"""Saves what an optimizer remembers beside Keras' variables wherever these are saved.

What workers remember, a budget's state, what all replicas know of a centre or a leader: all of it
goes into `model.save`, `save_weights` and `tf.train.Checkpoint`, by one process alone and without
a collective; so of several processes the one that saves gives the mean over its own replicas.
Residuals stay with `callbacks.BackupAndRestore`, which keeps exact means over all replicas, too.
"""

from __future__ import annotations

import inspect
import io
import weakref
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.optimizers.shared_arguments import KERAS_ARGUMENTS
from tfqcomm.state.ledger import memory_of, restore_memory
from tfqcomm.step.shared_arguments import refuse_unknown

_SEPARATOR = ":"  # in place of "/", of which HDF5 makes folders


class RememberingOptimizer(_tf_private.OptimizerSeam):
    """Abstract base of the optimizers of this package.

    Args:
        **options: of `keras.optimizers.Optimizer`.
    """

    def __init__(self, learning_rate, **options):
        self._refuse_unknown(options)
        super().__init__(learning_rate=learning_rate, **options)
        self.memory = _Memory(self)  # an attribute, so that a checkpoint finds it

    @classmethod
    def shared_arguments(cls) -> Mapping[str, inspect.Parameter]:
        """What `**options` may be, with defaults."""
        return KERAS_ARGUMENTS

    @classmethod
    def _refuse_unknown(cls, options: Mapping[str, object]) -> None:
        """Raises a ValueError for options that are none; it names those there are."""
        # `decay` is one of Keras 2: Keras warns of it itself.
        asked = {name: value for name, value in options.items() if name != "decay"}
        refuse_unknown(cls, asked, cls.shared_arguments())

    def save_own_variables(self, store):
        """Adds to the optimizer's variables, which Keras names by number, what it remembers."""
        super().save_own_variables(store)
        for name, value in memory_of(self).items():
            store[name.replace("/", _SEPARATOR)] = value

    def load_own_variables(self, store):
        """Inverse of `save_own_variables`; older files hold the variables alone."""
        names = [name for name in store.keys() if _SEPARATOR in name]  # noqa: SIM118
        numbers = set(store.keys()) - set(names)
        super().load_own_variables({number: store[number] for number in numbers})
        if names:
            restore_memory(self, {n.replace(_SEPARATOR, "/"): store[n][()] for n in names})


class _Memory(tf.train.experimental.PythonState):
    """What one optimizer remembers, as `tf.train.Checkpoint` sees it."""

    def __init__(self, optimizer):
        self._optimizer = weakref.ref(optimizer)

    def serialize(self) -> bytes:
        """An archive of NumPy."""
        file = io.BytesIO()
        with tf.init_scope():
            # A SavedModel is written inside a graph, and nobody goes on training from it.
            memory = memory_of(self._optimizer()) if tf.executing_eagerly() else {}
            np.savez(file, **memory)  # type: ignore[arg-type]  # none is called `allow_pickle`
        return file.getvalue()

    def deserialize(self, string_value: bytes) -> None:
        """Inverse of `serialize`."""
        with tf.init_scope(), np.load(io.BytesIO(string_value)) as memory:
            restore_memory(self._optimizer(), dict(memory))
