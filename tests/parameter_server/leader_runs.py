"""What the processes of the tests of `LeaderTrainer` do: each is the chief of a cluster."""

from __future__ import annotations

import functools
import os
import time

import keras
import numpy as np
import tensorflow as tf

import tfqcomm
from tests.parameter_server.runs import LOSS, STEPS, build_model, make_data, shards
from tfqcomm.parameter_server import LeaderTrainer, ServerLost


class OpenTrainer(LeaderTrainer):
    """Shows what is inside."""

    @property
    def inner_workers(self):
        return self._fleet.workers

    def make_buffer(self):
        return self._board.make_buffer()


def embedded(**arguments) -> OpenTrainer:
    """A trainer with a cluster in this process."""
    os.environ.pop("TF_CONFIG", None)  # that of the test's own harness
    arguments = {"workers": 4, "parameter_servers": 2, "loss": LOSS, "min_size": 100, **arguments}
    return OpenTrainer(build_model, **arguments)


def leader_sgd(**arguments) -> tfqcomm.optimizers.LeaderSGD:
    defaults = {"momentum": 0.9, "global_pull": 0.5, "global_period": 5, "weight_decay": 0.01}
    return tfqcomm.optimizers.LeaderSGD(0.05, **{**defaults, **arguments})


GROUPS = {"groups": 2, "local_period": 5, "global_period": 10, "local_pull": 0.3}


def found(name: str, directory: str):
    """What tests without faults look at, by name."""
    return {
        "fit": lambda: [fit(), fit(GROUPS, weight_compressor="uniform_grid")],
        "without pulls": lambda: fit({"global_period": 10_000}),
        "alone": one_worker_and_keras,
        "pulls": lambda: {codec: show_and_pull(codec) for codec in (None, "block_int8")},
        "backup": lambda: back_up_and_restore(directory),
    }[name]()


def fit(optimizer: dict | None = None, **arguments) -> dict:
    x, y = (part.reshape([-1, *part.shape[3:]]) for part in make_data())
    trainer = embedded(optimizer=leader_sgd(**(optimizer or {})), metrics=["accuracy"], **arguments)
    traffic = tfqcomm.callbacks.TrafficLogger(verbose=0)
    history = trainer.fit(
        shards, epochs=6, validation_data=(x, y), callbacks=[traffic], verbose=0
    ).history
    evaluated = trainer.evaluate(x, y, verbose=0, return_dict=True)
    workers = trainer.inner_workers
    return {
        "history": history,
        "evaluated": evaluated,
        "iterations": int(trainer.optimizer.iterations),
        "traffic": traffic.history,
        "workers": trainer.workers,
        "weights": trainer.model.get_weights(),
        "each": [worker.weights for worker in workers],
        "losses": [worker.report.mean_loss for worker in workers],
    }


def one_worker_and_keras() -> list[list[np.ndarray]]:
    """Weights after the same batches: of one worker, and of Keras' SGD in this process."""
    arguments = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True, "global_clipnorm": 0.5}
    rate = functools.partial(keras.optimizers.schedules.ExponentialDecay, 0.05, 5, 0.5)
    trainer = embedded(
        optimizer=tfqcomm.optimizers.LeaderSGD(rate(), global_period=3, **arguments), workers=1
    )
    trainer.fit(shards, epochs=2, verbose=0)
    model = build_model()
    model.compile(optimizer=keras.optimizers.SGD(rate(), **arguments), loss=LOSS)
    data = shards(tf.distribute.InputContext(1, 0, 1))
    model.fit(data, epochs=2, verbose=0)
    return [trainer.model.get_weights(), model.get_weights()]


def show_and_pull(codec) -> dict:
    """One worker shows its weights; another moves halfway there, and then all the way."""
    trainer = embedded(optimizer=leader_sgd(), workers=2, weight_compressor=codec)
    trainer.fit(shards, steps_per_epoch=3, verbose=0)
    first, second = trainer.inner_workers
    buffer = trainer.make_buffer()
    before = first.weights, second.weights
    first.show(buffer)
    second.pull([(0.5, buffer)])
    halfway = second.weights
    second.pull([(1.0, buffer)])
    return {"before": before, "halfway": halfway, "there": second.weights, "first": first.weights}


