"""A character model that exchanges little: DiLoCo against SparseLoCo, test loss against bytes.

    python -m experiments.character_model --every=15 --seed=0 --out=runs/characters_15_0
    python -m experiments.character_model --every=50 --seed=0 --out=runs/characters_50_0

The text is that of scikit-learn's docstrings, 3 million characters of English and some code, so
nothing is downloaded; the last 100,000 are for testing. `models.character_cnn` predicts each
character of windows of 64 from those before it. Workers are logical devices of one process; all
methods start from the same weights and see the same batches. Local methods run Adam inside; Adam
itself exchanges gradients in every step.

SparseLoCo's paper (arXiv 2508.15706) has it below DiLoCo's loss, for H from 15 to 250 at 512M
parameters. Asked for here: a loss of at most DiLoCo's for at most 1/50 of its bytes per exchange,
with 224,256 parameters. Measured, seed 0: 50.4 times fewer bytes; 1.57 nats against 1.48 with H =
15, 1.86 against 1.50 with H = 50; with `--outer_rate=2` and 3,600 steps 1.335 against 1.327, and
1.36 against 1.31. 1 to 4 minutes a method and 900 steps on one shared core.

DiLoCo and SparseLoCo have the best inner rates of those tried with seed 0 and H = 15, Adam has
DiLoCo's; `--inner_rate` sets another.
`--methods` also knows DiLoCo and SparseLoCo with one thing changed.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging

import models
import tfqcomm
from experiments import data, plots, report, training
from tfqcomm import compressors, optimizers

CHARACTERS = 96  # the most frequent 95, and all others as one
WINDOW = 64
TEST = 100_000  # characters


@dataclasses.dataclass(frozen=True)
class Method:
    """What is compared.

    Attributes:
        optimizer: from the inner optimizer and the steps between two exchanges.
        rate: of the inner optimizer.
        local: whether replicas train alone in between.
    """

    optimizer: Callable[[keras.optimizers.Optimizer, int], keras.optimizers.Optimizer]
    rate: float
    local: bool = True


def _diloco(**options) -> Method:
    return Method(functools.partial(optimizers.DiLoCo, **options), 3e-3)


def _sparse_loco(ratio: float = 64 / 4096, value_dtype: str = "table2", **options) -> Method:
    top_k = compressors.TopK(ratio, value_dtype=value_dtype, chunk=4096)
    return Method(functools.partial(optimizers.SparseLoCo, compressor=top_k, **options), 1e-2)


METHODS = {
    "adam": Method(lambda inner, every: inner, 3e-3, local=False),
    "diloco": _diloco(),
    "sparse_loco": _sparse_loco(),
    "diloco_average": _diloco(outer_learning_rate=1.0, outer_momentum=0.0),
    "sparse_loco_all_kept": _sparse_loco(residual_decay=1.0),
    "sparse_loco_four_times": _sparse_loco(ratio=256 / 4096),
    "sparse_loco_float32": _sparse_loco(value_dtype="float32"),
}

FLAGS = flags.FLAGS
SETTINGS = [  # recorded in results.json
    flags.DEFINE_integer("workers", 8, "Logical devices.", 2),
    flags.DEFINE_integer("every", 15, "Steps between two exchanges of local methods.", 1),
    flags.DEFINE_integer("steps", 900, "In all, a multiple of --look.", 1),
    flags.DEFINE_integer("look", 300, "Steps between two tests, a multiple of --every.", 1),
    flags.DEFINE_integer("batch", 2, "Windows per step and worker.", 1),
    flags.DEFINE_integer("limit_examples", None, "Only the first windows of both splits.", 1),
    flags.DEFINE_integer("seed", 0, "Of the weights and the data's order.", 0),
    flags.DEFINE_float("inner_rate", None, "Learning rate; default: that of each method.", 0.0),
    flags.DEFINE_float("outer_rate", None, "Of local methods; default: that of each.", 0.0),
    flags.DEFINE_bool("cosine", False, "Whether it falls to zero, along a cosine."),
]
flags.DEFINE_list("methods", "adam,diloco,sparse_loco", f"Of {', '.join(METHODS)}.")
flags.DEFINE_string("out", "runs/characters", "Directory for results.json and test_loss.png.")


def docstrings(package: str) -> str:
    """All docstrings of a package but its tests', each once, in the order of its files' names."""
    found: dict[str, None] = {}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    root = pathlib.Path(package)
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                found[text] = None
    return "\n\n".join(found)


def windows(text: str) -> data.Dataset:
    """Characters, int32[n, WINDOW], by their ranks in the training part, and those after them."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    symbols, numbers = np.unique(codes, return_inverse=True)
    counts = np.bincount(numbers[:-TEST], minlength=len(symbols))
    ranks = np.empty(len(symbols), np.int32)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(symbols))
    ranked = np.minimum(ranks[numbers], CHARACTERS - 1)

    def cut(part):
        whole = (len(part) - 1) // WINDOW * WINDOW
        return [part[i : i + whole].reshape(-1, WINDOW) for i in (0, 1)]

    return data.Dataset(*cut(ranked[:-TEST]), *cut(ranked[-TEST:]), CHARACTERS)


