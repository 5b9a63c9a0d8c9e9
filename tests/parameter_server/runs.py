"""What the processes of these tests do: each is the chief of a cluster, embedded or real.

A process joins its cluster once and for all, and what was made before cannot be used afterwards:
so none of this runs in the process of the tests.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time

import keras
import numpy as np
import tensorflow as tf

import tfqcomm
from tfqcomm.parameter_server.messages.report import Report
from tfqcomm.state.ledger import ledger_of

STEPS, WORKERS, BATCH, FEATURES, CLASSES = 20, 2, 8, 20, 4
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def embedded(**arguments) -> tfqcomm.parameter_server.Trainer:
    """A trainer with a cluster in this process."""
    os.environ.pop("TF_CONFIG", None)  # that of the test's own harness
    arguments = {"workers": WORKERS, "parameter_servers": 2, "loss": LOSS, **arguments}
    return tfqcomm.parameter_server.Trainer(build_model, **arguments)


def build_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input([FEATURES]),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(CLASSES, kernel_regularizer="l2"),
        ]
    )


def make_data(spoiled: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Batches that a linear model fits: x [steps, workers, batch, features] and y.

    Args:
        spoiled: one worker gets NaN in two of the steps.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=[STEPS, WORKERS, BATCH, FEATURES]).astype(np.float32)
    y = (x @ rng.normal(size=[FEATURES, CLASSES])).argmax(-1)
    if spoiled:
        x[[5, 6], 1, 0, 0] = np.nan
    return x, y


def shards(context: tf.distribute.InputContext, spoiled: bool = False) -> tf.data.Dataset:
    """The batches of one worker, in their order."""
    x, y = make_data(spoiled)
    mine = context.input_pipeline_id % WORKERS
    return tf.data.Dataset.from_tensor_slices((x[:, mine], y[:, mine]))


def make_optimizer(name: str) -> keras.optimizers.Optimizer:
    """Small tensors are compressed as well, in one part."""
    everything = {"min_size": 100}
    gathered = {**everything, "schedule": "all_gather"}
    return {
        "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        "adam": lambda: keras.optimizers.Adam(1e-2, global_clipnorm=0.5),
        "adamw": lambda: keras.optimizers.AdamW(
            keras.optimizers.schedules.ExponentialDecay(1e-2, 5, 0.5), weight_decay=0.1
        ),
        "nadam": lambda: keras.optimizers.Nadam(1e-2),
        "comp_ams": lambda: tfqcomm.optimizers.CompAMS(
            1e-2, compressor="top_k", weight_decay=0.1, **gathered
        ),
        "qadam": lambda: tfqcomm.optimizers.QAdam(1e-2, compressor="log_grid", **gathered),
        "qcmd_adagrad": lambda: tfqcomm.optimizers.QCMDAdagrad(0.05, 1e-3, **gathered),
        "qrda_adagrad": lambda: tfqcomm.optimizers.QRDAAdagrad(
            0.05, 1e-3, center="initial", **gathered
        ),
        # Of one tensor, so that the budget of all is that of each.
        "adaptive_top_k_sgd": lambda: tfqcomm.optimizers.AdaptiveTopKSGD(
            0.1, budget=0.05, rule="fixed", momentum_correction=True, momentum=0.9, min_size=1000
        ),
    }[name]()


COMPRESSORS = {"adam": "block_sign", "adamw": "top_k"}  # of Keras' optimizers; else none


def all_reduce(name: str, spoiled: bool) -> list[np.ndarray]:
    """Weights and moving statistics after the same batches under a MirroredStrategy."""
    compressor = COMPRESSORS.get(name)
    schedule = "all_gather" if compressor else "auto"
    ops = tfqcomm.distribute.CompressedAllReduce(compressor, min_size=100, schedule=schedule)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(WORKERS)], ops)
    with strategy.scope():
        model = build_model()
        model.compile(optimizer=make_optimizer(name), loss=LOSS)
    x, y = make_data(spoiled)
    model.fit(
        x.reshape([-1, FEATURES]),
        y.reshape([-1]),
        batch_size=WORKERS * BATCH,
        shuffle=False,
        verbose=0,
    )
    return model.get_weights()


def parameter_server(name: str, spoiled: bool = False, **arguments) -> list[np.ndarray]:
    """Likewise with workers and servers."""
    trainer = embedded(
        optimizer=make_optimizer(name), compressor=COMPRESSORS.get(name), min_size=100, **arguments
    )
    trainer.fit(functools.partial(shards, spoiled=spoiled), steps_per_epoch=STEPS, verbose=0)
    return trainer.model.get_weights()


def both(names, spoiled: bool = False) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    """For each optimizer the weights of both ways to train; in one process."""
    reduced = {name: all_reduce(name, spoiled) for name in names}
    keras.backend.clear_session()
    return {name: (reduced[name], parameter_server(name, spoiled)) for name in names}


class Watcher(keras.callbacks.Callback):
    """Notes what `fit` tells its callbacks, and stops it."""

    def __init__(self, stop_after: int | None = None):
        super().__init__()
        self.events: list[str] = []
        self.rates: list[float] = []
        self.batch_logs: list[dict] = []
        self._stop_after = stop_after

    def on_train_begin(self, logs=None):
        self.events.append("train begin")

    def on_epoch_begin(self, epoch, logs=None):
        self.events.append(f"epoch {epoch} begin")

    def on_train_batch_end(self, batch, logs=None):
        self.batch_logs.append(logs)
        if len(self.batch_logs) == self._stop_after:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        self.events.append(f"epoch {epoch} end")
        self.rates.append(float(self.model.optimizer.learning_rate))

    def on_train_end(self, logs=None):
        self.events.append("train end")


def fit_like_keras() -> dict:
    """What a user sees of a `fit` with callbacks and validation."""
    x, y = (part.reshape([-1, *part.shape[3:]]) for part in make_data())
    trainer = embedded(
        optimizer=tfqcomm.optimizers.CompAMS(1e-2, compressor="block_sign", min_size=100),
        weight_compressor="uniform_grid",
        metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2, name="top_2")],
    )
    watcher, traffic = Watcher(), tfqcomm.callbacks.TrafficLogger(verbose=0)
    history = trainer.fit(
        shards,
        epochs=6,
        validation_data=(x, y),
        callbacks=[
            watcher,
            traffic,
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2 if epoch else rate),
        ],
        verbose=0,
    )
    evaluated = trainer.evaluate(x, y, verbose=0, return_dict=True)
    again = Watcher(stop_after=3)
    trainer.fit(shards, epochs=5, callbacks=[again], verbose=0)
    return {
        "history": history.history,
        "epochs": history.epoch,
        "events": watcher.events,
        "rates": watcher.rates,
        "batches": watcher.batch_logs,
        "traffic": traffic.history,
        "evaluated": evaluated,
        "stopped": again.events,
        "iterations": int(trainer.optimizer.iterations),
        "totals": trainer.workers,
    }


PULLS = {
    "dense": tfqcomm.compressors.Identity(),
    "bfloat16": tfqcomm.compressors.BFloat16(),
    "block_int8": tfqcomm.compressors.BlockInt8(),
    "uniform_grid": tfqcomm.compressors.UniformGrid(8),
    "sparse": tfqcomm.parameter_server.SparseWeights(),
}


def compare_pulls() -> dict:
    """For each way to encode the pulled weights: accuracy at the end, and one worker's bytes."""
    found = {}
    for name, codec in PULLS.items():
        trainer = embedded(
            optimizer=tfqcomm.optimizers.QRDAAdagrad(0.05, 1e-2, center="initial", min_size=100),
            weight_compressor=codec,
            metrics=["accuracy"],
        )
        traffic = tfqcomm.callbacks.TrafficLogger(verbose=0)
        history = trainer.fit(shards, epochs=5, callbacks=[traffic], verbose=0)
        found[name] = {
            "accuracy": history.history["accuracy"][-1],
            "pulled": [record["bytes_pulled"] for record in traffic.history],
            "weights": trainer.model.get_weights(),
        }
    return found