def back_up_and_restore(directory: str) -> list[dict]:
    """Interrupts a run, and resumes it with another trainer."""
    found = []
    for epochs in (2, 3):
        trainer = embedded(optimizer=leader_sgd(), workers=2)
        backup = tfqcomm.callbacks.BackupAndRestore(directory, delete_checkpoint=False)
        watcher = BeginningAndEnd(trainer)
        trainer.fit(shards, epochs=epochs, callbacks=[backup, watcher], verbose=0)
        found.append(watcher.states)
    return found


class BeginningAndEnd(keras.callbacks.Callback):
    """Notes weights, mean momenta and the count of steps."""

    def __init__(self, trainer):
        super().__init__()
        self.states = {}
        self._trainer = trainer

    def on_epoch_begin(self, epoch, logs=None):
        self.states.setdefault("begin", self.note())

    def on_epoch_end(self, epoch, logs=None):
        self.states["end"] = self.note()

    def note(self):
        momenta = [worker.momenta for worker in self._trainer.inner_workers]
        return {
            "weights": self.model.get_weights(),
            "momenta": [np.mean(each, axis=0) for each in zip(*momenta, strict=True)],
            "iterations": int(self.model.optimizer.iterations),
        }


def slow_shards(context: tf.distribute.InputContext, seconds: list[float]) -> tf.data.Dataset:
    """Endless batches; each worker takes `seconds` of its own for one."""
    stream = shards(context).repeat()
    slowed = tf.raw_ops.SleepDataset(
        input_dataset=tf.data.experimental.to_variant(stream),
        sleep_microseconds=int(seconds[context.input_pipeline_id] * 1e6),
        output_types=[spec.dtype for spec in stream.element_spec],
        output_shapes=[spec.shape for spec in stream.element_spec],
    )
    return tf.data.experimental.from_variant(slowed, stream.element_spec)


class Teller(keras.callbacks.Callback):
    """Prints where training is, for tests that interfere, and ends it some epochs later."""

    def __init__(self, trainer: LeaderTrainer):
        super().__init__()
        self._trainer = trainer
        self._epochs_left = 4
        self._lost = False

    def on_epoch_end(self, epoch, logs=None):
        alive = sum(worker["alive"] for worker in self._trainer.workers)
        print(f"epoch {epoch}: {alive} workers", flush=True)
        if self._lost and alive == len(self._trainer.workers):
            self._epochs_left -= 1
        self._lost |= alive < len(self._trainer.workers)
        self.model.stop_training = not self._epochs_left


def train_through_faults() -> dict:
    """Trains in a real cluster until a worker was lost and is back, and then for some epochs."""
    trainer = LeaderTrainer(
        build_model,
        optimizer=leader_sgd(),
        loss=LOSS,
        metrics=["accuracy"],
        weight_compressor="block_int8",
    )
    streams = functools.partial(slow_shards, seconds=[0.01, 0.01])
    try:
        history = trainer.fit(
            streams, epochs=10_000, steps_per_epoch=STEPS, callbacks=[Teller(trainer)], verbose=0
        ).history
    except ServerLost as error:
        return {"error": str(error)}
    return {
        "accuracy": history["accuracy"][-1],
        "epochs": len(history["accuracy"]),
        "iterations": int(trainer.optimizer.iterations),
        "workers": trainer.workers,
        "weights": trainer.model.get_weights(),
    }


def train_with_a_slow_worker(seconds: list[list[float]]) -> list[dict]:
    """Trains in a real cluster with workers of some paces."""
    found = []
    for paces in seconds:
        trainer = LeaderTrainer(
            build_model, optimizer=leader_sgd(), loss=LOSS, metrics=["accuracy"]
        )
        streams = functools.partial(slow_shards, seconds=paces)
        trainer.fit(streams, steps_per_epoch=5, verbose=0)  # compiles
        before = [worker["steps"] for worker in trainer.workers]
        start = time.monotonic()
        history = trainer.fit(streams, epochs=4, steps_per_epoch=25, verbose=0).history
        found.append(
            {
                "seconds": time.monotonic() - start,
                "steps": [
                    worker["steps"] - earlier
                    for worker, earlier in zip(trainer.workers, before, strict=True)
                ],
                "workers": trainer.workers,
                "accuracy": history["accuracy"][-1],
            }
        )
    return found
