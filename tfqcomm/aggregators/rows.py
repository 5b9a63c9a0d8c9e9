"""The gradients of embeddings: rows and their places, gathered from all replicas.

rows as they are   what TensorFlow gives, a row twice where a batch has it twice
rows each once     summed on each replica, and again behind the exchange, in rank order:
an optimizer that squares rows then squares their sum, as of a dense gradient
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfqcomm.kernels import rows as wire
from tfqcomm.transport.base import Transport


def each_once(rows: tf.IndexedSlices) -> tf.IndexedSlices:
    """The same gradient, in which no row occurs twice."""
    places, which = tf.unique(rows.indices)
    total = tf.math.unsorted_segment_sum(rows.values, which, tf.size(places))
    return tf.IndexedSlices(total, places, rows.dense_shape)


def gather_as_they_are(
    transport: Transport, rows: Sequence[tf.IndexedSlices], shape: Sequence[int], factor: float
) -> tuple[tf.IndexedSlices, tf.Tensor]:
    """The mean of `factor` times all replicas' rows, and the bytes one worker sent for it.

    Args:
        rows: of each local replica.
        shape: of the table.
    """
    values, places, sent = _gather(transport, rows)
    with tf.device(transport.device):
        return _mean(transport, values, places, shape, factor), sent


def gather_each_once(
    transport: Transport,
    rows: Sequence[tf.IndexedSlices],
    shape: Sequence[int],
    factor: float,
    row_type: str,
) -> tuple[tf.IndexedSlices, tf.Tensor]:
    """Likewise of rows that occur once on each replica: in the mean, too, each is there once.

    Args:
        row_type: what they travel as: one of `kernels.rows.ROW_TYPES`.
    """
    if row_type == "float32":
        values, places, sent = _gather(transport, rows)
    else:
        height, width = shape[0], int(np.prod(shape[1:]))
        words = []
        for of, device in zip(rows, transport.devices, strict=True):
            with tf.device(device):
                flat = tf.cast(tf.reshape(of.values, [-1, width]), tf.float32)
                words.append(wire.encode(row_type, flat, of.indices, height))
        gathered, sent = transport.all_gather_ragged(words)
        with tf.device(transport.device):
            decoded = [wire.decode(row_type, w, width, height) for w in gathered]
            values = [tf.reshape(v, [-1, *shape[1:]]) for v, _ in decoded]
            places = [p for _, p in decoded]
    with tf.device(transport.device):
        total, all_places = _summed(values, places)
        return _mean(transport, [total], [all_places], shape, factor), sent


def _gather(transport, rows):
    """Values and places of every replica's rows, and the bytes one worker sent."""
    values, value_bytes = transport.all_gather_ragged([r.values for r in rows])
    places, place_bytes = transport.all_gather_ragged([r.indices for r in rows])
    return values, places, value_bytes + place_bytes


def _summed(values, places):
    """Added replica by replica: in one order on all processes, on a GPU, too."""
    found, which = tf.unique(tf.concat(places, 0))
    total = tf.zeros([tf.size(found), *values[0].shape[1:]], values[0].dtype)
    start = 0
    for rows in values:
        own = which[start : start + tf.shape(rows)[0]]
        total = tf.tensor_scatter_nd_add(total, own[:, None], rows)
        start += tf.shape(rows)[0]
    return total, found


def _mean(transport, values, places, shape, factor):
    rows, share = tf.concat(values, 0), factor / transport.world
    return tf.IndexedSlices(
        values=rows if share == 1 else rows * tf.cast(share, rows.dtype),
        indices=tf.concat(places, 0),
        dense_shape=tf.constant(shape, tf.int64),
    )
