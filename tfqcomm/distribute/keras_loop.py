"""What `fit`, `evaluate` and `predict` of Keras do differently on several workers.

    fit       an agreement at each epoch's begin: the same epoch, rates and weights everywhere
              a step: gradients' payloads | one collective for all logs and two flags of each
                      worker: whether it has a batch for the next step, whether it wants to stop
              an epoch ends for all workers when the first has no batch left; it is said who
    evaluate  each worker alone, until it has no data left; the metrics are summed at the end
    predict   each worker predicts its share of a batch; all get all rows, of any type

The functions here have the form that `_tf_private` wraps Keras' methods with: the original first.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tfqcomm import _tf_private
from tfqcomm.distribute import logs as fused_logs
from tfqcomm.distribute import outputs as gathered_outputs
from tfqcomm.distribute.files import one_writer_per_path
from tfqcomm.distribute.interception import options_of
from tfqcomm.distribute.meeting import Meeting, epoch_of
from tfqcomm.distribute.scopes import check_scope
from tfqcomm.step import empty_shares
from tfqcomm.transport.base import Transport
from tfqcomm.transport.local import LocalTransport
from tfqcomm.transport.of_strategy import transport_for


def install() -> None:
    """Takes part in Keras' trainer from now on; idempotent."""
    _tf_private.run_training_by(sys.modules[__name__])


def transport_of(strategy: tf.distribute.Strategy) -> Transport | None:
    """The transport between workers, where there are several and the strategy is this package's."""
    if not hasattr(strategy, "agree_on_optimizer"):
        return None
    transport = transport_for(strategy)
    return transport if transport.processes > 1 else None


def fit(original, model, *args, **kwargs):
    """Keras' `fit`, with the workers' meetings among its callbacks."""
    check_scope(model)
    transport = transport_of(model.distribute_strategy)
    if transport is None:
        return original(model, *args, **kwargs)
    arguments = inspect.signature(original).bind(model, *args, **kwargs).arguments
    counted = arguments.get("steps_per_epoch") is None or _is_endless(arguments.get("x"))
    meeting = Meeting(transport, counted=counted)
    callbacks = arguments.get("callbacks")
    if isinstance(callbacks, keras.callbacks.CallbackList):
        meeting.set_model(model)
        callbacks.append(meeting)
        given = callbacks.callbacks
    else:  # the last one, so that it sees what the others did
        given = keras.tree.flatten(callbacks or [])
        arguments["callbacks"] = [*given, meeting]
    del arguments["self"]
    transport.agree("begin fit", {}, {})
    with one_writer_per_path(given, transport):
        history = original(model, **arguments)
    _tf_private.resume_at_epoch(model, None)  # what a restored backup said holds for one `fit`
    return history


def _is_endless(data) -> bool:
    """Whether data never end, as those of `Dataset.repeat()`: then as many steps as asked for."""
    cardinality = getattr(data, "cardinality", None)
    return callable(cardinality) and int(cardinality()) == tf.data.INFINITE_CARDINALITY


def evaluate(original, model, *args, **kwargs):
    """Keras' `evaluate`, once all workers are about to."""
    _agree(model, "evaluate")
    results = original(model, *args, **kwargs)
    transport = transport_of(model.distribute_strategy)
    return results if transport is None else fused_logs.agreed(transport, results)


def predict(original, model, *args, **kwargs):
    """Keras' `predict`, once all workers are about to."""
    _agree(model, "predict")
    return original(model, *args, **kwargs)


def _agree(model, topic):
    transport = transport_of(model.distribute_strategy)
    if transport is not None:
        transport.agree(topic, {}, {})


def build(original, model, iterator=None, data_batch=None):
    """Keras' building of a model from its first batch: shapes need no communication."""
    if type(model).call is keras.Model.call:
        return  # a GAN, as Keras' examples write it: all it has is a `train_step`
    strategy = model.distribute_strategy
    if iterator is None or options_of(strategy) is None:
        return original(model, iterator=iterator, data_batch=data_batch)
    first = _tf_private.first_iterator(iterator)
    batch = _tf_private.element_of_one_replica(strategy, first)
    if any(isinstance(v, (tf.RaggedTensor, tf.SparseTensor)) for v in tf.nest.flatten(batch)):
        with strategy.scope():
            return _tf_private.build_by_calling(model, batch)
    return original(model, data_batch=batch)


def reduce(original, values, strategy, reduction):
    """Brings together what the replicas return: logs of a step, or rows that were predicted."""
    transport = transport_of(strategy)
    if transport is None:
        return original(values, strategy, reduction)
    if reduction == "concat":
        return gathered_outputs.gather(transport, strategy, values)
    return fused_logs.mean(transport, strategy, values)


def make_function(original, model, step_function):
    """Keras' train function, or test function, of `step_function`."""
    is_training = step_function == model.train_step
    step_function = empty_shares.counted(step_function)
    transport = transport_of(model.distribute_strategy)
    on_batches = original(model, step_function)
    if transport is None:
        return on_batches
    if model.jit_compile:
        raise ValueError(
            "Argument `jit_compile` of `compile` must not be True on several workers: XLA would "
            "replace what they exchange. Leave it 'auto'. Received: jit_compile=True"
        )
    if is_training:
        return TrainFunction(model, step_function, transport, on_batches)
    return TestFunction(model, step_function, transport, on_batches)


class Ahead(NamedTuple):
    """What is known of the next step.

    Attributes:
        batch: this worker's, an `Optional` that always has a value: of no rows if there is none.
        have_batches: bool[P], which workers have any; only this one where nobody is asked.
    """

    batch: tf.experimental.Optional
    have_batches: np.ndarray


