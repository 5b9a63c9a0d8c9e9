"""Parameter servers: quantized weights on the way down, quantized updates on the way up.

    python -m experiments.parameter_server --dataset=mnist --data_dir=DIR --out=runs/ps
    python -m experiments.parameter_server --dataset=a9a --data_dir=DIR --out=DIR --epochs=10 \
        --runs=dense,qrda,qrda-async

The quantized Adam of arXiv 2004.14180 with its server: 8 workers with batches of 16, a perceptron
784-128-10, learning rate 1e-3 halved every 4 epochs, 8 epochs. "quantized" pushes 2 bits per entry
(log grid, k = 0) and pulls 8. On a9a, QRDA Adagrad of arXiv 2208.05631: 2 bits up, and only the
weights that are not zero down. Runs whose names end in "-async" apply each message as it arrives.

The cluster is embedded in this process; under the launcher, or on a real cluster, the same command
drives its workers:

    python -m tfqcomm.launch --workers=8 --parameter_servers=2 -m experiments.parameter_server ...

References:
    Chen, Shen, Huang, Liu: Quantized Adam with Error Feedback, https://arxiv.org/abs/2004.14180
    Xu et al.: Quantized Adaptive Subgradient Algorithms and Their Applications,
    https://arxiv.org/abs/2208.05631
"""

from __future__ import annotations

import os

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import models
import tfqcomm
from experiments import data, plots, report

FLAGS = flags.FLAGS
SETTINGS = [  # recorded in results.json
    flags.DEFINE_enum("dataset", "mnist", ["digits", "mnist", "a9a"], "Data set."),
    flags.DEFINE_integer("limit_examples", None, "Only the first of both splits.", 1),
    flags.DEFINE_list(
        "runs",
        "dense,quantized,quantized-async",
        "dense, quantized, sparse updates qcmd and qrda; with -async, messages as they arrive.",
    ),
    flags.DEFINE_integer("workers", 8, "Workers of an embedded cluster.", 1),
    flags.DEFINE_integer("parameter_servers", 2, "Its parameter servers.", 1),
    flags.DEFINE_integer("epochs", 8, "Passes over the training set.", 1),
    flags.DEFINE_integer("batch", 16, "Examples per step and worker.", 1),
    flags.DEFINE_float("learning_rate", 1e-3, "Of quantized Adam; halved every 4 epochs.", 0.0),
    flags.DEFINE_float("eta", 0.05, "Learning rate of qcmd and qrda.", 0.0),
    flags.DEFINE_float("l1", 1e-4, "Weight of the l1 norm of qcmd and qrda.", 0.0),
    flags.DEFINE_integer("bits", 8, "Of the pulled weights of the quantized runs.", 2, 8),
    flags.DEFINE_integer("k", 0, "Of the log grid of the quantized runs: 0 is 2 bits.", 0),
    flags.DEFINE_integer("max_staleness", None, "Bound of the -async runs.", 1),
    flags.DEFINE_integer("seed", 0, "Of the weights and the data's order.", 0),
]
flags.DEFINE_string("data_dir", None, "Directory of the prepared data set; else downloaded.")
flags.DEFINE_string("out", None, "Directory for results.json and a plot.", required=True)


def algorithm(name: str) -> dict:
    """The trainer's arguments that a run's name stands for."""
    sparse = {"qcmd": tfqcomm.optimizers.QCMDAdagrad, "qrda": tfqcomm.optimizers.QRDAAdagrad}
    if name in sparse:
        return {"optimizer": sparse[name](FLAGS.eta, FLAGS.l1, min_size=100)}
    if name == "dense":
        return {"optimizer": tfqcomm.optimizers.QAdam(FLAGS.learning_rate, compressor=None)}
    if name != "quantized":
        raise app.UsageError(
            f"--runs must name dense, quantized, qcmd or qrda, or these with -async. Got: {name}"
        )
    codec = tfqcomm.compressors.LogGrid(FLAGS.k)
    return {
        "optimizer": tfqcomm.optimizers.QAdam(FLAGS.learning_rate, compressor=codec, min_size=100),
        "weight_compressor": tfqcomm.compressors.UniformGrid(FLAGS.bits),
    }


