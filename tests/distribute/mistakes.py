"""What people write and should not, and what two workers make of it; for `test_mistakes.py`."""

from __future__ import annotations

import contextlib
import logging

import keras
import numpy as np
import tensorflow as tf
from absl import logging as absl_logging

from tests.distribute.scenarios.tools import BATCH, begin, classification, compiled, fit, network
from tests.multi_process_functions import task_index
from tfqcomm.distribute import MultiWorkerMirroredStrategy


@contextlib.contextmanager
def warnings_of_absl():
    """The warnings that the log shows in this scope, as a list of texts."""
    texts = []

    class Keep(logging.Handler):
        def emit(self, record):
            if record.levelno >= logging.WARNING:
                texts.append(record.getMessage())

    keep = Keep()
    absl_logging.get_absl_logger().addHandler(keep)
    try:
        yield texts
    finally:
        absl_logging.get_absl_logger().removeHandler(keep)


def on_chief(*callbacks):
    return list(callbacks) if task_index() == 0 else []


# ------------------------------------------------------------------------------------------- scopes


def model_made_outside_the_scope(strategy):
    begin(strategy)
    model = network()
    with strategy.scope():
        model.compile("sgd", "sparse_categorical_crossentropy")
    fit(model, *classification())


def compiled_outside_the_scope(strategy):
    with begin(strategy):
        model = network()
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    fit(model, *classification())


def all_made_outside_the_scope(strategy):
    begin(strategy)
    model = network()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    fit(model, *classification())


# ----------------------------------------------------------------- callbacks that act on one worker


def scheduler_on_the_chief_alone(strategy):
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 1e-4 if epoch else 0.1)
    fit(compiled(strategy), *classification(), callbacks=on_chief(schedule))


def early_stopping_on_the_chief_alone(strategy):
    model = compiled(strategy)
    stop = keras.callbacks.EarlyStopping("loss", patience=0, min_delta=10.0)
    x, y = classification()
    history = fit(model, x, y, epochs=6, callbacks=on_chief(stop))
    model.evaluate(x, y, verbose=0)  # the workers are still together
    return {"epochs": len(history["loss"]), "iterations": int(model.optimizer.iterations.numpy())}


class StopInTheMiddle(keras.callbacks.Callback):
    """As one that looks at the clock would."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            self.model.stop_training = True


def stopped_in_the_middle_by_one(strategy):
    model = compiled(strategy)
    stop = [StopInTheMiddle()] if task_index() == 1 else []
    x, y = classification(16 * BATCH)
    history = fit(model, x, y, epochs=6, callbacks=stop)
    model.evaluate(x, y, verbose=0)
    return {"epochs": len(history["loss"]), "iterations": int(model.optimizer.iterations.numpy())}


class ChangeAWeight(keras.callbacks.Callback):
    """Changes a weight, of which the others hear nothing."""

    def on_epoch_end(self, epoch, logs=None):
        bias = self.model.layers[-1].bias
        strategy = self.model.distribute_strategy
        (copy,) = strategy.experimental_local_results(bias.value)
        copy.assign_add(tf.ones_like(copy))


def weights_changed_on_the_chief_alone(strategy):
    fit(compiled(strategy), *classification(), epochs=3, callbacks=on_chief(ChangeAWeight()))


# --------------------------------------------------------------------------------------------- data


def one_worker_has_less_data(strategy):
    """Batches of this worker's own: six of them on the chief, three on the other."""
    rows = (6 if task_index() == 0 else 3) * BATCH // 2
    x, y = classification(6 * BATCH // 2)
    data = tf.data.Dataset.from_tensor_slices((x[:rows], y[:rows])).batch(BATCH // 2)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    model = compiled(strategy)
    steps = []
    count = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: steps.append(batch)
    )
    history = fit(model, data.with_options(options), epochs=2, callbacks=[count])
    return {"steps": steps, "epochs": len(history["loss"]), "loss": history["loss"]}


# ----------------------------------------------------- one worker calls what communicates; the last


class PredictAtTheEndOfAnEpoch(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.predict(np.zeros([4, 64], "float32"), verbose=0)


def predict_on_the_chief_alone(strategy):
    callbacks = on_chief(PredictAtTheEndOfAnEpoch())
    fit(compiled(strategy), *classification(), epochs=3, callbacks=callbacks)


def compiled_by_xla(strategy):
    with begin(strategy):
        model = network()
        model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=True)
    fit(model, *classification())


def on_two_workers():
    """For each mistake: the error, what was returned, and the warnings."""
    strategy = MultiWorkerMirroredStrategy(timeout_seconds=60)
    found = {}
    for job in (
        model_made_outside_the_scope,
        compiled_outside_the_scope,
        all_made_outside_the_scope,
        scheduler_on_the_chief_alone,
        weights_changed_on_the_chief_alone,
        early_stopping_on_the_chief_alone,
        stopped_in_the_middle_by_one,
        one_worker_has_less_data,
        compiled_by_xla,
        predict_on_the_chief_alone,  # ends all communication
    ):
        with warnings_of_absl() as warnings:
            try:
                returned, error = job(strategy), None
            except Exception as raised:
                returned, error = None, f"{type(raised).__name__}: {raised}"
        found[job.__name__] = {"returned": returned, "error": error, "warnings": warnings}
    return found
