"""Gradients of a model at weights that are not its own: what a worker's graph begins with."""

from __future__ import annotations

import warnings

import keras
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.parameter_server.embeddings import Lookups
from tfqcomm.parameter_server.flat import join, split_like
from tfqcomm.parameter_server.gradients import unscale
from tfqcomm.parameter_server.metric_states import MetricStates


class ModelStep:
    """Forward and backward pass of a model on tensors in place of its variables.

    Args:
        model: compiled and built; its variables are never touched.
        lookups: in tables of which rows are pulled as they are looked up.

    Attributes:
        weights: the variables that are trained.
        whole: those of them that are no such tables.
        statistics: its moving statistics.
        local: its other variables: frozen weights, states of dropout.
        metrics: the states of all metrics.
        connected: for each weight whether it has a gradient; known once a step was traced.
        changing: for each of `local` whether a step changes it; likewise.
    """

    def __init__(self, model: keras.Model, lookups: Lookups | None = None):
        self.model = model
        self.lookups = lookups or Lookups()
        self.weights = list(model.trainable_variables)
        self.whole = [v for i, v in enumerate(self.weights) if i not in self.lookups.tables]
        self.statistics = _tf_private.statistics(model)
        moving = {id(v) for v in self.statistics}
        self.local = [v for v in model.non_trainable_variables if id(v) not in moving]
        self.metrics = MetricStates(model)
        self.connected = [True] * len(self.weights)
        self.changing = [True] * len(self.local)

    def gradients(self, weights, statistics, batch, local, metrics, scale=None):
        """One batch; updates `local` and `metrics`.

        Args:
            weights: tensors of the shapes of `whole`, which are cast to their dtypes.
            statistics: float32[s].
            batch: (x, y, sample_weight).
            local: variables like those of `local`.
            metrics: variable, the states of all metrics in a row, float64.
            scale: float32 scalar that keeps small gradients from vanishing in float16: the loss
                is multiplied by it, gradients are divided by it.

        Returns:
            Gradients, None where there is none, those of tables as rows, each once; new statistics
            and the loss.
        """
        x, y, sample_weight = batch
        model = self.model
        weights = [tf.cast(w, v.dtype) for w, v in zip(weights, self.whole, strict=True)]
        states = self.metrics.mapping(metrics.read_value())
        before = [v.read_value() for v in local]
        mapping = [
            *zip(self.whole, weights, strict=True),
            *zip(self.statistics, split_like(statistics, self.statistics), strict=True),
            *zip(self.local, before, strict=True),
            *states,
        ]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            with self.lookups.replacing(tape), self.lookups.scope(mapping) as scope:
                y_pred = model(x, training=True)
                loss = _tf_private.compute_loss(model, x, y, y_pred, sample_weight)
                with tape.stop_recording():
                    rows = tf.shape(tf.nest.flatten(x)[0])[0]
                    _tf_private.loss_tracker(model).update_state(loss, sample_weight=rows)
                    model.compute_metrics(x, y, y_pred, sample_weight)
            scaled = loss if scale is None else loss * tf.cast(scale, loss.dtype)
        gradients = self._in_order(*tape.gradient(scaled, [weights, self.lookups.rows]))
        self._note_connected(gradients)
        self._refuse_assigned(weights, scope)
        self._assign_local(local, before, scope)
        metrics.assign(self.metrics.collect(scope, states))
        return unscale(gradients, scale), join(self.statistics, scope, tf.float32), loss

    def _in_order(self, of_whole, of_rows) -> list:
        """The gradients of `weights`, out of those of `whole` and those of rows."""
        of_tables, rest = self.lookups.summed(of_rows), iter(of_whole)
        tables = self.lookups.tables
        return [of_tables.get(i) if i in tables else next(rest) for i in range(len(self.weights))]

    def _note_connected(self, gradients) -> None:
        """As Keras does: it leaves variables without a gradient alone, and says so."""
        self.connected = [g is not None for g in gradients]
        if not any(self.connected):
            raise ValueError("No gradients provided for any variable.")
        paths = [v.path for v, g in zip(self.weights, gradients, strict=True) if g is None]
        if paths:
            warnings.warn(
                f"Gradients do not exist for variables {paths} when minimizing the loss: they "
                "stay as they are.",
                stacklevel=2,
            )

    def _refuse_assigned(self, weights, scope) -> None:
        """Servers know of gradients alone."""
        assigned = [
            v.path
            for v, w in zip(self.whole, weights, strict=True)
            if scope.get_current_value(v) is not w
        ]
        if assigned:
            raise ValueError(
                "Layers must not assign weights that are trained, as `SpectralNormalization` does: "
                f"parameter servers would not see it. Received: {', '.join(assigned)}"
            )

    def _assign_local(self, local, before, scope) -> None:
        """What a step leaves alone, such as frozen weights, is not copied onto itself."""
        after = [scope.get_current_value(v) for v in self.local]
        self.changing = [a is not b for a, b in zip(after, before, strict=True)]
        for variable, value, changes in zip(local, after, self.changing, strict=True):
            if changes:
                variable.assign(value)
