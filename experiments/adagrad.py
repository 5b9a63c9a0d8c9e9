"""QCMD and QRDA Adagrad on linear models: accuracy against weights that are exactly zero.

    python -m experiments.adagrad --dataset=mnist --data_dir=DIR --out=runs/adagrad_mnist
    python -m experiments.adagrad --dataset=a9a --data_dir=DIR --l1_list=0,1e-5,1e-4,1e-3 \
        --out=runs/adagrad_a9a

Softmax regression on raw pixels in [0, 1] (MNIST, 7,840 weights) or logistic regression (a9a, 123),
from zero weights, 8 workers with 32 examples each. Workers send their gradients in 2 bits an entry,
without error feedback; only the biases, which have no l1 either, travel dense. TernGrad, clipped at
2.5 standard deviations, is what the paper's threshold quantization is compared with: `scaled` and
`optimal` are two rules for the threshold. Every learning rate is recorded, and that with the best
test accuracy is in the table.

Two counts of what workers send: 2 bits for each weight and a float for the scale, as the paper
counts, and the bytes of an all-gather among the workers. What comes back to each is counted as the
parameter server of the paper would send it, in the shorter of two forms: the weights that are not
zero, each with its position, or with one bit for each weight that says which they are.

Ours, beside what was to be expected, and the time it takes: experiments/README.md.

References:
    Xu et al.: Quantized Adaptive Subgradient Algorithms and Their Applications,
    https://arxiv.org/abs/2208.05631
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging

import models
from experiments import data, plots, report, training
from experiments.accounting import paper_bits
from tfqcomm import compressors, optimizers, sparsity

MODELS = {
    "digits": functools.partial(models.softmax_regression, (8, 8, 1)),
    "mnist": models.softmax_regression,
    "a9a": models.logistic_regression,
    "cifar10": models.comp_ams_cifar_cnn,  # a deep network: with --center=initial
}
OPTIMIZERS = {"qcmd": optimizers.QCMDAdagrad, "qrda": optimizers.QRDAAdagrad}
COMPRESSORS = {
    "identity": compressors.Identity(),
    "ternary": compressors.Ternary(clip=2.5),
    "scaled": compressors.ThresholdQuantizer("scaled"),
    "optimal": compressors.ThresholdQuantizer("optimal"),
}

FLAGS = flags.FLAGS
SETTINGS = [  # recorded in results.json
    flags.DEFINE_enum("dataset", "mnist", list(MODELS), "Data set."),
    flags.DEFINE_integer("workers", 8, "Workers.", 1),
    flags.DEFINE_integer("batch", 32, "Examples per step and worker.", 1),
    flags.DEFINE_integer("epochs", 3, "Passes over the training set.", 1),
    flags.DEFINE_list("optimizers", list(OPTIMIZERS), "Their names."),
    flags.DEFINE_list("compressors", list(COMPRESSORS), "Their names."),
    flags.DEFINE_list("l1_list", "0,1e-4,1e-3", "Weights of the l1 norm."),
    flags.DEFINE_list("learning_rates", "0.02,0.05,0.1", "To choose the best from."),
    flags.DEFINE_float("delta", 0.01, "Added to the root of the sum of squares.", 0.0),
    flags.DEFINE_enum("center", "zero", ["zero", "initial"], "Of QRDA."),
    flags.DEFINE_integer("seed", 0, "Of the data's order and of stochastic rounding.", 0),
]
flags.DEFINE_string("data_dir", None, "Directory of a prepared tfds data set or of a9a's files.")
flags.DEFINE_string("out", None, "Directory for results.json and a plot.", required=True)


def measure(strategy: tf.distribute.Strategy, dataset: data.Dataset, setting: Mapping) -> dict:
    """Trains one model; returns `setting` and what came of it."""
    codec = COMPRESSORS[setting["compressor"]]

    def optimizer():
        center = {"center": FLAGS.center} if setting["optimizer"] == "qrda" else {}
        return OPTIMIZERS[setting["optimizer"]](
            setting["learning_rate"],
            **center,
            l1=setting["l1"],
            delta=FLAGS.delta,
            compressor=codec,
            min_size=1,  # weights of any number, but no biases
            schedule="auto" if setting["compressor"] == "identity" else "all_gather",
            seed=FLAGS.seed,
        )

    model = training.compiled(MODELS[FLAGS.dataset], optimizer, strategy, FLAGS.seed)
    epochs = training.train(
        model,
        dataset,
        epochs=FLAGS.epochs,
        global_batch=FLAGS.batch * FLAGS.workers,
        seed=FLAGS.seed,
        verbose=0,
    )
    return {**setting, **summary(codec, model, epochs)}


def summary(
    codec: compressors.Compressor, model: keras.Model, epochs: Sequence[Mapping[str, float]]
) -> dict:
    """What results.json says of one model. Weights are all variables but the biases."""
    weights = np.concatenate([np.ravel(v) for v in model.trainable_variables if len(v.shape) > 1])
    nonzeros = int(np.count_nonzero(weights))
    return {
        "test_accuracy": epochs[-1]["test_accuracy"],
        "weights": len(weights),
        "nonzeros": nonzeros,
        "zeros": 1 - nonzeros / len(weights),
        "bits_up_per_step": paper_bits(codec, [len(weights)]),
        "bytes_sent_per_step": epochs[-1]["bytes_sent"] / epochs[-1]["steps"],
        "bits_down": sparsity.sparse_bits(nonzeros, len(weights)),
        "epochs": epochs,
    }


def best_rates(runs: Sequence[Mapping]) -> list[Mapping]:
    """Of the runs that differ in nothing but the learning rate the most accurate."""
    best: dict[tuple, Mapping] = {}
    for run in runs:
        key = (run["optimizer"], run["l1"], run["compressor"])
        if key not in best or run["test_accuracy"] > best[key]["test_accuracy"]:
            best[key] = run
    return list(best.values())


def table(runs: Sequence[Mapping]) -> str:
    """One line for each run, in Markdown."""
    header = ["optimizer", "l1", "compressor", "rate", "accuracy", "zeros", "non-zeros"]
    header += ["bits up", "bytes sent", "bits down"]
    rows = [
        [
            run["optimizer"],
            f"{run['l1']:g}",
            run["compressor"],
            f"{run['learning_rate']:g}",
            f"{run['test_accuracy']:.2%}",
            f"{run['zeros']:.1%}",
            f"{run['nonzeros']:,}",
            f"{run['bits_up_per_step']:,}",
            f"{run['bytes_sent_per_step']:,.0f}",
            f"{run['bits_down']:,}",
        ]
        for run in runs
    ]
    return report.markdown([header, *rows])


def plot(path: str, runs: Sequence[Mapping]) -> None:
    """A line for each optimizer and compressor, with a point for each l1."""
    lines = {}
    for run in runs:
        points = lines.setdefault(f"{run['optimizer']}, {run['compressor']}", [])
        points.append((run["zeros"], run["test_accuracy"]))
    plots.plot_sparsity(path, lines, f"QCMD and QRDA Adagrad, {FLAGS.dataset}")


def settings() -> list[dict]:
    """Every combination of the flags."""
    names = ("optimizer", "l1", "compressor", "learning_rate")
    l1s, rates = (
        [float(value) for value in flag] for flag in (FLAGS.l1_list, FLAGS.learning_rates)
    )
    combinations = itertools.product(FLAGS.optimizers, l1s, FLAGS.compressors, rates)
    return [dict(zip(names, values, strict=True)) for values in combinations]


def main(_):
    """Trains every combination, then prints the table of the best rates."""
    tf.get_logger().setLevel("WARNING")
    logging.set_verbosity(logging.WARNING)  # not how each of many models travels
    for flag, known in (("optimizers", OPTIMIZERS), ("compressors", COMPRESSORS)):
        if not set(FLAGS[flag].value) <= set(known):
            raise app.UsageError(
                f"--{flag} must be among {','.join(known)}. Received: {FLAGS[flag].value}"
            )
    strategy = training.mirrored_strategy(training.logical_cpus(FLAGS.workers))
    dataset = data.load(FLAGS.dataset, FLAGS.data_dir, normalise=False)
    runs, todo = [], settings()
    for number, setting in enumerate(todo, start=1):
        runs.append(measure(strategy, dataset, setting))
        print(
            f"{number}/{len(todo)} {' '.join(str(value) for value in setting.values())}: "
            f"{runs[-1]['test_accuracy']:.2%}, zeros {runs[-1]['zeros']:.1%}",
            flush=True,
        )
    report.write_results(FLAGS.out, SETTINGS, runs)
    best = best_rates(runs)
    plot(os.path.join(FLAGS.out, "adagrad.png"), best)
    print(f"\n{table(best)}\n\nWrote {FLAGS.out}/results.json and adagrad.png")


if __name__ == "__main__":
    app.run(main)
