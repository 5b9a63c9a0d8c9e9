"""Accuracy against bytes: all methods of this package on one task, in one plot.

    python -m experiments.frontier --out=runs/frontier
    python -m experiments.frontier --dataset=mnist --data_dir=DIR --out=runs/frontier_mnist

Workers are logical devices of one process. All methods start from the same weights and see the same
batches. Learning rates are one for each family, not tuned for each method: Adam's, momentum SGD's,
Adagrad's, Adam's where its progress is averaged and no outer momentum follows, and that of steps
which are signs of a momentum alone. Bytes are what one worker sends from the first step to the
last.

Methods that exchange models rather than gradients, every `--every` steps, are tested on their
global or mean weights. The other experiments compare each paper with its own rivals.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence

import keras
import tensorflow as tf
from absl import app, flags, logging

import models
import tfqcomm
from experiments import data, plots, report, training
from tfqcomm import compressors, optimizers

RATES = {"adam": 1e-3, "sgd": 0.05, "adagrad": 0.02, "averaged adam": 1e-2, "signs": 4e-3}


@dataclasses.dataclass(frozen=True)
class Method:
    """A point of the plot.

    Attributes:
        optimizer: from its learning rate and the steps between two exchanges.
        rate: the name of its learning rate.
        compressor: of the strategy, for stock optimizers.
        local: whether replicas train alone in between.
    """

    optimizer: Callable[[float, int], keras.optimizers.Optimizer]
    rate: str = "adam"
    compressor: object = None
    local: bool = False


def _adam(rate, every):
    return keras.optimizers.Adam(rate)


def _sgd(rate, every):
    return keras.optimizers.SGD(rate, momentum=0.9)


def _own(build, **options) -> Callable[[float, int], keras.optimizers.Optimizer]:
    return lambda rate, every: build(rate, **options)


def _outer(build, **options) -> Callable[[float, int], keras.optimizers.Optimizer]:
    return lambda rate, every: build(keras.optimizers.Adam(rate), every, **options)


# The default of SparseLoCo for all kernels, however small; as in its paper vectors travel whole.
_SPARSE = {".*kernel": compressors.TopK(64 / 4096, value_dtype="table2", chunk=4096), "*": None}

METHODS = {
    "Adam": Method(_adam, compressor="identity"),
    "Adam, bfloat16": Method(_adam, compressor="bfloat16"),
    "Adam, 8-bit blocks": Method(_adam, compressor="block_int8"),
    "Adam, Block-Sign": Method(_adam, compressor="block_sign"),
    "Adam, Top-k 1%": Method(_adam, compressor="top_k"),
    "Adam, Top-k 1%, 4 bits": Method(_adam, compressor=compressors.TopK(value_dtype="int4")),
    "Adam, Top-k 1%, one support": Method(_adam, compressor=compressors.TopK(support="shared")),
    "Adam, PowerSGD 4": Method(_adam, compressor="power_sgd"),
    "COMP-AMS, Block-Sign": Method(_own(optimizers.CompAMS, compressor="block_sign")),
    "COMP-AMS, Top-k 1%": Method(_own(optimizers.CompAMS, compressor="top_k")),
    "Quantized Adam, 2 bits": Method(_own(optimizers.QAdam)),
    # The variance settles within a tenth to a fifth of these short trainings, as in the paper.
    "1-bit Adam": Method(lambda rate, every: optimizers.OneBitAdam(rate, warm_up=8 * every)),
    "QCMD Adagrad, 2 bits": Method(_own(optimizers.QCMDAdagrad), "adagrad"),
    "DeMo": Method(_own(optimizers.DeMo), "signs"),
    "SGD": Method(_sgd, "sgd", compressor="identity"),
    "SGD, PowerSGD 4": Method(_sgd, "sgd", compressor="power_sgd"),
    "SGD, adaptive top-k 0.1%": Method(
        _own(optimizers.AdaptiveTopKSGD, momentum=0.9, budget=0.001, rule="norm_ef"), "sgd"
    ),
    "Leader SGD": Method(
        lambda rate, every: optimizers.LeaderSGD(
            rate, 0.9, local_period=every, global_period=every
        ),
        "sgd",
        local=True,
    ),
    "DiLoCo": Method(_outer(optimizers.DiLoCo), local=True),
    "DiLoCo, 8-bit blocks": Method(
        _outer(optimizers.DiLoCo, compressor="block_int8", min_size=0), local=True
    ),
    "SparseLoCo": Method(
        _outer(optimizers.SparseLoCo, compressor=_SPARSE, min_size=0), "averaged adam", local=True
    ),
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """What suits a data set."""

    build: Callable[[], keras.Model]
    epochs: int
    global_batch: int
    every: int  # divides the steps of an epoch


PRESETS = {
    "digits": Preset(models.digits_cnn, 20, 64, 11),
    "mnist": Preset(models.comp_ams_mnist_cnn, 10, 500, 15),
}

FLAGS = flags.FLAGS
SETTINGS = [  # recorded in results.json
    flags.DEFINE_enum("dataset", "digits", list(PRESETS), "Data set; digits needs no download."),
    flags.DEFINE_integer("workers", 8, "Logical devices.", 2),
    flags.DEFINE_integer("epochs", None, "Passes over the training set; default by data set.", 1),
    flags.DEFINE_integer("every", None, "Steps between exchanges of models; by data set.", 1),
    flags.DEFINE_integer("limit_examples", None, "Only the first of both splits.", 1),
    flags.DEFINE_integer("seed", 0, "Of the weights, the data's order and dropout.", 0),
]
flags.DEFINE_list("methods", None, "Only these, or those whose names contain one; default: all.")
flags.DEFINE_string("data_dir", None, "Directory of a prepared tfds data set; else downloaded.")
flags.DEFINE_string("out", "runs/frontier", "Directory for results.json and frontier.png.")


def run(method: Method, devices: Sequence[str], dataset: data.Dataset) -> list[dict[str, float]]:
    """Trains with a method; returns the record of each epoch."""
    preset = PRESETS[FLAGS.dataset]
    strategy = training.mirrored_strategy(devices)
    if method.compressor is not None:
        ops = tfqcomm.distribute.CompressedAllReduce(method.compressor)
        strategy = tf.distribute.MirroredStrategy(devices, cross_device_ops=ops)
    build = functools.partial(method.optimizer, RATES[method.rate], FLAGS.every or preset.every)
    model = training.compiled(preset.build, build, strategy, FLAGS.seed)
    return training.train(
        model,
        dataset,
        epochs=FLAGS.epochs or preset.epochs,
        global_batch=preset.global_batch,
        seed=FLAGS.seed,
        verbose=0,
        first=[tfqcomm.callbacks.AverageReplicas()] if method.local else [],
    )


def line(name: str, epochs: Sequence[Mapping[str, float]]) -> list[str]:
    """Of the table."""
    found = report.summary(epochs)
    sent = sum(epoch["bytes_sent"] for epoch in epochs)
    accuracy = f"{100 * found['test_accuracy']:.2f}"
    return [name, accuracy, f"{sent / 1e6:.3f}", f"{found['ratio']:.0f}x"]


def _is_meant(part: str, name: str) -> bool:
    """By its whole name, or a part of it that is no name itself."""
    return part == name or (part not in METHODS and part in name)


def main(_):
    """Trains with all methods, one after the other; after each the results are written."""
    tf.get_logger().setLevel("ERROR")
    logging.set_verbosity(logging.ERROR)
    devices = training.logical_cpus(FLAGS.workers)
    dataset = data.load(FLAGS.dataset, FLAGS.data_dir)
    if FLAGS.limit_examples:
        dataset = dataset.first(FLAGS.limit_examples)
    wanted = FLAGS.methods or [""]
    names = [name for name in METHODS if any(_is_meant(part, name) for part in wanted)]
    if not names:
        raise app.UsageError(f"--methods must be parts of {list(METHODS)}. Received: {wanted}")
    runs = {}
    for name in names:
        runs[name] = run(METHODS[name], devices, dataset)
        print("  ".join(line(name, runs[name])), flush=True)
        report.write_results(FLAGS.out, SETTINGS, runs)
    title = f"{FLAGS.dataset}, {FLAGS.workers} workers"
    plots.plot_frontier(os.path.join(FLAGS.out, "frontier.png"), runs, title)
    header = ["method", "test accuracy, %", "MB sent by a worker", "less than dense"]
    print(f"\n{report.markdown([header, *(line(name, runs[name]) for name in names)])}")
    print(f"\nWrote {FLAGS.out}/results.json and frontier.png")


if __name__ == "__main__":
    app.run(main)