class TrainFunction:
    """Takes a step on all workers, or as many as `steps_per_execution` says.

    Each step fetches the batch of the next one, so that all workers know in time whether all can
    take it: a worker that began a step alone would wait for ever.

    Args:
        model: what is trained.
        step_function: of one replica.
        transport: to the other workers.
        on_batches: Keras' own function, for data that is no dataset (`train_on_batch`).
    """

    def __init__(self, model, step_function, transport: Transport, on_batches):
        self._model = weakref.ref(model)
        self._strategy = model.distribute_strategy
        self._transport = transport
        self._step_function = _tf_private.without_optionals(model, step_function)
        self._on_batches = on_batches
        self._several = model.steps_per_execution
        # Replicas that train alone keep their logs to themselves, too.
        self._synchronous = getattr(model.optimizer, "synchronous", True)
        self._among = transport if self._synchronous else LocalTransport(transport.devices)
        self._ahead: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # iterator -> Ahead
        self._told = False  # that a worker had no data left
        self._peek, self._execute = _tf_private.next_batch, self._execution
        if not model.run_eagerly:
            self._peek = tf.function(self._peek, autograph=False, reduce_retracing=True)
            self._execute = tf.function(self._execute, autograph=False, reduce_retracing=True)

    def __call__(self, iterator):
        if not isinstance(iterator, tf.distribute.DistributedIterator):
            return self._on_batches(iterator)
        model = self._model()
        epoch = epoch_of(model)
        ahead = self._ahead.pop(iterator, None) or self._begin(iterator)
        if epoch.left <= 0 or not ahead.have_batches.all():
            self._tell_who_is_out(ahead, epoch)
            raise StopIteration
        asks = self._synchronous or not epoch.steps_are_sure
        outputs, batch, flags, taken = self._execute(
            ahead.batch,
            iterator,
            tf.constant(epoch.wants_stop),
            tf.constant(min(self._several, epoch.left)),
            asks,
        )
        have_batches, want_stop = flags.numpy().T > 0
        self._ahead[iterator] = Ahead(batch, have_batches)
        epoch.taken += int(taken)
        if asks and want_stop.any():
            model.stop_training = epoch.stops = True
        return outputs

    def _begin(self, iterator) -> Ahead:
        has_batch, batch = self._peek(iterator)
        with _tf_private.doing("the first batch of an epoch"):
            found = self._transport.gather_vectors(tf.constant([int(has_batch)])).numpy()
        return Ahead(batch, found[:, 0] > 0)

    def _tell_who_is_out(self, ahead, epoch):
        out = ~ahead.have_batches | (epoch.steps <= epoch.taken)
        if out.all() or self._told:
            return
        self._told = True
        names = [f"{rank} ({self._transport.addresses[rank]})" for rank in np.flatnonzero(out)]
        logging.warning(
            "The epoch ends for all workers: worker %s has no data left after %d steps. Give all "
            "workers as many batches, for instance by `.repeat()` and `steps_per_epoch`.",
            ", ".join(names),
            epoch.taken,
        )

    def _step(self, batch, iterator, wants_stop, asks):
        outputs = self._strategy.run(self._step_function, args=(batch.get_value(),))
        has_following, following = _tf_private.next_batch(iterator)
        facts = tf.stack([has_following, wants_stop])
        with _tf_private.doing("the logs of a step of fit"):
            outputs, flags = fused_logs.mean_and_flags(self._among, self._strategy, outputs, facts)
            if asks and not self._synchronous:
                flags = self._transport.gather_vectors(tf.cast(facts, tf.int32))
        return outputs, following, flags

    def _execution(self, batch, iterator, wants_stop, most, asks):
        outputs, following, flags = self._step(batch, iterator, wants_stop, asks)
        taken = tf.constant(1)
        if self._several == 1:
            return outputs, following, flags, taken

        def all_go_on(outputs, following, flags, taken):
            return (taken < most) & tf.reduce_all(flags[:, 0] > 0)

        def go_on(outputs, following, flags, taken):
            return *self._step(following, iterator, wants_stop, asks), taken + 1

        return tf.while_loop(
            all_go_on, go_on, [outputs, following, flags, taken], parallel_iterations=1
        )


class TestFunction:
    """Evaluates this worker's batches, however many they are: the metrics are summed at the end.

    Args:
        model: what is evaluated.
        step_function: of one replica.
        transport: to the other workers.
        on_batches: Keras' own function, for data that is no dataset (`test_on_batch`).
    """

    def __init__(self, model, step_function, transport: Transport, on_batches):
        self._strategy = model.distribute_strategy
        self._alone = LocalTransport(transport.devices)
        self._step_function = _tf_private.without_optionals(model, step_function)
        self._on_batches = on_batches
        self._several = model.steps_per_execution
        self._next, self._execute = _tf_private.next_batch, self._step
        if not model.run_eagerly:
            self._next = tf.function(self._next, autograph=False, reduce_retracing=True)
            self._execute = tf.function(self._execute, autograph=False, reduce_retracing=True)

    def __call__(self, iterator):
        if not isinstance(iterator, tf.distribute.DistributedIterator):
            return self._on_batches(iterator)
        outputs = None
        for _ in range(self._several):
            has_batch, batch = self._next(iterator)
            if not has_batch:
                break
            outputs = self._execute(batch)
        if outputs is None:
            raise StopIteration
        return outputs

    def _step(self, batch):
        outputs = self._strategy.run(self._step_function, args=(batch.get_value(),))
        return fused_logs.mean(self._alone, self._strategy, outputs)