def partition_or_not() -> list[list[np.ndarray]]:
    """Weights with whole variables, and with variables in two parts."""
    partitioners = tf.distribute.experimental.partitioners
    return [
        parameter_server("nadam", variable_partitioner=partitioner)
        for partitioner in (None, partitioners.FixedShardsPartitioner(2))
    ]


def asynchronous(arguments: list[dict]) -> list[dict]:
    """Trains QAdam with 4 workers, whose messages come one by one, one of them not finite."""
    found = []
    for more in arguments:
        trainer = embedded(
            optimizer=tfqcomm.optimizers.QAdam(5e-3, min_size=100),
            metrics=["accuracy"],
            mode="async",
            workers=4,
            **more,
        )
        traffic = tfqcomm.callbacks.TrafficLogger(verbose=0)
        history = trainer.fit(
            functools.partial(shards, spoiled=True),
            epochs=4,
            callbacks=[traffic],
            verbose=0,
        )
        found.append(
            {
                "history": history.history,
                "iterations": int(trainer.optimizer.iterations),
                "traffic": traffic.history,
                "totals": trainer.workers,
                "weights": trainer.model.get_weights(),
            }
        )
    return found


def replay() -> dict:
    """What two servers and a worker hold before and after its last message is sent again."""
    trainer = embedded(
        optimizer=tfqcomm.optimizers.QAdam(5e-3, compressor="log_grid", min_size=100),
        mode="async",
    )
    trainer.fit(shards, steps_per_epoch=3, verbose=0)
    fleet = vars(trainer)["_fleet"]
    worker, servers = fleet.workers[0], fleet.servers
    errand, calls = vars(worker)["_errand"], []

    def send(*arguments):
        calls.append(arguments)
        return errand(*arguments)

    def held():
        return {
            "weights": [v.numpy().tolist() for server in servers for v in server.variables],
            "slots": [v.numpy().tolist() for s in servers for v in s.optimizer.variables],
            "statistics": servers[0].statistics.numpy().tolist(),
            "iterations": [int(server.optimizer.iterations.numpy()) for server in servers],
            "memory": worker.memory.tolist(),
            "traffic": trainer.workers,
        }

    vars(worker)["_errand"] = send
    reports = [worker.step()]
    before = held()
    number = calls[0][1][1]
    number.assign_sub(1)
    reports.append(Report.from_vector(errand(*calls[0]), 2))
    after = held()
    reports.append(worker.step())
    return {
        "before": before,
        "after": after,
        "next": held(),
        "staleness": [report.staleness for report in reports],
    }


