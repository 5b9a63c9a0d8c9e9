"""Quantized Adam on a perceptron: accuracy against bits, up and down.

    python -m experiments.qadam --dataset=mnist --data_dir=DIR --out=runs/qadam

A perceptron with 128 hidden units, 8 workers with 16 examples each, 8 epochs, learning rate 1e-3,
halved every 4 epochs. Every tensor is quantized by itself, biases too, as in the paper. The
variants, `k` being that of the logarithmic grid of the updates:

    float32                          nothing is quantized: the mean of the workers' Adams
    k0  k1  k2                       2, 3 and 3 bits for each entry on the way up
    k0_no_feedback                   what quantization leaves out is lost
    uniform2                         2 bits on a uniform grid, whose levels are those of k = 0
    weights8  weights6               float32 updates, weights quantized on the way down: levels up
                                     to the largest weight of each tensor, not up to 0.5
    k0_weights8                      both
    two_phase                        k = 0 on the way up; the mean update, with k = 0 and error
                                     feedback of its own, on the way down: Efficient-Adam

The test accuracy is that of the quantized weights, Q_x(x), which are what the model's variables
hold. Bits are those between one worker and the parameter server of the paper. The bytes beside them
are what a worker sends to the others in an all-reduce (float32), an all-gather or a two-phase
exchange, where nobody sends weights.

Expected for a data set like Fashion-MNIST, in points of accuracy behind float32: k0, k1, k2 at most
0.4, weights8 0.3, weights6 0.8, k0_weights8 0.5 with 6.4 times fewer bits in all; k0_no_feedback at
least 1.5 behind k0. Ours, on MNIST, and the time it takes: experiments/README.md.

References:
    Chen, Shen, Huang, Liu: Quantized Adam with Error Feedback, https://arxiv.org/abs/2004.14180
    Chen, Shen, Liu: Efficient-Adam, https://arxiv.org/abs/2205.14473
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging

import models
from experiments import data, plots, report, training
from experiments.accounting import paper_bits
from tfqcomm.compressors import Identity, LogGrid, UniformGrid
from tfqcomm.optimizers import QAdam

MODELS = {
    "digits": functools.partial(models.mlp, (8, 8, 1)),
    "mnist": models.mlp,
    "cifar10": functools.partial(models.mlp, (32, 32, 3)),
}
VARIANTS = {  # name -> arguments of the optimizer
    "float32": {"compressor": Identity(), "schedule": "auto"},
    "k0": {"compressor": LogGrid(0)},
    "k1": {"compressor": LogGrid(1)},
    "k2": {"compressor": LogGrid(2)},
    "k0_no_feedback": {"compressor": LogGrid(0), "error_feedback": False},
    "uniform2": {"compressor": UniformGrid(2)},
    "weights8": {
        "compressor": Identity(),
        "schedule": "auto",
        "weight_compressor": UniformGrid(8),
    },
    "weights6": {
        "compressor": Identity(),
        "schedule": "auto",
        "weight_compressor": UniformGrid(6),
    },
    "k0_weights8": {"compressor": LogGrid(0), "weight_compressor": UniformGrid(8)},
    "two_phase": {"compressor": LogGrid(0), "schedule": "two_phase"},
}

FLAGS = flags.FLAGS
SETTINGS = [  # recorded in results.json
    flags.DEFINE_enum("dataset", "mnist", list(MODELS), "Data set; cifar10 without augmentation."),
    flags.DEFINE_integer("workers", 8, "Workers.", 1),
    flags.DEFINE_integer("batch", 16, "Examples per step and worker.", 1),
    flags.DEFINE_integer("epochs", 8, "Passes over the training set.", 1),
    flags.DEFINE_list("variants", list(VARIANTS), "Their names."),
    flags.DEFINE_float("learning_rate", 1e-3, "Step size of the first epochs.", 0.0),
    flags.DEFINE_integer("halve_every", 4, "Epochs after which the step size is halved.", 1),
    flags.DEFINE_integer("seed", 0, "Of the weights and the data's order.", 0),
]
flags.DEFINE_string("data_dir", None, "Directory of a prepared tfds data set; else downloaded.")
flags.DEFINE_string("out", None, "Directory for results.json and a plot.", required=True)


def measure(strategy: tf.distribute.Strategy, dataset: data.Dataset, variant: str) -> dict:
    """Trains one model; returns what results.json says of it."""
    global_batch = FLAGS.batch * FLAGS.workers
    steps = FLAGS.halve_every * (len(dataset.x_train) // global_batch)

    def optimizer():
        rate = keras.optimizers.schedules.ExponentialDecay(
            FLAGS.learning_rate, steps, decay_rate=0.5, staircase=True
        )
        arguments = {"schedule": "all_gather", **VARIANTS[variant]}
        return QAdam(rate, min_size=0, seed=FLAGS.seed, **arguments)

    model = training.compiled(MODELS[FLAGS.dataset], optimizer, strategy, FLAGS.seed)
    epochs = training.train(
        model,
        dataset,
        epochs=FLAGS.epochs,
        global_batch=global_batch,
        seed=FLAGS.seed,
        verbose=0,
    )
    return summary(model, epochs)


def summary(model: keras.Model, epochs: Sequence[Mapping[str, float]]) -> dict:
    """What results.json says of one variant."""
    optimizer = model.optimizer
    codec = optimizer.options.compressor
    sizes = [int(np.prod(v.shape)) for v in model.trainable_variables]
    up = paper_bits(codec, sizes)
    two_phase = optimizer.options.schedule == "two_phase"
    down = up if two_phase else paper_bits(optimizer.weight_compressor, sizes)
    for epoch in epochs:
        epoch["paper_bits"] = (up + down) * epoch["steps"]
    return {
        "compressor": str(codec),
        "weight_compressor": str(optimizer.weight_compressor),
        "parameters": model.count_params(),
        "test_accuracy": epochs[-1]["test_accuracy"],
        "bits_up_per_step": up,
        "bits_down_per_step": down,
        "ratio": 2 * 32 * sum(sizes) / (up + down),
        "bytes_sent_per_step": epochs[-1]["bytes_sent"] / epochs[-1]["steps"],
        "epochs": epochs,
    }


def table(runs: Mapping[str, Mapping]) -> str:
    """One line for each variant, in Markdown."""
    header = ["variant", "accuracy", "bits up", "bits down", "ratio", "bytes sent"]
    rows = [
        [
            variant,
            f"{run['test_accuracy']:.2%}",
            f"{run['bits_up_per_step']:,}",
            f"{run['bits_down_per_step']:,}",
            f"{run['ratio']:.1f}x",
            f"{run['bytes_sent_per_step']:,.0f}",
        ]
        for variant, run in runs.items()
    ]
    return report.markdown([header, *rows])


def main(_):
    """Trains every variant from the same weights on the same data, then prints the table."""
    tf.get_logger().setLevel("WARNING")
    logging.set_verbosity(logging.WARNING)  # not how each of many models travels
    if not set(FLAGS.variants) <= set(VARIANTS):
        raise app.UsageError(
            f"--variants must be among {','.join(VARIANTS)}. Received: {FLAGS.variants}"
        )
    strategy = training.mirrored_strategy(training.logical_cpus(FLAGS.workers))
    dataset = data.load(FLAGS.dataset, FLAGS.data_dir)
    runs = {}
    for variant in FLAGS.variants:
        runs[variant] = measure(strategy, dataset, variant)
        print(f"{variant}: {runs[variant]['test_accuracy']:.2%}", flush=True)
    report.write_results(FLAGS.out, SETTINGS, runs)
    curves = {variant: run["epochs"] for variant, run in runs.items()}
    plots.plot_accuracy(
        os.path.join(FLAGS.out, "qadam.png"),
        curves,
        f"Quantized Adam, {FLAGS.dataset}",
        sent="paper_bits",
    )
    print(f"\n{table(runs)}\n\nWrote {FLAGS.out}/results.json and qadam.png")


if __name__ == "__main__":
    app.run(main)
