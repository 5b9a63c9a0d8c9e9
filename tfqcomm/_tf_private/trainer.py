"""Keras' trainer: `fit`, `evaluate`, `predict` and the data they read."""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf
from keras.src.backend.tensorflow import trainer
from tensorflow.python.distribute import (
    input_lib,
)
from tensorflow.python.distribute import values as distributed_values

from tfqcomm._tf_private.hooks import is_wrapped, wrap


def run_training_by(loop) -> None:
    """Lets `loop` take part in Keras' `fit`, `evaluate` and `predict`.

    Args:
        loop: has functions `fit`, `evaluate`, `predict`, `make_function`, `build` and `reduce`,
            each of what Keras would call and its arguments.
    """
    if not is_wrapped(keras.Model.fit):
        wrap(keras.Model, "fit", loop.fit)
        wrap(keras.Model, "evaluate", loop.evaluate)
        wrap(keras.Model, "predict", loop.predict)
        wrap(keras.Model, "_make_function", loop.make_function)
        wrap(keras.Model, "_maybe_symbolic_build", loop.build)
        original = trainer.reduce_per_replica

        def reduce_per_replica(values, strategy, reduction):
            return loop.reduce(original, values, strategy, reduction)

        trainer.reduce_per_replica = reduce_per_replica


def without_optionals(model: keras.Model, step: Callable) -> Callable:
    """`step` for data in which features may be missing."""
    convert = getattr(model, "_autoconvert_optionals", None)  # not in Keras 3.10
    return convert(step) if convert else step


def next_batch(iterator: tf.distribute.DistributedIterator):
    """Whether this process has a batch, and its batch: of no rows for a replica that has none.

    TensorFlow would ask all processes, at every step, whether any of them has data.

    Returns:
        Bool scalar, and an `Optional` that always has a value: so the batch may go from one
        tf.function to another without its size becoming part of their signatures.
    """
    has_batch, batch = _next_batch(iterator)
    return has_batch, tf.experimental.Optional.from_value(batch)


def _next_batch(iterator):
    strategy = iterator._strategy
    if iterator._cardinality == tf.data.INFINITE_CARDINALITY:
        return tf.constant(True), iterator._get_next_no_partial_batch_handling()
    workers = iterator._input_workers
    optionals = []  # of each input pipeline: one, or one for each replica of this process
    for pipeline, device in zip(iterator._iterators, workers.worker_devices, strict=True):
        with tf.device(device):
            optionals.append(pipeline.get_next_as_optional_list())
    with tf.device(workers.worker_devices[0]):
        has_batch = tf.reduce_any([one.has_value() for one in tf.nest.flatten(optionals)])
    values = input_lib._get_value_or_dummy(workers, optionals, produce_dummy=True)
    if iterator._replica_order is not None:
        values = iterator._reorder_replicas(values)
    values = tf.nest.map_structure(_of_any_number_of_rows, values)
    return has_batch, input_lib._create_per_replica(values, strategy)


def _of_any_number_of_rows(value):
    """Hides from the graph that a replica gets no rows: Keras takes the mean of such for NaN."""
    if tf.executing_eagerly() or not tf.is_tensor(value) or value.shape.rank in (None, 0):
        return value
    if isinstance(value, tf.Tensor) and value.shape[0] == 0:
        return tf.compat.v1.placeholder_with_default(value, [None, *value.shape[1:]])
    return value


def element_of_one_replica(strategy: tf.distribute.Strategy, iterator):
    """The next batch of this process' first replica; what batches look like if it has none."""
    has_batch, batch = _next_batch(iterator)
    first = tf.nest.map_structure(lambda v: strategy.experimental_local_results(v)[0], batch)
    leaves = tf.nest.flatten(first, expand_composites=True)
    if has_batch and all(leaf.shape.rank == 0 or leaf.shape[0] for leaf in leaves):
        return first
    return tf.nest.map_structure(_spec_of_one_replica, iterator.element_spec)


def _spec_of_one_replica(spec):
    return spec._value_specs[0] if isinstance(spec, distributed_values.PerReplicaSpec) else spec


def first_iterator(epoch_iterator):
    """The iterator with which an epoch of Keras' begins."""
    return next(item[-1] for item in epoch_iterator)  # the last of three; of two in Keras 3.10
