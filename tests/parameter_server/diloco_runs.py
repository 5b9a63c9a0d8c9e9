"""What the processes of the tests of `DiLoCoTrainer` do: each is the chief of a cluster."""

from __future__ import annotations

import functools
import os
import time

import keras
import numpy as np
import tensorflow as tf

import tfqcomm
from tests.parameter_server.leader_runs import Teller, slow_shards
from tests.parameter_server.runs import LOSS, STEPS, build_model, make_data, shards
from tfqcomm.parameter_server import DiLoCoTrainer, ServerLost
from tfqcomm.parameter_server.diloco.errands import merge_on
from tfqcomm.state.ledger import ledger_of


class OpenTrainer(DiLoCoTrainer):
    """Shows what is inside."""

    @property
    def fleet(self):
        return self._fleet

    @property
    def inner_workers(self):
        return self._fleet.workers

    @property
    def momenta(self):
        return self._copy.momenta


def embedded(build=build_model, **arguments) -> OpenTrainer:
    """A trainer with a cluster in this process."""
    os.environ.pop("TF_CONFIG", None)  # that of the test's own harness
    arguments = {"workers": 4, "parameter_servers": 2, "loss": LOSS, **arguments}
    return OpenTrainer(build, **arguments)


def diloco(inner=None, **arguments) -> tfqcomm.optimizers.DiLoCo:
    inner = inner or keras.optimizers.Adam(0.02)
    return tfqcomm.optimizers.DiLoCo(inner, **{"every": 8, "min_size": 100, **arguments})


def found(name: str, directory: str):
    """What tests without faults look at, by name."""
    return {
        "fit": fit,
        "alone": one_learner_and_keras,
        "merge": merge_by_hand,
        "spoiled": spoil_one_learner,
        "backup": lambda: back_up_and_restore(directory),
    }[name]()


def fit() -> dict:
    x, y = (part.reshape([-1, *part.shape[3:]]) for part in make_data())
    optimizer = diloco(fragments=2, compressor="block_int8")
    trainer = embedded(optimizer=optimizer, metrics=["accuracy"])
    traffic = tfqcomm.callbacks.TrafficLogger(verbose=0)
    history = trainer.fit(
        shards, epochs=6, validation_data=(x, y), callbacks=[traffic], verbose=0
    ).history
    return {
        "history": history,
        "evaluated": trainer.evaluate(x, y, verbose=0, return_dict=True),
        "iterations": int(trainer.optimizer.iterations),
        "traffic": traffic.history,
        "workers": trainer.workers,
        "rounds": trainer.rounds,
        "weights": [v.numpy() for v in trainer.model.trainable_variables],
        "statistics": [v.numpy() for v in trainer.model.non_trainable_variables[:2]],
        "each": [worker.weights for worker in trainer.inner_workers],
        "each_statistics": [worker.statistics for worker in trainer.inner_workers],
    }


def one_learner_and_keras() -> list[list[np.ndarray]]:
    """Weights after the same batches: of one learner, and of the inner optimizer by itself."""
    rate = functools.partial(keras.optimizers.schedules.ExponentialDecay, 0.02, 5, 0.5)
    inner = functools.partial(keras.optimizers.AdamW, weight_decay=0.01, global_clipnorm=0.5)
    optimizer = diloco(
        inner(rate()), every=4, fragments=2, outer_learning_rate=1.0, outer_momentum=0.0
    )
    trainer = embedded(optimizer=optimizer, workers=1, mixing=1.0)
    trainer.fit(shards, epochs=2, verbose=0)
    model = build_model()
    model.compile(optimizer=inner(rate()), loss=LOSS)
    model.fit(shards(tf.distribute.InputContext(1, 0, 1)), epochs=2, verbose=0)
    (learner,) = trainer.inner_workers
    expected = [v.numpy() for v in model.trainable_variables]
    return [learner.weights, expected, [trainer.rounds]]


def build_with_embedding() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input([3], dtype="int32"),
            keras.layers.Embedding(20, 4, dtype="mixed_float16"),
            keras.layers.Flatten(),
            keras.layers.Dense(8, activation="relu", dtype="mixed_float16"),
            keras.layers.Dense(4),
        ]
    )


def tokens(context: tf.distribute.InputContext) -> tf.data.Dataset:
    """Random ones, of each worker its own."""
    x = np.random.default_rng(context.input_pipeline_id).integers(20, size=[80, 3])
    return tf.data.Dataset.from_tensor_slices((x.astype(np.int32), x[:, 0] % 4)).batch(8)


