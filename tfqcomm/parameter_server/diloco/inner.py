"""The inner optimizer's step, with the weights and the state of whichever learner takes it."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.parameter_server.optimizers import server_variable


class InnerStep:
    """Any Keras optimizer in the graph of a learner's step: its own `apply`, on given variables.

    One optimizer serves all learners: while a step is traced, its variables hold values of the
    graph, loaded from the learner's and stored there afterwards.

    Args:
        optimizer: the user's, built or not; another one like it is made.
        variables: that it trains, of the model.

    Attributes:
        state: what a learner's state begins with: the count of its steps, then the slots.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]):
        config = {**optimizer.get_config(), "learning_rate": 0.0, "loss_scale_factor": None}
        self._optimizer = type(optimizer).from_config(config)
        self._variables = [
            server_variable(np.zeros(v.shape), v, f"variable{i}_row0")
            for i, v in enumerate(variables)
        ]
        self._optimizer.exclude_from_weight_decay(
            [
                own
                for own, variable in zip(self._variables, variables, strict=True)
                if not _tf_private.may_decay(optimizer, variable)
            ]
        )
        self._optimizer.build(self._variables)
        rate = self._optimizer.learning_rate
        slots = [v for v in self._optimizer.variables if v is not rate]
        self.state = [v.numpy() for v in slots]
        self._rate = _tf_private.work_on_values(rate)
        self._slots = [_tf_private.work_on_values(v) for v in slots]
        self._weights = [_tf_private.work_on_values(v) for v in self._variables]

    def __call__(self, weights, state, gradients, rate) -> None:
        """Takes a step, in a graph.

        Args:
            weights, state: variables of a learner, which change.
            gradients: float32; None for what has none, which stays as it is.
            rate: float32 scalar, the learning rate.
        """
        own = [*self._weights, *self._slots]
        theirs = [*weights, *state]
        for working, variable in zip(own, theirs, strict=True):
            dtype = tf.float32 if variable.dtype.is_floating else variable.dtype
            working.tensor = tf.cast(variable.read_value(), dtype)
        self._rate.tensor = tf.identity(rate)
        pairs = [
            (tf.identity(gradient), variable)  # all of them in this graph: Keras asks for one
            for gradient, variable in zip(gradients, self._variables, strict=True)
            if gradient is not None
        ]
        self._optimizer.apply(*zip(*pairs, strict=True))
        for working, variable in zip(own, theirs, strict=True):
            variable.assign(tf.cast(working.tensor, variable.dtype))
