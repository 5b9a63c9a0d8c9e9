"""The main job, `make train`: the same network on two workers over TCP, dense and compressed.

    python -m experiments.compare --out=runs/compare
    python -m experiments.compare --dataset=mnist --data_dir=DIR --out=runs/compare_mnist
    python -m experiments.compare --bandwidth=100mbit --out=runs/compare_100mbit

Each line of the table is one launch of two processes that train by `model.fit`, from the same
weights on the same data. There are two dense lines, which send the same bytes. Stock Adam is what
one has without tfqcomm: compressed Adam is to be measured by it. COMP-AMS without compression (the
paper's Dist-AMS) is the very algorithm of the lines below it, so that what differs is compression.

With `--bandwidth` or `--latency` each worker has a network interface of that speed (Linux, as root;
see `tfqcomm.launch`), so that the time per step is that of machines so connected. Then one worker
is timed alone as well: utilisation is its time per step over that of the run.

Writes report.md, metrics.json, accuracy.png and TensorBoard logs. On a cluster that TF_CONFIG
describes, `--runs=NAME` on each machine trains one line and adds it to metrics.json.

References:
    Li, Karimi, Li: On Distributed Adaptive Optimization with Gradient Compression, ICLR 2022,
    https://arxiv.org/abs/2205.05632
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable

import keras
import tensorflow as tf
from absl import app, flags, logging

import models
import tfqcomm
from experiments import data, plots, report, training


@dataclasses.dataclass(frozen=True)
class Run:
    """One line of the table.

    Attributes:
        title: its name there.
        optimizer: from the learning rate.
        strategy_compressor: what the strategy compresses the gradients of stock optimizers with.
    """

    title: str
    optimizer: Callable[[float], keras.optimizers.Optimizer]
    strategy_compressor: str | None = None


def _comp_ams(compressor: str) -> Callable[[float], keras.optimizers.Optimizer]:
    return functools.partial(tfqcomm.optimizers.CompAMS, compressor=compressor)


RUNS = {
    "adam_dense": Run("Adam, dense", keras.optimizers.Adam),
    "adam_block_sign": Run("Adam, strategy: Block-Sign", keras.optimizers.Adam, "block_sign"),
    "comp_ams_dense": Run("COMP-AMS, dense", _comp_ams("identity")),
    "comp_ams_top_k": Run("COMP-AMS, Top-k 1%", _comp_ams("top_k")),
    "comp_ams_block_sign": Run("COMP-AMS, Block-Sign", _comp_ams("block_sign")),
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """What suits a data set."""

    build: Callable[[], keras.Model]
    epochs: int
    global_batch: int


PRESETS = {
    "digits": Preset(models.digits_cnn, 20, 64),
    "mnist": Preset(functools.partial(models.mlp, hidden_units=(512,)), 3, 256),
    "cifar10": Preset(models.comp_ams_cifar_cnn, 5, 256),
}

PROGRESS_LINES = 4  # of each run
ALONE = "adam_dense"  # the run whose step is timed on one worker alone
ALONE_EPOCHS = 2  # of which the second is timed

FLAGS = flags.FLAGS
SETTINGS = [  # recorded in metrics.json
    flags.DEFINE_enum("dataset", "digits", list(PRESETS), "Data set; digits needs no download."),
    flags.DEFINE_integer("workers", 2, "Worker processes on this machine.", 1),
    flags.DEFINE_integer("epochs", None, "Passes over the training set; default by data set.", 1),
    flags.DEFINE_integer("global_batch", None, "Examples per step; default by data set.", 1),
    flags.DEFINE_float("learning_rate", 1e-3, "Step size.", 0.0),
    flags.DEFINE_integer("seed", 0, "Of the weights, the data's order and dropout.", 0),
]
NETWORK = [
    flags.DEFINE_string("bandwidth", None, "Of each worker, as in 100mbit; None: no limit."),
    flags.DEFINE_string("latency", None, "From worker to worker, as in 5ms; None: none."),
]
flags.DEFINE_boolean("alone", False, "Be the worker that is timed alone.")
flags.DEFINE_list("runs", list(RUNS), "Lines of the table.")
flags.DEFINE_string("data_dir", None, "Directory of a prepared tfds data set; else downloaded.")
flags.DEFINE_string("out", "runs/compare", "Directory for all results.")


def work(name: str) -> None:
    """Trains one line of the table in this cluster; the chief adds it to metrics.json."""
    run = RUNS[name]
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy(compressor=run.strategy_compressor)
    model, epochs = train(run, strategy)
    if training.is_chief(strategy):
        metrics = read_metrics()
        metrics["settings"] = {flag.name: flag.value for flag in [*SETTINGS, *NETWORK]}
        metrics["versions"] = training.versions()
        metrics["runs"][name] = {
            "title": run.title,
            "parameters": model.count_params(),
            **report.summary(epochs),
            "epochs": epochs,
        }
        write_metrics(metrics)


def work_alone() -> None:
    """Times a step of one worker, on its share of a batch, without anybody to exchange with."""
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy()
    _, epochs = train(RUNS[ALONE], strategy)
    seconds = report.summary(epochs)["seconds_per_step"]
    write_metrics({**read_metrics(), "alone_seconds_per_step": seconds})


def train(run: Run, strategy: tf.distribute.Strategy) -> tuple[keras.Model, list[dict]]:
    """Trains as the flags say; returns the model and the record of each epoch."""
    preset = PRESETS[FLAGS.dataset]
    model = training.compiled(
        preset.build, lambda: run.optimizer(FLAGS.learning_rate), strategy, FLAGS.seed
    )
    global_batch = FLAGS.global_batch or preset.global_batch
    epochs = training.train(
        model,
        data.load(FLAGS.dataset, FLAGS.data_dir),
        epochs=ALONE_EPOCHS if FLAGS.alone else FLAGS.epochs or preset.epochs,
        global_batch=global_batch // FLAGS.workers if FLAGS.alone else global_batch,
        seed=FLAGS.seed,
        log_dir=None if FLAGS.alone else os.path.join(FLAGS.out, "tensorboard", FLAGS.runs[0]),
        verbose=0,
        lines=0 if FLAGS.alone else PROGRESS_LINES,
    )
    return model, epochs


def metrics_path() -> pathlib.Path:
    """Where the runs put their results."""
    return pathlib.Path(FLAGS.out, "metrics.json")


def read_metrics() -> dict:
    """The results there are."""
    path = metrics_path()
    return json.loads(path.read_text()) if path.exists() else {"runs": {}}


def write_metrics(metrics: dict) -> None:
    """Puts the results where they are read."""
    metrics_path().write_text(json.dumps(metrics, indent=1) + "\n")


def compare() -> None:
    """Launches the workers once for each line, then writes the report and the plot."""
    out = pathlib.Path(FLAGS.out)
    shutil.rmtree(out / "tensorboard", ignore_errors=True)  # else it would show old runs too
    metrics_path().unlink(missing_ok=True)
    network = [f"--{flag.name}={flag.value}" for flag in NETWORK if flag.value]
    for number, name in enumerate(FLAGS.runs, start=1):
        title = RUNS[name].title
        print(f"\n=== {number}/{len(FLAGS.runs)} {title}, {FLAGS.workers} workers", flush=True)
        arguments = [*sys.argv[1:], f"--runs={name}"]  # of a repeated flag the last one counts
        training.launch(FLAGS.workers, "experiments.compare", arguments, network)
    if network:
        print(f"\n=== {RUNS[ALONE].title}, one worker alone", flush=True)
        arguments = [*sys.argv[1:], "--alone", f"--runs={ALONE}"]
        training.launch(1, "experiments.compare", arguments)
    metrics = read_metrics()
    (out / "report.md").write_text(report.report(metrics))
    curves = {run["title"]: run["epochs"] for run in metrics["runs"].values()}
    plots.plot_accuracy(out / "accuracy.png", curves, f"{FLAGS.dataset}, {FLAGS.workers} workers")
    print(f"\n{report.table(metrics)}\n")
    print(f"Wrote report.md, metrics.json, accuracy.png and tensorboard/ to {out}")


def main(_):
    """Compares all runs, or is one worker of one run."""
    tf.get_logger().setLevel("WARNING")
    logging.set_verbosity(logging.WARNING)
    unknown = set(FLAGS.runs) - set(RUNS)
    if unknown or not FLAGS.runs:
        raise app.UsageError(f"--runs must be among {','.join(RUNS)}. Received: {FLAGS.runs}")
    if not training.in_cluster():
        compare()
    elif len(FLAGS.runs) == 1:
        pathlib.Path(FLAGS.out).mkdir(parents=True, exist_ok=True)
        work_alone() if FLAGS.alone else work(FLAGS.runs[0])
    else:
        raise app.UsageError("A cluster trains one line of the table: give --runs=NAME.")


if __name__ == "__main__":
    app.run(main)