def load() -> data.Dataset:
    """The windows of scikit-learn's docstrings."""
    import sklearn

    text = docstrings(os.path.dirname(sklearn.__file__))
    print(f"scikit-learn {sklearn.__version__}: {len(text):,} characters", flush=True)
    dataset = windows(text)
    return dataset.first(FLAGS.limit_examples) if FLAGS.limit_examples else dataset


def inner(rate: float) -> keras.optimizers.Optimizer:
    """Adam with the learning rate that the flags say."""
    schedule = keras.optimizers.schedules.CosineDecay(rate, FLAGS.steps)
    return keras.optimizers.Adam(schedule if FLAGS.cosine else rate)


def run(method: Method, devices: Sequence[str], dataset: data.Dataset) -> dict:
    """Trains with a method; returns what results.json says of it."""
    rate = method.rate if FLAGS.inner_rate is None else FLAGS.inner_rate
    outer = {}
    if method.local and FLAGS.outer_rate is not None:
        outer["outer_learning_rate"] = FLAGS.outer_rate
    ops = tfqcomm.distribute.CompressedAllReduce("identity")  # counts what Adam sends
    strategy = tf.distribute.MirroredStrategy(devices, cross_device_ops=ops)
    if method.local:
        strategy = training.mirrored_strategy(devices)
    model = training.compiled(
        functools.partial(models.character_cnn, CHARACTERS),
        lambda: method.optimizer(inner(rate), FLAGS.every, **outer),
        strategy,
        FLAGS.seed,
    )
    epochs = training.train(
        model,
        dataset,
        epochs=FLAGS.steps // FLAGS.look,
        global_batch=FLAGS.batch * FLAGS.workers,
        steps_per_epoch=FLAGS.look,
        seed=FLAGS.seed,
        verbose=0,
        first=[tfqcomm.callbacks.AverageReplicas()] if method.local else [],
    )
    exchanges = FLAGS.steps // (FLAGS.every if method.local else 1)
    return {
        "inner_rate": rate,
        "exchanges": exchanges,
        "bytes_per_exchange": sum(epoch["bytes_sent"] for epoch in epochs) / exchanges,
        "epochs": epochs,
    }


def line(name: str, runs: Mapping[str, Mapping]) -> list[str]:
    """Of the table."""
    found = runs[name]
    last, sent = found["epochs"][-1], found["bytes_per_exchange"]
    dense = runs["diloco"]["bytes_per_exchange"] if "diloco" in runs else None
    return [
        name,
        f"{found['inner_rate']:g}",
        f"{last['test_loss']:.4f}",
        f"{last['test_accuracy']:.2%}",
        f"{found['exchanges']:,}",
        f"{sent:,.0f}",
        f"{dense / sent:.1f}x" if dense else "",
    ]


def main(_):
    """Trains with all of `--methods`, one after the other; after each the results are written."""
    tf.get_logger().setLevel("ERROR")
    logging.set_verbosity(logging.ERROR)
    if not set(FLAGS.methods) <= set(METHODS):
        raise app.UsageError(f"--methods must be of {','.join(METHODS)}. Got: {FLAGS.methods}")
    if FLAGS.steps % FLAGS.look or FLAGS.look % FLAGS.every:
        raise app.UsageError("--steps must be a multiple of --look, and that one of --every.")
    devices = training.logical_cpus(FLAGS.workers)
    dataset = load()
    runs: dict[str, dict] = {}
    for name in FLAGS.methods:
        runs[name] = run(METHODS[name], devices, dataset)
        print("  ".join(line(name, runs)), flush=True)
        report.write_results(FLAGS.out, SETTINGS, runs)
    plots.plot_test_loss(
        os.path.join(FLAGS.out, "test_loss.png"),
        {name: found["epochs"] for name, found in runs.items()},
        f"Characters, {FLAGS.workers} workers, exchanges every {FLAGS.every} steps",
    )
    header = ["method", "inner rate", "test loss", "test accuracy", "exchanges"]
    header += ["bytes per exchange", "less than DiLoCo"]
    print(f"\n{report.markdown([header, *(line(name, runs) for name in runs)])}")
    print(f"\nWrote {FLAGS.out}/results.json and test_loss.png")


if __name__ == "__main__":
    app.run(main)