def merge_by_hand() -> dict:
    """Two of three learners answer, twice; the third takes what comes of it."""
    optimizer = keras.optimizers.LossScaleOptimizer(
        diloco(fragments=2, every=1000, min_size=0), initial_scale=2.0**10
    )
    trainer = embedded(build_with_embedding, optimizer=optimizer, workers=3)
    trainer.fit(tokens, steps_per_epoch=6, verbose=0)
    found = {"theta": [[v.numpy() for v in trainer.model.trainable_variables]]}
    found["learners"] = [worker.weights for worker in trainer.inner_workers]
    for _ in range(2):
        for fragment in range(2):
            for rank in (0, 2):
                assert trainer.inner_workers[rank].answer(fragment)
            merge_on(trainer.fleet, fragment, np.array([3.0, 0.0, 1.0], np.float32))
        trainer.evaluate(np.zeros([1, 3], np.int32), np.zeros([1]), verbose=0)
        found["theta"].append([v.numpy() for v in trainer.model.trainable_variables])
    for fragment in range(2):
        trainer.inner_workers[1].take(fragment, 0.25)
    found["mixed"] = trainer.inner_workers[1].weights
    return found


def spoil_one_learner() -> dict:
    """One learner's weights become NaN between two epochs."""
    trainer = embedded(optimizer=diloco(), workers=3)

    before = []

    def spoil(epoch, logs):
        if epoch == 0:
            before.extend(trainer.workers)
            worker = trainer.inner_workers[1]
            weights = worker.weights
            worker.begin([w + np.nan for w in weights], worker.statistics)

    callback = keras.callbacks.LambdaCallback(on_epoch_end=spoil)
    trainer.fit(shards, epochs=3, callbacks=[callback], verbose=0)
    return {
        "before": before,
        "workers": trainer.workers,
        "each": [worker.weights for worker in trainer.inner_workers],
        "weights": trainer.model.get_weights(),
    }


def back_up_and_restore(directory: str) -> list[dict]:
    """Interrupts a run, and resumes it with another trainer."""
    found = []
    for epochs in (2, 3):
        trainer = embedded(optimizer=diloco(), workers=2)
        backup = tfqcomm.callbacks.BackupAndRestore(
            directory, save_freq=STEPS, delete_checkpoint=False
        )
        watcher = BeginningAndEnd(trainer)
        trainer.fit(shards, epochs=epochs, callbacks=[backup, watcher], verbose=0)
        found.append(watcher.states)
    return found


class BeginningAndEnd(keras.callbacks.Callback):
    """Notes global weights, outer momenta, mean inner states and the count of steps."""

    def __init__(self, trainer):
        super().__init__()
        self.states = {}
        self._trainer = trainer

    def on_epoch_begin(self, epoch, logs=None):
        self.states.setdefault("begin", self.note())

    def on_train_batch_end(self, batch, logs=None):
        if batch == STEPS - 1:  # all are done: as the backup has it
            self.states["end"] = self.note()

    def note(self):
        kept = ledger_of(self.model.optimizer).state()
        return {
            "kept": kept,
            "steps": [int(worker.state[0]) for worker in self._trainer.inner_workers],
            "iterations": int(self.model.optimizer.iterations),
            "servers": [
                value
                for server in self._trainer.fleet.servers
                for held in (server.weights, server.momenta)
                for value in server.held(held).values()
            ],
        }


def train_through_faults() -> dict:
    """Trains in a real cluster until a worker was lost and is back, and then for some epochs."""
    trainer = DiLoCoTrainer(
        build_model,
        optimizer=diloco(fragments=2, compressor="block_int8"),
        loss=LOSS,
        metrics=["accuracy"],
    )
    streams = functools.partial(slow_shards, seconds=[0.01, 0.01, 0.01])
    teller = Teller(trainer)
    try:
        history = trainer.fit(
            streams, epochs=10_000, steps_per_epoch=STEPS, callbacks=[teller], verbose=0
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
        trainer = DiLoCoTrainer(
            build_model, optimizer=diloco(fragments=2), loss=LOSS, metrics=["accuracy"]
        )
        streams = functools.partial(slow_shards, seconds=paces)
        trainer.fit(streams, steps_per_epoch=20, verbose=0)  # compiles
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