def one_by_one_with_l1(steps: int) -> float:
    """The one weight, whose gradient is always 1, after the messages of 2 workers."""
    os.environ.pop("TF_CONFIG", None)
    trainer = tfqcomm.parameter_server.Trainer(
        linear_model,
        optimizer=tfqcomm.optimizers.QRDAAdagrad(1.0, l1=0.6, delta=1.0, compressor=None),
        loss=lambda y, y_pred: y_pred,
        mode="async",
    )
    trainer.fit(ones, steps_per_epoch=steps, verbose=0)
    return float(trainer.model.get_weights()[0][0, 0])


def back_up_and_restore(directory: str) -> dict:
    """Interrupts a run, and resumes it with another trainer."""
    found = {}
    for name, epochs in (("first", 2), ("second", 4)):
        trainer = embedded(optimizer=tfqcomm.optimizers.QAdam(5e-3, min_size=100))
        backup = tfqcomm.callbacks.BackupAndRestore(directory, delete_checkpoint=False)
        watcher = StateWatcher()
        trainer.fit(shards, epochs=epochs, callbacks=[backup, watcher], verbose=0)
        found[name] = watcher.states
    return found


class Interruption(Exception):
    """In the middle of an epoch."""


def back_up_within_an_epoch(directory: str) -> dict:
    """Interrupts a run 7 steps into its second epoch, with a backup every 5 steps."""
    found = {"batches": 0}

    def interrupt(batch, logs):
        found["batches"] += 1
        if found["batches"] == STEPS + 5:
            found["saved"] = trainer.model.get_weights()
        if found["batches"] == STEPS + 7:
            raise Interruption

    def begin(epoch, logs):
        found.setdefault("restored", (epoch, trainer.model.get_weights()))

    for watch in ({"on_train_batch_end": interrupt}, {"on_epoch_begin": begin}):
        trainer = embedded(optimizer=tfqcomm.optimizers.QAdam(5e-3, min_size=100))
        backup = tfqcomm.callbacks.BackupAndRestore(directory, save_freq=5)
        watcher = keras.callbacks.LambdaCallback(**watch)
        with contextlib.suppress(Interruption):
            trainer.fit(shards, epochs=2, callbacks=[backup, watcher], verbose=0)
    found["iterations"] = int(trainer.optimizer.iterations)
    found["initial"] = build_model().get_weights()
    return found


class StateWatcher(keras.callbacks.Callback):
    """Notes weights, slots and what workers remember, on average."""

    def __init__(self):
        super().__init__()
        self.states: dict[str, dict] = {}

    def on_train_begin(self, logs=None):
        self.note("begin")

    def on_epoch_end(self, epoch, logs=None):
        self.note(f"epoch {epoch}")

    def note(self, when):
        optimizer = self.model.optimizer
        self.states[when] = {
            "weights": self.model.get_weights(),
            "slots": [np.array(v) for v in optimizer.variables],
            "memory": ledger_of(optimizer).state(),
        }


