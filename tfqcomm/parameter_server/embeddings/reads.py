"""From ids of any kind to unique ones, and back to the rows that a layer has asked for."""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf

from tfqcomm import _tf_private


def by_lookup(variable: keras.Variable, ids, pull: Callable) -> tf.Tensor:
    """What `keras.ops.take(variable, ids, axis=0)` returns, of a table that is elsewhere.

    Args:
        variable: the table, of the shape [rows, d].
        ids: of any type and rank, ragged and sparse ones, too.
        pull: unique ids, int64[r] -> their rows, float32[r, d].
    """
    if isinstance(ids, tf.SparseTensor):  # what is not there counts as id 0, as in Keras
        ids = tf.sparse.to_dense(ids)
    ids = keras.ops.cast(ids, "int64")
    flat = tf.reshape(getattr(ids, "flat_values", ids), [-1])
    unique, places = tf.unique(_checked(flat, variable))
    rows = pull(unique)
    if isinstance(ids, tf.RaggedTensor):
        places = ids.with_flat_values(tf.reshape(places, tf.shape(ids.flat_values)))
        found = tf.ragged.map_flat_values(tf.gather, rows, places)
    else:
        found = tf.gather(rows, tf.reshape(places, tf.shape(ids)))
        found = tf.ensure_shape(found, [*ids.shape, variable.shape[1]])
    return _tf_private.autocast(variable, tf.cast(found, variable.dtype))


def _checked(ids, variable: keras.Variable) -> tf.Tensor:
    """int64[n], negative ones counted from the end, as in Keras; an error for others."""
    rows = variable.shape[0]
    counted = tf.where(ids < 0, ids + rows, ids)
    strange = (counted < 0) | (counted >= rows)
    known = tf.debugging.Assert(
        ~tf.reduce_any(strange),
        [
            f"The ids of {variable.path}, which has {rows} rows, must be from {-rows} to "
            f"{rows - 1}. Received: id=",
            tf.boolean_mask(ids, strange)[:1],
        ],
    )
    with tf.control_dependencies([known]):
        return tf.identity(counted)