def build_model(dataset: data.Dataset) -> keras.Model:
    """A perceptron for images, logistic regression for a9a."""
    keras.utils.set_random_seed(FLAGS.seed)
    if FLAGS.dataset == "a9a":
        return models.logistic_regression(dataset.x_train.shape[1])
    return models.mlp(dataset.x_train.shape[1:], dataset.num_classes)


def halved(epoch: int, rate: float) -> float:
    """The learning rate of an epoch: half of the last one's every 4 epochs."""
    return rate / 2 if epoch and epoch % 4 == 0 else rate


def run(name: str, dataset: data.Dataset) -> dict:
    """Trains once, and tells what results.json says of it."""
    base, _, asynchronous = name.partition("-")
    mode = {"mode": "async", "max_staleness": FLAGS.max_staleness} if asynchronous else {}
    trainer = tfqcomm.parameter_server.Trainer(
        lambda: build_model(dataset),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        workers=FLAGS.workers,
        parameter_servers=FLAGS.parameter_servers,
        **algorithm(base),
        **mode,
    )
    print(f"\n=== {name}", flush=True)
    traffic = tfqcomm.callbacks.TrafficLogger()
    adam = base in ("dense", "quantized")
    schedule = [keras.callbacks.LearningRateScheduler(halved)] if adam else []
    history = trainer.fit(
        lambda context: data.worker_batches(dataset, context, FLAGS.batch, FLAGS.seed),
        epochs=FLAGS.epochs,
        steps_per_epoch=len(dataset.x_train) // (FLAGS.batch * FLAGS.workers),
        validation_data=(dataset.x_test, dataset.y_test),
        callbacks=[traffic, *schedule],
        verbose=2,
    ).history
    epochs = report.served_epochs(traffic.history, history)
    kernels = [w for w in trainer.model.trainable_variables if len(w.shape) > 1]
    nonzero = sum(int(np.count_nonzero(w)) for w in kernels)
    return {
        "parameters": trainer.model.count_params(),
        "test_accuracy": epochs[-1]["test_accuracy"],
        "workers": len(trainer.workers),
        "nonzero": nonzero / sum(int(np.prod(w.shape)) for w in kernels),
        "staleness": history.get("staleness", [0.0])[-1],
        "epochs": epochs,
    }


def table(runs: dict[str, dict]) -> str:
    """One line for each run, in Markdown; bytes are those of one worker."""
    header = ["run", "test accuracy", "bytes up / step", "bytes down / step", "ratio"]
    rows = [[*header, "non-zeros", "staleness"]]
    for name, result in runs.items():
        worker_steps = sum(epoch["steps"] for epoch in result["epochs"])
        if name.endswith("-async"):  # a message of any worker is a step
            worker_steps /= result["workers"]
        up, down, dense = (
            sum(epoch[key] for epoch in result["epochs"])
            for key in ("bytes_sent", "bytes_pulled", "dense_bytes")
        )
        rows.append(
            [
                name,
                f"{result['test_accuracy']:.2%}",
                f"{up / worker_steps:,.0f}",
                f"{down / worker_steps:,.0f}",
                f"{dense / (up + down):.1f}x",
                f"{result['nonzero']:.1%}",
                f"{result['staleness']:.1f}",
            ]
        )
    return report.markdown(rows)


def plot(path: str, runs: dict[str, dict]) -> None:
    """Accuracy against epochs, and against all bytes of one worker, up and down."""
    title = f"Parameter servers, {FLAGS.dataset}: up and down"
    plots.plot_accuracy(path, report.up_and_down(runs), title)


def main(_):
    """Trains each of `--runs`, then prints the table."""
    tf.get_logger().setLevel("WARNING")
    dataset = data.load(FLAGS.dataset, FLAGS.data_dir)
    if FLAGS.limit_examples:
        dataset = dataset.first(FLAGS.limit_examples)
    runs = {name: run(name, dataset) for name in FLAGS.runs}
    report.write_results(FLAGS.out, SETTINGS, runs)
    plot(os.path.join(FLAGS.out, "accuracy.png"), runs)
    print(f"\n{table(runs)}\n\nWrote {FLAGS.out}/results.json and accuracy.png")


if __name__ == "__main__":
    app.run(main)
