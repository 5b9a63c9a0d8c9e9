"""What the experiments share: workers on one machine or several, and one recorded training run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

import tfqcomm
from experiments import data


def in_cluster() -> bool:
    """Whether this process is a task of a cluster, started by the launcher or by hand."""
    return bool(os.environ.get("TF_CONFIG"))


def cluster_size() -> int:
    """Number of workers in the cluster this process belongs to."""
    cluster = json.loads(os.environ["TF_CONFIG"])["cluster"]
    return len(cluster.get("chief", [])) + len(cluster["worker"])


def launch(
    workers: int, module: str, arguments: Sequence[str], options: Sequence[str] = ()
) -> None:
    """Runs `module` in processes on this machine; exits with their code if they fail.

    Args:
        workers: the number of processes.
        module: its name.
        arguments: of the module.
        options: of the launcher, besides `--workers`.
    """
    command = [sys.executable, "-m", "tfqcomm.launch", f"--workers={workers}", *options]
    code = subprocess.call([*command, "-m", module, *arguments])
    if code:
        sys.exit(code)


def logical_cpus(count: int) -> list[str]:
    """Splits the CPU into `count` logical devices. To be called before TensorFlow does anything."""
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * count
    )
    return [f"CPU:{i}" for i in range(count)]


def mirrored_strategy(devices: Sequence[str]) -> tf.distribute.MirroredStrategy:
    """Workers as devices of this process; reducing on one of them is faster than in a ring."""
    return tf.distribute.MirroredStrategy(
        devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def process_rank(strategy: tf.distribute.Strategy) -> int:
    """This process' index among those of the cluster; a chief comes first."""
    resolver = strategy.cluster_resolver
    if resolver is None:
        return 0
    after_chief = resolver.task_type == "worker" and "chief" in resolver.cluster_spec().jobs
    return resolver.task_id + after_chief


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process writes the files and prints the table."""
    return process_rank(strategy) == 0


class Scorer:
    """Mean loss and accuracy on fixed examples, without dropout; of texts, over all positions.

    They are computed from this process' own copy of the weights: nothing is sent, and no example is
    left out or counted twice, whatever the number of replicas.
    """

    def __init__(self, model: keras.Model, x: np.ndarray, y: np.ndarray, batch: int = 2000):
        @tf.function(reduce_retracing=True)
        def sums(x, y):
            logits = model(x, training=False)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits)
            hits = tf.equal(tf.argmax(logits, axis=-1, output_type=y.dtype), y)
            return tf.reduce_sum(losses), tf.reduce_sum(tf.cast(hits, tf.float32))

        self._sums = sums
        self._count = y.size
        self._batches = [
            (tf.constant(x[i : i + batch]), tf.constant(y[i : i + batch]))
            for i in range(0, len(x), batch)
        ]

    def __call__(self) -> tuple[float, float]:
        """Returns (loss, accuracy) of the present weights."""
        sums = np.sum([[float(value) for value in self._sums(*b)] for b in self._batches], axis=0)
        loss, accuracy = sums / self._count
        return float(loss), float(accuracy)


class EpochRecorder(keras.callbacks.Callback):
    """Scores the test set after each epoch, as `val_loss` and `val_accuracy`, and keeps a record.

    It stands first in `callbacks`, so that the others see the scores and the time is that of
    training alone. The figures of the training set are Keras' own: means over the epoch, with
    dropout.

    Args:
        x_test, y_test: the test set.
        lines: how many times to say how far training has come; 0 is silent.
    """

    def __init__(self, x_test: np.ndarray, y_test: np.ndarray, lines: int = 0):
        super().__init__()
        self._lines = lines
        self.epochs: list[dict[str, float]] = []
        self._test_set = x_test, y_test

    def on_train_begin(self, logs=None):
        self._score = Scorer(self.model, *self._test_set)

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs):
        seconds = time.perf_counter() - self._start
        logs["val_loss"], logs["val_accuracy"] = self._score()
        self.epochs.append(
            {
                "train_loss": float(logs["loss"]),
                "train_accuracy": float(logs["accuracy"]),
                "test_loss": logs["val_loss"],
                "test_accuracy": logs["val_accuracy"],
                "train_seconds": seconds,
            }
        )
        epochs = self.params["epochs"]
        if self._lines and (epoch + 1) * self._lines // epochs > epoch * self._lines // epochs:
            print(
                f"epoch {epoch + 1}/{epochs}: loss {logs['loss']:.4f}, "
                f"test loss {logs['val_loss']:.4f}, test accuracy {logs['val_accuracy']:.2%}",
                flush=True,
            )


def compiled(
    build: Callable[[], keras.Model],
    optimizer: Callable[[], keras.optimizers.Optimizer],
    strategy: tf.distribute.Strategy,
    seed: int,
) -> keras.Model:
    """Returns a classifier that starts from the same weights for the same `seed`."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    with strategy.scope():
        model = build()
        model.compile(
            optimizer=optimizer(),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    _independent_dropout(model, strategy)
    return model


def _independent_dropout(model: keras.Model, strategy: tf.distribute.Strategy) -> None:
    """Gives every replica random numbers of its own: Keras has all replicas draw the same masks."""
    rank = process_rank(strategy)
    for variable in model.non_trainable_variables:
        if variable.path.endswith("seed_generator_state"):
            states = strategy.experimental_local_results(variable.value)
            for replica, state in enumerate(states, start=rank * len(states)):
                state.assign_add([replica, 0])


def train(
    model: keras.Model,
    dataset: data.Dataset,
    *,
    epochs: int,
    global_batch: int,
    seed: int,
    steps_per_epoch: int | None = None,
    log_dir: str | None = None,
    verbose: int = 2,
    lines: int = 0,
    first: Sequence[keras.callbacks.Callback] = (),
) -> list[dict[str, float]]:
    """Trains with `model.fit` and returns a record of each epoch.

    Args:
        model: compiled under the strategy to train with.
        dataset: what to train on and to test on after each epoch.
        epochs: passes over the training set.
        global_batch: examples per step, all replicas together. A step takes the largest multiple
            of the number of replicas that is not more; an epoch keeps its number of steps.
        seed: of the order of the examples.
        steps_per_epoch: after which an epoch is over, wherever in the training set; None: a pass.
        log_dir: where the chief writes TensorBoard logs.
        verbose: of `model.fit` on the chief; 0 is silent.
        lines: how many times the chief says, in a line, how far it has come.
        first: callbacks of all processes; what they do comes before the test.

    Returns:
        On the chief, for each epoch: loss and accuracy, seconds, and what `TrafficLogger` counts.

    Raises:
        ValueError: if `global_batch` does not fit the replicas or the data set.
    """
    strategy = model.distribute_strategy
    replicas, examples = strategy.num_replicas_in_sync, len(dataset.x_train)
    if not replicas <= global_batch <= examples:
        raise ValueError(
            f"Argument `global_batch` must be from {replicas}, the number of replicas, to "
            f"{examples}, the number of examples. Received: global_batch={global_batch}"
        )
    recorder = EpochRecorder(dataset.x_test, dataset.y_test, lines)
    traffic = tfqcomm.callbacks.TrafficLogger(log_dir, verbose=int(verbose > 0))
    callbacks = [*first, recorder, traffic]
    if log_dir:
        callbacks.append(keras.callbacks.TensorBoard(log_dir, write_graph=False))
    chief = is_chief(strategy)
    model.fit(
        data.training_stream(
            dataset.x_train, dataset.y_train, strategy, global_batch // replicas, seed
        ),
        epochs=epochs,
        steps_per_epoch=steps_per_epoch or examples // global_batch,
        callbacks=callbacks if chief else list(first),
        shuffle=False,  # it is shuffled
        verbose=verbose if chief else 0,
    )
    return [{**t, **e} for t, e in zip(traffic.history, recorder.epochs, strict=True)]


def versions() -> dict[str, str]:
    """What a result may depend on."""
    modules = {module.__name__: module.__version__ for module in (tf, keras, np, tfqcomm)}
    return {"python": sys.version.split()[0], **modules}
