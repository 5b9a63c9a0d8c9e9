"""COMP-AMS on the paper's network: accuracy at a hundredth of the bytes, and linear speed-up.

    python -m experiments.comp_ams --dataset=mnist --data_dir=DIR --out=runs/comp_ams
    python -m experiments.comp_ams --dataset=mnist --data_dir=DIR --out=DIR --experiment=speedup

The paper's setting (Section 5): 16 workers, MNIST, global batch 500, 20 epochs of 120 steps; every
tensor is compressed by itself, biases too. 500 is no multiple of 16, so a step takes 496 examples,
31 for each worker, and an epoch keeps its 120 steps. The workers are logical devices of this
process, or of `--processes` of them.

`--experiment=speedup`: 64 examples per worker and step, learning rate 5e-4 sqrt(n), Block-Sign;
iterations until the loss is down to 0.1: the mean over the first 10,000 training images, without
dropout, looked at after every 1024 examples trained on. Single looks vary, so the mean of the last
four counts; the first look at or below 0.1 is recorded beside it.

Paper, last epoch, float32 / Top-k 1% / Block-Sign: MNIST 98.87 / 98.89 / 98.90%, CIFAR-10 (100
epochs) 80.70 / 79.02 / 80.58%, IMDB (LSTM, batches of 16, 20 epochs) 84.94 / 85.83 / 83.78%. Its
rival 1-bit Adam, `--compressors=one_bit_adam`, dense for 1/20 of the epochs, at least one: 98.92,
80.29, 84.81%.
Iterations to loss 0.1 with n = 2 / 4 / 8 / 16: 921 / 366 / 153 / 70. Ours, and the time they take:
experiments/README.md.

The LSTM takes 500 steps for every example. To see it learn in minutes on a CPU:

    python -m experiments.comp_ams --dataset=imdb_reviews --data_dir=DIR --out=DIR --workers=2 \
        --global_batch=32 --limit_examples=8000 --epochs=2

References:
    Li, Karimi, Li: On Distributed Adaptive Optimization with Gradient Compression, ICLR 2022,
    https://arxiv.org/abs/2205.05632
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import models
import tfqcomm
from experiments import data, plots, report, training
from experiments.accounting import paper_bits

MODELS = {
    "digits": models.digits_cnn,
    "mnist": models.comp_ams_mnist_cnn,
    "cifar10": models.comp_ams_cifar_cnn,
    "imdb_reviews": models.comp_ams_imdb_lstm,
}
RIVALS = {"qadam": "block_sign", "one_bit_adam": "block_sign"}  # 1 bit per entry each
WARM_UP_SHARE = 20  # of 1-bit Adam: one of so many epochs
LOCAL_BATCH = 64  # of the speed-up experiment, as in the paper
PROBE_EXAMPLES = 10_000
PROBE_PERIOD = 1024  # examples trained on
PROBES_AVERAGED = 4

FLAGS = flags.FLAGS
SETTINGS = [  # recorded in results.json
    flags.DEFINE_enum("experiment", "accuracy", ["accuracy", "speedup"], "What to measure."),
    flags.DEFINE_enum("dataset", "mnist", list(MODELS), "Data set; cifar10 without augmentation."),
    flags.DEFINE_integer("limit_examples", None, "Only the first of both splits.", 1),
    flags.DEFINE_integer("workers", 16, "Workers, all processes together.", 1),
    flags.DEFINE_integer("processes", 1, "Processes to spread them over, on this machine.", 1),
    flags.DEFINE_integer("epochs", 20, "Passes over the training set.", 1),
    flags.DEFINE_list("compressors", "identity,top_k,block_sign", "Also qadam, one_bit_adam."),
    flags.DEFINE_float("ratio", 0.01, "Entries that sparse compressors keep.", 0.0, 1.0),
    flags.DEFINE_boolean("no_error_feedback", False, "Lose what compression leaves out."),
    flags.DEFINE_enum("schedule", "all_gather", ["all_gather", "two_phase", "auto"], "Exchange."),
    flags.DEFINE_integer("global_batch", 500, "Examples per step, all workers together.", 1),
    flags.DEFINE_float("learning_rate", 1e-3, "Step size of the accuracy experiment.", 0.0),
    flags.DEFINE_list("workers_list", "1,2,4,8,16", "Numbers of workers to compare (speedup)."),
    flags.DEFINE_string("compressor_for_speedup", "block_sign", "Its name (speedup)."),
    flags.DEFINE_float("target_loss", 0.1, "Where a run ends (speedup).", 0.0),
    flags.DEFINE_integer("max_iterations", 4000, "Where it ends in any case (speedup).", 1),
    flags.DEFINE_integer("seed", 0, "Of the weights, the data's order and dropout.", 0),
]
flags.DEFINE_string("data_dir", None, "Directory of a prepared tfds data set; else downloaded.")
flags.DEFINE_string("out", None, "Directory for results.json and a plot.", required=True)


def load_dataset() -> data.Dataset:
    """The data set, or the beginning of it."""
    dataset = data.load(FLAGS.dataset, FLAGS.data_dir)
    return dataset.first(FLAGS.limit_examples) if FLAGS.limit_examples else dataset


def compressor(name: str) -> tfqcomm.compressors.Compressor:
    """The compressor `name`, with `--ratio` if it has one; that of the rival `name`."""
    chosen = tfqcomm.compressors.get(RIVALS.get(name, name))
    return dataclasses.replace(chosen, ratio=FLAGS.ratio) if hasattr(chosen, "ratio") else chosen


def optimizer(
    codec: tfqcomm.compressors.Compressor, learning_rate: float, rival: str = "", warm_up: int = 1
) -> keras.Optimizer:
    """COMP-AMS, or a rival, as in the paper: every tensor is compressed, whatever its size.

    Args:
        warm_up: steps of it, of 1-bit Adam.
    """
    lossless = isinstance(codec, tfqcomm.compressors.Identity)
    algorithms = {"qadam": tfqcomm.optimizers.QAdam, "one_bit_adam": tfqcomm.optimizers.OneBitAdam}
    more = {"warm_up": warm_up} if rival == "one_bit_adam" else {}
    return algorithms.get(rival, tfqcomm.optimizers.CompAMS)(
        learning_rate,
        **more,
        compressor=codec,
        error_feedback=not FLAGS.no_error_feedback,
        min_size=0,
        schedule="auto" if lossless else FLAGS.schedule,
        seed=FLAGS.seed,
    )


def make_strategy() -> tf.distribute.Strategy:
    """All workers, as devices of this process or of the cluster it belongs to."""
    if not training.in_cluster():
        # Dense, and counted, for a stock optimizer; ours bring their own compression.
        dense = tfqcomm.distribute.CompressedAllReduce("identity")
        return tf.distribute.MirroredStrategy(training.logical_cpus(FLAGS.workers), dense)
    processes = training.cluster_size()
    if FLAGS.workers % processes:
        raise app.UsageError(
            f"--workers must be a multiple of the number of processes, {processes}. "
            f"Received: --workers={FLAGS.workers}"
        )
    devices = training.logical_cpus(FLAGS.workers // processes)
    return tfqcomm.distribute.MultiWorkerMirroredStrategy(devices_per_worker=len(devices))


def accuracy(strategy: tf.distribute.Strategy, dataset: data.Dataset) -> dict[str, dict]:
    """Trains once with each of `--compressors`, from the same weights on the same data."""
    runs = {}
    for name in FLAGS.compressors:
        codec = compressor(name)
        if training.is_chief(strategy):
            print(f"\n=== {name}: {codec}, {FLAGS.workers} workers", flush=True)
        model, epochs = train(name, strategy, dataset)
        if training.is_chief(strategy):
            runs[name] = summary(codec, model, epochs)
    return runs


def train(
    name: str, strategy: tf.distribute.Strategy, dataset: data.Dataset
) -> tuple[keras.Model, list[dict]]:
    """A model trained with one of `--compressors`, and the record of its epochs."""
    warm_up = max(1, FLAGS.epochs // WARM_UP_SHARE) if name == "one_bit_adam" else 0  # epochs
    steps = len(dataset.x_train) // FLAGS.global_batch
    rival = name if name in RIVALS else ""
    model = training.compiled(
        MODELS[FLAGS.dataset],
        lambda: optimizer(compressor(name), FLAGS.learning_rate, rival, warm_up * steps),
        strategy,
        FLAGS.seed,
    )
    epochs = training.train(
        model, dataset, epochs=FLAGS.epochs, global_batch=FLAGS.global_batch, seed=FLAGS.seed
    )
    for epoch in epochs[:warm_up]:
        epoch["paper_bits"] = 32 * model.count_params() * epoch["steps"]
    return model, epochs


def summary(codec, model: keras.Model, epochs: Sequence[Mapping[str, float]]) -> dict:
    """What results.json says of one compressor.

    Bits are those of one worker's messages, as the paper counts them. Bytes are those one machine
    sends to all others: a worker, or with `--processes` a process.
    """
    bits = paper_bits(codec, [int(np.prod(v.shape)) for v in model.trainable_variables])
    for epoch in epochs:
        epoch.setdefault("paper_bits", bits * epoch["steps"])  # those of a warm-up are known
    return {
        "compressor": str(codec),
        "parameters": model.count_params(),
        "test_accuracy": epochs[-1]["test_accuracy"],
        "paper_bits_per_step": bits,
        "bytes_sent_per_step": epochs[-1]["bytes_sent"] / epochs[-1]["steps"],
        "epochs": epochs,
    }


class StopAtLoss(keras.callbacks.Callback):
    """Ends training when the loss, looked at every `period` iterations, is down to `target`.

    Attributes:
        iterations: until the mean of the last `PROBES_AVERAGED` looks was; None: not yet.
        first: until a single look was; None: not yet.
        losses: of all looks, as (iteration, loss).
    """

    def __init__(self, target: float, period: int, x, y):
        super().__init__()
        self.iterations: int | None = None
        self.first: int | None = None
        self.losses: list[tuple[int, float]] = []
        self._target = target
        self._period = period
        self._examples = x, y

    def on_train_begin(self, logs=None):
        """Prepares the first look."""
        self._score = training.Scorer(self.model, *self._examples)

    def on_train_batch_end(self, batch, logs=None):
        """Looks, if it is time to."""
        iteration = batch + 1
        if iteration % self._period:
            return
        loss, _ = self._score()
        self.losses.append((iteration, loss))
        if len(self.losses) % 8 == 0:
            print(f"  iteration {iteration}: loss {loss:.3f}", flush=True)
        if self.first is None and loss <= self._target:
            self.first = iteration
        last = [loss for _, loss in self.losses[-PROBES_AVERAGED:]]
        if len(last) == PROBES_AVERAGED and np.mean(last) <= self._target:
            self.iterations = iteration
            self.model.stop_training = True


def speedup(devices: Sequence[str], dataset: data.Dataset) -> list[dict]:
    """Counts the iterations to the target loss for each number of workers."""
    runs = []
    codec = compressor(FLAGS.compressor_for_speedup)
    for workers in map(int, FLAGS.workers_list):
        strategy = training.mirrored_strategy(devices[:workers])
        learning_rate = 5e-4 * workers**0.5
        print(f"\n=== {codec}, {workers} workers, rate {learning_rate:.2e}", flush=True)
        model = training.compiled(
            MODELS[FLAGS.dataset],
            lambda learning_rate=learning_rate: optimizer(codec, learning_rate),
            strategy,
            FLAGS.seed,
        )
        stop = StopAtLoss(
            FLAGS.target_loss,
            max(1, PROBE_PERIOD // (LOCAL_BATCH * workers)),
            dataset.x_train[:PROBE_EXAMPLES],
            dataset.y_train[:PROBE_EXAMPLES],
        )
        model.fit(
            data.training_stream(
                dataset.x_train, dataset.y_train, strategy, LOCAL_BATCH, FLAGS.seed
            ),
            steps_per_epoch=FLAGS.max_iterations,
            callbacks=[stop],
            shuffle=False,  # it is shuffled
            verbose=0,
        )
        print(f"{workers} workers: {stop.iterations} iterations ({stop.first})", flush=True)
        runs.append(
            {
                "workers": workers,
                "iterations": stop.iterations,
                "first": stop.first,
                "losses": stop.losses,
            }
        )
    return runs


def write(runs, plot) -> None:
    """Writes what there is to `--out`."""
    report.write_results(FLAGS.out, SETTINGS, runs)
    plot(os.path.join(FLAGS.out, f"{FLAGS.experiment}.png"), runs)
    print(f"\nWrote {FLAGS.out}/results.json and {FLAGS.experiment}.png")


def main(_):
    """Runs the experiment, or starts the processes that do."""
    tf.get_logger().setLevel("WARNING")
    if "one_bit_adam" in FLAGS.compressors and FLAGS.epochs < 2:
        raise app.UsageError("--compressors=one_bit_adam needs --epochs=2: the first is dense.")
    if FLAGS.processes > 1 and FLAGS.experiment == "speedup":
        raise app.UsageError("--experiment=speedup needs --processes=1: it changes the workers.")
    if FLAGS.processes > 1 and not training.in_cluster():
        training.launch(FLAGS.processes, "experiments.comp_ams", sys.argv[1:])
    elif FLAGS.experiment == "speedup":
        devices = training.logical_cpus(max(map(int, FLAGS.workers_list)))
        runs = speedup(devices, load_dataset())
        write(runs, lambda path, runs: plots.plot_speedup(path, runs, "COMP-AMS"))
    else:
        strategy = make_strategy()
        runs = accuracy(strategy, load_dataset())
        if training.is_chief(strategy):
            curves = {name: run["epochs"] for name, run in runs.items()}
            write(runs, lambda path, _: plots.plot_accuracy(path, curves, "COMP-AMS"))


if __name__ == "__main__":
    app.run(main)
