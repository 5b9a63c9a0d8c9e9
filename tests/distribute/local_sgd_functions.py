"""What the workers of `test_local_sgd.py` do; the test does the same in one process."""

from __future__ import annotations

import functools
import pathlib

import keras
import numpy as np
import tensorflow as tf

from tests.distribute.multi_worker_functions import (
    BATCH,
    attempt,
    classification,
    compiled,
    fit,
    replicas,
)
from tests.multi_process_functions import task_index
from tests.network import interface_bytes
from tfqcomm.callbacks import AverageReplicas, TrafficLogger
from tfqcomm.distribute import MultiWorkerMirroredStrategy
from tfqcomm.distribute.meeting import epoch_of
from tfqcomm.optimizers import ElasticAveragingSGD, LeaderSGD, PeriodicAveragingSGD

OPTIMIZERS = {
    "leader_sgd": functools.partial(
        LeaderSGD, 0.05, 0.9, global_pull=0.5, global_period=5, loss_window=3
    ),
    "leader_sgd bfloat16": functools.partial(
        LeaderSGD, 0.05, global_pull=0.5, global_period=3, leader_compressor="bfloat16"
    ),
    "leader_sgd groups": functools.partial(
        LeaderSGD, 0.05, local_period=2, global_period=5, local_pull=0.3, groups=2
    ),
    "elastic_averaging": functools.partial(ElasticAveragingSGD, 0.05, 0.9, period=5),
    "periodic_averaging": functools.partial(PeriodicAveragingSGD, 0.05, 0.9, period=5),
}


class Keep(keras.callbacks.Callback):
    """Keeps each replica's weights of the last training step, before anybody averages them."""

    def on_train_batch_end(self, batch, logs=None):
        self.own = replicas(self.model.distribute_strategy, self.model.weights)


def train(strategy, name, nan=False):
    """32 steps with batch normalization, which the replicas see in different scales."""
    model = compiled(strategy, keras.layers.BatchNormalization(), optimizer=OPTIMIZERS[name])
    x, y = classification(512)
    x = x * np.linspace(0.5, 3, 512)[:, None].astype("float32")
    if nan:
        x[4 * BATCH - 1] = np.nan  # the last replica's, in the fourth step
    keep, traffic = Keep(), TrafficLogger(verbose=0)
    callbacks = [AverageReplicas(), keep, traffic]
    history = fit(model, x, y, 2, callbacks=callbacks, validation_data=(x[:64], y[:64]))
    return {
        "own": keep.own,
        "weights": replicas(strategy, model.weights),
        "history": history,
        "evaluate": model.evaluate(x[:64], y[:64], batch_size=BATCH, verbose=0),
        "predict": model.predict(x[:60], batch_size=BATCH, verbose=0),
        "traffic": traffic.history,
        "times_led": np.array(getattr(model.optimizer, "times_led", [])),
    }


def save_on_chief(strategy, directory):
    """The chief alone saves what training has left, and nobody waits."""
    model = compiled(strategy, optimizer=OPTIMIZERS["leader_sgd"])
    x, y = classification()
    fit(model, x, y, 1, callbacks=[AverageReplicas()])
    if task_index() == 0:
        model.save(pathlib.Path(directory, "leader.keras"))
    return model.predict(x[:64], batch_size=BATCH, verbose=0)


def other_periods(strategy):
    """The message of the error, on the worker that is asked."""
    make = functools.partial(LeaderSGD, global_period=4 + task_index())
    try:
        fit(compiled(strategy, optimizer=make), *classification(), 1)
    except ValueError as error:
        return str(error)
    return None


def sure_of_steps(strategy):
    """Whether the workers need not ask one another at every step, of three kinds of data."""
    model = compiled(strategy, optimizer=OPTIMIZERS["leader_sgd"])
    x, y = classification(8 * BATCH)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH, drop_remainder=True)
    found = []
    for data, steps in ((dataset, None), (dataset.repeat(), 4), (dataset, 4)):
        model.fit(data, steps_per_epoch=steps, verbose=0)
        found.append(epoch_of(model).steps_are_sure)
    return found


def on_two_workers(directory):
    strategy = MultiWorkerMirroredStrategy(timeout_seconds=120)
    found = {name: attempt(train, strategy, name) for name in OPTIMIZERS}
    found["nan"] = attempt(train, strategy, "leader_sgd", True)
    found["sure"] = attempt(sure_of_steps, strategy)
    found["save"] = attempt(save_on_chief, strategy, directory)
    found["other_periods"] = attempt(other_periods, strategy)
    return found


def with_two_devices_each():
    strategy = MultiWorkerMirroredStrategy(timeout_seconds=120, devices_per_worker=2)
    return {name: attempt(train, strategy, name) for name in OPTIMIZERS}


def count_on_the_wire(compressor):
    """Forty steps with a pull after every fourth; what was sent, by both counts."""
    strategy = MultiWorkerMirroredStrategy(timeout_seconds=120)
    make = functools.partial(
        LeaderSGD, 0.01, global_period=4, loss_window=1, leader_compressor=compressor
    )
    model = compiled(strategy, keras.layers.Dense(20_000, name="wide"), optimizer=make)
    x, y = classification(40 * BATCH)
    traffic = TrafficLogger(verbose=0)
    fit(model, x[: 4 * BATCH], y[: 4 * BATCH], 1)  # what is sent once
    before = interface_bytes()
    fit(model, x, y, 1, callbacks=[traffic])
    after = interface_bytes()
    return {
        "parameters": model.count_params(),
        "counted": traffic.history[0]["bytes_sent"],
        "sent": after[0] - before[0],
        "times_led": model.optimizer.times_led,
    }
