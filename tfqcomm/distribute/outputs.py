"""What replicas predicted, gathered on every worker: tensors of any type, ragged and sparse ones.

Letters: L local replicas, P processes, W = P x L.
"""

from __future__ import annotations

import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.transport.base import Transport

_GATHERED_AS_THEY_ARE = (tf.float16, tf.float32, tf.float64, tf.int32, tf.int64)


def gather(transport: Transport, strategy: tf.distribute.Strategy, outputs):
    """Concatenates each leaf of `outputs` over all replicas, along the first axis.

    TensorFlow deals the parts of a batch to the workers in turn, so the first replica of every
    worker comes first.
    """
    with _tf_private.doing("the outputs of predict"):
        gathered = [
            _gather_leaf(transport, strategy.experimental_local_results(leaf))
            for leaf in tf.nest.flatten(outputs)
        ]
    return tf.nest.pack_sequence_as(outputs, gathered)


def _gather_leaf(transport, local):
    """One leaf, from its value on each local replica."""
    local = [v if tf.is_tensor(v) else tf.convert_to_tensor(v) for v in local]
    parts = [tf.nest.flatten(value, expand_composites=True) for value in local]
    columns = [_gather_rows(transport, values) for values in zip(*parts, strict=True)]
    values = [
        tf.nest.pack_sequence_as(local[0], list(row), expand_composites=True)
        for row in zip(*columns, strict=True)
    ]
    order = [
        p * transport.local + r for r in range(transport.local) for p in range(transport.processes)
    ]
    return _concat([values[rank] for rank in order])


def _gather_rows(transport, values) -> list[tf.Tensor]:
    """W tensors, in rank order, from one of each local replica."""
    dtype, shape = values[0].dtype, values[0].shape
    if dtype == tf.string:
        bits = [tf.io.decode_raw(tf.io.serialize_tensor(v), tf.uint8) for v in values]
        bits = _gather_rows(transport, bits)
        return [_read_strings(b, shape) for b in bits]
    rows = [_to_carrier(v[None] if shape.rank == 0 else v) for v in values]
    gathered, _ = transport.all_gather_ragged(rows)
    found = [_from_carrier(g, dtype) for g in gathered]
    return [g[0] for g in found] if shape.rank == 0 else found


def _read_strings(octets, shape):
    data = tf.strings.reduce_join(tf.gather(_OCTETS, tf.cast(octets, tf.int32)))
    strings = tf.io.parse_tensor(data, tf.string)
    return tf.ensure_shape(strings, [None, *shape[1:]] if shape.rank else shape)


_OCTETS = [bytes([i]) for i in range(256)]


def _to_carrier(value):
    """The same bits in a type that there is a collective for."""
    dtype = value.dtype
    if dtype in _GATHERED_AS_THEY_ARE:
        return value
    if dtype == tf.bool:
        return tf.cast(value, tf.int32)
    if dtype.size <= 2:
        unsigned = {1: tf.uint8, 2: tf.uint16}[dtype.size]
        return tf.cast(value if dtype == unsigned else tf.bitcast(value, unsigned), tf.int32)
    return tf.bitcast(value, tf.int32 if dtype.size == 4 else tf.int64)


def _from_carrier(value, dtype):
    if dtype in _GATHERED_AS_THEY_ARE or dtype == tf.bool:
        return tf.cast(value, dtype)
    if dtype.size <= 2:
        unsigned = {1: tf.uint8, 2: tf.uint16}[dtype.size]
        value = tf.cast(value, unsigned)
        return value if dtype == unsigned else tf.bitcast(value, dtype)
    return tf.bitcast(value, dtype)


def _concat(values):
    if isinstance(values[0], tf.SparseTensor):
        return tf.sparse.concat(0, values)
    return tf.stack(values) if values[0].shape.rank == 0 else tf.concat(values, 0)
