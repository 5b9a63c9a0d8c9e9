"""From what an embedding layer is called with to unique ids, and back to what it returns."""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf


def by_lookup(layer: keras.layers.Embedding, inputs, pull: Callable) -> tf.Tensor:
    """What the layer returns, whose table is elsewhere.

    Args:
        layer: an embedding.
        inputs: ids of any type and rank, ragged and sparse ones, too.
        pull: unique ids, int64[r] -> their rows, float32[r, d].
    """
    if isinstance(inputs, tf.SparseTensor):  # what is not there counts as id 0, as in Keras
        inputs = tf.sparse.to_dense(inputs)
    ids = keras.ops.cast(inputs, "int64")
    flat = tf.reshape(getattr(ids, "flat_values", ids), [-1])
    unique, places = tf.unique(_checked(flat, layer))
    rows = pull(unique)
    if isinstance(ids, tf.RaggedTensor):
        places = ids.with_flat_values(tf.reshape(places, tf.shape(ids.flat_values)))
        outputs = tf.ragged.map_flat_values(tf.gather, rows, places)
    else:
        outputs = tf.gather(rows, tf.reshape(places, tf.shape(ids)))
        outputs = tf.ensure_shape(outputs, [*ids.shape, layer.output_dim])
    return keras.ops.cast(outputs, layer.compute_dtype)


def _checked(ids, layer) -> tf.Tensor:
    """int64[n], negative ones counted from the end, as in Keras; an error for others."""
    rows = layer.input_dim
    counted = tf.where(ids < 0, ids + rows, ids)
    strange = (counted < 0) | (counted >= rows)
    known = tf.debugging.Assert(
        ~tf.reduce_any(strange),
        [
            f"The ids of {layer.embeddings.path}, which has {rows} rows, must be from {-rows} to "
            f"{rows - 1}. Received: id=",
            tf.boolean_mask(ids, strange)[:1],
        ],
    )
    with tf.control_dependencies([known]):
        return tf.identity(counted)
