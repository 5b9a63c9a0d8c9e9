"""Adaptive top-k SGD: loss and accuracy when a budget of entries is spent where it matters.

    python -m experiments.adaptive_top_k --dataset=mnist --data_dir=DIR --out=runs/adaptive_top_k

A perceptron with 100 hidden units, 4 workers with 32 examples each, learning rate 0.05, 1500 steps.
Each budget is a share of all entries of all steps, spent to the last entry by every rule:

    fixed      the same number of entries at every step, K / T
    norm       in proportion to the norm of what workers are about to send, n_t
    norm_ef    in proportion to n_t^(2/3)
    threshold  all entries above a threshold that the budget moves

with and without error feedback, beside dense SGD. The loss is Keras' own, the mean over the batches
trained on: of all steps, and of the last `--period`. Bits are those of one worker's messages, 48
for each entry: a float and its position in 16 bits; bytes are what a worker sends to all others.

Expected with error feedback: every rule within 0.5 points of "fixed", its mean loss at most 1.01
times as high; "threshold" at most 0.99 times as high with a budget of 1%, 0.97 times with 0.1%.
Without error feedback 0.1% costs 5 points. Ours, and the time it takes: experiments/README.md.

References:
    Ruan et al.: Adaptive Top-K in SGD for Communication-Efficient Distributed Learning,
    https://arxiv.org/abs/2210.13532
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
from tfqcomm.compressors import AdaptiveTopK
from tfqcomm.optimizers import AdaptiveTopKSGD

MODELS = {
    "digits": functools.partial(models.mlp, (8, 8, 1), hidden_units=(100,)),
    "mnist": functools.partial(models.mlp, hidden_units=(100,)),
    "cifar10": functools.partial(models.mlp, (32, 32, 3), hidden_units=(100,)),
}
RULES = ["fixed", "norm", "norm_ef", "threshold"]
FEEDBACK = {"both": [True, False], "with": [True], "without": [False]}

FLAGS = flags.FLAGS
SETTINGS = [  # recorded in results.json
    flags.DEFINE_enum("dataset", "mnist", list(MODELS), "Data set; cifar10 without augmentation."),
    flags.DEFINE_integer("workers", 4, "Workers.", 1),
    flags.DEFINE_integer("batch", 32, "Examples per step and worker.", 1),
    flags.DEFINE_integer("steps", 1500, "Of each run.", 1),
    flags.DEFINE_integer("period", 50, "Steps between two looks at the test set.", 1),
    flags.DEFINE_list("budgets", "0.01,0.001", "Shares of entries; 1 is dense SGD."),
    flags.DEFINE_list("rules", RULES, "Their names."),
    flags.DEFINE_enum("error_feedback", "both", list(FEEDBACK), "Runs with it, without it."),
    flags.DEFINE_boolean("dense", True, "Dense SGD, too."),
    flags.DEFINE_float("learning_rate", 0.05, "Step size.", 0.0),
    flags.DEFINE_float("momentum", 0.0, "Of SGD.", 0.0, 1.0),
    flags.DEFINE_boolean("momentum_correction", False, "Of each worker; with error feedback only."),
    flags.DEFINE_integer("seed", 0, "Of the weights and the data's order.", 0),
]
flags.DEFINE_string("data_dir", None, "Directory of a prepared tfds data set; else downloaded.")
flags.DEFINE_string("out", None, "Directory for results.json and plots.", required=True)


def measure(strategy: tf.distribute.Strategy, dataset: data.Dataset, setting: Mapping) -> dict:
    """Trains one model; returns `setting` and what came of it."""

    def optimizer():
        return AdaptiveTopKSGD(
            FLAGS.learning_rate,
            FLAGS.momentum,
            total_steps=FLAGS.steps,
            momentum_correction=FLAGS.momentum_correction and setting["error_feedback"],
            min_size=0,  # as the paper: biases and all
            **setting,
        )

    model = training.compiled(MODELS[FLAGS.dataset], optimizer, strategy, FLAGS.seed)
    epochs = training.train(
        model,
        dataset,
        epochs=FLAGS.steps // FLAGS.period,
        global_batch=FLAGS.batch * FLAGS.workers,
        seed=FLAGS.seed,
        steps_per_epoch=FLAGS.period,
        verbose=0,
    )
    return {**setting, **summary(model, epochs)}


@functools.cache
def bits_of(k: int, n: int) -> int:
    """Of a message that keeps `k` of `n` entries: positions and floats; all need no positions."""
    return 32 * (AdaptiveTopK(f"{k} entries/step").num_words(n) if k < n else n)


def summary(model: keras.Model, epochs: Sequence[Mapping[str, float]]) -> dict:
    """What results.json says of one run."""
    n, kept = model.count_params(), model.optimizer.history
    budget = FLAGS.steps * model.optimizer.options.compressor.entries_per_step(n)
    bits = np.array([bits_of(k, n) for k in kept.tolist()])
    for epoch, of_steps, k in zip(epochs, _by_period(bits), _by_period(kept), strict=True):
        epoch["paper_bits"], epoch["kept"] = int(of_steps.sum()), float(k.mean())
    return {
        "test_accuracy": epochs[-1]["test_accuracy"],
        "mean_loss": float(np.mean([epoch["train_loss"] for epoch in epochs])),
        "final_loss": epochs[-1]["train_loss"],
        "parameters": n,
        "budget_used": int(kept.sum()) / budget,
        "bits": int(bits.sum()),
        "bytes_sent_per_step": sum(epoch["bytes_sent"] for epoch in epochs) / FLAGS.steps,
        "kept": kept.tolist(),
        "epochs": epochs,
    }


def _by_period(values):
    return np.reshape(values, [-1, FLAGS.period])


def title(run: Mapping) -> str:
    """How a run is called in the table and in the plots."""
    if run["budget"] == 1:
        return "dense"
    return run["rule"] if run["error_feedback"] else f"{run['rule']} without feedback"


def table(runs: Sequence[Mapping]) -> str:
    """One line for each run, in Markdown. Losses are beside those of "fixed" with feedback."""
    fixed = {
        run["budget"]: run["mean_loss"]
        for run in runs
        if run["rule"] == "fixed" and run["error_feedback"]
    }
    header = ["run", "budget", "used", "k from", "k to", "accuracy", "mean loss", "of fixed"]
    header += ["final loss", "bits", "bytes sent"]
    rows = [
        [
            title(run),
            f"{run['budget']:.1%}",
            f"{run['budget_used']:.4f}",
            f"{min(run['kept']):,}",
            f"{max(run['kept']):,}",
            f"{run['test_accuracy']:.2%}",
            f"{run['mean_loss']:.4f}",
            f"{run['mean_loss'] / fixed[run['budget']]:.3f}" if run["budget"] in fixed else "",
            f"{run['final_loss']:.4f}",
            f"{run['bits']:,}",
            f"{run['bytes_sent_per_step']:,.0f}",
        ]
        for run in runs
    ]
    return report.markdown([header, *rows])


def settings() -> list[dict]:
    """Dense SGD, and every combination of the flags."""
    names = ("budget", "error_feedback", "rule")
    budgets = [float(budget) for budget in FLAGS.budgets]
    combinations = itertools.product(budgets, FEEDBACK[FLAGS.error_feedback], FLAGS.rules)
    dense = [(1.0, True, "fixed")] if FLAGS.dense else []
    return [dict(zip(names, values, strict=True)) for values in [*dense, *combinations]]


def plot(runs: Sequence[Mapping]) -> None:
    """A figure for each budget."""
    for budget in FLAGS.budgets:
        curves = {title(run): run["epochs"] for run in runs if run["budget"] == float(budget)}
        plots.plot_adaptive(
            os.path.join(FLAGS.out, f"adaptive_top_k_{budget}.png"),
            curves,
            f"Adaptive top-k, {float(budget):.1%} of all entries, {FLAGS.dataset}",
        )


def main(_):
    """Trains every combination from the same weights on the same data, then prints the table."""
    tf.get_logger().setLevel("WARNING")
    logging.set_verbosity(logging.WARNING)  # not how each of many models travels
    if not set(FLAGS.rules) <= set(RULES):
        raise app.UsageError(f"--rules must be among {','.join(RULES)}. Received: {FLAGS.rules}")
    if FLAGS.steps % FLAGS.period:
        raise app.UsageError(
            f"--steps must be a multiple of --period={FLAGS.period}. "
            f"Received: --steps={FLAGS.steps}"
        )
    strategy = training.mirrored_strategy(training.logical_cpus(FLAGS.workers))
    dataset = data.load(FLAGS.dataset, FLAGS.data_dir)
    runs = []
    for setting in settings():
        runs.append(measure(strategy, dataset, setting))
        print(
            f"{setting['budget']:.1%} {title(setting)}: {runs[-1]['test_accuracy']:.2%}, "
            f"mean loss {runs[-1]['mean_loss']:.4f}",
            flush=True,
        )
    report.write_results(FLAGS.out, SETTINGS, runs)
    plot(runs)
    print(f"\n{table(runs)}\n\nWrote {FLAGS.out}/results.json and adaptive_top_k_*.png")


if __name__ == "__main__":
    app.run(main)
