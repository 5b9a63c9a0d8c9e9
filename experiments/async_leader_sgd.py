"""Asynchronous Leader SGD on parameter servers: one slow worker, and nobody waits.

    python -m experiments.async_leader_sgd --dataset=mnist --data_dir=DIR --out=runs/async

The setting of `experiments.leader_sgd`, whose Leader SGD is the synchronous form: four workers with
128 examples each, momentum 0.9, weight decay 1e-5, rate 0.05, times 0.9 after each epoch, a pull of
0.5 every 64 steps. Every worker takes `--step_seconds` for a step, or longer if the machine does;
in the run "slow" the last one takes `--slowdown` times that. An epoch has the same number of steps,
whoever takes them. Every worker draws from all examples, as in the synchronous form, whose batches
are dealt anew at every step. The test accuracy is that of the workers' average.

The cluster is embedded in this process; under the launcher, or on a real cluster, the same command
drives its workers:

    python -m tfqcomm.launch --workers=4 --parameter_servers=2 -m experiments.async_leader_sgd ...

Ours, and the time it takes: experiments/README.md.

References:
    Teng et al.: Leader Stochastic Gradient Descent for Distributed Training of Deep Learning
    Models, NeurIPS 2019, https://arxiv.org/abs/1905.10395
"""

from __future__ import annotations

import os
import time

import keras
import tensorflow as tf
from absl import app, flags

import models
import tfqcomm
from experiments import data, plots, report

MODELS = {
    "digits": models.digits_cnn,
    "mnist": models.leader_sgd_cnn,
    "cifar10": models.leader_sgd_cnn7,
}
RUNS = ("equal", "slow")

FLAGS = flags.FLAGS
SETTINGS = [  # recorded in results.json
    flags.DEFINE_enum("dataset", "mnist", list(MODELS), "Data set, without augmentation."),
    flags.DEFINE_list("runs", ",".join(RUNS), f"Some of {', '.join(RUNS)}."),
    flags.DEFINE_integer("workers", 4, "Workers of an embedded cluster.", 2),
    flags.DEFINE_integer("parameter_servers", 2, "Its parameter servers.", 1),
    flags.DEFINE_integer("epochs", 12, "Passes over the training set.", 1),
    flags.DEFINE_float("step_seconds", 0.1, "What a step takes at least.", 0.0),
    flags.DEFINE_float("slowdown", 5.0, "Of the slow worker.", 1.0),
    flags.DEFINE_integer("period", 64, "Steps between two pulls.", 1),
    flags.DEFINE_float("pull", 0.5, "How far to go towards the leader.", 0.0, 1.0),
    flags.DEFINE_integer("groups", 1, "Global pulls come every second time.", 1),
    flags.DEFINE_string("weight_compressor", None, "Of the leaders' weights: its name."),
    flags.DEFINE_integer("local_batch", 128, "Examples per worker and step.", 1),
    flags.DEFINE_float("learning_rate", 0.05, "Step size of the first epoch.", 0.0),
    flags.DEFINE_float("decay", 0.9, "What an epoch leaves of the step size.", 0.0, 1.0),
    flags.DEFINE_float("momentum", 0.9, "Of each worker.", 0.0, 1.0),
    flags.DEFINE_integer("seed", 0, "Of the weights and the data's order.", 0),
]
flags.DEFINE_string("data_dir", None, "Directory of a prepared tfds data set; else downloaded.")
flags.DEFINE_string("out", None, "Directory for results.json and a plot.", required=True)


class Clock(keras.callbacks.Callback):
    """Notes the seconds of every epoch, without those of its validation."""

    def __init__(self):
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch, logs=None):
        """Starts."""
        self._start = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        """Looks."""
        self._last = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        """Notes when the last step was taken."""
        self.seconds.append(self._last - self._start)


def build_model() -> keras.Model:
    """The same weights for every run."""
    keras.utils.set_random_seed(FLAGS.seed)
    return MODELS[FLAGS.dataset]()