def linear_model() -> keras.Model:
    """One weight, whose gradient of the loss below is 1 whatever it is."""
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    return keras.Sequential([keras.Input([1]), dense])


def ones() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensors((tf.ones([4, 1]), tf.zeros([4, 1])))


def linear_rows() -> keras.Model:
    """A table of 10 rows of 2 weights, each of which every batch below looks up."""
    table = keras.layers.Embedding(10, 2, embeddings_initializer="zeros")
    return keras.Sequential([keras.Input([], dtype="int32"), table])


def all_rows() -> tf.data.Dataset:
    """The gradient of each row by the loss below is what stands here: 8 bits leave out of 0.3."""
    return tf.data.Dataset.from_tensors((tf.range(10), tf.constant([[1.0, 0.3]] * 10))).repeat(4)


class Teller(keras.callbacks.Callback):
    """Prints where training is, for tests that interfere, and ends it some epochs later."""

    def __init__(self, epochs_after_fault: int, until_back: bool, faults: int = 1):
        super().__init__()
        self.trainer = None
        self._until_back = until_back
        self._faults = faults
        self._left = epochs_after_fault
        self._lost = self._back = 0  # how often

    def on_train_batch_end(self, batch, logs=None):
        time.sleep(0.01)

    def on_epoch_end(self, epoch, logs=None):
        alive = sum(worker["alive"] for worker in self.trainer.workers)
        print(f"epoch {epoch}: {alive} workers", flush=True)
        complete = alive == len(self.trainer.workers)
        if not complete and self._lost == self._back:
            self._lost += 1
            print(f"lost {self._lost} times", flush=True)
        if complete and self._lost > self._back:
            self._back += 1
            print(f"back {self._back} times", flush=True)
        if (self._back if self._until_back else self._lost) == self._faults:
            self._left -= 1
            self.model.stop_training = self._left == 0


def train_through_faults(mode: str, until_back: bool, faults: int = 1, **more) -> dict:
    """Trains until workers were lost (or even are back) as often, and then for some epochs.

    Every message of the one weight is 1: the weight says how many the servers have applied.
    """
    teller = Teller(5, until_back, faults)
    teller.trainer = trainer = tfqcomm.parameter_server.Trainer(
        linear_model,
        optimizer=keras.optimizers.SGD(1.0),
        loss=lambda y, y_pred: y_pred,
        mode=mode,
        **more,
    )
    history = trainer.fit(ones, epochs=10_000, steps_per_epoch=20, callbacks=[teller], verbose=0)
    return {
        "epochs": len(history.epoch),
        "iterations": int(trainer.optimizer.iterations),
        "weight": float(trainer.model.get_weights()[0][0, 0]),
        "workers": trainer.workers,
        "taken": [int(s.optimizer.iterations.numpy()) for s in vars(trainer)["_fleet"].servers],
    }


def train_rows_through_faults(mode: str, until_back: bool, faults: int = 1) -> dict:
    """Likewise with rows of a table on two servers: every message adds -1 and -0.3 to all."""
    teller = Teller(5, until_back, faults)
    teller.trainer = trainer = tfqcomm.parameter_server.Trainer(
        linear_rows,
        optimizer=keras.optimizers.SGD(1.0),
        loss=lambda y, y_pred: 10.0 * tf.reduce_sum(y * y_pred, -1),
        mode=mode,
        embedding_rows_from=1,
        row_codec="int8",
        row_feedback="all",
    )
    history = trainer.fit(
        all_rows, epochs=10_000, steps_per_epoch=20, callbacks=[teller], verbose=0
    )
    return {
        "epochs": len(history.epoch),
        "iterations": int(trainer.optimizer.iterations),
        "rows": trainer.model.get_weights()[0],
        "workers": trainer.workers,
        "taken": [int(s.optimizer.iterations.numpy()) for s in vars(trainer)["_fleet"].servers],
    }


def train_until_it_fails(mode: str) -> str:
    """Trains for ever; the error that ends it."""
    teller = Teller(1, until_back=True)
    teller.trainer = trainer = tfqcomm.parameter_server.Trainer(
        linear_model, optimizer="sgd", loss="mse", mode=mode
    )
    try:
        trainer.fit(ones, epochs=10_000, steps_per_epoch=20, callbacks=[teller], verbose=0)
    except tfqcomm.parameter_server.ServerLost as error:
        return str(error)
