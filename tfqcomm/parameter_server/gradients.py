"""Gradients as TensorFlow gives them: tensors, rows of embeddings, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from tfqcomm import _tf_private


def clip(optimizer: keras.optimizers.Optimizer, gradients: Sequence, workers: int) -> list:
    """The optimizer's own clipping of one worker's gradients.

    As under a strategy of W replicas, where the loss is divided by W: of their W-th part.
    """
    if not any((optimizer.clipnorm, optimizer.clipvalue, optimizer.global_clipnorm)):
        return list(gradients)
    parts = [mapped(lambda values: values / workers, g) for g in gradients]
    clipped = _tf_private.clip_gradients(optimizer, parts)
    return [mapped(lambda values: values * workers, g) for g in clipped]


def unscale(gradients: Sequence, scale: tf.Tensor | None) -> list:
    """Divides by what the loss was multiplied by, in float32."""
    if scale is None:
        return list(gradients)
    return [mapped(lambda values: tf.cast(values, tf.float32) / scale, g) for g in gradients]


def all_finite(gradients: Sequence) -> tf.Tensor:
    """Bool scalar."""
    numbers = [getattr(g, "values", g) for g in gradients if g is not None]
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(n)) for n in numbers])


def norm_and_health(tensors: Sequence[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """The norm of all numbers, and whether they are finite: two scalars, in one pass over them.

    Only where the norm is not finite are they looked at one by one: it may overflow where they
    do not.
    """
    if not tensors:
        return tf.constant(0.0), tf.constant(True)
    norm = tf.linalg.global_norm(tensors)
    return norm, tf.cond(tf.math.is_finite(norm), lambda: True, lambda: all_finite(tensors))


def dense(gradients: Sequence, weights: Sequence[keras.Variable]) -> list[tf.Tensor]:
    """Float32 tensors: those of embeddings in full, zeros where there is none."""
    return [
        tf.zeros(v.shape) if g is None else tf.cast(tf.convert_to_tensor(g), tf.float32)
        for g, v in zip(gradients, weights, strict=True)
    ]


def mapped(function: Callable, gradient):
    """`function` of the numbers there are; rows stay rows, and none stays none."""
    if isinstance(gradient, tf.IndexedSlices):
        values = function(gradient.values)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return None if gradient is None else function(gradient)
