"""Evaluates and saves the average of replicas that hold different weights."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.optimizers.local.outer_optimizer import OuterOptimizer
from tfqcomm.state import moving_statistics as statistics
from tfqcomm.transport.of_strategy import transport_for


class AverageReplicas(keras.callbacks.Callback):
    """Shows the average of all replicas wherever the model is looked at during `fit`.

    For optimizers whose replicas train alone: `LeaderSGD`, `ElasticAveragingSGD` and
    `PeriodicAveragingSGD`. Before validation and at the end of an epoch every replica's weights,
    and the moving statistics of its layers, become the mean over all replicas; the next epoch goes
    on with each one's own. At the end of training the average stays: `evaluate`, `predict` and
    `save` use it, and all replicas are equal.

    Put it before callbacks that save or watch the model, and pass it to `fit` on all workers: an
    average is a float32 all-reduce of the model, once per epoch, which `TrafficLogger` does not
    count. Within an epoch pass it to `evaluate` or `predict` likewise.

    With `DiLoCo` and `SparseLoCo` the weights that are shown, and left at the end, are the global
    ones, as of the last exchange.

    A replica whose weights, or statistics, are not finite is left out, and goes on with the average
    of the others. An empty share of the last batch is enough to spoil the statistics.

    Example:
    >>> callbacks = [AverageReplicas(), keras.callbacks.ModelCheckpoint("/tmp/best.keras")]
    """

    def __init__(self):
        super().__init__()
        # Of each local replica its variables and their values, while the average is shown.
        self._own: list[tuple[Sequence[tf.Variable], list[tf.Tensor]]] | None = None
        self._training = False

    def on_train_begin(self, logs=None):
        """Notes that training goes on after a validation."""
        self._training = True

    def on_epoch_begin(self, epoch, logs=None):
        """Goes on with each replica's own weights."""
        self._restore()

    def on_train_batch_begin(self, batch, logs=None):
        """Likewise, after an evaluation within an epoch."""
        self._restore()

    def on_epoch_end(self, epoch, logs=None):
        """Shows the average to the callbacks that follow."""
        self._average()

    def on_test_begin(self, logs=None):
        """Evaluates the average."""
        self._average()

    def on_predict_begin(self, logs=None):
        """Predicts with the average."""
        self._average()

    def on_test_end(self, logs=None):
        """Outside of `fit`, leaves everything as it was."""
        if not self._training:
            self._restore()

    def on_predict_end(self, logs=None):
        """Outside of `fit`, leaves everything as it was."""
        if not self._training:
            self._restore()

    def on_train_end(self, logs=None):
        """Leaves the average in place."""
        self._average()
        self._own = None
        self._training = False

    def _average(self):
        transport = transport_for(self.model.distribute_strategy)
        optimizers = _tf_private.optimizers_of(self.model)
        outer = [o for o in optimizers if isinstance(o, OuterOptimizer)]
        if self._own is not None or (transport.world == 1 and not outer):
            return
        self._own = []
        for moving in self._parts():
            for replica in zip(*moving, strict=True):
                self._own.append((replica, [tf.identity(v) for v in replica]))
            statistics.average(transport, moving)
        for optimizer in outer:
            places = _tf_private.trained_weights(optimizer, self.model) or []
            weights = [self.model.weights[place] for place in places]
            optimizer.show_global_weights(self.model.distribute_strategy, weights)

    def _restore(self):
        for variables, own in self._own or []:
            if all(tf.reduce_all(tf.math.is_finite(value)) for value in own):
                for variable, value in zip(variables, own, strict=True):
                    variable.assign(value)
        self._own = None

    def _parts(self) -> list[statistics.Moving]:
        """Weights and moving statistics, each of float32 and of float64."""
        strategy = self.model.distribute_strategy
        weights = [
            strategy.experimental_local_results(v.value) for v in self.model.trainable_variables
        ]
        moving = statistics.values_to_average([self.model], strategy)
        parts = [*statistics.split_by_width(weights), *statistics.split_by_width(moving)]
        return [part for part in parts if part]
