"""Replicas whose share of a batch is empty: they take part in a step and contribute nothing.

Keras divides a batch among the replicas; of a last one, or one smaller than the number of replicas,
some get no rows. The loss of no rows is zero, but what a layer makes of them need not be finite
(batch normalization divides by their number).
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence

import tensorflow as tf

from tfqcomm import _tf_private

_replica = threading.local()  # TensorFlow traces each replica in a thread of its own


# tf.function -> its counted twin, traced once
_functions: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def counted(step: Callable) -> Callable:
    """`step` of one replica, which notes whether its arguments hold any rows."""
    if not isinstance(step, tf.types.experimental.PolymorphicFunction):
        return _counted(_tf_private.converted(step))
    # TensorFlow runs a tf.function's replicas inside of one, if it sees that it is one.
    if step not in _functions:
        _functions[step] = _tf_private.with_python_function(step, _counted)
    return _functions[step]


def _counted(step):
    @functools.wraps(step)
    def counted_step(*args, **kwargs):
        before = getattr(_replica, "has_rows", None)
        _replica.has_rows = _has_rows((args, kwargs))
        try:
            return step(*args, **kwargs)
        finally:
            _replica.has_rows = before

    return tf.autograph.experimental.do_not_convert(counted_step)


def without_empty(gradients: Sequence) -> list:
    """A replica's gradients; zeros if its share of the batch is empty."""
    gradients = list(gradients)
    has_rows = getattr(_replica, "has_rows", None)
    if has_rows is None:
        return gradients
    there = [g for g in gradients if g is not None]
    values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in there]
    # A branch and no `where`: what there is passes through as it is.
    values = tf.cond(
        has_rows,
        lambda: [tf.identity(v) for v in values],
        lambda: [tf.zeros_like(v) for v in values],
    )
    guarded = iter(values)
    return [None if g is None else _with_values(g, next(guarded)) for g in gradients]


def _with_values(gradient, values):
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return values


def _has_rows(structure) -> tf.Tensor | None:
    """Bool scalar; None where it is known that there are, or that nothing here has rows."""
    for value in tf.nest.flatten(structure):
        if not tf.is_tensor(value) or value.shape.rank == 0:
            continue
        if isinstance(value, tf.RaggedTensor):
            return value.nrows() > 0
        if isinstance(value, tf.SparseTensor):
            return value.dense_shape[0] > 0
        rows = value.shape[0] if value.shape.rank else None
        return None if rows else tf.shape(value)[0] > 0
    return None
