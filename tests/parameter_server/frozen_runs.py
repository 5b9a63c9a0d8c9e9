"""Chiefs of clusters with a task that is stopped: what they print, and that they end."""

from __future__ import annotations

import time

import keras
import tensorflow as tf

import tfqcomm
from tests.parameter_server import leader_runs
from tests.parameter_server.runs import LOSS, Teller, linear_model, ones

TIMEOUT_SECONDS = 4.0


def make_trainer(kind: str):
    """A trainer of each way to train: "sync", "async" or "leader"."""
    if kind == "leader":
        return tfqcomm.parameter_server.LeaderTrainer(
            leader_runs.build_model,
            optimizer=leader_runs.leader_sgd(),
            loss=LOSS,
            timeout_seconds=TIMEOUT_SECONDS,
        )
    return tfqcomm.parameter_server.Trainer(
        linear_model,
        optimizer="sgd",
        loss="mse",
        mode=kind,
        timeout_seconds=TIMEOUT_SECONDS,
    )


def tell(what: str) -> None:
    print(f"{what} at {time.monotonic()}", flush=True)


def report(call) -> None:
    """Prints the error of a call, and when it was raised."""
    try:
        call()
    except RuntimeError as error:
        tell(f"{type(error).__name__}: {error}")


def train(kind: str, directory: str = "") -> None:
    """Trains for ever, or until a task is stopped."""
    trainer = make_trainer(kind)
    teller = Teller(1, until_back=True)
    teller.trainer = trainer
    callbacks = [teller]
    if directory:
        first = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: tell(f"begins with epoch {epoch}")
        )
        backup = tfqcomm.callbacks.BackupAndRestore(directory)
        callbacks = [backup, first, teller]
    data = leader_runs.shards if kind == "leader" else ones
    report(
        lambda: trainer.fit(data, epochs=10_000, steps_per_epoch=20, callbacks=callbacks, verbose=0)
    )


def connect() -> None:
    """Joins a cluster with a task that is stopped already."""
    report(lambda: make_trainer("sync"))


def begin() -> None:
    """Begins to train when a server was stopped meanwhile."""
    trainer = make_trainer("sync")
    tell("made")
    input()
    report(lambda: trainer.fit(ones, steps_per_epoch=1, verbose=0))


def evaluate() -> None:
    """Trains, and evaluates when a server was stopped meanwhile."""
    trainer = make_trainer("sync")
    trainer.fit(ones, steps_per_epoch=1, verbose=0)
    tell("made")
    input()
    report(lambda: trainer.evaluate(tf.ones([4, 1]), tf.zeros([4, 1]), verbose=0))


class Busy(keras.layers.Layer):
    """Computes for some seconds, and changes nothing."""

    def __init__(self, seconds: float):
        super().__init__()
        self._seconds = seconds

    def call(self, x):
        end = tf.timestamp() + self._seconds
        some = tf.random.normal([300, 300])
        some = tf.while_loop(
            lambda _: tf.timestamp() < end,
            lambda a: [tf.math.l2_normalize(a @ a)],
            [some],
            back_prop=False,
        )[0]
        return x + 0 * tf.stop_gradient(tf.reduce_sum(some))


def compute_for_long(mode: str) -> float:
    """The seconds of two rounds whose steps take longer than a task may be silent."""

    def build_model():
        return keras.Sequential(
            [keras.Input([1]), Busy(3 * TIMEOUT_SECONDS), *linear_model().layers]
        )

    trainer = tfqcomm.parameter_server.Trainer(
        build_model, optimizer="sgd", loss="mse", mode=mode, timeout_seconds=TIMEOUT_SECONDS
    )
    began = time.monotonic()
    trainer.fit(ones, steps_per_epoch=2, verbose=0)
    return time.monotonic() - began
