"""What a step of `fit` on several workers costs beyond the same step alone.

    python -m benchmarks.step
    python -m benchmarks.step --workers=4 --compressor=block_sign

A model of 70,000 weights, with three metrics: a step is all latency. Three times are taken in one
run, on workers of one thread each, and the ratio says how many all-reduces of the gradient a step
is dearer than the same step alone. Times of different machines do not compare; the ratio does.
README.md has figures measured with it.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import json
import subprocess
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import tfqcomm

FLAGS = flags.FLAGS
flags.DEFINE_integer("workers", 2, "Worker processes on this machine.", lower_bound=2)
flags.DEFINE_integer("steps", 600, "Timed steps; the median counts.", lower_bound=20)
flags.DEFINE_string("compressor", None, "Of the strategy; none by default.")


def compiled() -> keras.Model:
    """784-88-10: 69,970 weights, 280 KB of gradient."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input([784]), keras.layers.Dense(88, activation="relu"), keras.layers.Dense(10)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    metrics = ["accuracy", "sparse_categorical_crossentropy"]
    model.compile("adam", loss, metrics=[*metrics, keras.metrics.SparseTopKCategoricalAccuracy(3)])
    return model


def median_step(model: keras.Model, batch: int) -> float:
    """Milliseconds of a step of `fit`."""
    random = np.random.RandomState(0)
    data = random.randn(batch, 784).astype("float32"), random.randint(0, 10, batch)
    dataset = tf.data.Dataset.from_tensors(data).repeat()
    ends = []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter())
    )
    model.fit(dataset, steps_per_epoch=FLAGS.steps + 50, verbose=0, callbacks=[callback])
    return float(np.median(np.diff(ends[50:]))) * 1e3


def median_all_reduce(strategy: tf.distribute.Strategy, elements: int) -> float:
    """Milliseconds of an all-reduce by itself."""

    @tf.function
    def all_reduce(value):
        return strategy.run(
            lambda v: tf.distribute.get_replica_context().all_reduce("sum", v + 1), args=(value,)
        )

    value, ends = tf.zeros([elements]), []
    for _ in range(FLAGS.steps + 50):
        all_reduce(value)
        ends.append(time.perf_counter())
    return float(np.median(np.diff(ends[50:]))) * 1e3


def work() -> None:
    """One worker; the first one prints what it measured as a line of JSON."""
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy(FLAGS.compressor)
    with strategy.scope():
        model = compiled()
    together = median_step(model, 32 * FLAGS.workers)
    all_reduce = median_all_reduce(strategy, 70_000)
    if strategy.cluster_resolver.task_id == 0:
        print(json.dumps({"together": together, "all_reduce": all_reduce}), flush=True)


def compare() -> None:
    """Starts the workers, then takes the same step alone."""
    command = [sys.executable, "-m", "tfqcomm.launch", f"--workers={FLAGS.workers}"]
    command += ["--threads_per_worker=1", "-m", "benchmarks.step", *sys.argv[1:]]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    (line,) = [line for line in output.splitlines() if "all_reduce" in line]
    found = json.loads(line[line.index("{") :])
    tf.config.threading.set_intra_op_parallelism_threads(1)
    alone = median_step(compiled(), 32)
    beyond = found["together"] - alone
    print(f"workers {FLAGS.workers}, compressor {FLAGS.compressor}")
    print(f"step alone           {alone:7.2f} ms")
    print(f"step together        {found['together']:7.2f} ms")
    print(f"all-reduce of 280 KB {found['all_reduce']:7.2f} ms")
    print(f"(together - alone) / all-reduce = {beyond / found['all_reduce']:.2f}")


def main(_):
    """Compares, or is one of the workers."""
    work() if os.environ.get("TF_CONFIG") else compare()


if __name__ == "__main__":
    app.run(main)