def batches(dataset: data.Dataset, context, slow: bool) -> tf.data.Dataset:
    """A worker's data, at its pace."""
    last = context.input_pipeline_id == context.num_input_pipelines - 1
    seconds = FLAGS.step_seconds * (FLAGS.slowdown if slow and last else 1.0)
    stream = data.worker_batches(dataset, context, FLAGS.local_batch, FLAGS.seed, sharded=False)
    return data.paced(stream, seconds)


def run(name: str, dataset: data.Dataset) -> dict:
    """Trains once, and tells what results.json says of it."""
    print(f"\n=== {name}", flush=True)
    steps = len(dataset.x_train) // (FLAGS.local_batch * FLAGS.workers)
    rate = keras.optimizers.schedules.ExponentialDecay(
        FLAGS.learning_rate, steps, FLAGS.decay, staircase=True
    )
    optimizer = tfqcomm.optimizers.LeaderSGD(
        rate,
        FLAGS.momentum,
        local_pull=FLAGS.pull,
        global_pull=FLAGS.pull,
        local_period=FLAGS.period,
        global_period=FLAGS.period * min(FLAGS.groups, 2),
        groups=FLAGS.groups,
        weight_decay=1e-5,
    )
    trainer = tfqcomm.parameter_server.LeaderTrainer(
        build_model,
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        weight_compressor=FLAGS.weight_compressor,
        workers=FLAGS.workers,
        parameter_servers=FLAGS.parameter_servers,
    )
    traffic, clock = tfqcomm.callbacks.TrafficLogger(), Clock()
    history = trainer.fit(
        lambda context: batches(dataset, context, name == "slow"),
        epochs=FLAGS.epochs,
        steps_per_epoch=steps,
        validation_data=(dataset.x_test, dataset.y_test),
        callbacks=[traffic, clock],
        verbose=2,
    ).history
    epochs = report.served_epochs(traffic.history, history)
    for epoch, seconds in zip(epochs, clock.seconds, strict=True):
        epoch["seconds"] = seconds
    return {
        "parameters": trainer.model.count_params(),
        "test_accuracy": epochs[-1]["test_accuracy"],
        "workers": trainer.workers,
        "seconds": sum(clock.seconds),
        "age": history["staleness"][-1] if "staleness" in history else None,
        "epochs": epochs,
    }


def table(runs: dict[str, dict]) -> str:
    """One line for each run, in Markdown."""
    rows = [["run", "test accuracy", "steps of each worker", "led", "s", "bytes up", "bytes down"]]
    for name, result in runs.items():
        workers = result["workers"]
        mean = {
            key: sum(worker[f"bytes_{key}"] for worker in workers) / len(workers)
            for key in ("pushed", "pulled")
        }
        rows.append(
            [
                name,
                f"{result['test_accuracy']:.2%}",
                " ".join(str(worker["steps"]) for worker in workers),
                " ".join(str(worker["times_led"]) for worker in workers),
                f"{result['seconds']:.0f}",
                f"{mean['pushed']:,.0f}",
                f"{mean['pulled']:,.0f}",
            ]
        )
    return report.markdown(rows)


def main(_):
    """Trains each of `--runs`, then prints the table."""
    tf.get_logger().setLevel("WARNING")
    unknown = set(FLAGS.runs) - set(RUNS)
    if unknown:
        raise app.UsageError(f"--runs are some of {RUNS}. Received: {sorted(unknown)}")
    dataset = data.load(FLAGS.dataset, FLAGS.data_dir)
    runs = {name: run(name, dataset) for name in FLAGS.runs}
    report.write_results(FLAGS.out, SETTINGS, runs)
    path = os.path.join(FLAGS.out, "accuracy.png")
    title = "Asynchronous Leader SGD: bytes up and down"
    plots.plot_accuracy(path, report.up_and_down(runs), title)
    print(f"\n{table(runs)}\n\nWrote {FLAGS.out}/results.json and accuracy.png")


if __name__ == "__main__":
    app.run(main)
