"""Trains in every way on an embedded cluster, and marks in its log when graphs are made known.

With TF_CPP_VMODULE=cluster_function_library_runtime=1 TensorFlow writes to the same log what it
gives to other tasks.
"""

from __future__ import annotations

import contextlib
import os
import tempfile

import keras
import numpy as np
import tensorflow as tf

import tfqcomm
from tests.parameter_server import runs
from tfqcomm import _tf_private
from tfqcomm.parameter_server import DiLoCoTrainer, LeaderTrainer, Trainer, cluster
from tfqcomm.parameter_server.first_calls import first_calls

ALONE, FREE = "== alone", "== free"


def mark(text: str) -> None:
    """Writes a line to the log at once."""
    os.write(2, f"\n{text}\n".encode())


def mark_scopes() -> None:
    """Marks the scopes of first calls."""
    alone = first_calls.alone

    @contextlib.contextmanager
    def marked():
        with alone():
            mark(ALONE)
            yield
            mark(FREE)

    first_calls.alone = marked


def uneven(context: tf.distribute.InputContext) -> tf.data.Dataset:
    """Batches whose last one is shorter, as `Dataset.batch` leaves it."""
    x, y = runs.make_data()
    mine = context.input_pipeline_id % runs.WORKERS
    x, y = (part[:4, mine].reshape([-1, *part.shape[3:]]) for part in (x, y))
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(5)


def train() -> None:
    """A few steps of each trainer."""
    for kind, optimizer, more in (
        (Trainer, lambda: tfqcomm.optimizers.QAdam(5e-3, min_size=100), {"mode": "async"}),
        (Trainer, lambda: "sgd", {"mode": "async", "max_staleness": 4}),
        (Trainer, lambda: "adam", {}),
        (LeaderTrainer, lambda: tfqcomm.optimizers.LeaderSGD(0.05, global_period=3), {}),
        (DiLoCoTrainer, lambda: tfqcomm.optimizers.DiLoCo(keras.optimizers.Adam(), every=3), {}),
    ):
        arguments = {"workers": runs.WORKERS, "parameter_servers": 2, "loss": runs.LOSS, **more}
        kind(runs.build_model, optimizer=optimizer(), **arguments).fit(uneven, epochs=2, verbose=0)


def train_rows(directory: str) -> None:
    """A table by rows, its backup and its file."""
    trainer = Trainer(
        runs.linear_rows,
        optimizer="adam",
        loss="mse",
        workers=runs.WORKERS,
        parameter_servers=2,
        mode="async",
        embedding_rows_from=1,
    )
    backup = tfqcomm.callbacks.BackupAndRestore(os.path.join(directory, "backup"), save_freq=2)
    trainer.fit(runs.all_rows, epochs=2, callbacks=[backup], verbose=0)
    mark(ALONE)  # no worker is in a step any more
    trainer.evaluate(runs.all_rows(), verbose=0)
    mark(FREE)
    trainer.export(os.path.join(directory, "model.keras"))


def count_calls() -> None:
    """A graph that counts how often it runs, before and after the chief connects once more."""
    device = cluster.connect(None, runs.WORKERS, 2, None).workers[0]
    with cluster.on(device):
        counter = tf.Variable(0)

    def step(amount):
        return counter.assign_add(amount).read_value()

    errand = cluster.Errand(cluster.Graphs(step), device)
    found = [int(errand(tf.constant(1))) for _ in range(2)]
    _tf_private.reconnect()
    first_calls.forget()
    found += [int(errand(tf.constant(1))) for _ in range(2)]
    np.testing.assert_array_equal(found, [1, 2, 3, 4])


if __name__ == "__main__":
    os.environ.pop("TF_CONFIG", None)
    mark_scopes()
    train()
    with tempfile.TemporaryDirectory() as directory:
        train_rows(directory)
    count_calls()
    print("done")
