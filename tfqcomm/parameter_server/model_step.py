"""Gradients of a model at weights that are not its own: what a worker's graph begins with."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private


class ModelStep:
    """Forward and backward pass of a model on tensors in place of its variables.

    Args:
        model: compiled and built; its variables are never touched.

    Attributes:
        statistics: its moving statistics.
        local: its other variables without gradients, such as states of dropout.
        metrics: the states of all metrics at the beginning of an epoch, float64.
    """

    def __init__(self, model: keras.Model):
        self.model = model
        self.statistics = _tf_private.statistics(model)
        moving = {id(v) for v in self.statistics}
        self.local = [v for v in model.non_trainable_variables if id(v) not in moving]
        self.metrics = metric_states(model)

    def gradients(self, weights, statistics, batch, local, metrics):
        """One batch; updates `local` and `metrics`.

        Args:
            weights: tensors of the trainable variables' shapes, which are cast to their dtypes.
            statistics: float32[s].
            batch: (x, y, sample_weight).
            local: variables like those of `local`.
            metrics: variable, the states of all metrics in a row, float64.

        Returns:
            Float32 gradients, new statistics and the loss.
        """
        x, y, sample_weight = batch
        model, variables = self.model, self.model.metrics_variables
        weights = [
            tf.cast(w, v.dtype) for w, v in zip(weights, model.trainable_variables, strict=True)
        ]
        mapping = [
            *zip(model.trainable_variables, weights, strict=True),
            *zip(self.statistics, _split_like(statistics, self.statistics), strict=True),
            *zip(self.local, [v.read_value() for v in local], strict=True),
            *zip(variables, _split_like(metrics.read_value(), variables), strict=True),
        ]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            with keras.StatelessScope(mapping, collect_losses=True) as scope:
                y_pred = model(x, training=True)
                loss = model.compute_loss(x, y, y_pred, sample_weight, training=True)
                with tape.stop_recording():
                    rows = tf.shape(tf.nest.flatten(x)[0])[0]
                    _tf_private.loss_tracker(model).update_state(loss, sample_weight=rows)
                    model.compute_metrics(x, y, y_pred, sample_weight)
        gradients = tape.gradient(loss, weights, unconnected_gradients="zero")
        for variable, reference in zip(local, self.local, strict=True):
            variable.assign(scope.get_current_value(reference))
        metrics.assign(_join(variables, scope, tf.float64))
        gradients = [tf.cast(tf.convert_to_tensor(g), tf.float32) for g in gradients]
        return gradients, _join(self.statistics, scope, tf.float32), loss


def flat_values(variables: Sequence[keras.Variable], dtype=np.float32) -> np.ndarray:
    """The variables' values in a row."""
    flat = [np.asarray(v, dtype).ravel() for v in variables]
    return np.concatenate([np.zeros([0], dtype), *flat])


def assign_flat(variables: Sequence[keras.Variable], values: np.ndarray) -> None:
    """Inverse of `flat_values`."""
    start = 0
    for variable in variables:
        size = int(np.prod(variable.shape))
        variable.assign(values[start : start + size].reshape(variable.shape))
        start += size


def metric_states(model: keras.Model) -> np.ndarray:
    """All metrics' variables in a row, float64."""
    return flat_values(model.metrics_variables, np.float64)


def _split_like(vector: tf.Tensor, variables: Sequence[keras.Variable]) -> list[tf.Tensor]:
    """Cuts a vector into tensors of the variables' shapes and dtypes."""
    sizes = [int(np.prod(v.shape)) for v in variables]
    return [
        tf.cast(tf.reshape(part, v.shape), v.dtype)
        for part, v in zip(tf.split(vector, sizes) if sizes else [], variables, strict=True)
    ]


def _join(variables: Sequence[keras.Variable], scope, dtype) -> tf.Tensor:
    """The variables' values in a scope as one vector."""
    flat = [tf.cast(tf.reshape(scope.get_current_value(v), [-1]), dtype) for v in variables]
    return tf.concat([tf.zeros([0], dtype), *flat], 0)
